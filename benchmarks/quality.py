"""benchmark.py quality: the time in which train.py reaches nanoGPT's loss on a text, and the loss that it reaches in nanoGPT's time."""

import json
import shutil
import statistics
import sys
from pathlib import Path

from utils import notice

from benchmarks import nanogpt
from benchmarks.harness import our_script, print_matrix_rate, run, spread
from benchmarks.training import our_training, step_seconds
from formats.run_directory import load_model

# nanoGPT's documented run on a CPU, and what we set against it: no more parameters, the same context of 64 characters
NANOGPT = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "max_iters": 2000, "lr_decay_iters": 2000}
OURS = {"preset": "nano", "n_hidden": 320, "block_size": 64, "learning_rate": 1e-2, "muon_learning_rate": 0.02, "warmup_steps": 20}
OURS |= {"eval_interval": 10**9, "eval_tokens": 1000, "device": "cpu"}
SHORT = {"batch_size": 12, "max_tokens": 220_000}


def prepare_both(text: str, checkout: Path, cwd: Path) -> Path:
    """Each side's data by its own script, in characters, the last tenth held out; returns the directory in which nanoGPT runs."""
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        (cwd / f"{name}.txt").write_text(part, encoding="utf-8")
    ours = {"input": "train.txt", "val_input": "val.txt", "test_fraction": 0.001, "tokenizer": "char", "output": "chars"}
    run(our_script("prepare_data.py", ours), cwd)
    peer = nanogpt.lay_out(checkout, cwd)
    shutil.copy(checkout / "data" / "shakespeare_char" / "prepare.py", peer / "data" / "bench")
    (peer / "data" / "bench" / "input.txt").write_text(text, encoding="utf-8")
    shutil.copy(checkout / "config" / "train_shakespeare_char.py", peer / "shakespeare_char.py")
    run([sys.executable, str(peer / "data" / "bench" / "prepare.py")], peer)
    return peer


def their_result(peer: Path) -> tuple[float, float, int]:
    """Train nanoGPT: seconds, nats per character, parameters."""
    iterations = NANOGPT["max_iters"]
    done = nanogpt.train(peer, NANOGPT | {"eval_interval": iterations, "out_dir": "out"}, "cpu", "shakespeare_char.py")
    return statistics.mean(nanogpt.step_seconds(done.output)) * iterations, *nanogpt.validate(peer)


def our_result(cwd: Path, out: str, seed: int, length: dict) -> tuple[float, float]:
    """Train ours: seconds, nats per character."""
    our_training(cwd, out, "chars", OURS | {"seed": seed} | length)
    evaluate = {"checkpoint": out, "data_dir": "chars", "split": "val", "device": "cpu", "output": "metrics.json"}
    run(our_script("evaluate.py", evaluate), cwd)
    return sum(step_seconds(cwd / out)), json.loads((cwd / "metrics.json").read_text())["chars"]["val"]["loss"]


def measure(rounds: int, file: Path, checkout: Path, cwd: Path) -> None:
    """Train nanoGPT, ours shortly, and ours for as long as nanoGPT took, in turn with another seed each round; print medians."""
    text = file.read_text(encoding="utf-8")
    peer = prepare_both(text, checkout, cwd)
    results: dict[str, list[tuple[float, float]]] = {"nanoGPT": [], "short": [], "long": []}  # seconds, nats per character
    for seed in range(1, rounds + 1):
        seconds, loss, their_parameters = their_result(peer)
        results["nanoGPT"].append((seconds, loss))
        results["short"].append(our_result(cwd, "short", seed, SHORT))
        # a little less than fits into the peer's time at the speed of the short run
        tokens = int(SHORT["max_tokens"] * seconds / results["short"][-1][0] * 0.95)
        results["long"].append(our_result(cwd, "long", seed, {"batch_size": 24, "max_tokens": tokens}))
        notice(f"round {seed} of {rounds}: " + ", ".join(f"{name} {r[-1][0]:.1f} s, {r[-1][1]:.3f}" for name, r in results.items()))
    print_matrix_rate("cpu")
    our_parameters = load_model(str(cwd / "short"))[0].num_parameters()
    print(f"{len(text):,} characters, the last tenth held out; parameters: ours {our_parameters:,}, nanoGPT {their_parameters:,}")
    for name, values in results.items():
        seconds, losses = zip(*values)
        ratios = [mine[0] / other[0] for mine, other in zip(values, results["nanoGPT"])]
        print(f"{name:8} {spread(seconds)} s, {spread(losses, '.3f')} nats per character; {spread(ratios, '.2f')} of nanoGPT's time")
