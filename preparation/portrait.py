"""A portrait of prepared data, as data_report.json and data_report.png: what is in it, how varied it is, how far val is from train.

Lengths and counts are those of all documents. What needs the text is measured on a sample of documents, whose size stands in the report.
Words are runs of letters and digits, or single other signs, so that figures don't depend on the tokenizer. Doesn't import torch.
"""

import io
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from formats.data_directory import PICTURE, REPORT
from formats.tokenizer import TextTokenizer

SAMPLE_BYTES = {"train": 8_000_000, "val": 1_000_000}
WORD = re.compile(r"\w+|[^\w\s]")
RATIO_WORDS = 100_000  # the type/token ratio falls with the length of a text, so it is taken on this many words
OPENING_WORDS = 4
NGRAMS = (8, 13)  # 13 as in GPT-3's appendix on contamination (Brown et al. 2020)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLORS = {"train": "#33608c", "val": "#d1793b", "test": "#8a8a8a"}
# those of these fonts that are there are tried in turn for each character
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS", "Noto Sans")

Read = Callable[[str, int, int], np.ndarray]  # split, start, count -> token ids (count,) uint16


def sample_documents(sizes: np.ndarray, split: str, read: Read, tokenizer: TextTokenizer, limit: int) -> tuple[list[str], bool]:
    """Texts of documents drawn at random, about `limit` bytes of them, and whether these are all. sizes: tokens of each document."""
    starts = np.cumsum(sizes) - sizes
    chosen, size = [], 0
    for i in np.random.RandomState(0).permutation(len(sizes)):
        count = min(int(sizes[i]) - 1, limit)  # no token is shorter than a byte
        text = tokenizer.decode(read(split, int(starts[i]), count).tolist())
        chosen.append((i, text))
        size += len(text.encode())
        if size >= limit:
            break
    return [text for _, text in sorted(chosen)], len(chosen) == len(sizes) and size < limit


def lengths(sizes: np.ndarray) -> dict:
    """Distribution of the documents' lengths in tokens, EOT included."""
    edges = np.unique(np.geomspace(sizes.min(), sizes.max() + 1, 41).round().astype(int))
    counts = np.histogram(sizes, edges)[0]
    quantiles = {f"{q:.0%}": float(np.quantile(sizes, q)) for q in QUANTILES}
    extremes = {"mean": float(sizes.mean()), "min": int(sizes.min()), "max": int(sizes.max())}
    return extremes | {"quantiles": quantiles, "histogram": {"edges": edges.tolist(), "documents": counts.tolist()}}


class Words:
    """Sampled texts as word numbers: ids (n,) int64 of the words, document (n,) int64 of the text that each stands in."""

    def __init__(self, texts: list[str], numbers: dict[str, int]):
        found = [np.array([numbers.setdefault(word, len(numbers)) for word in WORD.findall(text)], np.int64) for text in texts]
        self.ids = np.concatenate([np.empty(0, np.int64), *found])
        self.document = np.repeat(np.arange(len(found)), [len(words) for words in found])

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes (m,) uint64 of all runs of n words within a document, and the document of each."""
        if len(self.ids) < n:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        mixed = (self.ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        size = len(mixed) - n + 1
        hashes = np.zeros(size, np.uint64)
        for i in range(n):
            hashes = hashes * np.uint64(0xD6E8FEB86659FD93) + mixed[i : i + size]
        whole = self.document[:size] == self.document[n - 1 :]
        return hashes[whole], self.document[:size][whole]


def entropy(counts: np.ndarray) -> float:
    """Bits of a draw from counts, all above 0."""
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def variety(words: Words, texts: list[str]) -> dict:
    """How varied the text is: word counts, entropies, how well it compresses."""
    counts = np.sort(np.unique(words.ids, return_counts=True)[1])[::-1]
    first = words.ids[:RATIO_WORDS]
    pairs = np.unique(words.ngrams(2)[0], return_counts=True)[1]
    ranks = np.unique(np.geomspace(1, max(1, len(counts)), 100).astype(int)) if len(counts) else np.empty(0, int)
    middle = ranks[(ranks >= 10) & (ranks <= 1000)]
    slope = float(np.polyfit(np.log(middle), np.log(counts[middle - 1]), 1)[0]) if len(middle) > 2 else None
    data = "\n".join(texts).encode()
    unigram = entropy(counts)
    return {
        "words": len(words.ids),
        "distinct_words": len(counts),
        "type_token_ratio": {"words": len(first), "ratio": len(np.unique(first)) / max(1, len(first))},
        "unigram_entropy_bits": unigram,
        "bigram_entropy_bits": max(0.0, entropy(pairs) - unigram) if len(pairs) else 0.0,
        "gzip_ratio": len(data) / len(zlib.compress(data, 6)),
        "zipf": {"rank": ranks.tolist(), "count": counts[ranks - 1].tolist(), "slope_ranks_10_to_1000": slope},
    }


def openings(texts: list[str]) -> list[dict]:
    """The most frequent first words of documents: many equal ones betray a template."""
    counts = Counter(" ".join(text[:200].split()[:OPENING_WORDS]) for text in texts)
    return [{"opening": opening, "share": count / len(texts)} for opening, count in counts.most_common(10)]


def scripts(texts: list[str]) -> dict[str, float]:
    """Share of each Unicode script among the letters and other characters that belong to one, the most frequent first."""
    from fontTools import unicodedata  # comes with matplotlib

    points = np.bincount(np.frombuffer("".join(texts).encode("utf-32-le"), "<u4"))
    found: Counter = Counter()
    for point in np.flatnonzero(points).tolist():
        found[unicodedata.script_name(unicodedata.script(chr(point)))] += int(points[point])
    for shared in ("Common", "Inherited", "Unknown"):
        found.pop(shared, None)
    return {name.replace("_", " "): count / found.total() for name, count in found.most_common(12)}


def overlap(train: Words, val: Words) -> dict:
    """Per n: share of val's runs of n words that the sampled train has too, and of its documents that hold such a run."""
    result = {}
    for n in NGRAMS:
        (ours, _), (theirs, document) = train.ngrams(n), val.ngrams(n)
        shared = np.isin(theirs, ours)
        documents = len(np.unique(document))
        result[str(n)] = {
            "ngrams": len(theirs),
            "shared": float(shared.mean()) if len(theirs) else 0.0,
            "documents_with_shared": len(np.unique(document[shared])) / documents if documents else 0.0,
        }
    return result


def describe(sizes: dict[str, np.ndarray], read: Read, tokenizer: TextTokenizer, splits: dict[str, dict], counts: dict[str, int]) -> dict:
    """The whole report. sizes: per split the tokens of each document; read: their ids; splits: their tokens, documents, bytes;
    counts: what preparation dropped or changed."""
    samples = {split: sample_documents(sizes[split], split, read, tokenizer, limit) for split, limit in SAMPLE_BYTES.items()}
    numbers: dict[str, int] = {}
    train, val = (Words(found, numbers) for found, _ in samples.values())
    texts, names = samples["train"][0], ("documents", "tokens", "bytes")
    return {
        "splits": {s: {n: v[n] for n in names} | {"bytes_per_token": v["bytes"] / v["tokens"]} for s, v in splits.items()},
        "dropped_or_changed": counts,
        "document_tokens": {split: lengths(of_split) for split, of_split in sizes.items()},
        "sample": {
            split: {"documents": len(found), "bytes": sum(len(text.encode()) for text in found), "all": complete}
            for split, (found, complete) in samples.items()
        },
        "sample_loses": tokenizer.loss_reason or ("unknown words" if tokenizer.unknown_id is not None else None),
        **variety(train, texts),
        "openings": openings(texts),
        "scripts": scripts(texts),
        "val_in_train": overlap(train, val),
    }


def files(report: dict, title: str) -> dict[str, bytes]:
    """The contents of data_report.json and data_report.png."""
    picture = io.BytesIO()
    draw(report, picture, title)
    return {REPORT: (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode(), PICTURE: picture.getvalue()}


# ---------------------------------------------------------------- the picture


def _count(n: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.3g} {unit}"
    return f"{n:.3g} "


def _shorten(text: str, length: int = 25) -> str:
    text = "".join(character if character.isprintable() else "·" for character in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def draw(report: dict, file: BinaryIO, title: str) -> None:
    """The report as one picture, a PNG."""
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    fonts = [name for name in FONTS if name in font_manager.get_font_names()]
    figure = Figure(figsize=(15, 8.4))
    figure.subplots_adjust(left=0.16, right=0.97, bottom=0.06, top=0.89, wspace=0.68, hspace=0.3)
    panels = figure.subplot_mosaic([["table", "lengths", "zipf"], ["openings", "scripts", "overlap"]])
    panels["table"].axis("off")
    figure.text(0.02, 0.89, _table(report), va="top", family="monospace", fontsize=9.5, linespacing=1.5)
    _draw_lengths(panels["lengths"], report["document_tokens"])
    _draw_zipf(panels["zipf"], report["zipf"])
    shares = [(_shorten(entry["opening"]), entry["share"]) for entry in report["openings"]]
    _bars(panels["openings"], shares, "most frequent openings, share of documents", COLORS["train"], fonts)
    _bars(panels["scripts"], list(report["scripts"].items()), "letters by Unicode script", COLORS["train"], fonts)
    overlaps = report["val_in_train"].items()
    shared = [(f"runs of {n} words", values["shared"]) for n, values in overlaps]
    shared += [(f"documents\nwith a run of {n}", values["documents_with_shared"]) for n, values in overlaps]
    of = "train" if report["sample"]["train"]["all"] else "sampled train"
    _bars(panels["overlap"], shared, f"of val, also in {of}", COLORS["val"], fonts)
    figure.suptitle(title, fontsize=14, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no font here can draw
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _table(report: dict) -> str:
    lines = [f"{'':7}{'documents':>11}{'tokens':>10}{'bytes':>10}{'bytes/token':>13}"]
    for split, s in report["splits"].items():
        lines.append(f"{split:7}{s['documents']:>11,}{_count(s['tokens']):>10}{_count(s['bytes']):>9}B{s['bytes_per_token']:>13.2f}")
    ratio, sample = report["type_token_ratio"], report["sample"]["train"]
    of = "all of train" if sample["all"] else f"{_count(sample['bytes'])}B of train, {sample['documents']:,} documents"
    summary = {
        "measured on": of,
        "words, distinct": f"{_count(report['words'])}, {_count(report['distinct_words'])}",
        "type/token ratio": f"{ratio['ratio']:.3f} of {_count(ratio['words'])} words",
        "entropy of a word": f"{report['unigram_entropy_bits']:.2f} bits",
        "… after the one before": f"{report['bigram_entropy_bits']:.2f} bits",
        "gzip ratio": f"{report['gzip_ratio']:.2f}",
    } | {name: f"{count:,}" for name, count in list(report["dropped_or_changed"].items())[:5]}
    return "\n".join([*lines, "", *(f"{name:25} {value}" for name, value in summary.items())])


def _draw_lengths(panel, document_tokens: dict) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for split, values in document_tokens.items():
        edges, counts = values["histogram"]["edges"], np.array(values["histogram"]["documents"])
        if len(edges) > 1 and split != "test":
            panel.stairs(counts / counts.sum(), edges, fill=split == "train", alpha=0.85, color=COLORS[split], label=split, linewidth=1.8)
    middle = document_tokens["train"]["quantiles"]["50%"]
    panel.axvline(middle, color="black", linewidth=0.8, linestyle=":")
    panel.set(xscale="log", title=f"length of documents, median {middle:,.0f} tokens", xlabel="tokens", ylabel="share of documents")
    panel.legend(frameon=False)
    low, high = panel.get_xlim()
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _draw_zipf(panel, zipf: dict) -> None:
    slope = zipf["slope_ranks_10_to_1000"]
    title = "words by frequency (Zipf)" + (f", slope {slope:.2f}" if slope is not None else "")
    panel.plot(zipf["rank"], zipf["count"], ".-", color=COLORS["train"], linewidth=1)
    panel.set(xscale="log", yscale="log", title=title, xlabel="rank", ylabel="times found")


def _bars(panel, bars: list[tuple[str, float]], title: str, color: str, fonts: list[str]) -> None:
    """Shares with their labels, of which several may be equal once shortened."""
    labels, shares = ([bar[i] for bar in bars] for i in range(2))
    drawn = panel.barh(range(len(bars)), shares, color=color, alpha=0.85)
    panel.set_yticks(range(len(bars)), labels, fontfamily=fonts, fontsize=9, parse_math=False)
    panel.bar_label(drawn, [f"{share:.2%}" if share < 0.1 else f"{share:.1%}" for share in shares], padding=3, fontsize=9)
    panel.set_ylim(max(4, len(bars)) - 0.5, -0.5)
    panel.set(title=title, xticks=[], xlim=(0, 1.18 * max(shares, default=1) or 1))
    panel.spines[["top", "right", "bottom"]].set_visible(False)
