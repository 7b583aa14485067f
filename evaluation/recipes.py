"""Recipes of studies: TOML files whose tables hold flags of the scripts. Read and checked as a whole before anything runs.

A recipe says what is varied and what stays: [variants] (flags of prepare_data.py) or a [mixture] of sources to search, [models] (flags of
train.py), and for all of them [data], [training], [evaluation] (flags of evaluate.py), [held_out] and [study].
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from utils import Checked, Natural, Seed

from annotated_types import Ge, Le, MinLen

Flags = dict[str, object]  # of a script, by their names
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # of variants, models and sets: they become names of folders
PLAIN = (str, bool, int, float)

PREPARE, TRAIN, EVALUATE = "prepare_data", "train", "evaluate"
# What the study itself decides, and what has to be the same for all variants, so that they have one tokenizer and the same splits.
SET_BY_THE_STUDY = {
    PREPARE: {"output"},
    TRAIN: {"data_dir", "out_dir", "seed", "dataset", "tokenizer", "resume", "overwrite", "also_eval", "export", "verify_data"},
    EVALUATE: {"checkpoint", "data_dir", "split", "output", "verify_data"},
}
THE_SAME_FOR_ALL = {"tokenizer", "vocab_size", "train_bytes", "lowercase", "nfc", "seed", "split", "val_fraction", "test_fraction"}
THE_SAME_FOR_ALL |= {"separator", "text_field", "errors"}


@dataclass(frozen=True)
class Script:
    """A script that a study calls. flags: their names; read: what reads its command line and raises ValueError for a mistake in it."""

    path: Path
    flags: frozenset[str]
    read: Callable[[list[str]], object]


@dataclass(frozen=True)
class Options(Checked):
    """[study]: what belongs to no script."""

    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (1, 2, 3)
    """Seeds of train.py; each variant is trained once with each."""
    data_root: str = "."
    """Where relative paths of texts begin."""
    allow_overlap: bool = False
    """Go on where held-out documents stand in a variant's training data."""
    allow_smaller: bool = False
    """Go on where a variant's sources end before its max_tokens."""

    def problems(self) -> list[str]:
        return ["seeds are given twice; name each once"] if len(set(self.seeds)) < len(self.seeds) else []


@dataclass(frozen=True)
class Mixture(Checked):
    """[mixture]: sources whose best shares are searched."""

    pilots: Annotated[int, Ge(4), Le(1000)] = 12
    """Trainings with different shares, from which the best are predicted."""
    seed: Natural = 0
    """Seed of the pilots' shares and trainings."""
    target: tuple[str, ...] = ()
    """Held-out sets whose mean bits per byte shall be lowest. Default: all."""


@dataclass(frozen=True)
class StudyRecipe:
    """A recipe as its file says it. variants, held_out, models and sources (of a mixture): flags by name; pilot_training: pilots' own."""

    path: Path
    options: Options
    data: Flags
    variants: dict[str, Flags]
    held_out: dict[str, Flags]
    training: Flags
    models: dict[str, Flags]
    evaluation: Flags
    mixture: Mixture | None = None
    sources: dict[str, Flags] = field(default_factory=dict)
    pilot_training: Flags = field(default_factory=dict)


def unknown(path: Path, place: str, key: str, known: Iterable[str]) -> ValueError:
    """What to say about a key that no table of this kind has."""
    similar = difflib.get_close_matches(key, known, 1)
    advice = f"did you mean {similar[0]!r}?" if similar else f"it may have {', '.join(sorted(known))}"
    return ValueError(f"{path}: {place} has an unknown key {key!r}; {advice}")


def table(path: Path, place: str, content: object) -> dict:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {place} must be a table, not {content!r}")
    return content


def read_flags(path: Path, place: str, content: object, script: str, known: frozenset[str], barred: set[str] = frozenset()) -> Flags:
    """A table of a script's flags. barred: those that belong into [data]. Raises ValueError."""
    for key, value in table(path, place, content).items():
        if key in SET_BY_THE_STUDY[script]:
            raise ValueError(f"{path}: {place} sets {key}, which the study itself sets; leave it out")
        if key in barred:
            raise ValueError(f"{path}: {place} sets {key}, which must be the same for all; set it in [data]")
        if key not in known:
            raise unknown(path, place, key, known - SET_BY_THE_STUDY[script] - barred)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, PLAIN) for one in values):
            raise ValueError(f"{path}: {place} {key}={value!r} must be a text, number, true, false, or a list of such")
    return content


def read_named(path: Path, place: str, content: object, script: str, known: frozenset[str], barred: set[str] = frozenset()) -> dict:
    """A table of named tables of flags; of data, a path or list of paths is short for its `input`."""
    found = {}
    for name, value in table(path, f"[{place}]", content).items():
        if not NAME.fullmatch(name):
            raise ValueError(f"{path}: [{place}] {name!r} can't be a name; take letters, digits and - _ .")
        short = script == PREPARE and isinstance(value, str | list)
        value = {"input": [value] if isinstance(value, str) else value} if short else value
        found[name] = read_flags(path, f"[{place}.{name}]", value, script, known, barred)
    return found


def read_options(path: Path, place: str, content: dict, kind: type[Checked]):
    """A table as the dataclass that declares it. Raises ValueError."""
    known = {field.name for field in dataclasses.fields(kind)}
    for key in content:
        if key not in known:
            raise unknown(path, place, key, known)
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {place} {error}") from None


TABLES = ("study", "data", "variants", "held_out", "training", "models", "evaluation", "mixture")


def read_toml(path: Path) -> dict:
    """A TOML file's content. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        there = ", ".join(map(str, sorted(path.parent.glob("*.toml")))) or "write one, see docs/studies.md"
        raise FileNotFoundError(f"no recipe at {path}; {f'there is {there}' if there.endswith('.toml') else there}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # tomllib's own, and text that isn't UTF-8
        raise ValueError(f"{path} is no TOML: {error}") from None


def read_recipe(path: Path, scripts: dict[str, Script]) -> StudyRecipe:
    """A recipe from its file. scripts: by name. Raises FileNotFoundError, and ValueError that names the place of what is wrong."""
    content = read_toml(path)
    for key in content:
        if key not in TABLES:
            raise unknown(path, "the recipe", key, TABLES)
    known = {name: script.flags for name, script in scripts.items()}
    parts = {name: table(path, f"[{name}]", content.get(name, {})) for name in TABLES}
    prepare = (PREPARE, known[PREPARE], THE_SAME_FOR_ALL)
    mixture, searched = dict(parts["mixture"]), "mixture" in content
    sources = read_named(path, "mixture.sources", mixture.pop("sources", {}), *prepare)
    recipe = StudyRecipe(
        path,
        read_options(path, "[study]", parts["study"], Options),
        read_flags(path, "[data]", parts["data"], PREPARE, known[PREPARE], {"input", "dataset", "sample"}),
        read_named(path, "variants", parts["variants"], *prepare),
        read_named(path, "held_out", parts["held_out"], *prepare) or sources,
        read_flags(path, "[training]", parts["training"], TRAIN, known[TRAIN]),
        read_named(path, "models", parts["models"], TRAIN, known[TRAIN]),
        read_flags(path, "[evaluation]", parts["evaluation"], EVALUATE, known[EVALUATE]),
        pilot_training=read_flags(path, "[mixture.training]", mixture.pop("training", {}), TRAIN, known[TRAIN]),
        sources=sources,
        mixture=read_options(path, "[mixture]", mixture, Mixture) if searched else None,
    )
    check_together(recipe)
    return recipe


def check_together(recipe: StudyRecipe) -> None:
    """Raise ValueError where the parts of a recipe don't make a study."""
    searched, compared = recipe.mixture is not None, len(recipe.variants) * len(recipe.models)
    weighted = [name for name, flags in recipe.sources.items() if any(re.search(r":[\d.]+$", str(text)) for text in flags.get("input", []))]
    sets = recipe.held_out or {"held_out": {}}
    unset = [name for name in recipe.mixture.target if name not in sets] if searched else []
    problems = {
        "it has both [variants] and a [mixture]; make two recipes of it": searched and recipe.variants,
        "it has no [models]; name one, e.g. [models.nano] with preset = 'nano'": not recipe.models,
        "it has neither [variants] nor a [mixture]; name what is to be compared, e.g. [variants.stories] with input = 'stories.txt'": (
            not searched and not recipe.variants
        ),
        "it has one variant of one model; two or more are compared": not searched and compared == 1,
        f"[mixture.sources] has {len(recipe.sources)} sources; 2 to 5 can be mixed": searched and not 2 <= len(recipe.sources) <= 5,
        "a [mixture] is searched for one model; name one in [models]": searched and len(recipe.models) > 1,
        f"[mixture.sources] gives {', '.join(weighted)} a weight, which is what is searched; leave it out": weighted,
        f"[mixture] seed = {searched and recipe.mixture.seed} is one of the study's seeds, which have to be fresh; take another": (
            searched and recipe.mixture.seed in recipe.options.seeds
        ),
        f"[mixture] target names {', '.join(unset)}, but the held-out sets are {', '.join(sets)}": unset,
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(f"{recipe.path}: {problem}")
