"""What all stages share at run time: errors, checked fields, the command line, signals, the device.

Imports torch, tyro and pydantic only inside the functions that need them, so that preparation starts fast.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import io
import os
import re
import signal
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else onnxruntime, once imported, writes an id of this machine into the user's cache

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


def is_full_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch (its own kind on a GPU, a plain RuntimeError on a CPU) had no memory left."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return full or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


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
    if is_full_memory(error):
        asked = f" ({describe(error)[:100]})" if str(error) else ""
        print(f"error: the memory is full{asked}; close other programs, or take smaller numbers, texts or models", file=sys.stderr)
        return 2
    config = str(Path(__file__).with_name("config.py"))  # which line of it raised the error, if one did?
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if (frame.filename, frame.name) == (config, "<module>")]
    if isinstance(error, SyntaxError) and error.filename == config:
        lines = [error.lineno]
    if isinstance(error, ImportError) and error.path == config:
        error = ValueError(f"config.py: {str(error).partition(' (')[0]}; take it over from the original file")
    if isinstance(error, UnicodeDecodeError):
        error = ValueError(f"there are bytes that are not UTF-8 ({describe(error)}); convert the text first")
    if lines or isinstance(error, ValueError | OSError):
        print("error: " + (f"config.py: line {lines[0]}: " if lines else "") + describe(error), file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: 0, 2 with one line for the user's mistake, 1 or 128 + signal as main decides."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed. What the terminal's encoding lacks must not end the program
            stream.reconfigure(errors="strict" if stream is sys.stdin else "backslashreplace")
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
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
    # What is imported stays, so looking for garbage in it wastes a tenth of a start. run_script ends this; worker processes never call it.
    if "__mp_main__" not in sys.modules:
        gc.disable()


def notice(message: str) -> None:
    """A line for people, on stderr: stdout is for results. Of several processes that torchrun started, the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    return next((f"{seconds / size:.1f} {unit}" for unit, size in units.items() if seconds >= 1.5 * size), f"{seconds:.0f} seconds")


# ---------------------------------------------------------------- checked fields

from annotated_types import Ge, Le, Lt, MinLen  # noqa: E402 - the hook above tells if it is missing

Text = Annotated[str, MinLen(0)]  # may be empty; a plain str, a name or path, may not
Count = Annotated[int, Ge(1), Lt(2**63)]
Natural = Annotated[int, Ge(0), Lt(2**63)]
Seed = Annotated[int, Ge(0), Lt(2**63)]
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
    declared.__pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, str_min_length=1)
    return TypeAdapter(declared)


# Problems that are the same for every field, by pydantic's names for them
OF_STRINGS = {"string_too_short": "{} is empty; an unset variable?", "string_unicode": "{}={!r} is not UTF-8; give it another name"}


class Checked:
    """Base of dataclasses that check themselves when they are made: each field against its declaration, e.g. Annotated[int, Ge(1)],
    then what `problems` says about fields together. Raises one ValueError that lists everything."""

    def __post_init__(self):
        from pydantic import ValidationError

        wanted: dict[str, list[str]] = {}
        problems, comparable = [], True
        try:
            _validator(type(self)).validate_python(vars(self))
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                name, kind, value = problem["loc"][0], problem["type"], problem["input"]
                comparable &= not kind.endswith("_type")
                if kind in OF_STRINGS:
                    problems.append(OF_STRINGS[kind].format(name, value))
                    continue
                if kind == "too_short":  # also said of values of which one is wrong
                    problems += [] if value else [f"{name} is empty; give it a value"]
                    continue
                phrase = problem["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
                wanted.setdefault(f"{name}={value!r}", []).append(phrase.replace("less than or equal to", "at most"))
        problems += [f"{what} must be {' or '.join(phrases)}" for what, phrases in wanted.items()]
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
        if "Missing value" in text:
            text = text.removesuffix(".") + "; write a value that begins with - as --name=VALUE"
        text = text.removesuffix(".")
        raise ValueError(f"{text}{'' if text.endswith('?') else '.'} See --help.") from None


def read_command_line(kind: type, argv: list[str] | None, doc: str | None, aliases: dict[str, str] | None = None):
    """The command line (sys.argv if None) as an instance of the dataclass `kind`, whose fields are the flags."""
    return parse_flags(kind, normalize_flags(kind, sys.argv[1:] if argv is None else list(argv), aliases or {}), doc)


def parse_weighted(text: str) -> tuple[str, Fraction | None]:
    """`PATH` or `PATH:0.7` as (path, weight). Read from the right, so that C:\\x stays a path, as does what exists. Raises ValueError."""
    path, _, weight = text.rpartition(":")
    try:
        number = weight if path and not Path(text).exists() else ""
        extreme = "/" not in number and not 1e-9 <= abs(float(number)) <= 1e9
        value = Fraction(0 if extreme else number)  # of 1e99999999 it would take minutes
    except (ValueError, ZeroDivisionError):
        return text, None
    if not 1e-9 <= value <= 1e9:
        raise ValueError(f"{text!r}: a weight must be above 0, from 1e-9 to 1e9; leave out what should not count")
    return path, value


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that is a pure function of its parts, so that each use of random numbers has a stream of its own."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1


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


def interruptible(call: Callable, *arguments):
    """What call(*arguments) returns or raises, from a thread: a library that stays away from Python for minutes would hold signals back."""
    outcome: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(call(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


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

SMALL = 8_000_000  # bytes of weights below which a second thread costs more than it helps


@functools.cache
def _all_threads() -> int:
    import torch

    return torch.get_num_threads()


def threads_for(size: int) -> int:
    """Threads that continue texts fastest with weights of so many bytes. OMP_NUM_THREADS has the last word."""
    count = _all_threads()  # first of all: later torch may have been told to take fewer
    return count if size >= SMALL or "OMP_NUM_THREADS" in os.environ else 1


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
