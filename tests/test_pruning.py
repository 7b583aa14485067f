"""Pruning: what is left computes what the model computes without the parts taken out, the least important go, and every stage takes it."""

import copy
import json
import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as reference

from config import GPTConfig
from export.pruning import importance, remaining_width, with_fewer_layers, with_fewer_neurons, with_zeros, without_layer
from formats.checkpoint import load_checkpoint
from formats.export_record import read_record
from formats.run_directory import load_model
from models import GPT
from tests.conftest import tiny

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
    """What each neuron alone adds there: its root mean square over tokens, summed over the width. Looking at it changes nothing."""
    model, written = random_model("qwen3"), []
    found = importance(model, ids(11))  # (3, 96); more rows than are read at once
    for block in model.h:
        block.mlp.c_proj.register_forward_hook(lambda module, inputs, _: written.append(inputs[0][..., None] * module.weight.T))
    expected = model(ids(11))[0]
    alone = torch.stack(written)  # (layers, B, T, 96, C)
    torch.testing.assert_close(found, alone.square().mean(dim=(1, 2)).sum(dim=-1).sqrt())
    assert torch.equal(model(ids(11))[0], expected)


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
@settings(max_examples=6, deadline=None)
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


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory, sample_dir):
    import train

    run = tmp_path_factory.mktemp("gpt2")
    assert train.main(tiny(arch="gpt2", data_dir=sample_dir, out_dir=run, max_steps=3)) == 0
    return run


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_every_stage_takes_a_pruned_model(family, trained_run, gpt2_run, sample_dir, script, tmp_path):
    run, output, healed = trained_run if family == "qwen3" else gpt2_run, tmp_path / "pruned", tmp_path / "healed"
    amounts = ("--prune_layers", 1, "--prune_mlp", 0.3, "--prune", 0.5)
    told = script("export_model.py", "--checkpoint", run, "--format", "pt", "hf", *amounts, "--output", output).stdout
    model, _, path, content = load_model(str(output))
    assert path == output / "best_model.slim.pt"
    assert (model.config.n_layer, model.config.n_hidden) == (1, 64)  # of 128 neurons 89.6 may stay
    assert all((weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3) for weight in matrices(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output / "hf").eval()
    rows = torch.randint(512, (3, 17), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(rows).logits, model(rows)[0], atol=1e-4, rtol=0)
    assert "resume" not in content and "val" not in content and content["init_from"]["name"] == str(run / "best_model.pt")
    entries = {name: read_record(output)[name]["pruned"] for name in ("best_model.slim.pt", "hf")}
    assert entries["hf"] == entries["best_model.slim.pt"] and entries["hf"]["prune_mlp"] == 0.3
    assert content["init_from"]["pruned"] == entries["hf"]["what"] and entries["hf"]["what"] in told
    assert entries["hf"]["what"] in (output / "hf" / "README.md").read_text()
    assert str(tmp_path) not in json.dumps(entries)
    script("evaluate.py", "--checkpoint", output, "--data_dir", sample_dir, "--split", "val", "--output", tmp_path / "metrics.json")
    measured = json.loads((tmp_path / "metrics.json").read_text())[str(sample_dir)]["val"]  # all of it is measured when pruning, too
    assert entries["hf"]["after"]["bits_per_byte"] == pytest.approx(measured["bits_per_byte"], rel=1e-6)
    assert script("generate.py", "--checkpoint", output, "--prompt", "Once", "--max_new_tokens", 5).stdout
    script("train.py", "--init_from", output, "--data_dir", sample_dir, "--out_dir", healed, "--max_steps", 2, "--device", "cpu")
    assert load_model(str(healed))[0].config.n_hidden == 64 and load_checkpoint(healed / "best_model.pt")["init_from"]["name"] == str(
        output
    )


def test_pruning_twice_is_told_and_always_gives_the_same(trained_run, script, tmp_path):
    for name, source, amount in (("one", trained_run, ("--prune_mlp", 0.3)), ("two", tmp_path / "one", ("--prune_layers", 1))):
        command = ("--checkpoint", source, "--format", "pt", *amount, "--output", tmp_path / name)
        script("export_model.py", *command)
        first = load_checkpoint(tmp_path / name / "best_model.slim.pt")
        script("export_model.py", *command, "--overwrite")
        content = load_checkpoint(tmp_path / name / "best_model.slim.pt")
        assert all(torch.equal(weight, first["model"][key]) for key, weight in content["model"].items())
    assert content["model_config"]["n_layer"] == 1 and content["model_config"]["n_hidden"] == 64
    assert re.search("64 of 128 neurons left in each MLP; .*; then without layer [01] of 0 to 1; ", content["init_from"]["pruned"])


MISTAKES = {
    "prune=1.0 must be less than 1": ("--prune", 1.0),
    "prune=-0.1 must be at least 0": ("--prune", -0.1),
    "prune_mlp=1.5 must be less than 1": ("--prune_mlp", 1.5),
    "prune_mlp=0.9 would leave nothing of an MLP of 128 neurons": ("--prune_mlp", 0.9, "--prune_layers", 1),
    "prune_layers=2, but the model has 2 layers and one must stay": ("--prune_layers", 2),
    "prune_layers=-1 must be at least 0": ("--prune_layers", -1),
    "only --prune needs --prune_scope": ("--prune_layers", 1, "--prune_scope", "global"),
    "was prepared with another tokenizer": ("--prune", 0.5, "--data_dir", "other"),
    "no data directory at nowhere": ("--prune", 0.5, "--data_dir", "nowhere"),
}


@pytest.mark.parametrize(("sentence", "amounts"), MISTAKES.items())
def test_amounts_that_a_model_cannot_lose(trained_run, mistake, tmp_path, sentence, amounts):
    if "other" in amounts:
        import prepare_data

        (tmp_path / "text.txt").write_text("A line of text.\n" * 300)
        prepare_data.prepare(
            prepare_data.Arguments(input=(str(tmp_path / "text.txt"),), tokenizer="byte", output=str(tmp_path / "other"), report=False)
        )
    command = ("--checkpoint", trained_run, "--format", "pt", *amounts, "--output", tmp_path / "pruned")
    assert sentence in mistake("export_model.py", *command, cwd=tmp_path)
    assert not (tmp_path / "pruned").exists()


def test_a_pruned_model_has_a_place_of_its_own(trained_run, mistake, tmp_path):
    assert "place of its own with --output" in mistake("export_model.py", "--checkpoint", trained_run, "--prune", 0.5, cwd=tmp_path)
    beside = mistake("export_model.py", "--checkpoint", trained_run, "--prune", 0.5, "--output", trained_run, cwd=tmp_path)
    assert "choose another --output for the pruned one" in beside


def test_without_its_data_a_model_is_not_pruned(trained_run, mistake, script, sample_dir, tmp_path):
    """An HF folder doesn't say what its model was trained on; --data_dir does."""
    script("export_model.py", "--checkpoint", trained_run, "--format", "hf", "--output", tmp_path)
    command = ("--checkpoint", tmp_path / "hf", "--format", "pt", "--prune_mlp", 0.3, "--output", tmp_path / "pruned")
    assert "--data_dir" in mistake("export_model.py", *command, cwd=tmp_path)
    script("export_model.py", *command, "--data_dir", sample_dir, cwd=tmp_path)
    assert load_model(str(tmp_path / "pruned" / "hf.slim.pt"))[0].config.n_hidden == 64
