"""Text that can't be taken as it stands: one sentence, never a part of it in silence; and texts that no end was seen of."""

import gzip
import io
import json
import os
import random
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import prepare_data
from formats.data_directory import DataDirectory
from formats.tokenizer import EOT, byte_level
from preparation import encoding, sources
from preparation.hub import HubSplit
from preparation.sources import Format, find_files
from preparation.tokenizer_kinds import ALPHABET, LONGEST_WORD, _with_short_words, make_tokenizer, train_bpe
from tests.conftest import ROOT
from tests.runs import documents, start, write_stories
from tests.test_prepare import STORIES

FORM = Format(EOT)
TEXT = f"\n{EOT}\n".join(STORIES).encode()


def read(path, form=FORM) -> list[str]:
    (source,) = find_files([str(path)], form)
    return list(source)


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("s.txt", TEXT)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w", format={"tar": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[kind]) as file:
        info = tarfile.TarInfo("s.txt")
        info.size = len(TEXT)
        file.addfile(info, io.BytesIO(TEXT))
    return out.getvalue()


def parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, compression="none", use_dictionary=False, write_statistics=False)
    return sink.getvalue()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("t.json", b'["a", "b"]["c"]', "goes on behind the list of its first 2 values"),
        ("t.json", b'[{"text": "a"}]\n{"text": "b"}', "goes on behind the list of its first 1 values"),
        ("t.json", b'["a"]\n' + b" " * 100 + b"garbage", "goes on behind"),
        ("t.json", b"[]]", "goes on behind"),
        ("t.json", b"[" * 100_000, "is no JSON in or behind its value 1"),
        ("t.json", b'["a", ' + b'{"a":' * 100_000, "is no JSON in or behind its value 2"),
        ("t.csv", b"id,text\n1,a story\n2,a story, cut\n", "line 3 has 3 fields, the header has 2"),
        ("t.csv", b'id,text\n1,"a, b"\n\n2\n', "line 4 has 1 fields, the header has 2"),
        ("t.tsv", b"id\ttext\n1\ta\tb\n", "line 2 has 3 fields, the header has 2"),
        ("t.TSV", b"id\ttext\n1\ta, b\n2\ta\tb\n", "line 3 has 3 fields, the header has 2"),
        ("t.tar", archive("tar"), "holds a tar archive"),
        ("t.tar.gz", gzip.compress(archive("pax")), "holds a tar archive"),
        ("t.jsonl", archive("tar"), "holds a tar archive"),
        ("t.zip", archive("zip"), "holds a ZIP archive"),
        ("t.tgz", gzip.compress(archive("tar")), "holds gzip data"),
        ("t.txt", gzip.compress(TEXT), "holds gzip data"),
        ("t.txt.gz", gzip.compress(gzip.compress(TEXT)), "holds gzip data"),
        ("t.txt", parquet(STORIES), "holds Parquet data"),
        ("t.txt", b"%PDF-1.4\n" + TEXT, "holds a PDF document"),
        ("train.bin", np.arange(1000, dtype="<u2").astype("<u2") % 128, "holds binary data or UTF-16 text"),
        ("t.txt", "text".encode("utf-16") * 100, "holds UTF-16 text"),
        ("t.txt", ("text " * 200).encode("utf-16-le"), "holds binary data or UTF-16 text"),
        ("t.parquet", parquet(["caf\u00e9"] * 9).replace("caf\u00e9".encode(), b"caf\xff\xff"), "is no Parquet file, or damaged"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value,
)
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_nothing_is_left_out_or_taken_for_text(tmp_path, name, content, part, errors):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.tobytes())
    with pytest.raises(ValueError) as error:
        read(path, Format(EOT, errors=errors))
    assert part in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_what_follows_a_list_is_seen_in_any_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
    (tmp_path / "good.json").write_text('["a", "b]"]\n \n')
    (tmp_path / "bad.json").write_text('["a", "b]"]\n \n,')
    assert read(tmp_path / "good.json") == ["a", "b]"]
    with pytest.raises(ValueError, match="goes on behind"):
        read(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "content", [b"PK and other letters", b"GIF89 is a format", b"some\0NUL\0characters" * 9, b"\xef\xbb\xbf" + TEXT, b"[1, 2"]
)
def test_text_that_looks_odd_stays_text(tmp_path, content):
    (tmp_path / "t.txt").write_bytes(content)
    assert read(tmp_path / "t.txt")[0][:4] == content.decode("utf-8-sig")[:4]


@pytest.mark.parametrize("name", ["d", "d/**/*.txt", "d/*/b.txt"])
def test_a_closed_directory_is_told(tmp_path, monkeypatch, mistake, name):
    """Root may read everything, so the system's answers are made up."""
    closed = tmp_path / "d" / "closed"
    closed.mkdir(parents=True)
    for path in (tmp_path / "d" / "a.txt", closed / "b.txt"):
        path.write_bytes(TEXT)
    scandir, access = os.scandir, os.access

    def list_unless_closed(path="."):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", list_unless_closed)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    stderr = mistake("prepare_data.py", "--input", name, "--tokenizer", "byte", cwd=tmp_path)
    assert "Permission denied" in stderr and "d/closed" in stderr and not (tmp_path / "data" / "meta.json").exists()


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b" more")


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes()[::-1])
    path.with_name("new").replace(path)


def shorten(path: Path) -> None:
    os.truncate(path, 5000)


CHANGES = [(grow, "find_corpus"), (replace, "choose_tokenizer"), (shorten, "describe"), (grow, "describe"), (replace, "describe")]


@pytest.mark.parametrize(("change", "at"), CHANGES)
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, mistake, change, at):
    """Before and after the tokenizer learns from it, and once all of it is encoded."""
    write_stories(tmp_path / "s.txt", STORIES)
    original = getattr(prepare_data, at)

    def and_change(*arguments):
        before = original(*arguments) if at != "describe" else None
        change(tmp_path / "s.txt")
        return before or original(*arguments)

    monkeypatch.setattr(prepare_data, at, and_change)
    arguments = ("--input", "s.txt", "--tokenizer", "bpe", "--vocab_size", 300, "--num_workers", 1, "--no_report")
    assert "s.txt changed while it was read" in mistake("prepare_data.py", *arguments, cwd=tmp_path)
    assert not (tmp_path / "data" / "meta.json").exists()


def test_names_that_are_not_utf8(tmp_path):
    directory = tmp_path / os.fsdecode(b"d\xe9")
    directory.mkdir()
    write_stories(directory / os.fsdecode(b"caf\xe9.txt"), STORIES)
    flags = ["--input", ".", "--tokenizer", "byte", "--no_report", "--output", tmp_path / "data"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert prepare_data.main([*map(str, flags)]) == 0
    assert [source["name"] for source in DataDirectory(tmp_path / "data").meta["sources"]] == ["caf\\udce9.txt"]


# ---------------------------------------------------------------- names and advice


NAMES = ["input", "output", "separator", "text_field"]


@pytest.mark.parametrize(
    ("script", "flags"), [("prepare_data.py", [*NAMES, "tokenizer", "dataset", "val_input"]), ("tokenizer_train.py", NAMES)]
)
def test_an_unset_variable(tmp_path, mistake, script, flags):
    """`--input "$FILES"` must not read the whole directory."""
    write_stories(tmp_path / "s.txt", STORIES)
    for flag in flags:
        given = [] if flag in ("input", "dataset") else ["--input", "s.txt"]
        stderr = mistake(script, *given, f"--{flag}", "", cwd=tmp_path)
        assert flag in stderr and "empty" in stderr and [path.name for path in tmp_path.iterdir()] == ["s.txt"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--input", "storis.txt"], "no text files at storis.txt; did you mean stories.txt?"),
        (["--input", "txets/more.txt"], "no text files at txets/more.txt; did you mean texts/more.txt?"),
        (["--input", "txets/other.txt"], "did you mean texts?"),
        (["--input", "nothing"], "no text files at nothing; give an existing file"),
        (["--dataset", "./storis"], "no dataset at ./storis; did you mean stories.txt?"),
        (["--dataset", "other.json.gz"], "no dataset at other.json.gz; give a file, a dataset folder"),
        (["--dataset", "storie.txt"], "no dataset at storie.txt; did you mean stories.txt?"),
        (["--dataset", "~/storis.txt"], "no dataset at ~/storis.txt; give a file"),
        (["--dataset", "a/b/c"], "no dataset at a/b/c"),
        (["--dataset", "stories.txt"], "stories.txt is a file, no dataset; pass --input stories.txt"),
    ],
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, mistake, arguments, part):
    write_stories(tmp_path / "stories.txt", STORIES)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "more.txt").write_text("a")
    monkeypatch.setattr("preparation.hub.hub_answers", lambda: pytest.fail("asked the hub"))
    assert part in mistake("prepare_data.py", *arguments, cwd=tmp_path)


@pytest.mark.parametrize("content", ["one line", '{"story": "a"}'])
def test_advice_fits_the_script(tmp_path, mistake, content):
    (tmp_path / "s.jsonl").write_text(json.dumps(content) if content == "one line" else content)
    flags = ["--preset", "nano", "--tokenizer", "byte", "--out_dir", "run", "--device", "cpu"]
    named = "(--val_fraction, --test_fraction, --separator:" if content == "one line" else "(--text_field:"
    stderr = mistake("train.py", "--dataset", "s.jsonl", *flags, cwd=tmp_path)
    assert f"{named} of prepare_data.py, whose --output is then given as --data_dir)" in stderr


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_a_kind_that_is_made_from_text_cannot_be_shown(tmp_path, mistake, kind):
    assert f"a {kind} tokenizer is made from text" in mistake("tokenizer_train.py", "--show", "x", "--tokenizer", kind, cwd=tmp_path)


@pytest.mark.parametrize("seed", ["9" * 30, "-1", "x"])
def test_impossible_seeds(tmp_path, mistake, seed):
    assert "seed" in mistake("prepare_data.py", "--sample", "--seed", seed, cwd=tmp_path)


# ---------------------------------------------------------------- datasets and processes


class Breaks:
    """Rows of which the third can't be read."""

    def __iter__(self):
        yield {"text": "a"}
        yield {"text": "b"}
        raise RuntimeError("page 7 is broken")


def test_a_damaged_dataset_is_named():
    with pytest.raises(ValueError, match=r"some/set:train can't be read behind row 2 .*page 7 is broken"):
        list(HubSplit("some/set", "train", Breaks(), FORM))


@pytest.mark.slow
def test_a_damaged_dataset_folder_is_named(tmp_path, mistake):
    (tmp_path / "d").mkdir()
    data = bytearray(parquet([f"a story of {i}" for i in range(500)]))
    data[300:2000] = b"\xff" * 1700
    (tmp_path / "d" / "a.parquet").write_bytes(data)
    assert "d:train can't be read behind row 0" in mistake("prepare_data.py", "--dataset", "d", "--tokenizer", "byte", cwd=tmp_path)


@pytest.mark.parametrize("error", [MemoryError("full"), ValueError("odd"), RuntimeError("a bug")])
def test_an_error_in_a_process_arrives(tmp_path, monkeypatch, error):
    write_stories(tmp_path / "s.txt", STORIES)

    def fail(*_):
        raise error

    monkeypatch.setattr(encoding.Recipe, "encode", fail)  # forked processes have it too
    names = {"input": (str(tmp_path / "s.txt"),), "output": str(tmp_path / "data")}
    with pytest.raises(type(error), match=str(error)) as raised:
        prepare_data.prepare(prepare_data.Arguments(**names, tokenizer="byte", num_workers=2))
    assert "in fail" in raised.value.__notes__[0]  # where it happened


# ---------------------------------------------------------------- tokenizers


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("tokenizer", [unigram(), Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefg ")}, []))])
def test_text_that_a_tokenizer_loses_is_counted_and_told(tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.chdir(tmp_path)
    tokenizer.add_special_tokens([EOT])
    tokenizer.save("t.json")
    write_stories(tmp_path / "s.txt", [*STORIES, *(f"{'a' * i}" for i in range(1, 5))])
    assert prepare_data.main(["--input", "s.txt", "--tokenizer", "t.json", "--no_report"]) == 0
    captured = capsys.readouterr()
    counted = DataDirectory(tmp_path / "data").meta["counts"][encoding.LOST]
    assert len(STORIES) <= counted <= len(STORIES) + 4
    assert f"warning: {counted} documents contain text that the tokenizer does not give back" in captured.err


@pytest.mark.parametrize("kind", ["bpe", "byte", "char", "wordpiece"])
def test_what_loses_nothing_counts_nothing(tmp_path, kind):
    write_stories(tmp_path / "s.txt", STORIES)
    names = {"input": (str(tmp_path / "s.txt"),), "output": str(tmp_path / "data")}
    meta = prepare_data.prepare(prepare_data.Arguments(**names, tokenizer=kind, report=False))
    assert meta["counts"] == {} and len(documents(tmp_path / "data", "val")) > 3


ENDLESS = {"digits": "0123456789", "DNA": "ACGT", "blanks": " \n", "dashes": "-", "letters": "aé北"}


def test_ordinary_text_gives_the_vocabulary_that_it_always_gave():
    texts = [*STORIES, "=" * 900 + " " * 900 + "x" * 900, "北京" * 400 + "。" * 3 + "漢" * 900, "a1" * 2000]
    assert list(_with_short_words(texts, byte_level(models.BPE()).pre_tokenizer)) == texts
    plain = byte_level(models.BPE())
    plain.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=[EOT], initial_alphabet=ALPHABET, show_progress=False)
    )
    assert train_bpe(texts, 600).json == plain.to_str()


@pytest.mark.parametrize("letters", ENDLESS.values(), ids=ENDLESS)
def test_endless_words_are_learnt_in_pieces(monkeypatch, capsys, letters):
    monkeypatch.setattr("preparation.tokenizer_kinds.SLICE", 7000)
    text = "A beginning, then " + "".join(random.Random(0).choices(letters, k=30_000)) + " and more."
    words = byte_level(models.BPE()).pre_tokenizer
    pieces = list(_with_short_words([text, "short", text], words))
    assert "".join(pieces) == f"{text}short{text}" and "short" in pieces
    assert max(end - start for piece in pieces for _, (start, end) in words.pre_tokenize_str(piece)) <= 2 * LONGEST_WORD
    assert capsys.readouterr().err.count("learns from pieces") == 1


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_both_kinds_that_merge_learn_in_pieces(capsys, kind):
    text = "".join(random.Random(0).choices("ACGT", k=20_000))
    tokenizer = make_tokenizer(kind, [text], 600)
    assert tokenizer.vocab_size == 600 and "learns from pieces" in capsys.readouterr().err
    assert tokenizer.decode(tokenizer.encode(text[:90])) == text[:90]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_training_that_never_returns_to_python(tmp_path, number, code):
    program = tmp_path / "program.py"
    program.write_text(f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from preparation import tokenizer_kinds
from utils import run_script
tokenizer_kinds._with_short_words = lambda texts, words: texts  # then this text takes days
def main():
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print("begins", file=sys.stderr, flush=True)
    tokenizer_kinds.train_bpe(["7" * 5_000_000], 4096)
run_script(main)
""")
    process = start(program=program)
    assert process.stderr.readline() == "begins\n"
    with pytest.raises(Exception, match="timed out"):
        process.wait(1)  # it is at work
    process.send_signal(number)
    assert process.wait(120) == code and "Traceback" not in process.stderr.read()
