"""Checkpoint -> text: one prompt, a prompt a line from a pipe, a file of prompts, or a conversation at the prompt.

python generate.py --prompt "Once upon a time"
python generate.py --model_path best_model.pt --prompt "Once upon a time" --max_length 100
python generate.py --checkpoint checkpoints/stories --temperature 0.7 --top_p 0.95 --num_samples 3 --seed 1
python generate.py --prompt_file prompts.txt --output texts.jsonl
python generate.py --interactive
"""

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from utils import Checked, Count, Natural, Text, choose_device, notice, read_command_line, run_script

from generation.loading import EXPORT, Backend, choose_threads, load_engine
from generation.session import Continuation, Session, Task
from generation.settings import Settings
from generation.streaming import Special
from generation.writing import Writer


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of generate.py."""

    checkpoint: str = "./checkpoints"
    """A .pt or .onnx file, an HF folder, a run directory, also by its name below ./checkpoints. Default: the newest finished run there."""
    prompt: Text | None = None
    """Text to continue. Without it: a conversation on a terminal, or one prompt a line from a pipe."""
    prompt_file: str | None = None
    """A file with a prompt a line, or, if its name ends in .jsonl, a JSON object a line: "prompt" and settings for it."""
    output: str | None = None
    """With --prompt_file: write JSON lines there. The same command again continues a file that is not complete."""
    batch_size: Count = 16
    """With --prompt_file: texts that are written side by side."""
    settings: Settings = field(default_factory=Settings)
    special: Special = "text"
    """Special tokens such as <|endoftext|> written out in a prompt: their ids (encode), ordinary text, or an error (reject)."""
    draft: str | None = None
    """Something quick guesses tokens that the model then checks many at once; the texts stay the same. Another checkpoint with the same
    tokenizer, or `ngram`: what followed the last tokens earlier in the text."""
    draft_tokens: Count | None = None
    """Tokens that --draft guesses at once. Default: 2."""
    json: bool = False
    """Print each text as a JSON object on a line, with its tokens and their log-probabilities."""
    top_logprobs: Natural | None = None
    """With --json or --output: also the so many most probable tokens at each place."""
    interactive: bool = False
    """Ask for prompts, also after --prompt."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: Backend = "auto"
    """What computes: torch; onnx (onnxruntime, on the CPU: the checkpoint is exported once, into a cache directory); auto takes onnx where
    an export with a cache lies beside the checkpoint and was made from it."""

    def problems(self) -> list[str]:
        problems = []
        if self.prompt_file is not None and (self.prompt is not None or self.interactive):
            problems.append("prompt_file takes the place of prompt and interactive; leave those out")
        if self.json and self.interactive:
            problems.append("a conversation shows its texts as they are; leave json or interactive out")
        if self.output is not None and self.prompt_file is None:
            problems.append("output is for the texts of prompt_file; give one, or write `> FILE`")
        if self.draft_tokens is not None and self.draft is None:
            problems.append("draft_tokens are guessed by a draft; add --draft")
        if self.top_logprobs is not None and not self.json and self.output is None:
            problems.append("top_logprobs are part of the JSON lines; add --json")
        return problems


def piped_prompts() -> Iterator[str]:
    """A prompt on each line of standard input. Raises ValueError where there is none."""
    if sys.stdin is None:
        raise ValueError("there is no standard input to read prompts from; give --prompt TEXT")
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def make_onnx(checkpoint: Path, directory: Path) -> None:
    """Export a checkpoint for --backend onnx; what is in the directory is replaced. Raises ValueError, OSError."""
    import shutil

    from export_model import export

    notice(f"{checkpoint} is exported for onnxruntime, once, into {directory}")
    shutil.rmtree(directory, ignore_errors=True)  # there may be a damaged one
    with contextlib.redirect_stdout(sys.stderr):
        if not export(checkpoint, [EXPORT], directory, overwrite=True):
            raise ValueError(f"{checkpoint} can't be exported; take --backend torch")


def open_session(args: Arguments) -> Session:
    """The model and how it is to write. Raises FileNotFoundError, ValueError."""
    how = choose_device(args.device), args.backend, make_onnx
    engine, tokenizer, path = load_engine(args.checkpoint, *how)
    choose_threads(engine)
    top = (args.top_logprobs or 0) if args.json or args.output is not None else None
    writer = Writer(engine, tokenizer, args.settings, top)
    if args.draft is not None and args.settings.beams is not None:
        notice("beams need no draft: it has no effect")
    elif args.draft is not None:
        from generation.speculative import COUNT, ModelDraft, NgramDraft, SpeculativeWriter, check_draft

        draft = NgramDraft()
        if args.draft != "ngram":
            smaller, its_tokenizer, its_path = load_engine(args.draft, *how)
            check_draft(tokenizer, its_tokenizer, its_path)
            draft = ModelDraft(smaller)
        writer = SpeculativeWriter(engine, tokenizer, args.settings, top, draft, args.draft_tokens or COUNT)
    seed = args.settings.seed
    if seed is None:
        seed = 0 if args.output is not None else secrets.randbelow(2**31)
        if not args.settings.greedy and args.settings.beams is None:
            notice(f"seed {seed}")
    for sentence in args.settings.unused():
        notice(sentence)
    return Session(writer, path, replace(args.settings, seed=None), seed, args.special, args.batch_size)


def print_texts(session: Session, texts: list[Continuation], as_json: bool) -> None:
    """The texts behind a prompt, which are whole."""
    if as_json:
        import json

        from generation.prompt_file import describe

        print("\n".join(json.dumps(describe(session, text), ensure_ascii=False) for text in texts), flush=True)
        return
    for number, text in enumerate(texts, 1):
        print(*[f"--- {number} of {len(texts)}\n"] * (len(texts) > 1), text.task.prompt, text.text, sep="", flush=True)


def print_stream(session: Session, task: Task) -> None:
    """The texts behind a prompt, as they grow."""
    for number, (text, pieces) in enumerate(session.stream(task)):
        if task.settings.num_samples > 1:
            print(f"--- {number + 1} of {task.settings.num_samples}")
        print(task.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
        session.count([text])


def write_file(session: Session, args: Arguments) -> None:
    """The texts of a file of prompts, into --output or to stdout. Raises ValueError, FileNotFoundError, OSError."""
    from generation.prompt_file import OutputFile, complete_all, read_prompt_file

    path = Path(args.prompt_file)
    tasks = [session.task(*prompt) for prompt in read_prompt_file(path, session.settings)]
    output = None if args.output is None else OutputFile(args.output, session, tasks, [path, session.path])
    for texts in complete_all(session, tasks, output):
        if output is None:
            print_texts(session, texts, args.json)
        session.count(texts)
    if output is not None:
        notice(f"{len(output.lines)} texts are in {output.path}")


def answer_prompts(session: Session, args: Arguments) -> None:
    """The texts behind --prompt, or behind each prompt that comes through a pipe; a conversation where one is wanted."""
    interactive = args.interactive or (args.prompt is None and not args.json and sys.stdin is not None and sys.stdin.isatty())
    for prompt in [args.prompt] if args.prompt is not None else () if interactive else piped_prompts():
        task = session.task(prompt)
        if args.json:
            texts = next(session.complete([task]))[1]
            print_texts(session, texts, as_json=True)
            session.count(texts)
        else:
            print_stream(session, task)
    if interactive:
        from generation.prompt_loop import Conversation, talk

        def reopen(name: str, settings: Settings) -> Session:
            return open_session(replace(args, checkpoint=name, settings=settings))

        talk(Conversation(session, reopen, sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, {"model_path": "checkpoint", "max_length": "max_new_tokens"})
    session = open_session(args)
    if args.prompt_file is not None:
        write_file(session, args)
    else:
        answer_prompts(session, args)
    if session.guessed:
        told = (
            f"{session.accepted} of {session.guessed} tokens that the draft guessed were right ({session.accepted / session.guessed:.0%})"
        )
        notice(f"\033[2m{told}\033[0m" if sys.stderr.isatty() else told)
    return 0


if __name__ == "__main__":
    run_script(main)
