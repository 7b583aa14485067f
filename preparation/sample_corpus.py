"""The sample corpus: stories drawn from a small probabilistic grammar, each with its exact probability.

A perfect model would assign every story just that probability, so the grammar tells how low a model's bits per byte can go.
The grammar's language is described in the file itself, data/sample_grammar.json. Doesn't import torch.
"""

import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from preparation.sources import Format, Source

GRAMMAR_PATH = Path(__file__).resolve().parent.parent / "data" / "sample_grammar.json"
STORY_BYTES = 770  # the mean length of a story
REFERENCE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, eq=False)
class Alternative:
    """One way to expand a rule: its template, its weight, and further templates by name."""

    text: str
    weight: float
    texts: dict[str, str]


@dataclass(frozen=True)
class State:
    """A partly expanded story: what is written, what is still to be expanded (a linked list), what was remembered, log2 P so far."""

    written: str
    todo: tuple | None
    bound: dict[str, Alternative] = field(default_factory=dict)
    log2p: float = 0.0


@functools.cache
def _reversed_pieces(template: str) -> list[tuple[bool, str]]:
    """The literals and references of a template from its end on: (is a reference, text)."""
    return [(i % 2 == 1, piece) for i, piece in enumerate(REFERENCE.split(template)) if piece][::-1]


def push(template: str, todo: tuple | None) -> tuple | None:
    """`todo` with the pieces of `template` in front: (is a reference, text), rest."""
    for piece in _reversed_pieces(template):
        todo = (piece, todo)
    return todo


class Grammar:
    """A probabilistic grammar with memory. A derivation expands the leftmost symbol first.

    Raises ValueError where a template names something that does not exist.
    """

    def __init__(self, description: dict):
        self.start: str = description["start"]
        self.rules: dict[str, list[Alternative]] = {}
        for name, rule in description["rules"].items():
            rule = rule if isinstance(rule, dict) else {"shared": {}, "alternatives": rule}
            self.rules[name] = []
            for alternative in rule["alternatives"]:
                texts = rule["shared"] | ({"text": alternative} if isinstance(alternative, str) else alternative)
                self.rules[name].append(Alternative(texts.pop("text"), float(texts.pop("weight", 1)), texts))

    def to_next_choice(self, state: State) -> tuple[State, list[tuple[Alternative, float]], str | None]:
        """Write all that is certain; return the state before the next choice, its alternatives with probabilities, the name to remember.

        No alternatives: the story is complete.
        """
        written, todo = [state.written], state.todo
        while todo is not None:
            (is_reference, text), todo = todo
            if not is_reference:
                written.append(text)
            elif text.startswith("@"):
                name, _, key = text[1:].partition(".")
                if name not in state.bound or (key and key not in state.bound[name].texts):
                    raise ValueError(f"the grammar uses {{{text}}} where nothing of that name was drawn")
                todo = push(state.bound[name].texts[key] if key else state.bound[name].text, todo)
            else:
                name, _, rule = text.rpartition(":")
                rule, *others = rule.split("-")
                if rule not in self.rules:
                    raise ValueError(f"the grammar uses {{{text}}}, but has no rule {rule!r}")
                taken = [state.bound[other] for other in others]
                left = [a for a in self.rules[rule] if a not in taken]
                total = sum(a.weight for a in left)
                choices = [(a, a.weight / total) for a in left]
                return State("".join(written), todo, state.bound, state.log2p), choices, name or None
        return State("".join(written), None, state.bound, state.log2p), [], None

    def choose(self, state: State, alternative: Alternative, probability: float, name: str | None) -> State:
        bound = state.bound | {name: alternative} if name else state.bound
        return State(state.written, push(alternative.text, state.todo), bound, state.log2p + math.log2(probability))

    def initial(self) -> State:
        return State("", push("{" + self.start + "}", None))

    def walk(self, rng: random.Random) -> Iterator[State]:
        """A story being drawn: the state at its beginning, after each choice, and last the complete one."""
        state = self.initial()
        while True:
            yield state
            state, choices, name = self.to_next_choice(state)
            if not choices:
                yield state
                return
            r = rng.random()
            for choice in choices:  # the last one where rounding leaves a rest
                r -= choice[1]
                if r < 0:
                    break
            state = self.choose(state, *choice, name)

    def sample(self, rng: random.Random) -> tuple[str, float]:
        """One story and the log2 of its probability, its end included. Uses rng.random() only, whose stream Python keeps stable."""
        *_, state = self.walk(rng)
        return state.written, state.log2p

    def probability(self, text: str, state: State) -> float:
        """The probability that a story which has come to this state, and so begins with state.written, begins with `text`."""
        total, stack = 0.0, [state]
        while stack:
            reached, choices, name = self.to_next_choice(stack.pop())
            if reached.written.startswith(text):
                total += 2 ** (reached.log2p - state.log2p)
            elif text.startswith(reached.written):
                stack += [self.choose(reached, *choice, name) for choice in choices]
        return total

    def derivations(self, text: str | None = None) -> Iterator[tuple[str, float]]:
        """Every derivation of `text` (of any text if None), each as (text, log2 P). For None the grammar must be small."""
        stack = [self.initial()]
        while stack:
            state, choices, name = self.to_next_choice(stack.pop())
            if text is not None and not text.startswith(state.written):
                continue
            if not choices and (text is None or state.written == text):
                yield state.written, state.log2p
            stack += [self.choose(state, *choice, name) for choice in choices]

    def log2_probability(self, text: str) -> float | None:
        """log2 of a story's probability, its end included; None for what the grammar can't write."""
        return next((log2p for _, log2p in self.derivations(text)), None)


def load_grammar() -> Grammar:
    return Grammar(json.loads(GRAMMAR_PATH.read_text(encoding="utf-8")))


def stories(grammar: Grammar, seed: int, split: str, count: int) -> Iterator[tuple[str, float]]:
    """`count` independent stories of a split, each with its log2 probability; story i is a pure function of (seed, split, i)."""
    for i in range(count):
        yield grammar.sample(random.Random(f"{seed}/{split}/{i}"))


class SampleStories(Source):
    """One split of the sample corpus, `count` stories. bits: of each story under the grammar, known after reading."""

    def __init__(self, grammar: Grammar, seed: int, split: str, count: int):
        super().__init__(f"sample:{split}", Format())
        self.grammar, self.seed, self.split, self.count = grammar, seed, split, count
        self.text_bytes = STORY_BYTES * count  # near enough for a progress bar
        self.bits: list[float] = []

    def __iter__(self) -> Iterator[str]:
        self.bits = []
        for text, log2p in stories(self.grammar, self.seed, self.split, self.count):
            self.bits.append(-log2p)
            yield text

    def describe(self) -> dict:
        content = GRAMMAR_PATH.read_bytes()
        return {"name": "data/sample_grammar.json", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
