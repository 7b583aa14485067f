"""Speculative decoding: something quick guesses several tokens, and the model reads them all at once.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", and Chen et al. 2023 accept a guess at random, so that
the result follows the model's distribution. Here a guess is accepted if it is the token that the model draws there, with the random numbers
that it would have used anyway; a draft model guesses with the same ones (Daliri, Musco and Suresh 2025, "Coupling without Communication").
So each token is drawn exactly as without a draft, and even the text is the same; the share of accepted guesses is a little lower.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from formats.run_directory import load_model
from generation.engines import Engine
from generation.reading import Reader, window_start
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer

LONGEST = 4  # tokens at a text's end that are looked up


class Draft(Protocol):
    """What guesses the next tokens of a row."""

    def guess(self, row: Row, count: int, writer: Writer) -> list[int]:
        """At most `count` tokens that the writer may draw next."""


class NgramDraft:
    """Guesses that what followed the text's last tokens earlier follows again (Saxena 2023, "Prompt Lookup Decoding")."""

    def guess(self, row: Row, count: int, writer: Writer) -> list[int]:
        ids = row.ids
        for n in range(min(LONGEST, len(ids) - 1), 0, -1):
            last = ids[-n:]
            for start in range(len(ids) - n - 1, -1, -1):  # the newest first
                if ids[start : start + n] == last:
                    return ids[start + n : start + n + count]
        return []


class ModelDraft:
    """A smaller model with the same tokenizer guesses what it would write itself."""

    def __init__(self, engine: Engine):
        self.reader = Reader(engine)

    def guess(self, row: Row, count: int, writer: Writer) -> list[int]:
        ahead = copy.copy(row)
        ahead.ids = row.ids.copy()
        for _ in range(count):
            ahead.ids += writer.choose(self.reader.read([ahead.ids])[:, -1], [ahead])
            if ahead.ids[-1] == writer.tokenizer.eot_id:
                break
        return ahead.ids[len(row.ids) :]


@dataclass
class SpeculativeWriter(Writer):
    """Writes one row after the other. count: tokens guessed at once."""

    draft: Draft = field(default_factory=NgramDraft)
    count: int = 4

    def write(self, rows: Sequence[Row]) -> Iterator[Row]:
        for row in rows:
            while row.finish is None:
                yield from self.write_some(row)

    def write_some(self, row: Row) -> Iterator[Row]:
        """Guess once, and draw tokens as far as the guess holds, and one more."""
        length = len(row.ids)
        room = window_start(length, self.reader.block_size) + self.reader.block_size - length
        guess = self.draft.guess(row, min(self.count, room, row.limit - row.number - 1), self)
        row.guessed += len(guess)
        logits = self.reader.read([row.ids + guess], len(guess) + 1)[0]
        for its, guessed in zip(logits, [*guess, None], strict=True):
            (token,) = self.choose(its[None], [row])
            row.accepted += token == guessed
            self.append(row, token, its)
            yield row
            if row.finish is not None or token != guessed:
                return


def with_draft(writer: Writer, name: str, count: int, device: str) -> SpeculativeWriter:
    """The same writer, whose tokens are guessed by what `--draft NAME` means. Raises FileNotFoundError, ValueError."""
    draft: Draft = NgramDraft()
    if name != "ngram":
        model, tokenizer, path, _ = load_model(name, device)
        if not writer.tokenizer.same_ids(tokenizer):
            raise ValueError(f"the draft {path} has another tokenizer than the model; give one trained on the same prepared data, or ngram")
        draft = ModelDraft(TorchEngine(model))
    return SpeculativeWriter(writer.engine, writer.tokenizer, writer.sampling, writer.top, draft, count)
