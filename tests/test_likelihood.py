"""Log-likelihoods of continuations: equal to brute force one request at a time, whatever is batched and shared, and however long."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import GPTConfig
from evaluation import likelihood
from evaluation.likelihood import log_likelihoods
from models import GPT

BLOCK = 8
VOCABULARY = 11


def model(arch: str) -> GPT:
    torch.manual_seed(0)
    network = GPT(GPTConfig(block_size=BLOCK, vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=16, arch=arch)).eval()
    torch.nn.init.normal_(network.wte.weight, std=0.5)
    return network


MODELS = {arch: model(arch) for arch in ("gpt2", "qwen3")}
ids = st.integers(0, VOCABULARY - 1)
# contexts that begin alike, so that there is something to share; from the EOT alone to more than a block
contexts = st.tuples(st.integers(0, 12), st.lists(ids, max_size=3)).map(lambda c: [0, *([1, 2, 3, 4] * 3)[: c[0]], *c[1]])
requests = st.lists(st.tuples(contexts, st.lists(ids, min_size=1, max_size=20)), min_size=1, max_size=9)


def brute_force(network: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One token after the other, in float64, each with what it may see."""
    double, stream, total, greedy = network.double(), [*context, *continuation], 0.0, True
    for i in range(len(context), len(stream)):
        window = (i - len(context)) // BLOCK  # of the continuation's windows, the one that predicts token i
        end = min(len(stream), len(context) + (window + 1) * BLOCK)
        logits = double(torch.tensor([stream[max(0, end - BLOCK - 1) : i]]))[0][0, -1]
        total += logits.log_softmax(-1)[stream[i]].item()
        greedy &= logits.argmax().item() == stream[i]
    network.float()
    return total, greedy


@settings(max_examples=60, deadline=None)
@given(arch=st.sampled_from(["gpt2", "qwen3"]), requests=requests, batch_size=st.integers(1, 10))
def test_equal_to_brute_force(arch, requests, batch_size):
    found = log_likelihoods(MODELS[arch], requests, batch_size)
    for i, (context, continuation) in enumerate(requests):
        nats, greedy = brute_force(MODELS[arch], context, continuation)
        assert found.nats[i] == pytest.approx(nats, abs=1e-5)
        assert found.greedy[i] == greedy and found.tokens[i] == len(continuation)


@given(context=st.integers(1, 20), continuation=st.integers(1, 40), block_size=st.integers(1, 12))
def test_windows_are_those_of_lm_evaluation_harness(context, continuation, block_size):
    """Each token of the continuation once, in as few windows as can be, each with all the context that fits."""
    stream = [*range(context + continuation)]
    found = [*likelihood.windows(0, stream[:context], stream[context:], block_size)]
    assert [i for window in found for i in window.ids[window.first :]] == stream[context:]
    assert len(found) == -(-continuation // block_size)
    for window in found:
        assert len(window.ids) == min(block_size + 1, window.ids[-1] + 1) and window.first >= 1


def test_what_choices_share_is_computed_once(monkeypatch):
    """Four choices behind a context of 6: its tokens pass through the network once, and logits are made for what is predicted only."""
    network, read, rows = MODELS["qwen3"], [], []
    features, head = network.features, network.head
    monkeypatch.setattr(network, "features", lambda idx, cache=None: read.append(idx.numel()) or features(idx, cache))
    monkeypatch.setattr(network, "head", lambda x: rows.append(len(x)) or head(x))
    context = [0, 1, 2, 3, 4, 5]
    log_likelihoods(network, [(context, [choice, 9]) for choice in range(4)], batch_size=16)
    assert read == [6, 4] and rows == [1, 4]


def test_a_request_given_twice_scores_the_same_to_the_last_bit():
    twice = [([0, 1, 2], [3, 4]), ([0, 5], [6, 7, 8]), ([0, 1, 2], [3, 4])]
    found = log_likelihoods(MODELS["gpt2"], twice)
    assert found.nats[0] == found.nats[2] != found.nats[1]


def test_what_has_no_likelihood_is_refused():
    with pytest.raises(ValueError, match="at least one token each"):
        log_likelihoods(MODELS["gpt2"], [([0], [])])
    broken = model("gpt2")
    torch.nn.init.constant_(broken.ln_f.weight, np.inf)
    with pytest.raises(ValueError, match="weights are broken"):
        log_likelihoods(broken, [([0], [1])])
