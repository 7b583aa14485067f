"""The conversation with a model: a typed line is the beginning of a text, a line that starts with / a command."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from utils import notice, report

import torch
from pydantic import TypeAdapter, ValidationError

from formats.outputs import write_text
from generation.reading import Reader, window_start
from generation.session import Session
from generation.settings import Settings
from generation.streaming import encode_prompt
from generation.token_view import BOLD, DIM, PLAIN, probability_bars, surprise_view

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


def changed(settings: Settings, name: str, typed: str) -> Settings:
    """A copy in which one setting is what was typed, or, for nothing or `none`, what it is by default. Raises ValueError."""
    if typed.lower() in ("", "none"):
        value = getattr(Settings, name)
    elif name == "stop":
        value = (typed.replace("\\n", "\n"),)
    else:
        try:
            value = TypeAdapter(get_type_hints(Settings, include_extras=True)[name]).validate_strings(typed)
        except ValidationError:  # the dataclass says best what is wrong with it
            value = int(typed) if re.fullmatch(r"-?\d+", typed) else typed
    return dataclasses.replace(settings, **{name: value})


@dataclass
class Turn:
    """A text that the model continued: typed and its ids stood there before, text and all_ids afterwards."""

    typed: str
    ids: list[int]
    text: str
    all_ids: list[int]


class Conversation:
    """A session at the prompt. reopen: name of a checkpoint, settings -> a session with it. colours: whether stdout shows them."""

    def __init__(self, session: Session, reopen: Callable[[str, Settings], Session], colours: bool = False):
        self.session, self.reopen, self.colours = session, reopen, colours
        self.turns: list[Turn] = []

    def encode(self, text: str) -> list[int]:
        writer = self.session.writer
        return encode_prompt(writer.tokenizer, text, writer.engine.config.block_size, self.session.special)

    def shown(self, text: str, style: str) -> str:
        return f"{style}{text}{PLAIN}" if self.colours and text else text

    def write(self, typed: str, ids: list[int], settings: Settings | None = None) -> None:
        """Let the model go on with a text, and show it as it grows."""
        task = self.session.next_task(typed, ids, settings)
        for number, (text, pieces) in enumerate(self.session.stream(task), 1):
            if task.settings.num_samples > 1:
                print(f"--- {number} of {task.settings.num_samples}")
            print(self.shown(typed, BOLD), end="", flush=True)
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            finally:  # Ctrl-C keeps what was written
                print(flush=True)
                self.turns.append(Turn(typed, ids, typed + text.text, text.row.ids))
            if self.colours:
                size = self.session.writer.engine.config.block_size
                used = (len(text.row.ids) - window_start(len(text.row.ids), size)) / size
                rate = f"{text.row.number / text.seconds:,.0f} tokens/s, " if text.seconds else ""
                print(self.shown(f"{rate}{used:.0%} of the context used", DIM))
            self.session.count([text])

    def last(self) -> Turn:
        if not self.turns:
            raise ValueError("there is no text yet; type the beginning of one")
        return self.turns[-1]

    # ------------------------------------------------------------ commands

    def do_help(self, _: str) -> None:
        for name, words in COMMANDS.items():
            print(f"/{name:20}{words}")
        for name, value in vars(self.session.settings).items():
            if name not in COMMANDS:
                print(f"/{name:20}a setting, now {value!r}")
        print("A setting's name alone, or with none, sets it back. // begins a text with a slash.")

    def do_retry(self, _: str) -> None:
        turn = self.last()
        del self.turns[-1]
        self.write(turn.typed, turn.ids)

    def do_undo(self, _: str) -> None:
        self.last()
        del self.turns[-1]
        print(self.turns[-1].text if self.turns else "there is no text any more")

    def do_continue(self, words: str) -> None:
        turn = self.last()
        if turn.all_ids[-1] == self.session.writer.tokenizer.eot_id:
            raise ValueError("the model has ended this text; /retry writes another, /undo takes it back")
        settings = self.session.settings
        self.write(turn.text, turn.all_ids, changed(settings, "max_new_tokens", words) if words else settings)

    def do_probs(self, words: str) -> None:
        ids = self.encode(words) if words or not self.turns else self.turns[-1].all_ids
        writer = self.session.writer
        print(probability_bars(writer.tokenizer, Reader(writer.engine).read([ids])[0, -1]))

    def do_surprise(self, words: str) -> None:
        ids = torch.tensor([self.encode(words or self.last().text)])
        if ids.size(1) == 1:
            raise ValueError("there is nothing to read; write /surprise TEXT")
        engine = self.session.writer.engine
        first = engine.prefill(ids[:, :1])  # (1, V)
        rest = engine.step(ids[:, 1:-1])[0] if ids.size(1) > 2 else first[:0]
        print(surprise_view(self.session.writer.tokenizer, ids[0, 1:].tolist(), torch.cat((first, rest)), self.colours))

    def do_save(self, words: str) -> None:
        if not words or Path(words).exists():
            raise ValueError(f"{words} is there already; name another file" if words else "name a new file: /save FILE")
        write_text(Path(words), self.last().text + "\n")
        print(f"written to {words}")

    def do_model(self, words: str) -> None:
        if not words:
            raise ValueError("name a checkpoint: /model NAME")
        seed = self.session.seed
        self.session = self.reopen(words, dataclasses.replace(self.session.settings, seed=seed))
        for turn in self.turns:
            turn.ids, turn.all_ids = self.encode(turn.typed), self.encode(turn.text)

    def do_seed(self, words: str) -> None:
        self.session.seed = changed(self.session.settings, "seed", words).seed or 0
        self.session.prompts = 0

    # ------------------------------------------------------------ lines

    def handle(self, line: str) -> bool:
        """Do what a line says; False if that is to end. Raises ValueError and OSError for what can't be done."""
        name, _, words = line[1:].partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            text = line[1:] if line.startswith("//") else line
            self.write(text, self.encode(text))
        elif name == "quit":
            return False
        elif name in COMMANDS:
            getattr(self, f"do_{name}")(words.strip())
        elif name in vars(self.session.settings):
            self.session.settings = changed(self.session.settings, name, words.strip())
            print(f"{name} is {getattr(self.session.settings, name)!r}")
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
    keys.add("escape", "enter", eager=True)(lambda event: event.current_buffer.insert_text("\n"))  # else it would end the input
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
    if sys.stdin.isatty() and sys.stdout.isatty():
        notice(HOW)
        conversation.run(typed_lines([*dict.fromkeys((*COMMANDS, *vars(conversation.session.settings)))]))
    else:
        conversation.run(line.rstrip("\r\n") for line in sys.stdin)
