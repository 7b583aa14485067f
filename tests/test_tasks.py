"""Tasks: files and documents become items, wrong ones get one sentence, and scores are what one computes by hand."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from config import GPTConfig
from evaluation import task_scores
from evaluation.likelihood import log_likelihoods
from evaluation.task_scores import encode_pair, measure, run_tasks, score_choices, share_of_best, task_table
from evaluation.tasks import TASKS, Item, Task, find_tasks, read_task_file, task_files
from formats.scores import content_hash, read_scores, write_scores
from models import GPT
from preparation.tokenizer_kinds import byte_tokenizer, char_tokenizer, train_bpe

CHOICE = {
    "task": "colors",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "colors.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_choice": "{{[first, second]}}",
    "doc_to_target": "{{gold}}",
    "metadata": {"source": "the test makes it"},
}
DOCUMENTS = [{"question": "Grass?", "first": "green", "second": "a red", "gold": i % 2} for i in range(4)]
# documents in the format of each public data set that tasks/ knows
PUBLIC = {
    "arc_easy": {"choices": ["the sun", "a lamp"], "query": "Question: What is warm?", "gold": 0},
    "copa": {"query": "It rained, therefore", "gold": 1, "choices": ["the sun shone.", "the street was wet."]},
    "hellaswag": {"query": "A man eats. he", "choices": ["sits.", "flies.", "melts.", "swims."], "gold": 3, "id": 1, "domain": "indomain"},
    "lambada_openai": {"context": "She took her hat and put on the", "continuation": "hat"},
    "blimp": {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps.", "UID": "agreement", "pairID": "0"},
}

BPE = train_bpe(["ab ab abab ba\nab aab bb"] * 3, 270)

MODEL = content_hash("model")


def write_lines(path, documents) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


@pytest.fixture
def task(tmp_path):
    """task(key=value, ...) -> path of a task file with these changes, its data beside it; None leaves a key out."""
    write_lines(tmp_path / "colors.jsonl", DOCUMENTS)

    def write(**changes):
        path = tmp_path / "colors.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (CHOICE | changes).items() if value is not None}))
        return path

    return write


def read(path) -> Task:
    found, foreign = find_tasks([str(path)], path.parent, {})
    assert foreign == []
    return found[0]


def model_for(tokenizer, block_size=64) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, arch="qwen3")).eval()
    torch.nn.init.normal_(model.wte.weight, std=0.3)
    return model


# ---------------------------------------------------------------- files


def test_a_document_becomes_an_item(task):
    expected = [Item("Grass?\nAnswer:", ("green", "a red"), i % 2, " ") for i in range(4)]
    assert list(read(task()).items) == expected
    assert read(task(doc_to_text="question", target_delimiter="")).items[0] == Item("Grass?", ("green", "a red"), 0, "")
    assert read(task(doc_to_target=1)).items[0].right == 1
    assert read(task(doc_to_target="second")).items[0].right == 1  # the field holds the choice's own text
    assert read(task(doc_to_choice=["yes", "no"], doc_to_target="{{'no'}}")).items[0] == Item("Grass?\nAnswer:", ("yes", "no"), 1, " ")
    cloze = read(task(output_type="loglikelihood", doc_to_choice=None, doc_to_target="{{' ' + first}}"))
    assert cloze.items[0] == Item("Grass?\nAnswer:", (" green",), 0) and cloze.cloze


def test_parquet_and_json_lines_give_the_same_items(task, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(DOCUMENTS), tmp_path / "colors.parquet")
    other = read(task(dataset_path="parquet", dataset_kwargs={"data_files": {"test": ["colors.parquet"]}}))
    assert other == read(task()) and other.items_hash == read(task()).items_hash


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"doc_to_txt": "x"}, "is no task: doc_to_txt is unknown here; see docs/tasks.md"),
        ({"test_split": None}, "it has no 'test_split'"),
        ({"output_type": "generate_until"}, "output_type='generate_until' must be 'multiple_choice' or 'loglikelihood'"),
        ({"target_delimiter": 3}, "target_delimiter=3 must be a valid string"),
        ({"metric_list": [{"metric": "f1"}]}, "metric_list.0.metric='f1' must be"),
        ({"doc_to_choice": None}, "colors: multiple_choice needs doc_to_choice"),
        ({"output_type": "loglikelihood"}, "colors: doc_to_choice belongs to multiple_choice"),
        ({"test_split": "dev"}, "test_split='dev' is none of the splits in data_files, test"),
        ({"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, r"the task colors needs .*no.jsonl \(the test makes it\); put it there"),
        (
            {"doc_to_text": "query"},
            "doc_to_text of the task colors does not fit .*colors.jsonl line 1: there is no field query, only",
        ),
        ({"doc_to_text": "{{query}}"}, "line 1: there is no field query, only question, first"),
        ({"doc_to_text": "{{question"}, "line 1: unexpected end of template"),
        ({"doc_to_text": "gold"}, "line 1: 0 is no text"),
        ({"doc_to_target": 2}, "doc_to_target of the task colors does not fit .* line 1: 2 is none of the 2 choices"),
        ({"doc_to_target": "{{7}}"}, "7 is none of the 2 choices"),
        ({"doc_to_target": "{{ -1 }}"}, "'-1' is none of the 2 choices"),
        ({"doc_to_choice": "{{[first]}}"}, "is no list of two or more choices"),
        ({"doc_to_choice": "{{[first, gold]}}"}, "0 is no text"),
        ({"doc_to_choice": "{{first}} or"}, "doc_to_choice of the task colors does not fit"),
    ],
)
def test_a_wrong_task_gets_a_sentence(task, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        read(task(**changes))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"question": "Sky?"}', "doc_to_choice of the task colors does not fit .*line 2: there is no field first, second, only question"),
        (b'{"question": "Sky?"', "line 2 is no JSON"),
        (b"[1, 2]", "line 2 is no JSON object"),
        (b'{"question": "\xff"}', "line 2 is no JSON"),
    ],
)
def test_a_wrong_document_gets_a_sentence(task, tmp_path, line, sentence):
    path = task()
    (tmp_path / "colors.jsonl").write_bytes(json.dumps(DOCUMENTS[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=sentence):
        read(path)


def test_a_line_separator_within_a_text_ends_no_document(task, tmp_path):
    (tmp_path / "colors.jsonl").write_text(
        json.dumps(DOCUMENTS[0] | {"question": "a\u2028b"}, ensure_ascii=False) + "\n\n", encoding="utf-8"
    )
    assert read(task(doc_to_text="question")).items == (Item("a\u2028b", ("green", "a red"), 0, " "),)


def test_files_that_are_no_tasks(task, tmp_path):
    wrong = {
        "": "is no task: it=None must be a valid dictionary",
        "task: [": "is no YAML that can be read here",
        "task: !function utils.f": "could not determine a constructor for the tag '!function'",
        "group: g\ntask: [arc_easy]": "is no group: task.0='arc_easy' must be",
    }
    for text, sentence in wrong.items():
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            read_task_file(tmp_path / "wrong.yaml")
    (tmp_path / "colors.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no documents"):
        read(task())
    (tmp_path / "wrong.yaml").unlink()
    shutil.copy(task(), tmp_path / "again.yaml")
    with pytest.raises(ValueError, match=r"colors.yaml and .*again.yaml both call a task 'colors'"):
        task_files(tmp_path)


def test_a_name_that_nobody_knows(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"arc_hard is none of sample, arc_easy, blimp, copa, .* need it: pip install lm-eval"):
        find_tasks(["arc_hard"], tmp_path, {"sample": list})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "there")
    assert find_tasks(["arc_hard", "lm_eval:arc_easy"], tmp_path, {}) == ([], ["arc_hard", "arc_easy"])


def test_tasks_that_are_named_twice(task, tmp_path):
    path = task()
    shutil.copy(path, tmp_path / "same.yaml")
    (found,), _ = find_tasks([str(path), str(tmp_path / "same.yaml")], tmp_path, {})
    assert found == read(path)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(CHOICE | {"target_delimiter": ": "}))
    with pytest.raises(ValueError, match="two tasks called colors, which differ; rename one"):
        find_tasks([str(path), str(tmp_path / "other.yaml")], tmp_path, {})


def test_every_task_of_ours_reads_data_in_its_format(tmp_path):
    """The public data sets, written here with one document each."""
    for content in map(read_task_file, TASKS.glob("*.yaml")):
        for task in content["task"] if "group" in content else [content]:
            document = PUBLIC[content.get("group", task["task"])]
            write_lines(tmp_path / task["dataset_kwargs"]["data_files"]["test"], [document])
    tokenizer = byte_tokenizer()
    tasks, _ = find_tasks(PUBLIC, tmp_path, {})
    assert [task.name for task in tasks] == [*PUBLIC]
    right = [task.items[0].delimiter + task.items[0].choices[task.items[0].right] for task in tasks]
    assert right == [" the sun", " the street was wet.", " swims.", " hat", "The cats sleep."]
    scores = run_tasks(model_for(tokenizer), tokenizer, tasks, MODEL, {})
    assert len(scores["blimp"]) == 16 == len(scores["blimp"].summary["parts"])
    write_scores(tmp_path / "evaluation.npz", scores)
    assert read_scores(tmp_path / "evaluation.npz")["copa"].summary == scores["copa"].summary


def test_the_real_data(real_data):
    sizes = {"arc_easy": 2376, "copa": 100, "hellaswag": 1000, "lambada_openai": 1000}
    for task in find_tasks(sizes, real_data / "eval", {})[0]:
        assert len(task.items) == sizes[task.name] and all(task.items)


# ---------------------------------------------------------------- scores


@given(context=st.text("ab \n", max_size=8), continuation=st.text("ab \n", min_size=1, max_size=8))
def test_a_pair_keeps_every_token_of_its_text(context, continuation):
    tokenizer = BPE
    before, after = encode_pair(tokenizer, context, continuation)
    assert before[0] == tokenizer.eot_id and after
    assert before[1:] == tokenizer.encode(context.rstrip())
    whole = tokenizer.encode(context + continuation)
    if whole[: len(before) - 1] == before[1:] and len(whole) >= len(before):  # no token reaches across
        assert before[1:] + after == whole


def test_a_continuation_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token for ''"):
        encode_pair(BPE, "ab", "")


def test_columns_are_what_one_computes_by_hand():
    items = (Item("", ("aa", "bbbb"), 0), Item("", ("a", "b", "c"), 2))
    columns = score_choices(items, np.array([-3.0, -4.0, -1.0, -2.0, -2.0]))
    assert columns["correct"].tolist() == [1, 0] and columns["correct_norm"].tolist() == [0, 0]
    assert columns["margin"].tolist() == [1, -1]
    expected = [math.exp(-3) / (math.exp(-3) + math.exp(-4)), math.exp(-2) / (math.exp(-1) + 2 * math.exp(-2))]
    assert columns["probability"] == pytest.approx(expected)
    assert share_of_best(np.array([-1.0, -1.0, -2.0]), 1) == 0.5 and share_of_best(np.array([-1.0, -1.0, -2.0]), 2) == 0


def test_a_model_that_cannot_tell_choices_apart_is_at_chance():
    """Both sentences are the same to a tokenizer that knows neither's letters, though the right one always comes first."""
    tokenizer = char_tokenizer(["abc "])
    task = Task("pairs", tuple(Item("", (f"x{i}", f"y{i}"), 0) for i in range(5)))
    summary = run_tasks(model_for(tokenizer), tokenizer, [task], MODEL, {})["pairs"].summary
    assert summary["measures"]["accuracy"]["value"] == 0.5 and summary["texts_with_unknown_tokens"] == 10


def test_intervals_are_wilsons_and_students():
    values = np.array([1.0] * 7 + [0.0] * 3)
    expected = stats.binomtest(7, 10).proportion_ci(method="wilson")
    found = measure(values, "share", chance=0.5)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high)) and found["chance"] == 0.5
    margins = np.random.RandomState(0).randn(20)
    expected = stats.ttest_1samp(margins, 0).confidence_interval()
    found = measure(margins)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert measure(np.array([0.9, 1.0, 1.0]), "probability")["high"] == 1
    assert measure(np.array([2.0])) == {"value": 2.0, "low": None, "high": None}


def test_a_task_is_scored_as_its_log_likelihoods_say(task):
    tokenizer = byte_tokenizer()
    model, found = model_for(tokenizer), read(task(metric_list=[{"metric": "acc_norm"}, {"metric": "acc"}]))
    scores = run_tasks(model, tokenizer, [found], MODEL, {})["colors"]
    pairs = [encode_pair(tokenizer, "Grass?\nAnswer:", choice) for choice in (" green", " a red")]
    first, second = log_likelihoods(model, pairs).nats
    assert scores.columns["margin"] == pytest.approx([(first - second) * (-1) ** i for i in range(4)])
    assert scores.kind == "task" and scores.items == found.items_hash and len(scores) == 4
    assert scores.summary["metrics"] == ["accuracy_norm", "accuracy"] and scores.summary["measures"]["accuracy"]["chance"] == 0.5
    lines = task_table({"colors": scores})
    assert len(lines) == 4 and lines[1].split()[:2] == ["colors", "accuracy_norm"] and lines[3].split()[0] == "probability"


def test_what_is_known_is_not_computed_again(task, monkeypatch):
    tokenizer, found = byte_tokenizer(), read(task())
    model = model_for(tokenizer)
    first = run_tasks(model, tokenizer, [found], MODEL, {})
    other = run_tasks(model, tokenizer, [found], content_hash("other model"), first)
    assert other["colors"].key != first["colors"].key
    monkeypatch.setattr(task_scores, "log_likelihoods", None)
    again = run_tasks(model, tokenizer, [found], MODEL, first)
    assert again["colors"].summary == first["colors"].summary and again["colors"].columns is first["colors"].columns
    with pytest.raises(TypeError):
        run_tasks(model, tokenizer, [read(task(doc_to_target=1))], MODEL, first)


def test_a_cloze_counts_what_the_model_would_write(task):
    tokenizer = byte_tokenizer()
    model = model_for(tokenizer)
    found = read(
        task(output_type="loglikelihood", doc_to_choice=None, doc_to_target="{{' ' + first}}", metric_list=[{"metric": "perplexity"}])
    )
    scores = run_tasks(model, tokenizer, [found], MODEL, {})["colors"]
    nats = log_likelihoods(model, [encode_pair(tokenizer, "Grass?\nAnswer:", " green")]).nats[0]
    assert scores.columns["log_probability"] == pytest.approx([nats] * 4) and scores.columns["correct"].tolist() == [0] * 4
    assert scores.summary["measures"]["perplexity"]["value"] == pytest.approx(math.exp(-nats))
    assert "chance" not in scores.summary["measures"]["accuracy"]
