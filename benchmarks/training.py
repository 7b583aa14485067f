"""benchmark.py train: tokens per second and peak memory of train.py, beside nanoGPT's."""

import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from utils import notice

import numpy as np
from tokenizers import Tokenizer, models

from benchmarks import nanogpt
from benchmarks.harness import Finished, our_script, print_matrix_rate, run, spread
from formats.metrics import METRICS, read_metrics
from formats.run_directory import load_model
from formats.tokenizer import EOT

VOCABULARY = 50257
# what both sides train: on a CPU the `mini` preset, on a GPU GPT-2's 124M parameters
SHAPES = {
    "cpu": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 128, "batch_size": 16},
    "cuda": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 16},
}
OUR_WAYS = {
    "AdamW, compiled": {"optimizer": "adamw", "compile": True},
    "AdamW, eager": {"optimizer": "adamw", "compile": False},
    "Muon, compiled": {"optimizer": "muon", "compile": True},
}
UNSTEADY = 2  # medians leave out the first step and this many after it


@dataclass
class Way:
    """A way to train, and what each of its runs reached. rates: tokens per second. peaks: bytes. first_step: seconds, in the first run."""

    name: str
    values: dict
    rates: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    first_step: float | None = None


def our_training(cwd: Path, out: str, data: str, values: dict) -> Finished:
    quiet = {"data_dir": data, "out_dir": out, "overwrite": True, "log_interval": 1, "sample_tokens": 0, "checkpoint_interval": 10**9}
    return run(our_script("train.py", quiet | values), cwd)


def step_seconds(out: Path) -> list[float]:
    """Seconds of each step of a training of ours, compilation included, validation and start-up left out."""
    lines = [line for line in read_metrics(out / METRICS) if "tokens_per_second" in line]
    return [lines[0]["tokens"] / line["tokens_per_second"] for line in lines]


def write_data(cwd: Path) -> None:
    """bench/train.bin, bench/val.bin and tokenizer.json: random tokens, since the speed doesn't depend on what they say."""
    rng = np.random.RandomState(0)
    (cwd / "bench").mkdir()
    for split, n in (("train", 500_000), ("val", 4_000)):
        rng.randint(0, VOCABULARY, n).astype("<u2").tofile(cwd / "bench" / f"{split}.bin")
    words = {EOT: 0} | {f"t{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token=EOT)).save(str(cwd / "tokenizer.json"))


def measure(rounds: int, steps: int, device: str, checkout: Path | None, cwd: Path) -> None:
    """Train in each way, and as nanoGPT does if its checkout is given, in turn, and print medians."""
    shape = SHAPES["cuda" if device.startswith("cuda") else "cpu"]
    tokens = shape["batch_size"] * shape["block_size"]
    base = {"arch": "gpt2", "tokenizer": "tokenizer.json", "device": device, "max_steps": steps, "gradient_accumulation_steps": 1}
    base |= shape | {"eval_interval": steps, "eval_tokens": 2000}
    ours = [Way(name, base | values) for name, values in OUR_WAYS.items()]
    write_data(cwd)
    peer = None
    if checkout is not None:
        peer = Way("nanoGPT", shape | {"max_iters": steps, "eval_interval": 10**9})
        directory = nanogpt.lay_out(checkout, cwd)
        for split in ("train", "val"):
            shutil.copy(cwd / "bench" / f"{split}.bin", directory / "data" / "bench")
    ways = ours if peer is None else [*ours, peer]
    for i in range(rounds):
        for way in ways:
            if way is peer:
                done = nanogpt.train(directory, way.values, device)
                seconds = nanogpt.step_seconds(done.output)
            else:
                done = our_training(cwd, "out", "bench", way.values)
                first, *seconds = step_seconds(cwd / "out")
                way.first_step = way.first_step or first
            way.peaks.append(done.peak)
            way.rates.append(tokens / statistics.median(seconds[UNSTEADY:]))
        notice(f"round {i + 1} of {rounds}: " + ", ".join(f"{way.name} {way.rates[-1]:,.0f}" for way in ways))
    model, *_ = load_model(str(cwd / "out"))
    rate = print_matrix_rate(device)
    print(f"{model.num_parameters():,} parameters, {tokens:,} tokens a step")
    for way in ways:
        print(describe(way, peer, model.flops_per_token() / rate))


def describe(way: Way, peer: Way | None, ideal_seconds: float) -> str:
    """A line about a way. ideal_seconds: what a token would need at the matrix rate."""
    line = f"{way.name:16} {spread(way.rates, ',.0f')} tokens/s, {statistics.median(way.rates) * ideal_seconds:.0%} of the matrix rate"
    line += f", peak {statistics.median(way.peaks) / 1e9:.2f} GB"
    if way.first_step is not None:
        line += f", first step {way.first_step:.0f} s"
    if peer is not None and way is not peer:
        speed = [a / b for a, b in zip(way.rates, peer.rates)]
        memory = statistics.median(way.peaks) / statistics.median(peer.peaks)
        line += f"; {spread(speed)} x nanoGPT's speed, {memory:.0%} of its memory"
    return line
