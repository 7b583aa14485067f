"""The comparison that an export must pass before it gets its name, and where it is written until then."""

import contextlib
import functools
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils import parse_weighted

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from formats.data_directory import DataDirectory
from formats.outputs import fsync_directory, temporary_path
from formats.tokenizer import TextTokenizer
from generation.engines import Engine
from models import GPT

TOLERANCE = 1e-4  # how far logits of the same model may differ, in units of the largest one where that is above 1
PROMPTS = ("", "Once upon a time", "The little girl looked at the sky and said", "In 1912, a ship", "It was not")
LONGEST = 64  # tokens of each greedy text
TEXTS = (  # the first article of the Declaration of Human Rights, or its beginning, and what tokenizers stumble over
    "All human beings are born free and equal in dignity and rights.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "Wszyscy ludzie rodzą się wolni i równi w swojej godności.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար:",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် မွေးဖွားလာသူများ ဖြစ်သည်။",
    "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብር እኩልነት ያለው ነው።",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由である。",
    "모든 인간은 태어날 때부터 자유로우며 동등하다.",
    "ᎾᏂᎥ ᎠᏂᏴᏫ ᎠᏎᏊ ᎨᏥᏅ ᎠᎴ ᎤᏂᏠᏱ",
    "cafe\u0301, caf\u00e9, \ufb01ne, \u00bd, \u2116, I\u0307, \u1e9e",
    "  two  blanks\t\ttabs\n\n\nlines\r\nend   ",
    "☃🙂👩‍👩‍👧‍👦🏳️‍🌈 \U0010fffd",
    "don't WE'LL they've I'm 'quoted' 3.14159 1,000,000 x=y+z; if (a[0] != NULL) { return \"b\\n\"; }",
    "a",
    " ",
)


class Mismatch(Exception):
    """What was written doesn't do what the model does: which check failed, and by how much."""


@dataclass(frozen=True)
class Source:
    """What is exported: the network in evaluation mode on the CPU, its tokenizer, the file or HF folder, and what else is in there.

    options: what the command line asks of single formats, by the names of its flags.
    """

    model: GPT
    tokenizer: TextTokenizer
    path: Path
    content: dict
    options: dict[str, object] = field(default_factory=dict)

    @functools.cached_property
    def data(self) -> list[DataDirectory]:
        """Where quality is measured: --data_dir, or what the checkpoint was trained on, as far as it is there. Raises ValueError."""
        asked = self.options.get("data_dir") or ()
        names = asked or [parse_weighted(name)[0] for name in self.content.get("train_config", {}).get("data_dir", ())]
        found = []
        for name in names:
            if asked or Path(name).is_dir():
                directory = DataDirectory(name, self.tokenizer)
                directory.check_tokenizer(self.tokenizer, "the model", "tokenizer.json (the model's run directory holds one)")
                found.append(directory)
        if not found:
            raise ValueError(f"{self.path} doesn't say where its data is, or it is gone; name prepared data with --data_dir")
        return found


@dataclass(frozen=True)
class Measurable:
    """A file whose quality and speed are measured by its own runtime.

    size: bytes. score: whole documents (n,) uint16 and the EOT's id -> nats of each token (n,) float64, each document from its own
    beginning. pace: tokens per second, one after the other on one thread, measured for a moment; None where nothing here runs it. bits: of
    a weight, which say how much worse it may be.
    """

    size: int
    score: Callable[[np.ndarray, int], np.ndarray]
    pace: Callable[[], float] | None
    runtime: str
    bits: int = 32


@dataclass(frozen=True)
class Loaded:
    """What was written, as its own runtime loaded it back.

    logits: token ids (B, T) int64 -> logits (B, T, V) float32. engine: for formats with a cache of keys and values. encode: text ->
    token ids without an EOT in front, by the tokenizer that lies in the file or beside it. reference: for formats whose numbers are
    rounded, the network that computes with the rounded numbers, where there is one to compare with. rounded: for the same formats, the
    format with all digits, and what was written.
    """

    logits: Callable[[Tensor], Tensor]
    engine: Engine | None = None
    encode: Callable[[str], list[int]] | None = None
    reference: GPT | None = None
    rounded: tuple[Measurable, Measurable] | None = None


Writer = Callable[[Source, Path], Loaded]  # writes a file or a folder of this name, in a `workplace`; what else it leaves there is deleted


def example_ids(model: GPT, batch: int, length: int) -> Tensor:
    """Random token ids (batch, length) int64, always the same."""
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def example_shapes(block: int) -> list[tuple[int, int]]:
    """(batch, length) at which logits are compared: the extremes, and what a graph that was traced at one length gets wrong."""
    shapes = ((1, 1), (1, 2), (2, 1), (3, 17), (2, block // 2), (5, block - 1), (1, block))
    return list(dict.fromkeys((batch, max(1, min(length, block))) for batch, length in shapes))


@torch.inference_mode()
def largest_difference(model: GPT, exported: Callable[[Tensor], Tensor], tick: Callable[[], object] = lambda: None) -> tuple[float, float]:
    """Largest difference of any logit between the model and what was exported, at several shapes; infinite where shapes differ.

    And the largest that is allowed: float32 rounds large logits, such as GPT-2's of 100, more coarsely. tick: called after each shape.
    """
    worst, largest = 0.0, 1.0
    for batch, length in example_shapes(model.config.block_size):
        ids = example_ids(model, batch, length)
        expected, got = model(ids)[0], exported(ids)
        difference = (expected - got).abs().max().item() if expected.shape == got.shape else math.inf
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
        largest = max(largest, expected.abs().max().item())
        tick()
    return worst, TOLERANCE * largest


def prompt_rows(source: Source) -> tuple[Tensor, Tensor]:
    """PROMPTS as rows of ids (N, T) int64, an EOT in front and padding behind, and their lengths (N,); at most half of block_size."""
    tokenizer, room = source.tokenizer, max(1, source.model.config.block_size // 2)
    rows = [[tokenizer.eot_id, *tokenizer.encode(prompt)][:room] for prompt in PROMPTS]
    lengths = torch.tensor([*map(len, rows)])
    ids = torch.full((len(rows), int(lengths.max())), tokenizer.eot_id)
    for row, values in zip(ids, rows):
        row[: len(values)] = torch.tensor(values)
    return ids, lengths


def greedy_steps(block: int, longest: int) -> int:
    """How many tokens can follow prompts of which the longest has so many tokens."""
    return min(LONGEST, block + 1 - longest)


@torch.inference_mode()
def compare_texts(
    source: Source, model: GPT, loaded: Loaded, allowed: float, tick: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Continue PROMPTS greedily, one token at a time, by a model, by what was exported, and by its engine where it has one.

    All read the model's text. Logits (N, V) may differ by `allowed`, so where the most probable token isn't the same one, the model itself
    holds both for equal within twice that: such a tie is no failure, anything else is. So where there are no ties the texts are the same.
    Raises Mismatch.
    """
    ids, lengths = prompt_rows(source)
    rows, count = torch.arange(len(ids)), greedy_steps(model.config.block_size, ids.size(1))
    steps: dict[str, list[float]] = {}
    ties = 0
    for n in range(count):
        last = (rows, lengths + n - 1)
        expected = model(ids)[0][last]
        found = {"": loaded.logits(ids)[last]}
        if loaded.engine is not None:
            found[" with its cache"] = loaded.engine.step(ids[last][:, None])[:, 0] if n else loaded.engine.prefill(ids, lengths)
        for how, got in found.items():
            difference = (got - expected).abs().amax(dim=1)
            if not difference.max() <= allowed:  # not a number is no agreement
                row = int(difference.nan_to_num(math.inf).argmax())
                behind = f"token {n + 1} behind {PROMPTS[row]!r}{how}"
                raise Mismatch(f"logits of {behind} differ by {difference[row]:.1e} (allowed {allowed:.1e})")
            steps.setdefault(how, []).append(difference.max().item())
            ties += int((got.argmax(dim=1) != expected.argmax(dim=1)).sum())
        ids = torch.cat((ids, torch.full((len(ids), 1), source.tokenizer.eot_id)), dim=1)
        ids[rows, lengths + n] = expected.argmax(dim=1)
        tick()
    figures = {"greedy_tokens": count * len(rows), "greedy_ties": ties}
    return figures | ({"largest_difference_with_cache": max(steps[" with its cache"])} if loaded.engine is not None else {})


def compare_tokenizers(source: Source, encode: Callable[[str], list[int]]) -> int:
    """How many texts have the ids that the model's tokenizer gives them: all. Raises Mismatch."""
    for text in TEXTS:
        expected = source.tokenizer.encode(text)
        try:
            got = encode(text)
        except ValueError as error:
            raise Mismatch(str(error)) from None
        if got != expected:
            raise Mismatch(f"its tokenizer gives {text!r} the ids {got[:12]}, the model's {expected[:12]}")
    return len(TEXTS)


def verify(source: Source, loaded: Loaded, exact: bool, bar: tqdm) -> dict[str, float]:
    """Compare what was written with the model: logits at several shapes, greedy texts, ids of texts in many scripts.

    exact: else its numbers are rounded, and only have to be there, or to be those of its reference. Returns the figures. Raises Mismatch
    at the first check that fails.
    """
    block, model = source.model.config.block_size, loaded.reference or (source.model if exact else None)
    bar.reset(len(example_shapes(block)) + (greedy_steps(block, prompt_rows(source)[0].size(1)) if model else 0))
    difference, allowed = largest_difference(model or source.model, loaded.logits, bar.update)
    if not difference <= (allowed if model else sys.float_info.max):
        raise Mismatch(f"logits differ by up to {difference:.1e} (allowed {allowed:.1e})")
    figures: dict[str, float] = {"largest_logit_difference": difference}
    figures |= compare_texts(source, model, loaded, allowed, bar.update) if model else {}
    return figures | ({"texts_encoded": compare_tokenizers(source, loaded.encode)} if loaded.encode else {})


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """A folder inside `output` to write in, on the same disk, deleted at the end with what was not put in place."""
    path = temporary_path(output / "export")
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context in which libraries neither log what they do nor warn: what matters is checked afterwards."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def put_in_place(written: Path, target: Path) -> None:
    """Give a verified file or folder its name; what had this name before is replaced. written: in a `workplace`."""
    if os.path.lexists(target) and (target.is_dir() or written.is_dir()):
        os.replace(target, written.with_name("former"))  # only a file can be renamed over another
    os.replace(written, target)
    fsync_directory(target.parent)
