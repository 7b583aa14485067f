"""config.py: validation, presets, and where a value comes from."""

import dataclasses
import json
import shutil

import pytest

from config import PRESETS, GPTConfig, ModelConfig, TrainConfig
from tests.conftest import ROOT, tiny


def copy_project(directory) -> None:
    """The scripts with their rooms, as a clone has them, without tests, data and runs."""
    shutil.copytree(ROOT, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "tests", "checkpoints", "runs", "*.bin"))


def test_every_problem_is_reported_at_once():
    with pytest.raises(ValueError) as caught:
        GPTConfig(n_embd=100, n_head=6, dropout=1.5, vocab_size=0)
    for part in ("n_embd=100", "n_head=6", "try n_embd=102", "dropout=1.5", "vocab_size=0"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arch": "qwen3", "bias": True}, "bias=True"),
        ({"arch": "gpt2", "n_kv_head": 2}, "n_kv_head=2"),
        ({"arch": "gpt2", "rope_theta": 500.0}, "rope_theta=500.0"),
        ({"arch": "llama"}, "arch='llama'"),
        ({"arch": "qwen3", "n_kv_head": 5}, "n_kv_head=5"),
        ({"arch": "qwen3", "n_head": 4, "n_embd": 12}, "even"),
    ],
)
def test_options_of_the_other_family_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**values)


def test_train_config_refuses_nonsense():
    for values in (
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"keep_checkpoints": "none"},
        {"optimizer": "sgd"},
        {"epochs": -1.0},
        {"beta2": 1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(values))):
            TrainConfig(**values)


def test_family_decides_what_is_left_open():
    assert GPTConfig().bias is True and GPTConfig(arch="qwen3").bias is False
    assert GPTConfig(n_embd=96, n_head=4).mlp_width == 384
    assert GPTConfig(arch="qwen3", n_embd=96, n_head=4).mlp_width == 256
    assert ModelConfig is GPTConfig and GPTConfig.tiny(block_size=256).block_size == 256


def test_presets_are_valid_with_their_training_values():
    for name, (make_model, values) in PRESETS.items():
        assert make_model() == getattr(GPTConfig, name)()
        dataclasses.replace(TrainConfig(), **values)


@pytest.mark.parametrize("line", ["model_config = ModelConfig.small(n_head=7)", "train_config = TrainConfig(dropout=0.1)"])
def test_a_mistake_in_config_is_one_sentence(tmp_path, program, line):
    copy_project(tmp_path)
    with open(tmp_path / "config.py", "a") as file:
        file.write(line + "\n")
    assert "error: config.py: " in program(tmp_path / "train.py", cwd=tmp_path, code=2).stderr


def test_edits_of_config_reach_the_saved_run_and_flags_and_presets_override_them(tmp_path, sample_dir, script, monkeypatch):
    """With other values in config.py; that the file itself is read, the journey of two versions of a dataset shows."""
    model = ModelConfig(block_size=16, n_layer=1, n_head=2, n_embd=16)
    monkeypatch.setattr("training.start.model_config", model)
    monkeypatch.setattr("training.start.train_config", TrainConfig(max_steps=2, batch_size=2, weight_decay=0.25, beta1=0.8))

    def saved(out: str, *flags) -> dict:
        script("train.py", "--data_dir", sample_dir, "--out_dir", out, *flags, cwd=tmp_path)
        return json.loads((tmp_path / out / "config.json").read_text())

    edits = saved("a")
    assert (edits["model"]["n_embd"], edits["model"]["n_layer"], edits["model"]["vocab_size"]) == (16, 1, 512)
    assert (edits["train"]["weight_decay"], edits["train"]["beta1"], edits["train"]["max_steps"]) == (0.25, 0.8, 2)
    flags = saved("b", "--weight_decay", 0.5, "--n_layer", 2, "--max_steps", 1)
    assert (flags["model"]["n_layer"], flags["train"]["weight_decay"], flags["train"]["beta1"]) == (2, 0.5, 0.8)
    preset = saved("c", *tiny(max_steps=1))
    assert preset["model"]["arch"] == GPTConfig.nano().arch and preset["train"]["beta1"] == 0.8  # the preset does not name beta1
    assert preset["train"]["muon_learning_rate"] == PRESETS["nano"][1].get("muon_learning_rate", TrainConfig().muon_learning_rate)
