"""Flags, environments and config.py as nobody should give them: one sentence, at once, and nothing is lost."""

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
from fractions import Fraction

import utils

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import training.start
from config import PRESETS, GPTConfig, TrainConfig
from tests.conftest import ROOT, tiny
from training.processes import TORCHRUN, Processes
from training.report import plot_losses

HUGE = "1" + "0" * 30
NOT_UTF8 = os.fsdecode(b"d\xff")


def files(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
def test_numbers_that_are_not_finite(value):
    names = ["weight_decay", "grad_clip", "rope_theta", "learning_rate", "epochs", "dropout", "ema_decay"]
    for config in (GPTConfig, TrainConfig):
        mine = {field.name: float(value) for field in dataclasses.fields(config) if field.name in names}
        with pytest.raises(ValueError) as caught:
            config(**mine)
        assert str(caught.value).count(f"={float(value)} must be") == len(mine)
    with pytest.raises(ValueError, match=r"weight_decay=.*must be"):
        training.start.read_arguments([f"--weight_decay={value}"], None)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--batch_size", "10" * 12], "batch_size=101010101010101010101010 must be at most"),
        (["--batch_size", "10000000", "--gradient_accumulation_steps", "10"], "a step may have 16,777,216 windows"),
        (["--gradient_accumulation_steps", "1000000000000"], "gradient_accumulation_steps=1000000000000 must be at most"),
        (["--max_steps", HUGE], f"max_steps={HUGE} must be less than"),
        (["--max_steps", "1000000000000"], "in max_steps=1000000000000 steps is too much"),
        (["--n_layer", "1000000000"], "n_layer=1000000000 must be at most 256"),
        (["--n_embd", "1000000000000"], "n_embd=1000000000000 must be at most"),
        (["--block_size", HUGE], "must be at most"),
        (["--seed", "9" * 30], "seed=9"),
        (["--epochs", "1e308"], "epochs=1e+308 must be at most"),
        (["--weight_decay", "1e308"], "weight_decay=1e+308 must be at most"),
        (["--rope_theta", "1e-40", "--arch", "qwen3"], "rope_theta=1e-40 must be at least 1"),
        (["--eval_interval", HUGE], "must be less than"),
    ],
)
def test_numbers_beyond_all_measure(flags, part):
    with pytest.raises(ValueError) as caught:
        training.start.read_arguments(flags, None)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"n_embd": 2**24}, {"n_layer": 40, "n_embd": 2**17}, {"n_hidden": 2**24, "n_embd": 2**12}, {"max_tokens": 2**62, "max_steps": None}],
)
def test_what_does_not_fit_is_refused_before_a_run_is_deleted(tmp_path, trained_run, sample_dir, mistake, changes):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    stderr = mistake("train.py", *tiny(data_dir=sample_dir, out_dir=run, **({"max_steps": 5} | changes)), "--overwrite", cwd=tmp_path)
    assert " GB are free; take a smaller model" in stderr or "a run 1,099,511,627,776" in stderr
    assert files(run) == files(trained_run)


@pytest.mark.parametrize("weight", ["1e99999999", "1e-99999999", "1e10", "nan", "0", "-1"])
def test_weights_beyond_all_measure(weight):
    with pytest.raises(ValueError, match="a weight must be above 0"):
        utils.parse_weighted(f"a:{weight}")


def test_weights_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir:0.5").mkdir()
    assert utils.parse_weighted("dir:0.5") == ("dir:0.5", None)
    assert utils.parse_weighted("dir:0.5:1/3") == ("dir:0.5", Fraction(1, 3))
    assert utils.parse_weighted("a:1e-3") == ("a", Fraction(1, 1000))
    assert [utils.parse_weighted(path)[1] for path in ("a:b", "a:1/0", ":1", "a")] == [None] * 4


# ---------------------------------------------------------------- names and texts

EMPTY = {
    "train": ["data_dir", "dataset", "tokenizer", "resume", "init_from", "also_eval", "export", "out_dir", "device"],
    "evaluate": ["checkpoint", "model_path", "data_dir", "text", "separator", "text_field", "device", "output"],
    "compare": ["data_dir", "device", "output"],
    "export_model": ["checkpoint", "model_path", "output"],
    "generate": ["checkpoint", "model_path", "stop", "device"],
    "prepare_data": ["input", "dataset", "dataset_config", "val_input", "output", "tokenizer", "separator", "text_field"],
    "tokenizer_train": ["input", "output", "separator", "tokenizer"],
    "benchmark": ["text", "device"],
}
POSITIONAL = {"compare": ["a", "b"], "benchmark": ["train"]}


@pytest.mark.parametrize(("script_name", "flag"), [(name, flag) for name, flags in EMPTY.items() for flag in flags])
@pytest.mark.parametrize(("value", "part"), [("", "is empty; an unset variable?"), (NOT_UTF8, "is not UTF-8")])
def test_names_that_are_empty_or_no_text(mistake, tmp_path, script_name, flag, value, part):
    """An unset variable of a shell never means ./checkpoints or the current directory."""
    assert part in mistake(f"{script_name}.py", *POSITIONAL.get(script_name, []), f"--{flag}", value, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_to_compare_has_a_name(mistake, tmp_path):
    assert "runs is empty; an unset variable?" in mistake("compare.py", "a", "", cwd=tmp_path)
    assert "--data_dir needs a directory" in mistake("compare.py", "a", "b", "--data_dir", cwd=tmp_path)


def test_texts_may_be_empty():
    assert training.start.read_arguments(["--sample_prompt", ""], None)[0].train.sample_prompt == ""
    generate = importlib.import_module("generate")
    assert utils.read_command_line(generate.Arguments, ["--prompt", ""], None).prompt == ""


def test_texts_that_begin_with_a_dash(mistake, tmp_path):
    generate = importlib.import_module("generate")
    assert utils.read_command_line(generate.Arguments, ["--prompt=--hello"], None).prompt == "--hello"
    assert "write a value that begins with - as --name=VALUE" in mistake("generate.py", "--prompt", "--hello", cwd=tmp_path)


NASTY = [
    "",
    " ",
    "-1",
    "--",
    "-",
    "0",
    "nan",
    "None",
    "True",
    "[]",
    "{}",
    "a b",
    "'",
    '"',
    "\\",
    "$_$",
    "%s",
    "{0}",
    "\n",
    "é",
    "\u202e",
    "🙂",
]
NASTY += [NOT_UTF8, HUGE, "-" + HUGE, "1e308", "1e-308", "0x10", "1_0", "٣", "=", "a=b", "/", "..", "~", "*", ":", ":1", "auto", "x" * 5000]


@given(name=st.sampled_from(sorted(utils.flag_types(training.start.Arguments))), value=st.sampled_from(NASTY), joined=st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_text_for_any_flag_is_taken_or_refused(name, value, joined):
    try:
        training.start.read_arguments([f"--{name}={value}"] if joined else [f"--{name}", value], None)
    except ValueError as error:
        assert "\n" not in utils.describe(error)


# ---------------------------------------------------------------- config.py


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("train_config = TrainConfig(", "never closed"),
        ("  x = 1", "unexpected indent"),
        ("train_config = TrainConfgi()", "name 'TrainConfgi' is not defined"),
        ("model_config = ModelConfig.smal()", "no attribute 'smal'"),
        ("train_config = TrainConfig(max_stepz=3)", "'max_stepz'"),
        ("train_config = TrainConfig(max_steps=2.5)", "max_steps=2.5 must be a valid integer"),
        ("train_config = TrainConfig(out_dir='')", "out_dir is empty"),
        ("model_config = ModelConfig.small(bias='no')", "bias='no' must be a valid boolean"),
        ("model_config = ModelConfig.small(flash='no')", "flash='no' must be a valid boolean"),
        ("import no_such_package", "the package 'no_such_package' is not installed"),
        ("from utils import Nothing", "cannot import name 'Nothing'"),
        ("del train_config", "cannot import name 'train_config'"),
        ("train_config.max_steps = 3", "cannot assign to field 'max_steps'"),
    ],
)
def test_mistakes_in_config(tmp_path, lines, part):
    """Whichever script imports it; here one that needs nothing else."""
    for name in ("utils.py", "config.py"):
        shutil.copy(ROOT / name, tmp_path)
    with open(tmp_path / "config.py", "a") as file:
        file.write(lines + "\n")
    (tmp_path / "script.py").write_text("import utils\nfrom config import train_config\n")
    process = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: ") and part in process.stderr


@pytest.mark.parametrize(
    ("name", "value", "flags", "part"),
    [
        ("model_config", None, [], "config.py: model_config must be a GPTConfig, not None"),
        ("train_config", GPTConfig(), [], "config.py: train_config must be a TrainConfig"),
        ("PRESETS", {"nano": (GPTConfig.nano, {"max_stepz": 3})}, ["--preset", "nano"], "config.py: PRESETS['nano']: "),
        ("PRESETS", {"nano": (GPTConfig.nano, {"max_steps": 2.5})}, ["--preset", "nano"], "max_steps=2.5 must be"),
    ],
)
def test_wrong_values_in_config(monkeypatch, mistake, tmp_path, name, value, flags, part):
    monkeypatch.setattr(training.start, name, value)
    assert part in mistake("train.py", *flags, cwd=tmp_path)


def test_wrong_values_for_fine_tuning(monkeypatch):
    monkeypatch.setattr(training.start, "FINE_TUNING", {"max_stepz": 3})
    with pytest.raises(ValueError, match=r"config.py: FINE_TUNING: .*max_stepz"):
        training.start.fine_tuning(TrainConfig(), {}, 128)


def test_a_preset_is_a_name(mistake, tmp_path):
    assert f"unknown preset 'nan'; take one of {', '.join(PRESETS)}" in mistake("train.py", "--preset", "nan", cwd=tmp_path)


# ---------------------------------------------------------------- memory, terminals, torchrun


@pytest.mark.parametrize("fill", [lambda: np.empty(2**55), lambda: torch.empty(2**55), lambda: bytearray(2**60)])
def test_a_full_memory_is_one_sentence(capsys, fill):
    with pytest.raises(SystemExit) as code:
        utils.run_script(fill)
    assert code.value.code == 2 and capsys.readouterr().err.startswith("error: the memory is full")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_a_sign_ends_nothing(encoding):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import utils; utils.run_script(lambda: print('a ± 🙂 \\udcff'))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert process.returncode == 0 and process.stdout.decode(encoding).rstrip() in (
        "a \\xb1 \\U0001f642 \\udcff",
        "a ± \\U0001f642 \\udcff",
    )


@pytest.mark.parametrize("flags", [["--interactive"], []])
def test_a_closed_standard_input_is_one_sentence(monkeypatch, mistake, trained_run, tmp_path, flags):
    monkeypatch.setattr(sys, "stdin", None)
    assert "give --prompt TEXT" in mistake("generate.py", "--checkpoint", trained_run, *flags, cwd=tmp_path)


@pytest.mark.parametrize(("flag", "value"), [("top_p", "1e-50"), ("min_p", "1e-50"), ("top_p", "nan"), ("temperature", "inf")])
def test_shares_of_nothing(mistake, tmp_path, flag, value):
    assert f"{flag}=" in mistake("generate.py", "--prompt", "x", f"--{flag}", value, cwd=tmp_path)


def test_the_smallest_share_is_the_most_probable_token():
    from generation.sampling import Sampling, process

    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    scores = process(logits, [[]] * 8, Sampling(1.0, top_p=1e-9))
    assert torch.equal(scores.argmax(dim=-1), logits.argmax(dim=-1)) and (scores.isfinite().sum(dim=-1) == 1).all()


@pytest.mark.parametrize(
    "told",
    [
        {"RANK": "1"},
        {"RANK": "x"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"LOCAL_RANK": ""},
    ],
)
def test_variables_of_torchrun_that_do_not_go_together(monkeypatch, told):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert Processes().count == 1
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node"):
        Processes()


def test_a_name_is_no_formula(tmp_path, trained_run):
    run = tmp_path / "$_$"
    run.mkdir()
    text = (trained_run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + '{"step": 30, "val_loss": 3.0, "also": {"$\\\\frac$": {"loss": 3.0}}}\n')
    plot_losses(run)
    assert (run / "loss.png").stat().st_size > 10_000


def test_advice_of_evaluate_can_be_followed(mistake, tmp_path, trained_run):
    evaluate = importlib.import_module("evaluate")
    (tmp_path / "a.jsonl").write_text('{"story": "Once upon a time"}\n')
    arguments = ["--checkpoint", str(trained_run), "--text", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "e.json")]
    assert "pass --text_field" in mistake("evaluate.py", *arguments, cwd=tmp_path)
    assert evaluate.main([*arguments, "--text_field", "story"]) == 0
    (tmp_path / "a.jsonl").write_bytes(b'{"story": "Once \xff"}\n')
    assert "--errors" in mistake("evaluate.py", *arguments, "--text_field", "story", cwd=tmp_path)
    assert evaluate.main([*arguments, "--text_field", "story", "--errors", "replace"]) == 0


def test_a_kind_of_tokenizer_is_none_for_token_files(mistake, sample_dir, tmp_path):
    stderr = mistake("train.py", "--data_dir", sample_dir, "--tokenizer", "word", cwd=tmp_path)
    assert "--tokenizer word is trained on text; for token files give the path of their tokenizer.json" in stderr
