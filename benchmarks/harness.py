"""What every benchmark needs: processes that end with it, their time and memory, medians, and the speed this machine reaches at best.

Doesn't import torch before it is needed, so that a peer's process that starts from here stays small.
"""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A temporary directory that is removed however the block is left: SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt."""
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def child_process(command: list[str], cwd: Path, **options) -> Iterator[subprocess.Popen]:
    """A process in a group of its own. If the block is left by an exception, the process and all that it started are killed."""
    process = subprocess.Popen(command, cwd=cwd, start_new_session=True, **options)
    try:
        yield process
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


class Finished(NamedTuple):
    """A process that has ended. peak: its largest resident memory in bytes. seconds: from its start to its end."""

    output: str
    peak: float
    seconds: float


def run(command: list[str], cwd: Path) -> Finished:
    """Run a command to its end. Raises ValueError with the end of its output if it fails."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cwd / "inductor"), "PYTHONPATH": str(REPOSITORY)}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as file:
        with child_process(command, cwd, stdout=file, stderr=subprocess.STDOUT, env=environment) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        file.seek(0)
        output = file.read()
    if process.returncode:
        raise ValueError(f"{' '.join(command[:3])} ... ended with exit code {process.returncode}: {output[-400:]}")
    return Finished(output, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), seconds)


def peak_memory(command: list[str], cwd: Path) -> float:
    """The largest memory of a command and its children together, in bytes, shared pages counted once. Needs Linux; slows the command."""
    peak = 0
    with child_process(command, cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError, TypeError):  # one of them has just ended
                tree = [process.pid]
                for pid in tree:
                    tree += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in tree]
                peak = max(peak, 1024 * sum(int(re.search(r"^Pss: +(\d+)", rollup, re.MULTILINE)[1]) for rollup in rollups))
            time.sleep(0.02)
    return peak


def flags(values: dict) -> list[str]:
    """{"max_steps": 3} -> ["--max_steps=3"], as our scripts and nanoGPT's read them."""
    return [f"--{name}={value}" for name, value in values.items()]


def our_script(name: str, values: dict) -> list[str]:
    """The command that runs one of our scripts with these flags."""
    return [sys.executable, str(REPOSITORY / name), *flags(values)]


def word_tokenizer(size: int):
    """A TextTokenizer with so many ids, for data whose words don't matter; the EOT is 0."""
    from tokenizers import Tokenizer, models

    from formats.tokenizer import EOT, TextTokenizer

    tokenizer = Tokenizer(models.WordLevel({EOT: 0} | {f"t{i}": i for i in range(1, size)}, unk_token=EOT))
    tokenizer.add_special_tokens([EOT])
    return TextTokenizer(tokenizer.to_str())


def spread(values: list[float], form: str = ".3g") -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def print_matrix_rate(device: str) -> float:
    """Measure and print what this machine reaches at best, to set other speeds beside it: floating-point operations per second.

    The measure is a linear layer as in the `mini` MLP, in training precision; a median over half a second.
    """
    import torch
    from torch.utils.benchmark import Timer

    from training.machine import Machine

    machine = Machine.choose(device, "auto", False)
    x, weight = (torch.randn(rows, 384, device=device, dtype=machine.dtype) for rows in (2048, 1536))
    product = {"linear": torch.nn.functional.linear, "x": x, "weight": weight}
    timer = Timer("linear(x, weight)", globals=product, num_threads=torch.get_num_threads())
    rate = 2 * 2048 * 384 * 1536 / timer.blocked_autorange(min_run_time=0.5).median
    print(f"this machine's matrix products: {rate / 1e9:,.0f} GFLOP/s in {machine.dtype_name}")
    return rate
