"""Between texts and ids: a prompt as the model reads it, and a text that grows while its tokens are drawn."""

from collections.abc import Iterator
from typing import Literal

from utils import notice

from tokenizers.decoders import DecodeStream

from formats.tokenizer import TextTokenizer
from generation.writing import Row, Writer

Special = Literal["encode", "text", "reject"]


def encode_prompt(tokenizer: TextTokenizer, prompt: str, block_size: int, special: Special = "text") -> list[int]:
    """The beginning of a document as token ids: EOT, then the prompt. A prompt longer than block_size keeps its end.

    special: what special tokens written out in the prompt are: `encode` gives them their ids, for `text` they are ordinary text.
    Raises ValueError where `reject` finds one.
    """
    if special == "reject":
        names = (added["content"] for added in tokenizer.description.added_tokens if added["special"])
        if found := [name for name in names if name in prompt]:
            raise ValueError(f"the prompt holds the special token {found[0]}; take it out, or choose --special text or encode")
    ids = tokenizer.encode_marked(prompt) if special == "encode" else tokenizer.encode(prompt)
    if ids[:1] != [tokenizer.eot_id]:
        ids = [tokenizer.eot_id, *ids]
    if len(ids) > block_size:
        notice(f"the prompt has {len(ids) - 1} tokens, the model's context {block_size}: only its last {block_size} tokens are read")
    return ids[-block_size:]


class TextStream:
    """Ids -> text as soon as it is certain: whole characters, and nothing that a stop text may begin with.

    stopped: whether a stop text has appeared; nothing follows then.
    """

    def __init__(self, tokenizer: TextTokenizer, stops: tuple[str, ...] = ()):
        self.tokenizer, self.stops, self.stopped = tokenizer, stops, False
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.decoded, self.held = 0, ""  # characters that came out of the decoder; those of them that may begin a stop text

    def add(self, token: int) -> str:
        """The text that has become certain with a further token."""
        self.ids.append(token)
        piece = self.decoder.step(self.tokenizer.tokenizer, token) or ""
        self.decoded += len(piece)
        return self.hold(piece)

    def end(self) -> str:
        """What was held back. Bytes that never became a character are U+FFFD in it."""
        return "" if self.stopped else self.hold(self.tokenizer.decode(self.ids)[self.decoded :]) + self.rest()

    def hold(self, piece: str) -> str:
        """A piece of text goes in, what is certain of all so far comes out."""
        self.held += piece
        if found := [self.held.index(stop) for stop in self.stops if stop in self.held]:
            self.stopped = True
            return self.held[: min(found)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        certain, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return certain

    def rest(self) -> str:
        return "" if self.stopped else self.held


def stream_text(writer: Writer, row: Row, stops: tuple[str, ...] = ()) -> Iterator[str]:
    """Pieces of the text behind a row's prompt, while it is written; the row ends at a stop text too."""
    stream = TextStream(writer.tokenizer, stops)
    for _ in writer.write([row]):
        if row.finish != "eot":
            yield stream.add(row.ids[-1])
        if stream.stopped:
            row.finish = "stop"
    yield stream.end()
    if stream.stopped:
        row.finish = "stop"
