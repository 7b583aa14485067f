"""The order of the training data: each window once an epoch, mixtures by weight, a pure function of seed and number."""

from fractions import Fraction

from utils import parse_weighted

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.data_directory import DTYPE, SPLITS, DataDirectory, DataDirectoryWriter
from preparation.tokenizer_kinds import byte_tokenizer
from training.data_order import TrainingData, assign, epoch_starts, whole_shares, windows

BYTE = byte_tokenizer()


@given(n_tokens=st.integers(9, 400), block_size=st.integers(1, 8), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_an_epoch_has_each_window_once_and_no_token_twice_as_target(n_tokens, block_size, seed, epoch):
    starts = epoch_starts(seed, 0, epoch, n_tokens, block_size)
    assert len(starts) == windows(n_tokens, block_size)
    targets = (starts[:, None] + 1 + np.arange(block_size)).ravel()
    assert len(set(targets)) == len(targets) and targets.max() < n_tokens and starts.min() >= 0
    assert n_tokens - len(targets) <= 2 * block_size  # what an epoch leaves out


def test_each_epoch_begins_at_an_offset_of_its_own():
    """So that a token isn't always the first of its window, without anything before it."""
    offsets = [set(epoch_starts(5, 0, epoch, 1000, 16) % 16) for epoch in range(300)]
    assert all(len(offset) == 1 for offset in offsets) and set.union(*offsets) == set(range(16))


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
    shares = whole_shares([Fraction("0.3333333333333333"), Fraction("0.6666666666666667")])
    assert sum(shares) <= 10**6 + 1 and shares[1] / shares[0] == pytest.approx(2, rel=1e-5)
    assert whole_shares([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert (assign(np.array([10**12]), shares)[1] >= 0).all()


def test_what_training_refuses(tmp_path):
    with pytest.raises(ValueError, match="fewer than block_size"):
        make_data(tmp_path / "a", [20], block_size=20)
    with pytest.raises(ValueError, match="every data directory or to none"):
        make_data(tmp_path / "b", [50, 50], weights=[Fraction(1), None])
    mixed = make_data(tmp_path / "c", [200, 200], weights=[Fraction("0.75"), Fraction("0.25")])
    rows = assign(np.arange(400), mixed.weights)[0]
    assert (rows == 0).sum() == 300
