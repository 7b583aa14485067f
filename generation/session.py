"""A model that writes, and how it is asked to: prompts in, texts out, one by one while they grow or many at once."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from utils import derived_seed, notice

from formats.tokenizer import TextTokenizer
from generation.reading import window_start
from generation.sampling import Sampling
from generation.settings import Settings
from generation.streaming import Special, TextStream, encode_prompt
from generation.writing import Row, Writer


@dataclass(frozen=True)
class Task:
    """A prompt, as text and as the ids that are read, with its number and settings."""

    prompt: str
    ids: list[int]
    number: int
    settings: Settings

    @property
    def sampling(self) -> list:
        """What must be the same for texts that are written side by side."""
        return [getattr(self.settings, field.name) for field in fields(Sampling)]


class Continuation:
    """Text number `number` behind a prompt. text: as far as it is certain. seconds: from the prompt's reading to the newest token.

    score: what beams or best_of chose it by, else None.
    """

    def __init__(self, task: Task, number: int, row: Row, tokenizer: TextTokenizer, score: float | None = None):
        self.task, self.number, self.row, self.score = task, number, row, score
        self.stream, self.text = TextStream(tokenizer, task.settings.stop), ""
        self.begun, self.seconds = time.perf_counter(), 0.0

    def grow(self) -> str:
        """The text that has become certain with the row's newest token."""
        self.seconds = time.perf_counter() - self.begun
        return self.add(self.stream.add(self.row.ids[-1]) if self.row.finish != "eot" else "")

    def add(self, piece: str) -> str:
        if self.row.finish is not None and not self.stream.stopped:
            piece += self.stream.end()
        if self.stream.stopped:
            self.row.finish = "stop"
        self.text += piece
        return piece


@dataclass
class Session:
    """Everything that decides what is written. settings: for prompts that have none of their own. prompts: how many there were."""

    writer: Writer
    path: Path
    settings: Settings
    seed: int
    special: Special = "text"
    batch_size: int = 16
    prompts: int = 0
    told: bool = False  # that a text outgrew the context
    guessed: int = 0  # tokens by a draft
    accepted: int = 0

    def task(self, prompt: str, settings: Settings | None = None) -> Task:
        """The next prompt. Raises ValueError for one that holds what it may not."""
        block_size = self.writer.engine.config.block_size
        return self.next_task(prompt, encode_prompt(self.writer.tokenizer, prompt, block_size, self.special), settings)

    def next_task(self, prompt: str, ids: list[int], settings: Settings | None = None) -> Task:
        """As `task`, for a prompt whose ids are known."""
        task = Task(prompt, ids, self.prompts, settings or self.settings)
        self.prompts += 1
        if task.settings.best_of is not None and self.writer.top is None:
            self.writer.top = 0
        return task

    def seed_of(self, task: Task) -> int:
        return self.seed if task.settings.seed is None else task.settings.seed

    def begin(self, task: Task, number: int) -> Continuation:
        """Text number `number` behind a prompt, with nothing written yet."""
        row = Row(task.ids, task.settings.max_new_tokens, derived_seed(self.seed_of(task), task.number, number))
        return Continuation(task, number, row, self.writer.tokenizer)

    def write(self, texts: list[Continuation]) -> Iterator[tuple[Continuation, str]]:
        """Write texts with the same sampling side by side; gives back each one that grew, and the piece that became certain."""
        self.writer.sampling = texts[0].task.settings
        of_row = {id(text.row): text for text in texts}
        for text in texts:
            text.begun = time.perf_counter()
        for row in self.writer.write([text.row for text in texts]):
            text = of_row[id(row)]
            yield text, text.grow()

    def count(self, texts: list[Continuation]) -> None:
        """Add texts that are whole to what was written so far, and say once that texts outgrow the model's context, if they do."""
        self.guessed += sum(text.row.guessed for text in texts)
        self.accepted += sum(text.row.accepted for text in texts)
        size = self.writer.engine.config.block_size
        if not self.told and any(window_start(len(text.row.ids) - 1, size) for text in texts):
            self.told = True
            notice(f"a text grew beyond the model's context of {size} tokens: whenever that is full, its newer half is read again")

    def stream(self, task: Task) -> Iterator[tuple[Continuation, Iterator[str]]]:
        """The texts behind a prompt one after the other, each with the pieces that it is made of, which come while it is written."""
        if task.settings.beams is None and task.settings.best_of is None:
            for number in range(task.settings.num_samples):
                text = self.begin(task, number)
                yield text, (piece for _, piece in self.write([text]))
        else:
            for text in next(self.complete([task]))[1]:
                yield text, iter([text.text])

    def search(self, task: Task) -> list[Continuation]:
        """The texts that beam search finds, the best first."""
        from generation.beams import beam_search

        def stopped(row: Row) -> bool:
            written = self.writer.tokenizer.decode(row.drawn) if task.settings.stop else ""
            return any(stop in written for stop in task.settings.stop)

        self.writer.sampling, begun = task.settings, time.perf_counter()
        prompt, settings = self.begin(task, 0).row, task.settings
        found = beam_search(self.writer, prompt, settings.beams, settings.length_penalty, stopped)
        found = enumerate(found[: settings.num_samples])
        texts = [Continuation(task, number, row, self.writer.tokenizer, score) for number, (score, row) in found]
        for text in texts:
            text.add("".join(map(text.stream.add, [i for i in text.row.drawn if i != self.writer.tokenizer.eot_id])))
            text.seconds = time.perf_counter() - begun
        return texts

    def best(self, texts: list[Continuation]) -> list[Continuation]:
        """Of the texts behind one prompt those that are kept: all, or the ones with the highest mean log-probability, the best first."""
        if texts[0].task.settings.best_of is None:
            return texts
        for text in texts:
            text.score = sum(text.row.log_probabilities) / text.row.number
        return sorted(texts, key=lambda text: text.score, reverse=True)[: texts[0].task.settings.num_samples]

    def complete(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[Continuation]]]:
        """All texts behind prompts, in batches of about the same length; each prompt's as soon as they are whole, in any order."""
        waiting: dict[int, list[Continuation]] = {}
        for task in tasks:
            if task.settings.beams is not None:
                yield task, self.search(task)
            else:
                count = task.settings.best_of or task.settings.num_samples
                waiting[task.number] = [self.begin(task, number) for number in range(count)]
        texts = [text for group in waiting.values() for text in group]
        texts.sort(key=lambda text: (str(text.task.sampling), -len(text.task.ids)))
        while texts:
            batch = [text for text in texts[: self.batch_size] if text.task.sampling == texts[0].task.sampling]
            texts = texts[len(batch) :]
            for _ in self.write(batch):
                pass
            for number in dict.fromkeys(text.task.number for text in batch):
                if all(text.row.finish is not None for text in waiting[number]):
                    group = waiting.pop(number)
                    yield group[0].task, self.best(group)
