"""What all stages share at run time: the command line, errors, files that are never half-written, signals, device and precision.

This module imports torch only inside the functions that need it, so that preparation starts fast.
"""

import contextlib
import dataclasses
import io
import os
import re
import shutil
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

# ---------------------------------------------------------------- errors and exit codes


@contextlib.contextmanager
def needs_packages() -> Iterator[None]:
    """Imports inside: a missing package, or a mistake in config.py, becomes one sentence and exit code 2."""
    try:
        yield
    except (ValueError, TypeError) as error:
        print(f"error: config.py: {describe(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name!r} is not installed; run: pip install -r requirements.txt", file=sys.stderr)
        raise SystemExit(2) from None


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: 0, 2 with one line for the user's mistake, 1 or 128 + signal as main decides."""
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name!r} is not installed; run: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who reads our output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def describe(error: Exception) -> str:
    """One line for an error; the operating system's own get the file's name and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())


def notice(message: str) -> None:
    """A line for people, on stderr: stdout is for results. Of several processes that torchrun started, the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- command line


def flag_names(kind: type) -> dict[str, object]:
    """Name -> type of every flag of a dataclass, nested dataclasses included."""
    hints, names = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            names |= flag_names(hints[field.name])
        else:
            names[field.name] = hints[field.name]
    return names


def normalize_flags(kind: type, argv: list[str], aliases: dict[str, str]) -> list[str]:
    """Rewrite argv into what tyro understands; ValueError for a flag given twice.

    `--flag=x` becomes `--flag x`, dashes inside names underscores, aliases their names; booleans get their value:
    `--compile` -> `--compile True`, `--no_compile` -> `--compile False`, `--compile=false` -> `--compile False`.
    """
    names = flag_names(kind)
    booleans = {name for name, hint in names.items() if hint is bool or bool in typing.get_args(hint)}
    words: list[str] = []
    for i, word in enumerate(argv):
        match = re.fullmatch(r"--([A-Za-z][\w-]*)(=.*)?", word, re.DOTALL)
        if not match:
            after_boolean = words and words[-1].startswith("--") and words[-1][2:] in booleans
            words.append(word.capitalize() if after_boolean and word.lower() in ("true", "false") else word)
            continue
        name, value = match[1].replace("-", "_"), match[2]
        name = aliases.get(name, name)
        if name.startswith("no_") and name[3:] in booleans and value is None:
            name, value = name[3:], "=False"
        if f"--{name}" in words:
            raise ValueError(f"--{name} is given twice; give it once, with all its values behind it")
        if name in booleans and value is None and (i + 1 == len(argv) or argv[i + 1].lower() not in ("true", "false", "auto", "none")):
            value = "=True"
        words.append(f"--{name}")
        if value is not None:
            words.append(value[1:].capitalize() if name in booleans and value[1:].lower() in ("true", "false") else value[1:])
    return words


def given_flags(words: list[str]) -> set[str]:
    """The names of the flags in a normalised command line."""
    return {word[2:] for word in words if re.fullmatch(r"--[A-Za-z]\w*", word)}


def parse_command_line(kind: type, words: list[str], doc: str | None, default=None):
    """A normalised command line as an instance of the dataclass `kind`. Raises ValueError with one sentence; --help exits with 0."""
    import tyro

    options = {"use_underscores": True, "config": (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)}
    if default is not None:
        options["default"] = default
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=words, description=doc, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = re.sub(r"╭─.*?╮|[│╰╯]|─+|-{5,}", " ", captured.getvalue())
        text = re.split(r"Argument helptext:|For full helptext", " ".join(text.split()))[0]
        raise ValueError(text.strip() + ("" if text.strip().endswith(".") else ".") + " See --help.") from None


def read_command_line(kind: type, argv: list[str] | None, doc: str | None, aliases: dict[str, str] | None = None):
    """The command line (sys.argv if None) as an instance of the dataclass `kind`, whose fields are the flags."""
    return parse_command_line(kind, normalize_flags(kind, sys.argv[1:] if argv is None else list(argv), aliases or {}), doc)


# ---------------------------------------------------------------- files


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable, where the system can (Windows cannot open directories)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, write: Callable[[typing.BinaryIO], object]) -> None:
    """Write a file under a temporary name beside it, make it durable, and rename it: a reader sees the old file or the whole new one.

    Raises OSError; then the temporary file is gone and the old file untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


# ---------------------------------------------------------------- signals


class StopSignal:
    """Context in which the first SIGINT or SIGTERM only sets `number`, so that work can be saved; a second one ends the process."""

    def __init__(self):
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def __bool__(self) -> bool:
        return self.number is not None


# ---------------------------------------------------------------- device and precision


def choose_device(requested: str) -> str:
    """The device to compute on: auto takes CUDA, then MPS, then the CPU. Raises ValueError for a device that is not there."""
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = requested.partition(":")
    there = {
        "cpu": index in ("", "0"),
        "cuda": torch.cuda.is_available() and (not index or (index.isdecimal() and int(index) < torch.cuda.device_count())),
        "mps": torch.backends.mps.is_available() and index in ("", "0"),
    }
    if not there.get(kind):
        raise ValueError(f"device={requested!r} is not available here; pass --device cpu, or auto to let the machine decide")
    if kind == "cuda" and index:
        torch.cuda.set_device(int(index))
    return requested


def choose_precision(device: str, requested: str):
    """The one place that decides the precision of forward and backward passes: (torch dtype, reason for people).

    Weights and optimizer state stay float32. Raises ValueError for a precision that the device can't train in.
    """
    import torch

    kind = device.partition(":")[0]
    if requested != "auto":
        if requested == "float16" and kind != "cuda":
            raise ValueError(f"dtype='float16' needs a CUDA GPU, not {device}; pass --dtype bfloat16 or float32")
        return getattr(torch, requested), "as asked"
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bfloat16"
        return torch.float16, "this GPU has no bfloat16; float16 with a loss scaler"
    if kind == "cpu":
        checks = (getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        if any(check() for check in checks):
            return torch.bfloat16, "this CPU has bfloat16 instructions"
        return torch.float32, "this CPU has no bfloat16 instructions"
    return torch.float32, f"the safe choice on {kind}"


COMPILE_PAYS_FLOPS = 2e14  # about half an hour of training on two CPU cores; compiling takes about a minute there


def choose_compile(device: str, requested: bool | str, run_flops: float) -> tuple[bool, str]:
    """Whether to use torch.compile, and why. Without a C++ compiler a CPU runs eagerly and says so."""
    kind = device.partition(":")[0]
    if kind == "cpu" and requested is not False and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))):
        return False, "no C++ compiler found"
    if requested != "auto":
        return bool(requested), "as asked"
    if kind == "cuda":
        from torch.utils._triton import has_triton

        return (True, "it pays on a GPU") if has_triton() else (False, "this GPU or machine has no Triton")
    if kind == "cpu" and run_flops >= COMPILE_PAYS_FLOPS:
        return True, "a run of this length wins the compilation's time back"
    return False, "it would not pay in this run"
