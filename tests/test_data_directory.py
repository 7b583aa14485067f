"""Data directories: the commit protocol, what readers refuse, and directories of nanoGPT."""

import contextlib
import json
import shutil

import numpy as np
import pytest

from formats import data_directory
from formats.data_directory import OUR_FILES, SPLITS, DataDirectory, DataDirectoryWriter
from formats.tokenizer import gpt2_tokenizer
from preparation.tokenizer_kinds import byte_tokenizer, train_bpe

BYTE = byte_tokenizer()


def write(directory, texts: dict[str, list[str]], entropy=None):
    with DataDirectoryWriter(directory) as writer:
        for split, documents in texts.items():
            for text in documents:
                writer.add(split, np.array([*BYTE.encode(text), BYTE.eot_id]), 1, len(text.encode()))
        return writer.commit(BYTE, {"seed": 1}, None if entropy is None else {"entropy.json": json.dumps(entropy).encode()})


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
@pytest.mark.parametrize("at", range(14))
def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_directory(tmp_path, monkeypatch, kind, at):
    """Every rename and every deletion in turn is the last thing that happens; then a reader comes."""
    old, new, work = tmp_path / "old", tmp_path / "new", tmp_path / "work"
    write(old, OLD, entropy={"val": [1.0]})
    write(new, NEW)
    write(work, OLD, entropy={"val": [1.0]})
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


def test_an_entropy_by_its_former_name_goes_with_the_next_commit(tmp_path):
    write(tmp_path, OLD)
    (tmp_path / "floor.json").write_text("{}")
    write(tmp_path, NEW, entropy={"val": [1.0]})
    assert not (tmp_path / "floor.json").exists() and json.loads((tmp_path / "entropy.json").read_text()) == {"val": [1.0]}


# ---------------------------------------------------------------- directories without meta.json


def write_bare(directory, *largest: int):
    """train.bin and val.bin alone, as nanoGPT writes them, with these largest ids; returns the directory."""
    directory.mkdir()
    for split, top in zip(("train", "val"), largest):
        np.append(np.arange(100), top).astype(np.uint16).tofile(directory / f"{split}.bin")
    return directory


def test_ids_of_gpt2_are_taken_as_gpt2s_in_one_line(tmp_path, real_data, capsys):
    data = DataDirectory(write_bare(tmp_path / "d", 3000, 50_256))
    assert data.tokenizer.vocab_size == 50_257 and data.tokens("val")[-1] == 50_256 and data.splits == ("train", "val")
    (line,) = capsys.readouterr().err.splitlines()
    taken = "its ids fit GPT-2's tokenizer, which is used; if it is wrong, put the right tokenizer.json there"
    assert line == f"{data.name} has no meta.json; {taken}"
    with pytest.raises(FileNotFoundError, match="name a split that is there"):
        data.tokens("test")


@pytest.mark.parametrize("largest", [(64, 64), (999, 64), (50_257, 3000), (3000, 65_535)])
def test_ids_that_are_hardly_gpt2s_need_a_tokenizer(tmp_path, largest):
    directory = write_bare(tmp_path / "d", *largest)
    with pytest.raises(ValueError, match=r"its tokenizer is unknown; put its tokenizer\.json there, or pass train\.py --tokenizer PATH"):
        DataDirectory(directory)


def test_a_directory_with_meta_pkl_needs_a_tokenizer(tmp_path):
    directory = write_bare(tmp_path / "d", 3000, 3000)
    (directory / "meta.pkl").write_bytes(b"never read")
    with pytest.raises(ValueError, match="--tokenizer"):
        DataDirectory(directory)


def test_the_directorys_own_tokenizer_wins_over_a_given_one_and_that_over_gpt2s(tmp_path, capsys):
    directory = write_bare(tmp_path / "d", 200, 200)
    (directory / "meta.pkl").write_bytes(b"never read")
    other = train_bpe(["abc"], 260)
    assert DataDirectory(directory, other).tokenizer is other and len(DataDirectory(directory, other).tokens("train")) == 101
    (directory / "tokenizer.json").write_text(BYTE.json, encoding="utf-8")
    assert DataDirectory(directory).tokenizer.sha256 == DataDirectory(directory, other).tokenizer.sha256 == BYTE.sha256
    np.arange(2000, dtype=np.uint16).tofile(directory / "train.bin")
    with pytest.raises(ValueError, match="holds token id 1999, but its tokenizer has only 257 ids"):
        DataDirectory(directory).tokens("train")
    assert capsys.readouterr().err == ""


def test_gpt2s_files_may_be_out_of_reach(tmp_path, monkeypatch):
    def offline(*_):
        raise ConnectionError

    monkeypatch.setattr("formats.data_directory.gpt2_tokenizer", gpt2_tokenizer.__wrapped__)  # not the one of an earlier test
    monkeypatch.setattr("formats.tokenizer.read_file_cached", offline)
    with pytest.raises(ValueError, match=r"GPT-2's tokenizer files can't be had .* --tokenizer PATH"):
        DataDirectory(write_bare(tmp_path / "d", 3000, 3000))


def test_a_bare_directory_that_is_damaged(tmp_path):
    directory = write_bare(tmp_path / "d", 3000, 3000)
    (directory / "val.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val\.bin is empty"):
        DataDirectory(directory)


def test_meta_json_is_renamed_last():
    assert OUR_FILES[-1] == "meta.json"
