"""Token files: the commit protocol, what readers refuse, and the order of the training data."""

import contextlib
import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import data_directory as token_files
from formats.data_directory import (
    DTYPE,
    OUR_FILES,
    SPLITS,
    DataDirectory,
    DataDirectoryWriter,
    TrainingData,
    assign,
    epoch_starts,
    parse_weighted,
    windows,
)
from preparation.tokenizer_kinds import byte_tokenizer, train_bpe

BYTE = byte_tokenizer()


def write(directory, texts: dict[str, list[str]], floor=None):
    with DataDirectoryWriter(directory) as writer:
        for split, documents in texts.items():
            for text in documents:
                writer.add(split, np.array([*BYTE.encode(text), BYTE.eot_id]), 1, len(text.encode()))
        return writer.commit(BYTE, {"seed": 1}, None if floor is None else {"floor.json": json.dumps(floor).encode()})


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


OLD = {split: ["old story"] * 3 for split in SPLITS}
NEW = {split: ["another new story"] * 5 for split in SPLITS}


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, NEW)
    data = DataDirectory(tmp_path)
    assert bytes(data.tokens("val")[:17].astype(np.uint8)).decode() == "another new story" and data.tokens("val")[17] == BYTE.eot_id
    assert data.meta["splits"]["train"]["documents"] == 5 and data.meta["splits"]["train"]["bytes"] == 85
    raw = np.fromfile(tmp_path / "val.bin", dtype=np.uint16)  # nanoGPT's way of reading it
    assert np.array_equal(raw, data.tokens("val"))


class Crash(BaseException):
    """Stands for a kill: not even `except Exception` sees it."""


@pytest.mark.parametrize("kind", ["replace", "unlink"])
@pytest.mark.parametrize("at", range(12))
def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_directory(tmp_path, monkeypatch, kind, at):
    """Every rename and every deletion in turn is the last thing that happens; then a reader comes."""
    old, new, work = tmp_path / "old", tmp_path / "new", tmp_path / "work"
    write(old, OLD, floor={"val": [1.0]})
    write(new, NEW)
    write(work, OLD, floor={"val": [1.0]})
    (work / "foreign.txt").write_text("mine")
    calls = 0

    def crashing(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > at:
                raise Crash
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if kind == "replace":
            patch.setattr("os.replace", crashing(token_files.os.replace))
        else:
            patch.setattr("pathlib.Path.unlink", crashing(token_files.Path.unlink))
        with contextlib.suppress(Crash):
            write(work, NEW)
    DataDirectory(work)
    with DataDirectoryWriter(work):
        pass  # a writer that gives up clears what nobody finished
    left = content(work)
    assert left.pop("foreign.txt") == b"mine"
    assert left in (content(old), content(new))


def test_an_empty_split_changes_nothing(tmp_path):
    write(tmp_path, OLD)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="the test split would be empty"):
        write(tmp_path, {"train": ["a"], "val": ["b"]})
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda d: (d / "train.bin").write_bytes((d / "train.bin").read_bytes()[:-2]), "is damaged"),
        (lambda d: (d / "train.bin").write_bytes(b"\xff\xff" + (d / "train.bin").read_bytes()[2:]), "token id 65535"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda d: (d / "meta.json").write_text("[]"), "meta.json is damaged"),
        (lambda d: (d / "tokenizer.json").write_text(train_bpe(["abc"], 260).json), "not the tokenizer"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer at"),
        (lambda d: (d / "train.bin").unlink(), "no .*train.bin"),
        (lambda d: (d / "meta.json").write_text((d / "meta.json").read_text().replace('version": 1', 'version": 9')), "format version 9"),
        (lambda d: shutil.rmtree(d), "no data directory"),
    ],
)
def test_readers_refuse_what_does_not_fit_together(tmp_path, damage, part):
    directory = tmp_path / "data"
    write(directory, NEW)
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=part):
        DataDirectory(directory).tokens("train")


def test_a_commit_marker_never_touches_other_names(tmp_path):
    write(tmp_path / "data", OLD)
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (tmp_path / "data" / "commit.json").write_text(json.dumps({"new": [], "remove": ["../victim.txt"]}))
    DataDirectory(tmp_path / "data")
    assert victim.read_text() == "mine" and not (tmp_path / "data" / "commit.json").exists()


def test_a_directory_of_nanogpt_needs_its_tokenizer(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"never read")
    with pytest.raises(ValueError, match="--tokenizer"):
        DataDirectory(tmp_path)
    assert len(DataDirectory(tmp_path, BYTE).tokens("train")) == 100


# ---------------------------------------------------------------- data order


@given(n_tokens=st.integers(9, 400), block_size=st.integers(1, 8), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_an_epoch_has_each_window_once_and_no_token_twice_as_target(n_tokens, block_size, seed, epoch):
    starts = epoch_starts(seed, 0, epoch, n_tokens, block_size)
    assert len(starts) == windows(n_tokens, block_size)
    targets = (starts[:, None] + 1 + np.arange(block_size)).ravel()
    assert len(set(targets)) == len(targets) and targets.max() < n_tokens and starts.min() >= 0
    assert n_tokens - len(targets) <= 2 * block_size  # what an epoch leaves out


def make_data(tmp_path, lengths, weights=None, block_size=4, seed=7) -> TrainingData:
    directories = []
    for number, length in enumerate(lengths):
        directory = tmp_path / f"d{number}"
        rng = np.random.RandomState(number)
        with DataDirectoryWriter(directory) as writer:
            for split in SPLITS:
                writer.add(split, (np.arange(length) % 256).astype(DTYPE) if split == "train" else rng.randint(0, 256, 50), 1, length)
            writer.commit(BYTE, {})
        directories.append(DataDirectory(directory))
    return TrainingData(directories, weights or [None] * len(lengths), block_size, seed)


def test_batches_are_windows_and_do_not_depend_on_the_batch_size(tmp_path):
    data = make_data(tmp_path, [103, 61])
    one_by_one = np.concatenate([data.batch(np.array([i])) for i in range(60)])
    assert np.array_equal(np.concatenate([data.batch(np.arange(i, i + 7)) for i in range(0, 56, 7)]), one_by_one[:56])
    assert np.array_equal(np.diff(one_by_one.astype(int), axis=1) % 256, np.ones((60, 4)))
    epoch = data.samples_per_epoch
    first_epoch = data.batch(np.arange(epoch))
    assert len(np.unique(first_epoch[:, 0])) >= windows(103, 4)  # nothing repeats within a source
    assert not np.array_equal(first_epoch, data.batch(np.arange(epoch, 2 * epoch)))
    assert not np.array_equal(first_epoch, make_data(tmp_path / "again", [103, 61], seed=8).batch(np.arange(epoch)))


def test_an_epoch_of_several_directories_is_every_window_of_each_once(tmp_path):
    data = make_data(tmp_path, [103, 61])
    source, within = assign(np.arange(data.samples_per_epoch), data.weights)
    for s, n in enumerate(data.windows):
        assert sorted(within[source == s]) == list(range(n))


@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=4), count=st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_mixtures_keep_their_shares_at_every_moment_and_are_pure(weights, count):
    index = np.arange(count)
    source, within = assign(index, weights)
    for s, weight in enumerate(weights):
        assert abs((source == s).sum() - count * weight / sum(weights)) <= 3
        assert list(within[source == s]) == list(range((source == s).sum()))
    some = index[::3]
    assert np.array_equal(assign(some, weights)[0], source[::3]) and np.array_equal(assign(some, weights)[1], within[::3])


def test_weights_on_the_command_line():
    assert parse_weighted("data:0.7") == ("data", Fraction(7, 10))
    assert parse_weighted("C:\\stories") == ("C:\\stories", None) and parse_weighted("C:\\stories:2") == ("C:\\stories", Fraction(2))
    assert parse_weighted("./data") == ("./data", None)
    with pytest.raises(ValueError, match="above 0"):
        parse_weighted("data:0")


def test_odd_weights_stay_within_64_bits():
    shares = token_files.whole_shares([Fraction("0.3333333333333333"), Fraction("0.6666666666666667")])
    assert sum(shares) <= 10**6 + 1 and shares[1] / shares[0] == pytest.approx(2, rel=1e-5)
    assert token_files.whole_shares([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert (assign(np.array([10**12]), shares)[1] >= 0).all()


def test_what_training_refuses(tmp_path):
    with pytest.raises(ValueError, match="fewer than block_size"):
        make_data(tmp_path / "a", [20], block_size=20)
    with pytest.raises(ValueError, match="every data directory or to none"):
        make_data(tmp_path / "b", [50, 50], weights=[Fraction(1), None])
    mixed = make_data(tmp_path / "c", [200, 200], weights=[Fraction("0.75"), Fraction("0.25")])
    rows = assign(np.arange(400), mixed.weights)[0]
    assert (rows == 0).sum() == 300
    assert OUR_FILES[-1] == "meta.json"
