"""The choice of a token against transformers' processors and exact probabilities; and that it doesn't depend on who stands beside."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from generation.sampling import Sampling, draw, noise, process

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, 0.5]])
CHOICES = {"temperature": [0.3, 1.0, 2.5], "top_k": [None, 1, 3, 500], "top_p": [None, 0.1, 0.6, 0.95], "min_p": [None, 0.05, 0.4]}
CHOICES |= {"repetition_penalty": [1.0, 1.3, 0.7], "no_repeat_ngram": [None, 1, 2, 3]}


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def processors_of_transformers():
    """One model serves all cases: only its method that puts processors together is used."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8, n_positions=8))

    def probabilities(texts: list[list[int]], logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        values = vars(sampling) | {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
        values["no_repeat_ngram_size"] = values.pop("no_repeat_ngram")
        config = transformers.GenerationConfig(do_sample=True, **values)
        found = model._get_logits_processor(config, input_ids_seq_length=len(texts[0]), device="cpu", model_kwargs={})
        return found(torch.tensor(texts), logits.clone()).softmax(dim=-1)

    return probabilities


@given(chosen=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_probabilities_are_those_of_transformers(processors_of_transformers, chosen, seed):
    logits, sampling = random_logits(3, 50, seed=seed), Sampling(**chosen)
    texts = torch.randint(12, (3, 20), generator=torch.Generator().manual_seed(seed)).tolist()
    expected = processors_of_transformers(texts, logits, sampling)
    got = process(logits, texts, sampling).softmax(dim=-1)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(got > 0, expected > 0)


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """That tokens (n,) could have been drawn from these probabilities (V,), and never one that has none."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double()
    assert possible.sum() == 1 or chisquare(counts[possible], len(tokens) * expected / expected.sum()).pvalue > 1e-3


def exact(text: list[int], sampling: Sampling) -> torch.Tensor:
    """Probabilities (V,) behind a text with LOGITS, token by token as the words of the options say."""
    scores = LOGITS[0].double().tolist()
    for i in set(text):
        scores[i] *= 1 / sampling.repetition_penalty if scores[i] > 0 else sampling.repetition_penalty
    n = sampling.no_repeat_ngram
    if n:
        grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        scores = [-torch.inf if (*text[len(text) - n + 1 :], i) in grams else score for i, score in enumerate(scores)]
    found = (torch.tensor(scores) / sampling.temperature).softmax(dim=0)
    order = found.argsort(descending=True).tolist()
    for i in order[sampling.top_k or len(order) :]:
        found[i] = 0
    found, before = found / found.sum(), 0.0
    for i in order:
        before, found[i] = before + found[i].item(), 0 if sampling.top_p and before >= sampling.top_p else found[i]
    found[found < (sampling.min_p or 0) * found.max()] = 0
    return found / found.sum()


COMBINATIONS = [
    {"temperature": 1.0},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "no_repeat_ngram": 2},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "no_repeat_ngram": 3},
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@pytest.mark.parametrize("over", ["seeds", "numbers"])
def test_draws_follow_the_exact_probabilities(options, over):
    """Over the seeds of many texts, and over the tokens of one."""
    n, text, sampling = 4000, [4, 1, 0, 2, 1, 4, 1], Sampling(**options)
    scores = process(LOGITS, [text], sampling).expand(n, -1)
    seeds, numbers = (range(n), [5] * n) if over == "seeds" else ([12345] * n, range(n))
    chi_square(draw(scores, seeds, numbers), exact(text, sampling))


def test_noise_of_neighbours_is_independent():
    """Texts with seeds in a row, and tokens in a row: pairs of draws are as frequent as the product of their probabilities."""
    scores, n = process(LOGITS, [[]], Sampling(1.0)).expand(3000, -1), 3000
    probabilities = LOGITS.softmax(dim=-1)[0]
    first = draw(scores, range(n), [0] * n)
    for seeds, numbers in ((range(1, n + 1), [0] * n), (range(n), [1] * n), (range(2**62, 2**62 + n), [0] * n)):
        pairs = first * 6 + draw(scores, seeds, numbers)
        chi_square(pairs, torch.outer(probabilities, probabilities).flatten())


def test_a_draw_depends_on_seed_and_number_alone():
    scores = process(random_logits(8, 300), [[]] * 8, Sampling(1.0))
    seeds, numbers = [9, 1, 2**62, 0, 7, 9, 9, 3], [0, 5, 2, 10**6, 1, 1, 0, 0]
    together = draw(scores, seeds, numbers)
    alone = [draw(scores[i : i + 1], seeds[i : i + 1], numbers[i : i + 1]).item() for i in range(8)]
    assert together.tolist() == alone and len(set(alone)) > 1
    assert torch.equal(noise(1, 2, 50), noise(1, 2, 80)[:50])


def test_rounding_errors_change_no_draw():
    """As large as those that tell a batch's matrix products from single ones."""
    scores = process(random_logits(20, 1000), [[]] * 20, Sampling(1.0))
    other = scores + 1e-6 * random_logits(20, 1000, seed=1)
    for start in range(300):
        seeds, numbers = range(20 * start, 20 * start + 20), [start] * 20
        assert torch.equal(draw(scores, seeds, numbers), draw(other, seeds, numbers))


def test_ties_let_no_more_through_than_asked_for():
    scores = process(torch.zeros(1, 5), [[]], Sampling(1.0, top_k=2))
    assert scores.isfinite().sum() == 2
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)):  # four equal probabilities are exact in binary
        assert process(torch.zeros(1, 4), [[]], Sampling(1.0, top_p=top_p)).isfinite().sum() == kept


def test_top_p_of_flat_and_of_peaked_distributions(processors_of_transformers):
    """The usual few tokens are enough for one, the other needs nearly the whole vocabulary; also side by side."""
    logits, sampling = torch.cat((random_logits(2, 5000) / 3, 4 * random_logits(2, 5000))), Sampling(1.0, top_p=0.97)
    for rows in (logits[:2], logits[2:], logits):
        expected = processors_of_transformers([[0]] * len(rows), rows, sampling)
        got = process(rows, [[0]] * len(rows), sampling).softmax(dim=-1)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-3)
    assert (expected[:2] > 0).sum() > 2000 > 200 > (expected[2:] > 0).sum()


def test_greedy_ignores_filters_and_obeys_penalties():
    greedy = Sampling(0.0, top_k=1, min_p=0.9)
    assert process(LOGITS, [[]], greedy).argmax() == 0 and Sampling(1e-30).greedy
    assert process(LOGITS, [[0]], Sampling(0.0, repetition_penalty=3.0)).argmax() == 1
    assert process(LOGITS, [[3, 0, 3]], Sampling(0.0, no_repeat_ngram=2)).argmax() == 1


def test_forbidden_ids_are_never_drawn():
    for sampling in (Sampling(1.0), Sampling(5.0, top_k=2, repetition_penalty=2.0), Sampling(0.0)):
        scores = process(LOGITS.expand(500, -1), [[0]] * 500, sampling, never=[0, 4])
        drawn = scores.argmax(dim=-1) if sampling.greedy else draw(scores, range(500), [0] * 500)
        assert not set(drawn.tolist()) & {0, 4}


def test_a_text_that_has_used_up_every_token_goes_on():
    scores = process(LOGITS, [[*range(6)]], Sampling(1.0, no_repeat_ngram=1))
    assert scores.isfinite().all()


def test_settings_of_random_texts_keep_at_least_one_token():
    for values in itertools.product(*CHOICES.values()):
        sampling = Sampling(**dict(zip(CHOICES, values)))
        assert (process(LOGITS, [[0, 1, 2, 0, 1]], sampling).softmax(dim=-1) > 0).any()
