"""Text -> train.bin, val.bin, test.bin, tokenizer.json, meta.json: the data directory that train.py and evaluate.py read.

python prepare_data.py --sample
python prepare_data.py --input data1.txt data2.txt --output ./data
python prepare_data.py --input stories/ --tokenizer bpe --vocab_size 4096 --output ./data_stories
python prepare_data.py --dataset roneneldan/TinyStories --tokenizer bpe --vocab_size 4096
"""

from utils import needs_packages, notice, read_command_line, run_script

with needs_packages():
    import collections
    import concurrent.futures
    import hashlib
    import itertools
    import os
    import sys
    from collections.abc import Callable, Iterable, Iterator
    from dataclasses import dataclass
    from pathlib import Path

    import numpy as np
    from tqdm import tqdm

    import sample_corpus
    from text_sources import HubSplit, TextFile, find_files, first_bytes, open_dataset
    from token_files import DTYPE, DataDirectoryWriter
    from tokenizer_kinds import make_tokenizer
    from tokenizers_io import EOT, KINDS, TextTokenizer, load_tokenizer

SAMPLE_VOCAB_SIZE = 1500
SAMPLE_TRAIN_BYTES = 4_000_000  # enough to see every word of the grammar many times
POSITION_BELOW = 100  # fewer documents than this are split by position
BATCH_BYTES = 2**20


@dataclass(frozen=True)
class Arguments:
    """Flags of prepare_data.py."""

    sample: bool = False
    """Make the sample corpus from data/sample_grammar.json: no input, no network."""
    input: tuple[str, ...] = ()
    """Text files (UTF-8), directories (their *.txt files) or globs. Documents are separated by <|endoftext|> or --separator."""
    dataset: str | None = None
    """A dataset of the Hugging Face hub, e.g. roneneldan/TinyStories, or a local dataset folder; column --text_field."""
    val_input: tuple[str, ...] = ()
    """Files that make up the validation split; none is then carved from the rest."""
    test_input: tuple[str, ...] = ()
    """Files that make up the test split; none is then carved from the rest."""
    output: str = "./data"
    """The data directory to write. What it held is replaced once all is complete; other files in it stay."""
    tokenizer: str | None = None
    """gpt2, bpe (byte-level, trained on this text), byte, char, or a tokenizer.json. Default: gpt2; bpe for --sample."""
    vocab_size: int | None = None
    """Number of tokens of a trained tokenizer. Default: 4096; 1500 for --sample."""
    separator: str = EOT
    """What stands between two documents in a text file."""
    text_field: str = "text"
    """Column of --dataset that holds the text."""
    val_fraction: float = 0.05
    """Share of documents for validation."""
    test_fraction: float = 0.05
    """Share of documents for the test split."""
    split: str = "auto"
    """hash (by each document's content), position (each document's end goes to val and test), or auto: position below 100 documents."""
    train_bytes: int | None = None
    """A trained tokenizer sees at most this much of the training text, from its beginning. Default: 100 MB; 4 MB for --sample."""
    sample_stories: int = 20_000
    """Training stories of --sample; val and test get a twentieth each."""
    seed: int = 1337
    """Seed of the split and of the sample corpus."""
    num_workers: int | None = None
    """Processes that encode. The result is the same for any number. Default: one per core for inputs that are worth it."""

    def __post_init__(self):
        problems = []
        if sum((self.sample, bool(self.input), self.dataset is not None)) != 1:
            problems.append("give exactly one of --sample, --input FILE... and --dataset NAME")
        if self.sample and (self.val_input or self.test_input):
            problems.append("--sample makes its own validation and test splits; leave --val_input and --test_input out")
        if min(self.val_fraction, self.test_fraction) <= 0 or self.val_fraction + self.test_fraction >= 1:
            problems.append(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} must be above 0 and add up to less than 1"
            )
        if self.split not in ("auto", "hash", "position"):
            problems.append(f"split={self.split!r} is unknown; take auto, hash or position")
        if not self.separator:
            problems.append("separator='' must not be empty")
        for name in ("vocab_size", "train_bytes", "sample_stories", "num_workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1")
        if self.sample and self.sample_stories < 20:
            problems.append(f"sample_stories={self.sample_stories} must be at least 20, so that val and test get one")
        if problems:
            raise ValueError("; ".join(problems))


# ---------------------------------------------------------------- splits


def split_by_hash(text: str, key: bytes, val_fraction: float, test_fraction: float) -> str:
    """The split of a document, from its content and the seed alone: the same wherever, and in whatever order, it is found."""
    share = int.from_bytes(hashlib.blake2b(text.encode(), key=key, digest_size=8).digest(), "big") / 2**64
    return "val" if share < val_fraction else "test" if share < val_fraction + test_fraction else "train"


def split_by_position(text: str, val_fraction: float, test_fraction: float) -> Iterator[tuple[str, str]]:
    """A document's beginning for train, its end for val and test, cut at line ends where it has lines, else between words."""
    cuts = [0]
    for share in (1 - val_fraction - test_fraction, 1 - test_fraction):
        wanted = round(len(text) * share)
        space = max(text.find("\n", wanted), text.find(" ", wanted) if "\n" not in text[wanted:] else -1)
        cuts.append(max(cuts[-1], space + 1 if space >= 0 else wanted))
    for split, start, end in zip(("train", "val", "test"), cuts, [*cuts[1:], len(text)]):
        if text[start:end].strip():
            yield split, text[start:end]


class Corpus:
    """All documents with their splits, in a fixed order; can be read several times.

    sources: what is read, by the split it belongs to, or by None where documents are to be divided. rule: hash or position.
    """

    def __init__(self, args: Arguments):
        self.args = args
        self.sources: list[tuple[str | None, TextFile | HubSplit]] = []
        if args.dataset is not None:
            splits = open_dataset(args.dataset, args.text_field)
            self.sources += [(None, splits["train"])]
            if "validation" in splits and not args.val_input:
                self.sources += [("val", splits["validation"])]
            if "test" in splits and not args.test_input:
                self.sources += [("test", splits["test"])]
        self.sources += [(None, file) for file in find_files(args.input, args.separator)]
        self.sources += [("val", file) for file in find_files(args.val_input, args.separator)]
        self.sources += [("test", file) for file in find_files(args.test_input, args.separator)]
        files = [source.path.resolve() for _, source in self.sources if isinstance(source, TextFile)]
        twice = sorted({str(path) for path in files if files.count(path) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} would be in two splits; leave it out of --input, --val_input or --test_input")
        given = {split for split, _ in self.sources}
        self.fractions = [0.0 if "val" in given else args.val_fraction, 0.0 if "test" in given else args.test_fraction]
        few = len(list(itertools.islice(self.undivided(), POSITION_BELOW))) < POSITION_BELOW
        self.rule = args.split if args.split != "auto" else "position" if few else "hash"
        if args.split == "auto" and few and any(self.fractions):
            notice(
                f"fewer than {POSITION_BELOW} documents: each is split by position, its end for val and test; --split hash keeps them whole"
            )

    def undivided(self) -> Iterator[str]:
        return itertools.chain.from_iterable(source for split, source in self.sources if split is None)

    def documents(self) -> Iterator[tuple[str, str]]:
        """(split, text) of every document."""
        key = str(self.args.seed).encode()
        for given, source in self.sources:
            for text in source:
                if given is not None:
                    yield given, text
                elif self.rule == "position":
                    yield from split_by_position(text, *self.fractions)
                else:
                    yield split_by_hash(text, key, *self.fractions), text

    def describe(self) -> dict:
        names = ("val_fraction", "test_fraction")
        return {
            "sources": [source.describe() | ({"split": split} if split else {}) for split, source in self.sources],
            "split": {"rule": self.rule} | dict(zip(names, self.fractions)),
            "seed": self.args.seed,
        }

    @property
    def total_bytes(self) -> int:
        return sum(source.size for _, source in self.sources)


class SampleCorpus:
    """The sample corpus: three independent seeded streams of stories, and the bits of each story under the grammar."""

    rule = "sample"

    def __init__(self, args: Arguments):
        self.args = args
        self.grammar = sample_corpus.load_grammar()
        self.stories = {"train": args.sample_stories, "val": args.sample_stories // 20, "test": args.sample_stories // 20}
        self.total_bytes = 770 * sum(self.stories.values())  # for the progress bar: the mean length of a story

    def documents(self) -> Iterator[tuple[str, str]]:
        self.bits: dict[str, list[float]] = {split: [] for split in self.stories}
        for split, count in self.stories.items():
            for text, log2p in sample_corpus.stories(self.grammar, self.args.seed, split, count):
                self.bits[split].append(-log2p)
                yield split, text

    def describe(self) -> dict:
        digest = hashlib.sha256(sample_corpus.GRAMMAR_PATH.read_bytes()).hexdigest()
        return {
            "sources": [{"name": "data/sample_grammar.json", "bytes": sample_corpus.GRAMMAR_PATH.stat().st_size, "sha256": digest}],
            "split": {"rule": self.rule} | self.stories,
            "seed": self.args.seed,
            "sample": {"grammar_sha256": digest},
        }


# ---------------------------------------------------------------- encoding


def encode_batch(tokenizer: TextTokenizer, batch: list[tuple[str, str]]) -> list[tuple[str, bytes, int, int]]:
    """(split, text) pairs -> per run of equal splits: (split, uint16 ids with an EOT behind each document, documents, UTF-8 bytes)."""
    result = []
    for split, group in itertools.groupby(batch, key=lambda pair: pair[0]):
        ids, documents, n_bytes = [], 0, 0
        for _, text in group:
            ids += tokenizer.encode(text)
            ids.append(tokenizer.eot_id)
            documents += 1
            n_bytes += len(text.encode())
        result.append((split, np.array(ids, dtype=DTYPE).tobytes(), documents, n_bytes))
    return result


_worker_tokenizer: TextTokenizer | None = None


def start_worker(tokenizer_json: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = TextTokenizer(tokenizer_json)


def encode_in_worker(batch: list[tuple[str, str]]) -> list[tuple[str, bytes, int, int]]:
    return encode_batch(_worker_tokenizer, batch)


def batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents in lists of about a megabyte."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(documents: Iterable[tuple[str, str]], tokenizer: TextTokenizer, workers: int) -> Iterator[tuple[str, bytes, int, int]]:
    """All documents encoded, in order, by this process or by `workers` others; reads only a few batches ahead."""
    if workers == 1:
        for batch in batches(documents):
            yield from encode_batch(tokenizer, batch)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tokenizer.json,)) as pool:
        pending: collections.deque = collections.deque()
        for batch in batches(documents):
            pending.append(pool.submit(encode_in_worker, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


# ---------------------------------------------------------------- the stage


def made_with(args: Arguments) -> dict:
    """The choices that, with the sources' contents, determine the token files."""
    kind = args.tokenizer or ("bpe" if args.sample else "gpt2")
    vocab_size = (args.vocab_size or (SAMPLE_VOCAB_SIZE if args.sample else 4096)) if kind == "bpe" else None
    return {"tokenizer": kind, "vocab_size": vocab_size, "train_bytes": args.train_bytes, "separator": args.separator, "split": args.split}


def choose_tokenizer(args: Arguments, documents: Callable[[], Iterator[tuple[str, str]]]) -> TextTokenizer:
    kind, asked = (made_with(args)[key] for key in ("tokenizer", "vocab_size"))
    if kind != "bpe" and (args.vocab_size or args.train_bytes):
        notice(f"--vocab_size and --train_bytes have no effect with the {kind} tokenizer")
    if args.dataset is None and args.text_field != "text":
        notice("--text_field has no effect without --dataset")
    limit = args.train_bytes or (SAMPLE_TRAIN_BYTES if args.sample else 100_000_000)
    tokenizer = make_tokenizer(kind, first_bytes((text for split, text in documents() if split == "train"), limit), asked)
    if kind == "bpe" and tokenizer.vocab_size < asked:
        notice(f"the text gives only {tokenizer.vocab_size} tokens of the {asked} asked for")
    return tokenizer


def prepare(args: Arguments) -> dict:
    """Run the whole stage; returns the written meta.json. Raises ValueError, OSError; then the output is what it was before."""
    if args.tokenizer not in (None, *KINDS):
        load_tokenizer(args.tokenizer)  # a mistyped name should fail before the text is read
    corpus = SampleCorpus(args) if args.sample else Corpus(args)
    tokenizer = choose_tokenizer(args, corpus.documents)
    small = 0 < corpus.total_bytes < 8 * 2**20  # 0: a dataset, whose size isn't known
    workers = args.num_workers or (1 if small else min(8, os.cpu_count() or 1))
    with (
        DataDirectoryWriter(Path(args.output)) as writer,
        tqdm(desc="encoding", total=corpus.total_bytes or None, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for split, data, documents, n_bytes in encode_all(corpus.documents(), tokenizer, workers):
            writer.add(split, np.frombuffer(data, DTYPE), documents, n_bytes)
            bar.update(n_bytes)
        meta, floor = corpus.describe() | {"made_with": made_with(args), "cleaning": {}}, None
        if isinstance(corpus, SampleCorpus):
            floor = {split: corpus.bits[split] for split in ("val", "test")}  # on train a model may honestly go below
            if tokenizer.loss_reason is None and tokenizer.unknown_id is None:
                meta["sample"]["floor_bits_per_byte"] = {s: sum(bits) / writer.counts[s]["bytes"] for s, bits in corpus.bits.items()}
            else:
                floor = None  # a model that may ignore what it can't spell could go below the floor
        return writer.commit(tokenizer, meta, floor)


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    meta = prepare(args)
    print(f"{args.output}: {meta['vocab_size']} token ids, tokenizer {meta['tokenizer_sha256'][:12]}")
    for split, counts in meta["splits"].items():
        line = f"  {split:5} {counts['tokens']:>13,} tokens {counts['documents']:>9,} documents {counts['bytes']:>13,} bytes"
        print(f"{line}  {counts['bytes'] / counts['tokens']:.2f} bytes/token")
    if "floor_bits_per_byte" in meta.get("sample", {}):
        floors = ", ".join(f"{split} {meta['sample']['floor_bits_per_byte'][split]:.4f}" for split in ("val", "test"))
        print(f"  a perfect model of these stories: {floors} bits/byte")
    print(f"next: python train.py{'' if args.output == './data' else ' --data_dir ' + args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
