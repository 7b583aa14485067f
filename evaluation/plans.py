"""What a study has to do: its cells (a variant, a model, a seed) and the calls of the scripts that each needs, in order.

Each call writes into a directory whose name ends with the hash of all that determines its content. So what is there is done, whatever
recipe asked for it, and adding a seed, a variant or a task costs only that.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from utils import parse_weighted

from config import GPTConfig, TrainConfig
from evaluation.recipes import EVALUATE, PREPARE, TRAIN, Flags, Script, StudyRecipe
from formats.data_directory import META
from formats.outputs import peek_json, write_json
from formats.run_directory import BEST, find_checkpoint
from formats.scores import SCORES, content_hash, set_name
from formats.tokenizer import KINDS

TOKENIZER = "bpe"  # unless the recipe says otherwise: a vocabulary of its own pays for small models
SAMPLE_STORIES = 20_000  # of prepare_data.py --sample, if nobody says how many
PATHS = ("input", "val_input", "test_input", "text", "task_data")
READY = {"gpt2", "byte"}  # tokenizers that need no text
PRODUCTS = {PREPARE: META, TRAIN: BEST, EVALUATE: SCORES}  # the file that a call writes last, or at least must have written
OF_VARIANTS = {"max_documents", "max_bytes", "max_tokens", "shuffle_words"}  # in [data], not meant for what models are measured on
# Fields of TrainConfig that don't change which model comes out
NO_MATTER = {"data_dir", "out_dir", "device", "checkpoint_interval", "keep_checkpoints", "log_interval", "sample_tokens", "sample_prompt"}
NO_MATTER |= {"tensorboard"}


def words(flags: Flags) -> list[str]:
    """Flags as they are typed."""
    line: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list | tuple):
            line += [f"--{name}", *map(str, value)]
        else:
            line += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return line


@dataclass(frozen=True)
class Texts:
    """What only the preparation of data knows about texts. All raise FileNotFoundError, ValueError.

    content_of_data, content_of_texts: what determines the texts that a command line of prepare_data.py, or the --text of one of
    evaluate.py, means; given as their scripts read them. seen: how many documents of held-out sets, which are data directories by name and
    the --text of evaluate.py, stand in a data directory's train split.
    """

    content_of_data: Callable[[object], list]
    content_of_texts: Callable[[object], list]
    seen: Callable[[Path, dict[str, Path], object], dict[str, int]]


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a script. key: hash of all that determines what it writes into `directory`."""

    title: str
    script: Script
    name: str
    flags: Flags
    directory: Path
    key: str

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(self.script.path), *words(self.flags)]

    def __str__(self) -> str:
        return shlex.join(["python", self.script.path.name, *words(self.flags)])

    @property
    def record(self) -> Path:
        return self.directory / f"study_{self.name}.json"

    @property
    def product(self) -> Path:
        return self.directory / PRODUCTS[self.name]

    def recorded(self) -> dict | None:
        """What was recorded when this very call had ended well, None if it hasn't yet."""
        record = peek_json(self.record)
        there = isinstance(record, dict) and record.get("key") == self.key and self.product.is_file()
        return record if there and record.get("scores") == self.scores() else None

    def scores(self) -> str | None:
        """Hash of an evaluation's scores: evaluate.py may be called by hand, also for another checkpoint of the run."""
        return content_hash(self.product.read_bytes()) if self.name == EVALUATE else None

    def write_record(self, seconds: float, share: float) -> None:
        """Record that this call has ended well. seconds, share: how long it took, and how much of a training it did."""
        record = {"key": self.key, "command": str(self), "seconds": round(seconds, 2), "share": round(share, 4)}
        write_json(self.record, record | ({"scores": scores} if (scores := self.scores()) else {}))


@dataclass(frozen=True)
class Cell:
    """One model to train and evaluate. data: what it is trained on; work: in a unit that takes about the same time in all cells."""

    variant: str
    seed: int
    data: tuple[Step, ...]
    train: Step
    evaluate: Step
    work: float

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def done(self) -> bool:
        return self.evaluate.recorded() is not None


class Planner:
    """Turns a recipe into cells. Raises FileNotFoundError, and ValueError that names the table of the recipe.

    out_dir: the study's folder; data_root: where relative paths of texts begin, instead of where the recipe says.
    """

    def __init__(self, recipe: StudyRecipe, scripts: dict[str, Script], texts: Texts, out_dir: Path, data_root: str | None = None):
        self.recipe, self.scripts, self.texts, self.out_dir = recipe, scripts, texts, out_dir
        self.root = Path(recipe.options.data_root if data_root is None else data_root)
        self.known: dict[tuple[str, ...], object] = {}  # what was read, by its words: reading a command line takes a tenth of a second

    def read(self, script: str, place: str, flags: Flags):
        """Flags as their script reads them."""
        line = (script, *words(flags))
        try:
            if line not in self.known:
                self.known[line] = self.scripts[script].read([*line[1:]])
            return self.known[line]
        except ValueError as error:
            raise ValueError(f"{self.recipe.path}: {place}: {error}") from None

    def rooted(self, flags: Flags) -> Flags:
        """Flags with the paths of texts below the data root."""
        texts = {name: [str(self.root / text) for text in several(flags[name])] for name in PATHS if name in flags}
        return flags | texts | ({"task_data": str(self.root / flags["task_data"])} if "task_data" in flags else {})

    # ------------------------------------------------------------ data

    @cached_property
    def tokenizer_content(self) -> str:
        """Hash of the tokenizer.json that the recipe names; empty where it names a kind."""
        name = str(self.recipe.data.get("tokenizer", TOKENIZER))
        if name in KINDS:
            return ""
        path = Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{self.recipe.path}: [data] tokenizer={name!r} is no file; name one of {', '.join(KINDS)}, or a path")
        return content_hash(path.read_bytes())

    def data(self, place: str, name: str, flags: Flags, held_out: bool = False, tokenizer: Step | None = None) -> Step:
        """The preparation of a data directory. held_out: whether models are measured on it, so that limits of the variants' size don't
        count. tokenizer: the preparation that makes it, None where the flags say it."""
        common = {key: value for key, value in self.recipe.data.items() if not (held_out and key in OF_VARIANTS)}
        flags = {"report": False, "tokenizer": TOKENIZER} | common | self.rooted(flags)
        if tokenizer is not None:
            flags = {key: value for key, value in flags.items() if key not in ("vocab_size", "train_bytes")}
            flags["tokenizer"] = str(tokenizer.directory / "tokenizer.json")
        args = self.read(PREPARE, place, flags)
        made_by = tokenizer.key if tokenizer else self.tokenizer_content
        key = content_hash(PREPARE, self.texts.content_of_data(args), made_by)
        directory = self.out_dir / "data" / f"{name}-{key[:8]}"
        return Step(f"preparing {name}", self.scripts[PREPARE], PREPARE, flags | {"output": str(directory)}, directory, key)

    @cached_property
    def union(self) -> Step | None:
        """All sources as one, from which the tokenizer is learned, and whose held-out documents are read unless the recipe names others.

        None where neither is needed.
        """
        recipe, flags = self.recipe, {}
        if recipe.held_out and not self.learns_tokenizer:
            return None
        tables = [*(recipe.variants or recipe.sources).values()]
        for name in ("input", "dataset", "val_input", "test_input"):
            texts = [parse_weighted(str(text))[0] for one in tables for text in several(one.get(name, []))]
            flags |= {name: list(dict.fromkeys(texts))} if texts else {}
        if any(one.get("sample") for one in tables):
            flags |= {"sample": True, "sample_stories": max((recipe.data | one).get("sample_stories", SAMPLE_STORIES) for one in tables)}
        return self.data("the union of all sources", "union", flags, held_out=True)

    @property
    def learns_tokenizer(self) -> bool:
        return str(self.recipe.data.get("tokenizer", TOKENIZER)) in set(KINDS) - READY

    def with_tokenizer(self, place: str, name: str, flags: Flags, held_out: bool = False) -> Step:
        """The preparation of a data directory with the tokenizer that all share."""
        return self.data(place, name, flags, held_out, self.union if self.learns_tokenizer else None)

    @cached_property
    def held_out(self) -> dict[str, Step]:
        """The data directories whose test splits all models are measured on, by their names in the recipe."""
        named = self.recipe.held_out.items()
        return {name: self.with_tokenizer(f"[held_out.{name}]", name, flags, True) for name, flags in named} or {"held_out": self.union}

    @property
    def shared(self) -> list[Step]:
        """What all cells need, in order."""
        return [*dict.fromkeys(filter(None, [self.union, *self.held_out.values()]))]

    # ------------------------------------------------------------ cells

    @cached_property
    def evaluation(self) -> object:
        """[evaluation] as evaluate.py reads it."""
        return self.read(EVALUATE, "[evaluation]", self.rooted(self.recipe.evaluation))

    @cached_property
    def set_names(self) -> dict[str, str]:
        """What evaluate.py calls the sets that it is told to read -> their names in the recipe."""
        way = (self.evaluation.stride, self.evaluation.stream)
        texts = {set_name(str(self.root / text), "text", *way): str(text) for text in several(self.recipe.evaluation.get("text", []))}
        return {set_name(str(step.directory), "test", *way): name for name, step in self.held_out.items()} | texts

    @cached_property
    def measured_on(self) -> list:
        """What determines the held-out texts."""
        return [[step.key for step in self.held_out.values()], self.texts.content_of_texts(self.evaluation)]

    def cell(self, variant: str, model: str, seed: int, data: list[tuple[Step, float | None]], more: Flags | None = None) -> Cell:
        """A model trained on data directories with their weights, None for what is read as it is. more: flags of this training alone."""
        flags = self.recipe.training | self.recipe.models[model] | (more or {})
        args, _ = self.read(TRAIN, f"[models.{model}] and [training]", flags)
        config = {name: value for name, value in dataclasses.asdict(args.train).items() if name not in NO_MATTER}
        source = find_checkpoint(args.init_from) if args.init_from else None
        begins = content_hash(source.read_bytes()) if source and source.is_file() else args.init_from
        trained_on = [(step.key, share) for step, share in data]
        key = content_hash(TRAIN, dataclasses.asdict(args.model), config | {"seed": seed}, begins, trained_on)
        name = f"{variant} {model}" if len(self.recipe.models) > 1 else variant
        run = self.out_dir / "runs" / f"{name.replace(' ', '-')}-seed{seed}-{key[:8]}"
        names = [str(step.directory) + ("" if share is None else f":{share}") for step, share in data]
        flags = {"data_dir": names} | flags | {"seed": seed, "out_dir": str(run), "resume": "auto"}
        train = Step(f"training {name}, seed {seed}", self.scripts[TRAIN], TRAIN, flags, run, key)
        return Cell(name, seed, tuple(step for step, _ in data), train, self.evaluate(train), work(args.model, args.train))

    def evaluate(self, train: Step) -> Step:
        names = [str(step.directory) for step in self.held_out.values()]
        flags = {"checkpoint": str(train.directory), "data_dir": names, "split": "test"} | self.rooted(self.recipe.evaluation)
        key = content_hash(EVALUATE, train.key, self.measured_on, self.recipe.evaluation, [*self.set_names])  # scores are found by them
        title = train.title.replace("training", "evaluating", 1)
        return Step(title, self.scripts[EVALUATE], EVALUATE, flags, train.directory, key)

    def variants(self) -> list[Cell]:
        """The cells of [variants] and [models], seed after seed, so that what a further seed adds comes last."""
        data = {name: self.with_tokenizer(f"[variants.{name}]", name, flags) for name, flags in self.recipe.variants.items()}
        seeds, models = self.recipe.options.seeds, self.recipe.models
        return [self.cell(name, model, seed, [(data[name], None)]) for seed in seeds for model in models for name in data]


def several(value: object) -> list:
    """The values of a flag that takes several."""
    return [*value] if isinstance(value, list | tuple) else [value]


def work(model: GPTConfig, config: TrainConfig) -> float:
    """About how much there is to compute in a training: its tokens times its parameters. `epochs` count as if they weren't set."""
    tokens = config.max_tokens or config.max_steps * config.windows_per_step * model.block_size
    return tokens * (12 * model.n_layer * model.n_embd**2 + model.vocab_size * model.n_embd)
