"""Tokens with their probabilities, as text for a terminal."""

import math
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from torch import Tensor

from formats.tokenizer import TextTokenizer

DIM, BOLD, PLAIN = "\033[2m", "\033[1m", "\033[0m"
# probabilities from here on -> the background of a token, one of xterm's 256 colours, under black; what is likely has none
SURPRISE = {0.5: None, 0.1: 229, 0.01: 222, 0.001: 215, 0.0: 203}
BAR = 30  # characters of the bar of a certain token


def probability_bars(tokenizer: TextTokenizer, logits: Tensor, count: int = 10) -> str:
    """The most probable next tokens by logits (V,), a line each: probability, token, bar."""
    probabilities, ids = logits.softmax(dim=-1).topk(min(count, len(logits)))
    lines = []
    for probability, token in zip(probabilities.tolist(), ids.tolist(), strict=True):
        text = tokenizer.decode([token])
        name = repr(text) if text else tokenizer.tokenizer.id_to_token(token)  # special tokens have a name only
        lines.append(f"{probability:6.1%}  {name:16} {'█' * round(probability * BAR) or '▏'}")
    return "\n".join(lines)


def on_background(text: str, probability: float) -> str:
    colour = next(colour for least, colour in SURPRISE.items() if probability >= least)
    if colour is None:
        return text
    start = f"\033[38;5;16;48;5;{colour}m"  # anew on each line, or a terminal would colour the line to its end
    return start + text.replace("\n", f"{PLAIN}\n{start}") + PLAIN


def surprise_view(tokenizer: TextTokenizer, ids: Sequence[int], logits: Tensor, colours: bool) -> str:
    """A text's ids with the probability of each given all before it, by logits (T, V); then bits in all and per byte.

    The probability is a background colour, or, without colours, stands behind its token. Tokens that only together are a character have
    the product of theirs.
    """
    nats = logits.log_softmax(dim=-1)[range(len(ids)), list(ids)].tolist()
    stream, shown, pending = DecodeStream(skip_special_tokens=True), "", 0.0
    for token, log_probability in zip(ids, nats, strict=True):
        pending += log_probability
        if piece := stream.step(tokenizer.tokenizer, token):
            probability, pending = math.exp(pending), 0.0
            shown += on_background(piece, probability) if colours else f"{piece}[{probability:.2g}]"
    legend = [f"under {above:g}" for above, colour in zip((None, *SURPRISE), SURPRISE.values()) if colour is not None]
    marks = " ".join(on_background(f" {words} ", least) for words, least in zip(legend, [*SURPRISE][1:])) if colours else ""
    bits, size = -sum(nats) / math.log(2), len(tokenizer.decode(ids).encode())
    total = f"{len(ids)} tokens, {bits:.1f} bits, {bits / max(1, size):.3f} bits/byte"
    return "\n".join([shown, f"{total}; probability {marks}" if marks else total])
