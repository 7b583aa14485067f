"""evaluation.npz: what is written is read back, and a damaged file is told."""

import contextlib

import numpy as np
import pytest

from formats.scores import ItemScores, content_hash, read_known, read_scores, write_scores


def scores(**columns) -> ItemScores:
    return ItemScores(content_hash("key"), content_hash("items"), "text", {"loss": 1.5, "reason": None}, columns, content_hash("model"))


def test_round_trip(tmp_path):
    sets = {"./data val": scores(nats=np.array([1.5, 2.5]), bytes=np.array([3, 4])), "blimp": scores(correct=np.array([1.0]))}
    write_scores(tmp_path / "evaluation.npz", sets)
    read = read_scores(tmp_path / "evaluation.npz")
    assert list(read) == list(sets)
    for name, expected in sets.items():
        for field in ("key", "items", "kind", "summary", "model"):
            assert getattr(read[name], field) == getattr(expected, field)
        assert read[name].columns.keys() == expected.columns.keys()
        for column, values in expected.columns.items():
            assert read[name].columns[column].dtype == values.dtype and (read[name].columns[column] == values).all()
    assert read_scores(tmp_path / "missing.npz") == {}


def test_hashes_depend_on_every_part_and_its_place():
    hashes = {content_hash(*parts) for parts in ((), ("a",), ("a", "b"), ("ab",), (b"ab",), ("b", "a"), ({"a": 1},), ({"a": 2},))}
    assert len(hashes) == 8
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})


@pytest.mark.parametrize("fault", ["cut", "flipped", "text", "an array", "length", "nan", "words", "missing"])
def test_damaged_files_are_told(tmp_path, fault):
    path = tmp_path / "evaluation.npz"
    columns = {"nats": np.array([1.0, 2.0]), "bytes": np.array([1, 2])}
    if fault == "length":
        columns["bytes"] = np.array([1])
    if fault == "words":
        columns["nats"] = np.array(["one", "two"])
    if fault == "nan":
        columns["nats"] = np.array([1.0, np.nan])
    write_scores(path, {"text": scores(**columns)})
    content = path.read_bytes()
    if fault == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "flipped":
        at = content.index(b"NUMPY") + 60 if b"NUMPY" in content else len(content) // 3
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
    elif fault == "text":
        path.write_text("no archive")
    elif fault == "an array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif fault == "missing":
        arrays = dict(np.load(path))
        del arrays["0/nats"]
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"evaluation.npz is damaged.*; delete it"):
        read_scores(path)


def test_a_task_without_scores_of_items_is_read_back(tmp_path):
    write_scores(tmp_path / "evaluation.npz", {"wikitext": scores()})
    assert read_scores(tmp_path / "evaluation.npz")["wikitext"].columns == {}


def test_any_flipped_bit_is_no_more_than_damage(tmp_path):
    path = tmp_path / "evaluation.npz"
    write_scores(path, {"text": scores(nats=np.array([1.0, 2.0]), bytes=np.array([1, 2]))})
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with contextlib.suppress(ValueError):  # nothing else is raised; in dates and such nothing is damaged
            read_scores(path)


@pytest.mark.parametrize("name", ["index", "other"])
def test_somebody_else_s_archive_is_not_taken_for_a_damaged_one(tmp_path, name):
    np.savez(tmp_path / "evaluation.npz", **{name: np.arange(3)})
    with pytest.raises(ValueError, match=r"evaluation.npz is no table of scores of ours; move it away"):
        read_known(tmp_path / "evaluation.npz")
