"""prepare_data.py and tokenizer_train.py as a user runs them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.data_directory import DataDirectory
from formats.tokenizer import EOT, load_tokenizer
from preparation import sample_corpus, sources
from preparation.cleaning import split_by_hash, split_by_position
from preparation.sources import Format, TextFile
from tests.runs import documents, write_stories

STORIES = [text for text, _ in sample_corpus.stories(sample_corpus.load_grammar(), 11, "train", 260)]
BYTES = ["--tokenizer", "byte", "--no_report"]


def test_files_become_splits_that_hold_every_document_once(tmp_path, script):
    write_stories(tmp_path / "data1.txt", STORIES[:130])
    write_stories(tmp_path / "data2.txt", STORIES[130:])
    process = script(
        "prepare_data.py",
        "--input",
        "data1.txt",
        "data2.txt",
        "--output",
        "./data",
        "--tokenizer",
        "bpe",
        "--vocab_size",
        400,
        cwd=tmp_path,
    )
    assert "400 token ids" in process.stdout
    parts = {split: documents(tmp_path / "data", split) for split in ("train", "val", "test")}
    assert sorted(text for part in parts.values() for text in part) == sorted(STORIES)
    assert 3 <= len(parts["val"]) <= 30 and 3 <= len(parts["test"]) <= 30
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert [source["name"] for source in meta["sources"]] == ["data1.txt", "data2.txt"] and meta["split"]["rule"] == "hash"
    assert meta["splits"]["val"]["bytes"] == sum(len(text.encode()) for text in parts["val"])


def test_globs_and_directories(tmp_path, script):
    source = tmp_path / "dataset_v1"
    (source / "more").mkdir(parents=True)
    write_stories(source / "a.txt", STORIES[:130])
    write_stories(source / "more" / "b.txt", STORIES[130:])
    (source / "notes.md").write_text("not text for us")
    script("prepare_data.py", "--input", "dataset_v1", "--output", "./data_v1", *BYTES, cwd=tmp_path)
    script("prepare_data.py", "--input", "dataset_v1/**/*.txt", "--output", "./data_v2", *BYTES, cwd=tmp_path)
    for split in ("train", "val", "test"):
        assert documents(tmp_path / "data_v1", split) == documents(tmp_path / "data_v2", split)


def test_the_result_does_not_depend_on_workers_and_splits_not_on_order(tmp_path, script):
    big = STORIES * 20  # a few megabytes, several batches
    write_stories(tmp_path / "big.txt", [f"{i} {text}" for i, text in enumerate(big)])
    for workers in (1, 2, 3):
        script("prepare_data.py", "--input", "big.txt", "--output", f"w{workers}", *BYTES, "--num_workers", workers, cwd=tmp_path)
    for name in ("train.bin", "val.bin", "test.bin", "meta.json"):
        assert (tmp_path / "w1" / name).read_bytes() == (tmp_path / "w2" / name).read_bytes() == (tmp_path / "w3" / name).read_bytes()
    write_stories(tmp_path / "a.txt", STORIES)
    write_stories(tmp_path / "b.txt", STORIES[::-1])
    for name in ("a", "b"):
        script("prepare_data.py", "--input", f"{name}.txt", "--output", name, *BYTES, cwd=tmp_path)
    script("prepare_data.py", "--input", "a.txt", "--output", "c", *BYTES, "--seed", 5, cwd=tmp_path)
    val = {name: sorted(documents(tmp_path / name, "val")) for name in "abc"}
    assert val["a"] == val["b"] != val["c"]


def test_one_long_text_is_split_by_position_at_line_ends(tmp_path, script):
    text = "".join(f"line {i} of a long text\n" for i in range(2000))
    (tmp_path / "book.txt").write_text(text)
    process = script("prepare_data.py", "--input", "book.txt", "--output", "data", *BYTES, cwd=tmp_path)
    assert "split by position" in process.stderr
    parts = [documents(tmp_path / "data", split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1, 1, 1] and "".join(part[0] for part in parts) == text
    assert parts[0][0].endswith("\n") and len(parts[1][0]) / len(text) == pytest.approx(0.05, abs=0.002)


@given(text=st.text(alphabet="ab \n", min_size=1, max_size=300), val=st.floats(0.01, 0.4), test=st.floats(0.01, 0.4))
@settings(max_examples=200, deadline=None)
def test_position_split_loses_only_blank_ends(text, val, test):
    parts = list(split_by_position(text, val, test))
    kept = "".join(part for _, part in parts)
    assert kept == text or "".join(kept.split()) == "".join(text.split())
    assert [split for split, _ in parts] == [split for split in ("train", "val", "test") if split in dict(parts)]


def test_hash_split_keeps_its_shares():
    splits = [split_by_hash(f"document {i}", 1, 0.05, 0.1) for i in range(20_000)]
    assert splits.count("val") / 20_000 == pytest.approx(0.05, abs=0.008) and splits.count("test") / 20_000 == pytest.approx(0.1, abs=0.01)


def test_given_splits_are_kept(tmp_path, script):
    write_stories(tmp_path / "train.txt", STORIES[:200])
    write_stories(tmp_path / "valid.txt", STORIES[200:220])
    script("prepare_data.py", "--input", "train.txt", "--val_input", "valid.txt", "--output", "data", *BYTES, cwd=tmp_path)
    assert documents(tmp_path / "data", "val") == STORIES[200:220]
    assert sorted(documents(tmp_path / "data", "train") + documents(tmp_path / "data", "test")) == sorted(STORIES[:200])


def test_the_end_of_text_literal_inside_a_document_is_text(tmp_path, script):
    stories = [*STORIES[:150], f"a story about {EOT} itself"]
    write_stories(tmp_path / "s.txt", stories, separator="\n###\n")
    script(
        "prepare_data.py",
        "--input",
        "s.txt",
        "--separator",
        "###",
        "--output",
        "data",
        "--tokenizer",
        "bpe",
        "--vocab_size",
        300,
        cwd=tmp_path,
    )
    data = DataDirectory(tmp_path / "data")
    assert sum(int((data.tokens(split) == data.tokenizer.eot_id).sum()) for split in ("train", "val", "test")) == 151


@given(pieces=st.lists(st.text(alphabet="aé🙂 \n", max_size=30), min_size=1, max_size=6), chunk=st.integers(1, 17))
@settings(max_examples=100, deadline=None)
def test_reading_in_pieces_equals_splitting_the_whole(tmp_path_factory, pieces, chunk):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_bytes(EOT.join(pieces).encode())
    before, sources.CHUNK_BYTES = sources.CHUNK_BYTES, chunk
    try:
        found = list(TextFile(path, Format(EOT)))
    finally:
        sources.CHUNK_BYTES = before
    whole = [piece.strip("\r\n") for piece in pieces] if len(pieces) > 1 else pieces
    assert found == whole[:-1] + [piece for piece in whole[-1:] if piece.strip()]


def test_a_local_dataset_folder(tmp_path, script):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [json.dumps({"story": text}) for text in STORIES]
    (folder / "train.jsonl").write_text("\n".join(rows[:200]))
    (folder / "validation.jsonl").write_text("\n".join(rows[200:230]))
    script("prepare_data.py", "--dataset", "set", "--text_field", "story", "--output", "data", *BYTES, cwd=tmp_path)
    assert documents(tmp_path / "data", "val") == STORIES[200:230]
    process = script("prepare_data.py", "--dataset", "set", "--output", "other", *BYTES, cwd=tmp_path, code=2)
    assert "--text_field" in process.stderr and "story" in process.stderr and not (tmp_path / "other" / "meta.json").exists()


def test_a_dataset_that_cannot_be_had(tmp_path, program):
    process = program("prepare_data.py", "--dataset", "nobody/nothing", "--output", "data", *BYTES, cwd=tmp_path, code=2)
    assert "--sample" in process.stderr and "--input" in process.stderr and not (tmp_path / "data").exists()


def test_the_sample_corpus_is_deterministic_and_seeded(tmp_path, script):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script("prepare_data.py", "--sample", "--sample_stories", 60, "--vocab_size", 300, "--seed", seed, "--output", name, cwd=tmp_path)
    assert (tmp_path / "a" / "meta.json").read_bytes() == (tmp_path / "b" / "meta.json").read_bytes()
    assert (tmp_path / "a" / "train.bin").read_bytes() != (tmp_path / "c" / "train.bin").read_bytes()
    assert "a perfect model" in script("prepare_data.py", "--sample", "--sample_stories", 60, "--output", "a", cwd=tmp_path).stdout


def test_no_entropy_where_the_tokenizer_may_lose_text(tmp_path, script):
    script("prepare_data.py", "--sample", "--sample_stories", 60, "--tokenizer", "char", "--output", "d", cwd=tmp_path)
    assert "entropy_bits_per_byte" not in DataDirectory(tmp_path / "d").meta["sample"] and not (tmp_path / "d" / "entropy.json").exists()


def test_a_trained_tokenizer_is_used_byte_for_byte(tmp_path, script):
    write_stories(tmp_path / "s.txt", STORIES)
    process = script("tokenizer_train.py", "--input", "s.txt", "--vocab_size", 350, "--output", "out/tok.json", cwd=tmp_path)
    assert "350 tokens" in process.stdout
    script("prepare_data.py", "--input", "s.txt", "--tokenizer", "out/tok.json", "--output", "data", cwd=tmp_path)
    assert (tmp_path / "out" / "tok.json").read_bytes() == (tmp_path / "data" / "tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "data").vocab_size == 350


def test_preparing_again_replaces_and_keeps_foreign_files(tmp_path, script):
    write_stories(tmp_path / "s.txt", STORIES)
    script("prepare_data.py", "--sample", "--sample_stories", 60, "--output", "data", cwd=tmp_path)
    (tmp_path / "data" / "notes.txt").write_text("mine")
    script("prepare_data.py", "--input", "s.txt", "--output", "data", *BYTES, cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [  # neither entropy.json nor the sample's data_report
        "meta.json",
        "notes.txt",
        "test.bin",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]
    assert len(documents(tmp_path / "data", "train")) > 200


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--input", "missing.txt"], "no text files at missing.txt"),
        (["--input", "empty.txt"], "empty input: empty.txt"),
        (["--input", "blank.txt", *BYTES], "split would be empty"),
        (["--input", "bad.txt", *BYTES], "bad.txt is not UTF-8 text (byte 3)"),
        (["--input", "good.txt", "--sample"], "exactly one of"),
        ([], "exactly one of"),
        (["--input", "good.txt", "--tokenizer", "nothing.json"], "no tokenizer at nothing.json"),
        (["--input", "good.txt", "--tokenizer", "bpe", "--vocab_size", "100"], "vocab_size=100"),
        (["--input", "good.txt", "--tokenizer", "bpe", "--vocab_size", "70000"], "65536"),
        (["--input", "good.txt", "--val_fraction", "0.9", "--test_fraction", "0.2"], "val_fraction=0.9"),
        (["--sample", "--val_input", "good.txt"], "leave --val_input"),
        (["--input", "g*.txt", "--val_input", "./good.txt", *BYTES], "would be in two splits"),
        (["--input", "good.txt", "--output", "good.txt", *BYTES], "good.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, mistake, arguments, part):
    write_stories(tmp_path / "good.txt", STORIES)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\xfedef")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert part in mistake("prepare_data.py", *arguments, cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not any((tmp_path / "data").glob("*"))


def test_real_stories(real_data, tmp_path, script):
    script(
        "prepare_data.py",
        "--input",
        real_data / "tinystories" / "valid.txt",
        "--output",
        "d",
        "--tokenizer",
        "bpe",
        "--vocab_size",
        1000,
        cwd=tmp_path,
    )
    data = DataDirectory(tmp_path / "d")
    assert 3.0 < data.meta["splits"]["val"]["bytes"] / data.meta["splits"]["val"]["tokens"] < 3.4  # 3.16 for a vocabulary of 1k elsewhere
    originals = set((real_data / "tinystories" / "valid.txt").read_text(encoding="utf-8").split(EOT))
    assert set(documents(tmp_path / "d", "val")) <= {text.strip("\r\n") for text in originals}
    assert np.isclose(sum(s["documents"] for s in data.meta["splits"].values()), 1559, atol=2)
