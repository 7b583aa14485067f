"""Data directories: the commit protocol, what readers refuse, and directories of nanoGPT."""

import contextlib
import json
import shutil

import numpy as np
import pytest

from formats import data_directory
from formats.data_directory import OUR_FILES, SPLITS, DataDirectory, DataDirectoryWriter
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
            patch.setattr("os.replace", crashing(data_directory.os.replace))
        else:
            patch.setattr("pathlib.Path.unlink", crashing(data_directory.Path.unlink))
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


def test_meta_json_is_renamed_last():
    assert OUR_FILES[-1] == "meta.json"
