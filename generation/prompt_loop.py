"""The conversation with a model: a typed line is the beginning of a text, a line that starts with / a command."""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from utils import Checked, Count, Seed, derived_seed, notice, report

import torch
from pydantic import TypeAdapter, ValidationError

from formats.outputs import write_text
from formats.tokenizer import TextTokenizer
from generation.engines import Engine
from generation.reading import Reader, window_start
from generation.sampling import Sampling
from generation.streaming import Special, encode_prompt, stream_text
from generation.token_view import BOLD, DIM, PLAIN, probability_bars, surprise_view
from generation.writing import Row, Writer

COMMANDS = {
    "help": "this list",
    "retry": "write the last text again, with other random numbers",
    "undo": "take the last text back",
    "continue": "go on where the last text stopped; /continue 100 writes at most so many tokens",
    "probs": "the most probable next tokens as bars; /probs TEXT for the beginning of another text",
    "surprise": "/surprise TEXT colours each token by how probable it was",
    "save": "/save FILE writes the text so far into a new file",
    "model": "/model NAME goes on with another checkpoint",
    "seed": "/seed 7 begins the random numbers anew",
    "quit": "the end, as Ctrl-D",
}
HOW = (
    "Type the beginning of a text and press Enter; an empty line begins one from nothing. "
    "Alt-Enter begins a new line, Ctrl-C stops a text, Ctrl-D ends; /help lists commands."
)


@dataclass(frozen=True)
class Settings(Checked):
    """What commands of the same names change."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    max_new_tokens: Count = 300
    stop: tuple[str, ...] = ()
    special: Special = "text"
    seed: Seed = 0

    def values(self) -> dict[str, object]:
        """Name -> value, the fields of sampling among the others."""
        return vars(self.sampling) | {name: value for name, value in vars(self).items() if name != "sampling"}

    def changed(self, name: str, typed: str) -> "Settings":
        """A copy in which one setting is what was typed, or what it is by default. Raises ValueError for what it can't be."""
        owner = self.sampling if name in vars(self.sampling) else self
        if typed.lower() in ("", "none"):
            value = getattr(type(owner), name)
        elif name == "stop":
            value = (typed.replace("\\n", "\n"),)
        else:
            try:
                value = TypeAdapter(get_type_hints(type(owner), include_extras=True)[name]).validate_strings(typed)
            except ValidationError:  # the dataclass says best what is wrong with it
                value = int(typed) if re.fullmatch(r"-?\d+", typed) else typed
        new = dataclasses.replace(owner, **{name: value})
        return new if owner is self else dataclasses.replace(self, sampling=new)


@dataclass
class Turn:
    """A text that the model continued. typed and ids: what was there before, as text and as ids; the others: afterwards."""

    typed: str
    ids: list[int]
    text: str = ""
    all_ids: list[int] = dataclasses.field(default_factory=list)


class Conversation:
    """load: name of a checkpoint -> what computes it and its tokenizer. colours: whether stdout is a terminal that shows them."""

    def __init__(self, load: Callable[[str], tuple[Engine, TextTokenizer]], checkpoint: str, settings: Settings, colours: bool = False):
        self.load, self.settings, self.colours = load, settings, colours
        self.engine, self.tokenizer = load(checkpoint)
        self.turns: list[Turn] = []
        self.number = 0  # of the texts since the seed was set: each has random numbers of its own

    # ------------------------------------------------------------ texts

    def encode(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text, self.engine.config.block_size, self.settings.special)

    def shown(self, text: str, style: str) -> str:
        return f"{style}{text}{PLAIN}" if self.colours and text else text

    def write(self, turn: Turn, limit: int) -> None:
        """Let the model go on with a text, and show it as it grows."""
        row = Row(turn.ids, limit, derived_seed(self.settings.seed, self.number, 0))
        writer = Writer(self.engine, self.tokenizer, self.settings.sampling)
        self.turns.append(turn)
        self.number += 1
        turn.text, turn.all_ids = turn.typed, row.ids
        print(self.shown(turn.typed, BOLD), end="", flush=True)
        started = time.perf_counter()
        try:
            for piece in stream_text(writer, row, self.settings.stop):
                turn.text += piece
                print(piece, end="", flush=True)
        finally:  # Ctrl-C keeps what was written
            print(flush=True)
            if self.colours:
                rate = row.number / (time.perf_counter() - started)
                used = (len(row.ids) - window_start(len(row.ids), self.engine.config.block_size)) / self.engine.config.block_size
                print(self.shown(f"{rate:,.0f} tokens/s, {used:.0%} of the context used", DIM))

    def last(self) -> Turn:
        if not self.turns:
            raise ValueError("there is no text yet; type the beginning of one")
        return self.turns[-1]

    # ------------------------------------------------------------ commands

    def do_help(self, _: str) -> None:
        for name, words in COMMANDS.items():
            print(f"/{name:20}{words}")
        for name, value in self.settings.values().items():
            if name not in COMMANDS:
                print(f"/{name:20}a setting, now {value!r}")
        print("A setting's name alone, or with none, sets it back. // begins a text with a slash.")

    def do_retry(self, _: str) -> None:
        turn = self.last()
        del self.turns[-1]
        self.write(Turn(turn.typed, turn.ids), self.settings.max_new_tokens)

    def do_undo(self, _: str) -> None:
        self.last()
        del self.turns[-1]
        print(self.turns[-1].text if self.turns else "there is no text any more")

    def do_continue(self, words: str) -> None:
        turn = self.last()
        limit = self.settings.changed("max_new_tokens", words).max_new_tokens if words else self.settings.max_new_tokens
        if turn.all_ids[-1] == self.tokenizer.eot_id:
            raise ValueError("the model has ended this text; /retry writes another, /undo takes it back")
        self.write(Turn(turn.text, turn.all_ids), limit)

    def do_probs(self, words: str) -> None:
        ids = self.encode(words) if words or not self.turns else self.turns[-1].all_ids
        print(probability_bars(self.tokenizer, Reader(self.engine).read([ids])[0, -1]))

    def do_surprise(self, words: str) -> None:
        ids = torch.tensor([self.encode(words or self.last().text)])
        first = self.engine.prefill(ids[:, :1])  # (1, V)
        if ids.size(1) == 1:
            raise ValueError("there is nothing to read; write /surprise TEXT")
        rest = self.engine.step(ids[:, 1:-1])[0] if ids.size(1) > 2 else first[:0]
        print(surprise_view(self.tokenizer, ids[0, 1:].tolist(), torch.cat((first, rest)), self.colours))

    def do_save(self, words: str) -> None:
        if not words or Path(words).exists():
            raise ValueError(f"{words} is there already; name another file" if words else "name a new file: /save FILE")
        write_text(Path(words), self.last().text + "\n")
        print(f"written to {words}")

    def do_model(self, words: str) -> None:
        if not words:
            raise ValueError("name a checkpoint: /model NAME")
        self.engine, self.tokenizer = self.load(words)
        for turn in self.turns:
            turn.ids, turn.all_ids = self.encode(turn.typed), self.encode(turn.text)

    def do_seed(self, words: str) -> None:
        self.settings, self.number = self.settings.changed("seed", words), 0

    # ------------------------------------------------------------ lines

    def handle(self, line: str) -> bool:
        """Do what a line says; False if that is to end. Raises ValueError and OSError for what can't be done."""
        name, _, words = line[1:].partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            text = line[1:] if line.startswith("//") else line
            self.write(Turn(text, self.encode(text)), self.settings.max_new_tokens)
        elif name == "quit":
            return False
        elif name in COMMANDS:
            getattr(self, f"do_{name}")(words.strip())
        elif name in self.settings.values():
            self.settings = self.settings.changed(name, words.strip())
            print(f"{name} is {self.settings.values()[name]!r}")
        else:
            raise ValueError(f"there is no command /{name}; /help lists them, and // begins a text with a slash")
        return True

    def run(self, lines: Iterator[str]) -> None:
        """Handle lines to their end. A mistake is told in a sentence, Ctrl-C ends a text; neither ends the conversation."""
        for line in lines:
            try:
                if not self.handle(line):
                    return
            except KeyboardInterrupt:
                pass
            except (ValueError, OSError) as error:
                report(error)


# ---------------------------------------------------------------- what is typed


def history_path() -> Path:
    """Where lines typed in earlier conversations are kept, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "small_language_models" / "prompts"


def typed_lines(names: list[str]) -> Iterator[str]:
    """What is typed at the terminal, with editing, history across conversations and several lines in one. names: of the commands."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    history = history_path()
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.open("a").close()
        kept = FileHistory(str(history))
    except OSError as error:
        notice(f"what you type isn't kept for the next time: {error}")
        kept = InMemoryHistory()
    commands = WordCompleter([f"/{name}" for name in names], sentence=True)
    session = PromptSession(history=kept, key_bindings=keys, multiline=True, completer=commands, complete_while_typing=False)
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:  # clears the line
            continue
        except EOFError:
            return


def talk(conversation: Conversation) -> None:
    """Hold a conversation at the terminal, or with lines from a pipe, until its end. Raises ValueError without standard input."""
    if sys.stdin is None:
        raise ValueError("there is no standard input to read prompts from; give --prompt TEXT")
    if sys.stdin.isatty():
        notice(HOW)
        conversation.run(typed_lines([*COMMANDS, *(name for name in conversation.settings.values() if name not in COMMANDS)]))
    else:
        conversation.run(line.rstrip("\r\n") for line in sys.stdin)
