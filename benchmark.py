"""Speed, memory and learning of the stages, also beside a peer that runs from its own checkout.

    python benchmark.py train
    python benchmark.py train --against nanogpt ../nanoGPT
    python benchmark.py prepare --text stories.txt --large_megabytes 1000
    python benchmark.py quality --against nanogpt ../nanoGPT --text tinyshakespeare.txt

prepare  megabytes per second and peak memory of prepare_data.py, a bare loop of tiktoken, and datasets.map in two processes
train    tokens per second and peak memory of train.py, as a fraction of what this machine's matrix products reach
quality  how long training on a text (the last tenth is held out) takes to reach the peer's loss, and what it reaches in the peer's time

Ours and the peer's run in turn, `--rounds` times each; medians are printed. Other programs on the same cores spoil the figures.
"""

from utils import choose_device, choose_precision, needs_packages, notice, read_command_line, run_script

with needs_packages():
    import contextlib
    import importlib.util
    import json
    import os
    import re
    import shutil
    import statistics
    import subprocess
    import sys
    import tempfile
    import time
    from dataclasses import dataclass
    from pathlib import Path
    from typing import Literal

    import numpy as np
    import torch
    import tyro
    from tokenizers import Tokenizer, models

    from benchmarks.prepare_peers import write_corpus
    from formats.checkpoint import load_model
    from formats.metrics import read_metrics
    from formats.tokenizer import EOT
    from preparation import sample_corpus
    from preparation.sources import Format, TextFile
    from preparation.tokenizer_kinds import gpt2_tokenizer

HERE = Path(__file__).resolve().parent
PEERS = ("nanogpt",)
VOCABULARY = 50257
# what both sides train in `train`: on a CPU the `mini` preset, on a GPU GPT-2's 124M parameters
SHAPES = {
    "cpu": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 128, "batch_size": 16},
    "cuda": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 16},
}
OUR_WAYS = {
    "AdamW, compiled": {"optimizer": "adamw", "compile": "True"},
    "AdamW, eager": {"optimizer": "adamw", "compile": "False"},
    "Muon, compiled": {"optimizer": "muon", "compile": "True"},
}
# nanoGPT's documented run on a CPU, and what we set against it: no more parameters, the same context of 64 characters
NANOGPT_QUALITY = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "max_iters": 2000, "lr_decay_iters": 2000}
OUR_QUALITY = {"preset": "nano", "n_hidden": 320, "block_size": 64, "learning_rate": 1e-2, "muon_learning_rate": 0.02, "warmup_steps": 20}
SHORT = {"batch_size": 12, "max_tokens": 220_000}
LONG_BATCH = 24


@dataclass(frozen=True)
class Arguments:
    """Flags of benchmark.py."""

    stage: tyro.conf.Positional[Literal["prepare", "train", "quality"]]
    """prepare, train or quality."""
    against: tuple[str, str] | None = None
    """A peer and its checkout: nanogpt DIR."""
    rounds: int = 5
    """How often each side runs, in turn."""
    steps: int = 12
    """train: optimizer steps in a run; the first three are left out of the medians."""
    text: str | None = None
    """quality: a text file, e.g. tiny Shakespeare. prepare: documents to make the corpus from; default: the sample corpus."""
    megabytes: int = 200
    """prepare: size of the corpus."""
    large_megabytes: int | None = None
    """prepare: measure the memory for a corpus of this size too."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self):
        if self.against is not None and self.against[0] not in PEERS:
            raise ValueError(f"unknown peer {self.against[0]!r}; take {', '.join(PEERS)}, followed by the directory of its checkout")
        if min(self.megabytes, self.large_megabytes or 1) < 1:
            raise ValueError(f"megabytes={self.megabytes} and large_megabytes={self.large_megabytes} must be at least 1")
        if self.rounds < 1 or self.steps < 4:
            raise ValueError(f"rounds={self.rounds} must be at least 1 and steps={self.steps} at least 4")
        if self.stage == "quality" and (self.text is None or self.against is None):
            raise ValueError("quality needs --text FILE and --against nanogpt DIR: the peer's time and loss are the measure")


@dataclass(frozen=True)
class Finished:
    """A process that has ended. peak: its largest resident memory in bytes."""

    output: str
    peak: float


def run(command: list[str], cwd: Path) -> Finished:
    """Run a command to its end. Raises ValueError with the end of its output if it fails."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cwd / "inductor"), "PYTHONPATH": str(HERE)}
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read()
    if process.returncode:
        raise ValueError(f"{' '.join(command[:3])} ... ended with exit code {process.returncode}: {output[-400:]}")
    return Finished(output, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def flags(values: dict, joint: str = " ") -> list[str]:
    return [word for name, value in values.items() for word in f"--{name}{joint}{value}".split(" ")]


# ---------------------------------------------------------------- our side


def our_training(cwd: Path, out: str, data: str, values: dict) -> Finished:
    quiet = {"data_dir": data, "out_dir": out, "log_interval": 1, "sample_tokens": 0, "checkpoint_interval": 10**9}
    return run([sys.executable, str(HERE / "train.py"), "--overwrite", *flags(quiet | values)], cwd)


def our_rates(out: Path) -> list[float]:
    """Tokens per second of each step."""
    return [line["tokens_per_second"] for line in read_metrics(out / "metrics.jsonl") if "tokens_per_second" in line]


def our_seconds(out: Path) -> float:
    """Time of all steps, compilation included, validation and start-up left out."""
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "tokens_per_second" in line]
    return sum(lines[0]["tokens"] / line["tokens_per_second"] for line in lines)


def matrix_rate(device: str) -> float:
    """Floating-point operations per second of a linear layer as in the `mini` MLP, in training precision: the median of 20."""
    dtype = choose_precision(device, "auto")[0]
    x, weight = torch.randn(2048, 384, device=device, dtype=dtype), torch.randn(1536, 384, device=device, dtype=dtype)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, weight)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 10 * 2 * 2048 * 384 * 1536 / statistics.median(times)


# ---------------------------------------------------------------- nanoGPT, from its own checkout


def lay_out_nanogpt(checkout: Path, cwd: Path) -> Path:
    """A directory in which nanoGPT's train.py runs unchanged, with data of its own."""
    directory = cwd / "nanogpt"
    (directory / "data" / "bench").mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        (directory / name).symlink_to((checkout / name).resolve())
    return directory


def nanogpt_training(directory: Path, values: dict, device: str, *config: str) -> Finished:
    """Its training as its README runs it on a CPU (uncompiled, float32), or with its own defaults on a GPU. config: its configuration."""
    common = {"dataset": "bench", "device": device, "eval_iters": 1, "log_interval": 1, "dropout": 0.0, "gradient_accumulation_steps": 1}
    if device == "cpu":
        common["compile"] = "False"
    return run([sys.executable, "train.py", *config, *flags(common | values, joint="=")], directory)


def nanogpt_seconds(output: str) -> list[float]:
    """Seconds of each iteration that had no evaluation in it."""
    times = [float(found) / 1e3 for found in re.findall(r"^iter \d+: loss .*, time ([\d.]+)ms", output, re.MULTILINE)]
    return times[1:-1]


def nanogpt_validation(directory: Path) -> tuple[float, int]:
    """Nats per token of its checkpoint on the whole validation split, each token predicted once, and its number of parameters."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", directory / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved = torch.load(directory / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict({name.removeprefix("_orig_mod."): weight for name, weight in saved["model"].items()})
    tokens = torch.from_numpy(np.fromfile(directory / "data" / "bench" / "val.bin", np.uint16).astype(np.int64))
    size, nats = saved["model_args"]["block_size"], 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, size):
            x = tokens[start : start + size]
            y = tokens[start + 1 : start + 1 + len(x)]
            nats += model(x[None, : len(y)], y[None])[1].item() * len(y)
    return nats / (len(tokens) - 1), sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- the stages


def spread(values: list[float], form: str = ".3g") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def peak_memory(command: list[str], cwd: Path) -> float:
    """The largest memory of a command and its children together, in bytes, shared pages counted once. Needs Linux; slows the command."""
    peak = 0
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # one of them has just ended
                tree = [process.pid]
                for pid in tree:
                    tree += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in tree]
                peak = max(peak, sum(int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024 for lines in rollups))
            time.sleep(0.02)
    return peak


def benchmark_prepare(args: Arguments, cwd: Path) -> None:
    if args.text is not None:
        texts = [text for text in TextFile(Path(args.text), Format(EOT)) if text.strip()]
    else:
        texts = [text for text, _ in sample_corpus.stories(sample_corpus.load_grammar(), 1337, "train", 10_000)]
    write_corpus(texts, args.megabytes, cwd / "corpus.txt")
    size = (cwd / "corpus.txt").stat().st_size
    bpe = {"input": "corpus.txt", "train_bytes": 10**7, "output": "bpe.json"}
    run([sys.executable, str(HERE / "tokenizer_train.py"), *flags(bpe)], cwd)
    tokenizers = {"gpt2": "gpt2", "bpe of 4,096": "bpe.json"}
    try:
        gpt2_tokenizer()
    except ValueError as error:
        notice(f"without gpt2: {error}")
        del tokenizers["gpt2"]
    peers = {"bare tiktoken loop": "bare_loop", "datasets.map, 2 processes": "map_way"}
    ours = {"prepare_data.py": ["--no_report"], "prepare_data.py with report": []}

    def prepare(corpus: str, tokenizer: str, more: list[str]) -> list[str]:
        return [
            sys.executable,
            str(HERE / "prepare_data.py"),
            *flags({"input": corpus, "tokenizer": tokenizer, "output": "prepared"}),
            *more,
        ]

    results: dict[str, dict[str, list[float]]] = {name: {way: [] for way in [*peers, *ours]} for name in tokenizers}
    for i in range(args.rounds):
        for name, tokenizer in tokenizers.items():
            for way, function in peers.items():
                done = run([sys.executable, "-m", "benchmarks.prepare_peers", function, "corpus.txt", tokenizer], cwd)
                results[name][way].append(float(done.output.split()[-1]))
            for way, more in ours.items():
                started = time.perf_counter()
                run(prepare("corpus.txt", tokenizer, more), cwd)
                results[name][way].append(time.perf_counter() - started)
            notice(f"round {i + 1} of {args.rounds}, {name}: " + ", ".join(f"{way} {t[-1]:.2f} s" for way, t in results[name].items()))
    print(f"{size / 1e6:.0f} MB on {os.cpu_count()} cores; prepare_data.py is timed as a whole process")
    for name, ways in results.items():
        for way, seconds in ways.items():
            line = f"{name:13} {way:27} {spread([size / 1e6 / t for t in seconds])} MB/s"
            if way in ours:
                line += "".join(f"; {spread([a / b for a, b in zip(ways[peer], seconds)])} x {peer.split(',')[0]}" for peer in peers)
            print(line)
    corpora = {"corpus.txt": args.megabytes}
    if args.large_megabytes is not None:
        write_corpus(texts, args.large_megabytes, cwd / "large.txt")
        corpora["large.txt"] = args.large_megabytes
    for name, tokenizer in tokenizers.items():
        peaks = [f"{n} MB of text {peak_memory(prepare(corpus, tokenizer, []), cwd) / 1e6:.0f} MB" for corpus, n in corpora.items()]
        print(f"{name:13} peak memory of all processes: {', '.join(peaks)}")


def benchmark_train(args: Arguments, cwd: Path, device: str) -> None:
    shape = SHAPES["cuda" if device.startswith("cuda") else "cpu"]
    rng = np.random.RandomState(0)  # speed doesn't depend on what the tokens say
    (cwd / "bench").mkdir()
    for split, n in (("train", 500_000), ("val", 4_000)):
        rng.randint(0, VOCABULARY, n).astype("<u2").tofile(cwd / "bench" / f"{split}.bin")
    words = {EOT: 0} | {f"t{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token=EOT)).save(str(cwd / "tokenizer.json"))
    steps = {"max_steps": args.steps, "eval_interval": args.steps, "eval_tokens": 2000, "gradient_accumulation_steps": 1}
    base = shape | steps | {"arch": "gpt2", "tokenizer": "tokenizer.json", "device": device}
    ours = {name: base | values for name, values in OUR_WAYS.items()}
    peer = lay_out_nanogpt(Path(args.against[1]), cwd) if args.against else None
    if peer is not None:
        for split in ("train", "val"):
            shutil.copy(cwd / "bench" / f"{split}.bin", peer / "data" / "bench")
    rates: dict[str, list[float]] = {name: [] for name in [*ours, "nanoGPT"]}
    peaks: dict[str, list[float]] = {name: [] for name in rates}
    compiling: dict[str, float] = {}
    tokens = shape["batch_size"] * shape["block_size"]
    for i in range(args.rounds):
        for name, values in ours.items():
            peaks[name].append(our_training(cwd, "out", "bench", values).peak)
            seconds = [tokens / rate for rate in our_rates(cwd / "out")]
            rates[name].append(tokens / statistics.median(seconds[3:]))
            compiling.setdefault(name, seconds[0])
        if peer is not None:
            done = nanogpt_training(peer, shape | {"max_iters": args.steps, "eval_interval": 10**9}, device)
            peaks["nanoGPT"].append(done.peak)
            rates["nanoGPT"].append(tokens / statistics.median(nanogpt_seconds(done.output)[2:]))
        notice(f"round {i + 1} of {args.rounds}: " + ", ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items() if values))
    model, *_ = load_model(str(cwd / "out"))
    per_token, machine = model.flops_per_token(), matrix_rate(device)
    print(f"{model.num_parameters():,} parameters, {tokens:,} tokens a step; this machine's matrix products: {machine / 1e9:,.0f} GFLOP/s")
    for name, values in rates.items():
        if values:
            line = f"{name:16} {spread(values, ',.0f')} tokens/s, {statistics.median(values) * per_token / machine:.0%} of the matrix rate"
            line += f", peak {statistics.median(peaks[name]) / 1e9:.2f} GB"
            line += f", first step {compiling[name]:.0f} s" if name in compiling else ""
            if peer is not None and name != "nanoGPT":
                speed = [a / b for a, b in zip(values, rates["nanoGPT"])]
                memory = statistics.median(peaks[name]) / statistics.median(peaks["nanoGPT"])
                line += f"; {spread(speed)} x nanoGPT's speed, {memory:.0%} of its memory"
            print(line)


def benchmark_quality(args: Arguments, cwd: Path) -> None:
    text = Path(args.text).read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        (cwd / f"{name}.txt").write_text(part, encoding="utf-8")
    prepare = {"input": "train.txt", "val_input": "val.txt", "test_fraction": 0.001, "tokenizer": "char", "output": "chars"}
    run([sys.executable, str(HERE / "prepare_data.py"), *flags(prepare)], cwd)
    checkout, peer = Path(args.against[1]), lay_out_nanogpt(Path(args.against[1]), cwd)
    shutil.copy(checkout / "data" / "shakespeare_char" / "prepare.py", peer / "data" / "bench")
    (peer / "data" / "bench" / "input.txt").write_text(text, encoding="utf-8")
    shutil.copy(checkout / "config" / "train_shakespeare_char.py", peer / "shakespeare_char.py")
    run([sys.executable, str(peer / "data" / "bench" / "prepare.py")], peer)
    results: dict[str, list[tuple[float, float]]] = {"nanoGPT": [], "short": [], "long": []}  # seconds, nats per character
    parameters = {}
    iterations = NANOGPT_QUALITY["max_iters"]
    for seed in range(1, args.rounds + 1):
        done = nanogpt_training(peer, NANOGPT_QUALITY | {"eval_interval": iterations, "out_dir": "out"}, "cpu", "shakespeare_char.py")
        theirs = statistics.mean(nanogpt_seconds(done.output)) * iterations
        loss, parameters["nanoGPT"] = nanogpt_validation(peer)
        results["nanoGPT"].append((theirs, loss))
        values = OUR_QUALITY | {"seed": seed, "eval_interval": 10**9, "eval_tokens": 1000, "device": "cpu"}
        for name in ("short", "long"):
            if name == "long":  # a little less than fits into the peer's time at the speed of the short run
                seconds = results["short"][-1][0]
                length = {"batch_size": LONG_BATCH, "max_tokens": int(SHORT["max_tokens"] * theirs / seconds * 0.95)}
            else:
                length = SHORT
            our_training(cwd, name, "chars", values | length)
            evaluate = {"checkpoint": name, "data_dir": "chars", "split": "val", "device": "cpu", "output": "metrics.json"}
            run([sys.executable, str(HERE / "evaluate.py"), *flags(evaluate)], cwd)
            loss = json.loads((cwd / "metrics.json").read_text())["chars"]["val"]["loss"]
            results[name].append((our_seconds(cwd / name), loss))
        parameters["ours"] = load_model(str(cwd / "short"))[0].num_parameters()
        notice(f"round {seed} of {args.rounds}: " + ", ".join(f"{name} {r[-1][0]:.1f} s, {r[-1][1]:.3f}" for name, r in results.items()))
    print(f"{len(text):,} characters, the last tenth held out; parameters: ours {parameters['ours']:,}, nanoGPT {parameters['nanoGPT']:,}")
    for name, values in results.items():
        seconds, losses = zip(*values)
        ratios = [mine[0] / other[0] for mine, other in zip(values, results["nanoGPT"])]
        print(f"{name:8} {spread(seconds)} s, {spread(losses, '.3f')} nats per character; {spread(ratios, '.2f')} of nanoGPT's time")


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    if args.against is not None and not (Path(args.against[1]) / "train.py").is_file():
        raise FileNotFoundError(f"no train.py in {args.against[1]}; give the directory of nanoGPT's checkout")
    with tempfile.TemporaryDirectory() as directory:
        if args.stage == "train":
            benchmark_train(args, Path(directory), choose_device(args.device))
        elif args.stage == "prepare":
            benchmark_prepare(args, Path(directory))
        else:
            benchmark_quality(args, Path(directory))
    return 0


if __name__ == "__main__":
    run_script(main)
