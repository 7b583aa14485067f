"""What an engine has read of each text, so that only what is new is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from generation.engines import Engine


def window_start(length: int, block_size: int) -> int:
    """The first of a text's tokens that are read behind its `length` tokens.

    When the context is full, its newer half is read again: with learned or rotary positions, keys and values of a cut-off past can't be
    kept as they are.
    """
    if length <= block_size:
        return 0
    stride = block_size + 1 - max(1, block_size // 2)
    return stride * ((length - block_size - 1) // stride + 1)


class Reader:
    """An engine, and the ids that it has read."""

    def __init__(self, engine: Engine):
        self.engine, self.block_size = engine, engine.config.block_size
        self.contexts: list[list[int]] = []  # of each text, what the engine remembers

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these texts: in another order, without some, or some of them several times."""
        self.engine.select(torch.tensor(rows))
        self.contexts = [self.contexts[row] for row in rows]

    def prefill(self, contexts: list[list[int]]) -> Tensor:
        """Logits (B, V) behind contexts, which begin anew. What several have in common is read once."""
        unique = [*dict.fromkeys(map(tuple, contexts))]
        longest = max(map(len, unique))
        ids = torch.tensor([[*context, *[0] * (longest - len(context))] for context in unique])
        logits = self.engine.prefill(ids, None if len(unique) == 1 else torch.tensor([*map(len, unique)]))
        if len(unique) < len(contexts):
            rows = torch.tensor([unique.index(tuple(context)) for context in contexts])
            self.engine.select(rows)
            logits = logits[rows]
        return logits

    def extend(self, known: list[int], context: list[int], count: int) -> Tensor | None:
        """As `read` for a single text, where `known` was read; None if more than half of it would be read again."""
        same = next((i for i, (a, b) in enumerate(zip(known, context)) if a != b), min(len(known), len(context)))
        kept = min(same, len(context) - count)
        if 2 * kept < len(context):
            return None
        if kept < len(known):
            self.engine.keep(kept)
        return self.engine.step(torch.tensor([context[kept:]]))[:, -count:]

    def read(self, texts: Sequence[list[int]], count: int = 1) -> Tensor:
        """Logits (B, count, V) behind the last `count` tokens of each text, float32 on the CPU. count is 1 where there are several texts.

        All of these tokens see the window of the last one. What the engine remembers of the texts of the last call, rearranged by
        `select`, is used as far as these begin alike.
        """
        contexts = [text[window_start(len(text), self.block_size) :] for text in texts]
        logits, known, self.contexts = None, self.contexts, []  # an interruption leaves nothing that is known
        if len(contexts) == len(known) == 1:
            logits = self.extend(known[0], contexts[0], count)
        elif known == [context[:-1] for context in contexts]:
            logits = self.engine.step(torch.tensor([context[-1:] for context in contexts]))
        if logits is None:
            logits = self.prefill([context[: len(context) - count + 1] for context in contexts])[:, None]
            if count > 1:
                rest = torch.tensor([context[len(context) - count + 1 :] for context in contexts])
                logits = torch.cat((logits, self.engine.step(rest)), dim=1)
        self.contexts = contexts
        return logits
