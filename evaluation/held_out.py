"""Held-out text as one model reads it, and what that model scores on it, document by document."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from evaluation.measures import (
    Score,
    check_finite,
    document_ends,
    per_document,
    ratio_interval,
    score_tokens,
    summarize,
    text_bytes,
    why_no_bits_per_byte,
)
from formats.data_directory import DTYPE, DataDirectory
from formats.scores import ItemScores, content_hash
from formats.tokenizer import TextTokenizer
from generation.onnx_engine import OnnxNetwork
from models import GPT

METHOD = 1  # of scoring; a change makes stored scores old


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out documents in the ids of one tokenizer.

    tokens: (n,) uint16, an EOT behind each document. sizes: (documents,) int64, UTF-8 bytes of each document's text. n_bytes: of all
    of it, which the tokenizer may not be able to give back. items: hash of the texts, whatever the tokenizer is. entropy: bits that a
    perfect model needs for each document, where that is known.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    n_bytes: int
    items: str
    entropy: list[float] | None = None


def _held_out(tokens: np.ndarray, texts: list[str], entropy: list[float] | None = None) -> HeldOut:
    raw = [text.encode() for text in texts]
    sizes = np.array([*map(len, raw)])
    return HeldOut(tokens, sizes, int(sizes.sum()), content_hash(*(hashlib.sha256(text).hexdigest() for text in raw)), entropy)


def read_texts(tokenizer: TextTokenizer, tokens: np.ndarray) -> list[str]:
    """The documents of a row of tokens, as far as the tokenizer gives back what it read."""
    ends = document_ends(tokens, tokenizer.eot_id)
    return [tokenizer.decode(tokens[start:end].tolist()) for start, end in zip([0, *ends[:-1].tolist()], ends.tolist())]


def from_texts(tokenizer: TextTokenizer, texts: list[str]) -> HeldOut:
    """Texts encoded by a model's own tokenizer; their bytes are counted as they are given."""
    tokens, _ = tokenizer.encode_documents([tokenizer.normalize(text) for text in texts])
    return _held_out(tokens.astype(DTYPE), texts)


def from_directory(data: DataDirectory, split: str) -> HeldOut:
    """A split of a data directory, in the ids that stand there."""
    tokens = np.asarray(data.tokens(split))
    held_out = _held_out(tokens, read_texts(data.tokenizer, tokens), data.entropy(split))
    return held_out if data.meta is None else replace(held_out, n_bytes=data.meta["splits"][split]["bytes"])


@dataclass(frozen=True)
class Prefix:
    """The fixed beginning of a split on which training validates. tokens: (n,) uint16; n_bytes: their text, None if it can't be counted;
    entropy_bits: what a perfect model of the sample corpus needs for the same documents, None for other data."""

    tokens: np.ndarray
    n_bytes: int | None
    entropy_bits: float | None


def split_prefix(data: DataDirectory, split: str, limit: int) -> Prefix:
    """The whole split if it has at most `limit` tokens, else its beginning, up to the last document that ends before the limit.

    A first document longer than the limit is cut, between characters.
    """
    tokens = data.tokens(split)
    whole = len(tokens) <= limit
    if not whole:
        ends = np.flatnonzero(tokens[:limit] == data.tokenizer.eot_id)
        cut = int(ends[-1]) + 1 if len(ends) else limit
        while not len(ends) and cut > 1 and data.tokenizer.decode(tokens[:cut].tolist()).endswith("\ufffd"):
            cut -= 1
        tokens = tokens[:cut]
    tokens = np.asarray(tokens)
    n_bytes = None
    if why_no_bits_per_byte(data.tokenizer, tokens) is None:
        n_bytes = data.meta["splits"][split]["bytes"] if whole and data.meta else text_bytes(data.tokenizer, tokens)
    entropy = data.entropy(split)
    documents = int((tokens == data.tokenizer.eot_id).sum())
    whole_documents = len(tokens) > 0 and tokens[-1] == data.tokenizer.eot_id
    return Prefix(tokens, n_bytes, sum(entropy[:documents]) if entropy is not None and whole_documents else None)


def model_hash(model: GPT, tokenizer: TextTokenizer) -> str:
    """Hash of a network's shape and weights and of its tokenizer: equal ones score alike."""
    weights = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        weights.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return content_hash(asdict(model.config) | {"flash": True}, weights.digest(), tokenizer.sha256)


def compare_with_entropy(bits: np.ndarray, entropy: list[float], n_bytes: int) -> dict:
    """How far a model is above the entropy of the sample corpus, which a perfect one reaches, paired per story.

    bits: what the model needs for each story (documents,); entropy: bits of each under the grammar. Returns entropy_bits_per_byte, and
    above_entropy_bits_per_story with its standard error (None for a single story).
    """
    above = bits - np.array(entropy)
    error = float(above.std(ddof=1) / math.sqrt(len(above))) if len(above) > 1 else None
    return {
        "entropy_bits_per_byte": sum(entropy) / n_bytes,
        "above_entropy_bits_per_story": float(above.mean()),
        "above_entropy_standard_error": error,
    }


def measure(held_out: HeldOut, tokenizer: TextTokenizer, score: Score, ends: np.ndarray) -> tuple[dict, dict[str, np.ndarray]]:
    """All measures of a set of documents, as evaluation.json has them, and the scores of each document (documents,)."""
    nats, tokens = per_document(score.nats, ends), np.diff(ends, prepend=0)
    reason = why_no_bits_per_byte(tokenizer, held_out.tokens) or (None if held_out.n_bytes else "the documents are empty")
    result = summarize(score, None if reason else held_out.n_bytes)
    interval = {"loss_interval": ratio_interval(nats, tokens)}
    if reason is None:
        interval["bits_per_byte_interval"] = ratio_interval(nats / math.log(2), held_out.sizes)
    result |= {"top5_accuracy": float(score.top.mean()), "calibration_error": score.calibration_error}
    result |= {key: value if value is None else list(value) for key, value in interval.items()}
    result |= {"tokens": len(held_out.tokens), "bytes": held_out.n_bytes, "documents": len(ends)}
    if reason:
        result["bits_per_byte_reason"] = reason
    hits, top = (per_document(values.astype(np.int64), ends) for values in (score.hits, score.top))
    return result, {"nats": nats, "tokens": tokens, "bytes": held_out.sizes, "hits": hits, "top5": top}


class Scorer:
    """A model that scores held-out documents in float32, with what it has scored before.

    name: of the model, for errors. known: scores from earlier, which are given back where nothing has changed. stride, stream: as
    `score_tokens` takes them. Raises ValueError for a stride above block_size.
    """

    def __init__(
        self,
        model: GPT | OnnxNetwork,
        tokenizer: TextTokenizer,
        name: str,
        known: Iterable[ItemScores] = (),
        batch_size: int = 32,
        stride: int | None = None,
        stream: bool = False,
    ):
        if stride is not None and stride > model.config.block_size:
            raise ValueError(f"stride={stride} is above the model's block_size={model.config.block_size}; then tokens would be left out")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.batch_size, self.stride, self.stream = batch_size, stride, stream
        of_file = isinstance(model, OnnxNetwork)
        self.hash = content_hash(model.sha256, tokenizer.sha256) if of_file else model_hash(model, tokenizer)
        self.known = {scores.key: scores for scores in known}

    def score(self, held_out: HeldOut) -> ItemScores:
        """The scores of each document. summary also holds `positions` and `calibration`, as `Score` has them, for pictures.

        Raises ValueError for a model whose weights give no probabilities.
        """
        tokens, eot_id = held_out.tokens, self.tokenizer.eot_id
        method = [METHOD, self.stride, self.stream, held_out.n_bytes]
        key = content_hash(self.hash, held_out.items, hashlib.sha256(tokens.tobytes()).hexdigest(), method)
        scores = self.known.get(key)
        if scores is None:
            score = score_tokens(self.model, tokens, eot_id, self.batch_size, self.stride, bar="evaluating", stream=self.stream)
            check_finite(score, self.name)
            summary, columns = measure(held_out, self.tokenizer, score, document_ends(tokens, eot_id))
            summary |= {"positions": score.positions.tolist(), "calibration": score.calibration.tolist()}
            scores = ItemScores(key, held_out.items, "text", summary, columns, self.hash)
        if held_out.entropy is None or scores.summary["bits_per_byte"] is None:
            return scores
        above = compare_with_entropy(scores.columns["nats"] / math.log(2), held_out.entropy, held_out.n_bytes)
        return replace(scores, summary=scores.summary | above)
