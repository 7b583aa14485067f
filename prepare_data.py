"""Text -> train.bin, val.bin, test.bin, tokenizer.json, meta.json: the data directory that train.py and evaluate.py read.

python prepare_data.py --sample
python prepare_data.py --input data1.txt data2.jsonl.gz --output ./data
python prepare_data.py --input stories/:0.7 books/:0.3 --max_tokens 10000000 --tokenizer bpe --output ./data_mixed
python prepare_data.py --dataset roneneldan/TinyStories --max_documents 100000 --tokenizer bpe
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from utils import Checked, Count, Fraction01, Seed, notice, parse_weighted, read_command_line, run_script

from annotated_types import Ge, Gt, Lt
from tqdm import tqdm

from formats.data_directory import ENTROPY, META, SPLITS, DataDirectory, DataDirectoryWriter
from formats.tokenizer import KINDS, TextTokenizer, load_tokenizer
from preparation import portrait
from preparation.cleaning import Cleaning, Splitting
from preparation.corpus import SAMPLE_CLEANING, Corpus, Limits, open_corpus, open_sample_corpus
from preparation.encoding import LOST, DocumentEncoder, Recipe
from preparation.selection import Selection, largest_mixture
from preparation.sources import Format, find_files
from preparation.tokenizer_kinds import TRAINED, make_tokenizer, text_normalizer

SAMPLE_VOCAB_SIZE = 1500
SAMPLE_TRAIN_BYTES = 4_000_000  # enough to see every word of the grammar many times
VOCAB_SIZE = 4096
TRAIN_BYTES = 50_000_000
SMALL = 4 * 2**20  # bytes; for less, starting processes takes longer than it saves
SplitFraction = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True)
class Arguments(Checked):
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
    vocab_size: Count | None = None
    """Number of tokens of a trained tokenizer (bpe, wordpiece, word). Default: 4096; 1500 for --sample."""
    form: Format = dataclasses.field(default_factory=Format)
    max_documents: Count | None = None
    """No split gets more documents than this; reading stops when train has them."""
    max_bytes: Count | None = None
    """No split gets more UTF-8 bytes of text than this; the last document is cut off."""
    max_tokens: Count | None = None
    """No split gets more tokens than this; the last document is cut off, so that variants have equal budgets."""
    val_fraction: SplitFraction = 0.05
    """Share of documents for validation."""
    test_fraction: SplitFraction = 0.05
    """Share of documents for the test split."""
    split: Literal["auto", "hash", "position"] = "auto"
    """hash (by each document's content), position (each document's end goes to val and test), or auto: position below 100 documents."""
    shuffle_words: Fraction01 = 0.0
    """Shuffle the words of this share of the training documents, chosen by content: a controlled corruption, for studies. Not val, test."""
    train_bytes: Count | None = None
    """A trained tokenizer learns from a sample of at most this much of the training text. Default: 50 MB; 4 MB for --sample."""
    sample_stories: Annotated[int, Ge(20)] = 20_000
    """Training stories of --sample; val and test get a twentieth each."""
    seed: Seed = 1337
    """Seed of the split and of the sample corpus."""
    num_workers: Count | None = None
    """Processes that encode. The result is the same for any number. Default: one per core for inputs that are worth it."""
    report: bool = True
    """Write data_report.json and data_report.png, a portrait of the data, beside the token files."""
    cleaning: Cleaning = dataclasses.field(default_factory=Cleaning)

    def problems(self) -> list[str]:
        problems = []
        if self.sample + bool(self.input or self.dataset) != 1:
            problems.append("give exactly one of --sample, --input FILE... and --dataset NAME (the last two may be mixed)")
        unfit = [name for name in ("val_input", "test_input", "max_documents", "max_bytes", "max_tokens") if getattr(self, name)]
        unfit += [field.name for field in dataclasses.fields(Cleaning) if getattr(self.cleaning, field.name) != field.default]
        if self.sample and unfit:
            problems.append(f"--sample makes its own splits, of --sample_stories stories as they are; leave --{' --'.join(unfit)} out")
        if self.val_fraction + self.test_fraction >= 1:
            problems.append(f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} must add up to less than 1")
        if self.dataset_config is not None and len(self.dataset) != 1:
            problems.append("--dataset_config belongs to one --dataset")
        return problems

    @property
    def kind(self) -> str:
        """The tokenizer's kind, or its path."""
        return self.tokenizer or ("bpe" if self.sample else "gpt2")


def prepare(args: Arguments, tokenizer: TextTokenizer | None = None) -> dict:
    """Run the whole stage; returns the written meta.json. Raises ValueError, OSError; then the output is what it was before.

    tokenizer: what the path `args.tokenizer` is going to hold, where it is not written yet.
    """
    if args.kind not in KINDS and tokenizer is None:
        load_tokenizer(args.kind)  # a mistyped name should fail before the text is read
    corpus = find_corpus(args)
    with DataDirectoryWriter(Path(args.output), corpus.files) as writer:
        return encode(args, corpus, tokenizer or choose_tokenizer(args, corpus), writer)


def encode(args: Arguments, corpus: Corpus, tokenizer: TextTokenizer, writer: DataDirectoryWriter) -> dict:
    """All documents of the corpus into the data directory, which is complete then; returns its meta.json. Raises ValueError, OSError."""
    total = corpus.total_bytes
    workers = args.num_workers or (1 if total is not None and total < SMALL else min(8, os.cpu_count() or 1))
    selection = Selection(tokenizer, corpus.cleaning.deduplicate)
    with (
        DocumentEncoder(Recipe(tokenizer, corpus.cleaning, corpus.seed, args.shuffle_words), workers) as encoder,
        tqdm(desc="encoding", total=total, unit="B", unit_scale=True, disable=None) as bar,
    ):
        if corpus.weights and corpus.limits == Limits():
            corpus = dataclasses.replace(corpus, limits=largest_mixture(corpus, encoder))
        for group in corpus.groups:
            selection.start(group, corpus.limits_of(group))
            for encoded in encoder.encode(group, selection.limits.documents, selection.wanted):
                for kept in selection.keep(encoded):
                    writer.add(*kept)
                bar.update(int(encoded.bytes.sum()))
                if selection.full:
                    break
            selection.check_share()
        writer.check()
        return writer.commit(tokenizer, *describe(args, corpus, selection, writer))


def find_corpus(args: Arguments) -> Corpus:
    if args.sample:
        return open_sample_corpus(args.seed, args.sample_stories)
    named = {"input": args.input, "dataset": args.dataset, "val": args.val_input, "test": args.test_input}
    splitting = Splitting(args.split, args.seed, args.val_fraction, args.test_fraction)
    limits = Limits(*(limit or math.inf for limit in (args.max_documents, args.max_bytes, args.max_tokens)))
    return open_corpus(named, args.form, splitting, args.cleaning, limits, args.dataset_config)


def choose_tokenizer(args: Arguments, corpus: Corpus) -> TextTokenizer:
    if args.kind not in TRAINED and (args.vocab_size or args.train_bytes):
        notice(f"--vocab_size and --train_bytes have no effect with the {args.kind} tokenizer")
    lowercase, nfc, asked = args.cleaning.lowercase, args.cleaning.nfc, recorded(args)["made_with"]["vocab_size"]
    limit = args.train_bytes or (SAMPLE_TRAIN_BYTES if args.sample else TRAIN_BYTES)
    return make_tokenizer(args.kind, corpus.training_texts(text_normalizer(lowercase, nfc), limit), asked, lowercase, nfc)


def recorded(args: Arguments) -> dict:
    """The choices that, with the sources' contents, determine the token files, as meta.json records them."""
    names = ("train_bytes", "separator", "split", "text_field", "errors", "max_documents", "max_bytes", "max_tokens")
    values = vars(args) | vars(args.form)
    vocab_size = (args.vocab_size or (SAMPLE_VOCAB_SIZE if args.sample else VOCAB_SIZE)) if args.kind in TRAINED else None
    choices = {"tokenizer": args.kind, "vocab_size": vocab_size} | {name: values[name] for name in names}
    if args.shuffle_words:
        choices["shuffle_words"] = args.shuffle_words
    cleaning = SAMPLE_CLEANING if args.sample else args.cleaning
    return {"made_with": choices, "cleaning": dataclasses.asdict(cleaning), "seed": args.seed}


def content_of(args: Arguments) -> list:
    """All that determines the token files, but for the tokenizer where it is a file's: the choices, and what the sources hold in place of
    their names. Datasets of the hub count by their names. Raises FileNotFoundError, ValueError.
    """

    def digests(*names: str) -> list[str]:
        return [file.describe()["sha256"] for file in find_files(names, args.form)]

    choices = recorded(args)
    choices["made_with"]["tokenizer"] = args.kind if args.kind in KINDS else None
    others = {name: getattr(args, name) for name in ("val_fraction", "test_fraction", "sample_stories", "dataset", "dataset_config")}
    inputs = [(digests(name), str(weight)) for name, weight in map(parse_weighted, args.input)]
    grammar = find_corpus(args).describe()["sample"] if args.sample else None
    return [choices, others, inputs, digests(*args.val_input), digests(*args.test_input), grammar]


def describe(args: Arguments, corpus: Corpus, selection: Selection, writer: DataDirectoryWriter) -> tuple[dict, dict[str, bytes]]:
    """What meta.json says of this corpus, and the contents of entropy.json and of the portrait."""
    tokenizer, counts, files = selection.tokenizer, dict(sorted((+selection.counts).items())), {}
    meta = corpus.describe() | recorded(args) | {"counts": counts}
    if tokenizer.unknown_id is not None:
        meta["unknown_tokens"] = selection.unknown
    if args.sample and tokenizer.loss_reason is None and tokenizer.unknown_id is None:
        bits = {group.split: group.sources[0].bits for group in corpus.groups}
        meta["sample"]["entropy_bits_per_byte"] = {split: sum(bits[split]) / writer.counts[split]["bytes"] for split in SPLITS}
        files[ENTROPY] = json.dumps({split: bits[split] for split in ("val", "test")}).encode()  # on train a model may honestly go below
    if args.report:
        report = portrait.describe(selection.document_sizes(), writer.read, tokenizer, writer.counts, counts)
        files |= portrait.files(report, Path(args.output).resolve().name)
    return meta, files


def is_prepared(args: Arguments) -> bool:
    """Whether the output holds already what these arguments would make of a single input file of the same content."""
    output = Path(args.output)
    if not (output / META).is_file() or len(args.input) != 1 or not Path(args.input[0]).is_file():
        return False
    meta = DataDirectory(output).meta
    with open(args.input[0], "rb") as file:
        same_source = [source.get("sha256") for source in meta.get("sources", ())] == [hashlib.file_digest(file, "sha256").hexdigest()]
    return same_source and recorded(args).items() <= meta.items()


def tell(meta: dict) -> None:
    """What people should know about the prepared data, beyond the table."""
    counts = meta["counts"]
    dropped = [f"{counts[name]:,} {name}" for name in counts if not name.startswith("contain")]
    if dropped:
        print(f"  dropped or changed: {', '.join(dropped)}")
    if LOST in counts:
        notice(f"warning: {counts[LOST]:,} documents {LOST}, and no model learns what is lost; bpe and byte lose nothing")
    odd = {"contain NUL": "NUL characters; --remove_control removes them", "contain CR": "CR line ends; --whitespace mends them"}
    for name, what in odd.items():
        if name in counts:
            notice(f"{counts[name]:,} documents have {what}")
    for split, unknown in meta.get("unknown_tokens", {}).items():
        if unknown:
            share = unknown / meta["splits"][split]["tokens"]
            notice(f"warning: {unknown:,} tokens of {split} ({share:.2%}) are unknown to the tokenizer; bpe and byte know every text")


@contextlib.contextmanager
def advice_for(flags: Collection[str]) -> Iterator[None]:
    """For a script that prepares text itself, but has other `flags`: errors that name further ones say whose they are."""
    try:
        yield
    except ValueError as error:
        lacking = [flag for flag in re.findall(r"--\w+", str(error)) if flag.removeprefix("--") not in flags]
        if not lacking:
            raise
        raise ValueError(f"{error} ({', '.join(lacking)}: of prepare_data.py, whose --output is then given as --data_dir)") from None


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    meta = prepare(args)
    print(f"{args.output}: {meta['vocab_size']} token ids, tokenizer {meta['tokenizer_sha256'][:12]}")
    for split, counts in meta["splits"].items():
        line = f"  {split:5} {counts['tokens']:>13,} tokens {counts['documents']:>9,} documents {counts['bytes']:>13,} bytes"
        print(f"{line}  {counts['bytes'] / counts['tokens']:.2f} bytes/token")
    if "entropy_bits_per_byte" in meta.get("sample", {}):
        entropies = ", ".join(f"{split} {meta['sample']['entropy_bits_per_byte'][split]:.4f}" for split in ("val", "test"))
        print(f"  a perfect model of these stories: {entropies} bits/byte")
    tell(meta)
    print(f"next: python train.py{'' if args.output == './data' else ' --data_dir ' + args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
