"""benchmark.py tasks: seconds to score a task, beside lm-evaluation-harness with the same model in transformers."""

import json
import statistics
import time
from pathlib import Path

from utils import notice

import torch

from benchmarks.harness import spread
from config import GPTConfig
from evaluation.task_scores import run_tasks
from evaluation.tasks import Task, find_tasks, read_task
from export.hf_folder import write_hf
from export.verify import Source
from formats.run_directory import load_model
from formats.tokenizer import TextTokenizer
from models import GPT
from preparation import sample_tasks
from preparation.sample_corpus import load_grammar, stories
from preparation.tokenizer_kinds import train_bpe

BATCH_SIZE = 32  # of both sides
DESCRIPTION = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def default_model() -> tuple[GPT, TextTokenizer]:
    """nano with random weights, since the speed doesn't depend on them, and a tokenizer of the sample corpus."""
    tokenizer = train_bpe([text for text, _ in stories(load_grammar(), 1337, "train", 500)], 1500)
    return GPT(GPTConfig.nano(vocab_size=tokenizer.vocab_size)).eval(), tokenizer


def write_items(task: Task, count: int, path: Path) -> dict:
    """The first items of a task as a data file; returns the description that both sides read."""
    delimiters = {item.delimiter for item in task.items}
    if task.cloze or len(delimiters) > 1:
        raise ValueError(f"{task.name} is no task of choices behind one delimiter; name another with --task")
    rows = [{"context": i.context, "choices": i.choices, "gold": i.right} for i in task.items[:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DESCRIPTION | {"task": task.name, "dataset_kwargs": {"data_files": {"test": str(path)}}, "target_delimiter": delimiters.pop()}


def measure(rounds: int, checkpoint: str | None, name: str, root: Path, count: int, cwd: Path) -> None:
    """Score the task in turn, from its data file to its accuracy, and print medians. Raises ValueError where the harness is missing."""
    try:
        import transformers
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {error.name!r} is not installed; run: pip install 'lm-eval[hf]'") from None
    source = Source(*default_model(), cwd, {}) if checkpoint is None else Source(*load_model(checkpoint))
    model, tokenizer = source.model, source.tokenizer
    write_hf(source, cwd / "hf")  # its tokenizer puts the EOT in front of contexts as we do, so both read the same ids
    exported = transformers.AutoModelForCausalLM.from_pretrained(cwd / "hf", local_files_only=True).eval()
    peer = HFLM(pretrained=exported, tokenizer=transformers.AutoTokenizer.from_pretrained(cwd / "hf"), batch_size=BATCH_SIZE)
    tasks, _ = find_tasks([name], root, sample_tasks.MADE)
    if len(tasks) != 1:
        raise ValueError(f"task={name!r} is not one local task; name one with --task")
    task = tasks[0]
    items = write_items(task, count, cwd / "items.jsonl")
    manager, seconds, accuracies = TaskManager(include_defaults=False), {"ours": [], "harness": []}, set()
    for i in range(rounds):
        start = time.perf_counter()
        scores = run_tasks(model, tokenizer, [read_task(items, cwd, cwd)], "", {}, BATCH_SIZE)[name]
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        found = simple_evaluate(model=peer, tasks=[items], task_manager=manager, bootstrap_iters=0)
        seconds["harness"].append(time.perf_counter() - start)
        accuracies |= {scores.summary["measures"]["accuracy"]["value"], found["results"][name]["acc,none"]}
        notice(f"round {i + 1} of {rounds}: " + ", ".join(f"{side} {values[-1]:.2f} s" for side, values in seconds.items()))
    texts = sum(len(item.choices) for item in task.items[:count])
    size = f"{model.num_parameters():,} parameters, {torch.get_num_threads()} threads"
    print(f"{name}: {min(count, len(task.items))} items, {texts} texts, {size}")
    for side, values in seconds.items():
        print(f"{side:8} {spread(values)} s, {texts / statistics.median(values):,.0f} texts/s")
    print(f"{spread([b / a for a, b in zip(*seconds.values())])} x the harness's speed; accuracy {', '.join(map(str, sorted(accuracies)))}")
