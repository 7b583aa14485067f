"""What happens to a document before it is encoded: flags clean or drop it, its content decides on its split. Doesn't import torch."""

import importlib.util
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from utils import Checked, Count, Natural

import xxhash

CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # control characters, but for tab and line ends
    "\u00ad\u200b\u2060\ufeff\ufff9-\ufffd"  # soft hyphen, zero-width space, word joiner, byte order mark, placeholders, U+FFFD
    "\ue000-\uf8ff\U000f0000-\U0010ffff"  # private use
    "\ufdd0-\ufdef" + "".join(chr(plane << 16 | end) for plane in range(17) for end in (0xFFFE, 0xFFFF)) + "]"  # no characters
)
LINE_END = re.compile(r"\r\n?|[\u2028\u2029\x85]")
BLANKS = re.compile(r"[^\S\n]+")
AROUND_LINE_END = re.compile(r" ?\n ?")
EMPTY_LINES = re.compile(r"\n{3,}")
WORD = re.compile(r"\S+")
SLICE = 2**20  # characters; of a long text so much at a time, so that memory stays bounded
ASCII_UNSEEN = bytes(range(0x21)) + b"\x7f"  # blanks and control characters


@dataclass(frozen=True)
class Cleaning(Checked):
    """What is done to each document. Nothing but dropping empty and repeated ones unless flags ask for it."""

    fix_mojibake: bool = False
    """Repair text that was decoded wrongly (mojibake) with ftfy, an optional package."""
    remove_control: bool = False
    """Remove control characters (all but tab and line ends), invisible ones (zero-width space, soft hyphen), private use and U+FFFD."""
    whitespace: bool = False
    """One space for any run of blanks, no blanks at line ends, LF line ends, at most one empty line in a row, none around a document."""
    lowercase: bool = False
    """Lowercase everything. Becomes part of the tokenizer file, so prompts are lowercased too."""
    nfc: bool = False
    """Write each character in one way, Unicode's NFC. Becomes part of the tokenizer file."""
    min_chars: Natural = 0
    """Drop documents with fewer characters than this."""
    max_chars: Count | None = None
    """Drop documents with more characters than this."""
    deduplicate: bool = True
    """Drop a document that is equal to an earlier one of any source, after cleaning and before splitting."""

    def problems(self) -> list[str]:
        problems = []
        if self.max_chars is not None and self.max_chars < self.min_chars:
            problems.append(f"min_chars={self.min_chars} and max_chars={self.max_chars} leave no documents; take min_chars <= max_chars")
        if self.fix_mojibake and importlib.util.find_spec("ftfy") is None:
            problems.append("--fix_mojibake needs the package ftfy; run: pip install ftfy")
        return problems

    def clean(self, text: str, counts: Counter) -> str:
        """The document as it is kept, but for what the tokenizer's own normalization does. Counts what was changed."""
        for name, change in CHANGES.items():
            if getattr(self, name):
                changed = change(text)
                counts[f"changed by {name}"] += changed != text
                text = changed
        return text

    def reason_to_drop(self, text: str) -> str | None:
        """Why a cleaned document is left out, None if it stays."""
        if not text or text.isspace():
            return "empty"
        if len(text) < self.min_chars:
            return "shorter than min_chars"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "longer than max_chars"
        return None


def _fix_mojibake(text: str) -> str:
    import ftfy

    return ftfy.fix_encoding(text)


def _whitespace(text: str) -> str:
    text = BLANKS.sub(" ", LINE_END.sub("\n", text))
    return EMPTY_LINES.sub("\n\n", AROUND_LINE_END.sub("\n", text)).strip()


CHANGES = {"fix_mojibake": _fix_mojibake, "remove_control": lambda text: CONTROL.sub("", text), "whitespace": _whitespace}  # in order


def document_key(text: str, seed: int) -> int:
    """64 bits that stand for a document's exact content, in a way that depends on the seed."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed % 2**64)


def skeleton(text: str) -> bytes:
    """What a text is, but for blanks, case, control characters and the way to write a character: no cleaning but ftfy's changes it.

    Casefolding as in Unicode's canonical caseless matching (The Unicode Standard, section 3.13, D145).
    """
    if len(text) > SLICE:
        return b"".join(skeleton(text[start : start + SLICE]) for start in range(0, len(text), SLICE))
    if text.isascii():
        return text.encode().lower().translate(None, ASCII_UNSEEN)
    text = "".join(text.split()).replace("\ufffc", "").replace("\ufffd", "")
    if not text.isprintable():  # far quicker than the search; of CONTROL only the two above are printable
        text = CONTROL.sub("", text)
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold()).encode()


def shuffle_words(text: str, share: float, seed: int) -> str:
    """Of a share of all texts, chosen by content and seed, the words in random order between the same blanks; other texts as they are.

    A controlled corruption for studies: words, bytes and layout stay, their order is lost. What a smaller share chooses, a larger one
    chooses too.
    """
    chosen = xxhash.xxh3_64_intdigest(b"shuffle words\0" + text.encode(), seed % 2**64)
    if chosen / 2**64 >= share:
        return text
    rng = random.Random(chosen)
    words = iter(sorted(WORD.findall(text), key=lambda _: rng.random()))  # rng.shuffle's stream may change with Python's version
    return WORD.sub(lambda _: next(words), text)


def split_by_hash(text: str, seed: int, val_fraction: float, test_fraction: float) -> str:
    """The split of a document, from its content and the seed alone: the same wherever, and in whatever order, it is found.

    The content is its `skeleton`, so that variants of a dataset that differ in cleaning have the same documents in each split.
    """
    share = xxhash.xxh3_64_intdigest(skeleton(text), ~seed % 2**64) / 2**64  # not document_key's seed: a text may be its own skeleton
    return "val" if share < val_fraction else "test" if share < val_fraction + test_fraction else "train"


def split_by_position(text: str, val_fraction: float, test_fraction: float) -> Iterator[tuple[str, str]]:
    """A document's beginning for train, its end for val and test, cut at line ends where it has lines, else between words."""
    start = 0
    for split, share in (("train", 1 - val_fraction - test_fraction), ("val", 1 - test_fraction), ("test", 1)):
        wanted = round(len(text) * share)
        end = max(start, (text.find("\n", wanted) + 1) or (text.find(" ", wanted) + 1) or wanted)
        if text[start:end].strip():
            yield split, text[start:end]
        start = end


@dataclass(frozen=True)
class Splitting:
    """How documents are divided. rule: hash, position, auto (hash or position, by their number), or the split that all of them belong to.

    The fraction of a split that is given elsewhere is 0.
    """

    rule: str
    seed: int = 0
    val_fraction: float = 0.0
    test_fraction: float = 0.0

    def parts(self, text: str) -> Iterator[tuple[str, str]]:
        """(split, text) of a whole document, or of its parts."""
        if self.rule == "position":
            yield from split_by_position(text, self.val_fraction, self.test_fraction)
        elif self.rule == "hash":
            yield split_by_hash(text, self.seed, self.val_fraction, self.test_fraction), text
        else:
            yield self.rule, text
