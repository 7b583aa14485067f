"""--prompt_file and --output: many prompts from a file, and their texts as JSON lines in another one, which can be continued."""

import dataclasses
import json
import os
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm
from typing_extensions import TypedDict

from formats.export_record import model_sha256
from formats.outputs import naming, output_file, write_atomically
from formats.schemas import Declared, Extensible, Sha256, check, read_file
from formats.scores import content_hash
from generation.session import Continuation, Session, Task
from generation.settings import Settings

_HINTS = typing.get_type_hints(Settings, include_extras=True)
PromptLine = TypedDict("PromptLine", {"prompt": str} | {name: typing.NotRequired[hint] for name, hint in _HINTS.items()})
PromptLine.__pydantic_config__ = Declared.__pydantic_config__
ADVICE = "correct that line"
DIGITS = 6  # of log-probabilities; float32 knows no more
BEGINNING = b'{"key": "'  # of a line of ours
OTHER = "belongs to another model, other prompts or settings; delete the file, or choose another --output"


class WrittenLine(Extensible):
    """What is read back of a line that was written."""

    key: Sha256


def read_prompt_file(path: Path, settings: Settings) -> list[tuple[str, Settings]]:
    """The prompts of a file with their settings: one a line, or JSON objects with "prompt" and settings of their own (.jsonl).

    Raises FileNotFoundError, and ValueError that names the first line that is wrong.
    """
    lines = read_file(path).removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{path} holds no prompts; write one on each line")
    prompts = []
    for number, line in enumerate(lines, 1):
        name = f"line {number} of {path}"
        try:
            text = line.removesuffix(b"\r").decode()
            if path.suffix != ".jsonl":
                prompts.append((text, settings))
                continue
            asked = check(line, PromptLine, name, ADVICE, "can't be used")
            prompt = asked.pop("prompt")
            prompts.append((prompt, dataclasses.replace(settings, **asked)))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} has bytes that are not UTF-8 ({error.reason}); {ADVICE}") from None
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(name) else f"{name} can't be used: {error}; {ADVICE}") from None
    return prompts


def describe(session: Session, text: Continuation) -> dict:
    """A text as a JSON object: see docs/generate.md."""
    row, tokenizer = text.row, session.writer.tokenizer

    def named(token: int, value: float) -> dict:
        return {"token": token, "text": tokenizer.tokenizer.decode([token], skip_special_tokens=False), "logprob": round(value, DIGITS)}

    line = {
        "prompt": text.task.prompt,
        "sample": text.number,
        "text": text.text,
        "finish": row.finish,
        "tokens": row.drawn,
        "logprobs": [round(value, DIGITS) for value in row.log_probabilities],
    }
    if session.writer.top:
        line["top_logprobs"] = [[named(*pair) for pair in pairs] for pairs in row.top]
    if text.score is not None:
        line["score"] = text.score
    if row.guessed:
        line["draft"] = {"guessed": row.guessed, "accepted": row.accepted}
    rate = row.number / text.seconds if text.seconds else None
    return line | {"seed": session.seed_of(text.task), "seconds": round(text.seconds, 6), "tokens_per_second": rate and round(rate, 1)}


class OutputFile:
    """The file that --output names: a line for each text, in the order of the prompts at the end.

    Each line begins with a key: a hash of the model, the prompt, the settings and the text's number. Equal keys mean the same text, so
    what is there already is kept. Raises ValueError for a file with other lines.
    """

    def __init__(self, name: str, session: Session, tasks: list[Task], sources: list[Path]):
        self.path = output_file(name, "list of texts", sources)
        constant = [model_sha256(session.path), session.special, session.writer.top]
        self.keys: dict[tuple[int, int], str] = {}  # number of prompt and text -> key
        for task in tasks:
            settings = dataclasses.asdict(task.settings) | {"seed": session.seed_of(task)}
            for number in range(task.settings.num_samples):
                self.keys[task.number, number] = content_hash(*constant, task.prompt, task.number, settings, number)
        self.lines = self.read()

    def read(self) -> dict[str, bytes]:
        """Key -> line of what was written before. Half a line at the end, which a killed process leaves, is cut off."""
        content = read_file(self.path) if self.path.exists() else b""
        whole, _, rest = content.rpartition(b"\n")
        known, lines = set(self.keys.values()), {}
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            key = line[len(BEGINNING) :][:64].decode(errors="replace") if line.startswith(BEGINNING) else None
            if key not in known:
                raise ValueError(f"{self.path} holds something else: line {number} {OTHER}")
            lines[key] = check(line, WrittenLine, f"line {number} of {self.path}", "delete that line; its text is written again") and line
        if not (rest.startswith(BEGINNING) or BEGINNING.startswith(rest)):
            raise ValueError(f"{self.path} holds something else: its end {OTHER}")
        if rest:
            os.truncate(self.path, len(content) - len(rest))
        return lines

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those whose texts aren't all there."""
        return [t for t in tasks if any(self.keys[t.number, i] not in self.lines for i in range(t.settings.num_samples))]

    def add(self, session: Session, texts: list[Continuation]) -> None:
        """Write the texts of a prompt. Raises OSError."""
        added = {}
        for number, text in enumerate(texts):
            key = self.keys[text.task.number, number]
            added[key] = json.dumps({"key": key} | describe(session, text), ensure_ascii=False, allow_nan=False).encode()
        with naming(self.path), open(self.path, "ab") as file:
            file.write(b"".join(line + b"\n" for key, line in added.items() if key not in self.lines))
        self.lines = added | self.lines

    def finish(self) -> None:
        """Put the lines into the order of the prompts. Raises OSError."""
        write_atomically(self.path, lambda file: file.write(b"".join(self.lines[key] + b"\n" for key in self.keys.values())))


def complete_all(session: Session, tasks: list[Task], output: OutputFile | None) -> Iterator[list[Continuation]]:
    """The texts of each prompt, with a progress bar: in the order of the prompts; those for an output are written there as they come."""
    todo, whole, shown = tasks if output is None else output.missing(tasks), {}, iter(tasks)
    task = next(shown)
    with tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc="writing", unit="prompt", disable=None, leave=False) as bar:
        for done, texts in session.complete(todo):
            bar.update()
            if output is not None:
                output.add(session, texts)
                yield texts
                continue
            whole[done.number] = texts
            while task is not None and task.number in whole:
                yield whole.pop(task.number)
                task = next(shown, None)
    if output is not None:
        output.finish()
