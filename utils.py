"""What all stages share at run time: errors, checked fields, the command line, whole files, signals, and the machine.

Imports torch, tyro and pydantic only inside the functions that need them, so that preparation starts fast.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

# ---------------------------------------------------------------- errors and exit codes


ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on that disk, or write to another one")
ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change the permissions, or choose another place")
ADVICE |= dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY), "move it away, or choose another place")


def describe(error: BaseException) -> str:
    """One line for an error; the operating system's own get the reason, the file's name and what to do."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return error.strerror + where + (f"; {ADVICE[error.errno]}" if error.errno in ADVICE else "")
    return " ".join(str(error).split())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system, which often name no file or a temporary one, name this path."""
    try:
        yield
    except OSError as error:
        if error.strerror:
            error.filename, error.filename2 = str(path), None
        raise


def report(error: BaseException) -> int:
    """Say on stderr what ended the program: one sentence for the user's mistake, a traceback for a bug of ours. Returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130
    if isinstance(error, ModuleNotFoundError):
        print(f"error: the package {error.name!r} is not installed; run: pip install -r requirements.txt", file=sys.stderr)
        return 2
    if isinstance(error, BrokenPipeError):  # who reads our output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    config = str(Path(__file__).with_name("config.py"))  # which line of it raised the error, if one did?
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if (frame.filename, frame.name) == (config, "<module>")]
    if isinstance(error, SyntaxError) and error.filename == config:
        lines = [error.lineno]
    if lines or isinstance(error, ValueError | OSError):
        print("error: " + (f"config.py: line {lines[0]}: " if lines else "") + describe(error), file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: 0, 2 with one line for the user's mistake, 1 or 128 + signal as main decides."""
    try:
        with exiting_on_signals():
            code = main()
    except (Exception, KeyboardInterrupt) as error:
        code = report(error)
    sys.exit(code)


# Imports at the top of a script fail before its main can: a missing package, a mistake in config.py, Ctrl-C. Other programs that import
# from here, and interactive sessions, keep their own hook.
if sys.argv[0].endswith(".py") and Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    sys.excepthook = lambda kind, error, _: sys.exit(report(error))
    # A stream that the caller closed (`2>&-`) goes nowhere; else the next file opened would take its number, and get what C prints there.
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115


def notice(message: str) -> None:
    """A line for people, on stderr: stdout is for results. Of several processes that torchrun started, the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- checked fields

from annotated_types import Ge, Gt, Le, Lt  # noqa: E402 - the hook above tells if it is missing

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**63)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction01 = Annotated[float, Ge(0), Le(1)]
ProperFraction = Annotated[float, Ge(0), Lt(1)]


@functools.cache
def _validator(kind: type):
    """What checks a mapping of names to values against the fields that the dataclass `kind` declares; nested ones check themselves."""
    import typing_extensions
    from pydantic import ConfigDict, TypeAdapter

    hints = typing.get_type_hints(kind, include_extras=True)
    declared = typing_extensions.TypedDict(kind.__name__, {n: h for n, h in hints.items() if not dataclasses.is_dataclass(h)})
    declared.__pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(declared)


class Checked:
    """Base of dataclasses that check themselves when they are made: each field against its declaration, e.g. Annotated[int, Ge(1)],
    then what `problems` says about fields together. Raises one ValueError that lists everything."""

    def __post_init__(self):
        from pydantic import ValidationError

        wanted: dict[str, list[str]] = {}
        comparable = True
        try:
            _validator(type(self)).validate_python(vars(self))
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                comparable &= not problem["type"].endswith("_type")
                phrase = problem["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
                wanted.setdefault(f"{problem['loc'][0]}={problem['input']!r}", []).append(phrase)
        problems = [f"{what} must be {' or '.join(phrases)}" for what, phrases in wanted.items()]
        problems += self.problems() if comparable else []
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with fields together, each being of its type."""
        return []


def replace_fields(config, values: dict, may_change: set[str], owner: str, advice: str = ""):
    """A copy of a dataclass with those of the values that are its fields. Raises ValueError for a change that `owner` doesn't allow."""
    mine = {field.name: values[field.name] for field in dataclasses.fields(config) if field.name in values}
    for name, value in mine.items():
        fixed = getattr(config, name)
        if name not in may_change and value != fixed:
            raise ValueError(f"{owner} has {name}={fixed}, not {value}; leave --{name} out{advice}")
    return dataclasses.replace(config, **mine)


# ---------------------------------------------------------------- command line


def flag_types(kind: type) -> dict[str, object]:
    """Name -> type of every flag of a dataclass, nested dataclasses included."""
    flags = {}
    for name, hint in typing.get_type_hints(kind).items():
        flags |= flag_types(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return flags


def normalize_flags(kind: type, argv: list[str], aliases: dict[str, str]) -> list[str]:
    """Rewrite argv for tyro: names with underscores, aliases resolved, a value for each boolean. ValueError for a flag given twice.

    `--compile` -> `--compile=True`, `--no_compile` -> `--compile=False`, `--compile false` -> `--compile False`.
    """
    booleans = {name for name, hint in flag_types(kind).items() if hint is bool or bool in typing.get_args(hint)}
    words: list[str] = []
    given: set[str] = set()
    for word, following in zip(argv, [*argv[1:], ""]):
        match = re.fullmatch(r"--([A-Za-z][\w-]*)(=.*)?", word, re.DOTALL)
        if not match:
            of_boolean = words and words[-1].removeprefix("--") in booleans
            words.append(word.capitalize() if of_boolean and word.lower() in ("true", "false") else word)
            continue
        name, value = match[1].replace("-", "_"), match[2] or ""
        name = aliases.get(name, name)
        if name.removeprefix("no_") in booleans and name.startswith("no_") and not value:
            name, value = name.removeprefix("no_"), "=False"
        if name in booleans and not value and following.lower() not in ("true", "false", "auto", "none"):
            value = "=True"
        if name in booleans and value.lower() in ("=true", "=false"):
            value = "=" + value[1:].capitalize()
        if name in given:
            raise ValueError(f"--{name} is given twice; give it once, with all its values behind it")
        given.add(name)
        words.append(f"--{name}{value}")
    return words


def parse_flags(kind: type, words: list[str], doc: str | None, default=None):
    """A normalised command line as an instance of the dataclass `kind`. Raises ValueError with one sentence; --help exits with 0."""
    import tyro

    options = {} if default is None else {"default": default}
    options |= {"use_underscores": True, "config": (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)}
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=words, description=doc, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        boxed = captured.getvalue().partition("\n")[2]  # tyro draws a box with a title around its sentence
        text = " ".join(re.sub(r"[│╰╯]|─+|-{5,}", " ", boxed).split())
        text = re.split(r"Argument helptext:|For full helptext", re.sub(r"^Error parsing (?!--)\w+: ", "", text))[0].strip()
        raise ValueError(text.removesuffix(".") + ". See --help.") from None


def read_command_line(kind: type, argv: list[str] | None, doc: str | None, aliases: dict[str, str] | None = None):
    """The command line (sys.argv if None) as an instance of the dataclass `kind`, whose fields are the flags."""
    return parse_flags(kind, normalize_flags(kind, sys.argv[1:] if argv is None else list(argv), aliases or {}), doc)


def parse_weighted(text: str) -> tuple[str, Fraction | None]:
    """`PATH` or `PATH:0.7` as (path, weight). Read from the right, so that C:\\x stays a path, as does what exists. Raises ValueError."""
    path, _, weight = text.rpartition(":")
    try:
        value = Fraction(weight if path and not Path(text).exists() else "")
    except (ValueError, ZeroDivisionError):
        return text, None
    if value <= 0:
        raise ValueError(f"{text!r}: a weight must be above 0; leave it out instead")
    return path, value


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that is a pure function of its parts, so that each use of random numbers has a stream of its own."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1


# ---------------------------------------------------------------- files


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable, where the system can (Windows cannot open directories)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses. A killed process leaves it behind, see `temporary_paths`."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")


def temporary_paths(directory: Path, names: str) -> list[Path]:
    """What stands in a directory under a temporary name for a file whose name matches the regular expression `names`."""
    return [path for path in directory.iterdir() if re.fullmatch(rf"\.({names})\.[0-9a-f]{{16}}\.tmp", path.name)]


def write_atomically(path: Path, write: Callable[[typing.BinaryIO], object]) -> None:
    """Write a file under a temporary name, make it durable, rename it: a reader sees the old file or the whole new one.

    Raises OSError that names `path`; then the temporary file is gone and the old file untouched.
    """
    temporary = temporary_path(path)
    with naming(path):
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file for people and programs, atomically. Raises OSError."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- signals, and streams whose reader may go


def ending_signals() -> list[int]:
    """The signals that ask a process to end. A hang-up counts unless `nohup` has it ignored; Windows has none."""
    hangup = getattr(signal, "SIGHUP", None)
    heard = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGTERM, hangup] if heard else [signal.SIGTERM]


@contextlib.contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Context in which signals that end the process raise SystemExit, so that what was begun is cleared away."""
    previous = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopSignal:
    """Context in which the first SIGINT, SIGTERM or SIGHUP only sets `number`, so that work can be saved; a second one ends the process."""

    def __init__(self):
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, *ending_signals())}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def __bool__(self) -> bool:
        return self.number is not None


class LastingStream:
    """A text stream for work that must not end with its reader: once the terminal or `head` has gone, what is written goes nowhere."""

    def __init__(self, stream: typing.TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def _or_nowhere(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what the stream still holds goes there as well
            os.close(nowhere)

    def write(self, text: str) -> int:
        self._or_nowhere(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._or_nowhere(self.stream.flush)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Context in which nothing fails because nobody reads stdout or stderr any more."""
    with contextlib.redirect_stdout(LastingStream(sys.stdout)) as out, contextlib.redirect_stderr(LastingStream(sys.stderr)):
        try:
            yield
        finally:
            out.flush()


# ---------------------------------------------------------------- the machine


def choose_device(requested: str) -> str:
    """The device to compute on: auto takes CUDA, then MPS, then the CPU. Raises ValueError for a device that is not there."""
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = requested.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if not (index or "0").isdecimal() or int(index or "0") >= there.get(kind, 0):
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


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes, decided once, with reasons for people. dtype: torch's, of forward and backward passes."""

    device: str
    dtype: typing.Any
    dtype_reason: str
    compile: bool
    compile_reason: str

    @classmethod
    def choose(cls, device: str, dtype: str, compile: bool | str, run_flops: float) -> "Machine":
        """device: as choose_device gave it. run_flops: floating-point operations of the whole run. Raises ValueError."""
        return cls(device, *choose_precision(device, dtype), *choose_compile(device, compile, run_flops))

    @property
    def kind(self) -> str:
        """cpu, cuda or mps."""
        return self.device.partition(":")[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self):
        """The context of forward passes. Weights stay float32."""
        import torch

        return torch.autocast(self.kind, dtype=self.dtype, enabled=self.dtype != torch.float32)


class LostProcess(RuntimeError):
    """Another of the processes that train together has ended."""


@contextlib.contextmanager
def explained_failures(device: str, advice: str, processes: int = 1) -> Iterator[None]:
    """What torch raises for a full memory becomes a ValueError with advice, and for another process that is gone a LostProcess."""
    import torch

    try:
        yield
    except RuntimeError as error:
        text = describe(error)
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
            raise ValueError(f"the memory of {device} is full; {advice}") from None
        if processes > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text):
            lost = f"rank {os.environ.get('RANK')}: another process of this run has ended or can't be reached"
            raise LostProcess(f"{lost}; start it again with --resume auto ({text[:100]})") from None
        raise
