"""Beam search against transformers on the same weights, and against all texts there are."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import export_model
from config import GPTConfig
from formats.huggingface import hf_config, to_hf
from formats.run_directory import load_model
from generation.beams import beam_search
from generation.sampling import Sampling
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer
from models import GPT

EOT, VOCABULARY = 3, 23
TOKENIZER = SimpleNamespace(eot_id=EOT, vocab_size=VOCABULARY, never_drawn=[])


def make(arch: str, seed: int, block_size: int = 24) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=16, arch=arch)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, mean=0.1)
    return model


def search(model: GPT, prompt: list[int], limit: int, beams: int, length_penalty: float = 1.0, tokenizer=TOKENIZER, **sampling):
    writer = Writer(TorchEngine(model), tokenizer, Sampling(**sampling))
    return beam_search(writer, Row(prompt, limit), beams, length_penalty)


def check_against(reference, found, prompt: list[int], limit: int, beams: int, length_penalty: float, eot_id: int, **sampling) -> None:
    """The same texts in the same order, with the same scores."""
    if "no_repeat_ngram" in sampling:
        sampling["no_repeat_ngram_size"] = sampling.pop("no_repeat_ngram")
    ids = torch.tensor([prompt])
    expected = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=length_penalty,
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=eot_id,
        pad_token_id=eot_id,
        return_dict_in_generate=True,
        output_scores=True,
        **sampling,
    )
    assert len(found) == beams
    for (score, row), theirs, their_score in zip(found, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True):
        assert score == pytest.approx(their_score, abs=1e-4)
        assert row.ids == theirs[: len(row.ids)] and set(theirs[len(row.ids) :]) <= {eot_id}
        assert row.finish == ("eot" if row.ids[-1] == eot_id else "length")


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_equal_to_transformers(arch):
    transformers = pytest.importorskip("transformers")
    cases = [(3, 1.0, {}), (4, 0.0, {}), (4, 2.5, {}), (3, -1.0, {})]
    cases += [(3, 1.0, {"repetition_penalty": 1.4}), (4, 1.0, {"no_repeat_ngram": 2})]
    ended = 0
    for seed, prompt in enumerate(([5], [1, 2, 3, 4], [7, 7, 8])):
        model = make(arch, seed)
        endless = search(model, prompt, 8, 4, tokenizer=SimpleNamespace(eot_id=-1, vocab_size=VOCABULARY, never_drawn=[]))
        eot_id = Counter(i for _, row in endless for i in row.drawn[2:]).most_common()[-1][0]  # a token that comes now and then
        tokenizer = SimpleNamespace(eot_id=eot_id, vocab_size=VOCABULARY, never_drawn=[])
        config = transformers.AutoConfig.for_model(**hf_config(model.config, eot_id=eot_id))
        reference = transformers.AutoModelForCausalLM.from_config(config).eval()
        reference.load_state_dict(to_hf(model.config, model.state_dict()), strict=False)
        reference.tie_weights()
        for beams, length_penalty, sampling in cases:
            found = search(model, prompt, 14, beams, length_penalty, tokenizer=tokenizer, **sampling)
            check_against(reference, found, prompt, 14, beams, length_penalty, eot_id, **sampling)
            ended += sum(row.finish == "eot" for _, row in found)
    assert 10 < ended < 63  # both ways to end were compared


def test_equal_to_transformers_on_the_exported_folder(trained_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert export_model.main(["--checkpoint", str(trained_run), "--format", "hf", "--output", str(tmp_path)]) == 0
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    model, tokenizer, *_ = load_model(str(trained_run))
    prompt = [tokenizer.eot_id, *tokenizer.encode("Once upon")]
    found = search(model, prompt, 12, 3, tokenizer=tokenizer)
    check_against(reference, found, prompt, 12, 3, 1.0, tokenizer.eot_id)


@torch.inference_mode()
def test_as_many_beams_as_texts_find_the_most_probable_one():
    """All continuations of three tokens, their log-probabilities added up by hand."""
    model = make("qwen3", 1)
    best = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=3):
        if EOT not in tokens:
            best[tokens] = 0.0
    texts = torch.tensor([[5, *tokens] for tokens in best])
    logs = model(texts)[0].log_softmax(-1)
    totals = sum(logs[:, i].gather(1, texts[:, i + 1 : i + 2])[:, 0] for i in range(3))
    wanted = texts[totals.argmax()].tolist()
    banned = SimpleNamespace(eot_id=EOT, vocab_size=VOCABULARY, never_drawn=[EOT])
    ((score, row), *_) = search(model, [5], 3, 600, 0.0, tokenizer=banned)
    assert row.ids == wanted and score == pytest.approx(totals.max().item(), abs=1e-4)


def test_one_beam_without_penalty_is_the_greedy_text():
    model = make("gpt2", 2)
    ((_, row),) = search(model, [5, 6], 40, 1, 0.0)  # beyond block_size too
    greedy = Row([5, 6], 40)
    [*Writer(TorchEngine(model), TOKENIZER, Sampling(0.0)).write([greedy])]
    assert row.ids == greedy.ids
