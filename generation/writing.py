"""The one loop that writes: rows of token ids grow by a token at a time until each has come to its end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from formats.tokenizer import TextTokenizer
from generation.engines import Engine
from generation.reading import Reader
from generation.sampling import Sampling, draw, process

Finish = Literal["eot", "stop", "length"]


@dataclass(eq=False)
class Row:
    """A text as ids while it is written.

    ids: the prompt, then what was drawn, with the EOT where one ended it. start: length of the prompt. limit: most tokens to draw.
    seed: of its random numbers. finish: why it ended, None while it goes on; whoever reads along may set it. log_probabilities: of each
    drawn token under the model's own distribution, before any setting changes it, in nats; top: the most probable ones there, as
    (id, log-probability). Both only if asked for. guessed, accepted: tokens that a draft guessed, and those of them that were drawn.
    """

    ids: list[int]
    limit: int
    seed: int = 0
    finish: Finish | None = None
    start: int = field(init=False)
    log_probabilities: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    guessed: int = 0
    accepted: int = 0

    def __post_init__(self):
        self.ids, self.start = list(self.ids), len(self.ids)

    @property
    def drawn(self) -> list[int]:
        return self.ids[self.start :]

    @property
    def number(self) -> int:
        """How many tokens were drawn."""
        return len(self.ids) - self.start


@dataclass
class Writer:
    """An engine that writes. top: how many of the most probable tokens to record at each, 0 for the drawn one only, None for nothing."""

    engine: Engine
    tokenizer: TextTokenizer
    sampling: Sampling
    top: int | None = None

    def __post_init__(self):
        self.reader = Reader(self.engine)

    def scores(self, logits: Tensor, rows: Sequence[Row], sampling: Sampling) -> Tensor:
        """What `process` makes of the next logits (B, V) of rows."""
        return process(logits[:, : self.tokenizer.vocab_size], [row.ids for row in rows], sampling, self.tokenizer.never_drawn)

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        """A token for each row, whose next logits are (B, V)."""
        scores = self.scores(logits, rows, self.sampling)
        if self.sampling.greedy:
            return scores.argmax(dim=-1).tolist()
        return draw(scores, [row.seed for row in rows], [row.number for row in rows]).tolist()

    def append(self, row: Row, token: int, logits: Tensor) -> None:
        """Add a token, chosen by logits (V,); the row may end with it."""
        row.ids.append(token)
        if token == self.tokenizer.eot_id:
            row.finish = "eot"
        elif row.number == row.limit:
            row.finish = "length"
        if self.top is not None:
            log_probabilities = logits.log_softmax(dim=-1)
            row.log_probabilities.append(log_probabilities[token].item())
            values, ids = log_probabilities.topk(min(self.top, len(logits)))
            row.top.append([*zip(ids.tolist(), values.tolist(), strict=True)])

    def write(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Draw a token for each row in turn, until all have finished; gives back the row that has just got one."""
        going = list(rows)
        while going:
            logits = self.reader.read([row.ids for row in going])[:, -1]
            for row, token, its in zip(going, self.choose(logits, going), logits, strict=True):
                self.append(row, token, its)
                yield row
            still = [i for i, row in enumerate(going) if row.finish is None]
            if 0 < len(still) < len(going):
                self.reader.select(still)
            going = [going[i] for i in still]
