"""compare.py: which runs are one variant, the same documents for all, verdicts in words, and what is written."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import compare
from compare import read_documents, run_scores
from evaluation.comparison import compare_variants
from evaluation.comparison_report import Point, render, write_comparison
from evaluation.held_out import model_hash
from evaluation.variants import common_name, group_runs, learning_curve, read_run
from formats.data_directory import DataDirectory
from formats.run_directory import load_model
from formats.scores import ItemScores, content_hash, write_scores
from tests.conftest import tiny


def item_scores(kind: str, items: str, summary: dict | None = None, **columns) -> ItemScores:
    return ItemScores(content_hash("key"), content_hash(items), kind, summary or {}, columns, content_hash("model"))


def study(effects: dict[str, float], n_runs: int = 3, noise: float = 0.002, items: int = 50, kind: str = "text", seed: int = 0) -> dict:
    """Variants with one set, in which each run's metric is 0.5 + the variant's effect + noise, almost alike on every item."""
    rng = np.random.default_rng(seed)
    n_bytes = rng.integers(50, 200, items)
    variants = {}
    for name, effect in effects.items():
        variants[name] = {}
        for i in range(n_runs):
            per_item = 0.5 + effect + noise * (i - (n_runs - 1) / 2) + rng.normal(0, noise / 10, items)
            columns = {"nats": per_item * n_bytes * math.log(2), "bytes": n_bytes} if kind == "text" else {"margin": per_item}
            variants[name][f"{name}{i}"] = {"held out": item_scores(kind, "held out", {"metric": "margin"}, **columns)}
    return variants


# ---------------------------------------------------------------- verdicts


def test_a_clear_difference_and_one_that_is_none():
    comparison = compare_variants(study({"books": 0.031, "stories": 0.0, "tales": 0.001}))
    books, tales, both = comparison.findings
    assert books.verdict.startswith("stories is better than books by 0.0311 bits/byte [0.0") and books.clear
    assert books.difference == pytest.approx(-0.031, abs=1e-3) and books.low < -0.031 < books.high < 0
    assert (tales.first, tales.second) == ("books", "tales") and tales.clear
    assert not both.clear and "stories and tales are not distinguishable (0.001" in both.verdict
    assert "more seeds of each needed for a difference of 0.0010" in both.verdict
    assert books.corrected_p == pytest.approx(3 * books.p) and both.corrected_p == both.p


def test_the_direction_of_a_task_is_up():
    finding = compare_variants(study({"a": 0.0, "b": 0.1}, kind="task")).findings[0]
    assert finding.verdict.startswith("b is better than a by 0.1") and " margin [" in finding.verdict and finding.difference < 0


@pytest.mark.parametrize(
    ("n_runs", "effect", "part"),
    [
        (1, 0.1, "the model of a is better than that of b by 0.099950 bits/byte [0.0998"),
        (1, 0.0, "the models of "),
        (2, 0.1, "a came out better than b by 0.1000 bits/byte [0.09"),
    ],
)
def test_few_seeds_give_no_verdict_on_the_data(n_runs, effect, part):
    finding = compare_variants(study({"a": 0.0, "b": effect}, n_runs)).findings[0]
    assert not finding.clear and part in finding.verdict and "train 3 of each" in finding.verdict
    expected = "one seed doesn't cover the training's variance" if n_runs == 1 else "2 seeds are too few for a verdict"
    assert expected in finding.verdict


@pytest.mark.parametrize(("n_runs", "items"), [(1, 20), (2, 20), (2, 1), (3, 20)])
def test_no_difference_is_no_advantage(n_runs, items):
    (variant,) = study({"a": 0.0}, n_runs, items=items).values()
    same = {name: {f"{name}{i}": sets for i, sets in enumerate(variant.values())} for name in "ab"}
    (finding,) = compare_variants(same).findings
    assert finding.difference == 0 and "better" not in finding.verdict and "-0.0000" not in finding.verdict


def test_one_document_says_nothing_about_chance():
    comparison = compare_variants(study({"a": 0.0, "b": 0.1}, items=1))
    finding = comparison.findings[0]
    assert (finding.p, finding.low, finding.clear) == (None, None, False) and "says nothing about chance" in finding.verdict
    assert "nan" not in render(comparison) and "0.10 bits/byte" in finding.verdict


def test_too_few_items_are_told_from_too_few_seeds():
    rng = np.random.default_rng(0)
    right = {name: [item_scores("task", "t", correct=(rng.random(40) < 0.5).astype(float))] * 3 for name in "ab"}
    variants = {name: {f"{name}{i}": {"t": s} for i, s in enumerate(scores)} for name, scores in right.items()}
    assert "times as many items are needed for a difference of " in compare_variants(variants).findings[0].verdict


def test_holm_counts_every_comparison_of_the_call():
    variants = study({"a": 0.0, "b": 0.006})
    one = compare_variants(variants).findings[0]
    for runs in variants.values():
        for sets in runs.values():
            sets |= {f"more {j}": sets["held out"] for j in range(9)}
    ten = compare_variants(variants)
    assert len(ten.findings) == 10 and ten.findings[0].corrected_p == pytest.approx(min(1, 10 * one.p))
    assert one.clear and not ten.findings[0].clear and "before the correction" in ten.findings[0].verdict
    assert "corrected for 10 comparisons" in render(ten)


def break_scores(variants: dict, fault: str) -> None:
    sets = variants["b"]["b1"]
    scores = sets["held out"]
    if fault == "nan":
        scores.columns["nats"][3] = math.nan
    elif fault == "other items":
        sets["held out"] = dataclasses.replace(scores, items=content_hash("others"))
    elif fault == "no column":
        sets["held out"] = dataclasses.replace(scores, columns={"bytes": scores.columns["bytes"]})
    elif fault == "no bytes":
        sets["held out"] = dataclasses.replace(scores, columns={"nats": scores.columns["nats"]})
    elif fault == "nothing in common":
        sets["elsewhere"] = sets.pop("held out")
    elif fault == "twice":
        variants["a"]["b1"] = sets
    elif fault == "one variant":
        del variants["a"]
    elif fault == "no text":
        for runs in variants.values():
            for other in runs.values():
                other["held out"].columns["bytes"] = np.zeros(50, int)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("nan", "the scores of b1 on held out hold numbers that are not finite"),
        ("other items", "different items of held out"),
        ("no column", "the scores of b1 on held out have no nats"),
        ("no bytes", "the scores of b1 on held out have no bytes"),
        ("nothing in common", "no documents and no tasks in common"),
        ("twice", "b1 is named twice"),
        ("one variant", "only one variant, b"),
        ("no text", "held out holds nothing to compare on"),
    ],
)
def test_scores_that_cannot_be_compared(fault, part):
    variants = study({"a": 0.0, "b": 0.1})
    break_scores(variants, fault)
    with pytest.raises(ValueError, match=part):
        compare_variants(variants)


def test_a_set_that_some_runs_lack_is_told():
    variants = study({"a": 0.0, "b": 0.1})
    variants["a"]["a0"]["more"] = variants["a"]["a0"]["held out"]
    comparison = compare_variants(variants, ["a note"])
    assert [metric.name for metric in comparison.metrics] == ["held out"]
    assert comparison.notes == ["a note", "more: not every run was scored there, so nothing is compared"]
    assert render(comparison).endswith(comparison.notes[-1])


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def worse_run(tmp_path_factory, sample_dir):
    """Trained on the same data for a moment only, with a tokenizer of its own."""
    import prepare_data
    import train

    data, run = tmp_path_factory.mktemp("byte_data"), tmp_path_factory.mktemp("worse")
    prepare_data.prepare(prepare_data.Arguments(sample=True, sample_stories=30, report=False, tokenizer="byte", output=str(data)))
    assert train.main(tiny(data_dir=data, out_dir=run, max_steps=3)) == 0
    return run


def copy_run(source, target, seed: int, noise: float = 0.0, **train):
    """A run as if it had been trained with another seed, its weights disturbed."""
    target.mkdir(parents=True)
    shutil.copy(source / "metrics.jsonl", target)
    content = torch.load(source / "best_model.pt", weights_only=True)
    generator = torch.Generator().manual_seed(seed)
    content["model"] = {k: w + noise * torch.randn(w.shape, generator=generator) for k, w in content["model"].items()}
    content["train_config"] |= {"seed": seed, "out_dir": str(target)} | train
    torch.save(content, target / "best_model.pt")
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory, trained_run):
    """Three seeds of a good variant, and three of one with another learning rate that is worse."""
    home = tmp_path_factory.mktemp("runs")
    for seed in (1, 2, 3):
        copy_run(trained_run, home / f"good_seed{seed}", seed, 1e-3)
        copy_run(trained_run, home / "bad" / str(seed), seed, 0.05, learning_rate=0.02)
    return home


def names(runs) -> list[str]:
    return [str(path.parent) for path in sorted(runs.rglob("best_model.pt"))]


def test_runs_equal_but_for_their_seeds_are_one_variant(runs):
    variants, notes = group_runs(names(runs))
    assert {name: [run.seed for run in members] for name, members in variants.items()} == {"bad": [1, 2, 3], "good": [1, 2, 3]}
    assert notes == []
    variants, _ = group_runs([f"x={runs}/bad/1,{runs}/good_seed2", f"y={runs}/bad/3", f"{runs}/bad/2"])
    assert [*variants] == ["x", "y", f"{runs}/bad/2"] and len(variants["x"]) == 2
    run = f"{runs}/bad/2"
    variants, _ = group_runs([f"{run}={runs}/bad/1", run])  # a name that is a run's too
    assert [*variants] == [run, f"{run}/best_model.pt"]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["runs/stories_seed1", "runs/stories_seed2/"], "stories"),
        (["stories1", "stories2"], "stories"),
        (["runs/data_v1/1", "runs/data_v1/2"], "data_v1"),
        (["main_1337", "main_1"], "main"),
        (["1", "2"], ""),
        (["runs/one"], "runs/one"),
    ],
)
def test_the_name_of_a_variant(places, expected):
    assert common_name(places) == expected


def test_models_of_one_seed_are_variants_of_their_own(trained_run):
    variants, notes = group_runs([str(trained_run), str(trained_run / "step_00000020.pt")])
    assert [len(members) for members in variants.values()] == [1, 1]
    assert len(notes) == 1 and "share a seed, so each is taken for a variant of its own" in notes[0]


def test_unequal_budgets_and_tokenizers_are_told(trained_run, worse_run):
    notes = "\n".join(group_runs([str(trained_run), str(worse_run)])[1])
    for part in ("differ in steps: ", "differ in tokens seen: ", "differ in parameters: ", "the tokenizers differ"):
        assert part in notes
    assert "block size" not in notes


def test_a_learning_curve_counts_the_time_of_training_only(trained_run, tmp_path):
    rows = [{"step": 1, "tokens": 100, "tokens_per_second": 50}, {"step": 1, "val_bits_per_byte": 2.0, "val_loss": 1.0}]
    rows += [{"step": 2, "tokens": 300, "tokens_per_second": 100}, {"step": 2, "val_bits_per_byte": None}]
    rows += [{"step": 3, "tokens": 400, "tokens_per_second": 100}, {"step": 3, "val_bits_per_byte": 1.5}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert learning_curve(path) == [Point(100, 2.0, 2.0), Point(400, 5.0, 1.5)]
    curve = read_run(str(trained_run)).curve
    assert [point.tokens for point in curve] == [15 * 8 * 32, 30 * 8 * 32] and 0 < curve[0].seconds < curve[1].seconds


def test_the_figures_are_those_of_evaluate(trained_run, sample_dir, tmp_path, monkeypatch):
    """And what evaluate.py has scored isn't computed again."""
    import evaluate

    run = shutil.copytree(trained_run, tmp_path / "run")
    texts = read_documents(DataDirectory(sample_dir), "test", None)
    scores = run_scores(read_run(str(run)), {"test": texts}, "cpu", 8)["test"]
    assert evaluate.main(["--checkpoint", str(run), "--data_dir", str(sample_dir), "--split", "test"]) == 0
    expected = json.loads((run / "evaluation.json").read_text())[str(sample_dir)]["test"]["bits_per_byte"]
    assert scores.columns["nats"].sum() / math.log(2) / scores.columns["bytes"].sum() == pytest.approx(expected)
    monkeypatch.setattr("evaluation.held_out.score_tokens", None)
    assert run_scores(read_run(str(run)), {"test": texts}, "cpu", 8)["test"].items == scores.items


# ---------------------------------------------------------------- the script


def test_a_whole_comparison(runs, sample_dir, tmp_path, capsys):
    """Two variants on a text and a task; table, JSON, report and picture; written a second time in the same place."""
    from matplotlib.image import imread

    for i, run in enumerate(names(runs)):
        right = np.random.default_rng(i).random(30) < (0.2 if "bad" in run else 0.9)
        scores = dataclasses.replace(item_scores("task", "recall", correct=right.astype(float)), model=model_hash(*load_model(run)[:2]))
        write_scores(Path(run) / "evaluation.npz", {"recall": scores, "of another model": item_scores("task", "x", correct=np.ones(3))})
    for _ in range(2):
        assert compare.main([*names(runs), "--data_dir", str(sample_dir), "--max_documents", "6", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "good is better than bad by 0." in out and "bits/byte [" in out and " accuracy [" in out and "(p = " in out
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [metric["name"] for metric in written["metrics"]] == ["recall", f"{sample_dir} test"]
    assert all(finding["clear"] and finding["difference"] < 0 for finding in written["findings"])
    report = (tmp_path / "out" / "compare.md").read_text()
    assert out.strip().split("\n\n")[-1] in report and "(compare.png)" in report
    assert imread(tmp_path / "out" / "compare.png").shape[0] > 500
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "compare.md", "compare.png"]


def test_another_tokenizer_and_a_damaged_log(trained_run, worse_run, sample_dir, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "metrics.jsonl").write_text("no JSON\n")
    arguments = [worse_run, run, "--data_dir", sample_dir, "--output", tmp_path / "out", "--max_documents", 4]
    assert compare.main([*map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert f"the model of {run} is better than that of {worse_run} by" in out and "4 documents" in out
    assert "line 1, is damaged" in err and "warning: the tokenizers differ" in err
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["compare.json", "compare.md", "compare.png"])
def test_what_is_in_the_way_is_refused_before_any_work(runs, sample_dir, tmp_path, mistake, monkeypatch, name):
    monkeypatch.setattr(compare, "load_model", lambda *_: pytest.fail("the work began"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    arguments = [*names(runs), "--data_dir", sample_dir, "--output"]
    assert f"{name} is in the way" in mistake("compare.py", *arguments, "out", cwd=tmp_path)
    assert "is no directory" in mistake("compare.py", *arguments, f"out/{name}", cwd=tmp_path)
    assert "there is no directory missing" in mistake("compare.py", *arguments, "missing/out", cwd=tmp_path)
    assert (tmp_path / "out" / name).read_text() == "{}"


def test_runs_that_cannot_be_compared(runs, sample_dir, tmp_path, mistake):
    good = [f"{runs}/good_seed{seed}" for seed in (1, 2)]
    data = ["--data_dir", sample_dir]
    assert "only one variant, good" in mistake("compare.py", *good, *data, cwd=tmp_path)
    assert "no checkpoint at nowhere" in mistake("compare.py", good[0], "nowhere", *data, cwd=tmp_path)
    assert "mean the same model" in mistake("compare.py", good[0], f"{good[0]}/best_model.pt", *data, cwd=tmp_path)
    assert "mean the same model" in mistake("compare.py", f"a={good[0]}", f"b={good[0]}", *data, cwd=tmp_path)
    same = f"a={good[0]},{runs}/bad/1"
    assert "two runs of a have the same seed" in mistake("compare.py", same, good[1], *data, cwd=tmp_path)
    for wrong in ("a=", "=b", f"a={good[0]},"):
        assert "give NAME=RUN,RUN" in mistake("compare.py", wrong, good[1], *data, cwd=tmp_path)
    damaged = runs / "good_seed3" / "evaluation.npz"
    damaged.write_bytes(b"PK")
    assert "evaluation.npz is damaged" in mistake("compare.py", f"{runs}/good_seed3", good[1], f"{runs}/bad/1", *data, cwd=tmp_path)
    damaged.unlink()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["a"], "two or more runs"),
        (["a", "a"], "named twice"),
        (["a", "b", "--data_dir", "d", "./d/"], "named twice"),
        (["--recipe", "r.toml", "--output", "o", "--split", "val"], "--split, --output: a study doesn't read them"),
        (["a", "b", "--split", "x"], "choice 'x'"),
        (["a", "b"], "no data directory"),
    ],
)
def test_mistakes_are_one_sentence(mistake, tmp_path, arguments, part):
    assert part in mistake("compare.py", *arguments, cwd=tmp_path)


@pytest.mark.parametrize(("n_variants", "n_metrics", "n_points"), [(2, 1, 0), (3, 5, 2)])
def test_pictures_of_every_size(tmp_path, n_variants, n_metrics, n_points):
    variants = study({f"variant_{i}$_$": 0.01 * i for i in range(n_variants)}, items=5)
    for runs in variants.values():
        for sets in runs.values():
            sets |= {f"set {j}": sets["held out"] for j in range(1, n_metrics)}
    curve = [Point(1000 * i, 10.0 * i, 1 / i) for i in range(1, n_points + 1)]
    write_comparison(tmp_path / "out", compare_variants(variants), {name: [curve, curve[:2], []] for name in variants})
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
