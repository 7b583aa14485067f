"""What a tokenizer.json says: what it does to a text, whether it loses any of it, what its ids stand for. Doesn't import torch."""

import functools
import itertools
import json

from tokenizers import Tokenizer, pre_tokenizers


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The printable characters that stand for the bytes 0..255 in byte-level vocabularies (GPT-2's table)."""
    printable, others = pre_tokenizers.ByteLevel.alphabet(), map(chr, itertools.count(256))
    return {chr(byte) if chr(byte) in printable else next(others): byte for byte in range(256)}


def bytes_of_token(token: str) -> bytes | None:
    """What a token of a byte-level vocabulary stands for, None if that isn't what it is."""
    values = [*map(byte_of_character().get, token)]
    return None if None in values else bytes(values)


def _parts(component: dict | None, key: str) -> list[dict]:
    """The parts of a component: none, itself, or those of a Sequence, which stand under `key`."""
    if component is None:
        return []
    return component[key] if component["type"] == "Sequence" else [component]


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
        names = ("type", "merges", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
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
            and byte_of_character().keys() <= self.model["vocab"].keys()
        )

    @functools.cached_property
    def ids_are_bytes(self) -> bool:
        """Whether the ids are the text's UTF-8 bytes (kind `byte`)."""
        vocab = self.model["vocab"]
        return self.byte_level and not self.model["merges"] and byte_of_character().items() <= vocab.items()

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
