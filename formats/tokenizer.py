"""Tokenizers: always a Hugging Face tokenizer.json, so that `tokenizers` and `transformers` read it. Doesn't import torch."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tiktoken.load import read_file_cached
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.normalizers import Normalizer

from formats.fast_encoding import FastEncoding
from formats.schemas import MAX_VOCAB_SIZE, TokenizerFile, check

EOT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
PADDING = "<|pad|>"
ADVICE = "make one with tokenizer_train.py"
PROBE = 'Once, a "cat" sat - 3 times!\n\tÉé ßжب日한 ☃🙂\U0010fffd'  # characters of many kinds; nobody knows the last one
KINDS = ("gpt2", "bpe", "wordpiece", "word", "char", "byte")
PIECE = 2**20  # characters; longer texts are encoded in pieces, so that memory stays bounded
# where a text may be cut without changing its ids: none of our pre-tokenizers looks back across, or joins, a word and the space behind it
CUT = re.compile(r"(?<=\S)[ \n]")
# GPT-2's characters for bytes in byte-level vocabularies: printable bytes stand for themselves, characters from 256 on for the others
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_OF = dict(zip(ALPHABET, sorted(range(256), key=lambda byte: chr(byte) not in ALPHABET)))
# the files from which tiktoken makes its "gpt2", in its own cache
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


# ---------------------------------------------------------------- what a file says


def bytes_of_token(token: str) -> bytes | None:
    """What a token of a byte-level vocabulary stands for, None if that isn't what it is."""
    values = [*map(BYTE_OF.get, token)]
    return None if None in values else bytes(values)


def _parts(component: dict | None, key: str) -> list[dict]:
    """The parts of a component: none, itself, or those of a Sequence, which stand under `key`."""
    return [] if component is None else component[key] if component["type"] == "Sequence" else [component]


class Description:
    """The settings of a tokenizer as plain values.

    model: the model's own settings, with vocab and merges. normalizers: what is done to a text first, in order, e.g. ("Lowercase", "NFC").
    splitters: the pre-tokenizers; decoders: the types of the decoders, e.g. ["ByteLevel"]. added_tokens: as the file lists them.
    """

    def __init__(self, tokenizer: Tokenizer):
        values = json.loads(tokenizer.to_str())  # spells out what older files take for granted
        self.model: dict = values["model"]
        self.normalizer: dict | None = values["normalizer"]
        self.normalizers = tuple(part["type"] for part in _parts(self.normalizer, "normalizers"))
        self.splitters = _parts(values["pre_tokenizer"], "pretokenizers")
        self.decoders = [part["type"] for part in _parts(values["decoder"], "decoders")]
        self.added_tokens: list[dict] = values["added_tokens"]
        self.special_ids = {added["id"] for added in self.added_tokens if added["special"]}

    def method(self) -> tuple:
        """What decides, beside the vocabulary, which ids a text gets."""
        names = ("type", "merges", "unk_token", "unk_id", "continuing_subword_prefix", "end_of_word_suffix", "max_input_chars_per_word")
        names += ("byte_fallback", "fuse_unk", "ignore_merges", *(("vocab",) if self.model["type"] == "Unigram" else ()))  # has scores
        model = [self.model.get(name) or None for name in names]  # Hugging Face's files write "" for what is unset in others
        splitters = [{name: value for name, value in splitter.items() if name != "trim_offsets"} for splitter in self.splitters]
        return model, splitters, self.normalizer

    @functools.cached_property
    def splits_as_gpt2(self) -> bool:
        """Whether GPT-2's pre-tokenizer comes last; what stands before it may only split at characters."""
        *first, last = self.splitters or [{}]
        gpt2 = last.get("type") == "ByteLevel" and last.get("use_regex", True) and not last.get("add_prefix_space")
        return gpt2 and all(splitter["type"] == "Split" and splitter["pattern"] == {"String": "#"} for splitter in first)

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether this is a byte-level BPE, which knows and gives back every (normalized) text."""
        return (
            self.model["type"] == "BPE"
            and set(self.normalizers) <= {"NFC", "Lowercase"}
            and [splitter["type"] for splitter in self.splitters] == ["ByteLevel"]
            and not self.splitters[0].get("add_prefix_space")
            and not (self.model.get("unk_token") or self.model.get("byte_fallback") or self.model.get("dropout"))
            and self.decoders == ["ByteLevel"]
            and BYTE_OF.keys() <= self.model["vocab"].keys()
        )

    @functools.cached_property
    def ids_are_bytes(self) -> bool:
        """Whether the ids are the text's UTF-8 bytes (kind `byte`)."""
        return self.byte_level and not self.model["merges"] and BYTE_OF.items() <= self.model["vocab"].items()

    @functools.cached_property
    def loss_reason(self) -> str | None:
        """None if text without unknown tokens survives encoding and decoding, else why not."""
        if set(self.normalizers) - {"NFC"}:  # NFC only writes the same characters in one way
            return "the tokenizer changes text before it encodes it"
        model, decoders = self.model["type"], self.decoders
        by_character = model == "WordLevel" and decoders == ["Fuse"]
        by_word = model == "WordLevel" and decoders == ["ByteLevel"] and self.splits_as_gpt2
        by_part = model == "WordPiece" and decoders == ["Replace", "ByteLevel"] and self.splits_as_gpt2 and len(self.splitters) == 2
        lossless = self.byte_level or by_character or by_word or by_part
        return None if lossless else "the tokenizer does not give back every text exactly"

    @functools.cached_property
    def token_bytes(self) -> dict[int, bytes] | None:
        """What each id of a byte-level vocabulary stands for, special tokens left out; None for other tokenizers."""
        if not self.byte_level or any(not added["special"] for added in self.added_tokens):
            return None
        found = {i: bytes_of_token(token) for token, i in self.model["vocab"].items() if i not in self.special_ids}
        return None if None in found.values() else found


# ---------------------------------------------------------------- in use


def check_size(text: str, name: str) -> None:
    """Raise ValueError for ids that uint16 can't hold, before `tokenizers` reads them: an id of 2**31 costs it gigabytes."""
    file = check(text.encode(), TokenizerFile, name, ADVICE, "is no Hugging Face tokenizer.json")
    vocab = file["model"]["vocab"]
    ids = [*(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]), *(added["id"] for added in file.get("added_tokens", ()))]
    if max(ids, default=0) >= MAX_VOCAB_SIZE:
        raise ValueError(f"{name} has ids up to {max(ids)}, but uint16 token files hold at most {MAX_VOCAB_SIZE} different ones; {ADVICE}")


class TextTokenizer:
    """A tokenizer.json in use.

    json: the file's text, never re-serialised. vocab_size: number of ids. eot_id: the id that ends every document.
    loss_reason: None if text without unknown tokens survives encoding and decoding, else why not.
    unknown_id: the id that stands for what the tokenizer doesn't know, None where it knows all.
    pad_id: what fills up shorter rows; where the kind has no padding token the EOT, as is usual with GPT-2.
    never_drawn: the ids that no text should get: padding, unknown_id, and those below vocab_size that no token has.
    Raises ValueError for a file that is no tokenizer, has no `<|endoftext|>`, or is too large for uint16.
    """

    def __init__(self, text: str, name: str = "tokenizer"):
        self.json = text
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        check_size(text, name)
        try:
            self.tokenizer = Tokenizer.from_str(text)
            self.description = said = Description(self.tokenizer)
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text; this switch isn't saved in the file
            self.tokenizer.encode(PROBE, add_special_tokens=False)  # fails where what stands for unknown text is missing
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{name} is no Hugging Face tokenizer.json ({error}); {ADVICE}") from None
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        if EOT not in ids:
            raise ValueError(f"{name} has no {EOT} token, which must end every document; {ADVICE}")
        self.vocab_size, self.eot_id = max(ids.values()) + 1, ids[EOT]
        self.special_ids = said.special_ids
        problems = {
            f"{EOT} is an ordinary token in it, not a special one": self.eot_id not in self.special_ids,
            "two of its tokens have the same id": len(set(ids.values())) < len(ids),
            f"its dropout={said.model.get('dropout')} gives a text other ids each time": said.model.get("dropout"),
        }
        if wrong := [problem for problem, there in problems.items() if there]:
            raise ValueError(f"{name} can't be used, {' and '.join(wrong)}; {ADVICE}")
        self.pad_id = ids.get(PADDING, self.eot_id)
        self.unknown_id = ids.get(said.model.get("unk_token"), said.model.get("unk_id"))  # the latter is Unigram's
        gaps = set(range(self.vocab_size)) - set(ids.values()) if len(ids) < self.vocab_size else set()
        self.never_drawn = sorted((gaps | {self.pad_id, self.unknown_id}) - {self.eot_id, None})
        self.normalizers = said.normalizers
        self.loss_reason = said.loss_reason

    def __reduce__(self):
        return TextTokenizer, (self.json,)

    def same_ids(self, other: "TextTokenizer") -> bool:
        """Whether both give every text the same ids, though their files may be formatted differently."""
        if self.sha256 == other.sha256:
            return True
        ours, theirs = ((t.tokenizer.get_vocab(with_added_tokens=True), t.description.method()) for t in (self, other))
        return ours == theirs

    @functools.cached_property
    def fast(self) -> FastEncoding | None:
        """tiktoken's encodings, None where the same ids aren't certain or are simply the bytes. Building them takes a moment."""
        said, model = self.description, self.description.model
        if said.token_bytes is None or said.ids_are_bytes or not said.splits_as_gpt2:
            return None
        if any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
            return None
        special = {added["content"]: added["id"] for added in said.added_tokens}
        merged = [None if (token := "".join(pair)) in special else model["vocab"].get(token) for pair in model["merges"]]
        if EOT not in special or None in merged or any(a >= b for a, b in zip(merged, merged[1:])):
            return None  # tiktoken merges in the order of ids
        return FastEncoding({token: i for i, token in said.token_bytes.items()}, special, EOT)

    @functools.cached_property
    def left_out(self) -> str:
        """Characters that get no id at all, of a few that stand for many: texts would silently lose them."""
        return "".join(character for character in PROBE if not character.isspace() and not self.encode(character))

    def normalize(self, text: str) -> str:
        """The text lowercased, in NFC, where the tokenizer's file says so; encoding changes nothing more. It does other changes itself."""
        if not self.normalizers or set(self.normalizers) - {"NFC", "Lowercase"}:
            return text
        if text.isascii():
            return text.lower() if "Lowercase" in self.normalizers else text
        return self.tokenizer.normalizer.normalize_str(text)

    def _pieces(self, text: str) -> Iterator[str]:
        """A long text in pieces that give the same ids one by one; whole where that isn't certain."""
        start = 0
        while len(text) - start > PIECE and self.description.splits_as_gpt2 and (cut := CUT.search(text, start + PIECE)):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    def _encode_piece(self, text: str) -> np.ndarray:
        if self.description.ids_are_bytes:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        if self.fast is not None and (ids := self.fast.encode(text)) is not None:
            return ids
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are treated as ordinary text."""
        return np.concatenate([self._encode_piece(piece) for piece in self._pieces(self.normalize(text))]).tolist()

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, but special tokens written out in the text get their ids."""
        self.tokenizer.encode_special_tokens = False
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self.tokenizer.encode_special_tokens = True

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Documents, already normalized -> their ids with an EOT behind each (tokens,) uint16, and the tokens of each (len(texts),) int64.

        The ids are those of `encode`; many short documents take one call of tiktoken.
        """
        small = sum(map(len, texts)) <= 2 * PIECE
        if small and self.fast is not None and (encoded := self.fast.encode_documents(texts)) is not None:
            return encoded
        end = np.array([self.eot_id], np.uint16)
        parts = [np.concatenate([*map(self._encode_piece, self._pieces(text)), end]) for text in texts]
        return np.concatenate([np.empty(0, np.uint16), *parts]), np.array([len(part) for part in parts], np.int64)

    def encode_padded(self, texts: list[str], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Texts as rows of equal length, for those who batch text themselves: ids (N, T) int64 and mask (N, T) bool, False on padding.

        T is the longest text's length; longer ones than max_length lose their end. Padding (pad_id) stands on the right.
        """
        rows = [self.encode(text)[:max_length] for text in texts]
        mask = np.arange(max(map(len, rows), default=0)) < np.array([len(row) for row in rows])[:, None]
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask] = [i for row in rows for i in row]
        return ids, mask

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out."""
        token_bytes = self.description.token_bytes
        if token_bytes is not None:
            return b"".join([token_bytes.get(i, b"") for i in ids]).decode(errors="replace")
        return self.tokenizer.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Read a tokenizer.json, or the one in a directory. Raises FileNotFoundError, ValueError."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; give a tokenizer.json or one of {', '.join(KINDS)}")
    try:
        return TextTokenizer(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no Hugging Face tokenizer.json (not UTF-8); {ADVICE}") from None


def byte_level(model: models.Model, normalizer: Normalizer | None = None) -> Tokenizer:
    """A model over the bytes of GPT-2's words. Without a pre-tokenizer `tokenizers` takes memory out of all proportion."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    return tokenizer


@functools.lru_cache(maxsize=1)
def gpt2_tokenizer(normalizer: Normalizer | None = None) -> TextTokenizer:
    """GPT-2's tokenizer (Radford et al. 2019), ids identical to tiktoken's. Raises ValueError if tiktoken can't get its files."""
    try:
        merges, vocab = (read_file_cached(f"{GPT2_FILES}/{name}", sha256) for name, sha256 in GPT2_SHA256.items())
    except Exception as error:  # requests' errors, or an OSError of the cache directory
        advice = "pass --tokenizer bpe to train a tokenizer on your own text, or --tokenizer PATH to name another: neither needs network"
        raise ValueError(f"GPT-2's tokenizer files can't be had ({type(error).__name__}: tiktoken downloads them once); {advice}") from None
    ids = json.loads(vocab)
    del ids[EOT]  # becomes a special token, with the same id: the last one
    pairs = [tuple(line.split(" ")) for line in merges.decode().splitlines()[1:]]
    tokenizer = byte_level(models.BPE(ids, pairs), normalizer)
    tokenizer.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return TextTokenizer(tokenizer.to_str())
