"""Sources of all kinds, and what is wrong with them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from formats.data_directory import DataDirectory
from formats.tokenizer import EOT
from preparation import corpus, sources
from preparation.hub import HubSplit
from preparation.sources import CUT, REPLACED, Format, find_files
from tests.runs import documents, write_stories
from tests.test_prepare import STORIES

FORM = Format(EOT)
ODD = ["a\nb", 'quotes " and , commas', "naïve 北京 🙂", " spaces ", "\x00 and \r\n ends \r", f"a {EOT} b", "\u2028 \x85", "x" * 3000, "7"]


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def as_csv(texts: list[str], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerows([("id", "text"), *enumerate(texts)])
    return out.getvalue().encode()


def as_parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())}), sink)
    return sink.getvalue()


WRITERS = {
    ".jsonl": lambda texts: "\n".join(json.dumps({"n": 1, "text": text}) for text in texts).encode(),
    ".ndjson": lambda texts: ("\r\n".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\r\n").encode(),
    ".json": lambda texts: json.dumps([{"text": text} for text in texts], indent=2).encode(),
    ".csv": lambda texts: as_csv(texts, ","),
    ".tsv": lambda texts: as_csv(texts, "\t"),
    ".parquet": as_parquet,
}


def read(path, form=FORM) -> list[str]:
    (source,) = find_files([str(path)], form)
    return list(source)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_gives_the_texts_back(tmp_path, suffix, compression):
    path = tmp_path / f"texts{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](WRITERS[suffix](STORIES[:30] + ODD)))
    assert read(path) == STORIES[:30] + ODD


def test_zst_is_read_through_pyarrow(tmp_path):
    path = tmp_path / "texts.jsonl.zst"
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(WRITERS[".jsonl"](ODD))
    assert read(path) == ODD
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut off or damaged"):
        read(path)


@pytest.mark.parametrize("suffix", WRITERS)
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=8), chunk=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_any_texts_in_any_pieces(tmp_path_factory, suffix, texts, chunk):
    path = tmp_path_factory.mktemp("texts") / f"t{suffix}"
    path.write_bytes(WRITERS[suffix](texts))
    before, sources.CHUNK_BYTES = sources.CHUNK_BYTES, chunk
    try:
        assert read(path) == texts
    finally:
        sources.CHUNK_BYTES = before


@pytest.mark.parametrize("content", ['["a", "b"]', '"a" "b"', '{"text": "a"}\n{"text": "b"}', ' [{"text": "a"},\n {"text": "b"} ]\n'])
def test_json_lists_and_sequences(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    assert read(tmp_path / "t.json") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("t.jsonl", b'{"text": "a"}\n\n{"story": "b", "id": 1}\n', "line 3 has no field 'text'; pass --text_field, one of: story, id"),
        ("t.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2 has no text but int in field 'text'"),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "is not UTF-8 text (byte 24)"),
        ("t.jsonl", b'{"text": "\\ud83d"}\n', "line 1 has half a character"),
        ("t.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("t.json", b'[{"text": "a"}, {"text": "b"', "no JSON in or behind its value 2"),
        ("t.json", b'[{"text": "a"}, ', "ends within its list, after value 1"),
        ("t.csv", b"id,story\n1,a\n", "line 2 has no field 'text'; pass --text_field, one of: id, story"),
        ("t.csv", b'id,text\n1,"a', "is no CSV behind line 1"),
        ("t.csv", b"id,text\n1\n", "line 2 has 1 fields, the header has 2"),
        ("t.parquet", b"PAR1 nonsense", "is no Parquet file, or damaged"),
        ("t.parquet", as_parquet(["a"] * 9)[:-30], "is no Parquet file, or damaged"),
        ("t.txt.gz", gzip.compress(random.Random(0).randbytes(5000).hex().encode(), mtime=0)[:3000], "cut off or damaged after"),
        ("t.txt.gz", b"not gzip at all", "cut off or damaged after 0 bytes"),
        ("t.txt.bz2", bz2.compress(b"abc" * 100)[:20], "cut off or damaged"),
        ("t.txt.xz", lzma.compress(b"abc" * 100)[:40], "cut off or damaged"),
        ("t.txt.zst", b"nothing", "cut off or damaged"),
        ("t.txt.gz", gzip.compress(b"abc\xff", mtime=0), "is not UTF-8 text (byte 3)"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_what_is_wrong_is_named(tmp_path, name, content, part):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert part in str(error.value) and str(path) in str(error.value)


def test_a_parquet_column_that_is_missing(tmp_path):
    (tmp_path / "t.parquet").write_bytes(as_parquet(["a"]))
    with pytest.raises(ValueError, match="has no field 'story'; pass --text_field, one of: id, text"):
        read(tmp_path / "t.parquet", Format(EOT, "story"))


@given(data=st.binary(max_size=60), chunk=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_replacing_reads_any_bytes_as_python_does(tmp_path_factory, data, chunk):
    path = tmp_path_factory.mktemp("bytes") / "t.txt"
    path.write_bytes(b"x" + data)
    before, sources.CHUNK_BYTES = sources.CHUNK_BYTES, chunk
    try:
        (source,) = find_files([str(path)], Format("\n###\n", errors="replace"))
        assert list(source) == [(b"x" + data).decode(errors="replace")]
        assert source.mended[REPLACED] == (b"x" + data).decode(errors="replace").count("\ufffd") - data.count("\ufffd".encode())
    finally:
        sources.CHUNK_BYTES = before


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("t.txt", "one text"), ("t.jsonl", '"one text"'), ("t.csv", "text\none text\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read(tmp_path / name) == ["one text"]


def test_directories_with_loops_of_links_and_other_files(tmp_path, capsys):
    inner = tmp_path / "d" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    (inner / "up").symlink_to("..")
    (inner / "a.txt").write_text("a")
    (inner / "b.jsonl.gz").write_bytes(gzip.compress(b'"b"'))
    (inner / "self.txt").symlink_to("self.txt")
    (inner / "gone.txt").symlink_to("nothing")
    (inner / "image.png").write_bytes(b"x")
    (inner / ".hidden.txt").write_text("h")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.txt").write_text("c")
    (tmp_path / "d" / "link").symlink_to(elsewhere)
    found = find_files([str(tmp_path / "d"), str(tmp_path / "d" / "**" / "*.txt")], FORM)
    assert sorted(text for source in found for text in source) == ["a", "b", "c"]
    notice = capsys.readouterr().err
    assert "3 files of other kinds are left out" in notice and "gone.txt" in notice
    with pytest.raises(FileNotFoundError, match="no text files"):
        find_files([str(inner / "self.txt")], FORM)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="can't be read several times"):
        find_files([str(tmp_path / "pipe")], FORM)


def test_very_long_documents_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 300)
    text = "".join(f"line {i} of a long text\n" for i in range(300)) + "word " * 500 + "x" * 2500
    (tmp_path / "t.txt").write_text(text)
    (source,) = find_files([str(tmp_path / "t.txt")], FORM)
    parts = list(source)
    assert "".join(parts) == text and max(map(len, parts)) <= 1000 and source.mended[CUT] == len(parts) - 1
    assert parts[0].endswith("\n") and parts[8].endswith(" ")


@pytest.mark.slow
def test_a_document_of_50_megabytes_in_a_single_line(tmp_path, script):
    words = " ".join(f"word{i % 5000}" for i in range(6_000_000))
    assert len(words) > 50_000_000
    (tmp_path / "t.txt").write_text(words)
    script("prepare_data.py", "--input", "t.txt", "--tokenizer", "bpe", "--output", "d", cwd=tmp_path)
    assert "".join("".join(documents(tmp_path / "d", split)) for split in ("train", "val", "test")) == words


@pytest.mark.parametrize("tokenizer", ["bpe", "byte"])
@given(texts=st.lists(st.text(min_size=1, max_size=60), min_size=3, max_size=20, unique=True), workers=st.integers(1, 2))
@settings(max_examples=15, deadline=None)
def test_any_documents_come_back_exactly(tmp_path_factory, tokenizer, texts, workers):
    """JSON lines -> token files -> text, for lossless tokenizers."""
    directory = tmp_path_factory.mktemp("round")
    (directory / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, *STORIES[:130]]))
    arguments = prepare_data.Arguments(
        input=(str(directory / "t.jsonl"),),
        tokenizer=tokenizer,
        vocab_size=300 if tokenizer == "bpe" else None,
        output=str(directory / "d"),
        num_workers=workers if len(texts) == 20 else 1,
        val_fraction=0.2,
        test_fraction=0.2,
        report=False,
    )
    meta = prepare_data.prepare(arguments)
    found = [text for split in ("train", "val", "test") for text in documents(directory / "d", split)]
    kept = [text for text in texts if not text.isspace()] + STORIES[:130]
    assert Counter(found) == Counter(kept)
    assert sum(split["bytes"] for split in meta["splits"].values()) == sum(len(text.encode()) for text in kept)
    assert meta["counts"].get("empty", 0) == len(texts) + 130 - len(kept)


class Rows:
    """A streamed dataset that counts how far it is read."""

    def __init__(self, n: int):
        self.n, self.read = n, 0

    def __iter__(self):
        for i in range(self.n):
            self.read = max(self.read, i + 1)
            yield {"text": f"Document {i} of many, which is streamed."}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_streamed_dataset_is_read_no_further_than_needed(tmp_path, monkeypatch, workers):
    rows = {"train": Rows(100_000), "validation": Rows(100_000)}

    def dataset(name, config, form):
        assert (name, config) == ("some/set", "plain")
        return {split: HubSplit(name, split, values, form) for split, values in rows.items()}

    monkeypatch.setattr(corpus, "open_dataset", dataset)
    arguments = {"dataset": ("some/set",), "dataset_config": "plain", "tokenizer": "bpe", "vocab_size": 300, "report": False}
    meta = prepare_data.prepare(
        prepare_data.Arguments(**arguments, max_documents=150, output=str(tmp_path / "d"), num_workers=workers, split="hash")
    )
    assert [meta["splits"][split]["documents"] for split in ("train", "val")] == [150, 150] and meta["splits"]["test"]["documents"] > 1
    assert rows["train"].read < 700 and rows["validation"].read == 150
    assert meta["counts"]["in val or test already"] > 100  # these rows are the validation split's too
    assert meta["sources"] == [{"name": "some/set:validation", "split": "val"}, {"name": "some/set:train"}]


def test_a_hub_that_cannot_be_reached(tmp_path, program):
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    process = program("prepare_data.py", "--dataset", "nobody/nothing", "--output", "d", cwd=tmp_path, code=2, **nowhere)
    assert "--sample" in process.stderr and "--input" in process.stderr and not (tmp_path / "d").exists()


def test_the_files_of_nanogpt_and_ours_are_the_same_format(tmp_path):
    """nanoGPT reads np.memmap(train.bin, uint16); it writes ids.tofile without a header."""
    import numpy as np

    write_stories(tmp_path / "s.txt", STORIES)
    prepare_data.prepare(
        prepare_data.Arguments(input=(str(tmp_path / "s.txt"),), tokenizer="byte", output=str(tmp_path / "d"), report=False)
    )
    ours = np.memmap(tmp_path / "d" / "train.bin", dtype=np.uint16, mode="r")
    assert len(ours) == DataDirectory(tmp_path / "d").meta["splits"]["train"]["tokens"] and int((ours == 256).sum()) > 200
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("train.bin", "val.bin"):
        np.array(ours[:2000], dtype=np.uint16).tofile(theirs / name)
    (theirs / "meta.pkl").write_bytes(b"never read")
    tokenizer = DataDirectory(tmp_path / "d").tokenizer
    assert DataDirectory(theirs, tokenizer).tokens("train").tolist() == ours[:2000].tolist()
    with pytest.raises(ValueError, match=r"pass train\.py --tokenizer"):
        DataDirectory(theirs)
