"""Our checkpoints in lm-evaluation-harness (`pip install lm-eval`): as a model for its own command line, and its tasks for evaluate.py.

Its command line with our model, which is called slm there:

    python -m evaluation.lm_harness run --model slm --model_args checkpoint=checkpoints/data --tasks arc_easy
"""

import contextlib
import functools
import json
import math
import sys
from importlib.metadata import version

from utils import choose_device, derived_seed, notice

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task as HarnessTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from evaluation.likelihood import log_likelihoods
from evaluation.task_scores import encode_pair, measure
from evaluation.tasks import ACCURACIES
from formats.scores import ItemScores, content_hash
from formats.tokenizer import TextTokenizer
from generation.loading import Network, engine_of, load_network
from generation.sampling import Sampling
from generation.streaming import encode_prompt, stream_text
from generation.writing import Row, Writer

MAX_GENERATED = 256  # tokens, where a task says nothing
COLUMNS = {"acc": "correct", "acc_norm": "correct_norm", "perplexity": "log_probability"}  # the harness's metrics -> our columns


@register_model("slm")
class HarnessModel(TemplateLM):
    """A checkpoint as lm-evaluation-harness sees it. Every context begins with the EOT, as every text did in training.

    checkpoint: as --checkpoint names it. batch_size: windows in one forward pass. Raises FileNotFoundError, ValueError.
    """

    def __init__(self, checkpoint: str = "./checkpoints", batch_size: int | str = 32, device: str | None = None, **_):
        super().__init__()
        device = "auto" if device in (None, "cuda:0") else device  # the latter is the command line's default, also where there is none
        self.model, self.text_tokenizer, *_ = load_network(checkpoint, choose_device(device))
        self.batch_size = int(batch_size)

    @classmethod
    def of(cls, model: Network, tokenizer: TextTokenizer, batch_size: int) -> "HarnessModel":
        """A model that is loaded already."""
        found = cls.__new__(cls)
        TemplateLM.__init__(found)
        found.model, found.text_tokenizer, found.batch_size = model, tokenizer, batch_size
        return found

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return [self.eot_token_id] * (add_special_tokens is not False) + self.text_tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self.text_tokenizer, context, continuation)

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        bar = None if disable_tqdm else "log-likelihoods"
        found = log_likelihoods(self.model, [(context, rest) for _, context, rest in requests], self.batch_size, bar)
        answers = [*zip(found.nats.tolist(), found.greedy.tolist(), strict=True)]
        for (request, *_), answer in zip(requests, answers):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [self.text_tokenizer.encode(request.args[0]) for request in requests]
        found = iter(self._loglikelihood_tokens([(None, [self.eot_token_id], text) for text in texts if text], disable_tqdm))
        answers = [next(found)[0] if text else 0.0 for text in texts]
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop text, their EOT or max_gen_toks; greedy unless the task samples."""
        answers, block_size, engine = [], self.model.config.block_size, engine_of(self.model)
        for number, request in enumerate(tqdm(requests, desc="generating", unit="text", disable=disable_tqdm or None, leave=False)):
            context, asked = request.args
            options = normalize_gen_kwargs(asked, MAX_GENERATED)
            until, count = options["until"], options["max_gen_toks"]
            stops = tuple(stop for stop in ([until] if isinstance(until, str) else until or []) if stop)
            sampling = {name: options[name] for name in ("top_k", "top_p", "min_p") if options.get(name) and options["do_sample"]}
            # as in the harness's own models: a prompt gives way where the text to come would not fit behind it
            prompt = encode_prompt(self.text_tokenizer, context, max(1, block_size - count))
            writer = Writer(engine, self.text_tokenizer, Sampling(options["temperature"], **sampling))
            row = Row(prompt, count, derived_seed("lm-eval", number))
            answers.append("".join(stream_text(writer, row, stops)))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers


# ---------------------------------------------------------------- its tasks for evaluate.py


@functools.cache
def task_manager(all_known: bool) -> TaskManager:
    """What finds the harness's tasks; to know all their names it reads thousands of files."""
    return TaskManager(include_defaults=all_known)


def load_tasks(names: list, manager: TaskManager) -> dict[str, HarnessTask]:
    """The harness's tasks by their names, groups taken apart. Raises ValueError for what it doesn't know or can't get."""
    try:
        return manager.load(names)["tasks"]
    except Exception as error:  # the harness, `datasets` and the hub raise a dozen kinds
        reason = " ".join(str(error).split())[:300]
        asked = ", ".join(map(str, names))
        raise ValueError(
            f"{asked}: no task in tasks/, and lm-evaluation-harness can't load it ({type(error).__name__}: {reason}); see docs/tasks.md"
        ) from None


def items_hash(task: HarnessTask) -> str:
    """Of what is asked: the task's own description, and its documents."""
    return content_hash(json.dumps([task.dump_config(), [*task.eval_docs]], sort_keys=True, default=str).encode())


def summarize_samples(task: HarnessTask, samples: list[dict], results: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """Summary and columns of a task. samples: the harness's, one an item. results: its averages, which also stand for what is no mean."""
    columns, measures = {}, {}
    choices = [len(sample["resps"]) for sample in samples]
    for name in samples[0]["metrics"]:
        title, value = ACCURACIES.get(name, name), next(value for key, value in results.items() if key.split(",")[0] == name)
        numbers = [sample[name] for sample in samples]
        if not math.isfinite(value):
            notice(f"warning: {task.config.task}: lm-evaluation-harness's {name} is {value}, no number; it is left out")
            measures[title] = {"value": None, "low": None, "high": None}
            continue
        if all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            values = columns[COLUMNS.get(name, name)] = np.array(numbers, float)
            if np.isclose(values.mean(), value):
                beside = {"chance": float(np.mean([1 / n for n in choices]))} if name in ACCURACIES and min(choices) > 1 else {}
                measures[title] = measure(values, "share" if set(numbers) <= {0, 1} else "any", **beside)
                continue
        measures[title] = {"value": float(value), "low": None, "high": None}
    return {"items": len(samples), "metrics": [*measures], "measures": measures}, columns


def run_harness_tasks(
    model: Network, tokenizer: TextTokenizer, names: list, model_hash: str, known: dict[str, ItemScores], batch_size: int = 32
) -> dict[str, ItemScores]:
    """The scores of tasks of lm-evaluation-harness (names, or configurations as dictionaries), as task_scores.run_tasks gives ours."""
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints what it does
        manager = task_manager(not all(isinstance(name, dict) for name in names))
        tasks = load_tasks(names, manager)
        hashes = {name: items_hash(task) for name, task in tasks.items()}
        keys = {name: content_hash(f"lm-eval {version('lm-eval')}", model_hash, items) for name, items in hashes.items()}
        new = [task for name, task in tasks.items() if name not in known or known[name].key != keys[name]]
        lm = HarnessModel.of(model, tokenizer, batch_size)
        found = simple_evaluate(model=lm, tasks=new, task_manager=manager, bootstrap_iters=0) if new else {}
    scores = {}
    for name, task in tasks.items():
        if task not in new:
            scores[name] = known[name]
            continue
        samples = found["samples"][name]
        samples = sorted((s for s in samples if s["filter"] == samples[0]["filter"]), key=lambda sample: sample["doc_id"])
        summary, columns = summarize_samples(task, samples, found["results"][name])
        scores[name] = ItemScores(keys[name], hashes[name], "task", summary, columns, model_hash)
    return scores


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
