"""A text that grows while it is generated: prompt -> token ids -> whole characters, up to the text's end or a stop text."""

import itertools
from collections.abc import Iterable, Iterator

from utils import notice

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from formats.tokenizer import TextTokenizer
from models import GPT


def encode_prompt(tokenizer: TextTokenizer, prompt: str, block_size: int) -> Tensor:
    """The beginning of a document as token ids (1, T) int64: EOT, then the prompt. A prompt longer than block_size keeps its end."""
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    if len(ids) > block_size:
        notice(f"the prompt has {len(ids) - 1} tokens, the model's context {block_size}: only its last {block_size} tokens are read")
        ids = ids[-block_size:]
    return torch.tensor([ids])


def decode_stream(tokenizer: TextTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Token ids -> pieces of text, as soon as they are whole characters. Bytes that never become one end up as U+FFFD."""
    stream, kept, given = DecodeStream(skip_special_tokens=True), [], 0
    for i in ids:
        kept.append(i)
        piece = stream.step(tokenizer.tokenizer, i) or ""
        given += len(piece)
        yield piece
    yield tokenizer.decode(kept)[given:]


def until_stop(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """Pieces of text up to the first of `stops`. What may be the beginning of a stop text is held back until that is decided."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [held.index(stop) for stop in stops if stop in held]:
            yield held[: min(found)]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def continue_text(model: GPT, tokenizer: TextTokenizer, prompt: Tensor, stops: tuple[str, ...], **options) -> Iterator[str]:
    """Pieces of the text that follows a prompt (1, T), until its EOT, a stop text or max_new_tokens; options as in GPT.stream."""
    tokens = (token.item() for token in model.stream(prompt.to(model.device), **options))
    ids = itertools.takewhile(lambda token: token != tokenizer.eot_id, tokens)
    return until_stop(decode_stream(tokenizer, ids), stops)
