"""Tokenizers: always a Hugging Face tokenizer.json, whatever the kind, so that `tokenizers` and `transformers` read it.

Byte-level BPE files get a tiktoken twin that encodes several times faster, with identical ids. This module doesn't import torch.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

EOT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
KINDS = ("gpt2", "bpe", "byte", "char")
MAX_VOCAB_SIZE = 65_536  # token files hold uint16
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@functools.lru_cache(maxsize=1)
def byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, extra = [""] * 256, 0
    for byte in range(256):
        table[byte] = chr(byte) if byte in printable else chr(256 + extra)
        extra += byte not in printable
    return table


class TextTokenizer:
    """A tokenizer.json in use.

    json: the file's text, never re-serialised. vocab_size: number of ids. eot_id: the id that ends every document.
    loss_reason: None if text without unknown tokens survives encoding and decoding, else why not.
    unknown_id: the id that stands for what the tokenizer doesn't know, None where it knows all.
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
        self.special_ids = {added["id"] for added in description["added_tokens"] if added["special"]}
        self.unknown_id = ids.get((description["model"].get("unk_token") or ""), None)
        self.description = description
        self.byte_level = self._is_byte_level()
        self.loss_reason = None if self.byte_level else self._why_lossy()

    def same_ids(self, other: "TextTokenizer") -> bool:
        """Whether both give every text the same ids, though their files may be formatted differently."""

        def essence(t: TextTokenizer) -> tuple:
            pre = {k: v for k, v in (t.description["pre_tokenizer"] or {}).items() if k != "trim_offsets"}
            model = {k: v for k, v in t.description["model"].items() if k in ("type", "merges", "unk_token", "continuing_subword_prefix")}
            return t.tokenizer.get_vocab(with_added_tokens=True), model, pre, t.description["normalizer"]

        return self.sha256 == other.sha256 or essence(self) == essence(other)

    def _is_byte_level(self) -> bool:
        d = self.description
        splitter = d["pre_tokenizer"] or {}
        model = d["model"]
        return (
            model["type"] == "BPE"
            and d["normalizer"] is None
            and splitter.get("type") == "ByteLevel"
            and not splitter.get("add_prefix_space")
            and not (model.get("unk_token") or model.get("byte_fallback") or model.get("dropout"))
            and (d["decoder"] or {}).get("type") == "ByteLevel"
            and all(character in model["vocab"] for character in byte_characters())
        )

    def _why_lossy(self) -> str | None:
        if self.description["normalizer"] is not None:
            return "the tokenizer changes text before it encodes it"
        by_character = self.description["model"]["type"] == "WordLevel" and (self.description["decoder"] or {}).get("type") == "Fuse"
        return None if by_character else "the tokenizer does not give back every text exactly"

    @functools.cached_property
    def twin(self) -> tiktoken.Encoding | None:
        """The tiktoken encoding with the same ids, or None where that isn't certain."""
        model, splitter = self.description["model"], self.description["pre_tokenizer"] or {}
        if not self.byte_level or not splitter.get("use_regex", True) or model.get("ignore_merges") or model.get("end_of_word_suffix"):
            return None
        if model.get("continuing_subword_prefix") or any(not added["special"] for added in self.description["added_tokens"]):
            return None
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        special = {added["content"]: added["id"] for added in self.description["added_tokens"]}
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        merged = [vocab.get("".join(pair if isinstance(pair, list) else pair.split(" "))) for pair in model["merges"]]
        if None in merged or any(a >= b for a, b in zip(merged, merged[1:])):
            return None  # tiktoken merges in the order of ids
        ranks = {bytes(byte_of[character] for character in token): i for token, i in vocab.items()}
        return tiktoken.Encoding("twin", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are treated as ordinary text."""
        if self.twin is not None:
            try:
                return self.twin.encode_ordinary(text)
            except BaseException as error:  # tiktoken's regex panics on a million spaces; pyo3's PanicException is no Exception
                if type(error).__name__ != "PanicException":
                    raise
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out."""
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
        raise ValueError(f"{path} is no Hugging Face tokenizer.json (not UTF-8); make one with tokenizer_train.py") from None


def _finish(tokenizer: Tokenizer, *special: str) -> TextTokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (EOT, *special)])
    return TextTokenizer(tokenizer.to_str())


def _byte_level(model) -> Tokenizer:
    """Without a pre-tokenizer `tokenizers` takes memory out of all proportion; GPT-2's keeps words apart."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.lru_cache(maxsize=1)
def gpt2_tokenizer() -> TextTokenizer:
    """GPT-2's tokenizer, ids identical to tiktoken's. Raises ValueError if tiktoken can't get its files."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' errors, or an OSError of the cache directory
        raise ValueError(
            f"GPT-2's tokenizer files can't be had ({type(error).__name__}: tiktoken downloads them once); "
            "pass --tokenizer bpe to train a tokenizer on your own text, which needs no network"
        ) from None
    ranks = encoding._mergeable_ranks
    characters = byte_characters()
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append((rank, "".join(characters[b] for b in left), "".join(characters[b] for b in right)))
    vocab = {"".join(characters[b] for b in token): rank for token, rank in ranks.items()}
    return _finish(_byte_level(models.BPE(vocab, [(left, right) for _, left, right in sorted(merges)])))


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte pair encoding joins last to make `token`: merge its bytes with all earlier ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[best] < rank, f"{token!r} is no product of byte pair merges"
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Byte-level BPE trained on `texts`; deterministic. May have fewer tokens than asked for where the text gives no more merges.

    Raises ValueError for a vocab_size that can't hold the 256 bytes and `<|endoftext|>`, or is above 65,536.
    """
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} must be between 257 (all bytes and {EOT}) and {MAX_VOCAB_SIZE} (uint16 token files)")
    tokenizer = _byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(tokenizer.to_str())


def byte_tokenizer() -> TextTokenizer:
    """Each UTF-8 byte is its own id 0..255; `<|endoftext|>` is 256."""
    return _finish(_byte_level(models.BPE({character: byte for byte, character in enumerate(byte_characters())}, [])))


def char_tokenizer(texts: Iterable[str]) -> TextTokenizer:
    """Each character of `texts` is an id; others become `<|unk|>`."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
    characters = sorted(found)
    vocab = {EOT: 0, UNKNOWN: 1} | {character: i + 2 for i, character in enumerate(characters)}
    if len(vocab) > MAX_VOCAB_SIZE:
        raise ValueError(f"the text has {len(characters)} different characters, too many for uint16 token files; pass --tokenizer bpe")
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finish(tokenizer, UNKNOWN)


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """The tokenizer of a kind (`KINDS`), trained on `texts` where the kind is trained, or read from a path."""
    if kind == "gpt2":
        return gpt2_tokenizer()
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    if kind == "byte":
        return byte_tokenizer()
    if kind == "char":
        return char_tokenizer(texts)
    return load_tokenizer(kind)
