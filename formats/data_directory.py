"""Data directories: token files and what describes them, a contract on disk. Doesn't import torch.

A data directory holds train.bin, val.bin, test.bin (raw little-endian uint16 token ids without a header, nanoGPT's format; every
document ends with EOT), tokenizer.json and meta.json, for people data_report.json and .png, and for the sample corpus entropy.json: the
bits of each story under the grammar that wrote it.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils import notice

import numpy as np

from formats.metrics import METRICS
from formats.outputs import (
    check_names,
    check_sources,
    fsync_directory,
    naming,
    peek_json,
    sole_writer,
    write_atomically,
    write_json,
    write_text,
)
from formats.schemas import FORMAT_VERSION, Commit, Entropy, Meta, read_json
from formats.tokenizer import TextTokenizer, gpt2_tokenizer, load_tokenizer

SPLITS = ("train", "val", "test")
COUNTS = ("tokens", "documents", "bytes")  # of a split, as meta.json has them
DTYPE = np.dtype("<u2")
META = "meta.json"
ENTROPY = "entropy.json"
REPORT, PICTURE = "data_report.json", "data_report.png"
COMMIT = "commit.json"
FORMER = "floor.json"  # what entropy.json was called
# in the order of their renaming
OUR_FILES = (*(f"{split}.bin" for split in SPLITS), "tokenizer.json", ENTROPY, FORMER, REPORT, PICTURE, META)
AGAIN = "prepare the data again"
ALWAYS_VERIFIED = 2 * 10**9  # bytes; reading a larger file only to verify it would be a wait that people feel
CHUNK = 2**20  # ids, few enough to stay in the processor's cache between two looks at them
GPT2_LARGEST_IDS = range(1000, 50_257)  # of token files that may be GPT-2's; nanoGPT's characters have about 65 ids

# ---------------------------------------------------------------- writing


def written_names(directory: Path) -> set[str]:
    """The names of our files that preparations wrote into a directory: what the next one may replace. Empty where none did."""
    meta, plan = (peek_json(directory / name) for name in (META, COMMIT))
    if isinstance(plan, dict) and {"new", "remove"} <= plan.keys():
        return {*OUR_FILES}
    if isinstance(meta, dict) and {"tokenizer_sha256", "splits"} <= meta.keys():
        listed = meta.get("files")  # what was prepared before there were lists may hold all
        return {name for name in OUR_FILES if name in (*listed, FORMER)} if isinstance(listed, list) else {*OUR_FILES}
    damaged = all((directory / name).is_file() for name in ("train.bin", "val.bin", "test.bin", "tokenizer.json", META))
    return {*OUR_FILES} if damaged else set()


def holds_run(directory: Path) -> bool:
    """Whether train.py wrote into a directory; formats/run_directory.py knows more, but imports torch."""
    return (directory / METRICS).exists() or any(directory.glob("best_model.pt")) or any(directory.glob("step_*.pt"))


def check_place(directory: Path, sources: Iterable[Path] = (), killed: bool = False) -> None:
    """Raise ValueError where data would replace what no preparation wrote, a run, or one of the sources, which are going to be read.

    killed: whether a writer was killed here, so that *.new are its.
    """
    ours = written_names(directory)
    if not ours and holds_run(directory):
        raise ValueError(f"{directory} holds a run of train.py; choose another --output")
    passing = [COMMIT, *(f"{name}.new" for name in OUR_FILES)]
    check_names(directory, [*OUR_FILES, *passing], ours.union(passing if ours or killed else ()), "output")
    check_sources([directory / name for name in OUR_FILES], sources, "output")


@contextlib.contextmanager
def _sole_writer(directory: Path, sources: Iterable[Path] = ()) -> Iterator[None]:
    """Hold a directory for writing, checked, with nothing begun left in it."""
    with sole_writer(directory, "data", "output", r"[a-z_]+\.(json|png)\.new|commit\.json") as killed:
        check_place(directory, sources, killed)
        finish_commit(directory)
        _discard(directory)
        yield


class DataDirectoryWriter(contextlib.AbstractContextManager):
    """Writes a data directory so that a crash at any moment leaves the old one or the new one.

    Files are written as *.new and made durable; then commit.json says that all are complete; then they are renamed, meta.json last.
    Leaving the context without `commit` discards what was written. Other files in the directory stay untouched.

    sources: the files that are going to be read. Raises ValueError where another process writes to the directory, where files stand in the
    way that no preparation wrote, and where a run is; OSError.
    """

    def __init__(self, directory: Path, sources: Iterable[Path] = ()):
        self.directory = directory
        with contextlib.ExitStack() as stack:
            stack.enter_context(_sole_writer(directory, sources))
            stack.callback(self._discard_unfinished)
            self.files = {split: stack.enter_context(open(self._new(f"{split}.bin"), "wb")) for split in SPLITS}
            self._exit = stack.pop_all()
        self.hashes = {split: hashlib.sha256() for split in SPLITS}
        self.counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}

    def add(self, split: str, ids: np.ndarray, documents: int, n_bytes: int) -> None:
        """Append ids (uint16) of `documents` whole documents of n_bytes UTF-8 bytes to a split."""
        data = ids.astype(DTYPE, copy=False).tobytes()
        with naming(self.directory / f"{split}.bin"):
            self.files[split].write(data)
        self.hashes[split].update(data)
        self.counts[split] = {key: n + self.counts[split][key] for key, n in zip(COUNTS, (len(ids), documents, n_bytes))}

    def check(self) -> None:
        """Raises ValueError for an empty split."""
        empty = [split for split in SPLITS if not self.counts[split]["documents"]]
        if empty:
            advice = "give more text or a higher limit, or raise --val_fraction and --test_fraction"
            separated = "documents are separated by <|endoftext|> or --separator"
            raise ValueError(f"the {' and '.join(empty)} split would be empty; {advice} ({separated})")

    def read(self, split: str, start: int, count: int) -> np.ndarray:
        """Token ids (up to count,) uint16 of what was added to a split, from token `start` on."""
        self.files[split].flush()
        return np.fromfile(self._new(f"{split}.bin"), DTYPE, count, offset=2 * start)

    def commit(self, tokenizer: TextTokenizer, meta: dict, extra: dict[str, bytes] | None = None) -> dict:
        """Make what was added the directory's content, with further files of ours; returns the whole meta.json. Raises ValueError."""
        self.check()
        extra = extra or {}
        new = [name for name in OUR_FILES if name.endswith(".bin") or name in ("tokenizer.json", META, *extra)]
        meta = {
            "format_version": FORMAT_VERSION,
            "dtype": "uint16",
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "tokenizer_sha256": tokenizer.sha256,
            "splits": {split: self.counts[split] | {"sha256": self.hashes[split].hexdigest()} for split in SPLITS},
            "files": new,
        } | meta
        for split, file in self.files.items():
            with naming(self.directory / f"{split}.bin"):
                file.flush()
                os.fsync(file.fileno())
        write_text(self._new("tokenizer.json"), tokenizer.json)
        for name, content in extra.items():
            write_atomically(self._new(name), lambda file, content=content: file.write(content))
        write_json(self._new(META), meta)
        _commit(self.directory, new)
        return meta

    def __exit__(self, *_) -> None:
        with self._exit:
            for file in self.files.values():
                with contextlib.suppress(OSError):  # a full disk is known by now
                    file.close()

    def _discard_unfinished(self) -> None:
        if not (self.directory / COMMIT).exists():
            _discard(self.directory)

    def _new(self, name: str) -> Path:
        return self.directory / f"{name}.new"


def move_data(source: Path, target: Path) -> None:
    """Make a prepared directory's files the content of another directory, as a preparation of it would. Files that are mapped stay so."""
    with _sole_writer(target):
        new = [name for name in OUR_FILES if (source / name).exists()]
        for name in new:
            os.replace(source / name, target / f"{name}.new")
        _commit(target, new)


def _commit(directory: Path, new: list[str]) -> None:
    """Make *.new, which are durable, the directory's content. new: their final names."""
    write_json(directory / COMMIT, {"new": new, "remove": [name for name in OUR_FILES if name not in new]})
    finish_commit(directory)


def _discard(directory: Path) -> None:
    for name in OUR_FILES:
        (directory / f"{name}.new").unlink(missing_ok=True)


def finish_commit(directory: Path) -> None:
    """Finish a commit that was begun: rename its new files, delete old files that have no successor. Raises ValueError, OSError."""
    marker = directory / COMMIT
    if not marker.exists():
        return
    try:
        plan = read_json(marker, Commit, f"delete it and {AGAIN}")
    except FileNotFoundError:  # another reader has just finished it
        return
    for name in (name for name in OUR_FILES if name in plan["remove"]):
        with naming(directory / name):
            (directory / name).unlink(missing_ok=True)
    for name in (name for name in OUR_FILES if name in plan["new"]):
        with naming(directory / name), contextlib.suppress(FileNotFoundError):  # renamed before the crash, or by another reader just now
            os.replace(directory / f"{name}.new", directory / name)
    fsync_directory(directory)
    marker.unlink(missing_ok=True)
    fsync_directory(directory)


# ---------------------------------------------------------------- reading


class DataDirectory:
    """A data directory opened for reading.

    name: path as the user gave it; meta: meta.json, None for a directory that nanoGPT wrote. tokenizer: the directory's own; without
    one the given one, or else GPT-2's if the ids fit. verify: compare even large token files with the SHA-256 in meta.json.
    Raises FileNotFoundError where there is no data, ValueError where files disagree with each other or the tokenizer is unknown.
    """

    def __init__(self, path: str | Path, tokenizer: TextTokenizer | None = None, verify: bool = False):
        self.path, self.name, self.verify = Path(path), str(path), verify
        if not self.path.is_dir():
            raise FileNotFoundError(f"no data directory at {path}; make one with: python prepare_data.py --sample --output {path}")
        finish_commit(self.path)
        self.meta: dict | None = None
        if os.path.lexists(self.path / META):
            self.meta = read_json(self.path / META, Meta, AGAIN)
            self.tokenizer = load_tokenizer(self.path)
            if self.tokenizer.sha256 != self.meta["tokenizer_sha256"]:
                raise ValueError(f"{self.path / 'tokenizer.json'} is not the tokenizer that {META} names; {AGAIN}")
            for name in ("vocab_size", "eot_id"):
                if self.meta[name] != (known := getattr(self.tokenizer, name)):
                    raise ValueError(f"{self.path / META} is damaged: {name}={self.meta[name]}, but its tokenizer's is {known}; {AGAIN}")
        elif not {"train", "val"} & {*self.splits}:
            raise FileNotFoundError(f"no token files in {path}; make them with prepare_data.py --output {path}")
        else:
            own = load_tokenizer(self.path) if os.path.lexists(self.path / "tokenizer.json") else None
            self.tokenizer = own or tokenizer or self._likely_tokenizer()

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are there."""
        return tuple(split for split in SPLITS if (self.path / f"{split}.bin").is_file())

    def _likely_tokenizer(self) -> TextTokenizer:
        """The tokenizer of a directory that doesn't name one. Raises ValueError where it would be a guess."""
        largest = max(self._open(split)[1] for split in self.splits if split != "test")
        if (self.path / "meta.pkl").exists() or largest not in GPT2_LARGEST_IDS:  # nanoGPT's meta.pkl maps characters; it is never opened
            raise ValueError(
                f"{self.name} has no {META}, so its tokenizer is unknown; put its tokenizer.json there, or pass train.py --tokenizer PATH"
            )
        tokenizer = gpt2_tokenizer()
        notice(
            f"{self.name} has no {META}; its ids fit GPT-2's tokenizer, which is used; if it is wrong, put the right tokenizer.json there"
        )
        return tokenizer

    @functools.cache  # noqa: B019 - a handful of directories, open for the whole run
    def _open(self, split: str) -> tuple[np.ndarray, int, str | None]:
        """A split's memmap, its largest id and, where it is to be verified, its SHA-256; read once."""
        path = self.path / f"{split}.bin"
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; prepare the data again, or name a split that is there")
        size = path.stat().st_size
        expected = self.meta["splits"][split]["tokens"] * 2 if self.meta else size
        if size != expected or size % 2:
            raise ValueError(f"{path} has {size} bytes where {expected + expected % 2} belong; it is damaged, {AGAIN}")
        if size == 0:
            raise ValueError(f"{path} is empty; prepare the data again with more text")
        ids, largest = np.memmap(path, DTYPE, mode="r"), 0
        digest = hashlib.sha256() if self.meta and (self.verify or size < ALWAYS_VERIFIED) else None
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            largest = max(largest, int(chunk.max()))
            if digest is not None:
                digest.update(chunk)
        return ids, largest, digest and digest.hexdigest()

    def tokens(self, split: str) -> np.ndarray:
        """All token ids of a split, a read-only memmap (tokens,) uint16. Raises FileNotFoundError, ValueError."""
        ids, largest, sha256 = self._open(split)
        path, known = self.path / f"{split}.bin", self.tokenizer.vocab_size
        if largest >= known:
            raise ValueError(f"{path} holds token id {largest}, but its tokenizer has only {known} ids; prepare it again")
        if sha256 is not None and sha256 != self.meta["splits"][split]["sha256"]:
            raise ValueError(f"{path} was changed since it was prepared: its SHA-256 is not the one in {META}; {AGAIN}")
        return ids

    def entropy(self, split: str) -> list[float] | None:
        """Bits of each document of a sample corpus's split under the grammar that wrote it; None for other data. Raises ValueError."""
        path = next((path for name in (ENTROPY, FORMER) if os.path.lexists(path := self.path / name)), None)
        if self.meta is None or "sample" not in self.meta or path is None:
            return None
        entropy, documents = read_json(path, Entropy, AGAIN).get(split), int((self.tokens(split) == self.tokenizer.eot_id).sum())
        if entropy is not None and len(entropy) != documents:
            raise ValueError(f"{path} is damaged: {len(entropy)} numbers for the {documents} documents of {split}; {AGAIN}")
        return entropy

    def check_tokenizer(self, tokenizer: TextTokenizer, owner: str, path: str | Path, flag: str = "") -> None:
        """Raise ValueError unless the directory's ids are those of this tokenizer, which `owner` has and which lies at `path`."""
        if not self.tokenizer.same_ids(tokenizer):
            raise ValueError(
                f"{flag}{self.name} was prepared with another tokenizer than {owner}; prepare it again with "
                f"prepare_data.py --tokenizer {path}"
            )

    def fingerprint(self) -> dict:
        """What identifies the data a model was trained on: tokens and SHA-256 per split, or sizes where there is no meta.json."""
        if self.meta:
            return {split: f"{s['tokens']} tokens, sha256 {s['sha256']}" for split, s in self.meta["splits"].items()}
        return {split: f"{(self.path / f'{split}.bin').stat().st_size} bytes" for split in self.splits}
