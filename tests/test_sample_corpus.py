"""The grammar: exact probabilities, one derivation a story, and the entropy that follows from them."""

import hashlib
import json
import math
import random
from collections import Counter

import pytest

from formats.data_directory import DataDirectory
from preparation.sample_corpus import Grammar, State, load_grammar, stories

TOY = {
    "start": "story",
    "rules": {
        "story": ["{hero:name} met {friend:name-hero}. {end}"],
        "name": [{"text": "Ann", "weight": 2, "she": "She"}, {"text": "Bob", "she": "He"}, {"text": "Cy", "she": "He"}],
        "end": [{"text": "{@hero.she} left.", "weight": 3}, "{@friend} {verb}."],
        "verb": ["sang", "ran"],
    },
}


def check_unambiguous(grammar: Grammar, state: State) -> None:
    """Raise ValueError if, at the next choice, one alternative's certain beginning is a beginning of another's.

    Where this holds at every choice, a text tells which alternative was taken, so no text has two derivations.
    """
    state, choices, name = grammar.to_next_choice(state)
    beginnings = sorted(grammar.to_next_choice(grammar.choose(state, a, p, name))[0].written for a, p in choices)
    for first, second in zip(beginnings, beginnings[1:]):
        if second.startswith(first):
            raise ValueError(f"two alternatives begin alike: {first[-40:]!r} and {second[-40:]!r}")


def test_toy_grammar_by_enumeration():
    """All derivations: distinct texts, probabilities that sum to 1, and the probabilities one computes by hand."""
    grammar = Grammar(TOY)
    found = dict(grammar.derivations())
    assert len(list(grammar.derivations())) == len(found) == 6 * 3
    assert sum(2**log2p for log2p in found.values()) == pytest.approx(1)
    assert 2 ** found["Ann met Bob. She left."] == pytest.approx(2 / 4 * 1 / 2 * 3 / 4)
    assert 2 ** found["Bob met Ann. Ann sang."] == pytest.approx(1 / 4 * 2 / 3 * 1 / 4 * 1 / 2)


def test_toy_samples_follow_the_probabilities():
    grammar = Grammar(TOY)
    found = dict(grammar.derivations())
    drawn = list(stories(grammar, 5, "train", 6000))
    counts = Counter(text for text, _ in drawn)
    assert all(log2p == pytest.approx(found[text]) for text, log2p in drawn)
    for text, log2p in found.items():
        p = 2**log2p
        assert abs(counts[text] - 6000 * p) < 5 * math.sqrt(6000 * p * (1 - p))


def test_ambiguity_is_found():
    """An optional empty word gives some texts two derivations; both the check and the parser see it."""
    grammar = Grammar({"start": "s", "rules": {"s": ["a {maybe}{word}"], "maybe": ["very ", ""], "word": ["very old", "old"]}})
    assert len(list(grammar.derivations("a very old"))) == 2
    state, [(alternative, probability)], name = grammar.to_next_choice(grammar.initial())
    with pytest.raises(ValueError, match="begin alike"):
        check_unambiguous(grammar, grammar.choose(state, alternative, probability, name))


def test_names_that_do_not_exist_are_errors():
    for template in ("{nothing}", "{@nobody}", "{x:name} {@x.key}"):
        grammar = Grammar({"start": "s", "rules": {"s": [template], "name": ["Ann", "Bob"]}})
        with pytest.raises(ValueError, match="the grammar uses"):
            list(grammar.derivations())


def test_each_of_1000_stories_has_exactly_one_derivation_of_the_same_probability():
    grammar = load_grammar()
    for text, log2p in stories(grammar, 1, "val", 1000):
        derivations = list(grammar.derivations(text))
        assert len(derivations) == 1 and derivations[0][1] == pytest.approx(log2p, abs=1e-9), text
    assert list(grammar.derivations("Once upon a time, there was a story of another grammar.")) == []


def test_every_choice_of_the_grammar_can_be_told_from_its_text():
    grammar = load_grammar()
    rng, visited = random.Random(0), set()
    for _ in range(200):
        state = grammar.initial()
        while True:
            check_unambiguous(grammar, state)
            state, choices, name = grammar.to_next_choice(state)
            if not choices:
                break
            fresh = [choice for choice in choices if id(choice[0]) not in visited]  # go where we have not been
            alternative, probability = rng.choice(fresh or choices)
            visited.add(id(alternative))
            state = grammar.choose(state, alternative, probability, name)
    assert len(visited) == sum(map(len, grammar.rules.values()))  # and so every alternative was reached


def test_stories_are_long_enough_never_to_repeat_and_pure_in_their_number():
    grammar = load_grammar()
    some = list(stories(grammar, 3, "train", 400))
    assert sum(-log2p for _, log2p in some) / 400 > 100
    assert len({text for text, _ in some}) == 400
    assert some[:10] == list(stories(grammar, 3, "train", 10)) != list(stories(grammar, 4, "train", 10))
    assert not {text for text, _ in some} & {text for text, _ in stories(grammar, 3, "val", 400)}


def test_the_corpus_stays_the_same():
    """Its stories are compared across versions and machines: a golden hash of the first ones of each split."""
    expected = {
        "train": "94820638fe51137d988a3e23ffa3aad7c0aafc995bede0674fb88f672d2a38ab",
        "val": "f7e65a9068fe2501a124bf86e44b925dee128831bb70753d1778a252b176ff83",
        "test": "9bc0701059f7150bd89745a7429bc71f075749777c54f3ae9df883550fbdf0ea",
    }
    for split, digest in expected.items():
        text = "\n".join(text for text, _ in stories(load_grammar(), 1337, split, 5))
        assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_the_entropy_in_meta_is_what_the_parser_finds(sample_dir):
    data, grammar = DataDirectory(sample_dir), load_grammar()
    for split in ("train", "val", "test"):
        tokens = data.tokens(split).tolist()
        texts = data.tokenizer.tokenizer.decode(tokens, skip_special_tokens=False).split("<|endoftext|>")[:-1]
        assert len(texts) == data.meta["splits"][split]["documents"]
        bits = [-next(grammar.derivations(text))[1] for text in texts]
        expected = sum(bits) / sum(len(text.encode()) for text in texts)
        assert data.meta["sample"]["entropy_bits_per_byte"][split] == pytest.approx(expected, rel=1e-12)
        assert data.entropy(split) == (pytest.approx(bits) if split != "train" else None)
    assert json.loads((sample_dir / "meta.json").read_text())["split"]["rule"] == "sample"
