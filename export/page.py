"""A page to talk to: the network, its tokenizer and its weights in one HTML file that needs nothing but a browser, not even a network.

Its parts stand in `page/` as the files that they are in a browser, and are put together here.
"""

import base64
import copy
import html
import json
import re
from dataclasses import asdict
from pathlib import Path

from utils import notice

import numpy as np
import torch
from torch import Tensor

from evaluation.measures import score_tokens
from export.quality import ALLOWED, held_out
from export.verify import Loaded, Mismatch, Source
from formats.outputs import write_text
from formats.tokenizer import TextTokenizer, bytes_of_token
from models import GPT

PARTS = Path(__file__).parent / "page"
WORKER = ("tokenizer.js", "network.js", "sampling.js", "worker.js")
TENSOR = '<script type="text/plain" class="weights" data-name="{}" data-dtype="{}" data-shape="{}">{}</script>'
STORED = re.compile(TENSOR.replace("{}", '([^<"]*)'))
# (model, decoders) of the tokenizers that tokenizer.js knows -> what it calls them
KINDS = {
    ("BPE", "ByteLevel"): "bpe",
    ("WordLevel", "ByteLevel"): "word",
    ("WordPiece", "Replace ByteLevel"): "wordpiece",
    ("WordLevel", "Fuse"): "char",
}


# ---------------------------------------------------------------- the tokenizer


def tokenizer_kind(tokenizer: TextTokenizer) -> str | None:
    """What the page calls this kind of tokenizer; None for one that it doesn't know."""
    said = tokenizer.description
    kind = KINDS.get((said.model["type"], " ".join(said.decoders)))
    by_character = [(splitter["type"], splitter.get("behavior"), splitter.get("pattern")) for splitter in said.splitters]
    known = {
        "bpe": said.byte_level and said.splits_as_gpt2 and not said.model.get("ignore_merges"),
        "word": said.splits_as_gpt2 and len(said.splitters) == 1,
        "wordpiece": said.splits_as_gpt2 and len(said.splitters) == 2 and said.model["continuing_subword_prefix"] == "##",
        "char": by_character in [[("Split", "Isolated", pattern)] for pattern in ({"Regex": r"[\s\S]"}, {"String": ""})],
    }
    affixes = any(said.model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")) and kind == "bpe"
    only_special = all(added["special"] for added in said.added_tokens)
    fits = known.get(kind) and not affixes and only_special and set(said.normalizers) <= {"NFC", "Lowercase"}
    return kind if fits else None


def why_not_html(source: Source) -> str | None:
    """Why a model can't become a page, None where it can."""
    if tokenizer_kind(source.tokenizer):
        return None
    return "the page knows the tokenizers that prepare_data.py makes (gpt2, bpe, byte, char, word, wordpiece), and this is none of them"


def tokenizer_tables(tokenizer: TextTokenizer) -> dict:
    """What tokenizer.js reads. A token is spelled with one character, of code 0 to 255, for each of its bytes."""
    said, kind = tokenizer.description, tokenizer_kind(tokenizer)
    vocab = said.model["vocab"]
    spellings: list[str | None] = [None] * tokenizer.vocab_size
    for token, i in vocab.items():
        if i not in said.special_ids:
            raw = token.encode() if kind == "char" else bytes_of_token(token)
            spellings[i] = raw.decode("latin-1")
    merges = [i for a, b in said.model.get("merges", ()) for i in (vocab[a], vocab[b], vocab[a + b])]
    return {
        "kind": kind,
        "tokens": spellings,
        "merges": merges,
        "normalizers": list(said.normalizers),
        "eot_id": tokenizer.eot_id,
        "unknown_id": tokenizer.unknown_id,
        "longest_word": said.model.get("max_input_chars_per_word"),
        "loss_reason": tokenizer.loss_reason,
    }


# ---------------------------------------------------------------- the weights


def round_weight(weight: Tensor, dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor as the page stores it: its dtype, its shape, its bytes (little-endian). Matrices take `dtype`, vectors stay float32.

    int8: a float32 scale for each row, then the rows in steps of it.
    """
    values = weight.float().numpy()
    if values.ndim == 1:
        return "float32", values.shape, values.astype("<f4").tobytes()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return dtype, values.shape, values.astype("<f2").tobytes()
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    steps = np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)
    return dtype, values.shape, scales.astype("<f4").tobytes() + np.rint(steps).astype(np.int8).tobytes()


def stored_values(dtype: str, shape: tuple[int, ...], raw: bytes) -> Tensor:
    """What the page computes with, float32: the inverse of `round_weight`, as network.js does it."""
    if dtype == "int8":
        scales = np.frombuffer(raw, "<f4", shape[0])
        return torch.from_numpy(np.frombuffer(raw, np.int8, offset=4 * shape[0]).reshape(shape) * scales[:, None])
    return torch.from_numpy(np.frombuffer(raw, {"float16": "<f2", "float32": "<f4"}[dtype]).reshape(shape).astype(np.float32))


def rounded(model: GPT, dtype: str) -> GPT:
    """The model with the weights that the page would compute with. Raises ValueError for weights that float16 can't hold."""
    weights = {name: stored_values(*round_weight(weight, dtype)) for name, weight in model.state_dict().items()}
    if name := next((name for name, weight in weights.items() if not weight.isfinite().all()), None):
        raise ValueError(f"{name} has weights beyond 65,504, the largest number of float16; pass --html_weights int8")
    copied = copy.deepcopy(model)
    copied.load_state_dict(weights)
    return copied


def choose_dtype(source: Source) -> str:
    """The smaller of int8 and float16 that costs less of bits per byte than 8 bits may, on held-out text; told in a line."""
    try:
        tokens = np.concatenate([split.tokens for split in held_out(source)])
    except (FileNotFoundError, ValueError) as error:
        notice(f"the weights become float16, since what int8 costs can't be measured: {error}")
        return "float16"

    def nats(model: GPT) -> float:
        return score_tokens(model, tokens, source.tokenizer.eot_id, bar="measuring").nats.sum()

    cost = nats(rounded(source.model, "int8")) / nats(source.model) - 1
    chosen = "int8" if cost < ALLOWED[8] else "float16"  # a NaN is not below
    notice(f"int8 weights cost {cost:+.2%} of bits per byte on {len(tokens):,} held-out tokens, so they become {chosen}")
    return chosen


# ---------------------------------------------------------------- the file


def for_script(content: object) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(content).replace("<", "\\u003c")


def describe_model(source: Source, dtype: str) -> str:
    """Size, shape and quality of the model in a line."""
    model, config = source.model, source.model.config
    size = sum(len(round_weight(weight, dtype)[2]) for weight in model.state_dict().values())
    facts = [
        f"{model.num_parameters() / 1e6:.1f} million parameters",
        f"{size / 1e6:.1f} MB of {dtype}",
        f"{config.arch}, {config.n_layer} layers of {config.n_embd}",
        f"{config.vocab_size:,} tokens",
        f"context {config.block_size:,}",
    ]
    measured = (source.content.get("val") or {}).get("bits_per_byte")
    facts += [] if measured is None else [f"{measured:.3f} bits per byte of validation text"]
    return " · ".join(fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts)


def page_text(source: Source, dtype: str) -> str:
    """The whole file."""
    path, config = source.path.resolve(), source.model.config
    derived = {name: getattr(config, name) for name in ("kv_heads", "head_dim", "mlp_width", "theta")}
    content = {
        "config": asdict(config) | derived,
        "tables": tokenizer_tables(source.tokenizer),
        "details": describe_model(source, dtype),
    }
    tensors = []
    for name, weight in source.model.state_dict().items():
        stored, shape, raw = round_weight(weight, dtype)
        tensors.append(TENSOR.format(name, stored, " ".join(map(str, shape)), base64.b64encode(raw).decode()))
    scripts = {name: (PARTS / name).read_text(encoding="utf-8") for name in (*WORKER, "page.js")}
    assert not any(re.search("</script|<!--", text) for text in scripts.values()), "this would end the script element"
    parts = {
        "title": html.escape((path.parent if path.is_file() else path).name),
        "style": (PARTS / "style.css").read_text(encoding="utf-8"),
        "model": for_script(content),
        "weights": "\n".join(tensors),
        "worker": "\n".join(scripts[name] for name in WORKER),
        "page": scripts["page.js"],
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (PARTS / "index.html").read_text(encoding="utf-8"))


def read_weights(page: str) -> dict[str, Tensor]:
    """Name -> what a page computes with, float32, from its text."""
    found = {}
    for name, dtype, shape, encoded in STORED.findall(page):
        found[name] = stored_values(dtype, tuple(map(int, shape.split())), base64.b64decode(encoded))
    return found


def write_html(source: Source, path: Path) -> Loaded:
    """One file for a browser. Raises Mismatch where other weights are read back from it."""
    weights = source.options.get("html_weights", "auto")
    dtype = choose_dtype(source) if weights == "auto" else weights
    meant = rounded(source.model, dtype)
    write_text(path, page_text(source, dtype))
    written = read_weights(path.read_text(encoding="utf-8"))
    expected = meant.state_dict()
    same = {name for name in written.keys() & expected.keys() if torch.equal(written[name], expected[name])}
    if wrong := sorted((written.keys() | expected.keys()) - same):
        raise Mismatch(f"its {wrong[0]} does not read back as it was written")
    reloaded = copy.deepcopy(meant)
    reloaded.load_state_dict(written)
    return Loaded(lambda ids: reloaded(ids)[0], reference=meant)
