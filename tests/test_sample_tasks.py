"""Tasks of the sample corpus: exact probabilities, and questions about what they say they ask."""

import pytest

from evaluation.task_scores import perfect_choices, run_tasks
from preparation import sample_tasks
from preparation.sample_corpus import load_grammar, stories
from preparation.tokenizer_kinds import byte_tokenizer
from tests.test_tasks import model_for


@pytest.mark.parametrize("title", sample_tasks.QUESTIONS)
def test_sample_tasks_are_pure_and_their_probabilities_exact(title):
    """Probabilities followed from the story's own state are those followed from the very beginning."""
    grammar, made = load_grammar(), sample_tasks.make_task(title, 8)
    assert made == sample_tasks.make_task(title, 8) != sample_tasks.make_task(title, 8, seed=2)
    assert sample_tasks.make_task(title, 3).items == made.items[:3] and title in sample_tasks.MADE
    for item in made.items:
        before = grammar.probability(item.context, grammar.initial())
        for choice, probability in zip(item.choices, item.probabilities, strict=True):
            assert grammar.probability(item.context + choice, grammar.initial()) / before == pytest.approx(probability, rel=1e-9)
        assert item.probabilities[item.right] > 0 and len(set(item.choices)) == 2


def test_the_probability_of_a_beginning_adds_up():
    grammar = load_grammar()
    text, log2p = next(stories(grammar, 1, "val", 1))
    assert grammar.probability("", grammar.initial()) == pytest.approx(1)
    assert grammar.probability(text, grammar.initial()) == pytest.approx(2**log2p)
    begin = "Once upon a time, there was a "
    assert grammar.probability(begin, grammar.initial()) == pytest.approx(9 / 12)
    names = [grammar.probability(f"{begin}shy girl named {a.text}.", grammar.initial()) for a in grammar.rules["girl"]]
    assert sum(names) == pytest.approx(9 / 12 / 12 * 3 / 12)


def test_what_sample_tasks_ask():
    """Right and wrong differ in what the task is about, both sides come up, and the stories are new."""
    items = {title: sample_tasks.make_task(title, 40).items for title in sample_tasks.QUESTIONS}
    for title, made in items.items():
        assert 8 < sum(item.right for item in made) < 32, title
        summary = perfect_choices(made)
        assert (summary["accuracy"] == 1) == (title not in ("sample_agreement", "sample_odds")), title
    for item in items["sample_color"]:
        assert item.choices[item.right] in item.context and item.choices[1 - item.right] not in item.context
    for item in items["sample_role"]:
        assert all(choice in item.context for choice in item.choices)
    for item in items["sample_order"]:
        assert sorted(item.choices[0].split()) == sorted(item.choices[1].split())
    assert {choice for item in items["sample_agreement"] for choice in item.choices} >= {"she", "he", "it"}
    held_out = {item.context[:250] for item in items["sample_order"] if len(item.context) >= 250}
    trained = {text[:250] for split in ("train", "val", "test") for text, _ in stories(load_grammar(), 1337, split, 300)}
    assert held_out and not held_out & trained


def test_a_random_model_is_near_chance_on_the_sample_tasks():
    tokenizer = byte_tokenizer()
    tasks = [sample_tasks.make_task(title, 20) for title in ("sample_role", "sample_odds")]
    for score in run_tasks(model_for(tokenizer, block_size=256), tokenizer, tasks, "model", {}).values():
        accuracy = score.summary["measures"]["accuracy"]
        assert accuracy["low"] < 0.5 < accuracy["high"] and accuracy["perfect"] > 0.5
        assert score.summary["measures"]["probability"]["perfect"] > 0.5
