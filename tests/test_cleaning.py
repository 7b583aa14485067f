"""Cleaning, de-duplication, held-out documents, limits and mixtures: variants differ only in what they mean to change."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from formats.data_directory import DataDirectory
from formats.tokenizer import EOT
from preparation.cleaning import Cleaning, document_key, shuffle_words, skeleton, split_by_hash
from preparation.corpus import DocumentSample
from preparation.overlap import file_texts, seen_in_training, split_texts
from preparation.selection import KeySet
from preparation.sources import Format
from preparation.tokenizer_kinds import text_normalizer
from prepare_data import Arguments
from tests.runs import documents, write_stories
from tests.test_prepare import STORIES


def prepared(tmp_path, texts, name="d", clean=None, **arguments) -> dict:
    """meta.json of texts (a list, or lists by file name), prepared with bytes as tokens."""
    files = {"s.txt": texts} if isinstance(texts, list) else texts
    for file, stories in files.items():
        write_stories(tmp_path / file, stories)
    if "input" not in arguments:
        arguments["input"] = tuple(str(tmp_path / file) for file in files)
    defaults = {"tokenizer": "byte", "report": False, "output": str(tmp_path / name), "cleaning": Cleaning(**(clean or {}))}
    return prepare_data.prepare(Arguments(**(defaults | arguments)))


def everything(directory) -> list[str]:
    return [text for split in ("train", "val", "test") for text in documents(directory, split)]


@pytest.mark.parametrize(
    ("flag", "text", "cleaned"),
    [
        ("whitespace", "  a\t\u00a0b \r\n\r\n\r\n\n c\u2028d  \r", "a b\n\nc\nd"),
        ("remove_control", "a\x00b\x1b[0m\ttab\nline\r\n\u200b\ufeff\u00ad\ufffd\ue000z", "ab[0m\ttab\nline\r\nz"),
        ("remove_control", "👩\u200d👧 می\u200cخواهم", "👩\u200d👧 می\u200cخواهم"),  # joiners carry meaning
    ],
)
def test_flags(flag, text, cleaned):
    counts = Counter()
    assert Cleaning(**{flag: True}).clean(text, counts) == cleaned
    assert counts[f"changed by {flag}"] == (text != cleaned)
    assert Cleaning().clean(text, counts) == text


@given(text=st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_cleaning_twice_changes_nothing_more(text):
    cleaning = Cleaning(whitespace=True, remove_control=True)
    once = cleaning.clean(text, Counter())
    assert cleaning.clean(once, Counter()) == once and "\r" not in once and "\x00" not in once and "  " not in once


ODD = " \t\r\n\x00\x1c\x85\u00ad\u200b\u2028\u3000\ufeff\ufffc\ufffd\ue000aAIİıßẞςΣǅᾼÅ\u212b\u0301\u0323\u0345가\u1100\u1161"


@given(
    text=st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs", "Cn"]), max_size=60), flags=st.tuples(*[st.booleans()] * 4)
)
@settings(max_examples=500, deadline=None)
def test_no_cleaning_changes_what_decides_on_the_split(text, flags):
    cleaning, normalizer = Cleaning(whitespace=flags[0], remove_control=flags[1]), text_normalizer(*flags[2:])
    cleaned = cleaning.clean(text, Counter())
    assert skeleton(cleaned if normalizer is None else normalizer.normalize_str(cleaned)) == skeleton(text)
    assert skeleton(text + "x1") != skeleton(text + "x2")


def test_variants_by_cleaning_have_the_same_documents_in_each_split(tmp_path):
    texts = [f"Story  {i}. \u200b{story}\r\nCafe\u0301 " for i, story in enumerate(STORIES)]
    prepared(tmp_path, texts, "raw")
    flags = dict.fromkeys(("whitespace", "remove_control", "lowercase", "nfc"), True)
    meta = prepared(tmp_path, texts, "clean", flags | {"min_chars": 810})
    for split in ("train", "val", "test"):
        raw, clean = ([text.split()[1] for text in documents(tmp_path / name, split)] for name in ("raw", "clean"))
        assert clean and set(clean) < set(raw)
    assert meta["counts"]["shorter than min_chars"] == len(texts) - len(everything(tmp_path / "clean"))


def test_mojibake_is_repaired(tmp_path):
    broken = "cafÃ© and naÃ¯ve"
    assert Cleaning(fix_mojibake=True).clean(broken, Counter()) == "café and naïve"
    meta = prepared(tmp_path, [*STORIES[:120], broken], clean={"fix_mojibake": True})
    assert "café and naïve" in everything(tmp_path / "d") and meta["counts"] == {"changed by fix_mojibake": 1}


def test_without_ftfy_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr("preparation.cleaning.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install ftfy"):
        Cleaning(fix_mojibake=True)


def test_lengths_and_repetitions_are_dropped_and_counted(tmp_path):
    texts = [*STORIES[:120], "short", "long " * 1000, STORIES[0], STORIES[1] + " ", " \t ", STORIES[0]]
    meta = prepared(tmp_path, texts, clean={"min_chars": 10, "max_chars": 4000, "whitespace": True})
    kept = Counter(" ".join(text.split(" ")) for text in everything(tmp_path / "d"))
    assert kept == Counter(STORIES[:120])
    counts = {"duplicates": 3, "empty": 1, "longer than max_chars": 1, "shorter than min_chars": 1, "changed by whitespace": 3}
    assert meta["counts"] == dict(sorted(counts.items())) and meta["cleaning"]["min_chars"] == 10
    meta = prepared(tmp_path, texts, clean={"deduplicate": False})
    assert Counter(everything(tmp_path / "d"))[STORIES[0]] == 3 and "duplicates" not in meta["counts"]


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        ({"min_chars": -1}, "min_chars=-1 must be at least 0"),
        ({"min_chars": 5, "max_chars": 4}, "leave no documents"),
        ({"max_chars": 0}, "max_chars=0 must be at least 1"),
    ],
)
def test_impossible_lengths(bad, part):
    with pytest.raises(ValueError, match=part):
        Cleaning(**bad)


def test_repetitions_go_across_sources_and_splits_stay(tmp_path):
    """A document lands in the same split whatever stands beside it; of equal ones in several files one stays."""
    prepared(tmp_path, {"a.txt": STORIES[:150]}, "one")
    meta = prepared(tmp_path, {"b.txt": STORIES[100:260], "a.txt": STORIES[:150]}, "two")
    assert meta["counts"] == {"duplicates": 50}
    for split in ("train", "val", "test"):
        assert set(documents(tmp_path / "one", split)) <= set(documents(tmp_path / "two", split))
    assert Counter(everything(tmp_path / "two")) == Counter(STORIES)


@pytest.mark.parametrize("deduplicate", [True, False])
def test_what_is_held_out_does_not_stand_in_train(tmp_path, deduplicate):
    write_stories(tmp_path / "val.txt", STORIES[:20])
    write_stories(tmp_path / "test.txt", STORIES[15:30])
    given = {"val_input": (str(tmp_path / "val.txt"),), "test_input": (str(tmp_path / "test.txt"),)}
    meta = prepared(tmp_path, STORIES[10:200], clean={"deduplicate": deduplicate}, **given)
    assert documents(tmp_path / "d", "train") == STORIES[30:200] and documents(tmp_path / "d", "val") == STORIES[:20]
    assert meta["counts"]["in val or test already"] == 20
    assert documents(tmp_path / "d", "test") == STORIES[20 if deduplicate else 15 : 30]


def test_lowercase_is_part_of_the_tokenizer(tmp_path):
    texts = [text.replace("Once", "ONCE \u212b e\u0301") for text in STORIES[:150]] + [STORIES[150], STORIES[150].upper()]
    meta = prepared(tmp_path, texts, clean={"lowercase": True, "nfc": True}, tokenizer="bpe", vocab_size=400)
    data = DataDirectory(tmp_path / "d")
    found = everything(tmp_path / "d")
    assert all(text == text.lower() for text in found) and any("once å é" in text for text in found)
    assert data.tokenizer.decode(data.tokenizer.encode("ONCE UPON")) == "once upon"  # prompts too
    assert meta["counts"]["duplicates"] == 1 and meta["cleaning"]["lowercase"]
    assert sum(split["bytes"] for split in meta["splits"].values()) == sum(len(text.encode()) for text in found)
    second = prepared(tmp_path, texts, "again", tokenizer=str(tmp_path / "d"))  # the file alone does the same
    assert second["splits"] == meta["splits"]


@pytest.mark.parametrize("kind", ["word", "char", "wordpiece"])
def test_unknown_tokens_are_counted_and_told(tmp_path, capsys, kind):
    odd = [f"Zyxwvut qponmlk é{i} Ω " + "x" * 120 for i in range(40)]
    vocab_size = {"word": 200, "char": None, "wordpiece": 600}[kind]
    prepared(tmp_path, STORIES[:150], tokenizer=kind, vocab_size=vocab_size)
    meta = prepared(tmp_path, STORIES[:150] + odd, "e", tokenizer=str(tmp_path / "d"))
    data = DataDirectory(tmp_path / "e")
    for split, unknown in meta["unknown_tokens"].items():
        assert unknown == int((data.tokens(split) == data.tokenizer.unknown_id).sum())
    assert meta["unknown_tokens"]["train"] > 20
    capsys.readouterr()
    prepare_data.tell(meta)
    assert "are unknown to the tokenizer" in capsys.readouterr().err


# ---------------------------------------------------------------- sets and samples


@given(batches=st.lists(st.lists(st.integers(0, 60), max_size=30), max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_key_set_is_a_set(batches):
    keys, seen = KeySet(), set()
    for batch in batches:
        fresh = [key not in seen and key not in batch[:i] for i, key in enumerate(batch)]
        assert keys.contains(np.array(batch, np.uint64)).tolist() == [key in seen for key in batch]
        found = keys.fresh(np.array(batch, np.uint64))
        assert found.tolist() == fresh
        keys.add(np.array(batch, np.uint64)[found])
        seen |= set(batch)
        assert len(keys) == len(seen) and all(len(a) >= 2 * len(b) for a, b in zip(keys.runs, keys.runs[1:]))


@given(texts=st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=20), limit=st.integers(1, 80), order=st.randoms())
@settings(max_examples=200, deadline=None)
def test_a_sample_does_not_depend_on_the_order(texts, limit, order):
    def sample(texts):
        chosen = DocumentSample(limit)
        for text in texts:
            chosen.add(document_key(text, 1), text.encode())
        return list(chosen.texts())

    first = sample(texts)
    assert sum(len(text.encode()) for text in first) <= limit
    assert bool(first) == bool(texts) and (len(first) == 1 or set(first) <= set(texts))
    assert sample(texts[:3] + texts) == first
    order.shuffle(texts)
    assert sample(texts) == first


def test_a_tokenizer_learns_from_train_only(tmp_path):
    texts = STORIES[:150]
    held = next(text for text in texts if split_by_hash(text, 1337, 0.05, 0.05) == "val")
    marked = [text + " \u2603" if text == held else text for text in texts]
    split = split_by_hash(held + " \u2603", 1337, 0.05, 0.05)
    prepared(tmp_path, marked, tokenizer="char")
    assert ("\u2603" in DataDirectory(tmp_path / "d").tokenizer.tokenizer.get_vocab()) == (split == "train")


# ---------------------------------------------------------------- limits and mixtures


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize(("limit", "n"), [("max_documents", 120), ("max_bytes", 60_011), ("max_tokens", 70_007)])
def test_limits_are_exact_for_any_number_of_workers(tmp_path, monkeypatch, limit, n, workers):
    monkeypatch.setattr("preparation.encoding.BATCH_CHARACTERS", 5000)
    texts = [text.replace("a", "é") for text in STORIES]
    meta = prepared(tmp_path, texts, f"w{workers}", **{limit: n}, num_workers=workers)
    train = meta["splits"]["train"]
    assert n - 3 <= train[limit.removeprefix("max_")] <= n
    found = documents(tmp_path / f"w{workers}", "train")
    whole = [text for text in texts if split_by_hash(text, 1337, 0.05, 0.05) == "train"][: len(found)]
    assert found[:-1] == whole[:-1] and whole[-1].startswith(found[-1]) and "\ufffd" not in found[-1]
    assert train["bytes"] == sum(len(text.encode()) for text in found) and train["documents"] == len(found)
    assert meta["counts"] == ({} if limit == "max_documents" else {"cut off at the limit": 1})
    other = tmp_path / "w1"
    if workers > 1:
        prepared(tmp_path, texts, "w1", **{limit: n}, num_workers=1)
        for name in ("train.bin", "val.bin", "test.bin", "meta.json"):
            assert (other / name).read_bytes() == (tmp_path / f"w{workers}" / name).read_bytes()


@pytest.mark.parametrize("limit", [{"max_documents": 90}, {"max_tokens": 40_000}])
def test_what_lies_behind_a_limit_changes_nothing(tmp_path, monkeypatch, limit):
    """Neither documents that were read ahead, nor equal ones among them, nor bytes that are not UTF-8."""
    monkeypatch.setattr("preparation.encoding.BATCH_CHARACTERS", 9000)
    results = []
    for i, workers in enumerate((1, 2, 3)):
        write_stories(tmp_path / "a.txt", STORIES)
        with open(tmp_path / "a.txt", "ab") as file:
            file.write(b"\xff\xff")
        write_stories(tmp_path / "b.txt", STORIES[::-1])
        shares = {"input": (f"{tmp_path}/a.txt:1", f"{tmp_path}/b.txt:1"), "form": Format(errors="replace"), "num_workers": workers}
        results.append(prepared(tmp_path, {}, f"d{i}", **shares, **limit))
    assert results[0] == results[1] == results[2]
    first = documents(tmp_path / "d0", "train")
    assert len(set(first)) == len(first) and len(first) > 40
    assert "bytes that are not UTF-8" not in results[0]["counts"] or results[0]["counts"]["bytes that are not UTF-8"] == 2


def test_bytes_that_are_not_utf8_are_counted_once(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(EOT.join(f"{name} {text}" for text in STORIES).encode() + b" \xff end")
    inputs = (f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")
    meta = prepared(tmp_path, {}, input=inputs, form=Format(errors="replace"), tokenizer="bpe", vocab_size=300)
    assert meta["counts"] == {"bytes that are not UTF-8": 2} and meta["made_with"]["errors"] == "replace"


def test_a_split_that_is_full_to_the_token_takes_no_further_document(tmp_path):
    texts = [f"Document {i:03} of the same length." for i in range(200)]
    meta = prepared(tmp_path, texts, max_tokens=20 * (len(texts[0]) + 1), val_fraction=0.6)
    assert meta["splits"]["val"] == meta["splits"]["val"] | {"documents": 20, "tokens": 20 * (len(texts[0]) + 1)}
    assert meta["counts"] == {}


def test_one_long_text_is_cut_at_the_limit_too(tmp_path):
    (tmp_path / "book.txt").write_text("A line of a long book.\n" * 3000)
    meta = prepared(tmp_path, {}, input=(str(tmp_path / "book.txt"),), max_tokens=10_000)
    assert meta["splits"]["train"]["tokens"] == 10_000 and meta["splits"]["train"]["documents"] == 1


def test_sources_that_are_too_short_are_told(tmp_path, capsys):
    meta = prepared(tmp_path, STORIES, max_tokens=10**9)
    assert f"train has {meta['splits']['train']['tokens']:,} tokens" in capsys.readouterr().err


def of_which(directory, stories) -> int:
    """Bytes of train that come from these stories, a cut one included."""
    return sum(len(text.encode()) + 1 for text in documents(directory, "train") if any(story.startswith(text) for story in stories))


@pytest.mark.parametrize("budget", [40_000, None])
def test_mixtures_have_the_shares_of_their_weights(tmp_path, budget):
    files = {"a.txt": STORIES[:130], "b.txt": STORIES[130:]}
    shares = {"input": (f"{tmp_path}/a.txt:0.25", f"{tmp_path}/b.txt:0.75")}
    meta = prepared(tmp_path, files, max_tokens=budget, **shares)
    total = meta["splits"]["train"]["tokens"]
    assert total == budget or (budget is None and total > 90_000)
    assert of_which(tmp_path / "d", STORIES[:130]) == pytest.approx(total / 4, abs=1)
    assert [source["weight"] for source in meta["sources"]] == ["1/4", "3/4"]


def test_a_share_that_a_source_cannot_give(tmp_path):
    files = {"a.txt": STORIES[:130], "b.txt": STORIES[130:]}
    with pytest.raises(ValueError, match=r"a.txt ended before its share of --max_tokens, 100,000"):
        prepared(tmp_path, files, input=(f"{tmp_path}/a.txt:0.1", f"{tmp_path}/b.txt:0.9"), max_tokens=1_000_000)
    assert not list((tmp_path / "d").glob("*"))
    for inputs, part in (((":0.1", ""), "to every --input"), ((":0.1", ":0"), "must be above 0")):
        with pytest.raises(ValueError, match=part):
            prepared(tmp_path, files, input=tuple(f"{tmp_path}/{name}.txt{weight}" for name, weight in zip("ab", inputs)))
    with pytest.raises(ValueError, match="would be in two splits or shares"):
        prepared(tmp_path, files, input=(f"{tmp_path}/*.txt:0.1", f"{tmp_path}/b.txt:0.9"))


def test_books_in_a_mixture_are_split_by_position(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Line {i} of a long book.\n" for i in range(3000)))
    write_stories(tmp_path / "s.txt", STORIES)
    meta = prepared(tmp_path, {}, input=(f"{tmp_path}/s.txt:1", f"{tmp_path}/book.txt:1"), max_tokens=60_000)
    assert meta["splits"]["train"]["tokens"] == 60_000 and meta["split"]["rule"] == "hash and position"
    assert any(text.startswith("Line 27") for text in documents(tmp_path / "d", "val"))


def test_what_the_sample_corpus_does_not_take(tmp_path, mistake):
    for flags in (["--lowercase"], ["--max_tokens", "100"], ["--no_deduplicate"], ["--min_chars", "5"]):
        assert f"leave {flags[0].replace('no_', '')} out" in mistake("prepare_data.py", "--sample", *flags, cwd=tmp_path)


def test_the_command_line_tells_what_happened(tmp_path, script):
    rows = [json.dumps({"story": text}) for text in [*STORIES, STORIES[0], "nul \0 inside", "CR\r\nLF", f"the literal {EOT}"]]
    (tmp_path / "s.jsonl").write_text("\n".join(rows))
    flags = ["--text_field", "story", "--tokenizer", "bpe", "--vocab_size", "300", "--num_workers", "2", "--output", "d"]
    process = script("prepare_data.py", "--input", "s.jsonl", *flags, cwd=tmp_path)
    assert "1 duplicates" in process.stdout and "1 documents have NUL" in process.stderr and "1 documents have CR" in process.stderr
    report = json.loads((tmp_path / "d" / "data_report.json").read_text())
    assert report["dropped_or_changed"]["duplicates"] == 1 and (tmp_path / "d" / "data_report.png").stat().st_size > 10_000
    eot = DataDirectory(tmp_path / "d").tokenizer.eot_id
    ends = sum(int((DataDirectory(tmp_path / "d").tokens(split) == eot).sum()) for split in ("train", "val", "test"))
    assert ends == len(rows) - 1


@given(text=st.text(alphabet=st.sampled_from("ab é\n\t\u00a0"), max_size=60), seed=st.integers(0, 2**63))
def test_shuffled_words_are_the_same_words_between_the_same_blanks(text, seed):
    shuffled = shuffle_words(text, 1.0, seed)
    assert sorted(shuffled.split()) == sorted(text.split()) and re.split(r"\S+", shuffled) == re.split(r"\S+", text)
    assert shuffle_words(text, 1.0, seed) == shuffled and shuffle_words(text, 0.0, seed) == text


def test_a_share_of_the_training_documents_is_shuffled_and_nothing_else(tmp_path):
    plain, shuffled, _ = (prepared(tmp_path, STORIES, name, shuffle_words=share) for name, share in (("p", 0.0), ("s", 0.3), ("m", 0.6)))
    for split in ("val", "test"):
        assert shuffled["splits"][split] == plain["splits"][split]
    texts = [documents(tmp_path / name, "train") for name in "psm"]
    changed, changed_more = ({i for i, (a, b) in enumerate(zip(texts[0], other)) if a != b} for other in texts[1:])
    assert 0.2 < len(changed) / len(texts[0]) < 0.4 and changed < changed_more
    assert all(sorted(texts[0][i].split()) == sorted(texts[1][i].split()) for i in changed)
    assert shuffled["made_with"]["shuffle_words"] == 0.3 and shuffled["counts"]["training documents with shuffled words"] == len(changed)
    assert "shuffle_words" not in plain["made_with"] and shuffled["splits"]["train"]["bytes"] == plain["splits"]["train"]["bytes"]


def test_the_sample_corpus_may_be_shuffled_and_keeps_its_entropy(tmp_path):
    arguments = {"sample": True, "sample_stories": 40, "tokenizer": "byte", "report": False, "shuffle_words": 0.5}
    meta = prepare_data.prepare(Arguments(**arguments, output=str(tmp_path / "d")))
    assert meta["counts"]["training documents with shuffled words"] in range(10, 31)
    assert len(DataDirectory(tmp_path / "d").entropy("test")) == 2 and documents(tmp_path / "d", "test")[0][0].isupper()


def test_held_out_documents_in_a_training_split_are_found(tmp_path):
    meta = prepared(tmp_path, STORIES)
    train, test = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "test")
    assert [*split_texts(tmp_path / "d", "test")] == test and meta["splits"]["test"]["documents"] == len(test)
    write_stories(tmp_path / "other.txt", [train[0].upper(), "  " + train[1].replace(" ", "\n"), "Something else."])
    sets = {"test": split_texts(tmp_path / "d", "test"), "other": file_texts([str(tmp_path / "other.txt")], Format())}
    assert seen_in_training(tmp_path / "d", sets) == {"test": 0, "other": 2}


def test_what_the_data_is_made_of(tmp_path):
    """Equal contents count as equal wherever they lie; each choice, source, weight and order counts."""
    for name, stories in (("a", STORIES[:50]), ("b", STORIES[50:]), ("c", STORIES[:50])):
        write_stories(tmp_path / f"{name}.txt", stories)

    def content(*names, **choices):
        return prepare_data.content_of(Arguments(input=tuple(f"{tmp_path}/{name}" for name in names), **choices))

    same = content("a.txt", "b.txt")
    assert content("c.txt", "b.txt", output="elsewhere", num_workers=3) == same
    others = [content("b.txt", "a.txt"), content("a.txt"), content("a.txt:1", "b.txt:2"), content("a.txt", "b.txt", seed=1)]
    others += [content("a.txt", "b.txt", **choice) for choice in ({"shuffle_words": 0.1}, {"val_fraction": 0.1}, {"max_tokens": 9})]
    assert same not in others
