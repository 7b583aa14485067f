"""Tasks: items with a context and choices, from a documented subset of lm-evaluation-harness's YAML format. Doesn't import torch.

The subset is described in docs/tasks.md. A task file read here means the same in lm-evaluation-harness; what it can't say is an error.
"""

import ast
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NotRequired

from utils import Text

import yaml
from annotated_types import MinLen
from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment
from pydantic import JsonValue

from formats.schemas import Declared, check, read_file
from formats.scores import content_hash

TASKS = Path(__file__).resolve().parent.parent / "tasks"
DATA = "./data/eval"  # where the files of tasks are looked for
FOREIGN = "lm_eval:"  # before the name of a task of lm-evaluation-harness
ADVICE = "see docs/tasks.md"
ACCURACIES = {"acc": "accuracy", "acc_norm": "accuracy_norm"}  # the harness's names for ours


@dataclass(frozen=True)
class Item:
    """A question. choices: texts that may follow the context, behind the delimiter. right: which one does.

    With a single choice the question is whether the model would write it. probabilities: of each choice behind the context, where known.
    """

    context: str
    choices: tuple[str, ...]
    right: int
    delimiter: str = ""
    probabilities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Task:
    """Items under a name. metrics: those that stand in the table, the first one before all. parts: of a group, how many items each has."""

    name: str
    items: tuple[Item, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def cloze(self) -> bool:
        return len(self.items[0].choices) == 1

    @property
    def items_hash(self) -> str:
        """Of what is asked, whatever the tokenizer."""
        return content_hash([[item.context, item.choices, item.right, item.delimiter] for item in self.items])


# ---------------------------------------------------------------- what a file may say


class Metric(Declared):
    metric: Literal["acc", "acc_norm", "perplexity"]
    aggregation: NotRequired[Literal["mean", "perplexity"]]
    higher_is_better: NotRequired[bool]


class DataFiles(Declared):
    data_files: str | list[str] | dict[str, str | list[str]]


class TaskFile(Declared):
    """A task. The keys are lm-evaluation-harness's; text is a Jinja template or the name of a field."""

    task: str
    dataset_path: Literal["json", "parquet"]
    dataset_kwargs: DataFiles
    test_split: str
    output_type: Literal["multiple_choice", "loglikelihood"]
    doc_to_text: Text
    doc_to_target: str | int
    doc_to_choice: NotRequired[str | Annotated[list[str], MinLen(2)]]
    target_delimiter: NotRequired[Text]
    num_fewshot: NotRequired[Literal[0]]
    metric_list: NotRequired[Annotated[list[Metric], MinLen(1)]]
    metadata: NotRequired[dict[str, JsonValue]]


class GroupFile(Declared):
    """Several tasks, written out in it, under one name."""

    group: str
    task: Annotated[list[TaskFile], MinLen(1)]
    metadata: NotRequired[dict[str, JsonValue]]


def read_task_file(path: Path) -> TaskFile | GroupFile:
    """What a YAML file of tasks says. Raises FileNotFoundError, ValueError."""
    try:
        content = yaml.safe_load(read_file(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML that can be read here ({' '.join(str(error).split())}); {ADVICE}") from None
    group = isinstance(content, dict) and "group" in content
    found = check(content, GroupFile if group else TaskFile, path, ADVICE, f"is no {'group' if group else 'task'}")
    for task in found["task"] if group else [found]:
        choice, cloze = "doc_to_choice" in task, task["output_type"] == "loglikelihood"
        metrics = {metric["metric"] for metric in task.get("metric_list", ())}
        problems = {
            "multiple_choice needs doc_to_choice": not choice and not cloze,
            "doc_to_choice belongs to multiple_choice": choice and cloze,
            "target_delimiter belongs to multiple_choice; write it into doc_to_target": "target_delimiter" in task and cloze,
            "loglikelihood has no acc_norm": "acc_norm" in metrics and cloze,
            "perplexity belongs to loglikelihood": "perplexity" in metrics and not cloze,
        }
        if wrong := [problem for problem, there in problems.items() if there]:
            raise ValueError(f"{path} is no task: {task['task']}: {', '.join(wrong)}; {ADVICE}")
    return found


def task_files(folder: Path = TASKS) -> dict[str, tuple[Path, TaskFile | GroupFile]]:
    """Name -> file and content of every task and group in a folder's *.yaml files. Raises ValueError for a name that is there twice."""
    found: dict[str, tuple[Path, TaskFile | GroupFile]] = {}
    for path in sorted(folder.glob("*.yaml")):
        content = read_task_file(path)
        members = content["task"] if "group" in content else []
        for name, what in [(content.get("group", content["task"]), content)] + [(member["task"], member) for member in members]:
            if name in found:
                raise ValueError(f"{path} and {found[name][0]} both call a task {name!r}; rename one")
            found[name] = (path, what)
    return found


# ---------------------------------------------------------------- documents -> items


def documents(path: Path, kind: str) -> Iterator[tuple[str, dict]]:
    """The documents of a JSON Lines or Parquet file, each with where it stands. Raises ValueError."""
    if kind == "parquet":
        import pyarrow  # comes with datasets
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is no Parquet file ({' '.join(str(error).split())}); get it again") from None
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(read_file(path).split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is no JSON ({error}); mend or delete the line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is no JSON object; {ADVICE}")
            yield f"{path} line {number}", row


def data_paths(task: TaskFile, source: Path, root: Path) -> list[Path]:
    """The files of a task's test split. Raises FileNotFoundError that says what belongs where, ValueError."""
    files, split = task["dataset_kwargs"]["data_files"], task["test_split"]
    files = files if isinstance(files, dict) else {"train": files}  # what `datasets` calls files without a split
    if split not in files:
        raise ValueError(f"{source} is no task: test_split={split!r} is none of the splits in data_files, {', '.join(files)}; {ADVICE}")
    names = files[split] if isinstance(files[split], list) else [files[split]]
    for path in (root / name for name in names):
        if not path.is_file():
            origin = task.get("metadata", {}).get("source")
            where = f" ({origin})" if isinstance(origin, str) else ""
            raise FileNotFoundError(f"the task {task['task']} needs {path}{where}; put it there, or name its root with --task_data")
    return [root / name for name in names]


class Reader:
    """Makes items of a task's documents. fields: names that at least one of them has."""

    def __init__(self, task: TaskFile, fields: set[str]):
        self.task, self.fields = task, fields
        self.environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self.templates: dict[str, tuple[Template, set[str]]] = {}  # text -> template, and the fields that it reads

    def value(self, key: str, doc: dict):
        """What the task's `key` says of a document: the field of that name as it is, else the template's text, else a plain value."""
        said = self.task[key]
        if not isinstance(said, str):
            return said
        plain = said in self.fields or said.isidentifier()  # a lone word that is no field is a field's name mistyped
        if not plain and said not in self.templates:
            used = meta.find_undeclared_variables(self.environment.parse(said)) - self.environment.globals.keys()
            self.templates[said] = (self.environment.from_string(said), used)
        template, used = (None, {said}) if plain else self.templates[said]
        if missing := sorted(used - doc.keys()):
            raise ValueError(f"there is no field {', '.join(missing)}, only {', '.join(doc) or 'an empty object'}")
        return doc[said] if plain else template.render(**doc)

    def choices(self, doc: dict) -> tuple[str, ...]:
        found = self.value("doc_to_choice", doc)
        if isinstance(found, str):
            found = ast.literal_eval(found)  # a template writes a list down
        if not isinstance(found, list) or len(found) < 2:
            raise ValueError(f"{found!r} is no list of two or more choices")
        return tuple(map(text_of, found))

    def right(self, doc: dict, choices: tuple[str, ...]) -> int:
        """Which choice is right: its number, also as a template's text, or its own text."""
        target = self.value("doc_to_target", doc)
        if isinstance(target, str):
            number = target.isdecimal() and self.task["doc_to_target"] not in self.fields
            target = int(target) if number else choices.index(target) if target in choices else target
        if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < len(choices):
            raise ValueError(f"{target!r} is none of the {len(choices)} choices")
        return target

    def item(self, doc: dict, where: str) -> Item:
        """Raises ValueError that names what doesn't fit, and where."""
        key = "doc_to_text"
        try:
            context = text_of(self.value(key, doc), may_be_empty=True)
            if self.task["output_type"] == "loglikelihood":
                key = "doc_to_target"
                return Item(context, (text_of(self.value(key, doc)),), 0)
            key = "doc_to_choice"
            choices = self.choices(doc)
            key = "doc_to_target"
            return Item(context, choices, self.right(doc, choices), self.task.get("target_delimiter", " "))
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, SyntaxError, RecursionError) as error:
            raise ValueError(f"{key} of the task {self.task['task']} does not fit {where}: {error}; {ADVICE}") from None


def text_of(value: object, may_be_empty: bool = False) -> str:
    """A text as it is. Raises ValueError for anything else."""
    if not isinstance(value, str) or not (value or may_be_empty):
        raise ValueError(f"{value!r} is no text")
    return value


def read_task(task: TaskFile | GroupFile, source: Path, root: Path) -> Task:
    """A task with its items; a group's are those of its tasks, one after the other. Raises FileNotFoundError, ValueError."""
    if "group" in task:
        members = [read_task(member, source, root) for member in task["task"]]
        if len({(member.cloze, member.metrics) for member in members}) > 1:
            raise ValueError(f"{source} is no group: its tasks must have one output_type and one metric_list; {ADVICE}")
        items = tuple(item for member in members for item in member.items)
        return Task(task["group"], items, members[0].metrics, {member.name: len(member.items) for member in members})
    paths = data_paths(task, source, root)
    found = [document for path in paths for document in documents(path, task["dataset_path"])]
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))} of the task {task['task']} holds no documents; get it again")
    reader = Reader(task, {name for _, doc in found for name in doc})
    items = tuple(reader.item(doc, where) for where, doc in found)
    metrics = [ACCURACIES.get(metric["metric"], metric["metric"]) for metric in task.get("metric_list", [{"metric": "acc"}])]
    return Task(task["task"], items, tuple(metrics))


def find_tasks(names: Iterable[str], root: Path, made: dict[str, Callable[[], list[Task]]]) -> tuple[list[Task], list[str]]:
    """The tasks that --tasks names, and the names that only lm-evaluation-harness can know.

    names: of tasks and groups in tasks/, paths of YAML files, keys of `made` (tasks that are made in memory), or lm_eval:NAME.
    root: where their files are. Raises FileNotFoundError; ValueError also where two tasks that differ have the same name.
    """
    if not names:
        return [], []
    files, found, foreign = task_files(), {}, []
    for name in dict.fromkeys(names):
        if name in made:
            tasks = made[name]()
        elif name in files:
            tasks = [read_task(files[name][1], files[name][0], root)]
        elif name.endswith((".yaml", ".yml")):
            tasks = [read_task(read_task_file(Path(name)), Path(name), root)]
        else:
            tasks = []
            foreign.append(name.removeprefix(FOREIGN))
        for task in tasks:
            if found.setdefault(task.name, task) != task:
                raise ValueError(f"--tasks names two tasks called {task.name}, which differ; rename one in its file")
    if foreign and importlib.util.find_spec("lm_eval") is None:
        members = {member["task"] for _, task in files.values() if "group" in task for member in task["task"]}
        there = ", ".join([*made, *(name for name in files if name not in members)])
        raise ValueError(f"{', '.join(foreign)} is none of {there}; the tasks of lm-evaluation-harness need it: pip install lm-eval")
    return [*found.values()], foreign
