"""evaluation.npz: what is written is read back, and a damaged file is told."""

import numpy as np
import pytest

from formats.scores import ItemScores, content_hash, read_scores, write_scores


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


@pytest.mark.parametrize("fault", ["cut", "flipped", "text", "no index", "length", "nan", "missing"])
def test_damaged_files_are_told(tmp_path, fault):
    path = tmp_path / "evaluation.npz"
    columns = {"nats": np.array([1.0, 2.0]), "bytes": np.array([1, 2])}
    if fault == "length":
        columns["bytes"] = np.array([1])
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
    elif fault == "no index":
        np.savez(path, other=np.zeros(3))
    elif fault == "missing":
        arrays = dict(np.load(path))
        del arrays["0/nats"]
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"evaluation.npz is damaged.*; delete it"):
        read_scores(path)
