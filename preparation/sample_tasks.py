"""Tasks of the sample corpus: what a story must say next, with the exact probability of each choice. Doesn't import torch.

Each item is a held-out story up to a spot, and two texts that may stand there: the story's own and a wrong one. The grammar says how
probable both are, so what a perfect model reaches is known.
"""

import functools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from evaluation.tasks import Item, Task
from preparation.sample_corpus import GRAMMAR_PATH, Grammar, State, load_grammar

SEED = 1337
ITEMS = 300  # of each task
# private characters around a reference: where it begins, where its name ends, where what was drawn ends
OPEN, NAMED, CLOSE = "\ue000", "\ue001", "\ue002"
SPOT = re.compile(f"{OPEN}([^{NAMED}]*){NAMED}([^{CLOSE}]*){CLOSE}")


class Spot(NamedTuple):
    """A place in a story: where it is in the text, the grammar's reference there, and the text that was drawn for it."""

    start: int
    reference: str
    text: str


@dataclass(frozen=True)
class Story:
    """text; spots of the marked references, in order; states: those it passed while it was drawn."""

    text: str
    spots: list[Spot]
    states: list[State]

    def holds(self, word: str) -> bool:
        return re.search(rf"\b{re.escape(word)}\b", self.text) is not None


Drawn = tuple[str, str, str]  # context, right text, wrong text


@functools.cache
def marked_grammar(references: str) -> Grammar:
    """The grammar with marks around those references that the regular expression matches: it draws the same stories, and their spots."""
    marked = re.sub(rf"\{{({references})\}}", rf"{OPEN}\1{NAMED}{{\1}}{CLOSE}", GRAMMAR_PATH.read_text(encoding="utf-8"))
    return Grammar(json.loads(marked))


def draw_story(grammar: Grammar, references: str, stream: str) -> Story:
    """The story of a random stream, with the spots of some references."""
    marked, _ = marked_grammar(references).sample(random.Random(stream))
    spots, shift = [], 0
    for found in SPOT.finditer(marked):
        spots.append(Spot(found.start() - shift, found[1], found[2]))
        shift += len(found[0]) - len(found[2])
    return Story(SPOT.sub(r"\2", marked), spots, [*grammar.walk(random.Random(stream))])


def texts_of(grammar: Grammar, *rules: str) -> list[str]:
    return [alternative.text for rule in rules for alternative in grammar.rules[rule]]


# ---------------------------------------------------------------- what is asked


def wrong_word(rng: random.Random, story: Story, candidates: list[str]) -> Drawn:
    """One of the story's spots, with a wrong word that the story doesn't hold."""
    spot = rng.choice(story.spots)
    return story.text[: spot.start], spot.text, rng.choice([word for word in candidates if not story.holds(word)])


def name(grammar: Grammar, rng: random.Random, story: Story) -> Drawn:
    """The hero's name, or another of its kind."""
    kind = next(rule for rule in ("girl", "boy", "animal") if story.spots[0].text in texts_of(grammar, rule))
    return wrong_word(rng, story, texts_of(grammar, kind))


def role(grammar: Grammar, rng: random.Random, story: Story) -> Drawn:
    """Hero or friend, who both have been named."""
    first = next(i for i, spot in enumerate(story.spots) if spot.reference == "@friend")
    spot = rng.choice(story.spots[first:])
    other = next(other.text for other in story.spots if other.reference != spot.reference)
    return story.text[: spot.start], spot.text, other


def thing(grammar: Grammar, rng: random.Random, story: Story) -> Drawn:
    """The thing that the hero saw, or another."""
    return wrong_word(rng, story, texts_of(grammar, "thing"))


def color(grammar: Grammar, rng: random.Random, story: Story) -> Drawn:
    """The colour that the thing had, or another."""
    return wrong_word(rng, story, [alternative.texts["bare"] for alternative in grammar.rules["color"]])


def agreement(grammar: Grammar, rng: random.Random, story: Story) -> Drawn:
    """The hero's pronoun, or another one's in its place."""
    spot = rng.choice(story.spots)
    key = spot.reference.partition(".")[2]
    forms = {grammar.rules[rule][0].texts[key] for rule in ("girl", "boy", "animal")}
    return story.text[: spot.start], spot.text, rng.choice(sorted(forms - {spot.text}))


def order(grammar: Grammar, rng: random.Random, story: Story) -> Drawn:
    """Two parts of the story as they follow each other, or the other way round."""
    i = rng.randrange(len(story.spots) - 1)
    first, second = story.spots[i], story.spots[i + 1]
    between = story.text[first.start + len(first.text) : second.start]
    return story.text[: first.start], first.text + between + second.text, second.text + between + first.text


def odds(grammar: Grammar, rng: random.Random, story: Story) -> Drawn:
    """Who comes next, of two who may come, some more often than others: here a perfect model errs too."""
    spot = rng.choice(story.spots)
    known = {text.partition(" named")[0] for text in texts_of(grammar, spot.reference)}
    right = spot.text.partition(" named")[0]
    return story.text[: spot.start], right, rng.choice(sorted(known - {right}))


# ---------------------------------------------------------------- items


@dataclass(frozen=True)
class Question:
    """references: a regular expression of the grammar's references whose spots are asked for. draw: what is asked of a story."""

    references: str
    draw: Callable[[Grammar, random.Random, Story], Drawn]


PARTS = "opening|home|habit|day|sight|wish|problem:problem|attempt|mood|meeting|talk|solution|joy|play|ending"
QUESTIONS = {
    "sample_name": Question("@hero", name),
    "sample_role": Question("@hero|@friend", role),
    "sample_thing": Question("@thing", thing),
    "sample_color": Question(r"@color\.bare", color),
    "sample_agreement": Question(r"@hero\.(?:she|She|her)", agreement),
    "sample_order": Question(PARTS, order),
    "sample_odds": Question("who|visitor", odds),
}


def make_item(grammar: Grammar, story: Story, context: str, choices: list[str], right: int) -> Item:
    """An item with the exact probability of each choice behind the context.

    No alternative of the grammar begins as another one does. So every story that begins with the context has passed the states of this one
    whose last choice the context spells out, and probabilities need be followed from the last of them only.
    """
    state = next(state for state, after in reversed([*pairwise(story.states)]) if context.startswith(after.written))
    before = grammar.probability(context, state)
    probabilities = tuple(grammar.probability(context + choice, state) / before for choice in choices)
    return Item(context, tuple(choices), right, probabilities=probabilities)


def make_task(title: str, items: int = ITEMS, seed: int = SEED) -> Task:
    """One task of the sample corpus; item i is a pure function of (title, seed, i). Its stories are in no split of the corpus."""
    grammar, question = load_grammar(), QUESTIONS[title]
    made = []
    for i in range(items):
        story = draw_story(grammar, question.references, f"{seed}/tasks/{i}")
        rng = random.Random(f"{seed}/{title}/{i}")
        context, right, wrong = question.draw(grammar, rng, story)
        choices = [right, wrong] if rng.random() < 0.5 else [wrong, right]
        made.append(make_item(grammar, story, context, choices, choices.index(right)))
    return Task(title, tuple(made), ("accuracy",))


# what --tasks calls them -> makes them; `sample` are all
MADE: dict[str, Callable[[], list[Task]]] = {"sample": lambda: [*map(make_task, QUESTIONS)]}
MADE |= {title: lambda title=title: [make_task(title)] for title in QUESTIONS}
