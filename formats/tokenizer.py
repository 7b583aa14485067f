"""Tokenizers: always a Hugging Face tokenizer.json, whatever the kind, so that `tokenizers` and `transformers` read it.

Byte-level BPE files get a tiktoken twin that encodes several times faster, with identical ids. This module doesn't import torch.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import Tokenizer

EOT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
PADDING = "<|pad|>"
KINDS = ("gpt2", "bpe", "wordpiece", "word", "char", "byte")
MAX_VOCAB_SIZE = 65_536  # token files hold uint16
PIECE = 2**20  # characters; longer texts are encoded in pieces, so that memory stays bounded
# where a text may be cut without changing its ids: none of our pre-tokenizers looks back across, or joins, a word and the space behind it
CUT = re.compile(r"(?<=\S)[ \n]")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# the same cuts where no three blanks stand in a row before something else, without looking ahead or back: an automaton, twice as fast
QUICK_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s"
WIDE_BLANKS = "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
THREE_BLANKS = re.compile(f"[\t-\r {WIDE_BLANKS}]{{3}}")
BLANKS_AS_SPACES = bytes.maketrans(b"\t\n\v\f\r", b"     ")


@functools.lru_cache(maxsize=1)
def byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, extra = [""] * 256, 0
    for byte in range(256):
        table[byte] = chr(byte) if byte in printable else chr(256 + extra)
        extra += byte not in printable
    return table


def has_few_blanks(text: str) -> bool:
    """Whether no three blanks (Unicode's White_Space) stand in a row."""
    if not text.isascii() and any(blank in text for blank in WIDE_BLANKS):
        return THREE_BLANKS.search(text) is None
    return b"   " not in text.encode().translate(BLANKS_AS_SPACES)


class TextTokenizer:
    """A tokenizer.json in use.

    json: the file's text, never re-serialised. vocab_size: number of ids. eot_id: the id that ends every document.
    loss_reason: None if text without unknown tokens survives encoding and decoding, else why not.
    unknown_id: the id that stands for what the tokenizer doesn't know, None where it knows all.
    pad_id: what fills up shorter rows; where the kind has no padding token the EOT, as is usual with GPT-2.
    Raises ValueError for a file that is no tokenizer, has no `<|endoftext|>`, or is too large for uint16.
    """

    def __init__(self, text: str, name: str = "tokenizer"):
        self.json = text
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        try:
            self.tokenizer = Tokenizer.from_str(text)
            description = json.loads(self.tokenizer.to_str())  # older files leave out what they take for granted
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{name} is no Hugging Face tokenizer.json ({error}); make one with tokenizer_train.py") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text; this switch isn't saved in the file
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        if EOT not in ids:
            raise ValueError(f"{name} has no {EOT} token, which must end every document; make one with tokenizer_train.py")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"{name} has {self.vocab_size} tokens, but uint16 token files hold at most {MAX_VOCAB_SIZE}")
        self.eot_id = ids[EOT]
        self.pad_id = ids.get(PADDING, self.eot_id)
        self.special_ids = {added["id"] for added in description["added_tokens"] if added["special"]}
        self.unknown_id = ids.get((description["model"].get("unk_token") or ""), None)
        self.description = description
        self.normalizers = self._normalizers()
        self.byte_level = self._is_byte_level()
        self.loss_reason = self._why_lossy()

    def same_ids(self, other: "TextTokenizer") -> bool:
        """Whether both give every text the same ids, though their files may be formatted differently."""

        def essence(t: TextTokenizer) -> tuple:
            pre = {k: v for k, v in (t.description["pre_tokenizer"] or {}).items() if k != "trim_offsets"}
            model = {k: v for k, v in t.description["model"].items() if k in ("type", "merges", "unk_token", "continuing_subword_prefix")}
            return t.tokenizer.get_vocab(with_added_tokens=True), model, pre, t.description["normalizer"]

        return self.sha256 == other.sha256 or essence(self) == essence(other)

    def _normalizers(self) -> tuple[str, ...]:
        """What the tokenizer does to a text before it encodes it, in order, e.g. ("Lowercase", "NFC")."""
        normalizer = self.description["normalizer"] or {"type": "Sequence", "normalizers": []}
        parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        return tuple(part["type"] for part in parts)

    def _splitters(self) -> list[dict]:
        splitter = self.description["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
        return splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]

    def _splits_as_gpt2(self) -> bool:
        """Whether GPT-2's pre-tokenizer comes last; what stands before it may only split at characters."""
        *first, last = self._splitters() or [{}]
        gpt2 = last.get("type") == "ByteLevel" and last.get("use_regex", True) and not last.get("add_prefix_space")
        return gpt2 and all(splitter["type"] == "Split" and splitter["pattern"] == {"String": "#"} for splitter in first)

    def _is_byte_level(self) -> bool:
        model, splitters = self.description["model"], self._splitters()
        return (
            model["type"] == "BPE"
            and set(self.normalizers) <= {"NFC", "Lowercase"}
            and len(splitters) == 1
            and splitters[0]["type"] == "ByteLevel"
            and not splitters[0].get("add_prefix_space")
            and not (model.get("unk_token") or model.get("byte_fallback") or model.get("dropout"))
            and (self.description["decoder"] or {}).get("type") == "ByteLevel"
            and all(character in model["vocab"] for character in byte_characters())
        )

    def _why_lossy(self) -> str | None:
        if set(self.normalizers) - {"NFC"}:  # NFC only writes the same characters in one way
            return "the tokenizer changes text before it encodes it"
        model, decoder = self.description["model"]["type"], self.description["decoder"] or {}
        decoders = [part["type"] for part in decoder.get("decoders", [decoder]) if part]
        by_character = model == "WordLevel" and decoders == ["Fuse"]
        by_word = model == "WordLevel" and decoders == ["ByteLevel"] and self._splits_as_gpt2()
        by_part = model == "WordPiece" and decoders == ["Replace", "ByteLevel"] and self._splits_as_gpt2() and len(self._splitters()) == 2
        lossless = self.byte_level or by_character or by_word or by_part
        return None if lossless else "the tokenizer does not give back every text exactly"

    @functools.cached_property
    def twin(self) -> tiktoken.Encoding | None:
        """The tiktoken encoding with the same ids, or None where that isn't certain."""
        model = self.description["model"]
        if not self.byte_level or not self._splits_as_gpt2() or model.get("ignore_merges") or model.get("end_of_word_suffix"):
            return None
        if model.get("continuing_subword_prefix") or self._bytes is None:
            return None
        special = {added["content"] for added in self.description["added_tokens"]}
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        merged = [vocab.get("".join(pair if isinstance(pair, list) else pair.split(" "))) for pair in model["merges"]]
        if None in merged or any(a >= b for a, b in zip(merged, merged[1:])):
            return None  # tiktoken merges in the order of ids
        return self._make_twin(GPT2_PATTERN)

    @functools.cached_property
    def quick_twin(self) -> tiktoken.Encoding | None:
        """The twin for texts in which `has_few_blanks`."""
        return None if self.twin is None else self._make_twin(QUICK_PATTERN)

    def _make_twin(self, pattern: str) -> tiktoken.Encoding:
        special = {added["content"]: added["id"] for added in self.description["added_tokens"]}
        return tiktoken.Encoding("twin", pat_str=pattern, mergeable_ranks={t: i for i, t in self._bytes.items()}, special_tokens=special)

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes] | None:
        """What each id of a byte-level vocabulary stands for, special tokens left out; None for other tokenizers."""
        if not self.byte_level or any(not added["special"] for added in self.description["added_tokens"]):
            return None
        tokens = {i: token for token, i in self.description["model"]["vocab"].items() if i not in self.special_ids}
        if not set("".join(tokens.values())) <= set(byte_characters()):
            return None
        byte_of = str.maketrans("".join(byte_characters()), bytes(range(256)).decode("latin-1"))
        return {i: token.translate(byte_of).encode("latin-1") for i, token in tokens.items()}

    def warm_up(self) -> None:
        """Build now what encoding needs, so that forked processes find it."""
        self.encode("")

    @functools.cached_property
    def ids_are_bytes(self) -> bool:
        """Whether the ids are the text's UTF-8 bytes (kind `byte`)."""
        model = self.description["model"]
        return self.byte_level and not model["merges"] and [model["vocab"][c] for c in byte_characters()] == list(range(256))

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
        while len(text) - start > PIECE and self._splits_as_gpt2() and (cut := CUT.search(text, start + PIECE)):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    def _encode_piece(self, text: str) -> np.ndarray:
        if self.ids_are_bytes:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        if self.twin is not None:
            twin = self.quick_twin if has_few_blanks(text) else self.twin
            with _without_panic():
                return twin.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are treated as ordinary text."""
        return np.concatenate([self._encode_piece(piece) for piece in self._pieces(self.normalize(text))]).tolist()

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Documents, already normalized -> their ids with an EOT behind each (tokens,) uint16, and the tokens of each (len(texts),) int64.

        The ids are those of `encode`; many short documents take one call of tiktoken.
        """
        if self.twin is not None and not self.ids_are_bytes and sum(map(len, texts)) <= 2 * PIECE and not any(EOT in t for t in texts):
            quick = np.array([has_few_blanks(text) for text in texts], bool)
            with _without_panic():
                if quick.all():
                    return self._encode_joined(self.quick_twin, texts)
                parts: list[np.ndarray] = [np.empty(0, np.uint16)] * len(texts)
                for twin, which in ((self.quick_twin, np.flatnonzero(quick)), (self.twin, np.flatnonzero(~quick))):
                    ids, sizes = self._encode_joined(twin, [texts[i] for i in which])
                    for i, size, end in zip(which.tolist(), sizes.tolist(), np.cumsum(sizes).tolist()):
                        parts[i] = ids[end - size : end]
                return np.concatenate(parts), np.array([len(part) for part in parts], np.int64)
        end = np.array([self.eot_id], np.uint16)
        parts = [np.concatenate([*map(self._encode_piece, self._pieces(text)), end]) for text in texts]
        return np.concatenate([np.empty(0, np.uint16), *parts]), np.array([len(part) for part in parts], np.int64)

    def _encode_joined(self, twin: tiktoken.Encoding, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As encode_documents, in one call of tiktoken. No text contains the EOT literally."""
        ids = twin.encode_to_numpy(EOT.join([*texts, ""]), allowed_special={EOT}, disallowed_special=()).astype(np.uint16)
        return ids, np.diff(np.flatnonzero(ids == self.eot_id), prepend=-1)

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
        if self._bytes is not None:
            return b"".join([self._bytes.get(i, b"") for i in ids]).decode(errors="replace")
        return self.tokenizer.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=False)


@contextlib.contextmanager
def _without_panic() -> Iterator[None]:
    """tiktoken's regex runs out of stack on a million spaces. Then what follows the block encodes with `tokenizers`."""
    try:
        yield
    except ValueError:
        pass
    except BaseException as error:  # where it panics: pyo3's PanicException is no Exception
        if type(error).__name__ != "PanicException":
            raise


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Read a tokenizer.json, or the one in a directory. Raises FileNotFoundError, ValueError."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; give a tokenizer.json or one of {', '.join(KINDS)}")
    try:
        return TextTokenizer(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no Hugging Face tokenizer.json (not UTF-8); make one with tokenizer_train.py") from None


def gpt2_tokenizer():
    from preparation.tokenizer_kinds import gpt2_tokenizer

    return gpt2_tokenizer()
