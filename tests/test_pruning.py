"""Pruning: what is left computes what the model computes without the parts taken out, the least important go, and every stage takes it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as reference

from config import GPTConfig
from export.pruning import importance, remaining_width, with_fewer_layers, with_fewer_neurons, with_zeros, without_layer
from models import GPT

SHAPES = {
    "gpt2": {"arch": "gpt2"},
    "gpt2 without biases": {"arch": "gpt2", "bias": False},
    "qwen3": {"arch": "qwen3", "n_head": 4, "n_kv_head": 2},
}


def random_model(shape: str, **changes) -> GPT:
    """No weight is 0 or 1 by initialisation, so that each has its part in the logits."""
    torch.manual_seed(0)
    config = {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_hidden": 96, "block_size": 16, "vocab_size": 50} | SHAPES[shape] | changes
    model = GPT(GPTConfig(**config)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 0.5)
    return model


def ids(batch: int = 6) -> torch.Tensor:
    return torch.randint(50, (batch, 16), generator=torch.Generator().manual_seed(1))


def close(model: GPT, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(model(ids())[0], expected, atol=tolerance * expected.abs().max().item(), rtol=0)


def rows_of(block: nn.Module, neurons: torch.Tensor) -> torch.Tensor:
    """The rows of c_fc that belong to neurons: in a gated MLP those of gate and of up."""
    return torch.cat((neurons, neurons + block.mlp.c_proj.in_features)) if block.mlp.gated else neurons


# ---------------------------------------------------------------- neurons


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_an_mlp_without_neurons_is_one_whose_neurons_are_silent(shape):
    model = random_model(shape)
    silenced = copy.deepcopy(model)
    for block, scores in zip(silenced.h, importance(model, ids())):
        block.mlp.c_proj.weight[:, scores.argsort()[:32]] = 0
    smaller = with_fewer_neurons(model, 0.3, ids())  # 67.2 neurons are left, rounded down to 64
    assert smaller.config.mlp_width == 64 and smaller.h[0].mlp.c_proj.in_features == 64
    close(smaller, silenced(ids())[0])
    assert (silenced(ids())[0] - model(ids())[0]).abs().max() > 0.1


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_dead_neurons_go_first(shape):
    """Some never fire, others aren't heard by anybody: without them nothing changes."""
    model, dead = random_model(shape), []
    for layer, block in enumerate(model.h):
        dead.append(torch.randperm(96, generator=torch.Generator().manual_seed(layer))[:32])
        silent, unheard = dead[-1].split(16)
        block.mlp.c_fc.weight[rows_of(block, silent)] = 0
        if block.mlp.c_fc.bias is not None:
            block.mlp.c_fc.bias[silent] = 0
        block.mlp.c_proj.weight[:, unheard] = 0
    for scores, neurons in zip(importance(model, ids()), dead):
        assert scores.nonzero()[:, 0].tolist() == sorted({*range(96)} - {*neurons.tolist()})
    close(with_fewer_neurons(model, 1 / 3, ids()), model(ids())[0])


@torch.inference_mode()
def test_importance_is_how_much_of_the_stream_a_neuron_writes():
    """Beside what each neuron alone adds to the residual stream: its root mean square over tokens, summed over the width."""
    model, written = random_model("qwen3", n_layer=1), []
    model.h[0].mlp.c_proj.register_forward_pre_hook(lambda module, inputs: written.append(inputs[0][..., None] * module.weight.T))
    found = importance(model, ids(11))  # (1, 96); more rows than are read at once
    alone = torch.cat(written)  # (B, T, 96, C)
    torch.testing.assert_close(found[0], alone.square().mean(dim=(0, 1)).sum(dim=-1).sqrt())


@given(st.integers(1, 4096), st.floats(0, 0.999))
def test_the_width_left_is_a_multiple_of_32(width, share):
    config = GPTConfig(n_hidden=width)
    try:
        left = remaining_width(config, share)
    except ValueError as error:
        assert width * (1 - share) < 32 + 1e-3 and "would leave nothing" in str(error)
    else:
        assert left % 32 == 0 and left <= width * (1 - share) + 1e-3 and left > width * (1 - share) - 32


# ---------------------------------------------------------------- layers


@torch.inference_mode()
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_without_a_layer_passes_over_it(shape, layer):
    model = random_model(shape)
    smaller = without_layer(model, layer)
    assert smaller.config.n_layer == len(smaller.h) == 2
    model.h[layer].forward = lambda x, *_: x
    close(smaller, model(ids())[0])


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_that_do_nothing_go_first(shape):
    model, targets = random_model(shape, n_layer=4), ids()
    for layer in (1, 2):
        for part in (model.h[layer].attn.c_proj, model.h[layer].mlp.c_proj):
            for parameter in part.parameters():
                parameter.zero_()
    before = model(targets)[0]
    targets[:, :-1] = before.argmax(dim=-1)[:, :-1]  # so that every layer which does something lowers the loss
    smaller, removed = with_fewer_layers(model, 2, lambda tried: tried(ids(), targets)[1].item())
    assert sorted(removed) == [1, 2]
    close(smaller, before)


def test_layers_are_chosen_one_after_the_other():
    """The second is the best one beside the first, which need not be the second best alone; numbers are those of the whole model."""
    model, seen = random_model("qwen3", n_layer=4), []
    marks = [block.ln_1.weight[0].item() for block in model.h]

    def loss(tried: GPT) -> float:
        left = tuple(marks.index(block.ln_1.weight[0].item()) for block in tried.h)
        seen.append(left)
        return {(0, 1, 3): 1.0, (0, 1, 2): 2.0, (1, 3): 3.0, (0, 3): 4.0}.get(left, 9.0)

    _, removed = with_fewer_layers(model, 2, loss)
    assert removed == [2, 0] and len(seen) == 4 + 3


# ---------------------------------------------------------------- weights


def matrices(model: GPT) -> list[torch.Tensor]:
    return [module.weight for module in model.h.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=10, deadline=None)
@given(share=st.floats(0, 0.99))
def test_zeros_are_where_torch_puts_them(shape, scope, share):
    """torch.nn.utils.prune zeroes the smallest weights too: exactly as many, and the largest survive."""
    model = random_model(shape)
    sparse, expected = with_zeros(model, share, scope), copy.deepcopy(model)
    parts = [(module, "weight") for module in expected.h.modules() if isinstance(module, nn.Linear)]
    if scope == "global":
        reference.global_unstructured(parts, reference.L1Unstructured, amount=share)
    else:
        for part in parts:
            reference.l1_unstructured(*part, amount=share)
    for part in parts:
        reference.remove(*part)
    weights = expected.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in sparse.state_dict().items())
    zeros, sizes = [(weight == 0).sum().item() for weight in matrices(sparse)], [weight.numel() for weight in matrices(sparse)]
    assert sum(zeros) == round(share * sum(sizes)) if scope == "global" else zeros == [round(share * size) for size in sizes]
    assert not any(torch.signbit(weight[weight == 0]).any() for weight in matrices(sparse))  # zeros that compress


def test_zeros_stay_where_a_model_is_pruned_again():
    model = random_model("qwen3")
    once = with_zeros(model, 0.3, "matrix")
    again = with_zeros(once, 0.5, "matrix").state_dict()
    directly = with_zeros(model, 0.5, "matrix").state_dict()
    assert all(torch.equal(weight, directly[name]) for name, weight in again.items())
    same = with_zeros(once, 0.3, "matrix").state_dict()
    assert all(torch.equal(weight, same[name]) for name, weight in once.state_dict().items())
