"""benchmark.py train: tokens per second and peak memory of train.py, beside nanoGPT's."""

import shutil
import statistics
from pathlib import Path

from utils import notice

import numpy as np

from benchmarks import nanogpt
from benchmarks.harness import Finished, our_script, print_matrix_rate, run, spread, word_tokenizer
from formats.metrics import METRICS, read_metrics
from formats.run_directory import load_model

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
PEER = "nanoGPT"
UNSTEADY = 2  # medians leave out the first step and this many after it


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
    (cwd / "tokenizer.json").write_text(word_tokenizer(VOCABULARY).json, encoding="utf-8")


def measure(rounds: int, steps: int, device: str, checkout: Path | None, cwd: Path) -> None:
    """Train in each way, and as nanoGPT does if its checkout is given, in turn, and print medians."""
    shape = SHAPES["cuda" if device.startswith("cuda") else "cpu"]
    tokens = shape["batch_size"] * shape["block_size"]
    base = {"arch": "gpt2", "tokenizer": "tokenizer.json", "device": device, "max_steps": steps, "gradient_accumulation_steps": 1}
    base |= shape | {"eval_interval": steps, "eval_tokens": 2000}
    write_data(cwd)
    ways = list(OUR_WAYS)
    if checkout is not None:
        ways.append(PEER)
        directory = nanogpt.lay_out(checkout, cwd)
        shutil.copytree(cwd / "bench", directory / "data" / "bench", dirs_exist_ok=True)
    rates: dict[str, list[float]] = {way: [] for way in ways}  # tokens per second
    peaks: dict[str, list[float]] = {way: [] for way in ways}  # bytes
    first_steps: dict[str, float] = {}  # seconds, in the first round
    for i in range(rounds):
        for way in ways:
            if way == PEER:
                done = nanogpt.train(directory, shape | {"max_iters": steps, "eval_interval": 10**9}, device)
                seconds = nanogpt.step_seconds(done.output)
            else:
                done = our_training(cwd, "out", "bench", base | OUR_WAYS[way])
                first, *seconds = step_seconds(cwd / "out")
                first_steps.setdefault(way, first)
            peaks[way].append(done.peak)
            rates[way].append(tokens / statistics.median(seconds[UNSTEADY:]))
        notice(f"round {i + 1} of {rounds}: " + ", ".join(f"{way} {rates[way][-1]:,.0f}" for way in ways))
    model, *_ = load_model(str(cwd / "out"))
    best = print_matrix_rate(device) / model.flops_per_token()
    print(f"{model.num_parameters():,} parameters, {tokens:,} tokens a step")
    for way in ways:
        peak = statistics.median(peaks[way])
        line = f"{way:16} {spread(rates[way], ',.0f')} tokens/s, {statistics.median(rates[way]) / best:.0%} of the matrix rate"
        line += f", peak {peak / 1e9:.2f} GB"
        if way in first_steps:
            line += f", first step {first_steps[way]:.0f} s"
        if PEER in ways and way != PEER:
            speed = [ours / theirs for ours, theirs in zip(rates[way], rates[PEER])]
            line += f"; {spread(speed)} x nanoGPT's speed, {peak / statistics.median(peaks[PEER]):.0%} of its memory"
        print(line)
