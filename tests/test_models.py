"""The network against trusted references: transformers, the explicit softmax, its own uncached self."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from config import GPTConfig
from formats.huggingface import hf_config, to_hf
from models import GPT, KVCache

FAMILIES = {
    "gpt2": {"arch": "gpt2"},
    "gpt2 without biases": {"arch": "gpt2", "bias": False},
    "qwen3": {"arch": "qwen3"},
    "qwen3 with shared key/value heads": {"arch": "qwen3", "n_kv_head": 2, "rope_theta": 500.0, "n_hidden": 96},
}


def make(family: str = "gpt2", **overrides) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 24, "vocab_size": 101, "n_layer": 3, "n_head": 4, "n_embd": 32} | FAMILIES[family] | overrides
    return GPT(GPTConfig(**shape)).eval()


def ids(*shape: int, vocab: int = 101) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    model = make(family)
    for parameter in model.parameters():  # biases and norms too, so that a forgotten one shows
        torch.nn.init.normal_(parameter, std=0.2, mean=0.1)
    config = transformers.AutoConfig.for_model(**hf_config(model.config, eot_id=0))
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    missing, unexpected = reference.load_state_dict(to_hf(model.config, model.state_dict()), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    reference.tie_weights()
    x = ids(2, 24)
    with torch.inference_mode():
        difference = (model(x)[0] - reference(x).logits).abs().max().item()
    assert difference < 2e-5


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_initial_weights_have_the_stated_spread(arch):
    """N(0, 0.02); what each block adds to the residual stream is scaled down by the square root of their number (Radford et al. 2019)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128, arch=arch))
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 4 = sqrt(2 * 8)
            # some heads start in a way of their own
            usual = weight[-128:] if name.endswith("c_attn.weight") else weight[:, :-32] if name.endswith("attn.c_proj.weight") else weight
            assert usual.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert torch.equal(weight, torch.zeros_like(weight) if name.endswith("bias") else torch.ones_like(weight)), name


def attention_by_hand(model: GPT, x: torch.Tensor) -> list[torch.Tensor]:
    """Attention probabilities (B, H, T, T) of every block for ids x (B, T)."""
    (B, T), D, found = x.shape, model.config.head_dim, []
    rotary, x = models.rotary_angles(torch.arange(T), model.config), model.wte(x)
    for number, block in enumerate(model.h):
        attention = block.attn
        q, k, _ = attention.c_attn(block.ln_1(x)).split([h * D for h in attention.heads], dim=2)
        q, k = (norm(t.view(B, T, -1, D)).transpose(1, 2) for norm, t in ((attention.q_norm, q), (attention.k_norm, k)))
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = models.rotate(q, *rotary) @ models.rotate(k, *rotary).transpose(-2, -1) / math.sqrt(D)
        found.append(scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1))
        x = block(x, rotary, number, None)
    return found


@pytest.mark.parametrize("shape", ["nano", "mini"])
def test_the_first_head_of_every_block_starts_looking_at_the_token_before(shape):
    """At the start of training and with random tokens; the last head spreads its attention."""
    torch.manual_seed(0)
    model = GPT(getattr(GPTConfig, shape)(n_layer=3, block_size=64, vocab_size=500))
    for number, attention in enumerate(attention_by_hand(model, ids(4, 64, vocab=500))):
        to_previous = attention.diagonal(-1, dim1=-2, dim2=-1)[..., 8:].mean((0, 2))  # by head
        assert to_previous[0] > 0.4 and to_previous[-1] < 0.1, number


@pytest.mark.parametrize("n_kv_head", [None, 1])
def test_the_second_block_s_last_head_starts_looking_behind_an_equal_token(n_kv_head):
    """Random tokens, then the same again: it finds what followed, and the output layer reads it there. Without such a head: 1/50 and 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.nano(n_layer=3, block_size=64, vocab_size=500, n_kv_head=n_kv_head)).eval()
    x = torch.stack([torch.randperm(500)[:32] for _ in range(16)]).repeat(1, 2)
    again = torch.arange(32, 63)
    first, second, _ = (attention[:, -1, again, again - 31].mean() for attention in attention_by_hand(model, x))
    assert second > 0.06 and first < 0.04
    logits = model(x)[0][:, 32:63]
    score = (logits.gather(2, x[:, 33:64, None])[..., 0] - logits.mean(-1)) / logits.std(-1)  # standard deviations above the average token
    assert score.mean() > 0.15


@pytest.mark.parametrize("changes", [{"n_layer": 1}, {"n_head": 1}, {"n_head": 4, "n_kv_head": 2}, {"n_head": 64}])
def test_every_shape_has_a_start(changes):
    assert all(torch.isfinite(weight).all() for weight in GPT(GPTConfig.nano(**changes)).parameters())


@pytest.mark.parametrize("depth", [2, pytest.param(None, marks=pytest.mark.slow, id="full")])
@pytest.mark.parametrize("shape", ["nano", "mini", "medium"])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_initial_loss_is_ln_vocab(shape, arch, depth):
    """At the real width and vocabulary; the fast test cuts the layers to two, whose residual scale follows n_layer."""
    config = getattr(GPTConfig, shape)(arch=arch, **({"n_layer": depth} if depth else {}))
    torch.manual_seed(0)
    model = GPT(config)
    x = ids(2, 65, vocab=config.vocab_size)
    with torch.inference_mode():
        loss = model(x[:, :-1], x[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.04)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_the_future(family):
    model = make(family)
    x = ids(1, 24)
    changed = x.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 101
    with torch.inference_mode():
        before, after = model(x)[0], model(changed)[0]
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.allclose(before[0, 10], after[0, 10])


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_equals_explicit_softmax(family):
    model, explicit = make(family), make(family, flash=False)
    x, y = ids(2, 24), ids(2, 24)
    logits, loss = model(x, y)
    logits_explicit, loss_explicit = explicit(x, y)
    torch.testing.assert_close(logits, logits_explicit, atol=1e-5, rtol=1e-5)
    loss.backward()
    loss_explicit.backward()
    for ours, theirs in zip(model.parameters(), explicit.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached(family, flash):
    model = make(family, flash=flash)
    x = ids(2, 24)
    cache = KVCache(model.config, batch_size=2)
    with torch.inference_mode():
        whole = model(x)[0]
        pieces = [model(x[:, start:end], kv_cache=cache)[0] for start, end in ((0, 7), (7, 8), (8, 9), (9, 20), (20, 24))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="block_size=24"):
        model(x[:, :1], kv_cache=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_is_overfitted(family):
    model = make(family).train()
    x = ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_ignored_targets_add_nothing():
    model = make()
    x, y = ids(1, 8), ids(1, 8)
    y[0, 4:] = -1
    assert model(x, y)[1].item() == pytest.approx(model(x[:, :4], y[:, :4])[1].item(), rel=1e-5)


def test_parameter_groups_cover_every_parameter_once_and_decay_matrices_only():
    for family in FAMILIES:
        for muon in (True, False):
            model = make(family)
            groups = model.parameter_groups(muon)
            assert sum(len(group) for group in groups.values()) == len(list(model.parameters()))
            assert all(p.dim() == 2 for p in groups["muon"] + groups["decay"]) and all(p.dim() == 1 for p in groups["no_decay"])
            assert bool(groups["muon"]) == muon
            assert any(p is model.wte.weight for p in groups["decay"])


def test_sizes_of_the_presets():
    for shape, millions in (("mini", 30), ("tiny", 50), ("small", 100), ("medium", 300)):
        with torch.device("meta"):
            model = GPT(getattr(GPTConfig, shape)())
        assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.1), shape
    assert GPT(GPTConfig.nano()).num_parameters() / 1e6 == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_per_token_are_those_that_torch_counts(family):
    """Of a training step with whole attention matrices, its output layer included and its table of tokens only looked up."""
    model = make(family, flash=False, n_embd=64, n_hidden=192).train()
    rows = ids(2, 25)
    with FlopCounterMode(display=False) as counter:
        _, loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
    assert model.flops_per_token() == pytest.approx(counter.get_total_flops() / (2 * 24), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [7, 512])
def test_the_training_loss_in_chunks_is_the_plain_one(family, chunk, monkeypatch):
    """Loss, accuracy and all gradients, where the last chunk is a part and where all is one chunk."""
    monkeypatch.setitem(models.CHUNK, "cpu", chunk)
    model = make(family)
    rows = ids(3, 12)
    logits, expected = model(rows[:, :-1], rows[:, 1:])
    (expected * 3).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss, accuracy = models.NextTokenLoss(model)(rows)
    (loss * 3).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert accuracy.item() == pytest.approx((logits.argmax(-1) == rows[:, 1:]).float().mean().item())
    for got, gradient in zip([p.grad for p in model.parameters()], gradients, strict=True):
        assert (got - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3)


def test_the_training_loss_under_autocast_is_near_the_exact_one():
    model = make("qwen3")
    rows = ids(3, 12)
    exact = models.NextTokenLoss(model)(rows)[0]
    exact.backward()
    gradient = model.wte.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = models.NextTokenLoss(model)(rows)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert torch.nn.functional.cosine_similarity(model.wte.weight.grad.flatten(), gradient.flatten(), dim=0) > 0.99
