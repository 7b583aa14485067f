"""train.py as a user runs it: the run directory, signals, damaged files, and what it refuses."""

import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch

import train
import training.validation
from config import GPTConfig, TrainConfig
from formats.checkpoint import load_checkpoint
from formats.data_directory import DataDirectory
from formats.run_directory import newest_checkpoint, step_checkpoints, step_path
from models import GPT, NextTokenLoss
from preparation.tokenizer_kinds import train_bpe
from tests.conftest import tiny
from tests.runs import assert_same_run, lines, start_training, wait_for_lines
from training.data_order import Batches, TrainingData
from training.learner import Learner, passes_of_step
from training.machine import Machine
from training.processes import Processes
from training.start import fix_length
from training.step import training_step


def test_a_run_leaves_what_the_contract_says(trained_run):
    assert {p.name for p in trained_run.iterdir()} >= {
        "best_model.pt",
        "step_00000020.pt",
        "step_00000030.pt",
        "metrics.jsonl",
        "config.json",
        "loss.png",
    }
    assert not (trained_run / "step_00000010.pt").exists()  # the newest two are kept
    metrics = lines(trained_run)
    train = [line for line in metrics if "loss" in line]
    val = [line for line in metrics if "val_loss" in line]
    assert [line["step"] for line in train] == list(range(1, 31)) and [line["step"] for line in val] == [15, 30]
    assert train[-1]["loss"] < train[0]["loss"] - 1 and train[-1]["tokens"] == 30 * 4 * 2 * 32
    assert val[-1]["val_bits_per_byte"] < val[0]["val_bits_per_byte"] and 0 < val[-1]["val_accuracy"] < 1
    best, step = load_checkpoint(trained_run / "best_model.pt"), load_checkpoint(trained_run / "step_00000030.pt")
    assert "resume" not in best and step["resume"]["samples_seen"] == 30 * 8
    assert all(torch.equal(best["model"][k], step["model"][k]) for k in step["model"])
    assert not any(name.endswith(".tmp") for name in os.listdir(trained_run))


def test_the_best_model_is_the_one_of_the_lowest_loss(tmp_path, sample_dir, monkeypatch):
    """However small the difference; an equal or worse one never takes its place."""
    losses = iter([3.0, 2.0, 2.0 + 1e-9, 2.0 - 1e-9, 2.0, 5.0])
    original = training.validation.summarize
    monkeypatch.setattr("training.validation.summarize", lambda *args: original(*args) | {"loss": next(losses)})
    seen = []
    for step in range(1, 7):
        train.main(tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=step, eval_interval=1, resume="auto"))
        seen.append(load_checkpoint(tmp_path / "run" / "best_model.pt")["step"])
    assert seen == [1, 2, 2, 4, 4, 4]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_line_goes_on(tmp_path, sample_dir, script, number, code):
    arguments = tiny(data_dir=sample_dir, max_steps=60, eval_interval=20, resume="auto")
    script("train.py", *arguments, "--out_dir", tmp_path / "whole")
    process = start_training(*arguments, "--out_dir", tmp_path / "parts", output=tmp_path / "said")
    wait_for_lines(tmp_path / "parts", 5)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == code and "everything saved" in (tmp_path / "said").read_text()
    stopped_at = newest_checkpoint(tmp_path / "parts")[1]["step"]
    assert 5 <= stopped_at < 60
    script("train.py", *arguments, "--out_dir", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("step", [5, 10])
def test_a_signal_during_an_evaluation_makes_it_up_later(tmp_path, sample_dir, step):
    """The evaluation that a signal cut off is done first after the resume, and its line stands where it would have stood."""
    import train

    arguments = tiny(data_dir=sample_dir, max_steps=10, eval_interval=5, checkpoint_interval=100)
    assert train.main([*arguments, "--out_dir", str(tmp_path / "whole")]) == 0
    original = train.evaluate

    def interrupted(start, learner, validation, log, stop) -> bool:
        if learner.progress.step == step:
            stop.number = signal.SIGTERM
        return original(start, learner, validation, log, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert train.main([*arguments, "--out_dir", str(tmp_path / "parts")]) == 143
    assert not any("val_loss" in line and line["step"] == step for line in lines(tmp_path / "parts"))
    assert train.main([*arguments, "--out_dir", str(tmp_path / "parts"), "--resume", "auto"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_evaluating_never_changes_the_training(tmp_path, sample_dir, script):
    arguments = tiny(data_dir=sample_dir, max_steps=12, dropout=0.1, eval_interval=None)
    script("train.py", *arguments, "--out_dir", tmp_path / "often", "--eval_interval", 2)
    script("train.py", *arguments, "--out_dir", tmp_path / "never", "--eval_interval", 100)
    train = [[line for line in lines(tmp_path / name) if "loss" in line] for name in ("often", "never")]
    assert train[0] == train[1]


class Keep(torch.optim.SGD):
    """Keeps the gradient instead of stepping."""

    def step(self, closure=None):
        self.kept = torch.cat([p.grad.flatten().clone() for group in self.param_groups for p in group["params"]])


def learner_of(sample_dir, **values) -> tuple[Learner, Batches]:
    """A small gpt2 with all that trains it in float32, and its data."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=512, n_layer=2, n_head=2, n_embd=32))
    machine = Machine.choose("cpu", "float32", False)
    data = TrainingData([DataDirectory(sample_dir)], [None], 32, seed=1)
    return Learner(NextTokenLoss(model), TrainConfig(**values), machine, Processes()), Batches(data, "cpu")


def gradient_of_a_step(sample_dir, batch_size: int, accumulation: int, micro_batch: int | None = None) -> torch.Tensor:
    learner, batches = learner_of(sample_dir, batch_size=batch_size, gradient_accumulation_steps=accumulation, grad_clip=0, max_steps=9)
    learner.micro_steps, learner.micro_batch = passes_of_step(learner.config, 1, micro_batch)
    learner.optimizers = [Keep(learner.model.parameters(), lr=1.0)]
    learner.optimizers[0].param_groups[0]["peak_lr"] = 1.0
    training_step(learner, batches, 3)
    return learner.optimizers[0].kept


def test_accumulation_does_not_change_the_gradient(sample_dir):
    """The same windows in one batch of 8, or in 2 of 4, or 8 of 1, or a batch of 8 for which there is memory for 3 (so 2) only."""
    whole = gradient_of_a_step(sample_dir, 8, 1)
    for shape in ((4, 2), (1, 8), (8, 1, 3)):
        assert (gradient_of_a_step(sample_dir, *shape) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(tmp_path, trained_run, sample_dir, script):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    newest = run / "step_00000030.pt"
    newest.write_bytes(newest.read_bytes()[:-5000])
    process = script(*again(run, sample_dir, resume="auto"))
    assert "step_00000030.pt is damaged" in process.stderr and "resumed" in process.stderr and "at step 20" in process.stderr
    assert_same_run(run, trained_run)


def again(run, sample_dir, **changes) -> tuple:
    """The command line of `trained_run` for a copy of it."""
    return "train.py", *tiny(
        **({"data_dir": sample_dir, "out_dir": run, "max_steps": 30, "eval_interval": 15, "checkpoint_interval": 10} | changes)
    )


def test_an_occupied_run_directory(tmp_path, trained_run, sample_dir, script):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    same = again(run, sample_dir)
    process = script(*same)
    assert "finished at step 30" in process.stdout
    process = script(*same, "--weight_decay", "0.2", code=2)
    assert "--resume auto" in process.stderr and "--overwrite" in process.stderr
    process = script(*same, "--weight_decay", "0.2", "--resume", "auto", code=2)
    assert "weight_decay=0.1, not 0.2" in process.stderr
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    (run / "notes.txt").write_text("mine")
    script(*same, "--weight_decay", "0.2", "--overwrite")
    assert json.loads((run / "config.json").read_text())["train"]["weight_decay"] == 0.2
    assert (run / "notes.txt").read_text() == "mine" and len(lines(run)) == 32


def test_a_finished_run_can_be_made_longer(tmp_path, trained_run, sample_dir, script):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    script(*again(run, sample_dir, max_steps=40, resume="auto"))
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 41)) and newest_checkpoint(run)[1]["step"] == 40


def test_resuming_a_finished_run_says_so(trained_run, sample_dir, script):
    before = {p.name: p.read_bytes() for p in trained_run.iterdir()}
    assert "finished at step 30" in script(*again(trained_run, sample_dir, resume="auto")).stdout
    assert {p.name: p.read_bytes() for p in trained_run.iterdir()} == before


def test_resuming_an_older_checkpoint(tmp_path, trained_run, sample_dir, script):
    """In its own directory the newer ones must go first; in another directory the run branches off."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    older = run / "step_00000020.pt"
    process = script(*again(run, sample_dir, resume=older, out_dir=None), code=2)
    assert "goes on to step_00000030.pt" in process.stderr
    script(*again(tmp_path / "branch", sample_dir, resume=older))
    assert_same_run(tmp_path / "branch", trained_run)
    process = script(*again(tmp_path / "branch", sample_dir, resume=older), code=2)
    assert "holds a run already" in process.stderr
    process = script(*again(tmp_path / "b", sample_dir, resume=run / "best_model.pt"), code=2)
    assert "holds weights only" in process.stderr and not (tmp_path / "b").exists()


def test_an_explicit_warmup_is_kept_on_resume(tmp_path, sample_dir, script):
    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=10, checkpoint_interval=5)
    script("train.py", *arguments, "--warmup_steps", 6)
    (tmp_path / "run" / "step_00000010.pt").unlink()
    whole = lines(tmp_path / "run")
    script("train.py", *arguments, "--resume", "auto")
    assert lines(tmp_path / "run") == whole and whole[2]["lr_factor"] == pytest.approx(3 / 7)


def test_rates_can_be_lowered_on_resume(tmp_path, trained_run, sample_dir, script):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    script(*again(run, sample_dir, resume="auto", max_steps=32, learning_rate=1e-4))
    groups = newest_checkpoint(run)[1]["resume"]["optimizers"][0]["param_groups"]
    assert [group["peak_lr"] for group in groups] == [1e-4] * len(groups)


def test_another_mixture_is_another_run(tmp_path, sample_dir, mistake):
    import train

    shutil.copytree(sample_dir, tmp_path / "a")
    shutil.copytree(sample_dir, tmp_path / "b")
    arguments = tiny(out_dir=tmp_path / "run", max_steps=2, data_dir=None)
    a, b = tmp_path / "a", tmp_path / "b"
    assert train.main([*arguments, "--data_dir", f"{a}:0.7", f"{b}:0.3"]) == 0
    assert train.main([*arguments, "--data_dir", f"{a}:7", f"{b}:3"]) == 0  # the same shares: finished already
    assert "holds another run" in mistake("train.py", *arguments, "--data_dir", f"{a}:0.6", f"{b}:0.4", cwd=tmp_path)
    assert "named twice" in mistake("train.py", *arguments, "--data_dir", a, a, cwd=tmp_path)


def test_overwrite_deletes_nothing_before_the_new_run_can_start(tmp_path, trained_run, sample_dir, mistake):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    mistake(*again(run, sample_dir, dtype="float16"), "--overwrite", cwd=tmp_path)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(steps, signal_at): the loss of these steps (0, 1, ...) is no number; a signal comes in the midst of step signal_at."""
    import models

    original, calls = models.NextTokenLoss.forward, []

    def prepare(steps, signal_at=None):
        calls.clear()

        def forward(self, rows):
            loss, accuracy = original(self, rows)
            if self.training:  # not the estimate of the time
                calls.append(None)
            if len(calls) - 1 == signal_at:
                signal.raise_signal(signal.SIGTERM)
            return (loss * float("nan"), accuracy) if len(calls) - 1 in steps else (loss, accuracy)

        monkeypatch.setattr(models.NextTokenLoss, "forward", forward)
        monkeypatch.setattr("training.pace.seconds_per_step", lambda *args: (0.0, 0.0))

    return prepare


def one_by_one(sample_dir, run, **changes) -> list[str]:
    return tiny(
        **({"data_dir": sample_dir, "out_dir": run, "gradient_accumulation_steps": 1, "max_steps": 12, "eval_interval": 4} | changes)
    )


def test_a_step_without_a_number_is_skipped_and_counted(tmp_path, sample_dir, poisoned):
    """Weights, momentum and step counts stay as they were; the run goes on and says how many steps it skipped."""
    import train

    poisoned({4, 5, 9})
    arguments = one_by_one(sample_dir, tmp_path / "run", checkpoint_interval=1, keep_checkpoints="all", weight_decay=0.5)
    assert train.main(arguments) == 0
    metrics = [line for line in lines(tmp_path / "run") if "skipped_steps" in line]
    assert [line["skipped_steps"] for line in metrics] == [0] * 4 + [1, 2, 2, 2, 2, 3, 3, 3]
    assert [line["loss"] is None for line in metrics] == [False] * 4 + [True, True] + [False] * 3 + [True] + [False] * 2
    saved = {path.name: load_checkpoint(path) for path in step_checkpoints(tmp_path / "run")}
    assert "step_00000005.pt" not in saved and "step_00000006.pt" not in saved  # who knows whether the weights are sound?
    assert saved["step_00000012.pt"]["resume"]["optimizers"][0]["state"][0]["step"] == 9

    poisoned({4})
    assert train.main(one_by_one(sample_dir, tmp_path / "short", max_steps=5, checkpoint_interval=4, warmup_steps=1)) == 1
    assert [path.name for path in step_checkpoints(tmp_path / "short")] == ["step_00000004.pt"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_skipped_step_changes_nothing(sample_dir, optimizer):
    """Against the state before it, with weight decay and momentum that would move the weights on their own."""
    learner, batches = learner_of(sample_dir, batch_size=2, gradient_accumulation_steps=1, optimizer=optimizer, warmup_steps=0)
    training_step(learner, batches, 0)

    def state() -> list[dict]:
        return [learner.model.state_dict(), *({k: v for s in o.state.values() for k, v in s.items()} for o in learner.optimizers)]

    before = [{name: value.clone() for name, value in values.items()} for values in state()]
    learner.model.wte.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    assert not torch.isfinite(training_step(learner, batches, 1).loss) and not learner.check_finite()
    for old, now in zip(before, state(), strict=True):
        assert all(torch.equal(old[key], now[key]) for key in old)


def test_steps_without_a_number_in_a_row_end_the_run(tmp_path, sample_dir, poisoned, capsys):
    import train

    poisoned(range(6, 100))
    assert train.main(one_by_one(sample_dir, tmp_path / "run", checkpoint_interval=5)) == 1
    message = capsys.readouterr().err
    assert "5 steps in a row" in message and "the last at step 11 (loss nan" in message
    assert "learning rates 0.00" in message and "step_00000005.pt" in message and "--learning_rate" in message
    assert [path.name for path in step_checkpoints(tmp_path / "run")] == ["step_00000005.pt"]


def test_weights_in_doubt_are_not_saved_on_a_signal(tmp_path, sample_dir, poisoned):
    import train

    poisoned({2, 3}, signal_at=3)
    assert train.main(one_by_one(sample_dir, tmp_path / "run", log_interval=10)) == 1
    assert not step_checkpoints(tmp_path / "run")


def test_a_signal_in_the_midst_of_an_accumulation(tmp_path, sample_dir, poisoned):
    """The step that was begun is dropped, and made whole after the resume."""
    import train

    arguments = one_by_one(sample_dir, tmp_path / "parts", gradient_accumulation_steps=4, max_steps=6, dropout=0.1)
    poisoned((), signal_at=9)  # the second of four micro-batches of step 2
    assert train.main(arguments) == 143
    assert newest_checkpoint(tmp_path / "parts")[1]["step"] == 2
    poisoned(())
    assert train.main([*arguments, "--resume", "auto"]) == 0
    arguments[arguments.index(str(tmp_path / "parts"))] = str(tmp_path / "whole")
    assert train.main(arguments) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_changed_metrics_are_noticed(tmp_path, trained_run, sample_dir, script):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 1,', '"step": 2,', 1))
    (run / "step_00000030.pt").unlink()
    assert "metrics.jsonl was changed since" in script(*again(run, sample_dir, resume="auto"), code=2).stderr


def test_a_loss_that_is_not_finite_ends_the_run_and_poisons_nothing(tmp_path, sample_dir, script):
    arguments = tiny(
        data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=40, eval_interval=1, checkpoint_interval=1, learning_rate=1000
    )
    process = script("train.py", *arguments, "--grad_clip", 0, "--weight_decay", 1000, code=1)
    assert "no finite loss" in process.stderr and "learning rates" in process.stderr
    best = tmp_path / "run" / "best_model.pt"
    if best.exists():
        assert all(torch.isfinite(weight).all() for weight in load_checkpoint(best)["model"].values())


def test_train_on_a_text_in_one_go(tmp_path, script):
    """--dataset prepares into the run's own data/, once; a changed text is prepared again, but not under an existing run."""
    tokenizer = tmp_path / "tok.json"
    text = "".join(f"{i} little frogs jumped over a log.\n" for i in range(600))
    tokenizer.write_text(train_bpe([text], 300).json)
    (tmp_path / "frogs.txt").write_text(text)
    arguments = tiny(dataset="frogs.txt", tokenizer=tokenizer, epochs=2)
    process = script("train.py", *arguments, cwd=tmp_path)
    run = tmp_path / "checkpoints" / "frogs"
    assert (run / "data" / "meta.json").exists() and (run / "best_model.pt").exists() and "2.0" in process.stderr
    process = script("train.py", *arguments, cwd=tmp_path)
    assert "holds frogs.txt already" in process.stderr and "this very run" in process.stdout
    before = (run / "data" / "train.bin").read_bytes()
    (tmp_path / "frogs.txt").write_text(text.upper())
    assert "other data" in script("train.py", *arguments, cwd=tmp_path, code=2).stderr
    assert (run / "data" / "train.bin").read_bytes() == before
    script("train.py", *arguments, "--overwrite", cwd=tmp_path)
    assert (run / "data" / "train.bin").read_bytes() != before


def test_default_directories(tmp_path, sample_dir, script):
    shutil.copytree(sample_dir, tmp_path / "data")
    shutil.copytree(sample_dir, tmp_path / "stories")
    script("train.py", *tiny(max_steps=2), cwd=tmp_path)
    script("train.py", *tiny(max_steps=2, data_dir="stories"), cwd=tmp_path)
    script("train.py", *tiny(max_steps=2), "--data_dir", "data:0.5", "stories:0.5", cwd=tmp_path)
    for run in ("checkpoints", "checkpoints/stories", "checkpoints/data+stories"):
        assert (tmp_path / run / "best_model.pt").is_file()


def test_a_directory_of_nanogpt_trains_with_a_given_tokenizer(tmp_path, sample_dir, script):
    (tmp_path / "shakespeare").mkdir()
    for split in ("train", "val"):
        shutil.copy(sample_dir / f"{split}.bin", tmp_path / "shakespeare")
    arguments = tiny(data_dir="shakespeare", max_steps=2)
    assert "--tokenizer" in script("train.py", *arguments, cwd=tmp_path, code=2).stderr
    script("train.py", *arguments, "--tokenizer", sample_dir / "tokenizer.json", cwd=tmp_path)
    assert (tmp_path / "checkpoints" / "shakespeare" / "best_model.pt").is_file()


def test_export_at_the_end(tmp_path, sample_dir, script):
    script("train.py", *tiny(data_dir=sample_dir, max_steps=2, out_dir=tmp_path / "run", export="torchscript"))
    assert (tmp_path / "run" / "best_model.ts.pt").is_file() and (tmp_path / "run" / "best_model.pt").is_file()


def test_patience_ends_a_run_that_gets_no_better(tmp_path, sample_dir, script):
    """With a rate too small to change a weight, whatever the machine; the run counts as finished, until it is asked for more patience."""
    arguments = tiny(
        data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=60, eval_interval=2, patience=3, resume="auto", learning_rate=1e-30
    )
    idle = ["--muon_learning_rate", "1e-30"]
    process = script("train.py", *arguments, *idle)
    assert "stopped early" in process.stdout
    val = [line["val_loss"] for line in lines(tmp_path / "run") if "val_loss" in line]
    best = val.index(min(val))
    assert len(val) - 1 - best == 3 and 2 * len(val) < 60
    assert load_checkpoint(tmp_path / "run" / "best_model.pt")["step"] == 2 * (best + 1)
    assert "finished at step" in script("train.py", *arguments, *idle).stdout
    arguments[arguments.index("--patience") + 1] = "4"
    script("train.py", *arguments, *idle)
    assert len([line for line in lines(tmp_path / "run") if "val_loss" in line]) > len(val)


def test_the_running_mean_of_the_weights(tmp_path, sample_dir):
    """Against the mean made by hand from the checkpoints of all steps; it is what the best model holds."""
    import train

    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=12, eval_interval=12, checkpoint_interval=1)
    assert train.main([*arguments, "--ema_decay", "0.6", "--keep_checkpoints", "all"]) == 0
    mean = None
    for step in range(1, 13):
        weights = load_checkpoint(step_path(tmp_path / "run", step))["model"]
        decay = min(0.6, step / (9 + step))
        if mean is None:
            torch.manual_seed(1337)
            mean = GPT(GPTConfig(**load_checkpoint(tmp_path / "run" / "best_model.pt")["model_config"])).state_dict()
        mean = {name: decay * mean[name] + (1 - decay) * weights[name] for name in mean}
    best = load_checkpoint(tmp_path / "run" / "best_model.pt")["model"]
    assert all(torch.allclose(best[name], mean[name], atol=1e-6) for name in mean)
    assert not torch.allclose(best["wte.weight"], weights["wte.weight"], atol=1e-4)


def test_the_length_of_a_run_in_tokens(tmp_path, sample_dir, mistake):
    import train

    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run")  # 256 tokens a step
    assert train.main([*arguments, "--max_tokens", "1025"]) == 0
    assert newest_checkpoint(tmp_path / "run")[1]["step"] == 5
    assert "epochs and max_tokens both set" in mistake("train.py", *arguments, "--max_tokens", "9", "--epochs", "1", cwd=tmp_path)


def test_the_length_of_a_run_in_epochs(sample_dir):
    """One and a half passes; a warmup that nobody asked for takes at most a tenth of them."""
    data = TrainingData([DataDirectory(sample_dir)], [None], 32, seed=1)
    config = TrainConfig(epochs=1.5, batch_size=4, gradient_accumulation_steps=2, warmup_steps=2000)
    steps = math.ceil(1.5 * data.samples_per_epoch / 8)
    fixed = fix_length(config, False, data)
    assert (fixed.max_steps, fixed.warmup_steps) == (steps, steps // 10) and steps // 10 < 2000
    assert fix_length(config, True, data).warmup_steps == 2000


def test_sample_texts_are_logged_and_change_nothing(tmp_path, sample_dir):
    import train

    arguments = tiny(data_dir=sample_dir, max_steps=6, eval_interval=3, dropout=0.1)
    assert train.main([*arguments, "--out_dir", str(tmp_path / "with"), "--sample_prompt", "Once upon", "--sample_tokens", "5"]) == 0
    assert train.main([*arguments, "--out_dir", str(tmp_path / "without"), "--sample_tokens", "0"]) == 0
    samples = [line["sample"] for line in lines(tmp_path / "with") if "sample" in line]
    assert len(samples) == 2 and all(text.startswith("Once upon") and len(text) > len("Once upon") for text in samples)
    with_samples = [{k: v for k, v in line.items() if k != "sample"} for line in lines(tmp_path / "with")]
    assert with_samples == lines(tmp_path / "without")


def test_tensorboard_holds_what_metrics_holds(tmp_path, sample_dir, script):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=4, eval_interval=2)
    script("train.py", *arguments, "--tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("validation/loss")] == [2, 4]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--preset", "huge"], "unknown preset 'huge'; take one of nano"),
        (["--data_dir", "nowhere"], "no data directory at nowhere"),
        (["--n_embd", "100", "--n_head", "6"], "n_embd=100 is not divisible by n_head=6"),
        (["--block_size", "100000"], "fewer than block_size + 1 = 100001"),
        (["--vocab_size", "77"], "vocab_size=77, but the data's tokenizer has 512 ids"),
        (["--preset", "nano", "--arch", "qwen3", "--bias"], "bias=True"),
        (["--epochs", "1", "--max_steps", "3"], "--max_steps and --epochs"),
        (["--resume", "auto", "--overwrite"], "--resume continues"),
        (["--resume", "nothing.pt"], "no checkpoint at nothing.pt"),
        (["--export", "word"], "unknown format word"),
        (["--device", "cuda:7"], "device='cuda:7' is not available"),
        (["--data_dir", "data:0.5", "./data"], "named twice"),
        (["--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--learnig_rate", "1"], "--learning_rate"),
        (["--tokenizer", "bpe"], "give the path of their tokenizer.json"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, sample_dir, mistake, flags, part):
    shutil.copytree(sample_dir, tmp_path / "data")
    assert part in mistake("train.py", *flags, cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_missing_package_is_one_sentence(tmp_path, program):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    for name in ("train.py", "generate.py", "evaluate.py", "export_model.py"):
        process = program(name, cwd=tmp_path, code=2, PYTHONPATH=str(tmp_path))
        assert process.stderr == "error: the package 'torch' is not installed; run: pip install -r requirements.txt\n"


def test_bare_train_on_a_cpu_warns_and_goes_on(tmp_path, sample_dir, script, monkeypatch):
    """`small`, but for its depth, on a CPU: the estimate, a pasteable line, and then the training itself starts."""
    shutil.copytree(sample_dir, tmp_path / "data")
    monkeypatch.setattr("training.pace.seconds_per_step", lambda *args: (9.0, 0.0))
    monkeypatch.setattr(train, "training_step", lambda *_: sys.exit(7))
    process = script("train.py", "--device", "cpu", "--n_layer", 1, cwd=tmp_path, code=7)
    assert "about" in process.stderr and "python train.py --preset nano --out_dir checkpoints/nano" in process.stderr
