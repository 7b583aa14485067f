"""Text -> train.bin, val.bin, test.bin, tokenizer.json, meta.json: the data directory that train.py and evaluate.py read.

python prepare_data.py --sample
python prepare_data.py --input data1.txt data2.jsonl.gz --output ./data
python prepare_data.py --input stories/:0.7 books/:0.3 --max_tokens 10000000 --tokenizer bpe --output ./data_mixed
python prepare_data.py --dataset roneneldan/TinyStories --max_documents 100000 --tokenizer bpe
"""

import dataclasses
import io
import json
import math
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats.data_directory import FLOOR, PICTURE, REPORT, SPLITS, DataDirectoryWriter
from formats.tokenizer import EOT, KINDS, TextTokenizer, load_tokenizer
from preparation import portrait as data_report
from preparation.cleaning import Cleaning, KeySet
from preparation.corpus import Corpus, Group, Limits, SampleCorpus, Splitting
from preparation.encoding import DocumentEncoder, Encoded, Recipe
from preparation.sources import Format
from preparation.tokenizer_kinds import TRAINED, make_tokenizer, text_normalization
from utils import notice, read_command_line, run_script

SAMPLE_VOCAB_SIZE = 1500
SAMPLE_TRAIN_BYTES = 4_000_000  # enough to see every word of the grammar many times
VOCAB_SIZE = 4096
TRAIN_BYTES = 50_000_000
SMALL = 4 * 2**20  # bytes; for less, starting processes takes longer than it saves


@dataclass(frozen=True)
class Arguments:
    """Flags of prepare_data.py."""

    sample: bool = False
    """Make the sample corpus from data/sample_grammar.json: no input, no network."""
    input: tuple[str, ...] = ()
    """Files, directories or globs: text, .jsonl, .json, .csv, .parquet, each also .gz, .bz2, .xz, .zst. PATH:0.7 mixes by weight."""
    dataset: tuple[str, ...] = ()
    """Datasets of the Hugging Face hub, e.g. roneneldan/TinyStories, or local dataset folders, streamed; also NAME:WEIGHT."""
    dataset_config: str | None = None
    """The configuration of --dataset, where it has several."""
    val_input: tuple[str, ...] = ()
    """Files that make up the validation split; none is then carved from the rest."""
    test_input: tuple[str, ...] = ()
    """Files that make up the test split; none is then carved from the rest."""
    output: str = "./data"
    """The data directory to write. What it held is replaced once all is complete; other files in it stay."""
    tokenizer: str | None = None
    """gpt2, bpe, wordpiece, word, char, byte, or a tokenizer.json. Default: gpt2; bpe for --sample."""
    vocab_size: int | None = None
    """Number of tokens of a trained tokenizer (bpe, wordpiece, word). Default: 4096; 1500 for --sample."""
    separator: str = EOT
    """What stands between two documents in a text file."""
    text_field: str = "text"
    """Key or column that holds the text, in files that have such, and of --dataset."""
    errors: str = "strict"
    """What is not UTF-8: strict ends with file and byte, replace reads on with U+FFFD in its place and counts."""
    max_documents: int | None = None
    """No split gets more documents than this; reading stops when train has them."""
    max_bytes: int | None = None
    """No split gets more UTF-8 bytes of text than this; the last document is cut off."""
    max_tokens: int | None = None
    """No split gets more tokens than this; the last document is cut off, so that variants have equal budgets."""
    val_fraction: float = 0.05
    """Share of documents for validation."""
    test_fraction: float = 0.05
    """Share of documents for the test split."""
    split: str = "auto"
    """hash (by each document's content), position (each document's end goes to val and test), or auto: position below 100 documents."""
    train_bytes: int | None = None
    """A trained tokenizer learns from a sample of at most this much of the training text. Default: 50 MB; 4 MB for --sample."""
    sample_stories: int = 20_000
    """Training stories of --sample; val and test get a twentieth each."""
    seed: int = 1337
    """Seed of the split and of the sample corpus."""
    num_workers: int | None = None
    """Processes that encode. The result is the same for any number. Default: one per core for inputs that are worth it."""
    report: bool = True
    """Write data_report.json and data_report.png, a portrait of the data, beside the token files."""
    cleaning: Cleaning = dataclasses.field(default_factory=Cleaning)

    def __post_init__(self):
        problems = []
        if self.sample + bool(self.input or self.dataset) != 1:
            problems.append("give exactly one of --sample, --input FILE... and --dataset NAME (the last two may be mixed)")
        unfit = [name for name in ("val_input", "test_input", "max_documents", "max_bytes", "max_tokens") if getattr(self, name)]
        unfit += [field.name for field in dataclasses.fields(Cleaning) if getattr(self.cleaning, field.name) != field.default]
        if self.sample and unfit:
            problems.append(f"--sample makes its own splits, of --sample_stories stories as they are; leave --{' --'.join(unfit)} out")
        if min(self.val_fraction, self.test_fraction) <= 0 or self.val_fraction + self.test_fraction >= 1:
            problems.append(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} must be above 0 and add up to less than 1"
            )
        for name, values in (("split", ("auto", "hash", "position")), ("errors", ("strict", "replace"))):
            if getattr(self, name) not in values:
                problems.append(f"{name}={getattr(self, name)!r} is unknown; take {', '.join(values[:-1])} or {values[-1]}")
        if not self.separator:
            problems.append("separator='' must not be empty")
        for name in ("vocab_size", "train_bytes", "sample_stories", "num_workers", "max_documents", "max_bytes", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1")
        if self.sample and self.sample_stories < 20:
            problems.append(f"sample_stories={self.sample_stories} must be at least 20, so that val and test get one")
        if self.dataset_config is not None and len(self.dataset) != 1:
            problems.append("--dataset_config belongs to one --dataset")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def kind(self) -> str:
        return self.tokenizer or ("bpe" if self.sample else "gpt2")


# ---------------------------------------------------------------- what is kept


class Selection:
    """Decides, in the order of reading, which documents are kept: none twice, none in train that is held out, no more than the limits."""

    def __init__(self, tokenizer: TextTokenizer, deduplicate: bool):
        self.tokenizer, self.deduplicate = tokenizer, deduplicate
        self.seen, self.held_out = KeySet(), KeySet()
        self.counts: Counter = Counter()
        self.unknown = dict.fromkeys(SPLITS, 0)
        self.sizes: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}  # tokens of each document

    def start(self, group: Group, limits: Limits) -> None:
        """What follows belongs to this group."""
        self.group = group
        self.left = {s: [math.inf if v is None else v for v in (limits.documents, limits.bytes, limits.tokens)] for s in SPLITS}
        self.taken = 0  # train tokens of this group
        self.full = False

    def wanted(self) -> float:
        """How many more documents can be used at most."""
        return 0 if self.full else self.left[self.group.split or "train"][0]

    def keep(self, encoded: Encoded) -> list[tuple[str, np.ndarray, int, int]]:
        """What is kept of some documents: (split, ids, documents, UTF-8 bytes)."""
        fresh = self.seen.fresh(encoded.keys) if self.deduplicate else np.ones(len(encoded.keys), bool)
        leaked = self.held_out.contains(encoded.keys) if self.group.split is None else np.zeros(len(fresh), bool)
        ok = (fresh & ~leaked)[encoded.document]
        used = self._documents_until_full(encoded, ok)
        ok &= encoded.document < used
        self.counts += encoded.counts
        self.counts["in val or test already"] += int(leaked[:used].sum())
        self.counts["duplicates"] += int((~fresh & ~leaked)[:used].sum())
        if self.deduplicate:
            self.seen.add(encoded.keys[:used][fresh[:used]])
        if self.group.split in ("val", "test"):
            self.held_out.add(encoded.keys[:used][~self.held_out.contains(encoded.keys[:used])])
        kept = []
        for i, split in enumerate(SPLITS):
            mine = ok & (encoded.split == i)
            if mine.any():
                ids = encoded.ids if mine.all() else encoded.ids[np.repeat(mine, encoded.tokens)]
                kept.append((split, *self._fit(split, ids, encoded.tokens[mine], encoded.bytes[mine])))
        for split, ids, *_ in kept:
            self.sizes[split].append(np.diff(np.flatnonzero(ids == self.tokenizer.eot_id), prepend=-1).astype(np.int32))
            if self.tokenizer.unknown_id is not None:
                self.unknown[split] += int((ids == self.tokenizer.unknown_id).sum())
        return kept

    def _documents_until_full(self, encoded: Encoded, ok: np.ndarray) -> int:
        """How many of the documents are looked at before the split that ends the group is full: all of them if it stays open."""
        split = self.group.split or "train"
        mine = ok & (encoded.split == SPLITS.index(split))
        have = (np.arange(1, mine.sum() + 1), np.cumsum(encoded.bytes[mine]), np.cumsum(encoded.tokens[mine]))
        last = min(int(np.searchsorted(values, most)) for values, most in zip(have, self.left[split]))
        self.full = last < mine.sum()
        return int(encoded.document[mine][last]) + 1 if self.full else len(encoded.keys)

    def _fit(self, split: str, ids: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, int, int]:
        """As much of these documents as the split may still get: (ids, documents, bytes)."""
        left = self.left[split]
        ends = np.cumsum(tokens)
        whole = int(min(len(tokens), left[0], np.searchsorted(np.cumsum(sizes), left[1], "right"), np.searchsorted(ends, left[2], "right")))
        end, size, documents = int(ends[whole - 1]) if whole else 0, int(sizes[:whole].sum()), whole
        kept = ids[:end]
        if whole < len(tokens):
            if whole < left[0] and size < left[1] and end < left[2]:
                head, n_bytes = self._cut(ids[end : end + int(tokens[whole]) - 1], left[2] - end, left[1] - size)
                if n_bytes:
                    kept, size, documents = np.concatenate([kept, head]), size + n_bytes, documents + 1
                    self.counts["cut off at the limit"] += 1
            self.left[split] = [0, 0, 0]
        else:
            self.left[split] = [have - used for have, used in zip(left, (documents, size, end))]
        self.taken += len(kept) * (split == "train")
        return kept, documents, size

    def _cut(self, ids: np.ndarray, most_tokens: float, most_bytes: float) -> tuple[np.ndarray, int]:
        """The beginning of a document's ids with an EOT, cut between characters, and the UTF-8 bytes of its text."""
        decode, ids = self.tokenizer.decode, ids[: int(min(len(ids), most_tokens - 1))]
        if most_bytes < math.inf:
            ids = np.array(self.tokenizer.encode(decode(ids).encode()[: int(most_bytes)].decode(errors="ignore")), np.uint16)
            ids = ids[: int(min(len(ids), most_tokens - 1))]
        for _ in range(3):  # a character has four bytes at most, and U+FFFD may stand in the text itself
            if len(ids) and decode(ids[-4:]).endswith("\ufffd"):
                ids = ids[:-1]
        return np.append(ids, np.uint16(self.tokenizer.eot_id)), len(decode(ids).encode())


# ---------------------------------------------------------------- the stage


def recorded(args: Arguments) -> dict:
    """The choices that, with the sources' contents, determine the token files, as meta.json records them."""
    names = ("train_bytes", "separator", "split", "text_field", "errors", "max_documents", "max_bytes", "max_tokens")
    vocab_size = (args.vocab_size or (SAMPLE_VOCAB_SIZE if args.sample else VOCAB_SIZE)) if args.kind in TRAINED else None
    choices = {"tokenizer": args.kind, "vocab_size": vocab_size} | {name: getattr(args, name) for name in names}
    cleaning = SampleCorpus.cleaning if args.sample else args.cleaning
    return {"made_with": choices, "cleaning": dataclasses.asdict(cleaning), "seed": args.seed}


def open_corpus(args: Arguments) -> Corpus | SampleCorpus:
    if args.sample:
        return SampleCorpus(args.seed, args.sample_stories)
    return Corpus(
        args.input,
        args.dataset,
        {"val": args.val_input, "test": args.test_input},
        Format(args.separator, args.text_field, args.errors),
        Splitting(args.split, args.seed, args.val_fraction, args.test_fraction),
        args.cleaning,
        Limits(args.max_documents, args.max_bytes, args.max_tokens),
        args.dataset_config,
    )


def choose_tokenizer(args: Arguments, corpus: Corpus | SampleCorpus) -> TextTokenizer:
    if args.kind not in TRAINED and (args.vocab_size or args.train_bytes):
        notice(f"--vocab_size and --train_bytes have no effect with the {args.kind} tokenizer")
    cleaning, asked = args.cleaning, recorded(args)["made_with"]["vocab_size"]
    normalize = text_normalization(cleaning.lowercase, cleaning.nfc)
    limit = args.train_bytes or (SAMPLE_TRAIN_BYTES if args.sample else TRAIN_BYTES)
    tokenizer = make_tokenizer(args.kind, corpus.training_texts(normalize, limit), asked, cleaning.lowercase, cleaning.nfc)
    if asked is not None and tokenizer.vocab_size < asked:
        notice(f"the text gives only {tokenizer.vocab_size} tokens of the {asked} asked for")
    return tokenizer


def largest_mixture(corpus: Corpus, encoder: DocumentEncoder, deduplicate: bool) -> Limits:
    """The most tokens that the sources give in the shares of their weights. Reads and encodes everything once."""
    selection, tokens = Selection(encoder.tokenizer, deduplicate), []
    for group in tqdm(corpus.groups, desc="counting", unit="source", disable=None):
        selection.start(group, Limits())
        for encoded in encoder.encode(group, None, selection.wanted):
            selection.keep(encoded)
        if group.split is None:
            tokens.append(selection.taken)
    shares = [weight / sum(corpus.weights) for weight in corpus.weights]
    return Limits(tokens=int(min(Fraction(count) / share for count, share in zip(tokens, shares))))


def check_share(corpus: Corpus, selection: Selection, limits: Limits) -> None:
    """A source that ended before its limit: an error where shares are asked for, else a notice."""
    if selection.full or selection.group.split is not None or not limits:
        return
    named = [name for name in ("documents", "bytes", "tokens") if getattr(limits, name) is not None]
    if corpus.weights:
        raise ValueError(
            f"{selection.group.name} ended before its share of --max_{named[0]}, {getattr(limits, named[0]):,}; lower it, or leave it out: "
            "then the mixture gets as large as the sources allow"
        )
    notice(f"the sources end before --max_{' and --max_'.join(named)}: train has {selection.taken:,} tokens")


def portrait(selection: Selection, writer: DataDirectoryWriter, counts: dict[str, int], title: str) -> dict[str, bytes]:
    """data_report.json and data_report.png of what was written."""
    sizes = {split: np.concatenate(parts) for split, parts in selection.sizes.items()}
    report = data_report.describe(sizes, writer.read, selection.tokenizer, writer.counts, counts)
    picture = io.BytesIO()
    data_report.draw(report, picture, title)
    return {REPORT: (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode(), PICTURE: picture.getvalue()}


def prepare(args: Arguments) -> dict:
    """Run the whole stage; returns the written meta.json. Raises ValueError, OSError; then the output is what it was before."""
    if args.kind not in KINDS:
        load_tokenizer(args.kind)  # a mistyped name should fail before the text is read
    corpus = open_corpus(args)
    tokenizer = choose_tokenizer(args, corpus)
    total = corpus.total_bytes
    workers = args.num_workers or (1 if total is not None and total < SMALL else min(8, os.cpu_count() or 1))
    selection = Selection(tokenizer, corpus.cleaning.deduplicate)
    with (
        DataDirectoryWriter(Path(args.output)) as writer,
        DocumentEncoder(Recipe(tokenizer.json, corpus.cleaning, corpus.seed), tokenizer, workers) as encoder,
        tqdm(desc="encoding", total=total, unit="B", unit_scale=True, disable=None) as bar,
    ):
        if corpus.weights and not corpus.limits:
            corpus.limits = largest_mixture(corpus, encoder, corpus.cleaning.deduplicate)
        for group in corpus.groups:
            limits = corpus.limits_of(group)
            selection.start(group, limits)
            for encoded in encoder.encode(group, limits.documents, selection.wanted):
                for split, ids, documents, n_bytes in selection.keep(encoded):
                    writer.add(split, ids, documents, n_bytes)
                bar.update(int(encoded.bytes.sum()))
                if selection.full:
                    break
            check_share(corpus, selection, limits)
        counts = dict(sorted((+selection.counts).items()))
        meta = corpus.describe() | recorded(args) | {"counts": counts}
        if tokenizer.unknown_id is not None:
            meta["unknown_tokens"] = selection.unknown
        extra = {}
        if isinstance(corpus, SampleCorpus) and tokenizer.loss_reason is None and tokenizer.unknown_id is None:
            bits = corpus.bits()
            meta["sample"]["floor_bits_per_byte"] = {s: sum(bits[s]) / writer.counts[s]["bytes"] for s in SPLITS}
            extra[FLOOR] = json.dumps({s: bits[s] for s in ("val", "test")}).encode()  # on train a model may honestly go below
        writer.check()
        if args.report:
            extra |= portrait(selection, writer, counts, Path(args.output).resolve().name)
        return writer.commit(tokenizer, meta, extra)


def tell(meta: dict) -> None:
    """What people should know about the prepared data, beyond the table."""
    counts = meta["counts"]
    dropped = [f"{counts[name]:,} {name}" for name in counts if not name.startswith("contain")]
    if dropped:
        print(f"  dropped or changed: {', '.join(dropped)}")
    for name, what in (
        ("contain NUL", "NUL characters; --remove_control removes them"),
        ("contain CR", "CR line ends; --whitespace mends them"),
    ):
        if name in counts:
            notice(f"{counts[name]:,} documents have {what}")
    for split, unknown in meta.get("unknown_tokens", {}).items():
        if unknown:
            share = unknown / meta["splits"][split]["tokens"]
            notice(f"warning: {unknown:,} tokens of {split} ({share:.2%}) are unknown to the tokenizer; bpe and byte know every text")


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was begun is removed on the way out
    meta = prepare(args)
    print(f"{args.output}: {meta['vocab_size']} token ids, tokenizer {meta['tokenizer_sha256'][:12]}")
    for split, counts in meta["splits"].items():
        line = f"  {split:5} {counts['tokens']:>13,} tokens {counts['documents']:>9,} documents {counts['bytes']:>13,} bytes"
        print(f"{line}  {counts['bytes'] / counts['tokens']:.2f} bytes/token")
    if "floor_bits_per_byte" in meta.get("sample", {}):
        floors = ", ".join(f"{split} {meta['sample']['floor_bits_per_byte'][split]:.4f}" for split in ("val", "test"))
        print(f"  a perfect model of these stories: {floors} bits/byte")
    tell(meta)
    print(f"next: python train.py{'' if args.output == './data' else ' --data_dir ' + args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
