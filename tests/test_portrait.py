"""The portrait: its figures against plain counting, its picture drawn for odd data too."""

import io
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from preparation import portrait
from preparation.portrait import WORD, Words, describe, draw, openings, overlap, scripts, variety
from preparation.tokenizer_kinds import byte_tokenizer
from prepare_data import Arguments, prepare
from tests.runs import write_stories
from tests.test_prepare import STORIES

BYTE = byte_tokenizer()
PHRASES = st.lists(st.sampled_from(["a", "b", "c", "Once", "upon", "."]), max_size=30).map(" ".join)


def words_of(*groups: list[str]) -> list[Words]:
    numbers: dict[str, int] = {}
    return [Words(group, numbers) for group in groups]


@given(train=st.lists(PHRASES, max_size=4), val=st.lists(PHRASES, max_size=4))
@settings(max_examples=100, deadline=None)
def test_overlap_is_that_of_sets(train, val):
    found = overlap(*words_of(train, val))
    for n in portrait.NGRAMS:

        def runs(text, n=n):
            words = WORD.findall(text)
            return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

        there = {run for text in train for run in runs(text)}
        theirs = [run for text in val for run in runs(text)]
        whole = [text for text in val if runs(text)]
        assert found[str(n)]["ngrams"] == len(theirs)
        assert found[str(n)]["shared"] == pytest.approx(sum(run in there for run in theirs) / max(1, len(theirs)))
        hit = sum(any(run in there for run in runs(text)) for text in whole)
        assert found[str(n)]["documents_with_shared"] == pytest.approx(hit / max(1, len(whole)))


@given(texts=st.lists(PHRASES, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_variety_is_that_of_counters(texts):
    (words,) = words_of(texts)
    found = variety(words, texts)
    lists = [WORD.findall(text) for text in texts]
    single = Counter(word for each in lists for word in each)
    pairs = Counter(pair for each in lists for pair in zip(each, each[1:]))

    def bits(counts):
        return -sum(n / counts.total() * math.log2(n / counts.total()) for n in counts.values())

    assert found["words"] == single.total() and found["distinct_words"] == len(single)
    assert found["unigram_entropy_bits"] == pytest.approx(bits(single), abs=1e-9)
    assert found["bigram_entropy_bits"] == pytest.approx(max(0, bits(pairs) - bits(single)), abs=1e-9)
    if single:
        assert found["type_token_ratio"]["ratio"] == pytest.approx(len(single) / single.total())
        assert found["zipf"]["count"][0] == single.most_common(1)[0][1] and found["zipf"]["count"][-1] == min(single.values())


def test_openings_and_scripts():
    texts = ["Once upon a time there was"] * 3 + ["Il était une fois"]
    assert openings(texts)[0] == {"opening": "Once upon a time", "share": 0.75}
    shares = scripts(["abcd Жя 北 1!"])
    assert shares == {"Latin": pytest.approx(4 / 7), "Cyrillic": pytest.approx(2 / 7), "Han": pytest.approx(1 / 7)}


def report_of(texts: dict[str, list[str]], **changes) -> dict:
    encoded = {split: BYTE.encode_documents(of_split) for split, of_split in texts.items()}
    splits = {
        split: {"documents": len(counts), "tokens": len(ids), "bytes": len(ids) - len(counts)} for split, (ids, counts) in encoded.items()
    }
    sizes = {split: counts for split, (_, counts) in encoded.items()}
    return describe(sizes, lambda split, start, count: encoded[split][0][start : start + count], BYTE, splits, changes)


@pytest.mark.parametrize(
    "texts",
    [
        ["x"] * 3,
        ["$x$ and $\\frac{ $", "#_{} & \x07 bell", "北京市 الرحمن עברית 🙂"],
        ["", "!", "a" * 5000],
        STORIES,
    ],
    ids=["one letter", "signs", "no words", "stories"],
)
def test_every_text_has_a_picture(texts):
    report = report_of({"train": texts, "val": texts[:2], "test": texts[:1]}, duplicates=3)
    assert json.loads(json.dumps(report)) == report
    assert sum(report["document_tokens"]["train"]["histogram"]["documents"]) == len(texts)
    assert report["sample"]["train"] == {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts), "all": True}
    pictures = [io.BytesIO(), io.BytesIO()]
    for picture in pictures:
        draw(report, picture, "a $title$")
    assert pictures[0].getvalue() == pictures[1].getvalue() and pictures[0].getvalue().startswith(b"\x89PNG")


def test_openings_that_look_alike_once_shortened_have_a_bar_each(monkeypatch):
    drawn, barh = [], Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda panel, y, width, **options: drawn.append(width) or barh(panel, y, width, **options))
    texts = [f"{'long' * 10} opening number {i}" for i in range(10)]
    report = report_of({"train": texts, "val": texts, "test": texts})
    draw(report, io.BytesIO(), "alike")
    assert drawn[0] == [0.1] * 10


def test_a_large_corpus_is_sampled_and_says_so(monkeypatch):
    monkeypatch.setattr(portrait, "SAMPLE_BYTES", {"train": 5000, "val": 1000})
    report = report_of(dict.fromkeys(("train", "val", "test"), STORIES))
    sample = report["sample"]["train"]
    assert not sample["all"] and 5000 <= sample["bytes"] < 7000 and sample["documents"] < 12
    assert report["splits"]["train"]["documents"] == len(STORIES)
    assert sum(report["document_tokens"]["train"]["histogram"]["documents"]) == len(STORIES)


def test_the_portrait_of_an_older_preparation_does_not_stay(tmp_path):
    write_stories(tmp_path / "s.txt", STORIES)
    values = {"input": (str(tmp_path / "s.txt"),), "tokenizer": "byte", "output": str(tmp_path / "d")}
    prepare(Arguments(**values))
    report = json.loads((tmp_path / "d" / "data_report.json").read_text())
    assert report["splits"]["train"]["documents"] == np.sum(report["document_tokens"]["train"]["histogram"]["documents"])
    assert (tmp_path / "d" / "data_report.png").is_file()
    prepare(Arguments(**values, report=False))
    assert not (tmp_path / "d" / "data_report.json").exists() and not (tmp_path / "d" / "data_report.png").exists()
