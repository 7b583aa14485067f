"""What continues a text, whatever computes it: each engine is one small file behind one protocol, tested by the same tests.

An engine keeps what it has read (keys and values), so that a further token costs one row of work.
"""

from typing import Protocol

from torch import Tensor

from config import GPTConfig


class Engine(Protocol):
    """A network with its memory of what it has read, B rows of tokens at once. All logits are float32 on the CPU."""

    config: GPTConfig  # block_size and vocab_size are what callers need

    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Forget everything and read ids (B, T) int64, T from 1 to block_size; the logits (B, V) behind the last token of each row.

        lengths: (B,) int64, tokens of each row where they aren't all T; what stands behind them is padding. Raises ValueError for more
        than block_size tokens.
        """

    def step(self, ids: Tensor) -> Tensor:
        """Read ids (B, T) int64 behind what was read, usually T = 1; the logits (B, T, V) behind each of them.

        Raises ValueError where a row would get longer than block_size.
        """

    def keep(self, length: int) -> None:
        """Forget what was read behind the first `length` tokens of every row.

        Raises ValueError where rows differ in length, or have fewer tokens.
        """

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (N,) int64: in another order, without some, or some of them several times."""
