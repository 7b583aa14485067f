"""torch.compile in training: asked for, or decided by measured time."""

from dataclasses import replace

import pytest

import train
from formats.checkpoint import load_checkpoint
from models import GPT
from tests.conftest import tiny
from training.machine import Machine
from training.pace import duration, make_objective
from training.processes import Processes
from training.start import make_start, open_directories, read_arguments


def test_compile(tmp_path, sample_dir, program):
    """Compiled training runs, says so, and saves the raw module's names."""
    process = program("train.py", *tiny(data_dir=sample_dir, max_steps=3, n_layer=1, out_dir=tmp_path / "run"), "--compile")
    assert "compile    True: as asked" in process.stderr
    assert not any(name.startswith("_orig_mod") for name in load_checkpoint(tmp_path / "run" / "best_model.pt")["model"])


def test_a_duration_is_told_in_the_largest_unit_of_which_there_is_half_more_than_one():
    told = {89: "89 seconds", 90: "1.5 minutes", 5399: "90.0 minutes", 5400: "1.5 hours", 129_599: "36.0 hours", 129_600: "1.5 days"}
    assert {seconds: duration(seconds) for seconds in told} == told


@pytest.mark.parametrize(
    ("eager", "compiled", "decision", "told"),
    [
        (1.0, None, False, "so short a run"),  # not even tried
        (5.0, 4.0, True, "about 6.7 minutes for 100 steps, after 9 seconds of compiling"),
        (5.0, 6.0, False, "False: measured, 0.83 times the speed"),
        (400.0, 300.0, True, "for a model in minutes: python train.py --preset nano --data_dir"),
    ],
)
def test_compile_auto_decides_by_measured_time(sample_dir, monkeypatch, capsys, eager, compiled, decision, told):
    times = lambda objective, *_: (compiled, 9.0) if is_compiled(objective) else (eager, 0.0)  # noqa: E731
    monkeypatch.setattr("training.pace.seconds_per_step", times)
    args, asked = read_arguments(tiny(data_dir=sample_dir, max_steps=100), None)
    start = make_start(args, asked, None, None, *open_directories(args.train.data_dir, None))
    machine = replace(Machine.choose("cpu", "float32", False), compile=None)
    objective, machine = make_objective(start, GPT(start.model_config), machine, 4, Processes())
    assert machine.compile is decision is is_compiled(objective) and told in capsys.readouterr().err
    assert machine.compile_seconds == (9.0 if compiled else 0.0)


def is_compiled(objective) -> bool:
    return objective._compiled_call_impl is not None


def test_a_resumed_run_keeps_its_decision_on_compilation(tmp_path, sample_dir):
    """Or the rest of its weights would differ in the last bits."""
    values = {"data_dir": sample_dir, "out_dir": tmp_path / "run"}
    train.main(tiny(**values, max_steps=2))
    path = tmp_path / "run" / "step_00000002.pt"
    args, asked = read_arguments(tiny(**values, max_steps=3, resume="auto"), None)
    directories, weights = open_directories(args.train.data_dir, None)
    for earlier in ("True", "False"):
        content = load_checkpoint(path)
        content["resume"]["environment"]["compile"] = earlier
        start = make_start(args, asked, (path, content), None, directories, weights)
        assert start.compile("cpu") is (earlier == "True") and start.compile("cuda") == "auto"
