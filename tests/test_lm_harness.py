"""The adapter for lm-evaluation-harness: its tasks on our models as ours are, and our checkpoints as its own HF model is."""

import importlib.util
import random
import re
import sys
from types import ModuleType

import pytest

import benchmark
import benchmarks.tasks
from evaluation.task_scores import run_tasks
from evaluation.tasks import read_task
from export.hf_folder import write_hf
from export.verify import Source
from formats.scores import read_scores, write_scores
from tests.test_tasks import BPE, CHOICE, model_for, write_lines


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """The adapter's module, without a network and with a cache of its own."""
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    from evaluation import lm_harness

    return lm_harness


def random_items(count: int) -> list[dict]:
    rng = random.Random(0)

    def words(n):
        return " ".join(rng.choice(["ab", "ba", "abab", "bb", "aab\nb"]) for _ in range(n))

    return [
        {"question": words(rng.randrange(1, 40)), "first": words(2), "second": words(3), "gold": rng.randrange(2)} for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("cloze", [False, True])
def test_the_harness_reads_our_tasks_and_finds_the_same(harness, cloze, tmp_path, monkeypatch):
    """Item by item, from the same description and file; and what is known isn't computed again."""
    write_lines(tmp_path / "colors.jsonl", random_items(30))
    content = CHOICE | {"task": f"colors_{cloze}", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "colors.jsonl")}}}
    if cloze:
        content |= {"output_type": "loglikelihood", "doc_to_target": "{{first}}"}
        del content["doc_to_choice"]
    content["metric_list"] = [{"metric": "acc"}, {"metric": "perplexity" if cloze else "acc_norm"}]
    model, name = model_for(BPE, block_size=32), content["task"]
    ours = run_tasks(model, BPE, [read_task(content, tmp_path / "colors.yaml", tmp_path)], "model", {})[name]
    theirs = harness.run_harness_tasks(model, BPE, [content], "model", {})
    score = theirs[name]
    assert len(score.columns) == 2
    for column in score.columns:
        assert score.columns[column] == pytest.approx(ours.columns[column], abs=1e-5), column
    for measured in score.summary["measures"]:
        assert score.summary["measures"][measured]["value"] == pytest.approx(ours.summary["measures"][measured]["value"], rel=1e-5)
    monkeypatch.setattr(harness, "simple_evaluate", None)
    assert harness.run_harness_tasks(model, BPE, [content], "model", theirs)[name] is score


@pytest.mark.slow
def test_a_task_that_the_harness_does_not_know(harness):
    with pytest.raises(ValueError, match="no_such_task: no task in tasks/, and lm-evaluation-harness can't load it"):
        harness.run_harness_tasks(model_for(BPE), BPE, ["no_such_task"], "model", {})


@pytest.mark.slow
def test_a_task_of_the_harness_whose_items_have_no_score(harness, tmp_path):
    """Perplexity of whole texts is no mean over items; what is kept of it is read back."""
    write_lines(tmp_path / "texts.jsonl", [{"text": "ab ba"}, {"text": "bb"}])
    content = {"task": "rolling", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}}}
    content |= {"test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    content |= {"metric_list": [{"metric": "bits_per_byte"}]}
    scores = harness.run_harness_tasks(model_for(BPE), BPE, [content], "1" * 64, {})
    write_scores(tmp_path / "evaluation.npz", scores)
    assert read_scores(tmp_path / "evaluation.npz")["rolling"].summary["measures"]["bits_per_byte"]["value"] > 0


@pytest.mark.slow
def test_what_is_no_number_is_left_out_and_told(harness, capsys):
    samples = [{"resps": [0, 0], "metrics": ["acc", "odd"], "acc": 1.0, "odd": value} for value in (1.0, float("nan"))]
    task = type("Task", (), {"config": type("Config", (), {"task": "some_task"})})
    summary, columns = harness.summarize_samples(task, samples, {"acc,none": 1.0, "odd,none": float("nan")})
    assert summary["measures"]["odd"]["value"] is None and [*columns] == ["correct"]
    assert "some_task: lm-evaluation-harness's odd is nan" in capsys.readouterr().err


@pytest.fixture
def transformers(harness, monkeypatch):
    """The library. The harness also imports accelerate, which only several devices need: an empty one stands in if it is missing."""
    library = pytest.importorskip("transformers")
    assert library.AutoModelForCausalLM and library.AutoTokenizer  # they look for accelerate when they are first asked for
    if importlib.util.find_spec("accelerate") is None:
        empty, utilities = ModuleType("accelerate"), ModuleType("accelerate.utils")
        for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
            setattr(empty, name, None)
        utilities.get_max_memory = None
        monkeypatch.setitem(sys.modules, "accelerate", empty)
        monkeypatch.setitem(sys.modules, "accelerate.utils", utilities)
    return library


@pytest.fixture
def hf_model(harness, transformers, tmp_path):
    """Our model, and the same one as the harness runs it from an exported folder."""
    from lm_eval.models.huggingface import HFLM

    model = model_for(BPE, block_size=32)
    write_hf(Source(model, BPE, tmp_path, {}), tmp_path / "hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    return harness.HarnessModel.of(model, BPE, 8), HFLM(pretrained=exported, tokenizer=tokenizer, batch_size=4)


@pytest.mark.slow
def test_the_benchmark_finds_the_same_on_both_sides(transformers, capsys, monkeypatch):
    monkeypatch.setattr(benchmarks.tasks, "default_model", lambda: (model_for(BPE, block_size=256), BPE))
    assert benchmark.main(["tasks", "--rounds", "1", "--items", "6", "--task", "sample_role"]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].startswith("sample_role: 6 items, 12 texts") and lines[1].startswith("ours") and lines[2].startswith("harness")
    assert re.search(r"x the harness's speed; accuracy 0\.\d+$", lines[3])  # a single figure: both found the same


@pytest.mark.slow
def test_the_harness_model_answers_as_its_own_hf_model(hf_model):
    """Log-likelihoods item by item, whole texts, and what is written. Contexts begin with the EOT, which the exported tokenizer adds.

    The harness puts it in front of whole texts too, and would then score the tokenizer's as a token.
    """
    from lm_eval.api.instance import Instance

    ours, theirs = hf_model

    def ask(kind, arguments):
        return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]

    items = random_items(60)
    pairs = [
        (item["question"] if i % 5 else "", " " * (i % 3) + item[name]) for i, item in enumerate(items) for name in ("first", "second")
    ]
    found = ours.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    for (nats, greedy), (expected, was_greedy) in zip(
        found, theirs.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True), strict=True
    ):
        assert nats == pytest.approx(expected, abs=1e-4) and greedy == was_greedy
    texts = [(item["question"],) for item in items] + [("",)]
    found = ours.loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True)
    theirs.add_bos_token = False
    assert found == pytest.approx(theirs.loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True), abs=1e-3)
    theirs.add_bos_token = None
    asked = {"until": ["bb"], "max_gen_toks": 12, "do_sample": False}
    prompts = [(item["question"][:20], asked) for item in items[:8]]
    written = ours.generate_until(ask("generate_until", prompts), disable_tqdm=True)
    assert written == theirs.generate_until(ask("generate_until", prompts), disable_tqdm=True)
    assert all("bb" not in text for text in written) and any(written)


@pytest.mark.slow
def test_the_harness_runs_our_checkpoints_by_name(harness, trained_run):
    from lm_eval.api.registry import get_model

    model = get_model("slm").create_from_arg_obj(
        {"checkpoint": str(trained_run)}, {"batch_size": 4, "device": "cuda:0", "max_batch_size": 8}
    )
    assert model.tok_encode("a b")[0] == model.eot_token_id and model.batch_size == 4
