"""What a model writes: figures against plain counting, and memorisation that is really found."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate
from config import GPTConfig
from evaluation import samples
from evaluation.samples import Sample
from formats.data_directory import DataDirectory
from formats.run_directory import load_model
from models import GPT
from preparation.tokenizer_kinds import char_tokenizer


class Words:
    """A data directory in memory. tokens: by split."""

    def __init__(self, train, val):
        self.splits = {"train": np.array(train, np.uint16), "val": np.array(val, np.uint16)}
        self.tokenizer = type("Tokenizer", (), {"eot_id": 0})

    def tokens(self, split):
        return self.splits[split]


@given(st.data())
def test_shared_runs_are_those_of_plain_counting(data):
    ids = st.lists(st.integers(1, 3), max_size=40)
    train, val = data.draw(ids), data.draw(ids)
    texts = data.draw(st.lists(ids, min_size=1, max_size=4))
    texts += [train[i : i + 15] for i in data.draw(st.lists(st.integers(0, 30), max_size=2))]  # learned by heart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CHUNK", data.draw(st.integers(1, 20)))
        result = samples.shared_with_training(texts, [Words(train, [*val, 0])])
    for n in (8, 13):
        known = {tuple(train[i : i + n]) for i in range(len(train) - n + 1)}
        for name, rows in (("samples", texts), ("held_out", [val])):
            grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
            assert result[str(n)][name] == (pytest.approx(sum(gram in known for gram in grams) / len(grams)) if grams else None)


def test_variety_by_hand():
    texts = [["a", "b", "a", "b", "a", "b"], ["a", "b", "c"]]
    assert samples.distinct(texts, 1) == pytest.approx(3 / 9)
    assert samples.distinct(texts, 2) == pytest.approx(3 / 7)  # ab ba ab ba ab, ab bc
    assert samples.repeated(texts, 2) == pytest.approx(3 / 7)
    assert samples.repeated([["a"]]) is None and samples.distinct([[]], 1) is None


def test_texts_end_by_themselves_or_at_the_budget():
    """A model that always says 5, and one that always says the end."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=1, n_head=2, n_embd=16)).eval()
    tokenizer = type(
        "Tokenizer",
        (),
        {"eot_id": 0, "vocab_size": 30, "never_drawn": [], "encode": lambda text: [5] * len(text), "decode": lambda ids: "x" * len(ids)},
    )
    for favourite, ended, length in ((5, False, 12), (0, True, 0)):
        torch.nn.init.zeros_(model.wte.weight)
        torch.nn.init.zeros_(model.ln_f.weight)
        torch.nn.init.ones_(model.ln_f.bias)
        with torch.no_grad():
            model.wte.weight[favourite] = 5.0
        drawn = samples.draw_samples(model, tokenizer, ["aa", "b"], 5, 12, 1.0, seed=1)
        assert [sample.prompt for sample in drawn] == ["aa"] * 3 + ["b"] * 2
        assert all(sample.ended == ended and sample.ids == [favourite] * length for sample in drawn)
        summary = samples.measure_samples(drawn)
        assert summary["ended"] == ended and summary["tokens"] == length and summary["texts"] == 5


def test_the_judge_s_figures_are_brute_force(trained_run):
    model, tokenizer, *_ = load_model(str(trained_run))
    texts = [Sample("Once", [], " upon a time", True), Sample("", [], "She went", False)]
    nats, count = 0.0, 0
    for sample in texts:
        ids = [tokenizer.eot_id, *tokenizer.encode(sample.text), *[tokenizer.eot_id] * sample.ended]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0][0]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
    result = samples.judged(texts, model, tokenizer, trained_run)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len("Once upon a timeShe went"), rel=1e-5)


def test_a_judge_that_does_not_know_the_texts_or_is_broken():
    tokenizer = char_tokenizer(["abc"])
    judge = GPT(GPTConfig(block_size=8, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)).eval()
    result = samples.judged([Sample("", [], "abxc", True)], judge, tokenizer, "j.pt")
    assert result["bits_per_byte"] is None and result["bits_per_byte_reason"] == "1 tokens are unknown to the tokenizer"
    torch.nn.init.constant_(judge.wte.weight, 1e30)
    with pytest.raises(ValueError, match=r"the model of j.pt computes numbers that are not finite"):
        samples.judged([Sample("", [], "abc", True)], judge, tokenizer, "j.pt")


def test_stories_of_the_grammar_are_known_as_such(sample_dir):
    from preparation.sample_corpus import load_grammar

    grammar = load_grammar()
    story, log2p = grammar.sample(random.Random(3))
    drawn = [
        Sample("", [], story, True),
        Sample(story[:20], [], story[20:], True),
        Sample("", [], story, False),
        Sample("", [], "No.", True),
    ]
    result = samples.from_the_grammar(drawn, grammar.log2_probability)
    assert result == {"share": 0.5, "bits_per_story": pytest.approx(-log2p)}


def test_evaluate_writes_and_measures_texts(trained_run, sample_dir, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("Once upon a time\nOnce upon a time, there was a little girl named Lily.\n")
    arguments = [
        "--checkpoint",
        trained_run,
        "--samples",
        5,
        "--prompts",
        tmp_path / "p.txt",
        "--judge",
        trained_run,
        "--sample_tokens",
        20,
    ]
    arguments += ["--output", tmp_path / "out.json", "--device", "cpu"]
    results = []
    for _ in range(2):
        assert evaluate.main([*map(str, arguments)]) == 0
        results.append((json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.samples.txt").read_text()))
    assert results[0] == results[1] and "perplexity" in capsys.readouterr().out
    (result,) = results[0][0]["samples"].values()
    assert result["texts"] == 5 and 0 <= result["ended"] <= 1 and result["judge"]["perplexity"] > 1
    assert result["in_training"]["8"]["held_out"] > 0.1 and result["grammar"]["share"] <= 1
    assert results[0][1].count("Once upon a time") >= 5
    assert "it/s" not in capsys.readouterr().err  # nobody looks at a bar here
    assert list(results[0][0]) == ["samples"]  # neither ./data nor anything else was asked for
    assert DataDirectory(sample_dir).meta["sample"]


def test_training_data_without_held_out_text(trained_run, sample_dir, tmp_path):
    data = DataDirectory(sample_dir)
    (tmp_path / "tokenizer.json").write_text(data.tokenizer.json)
    data.tokens("train").tofile(tmp_path / "train.bin")
    story = data.tokens("train")[:40].tolist()
    result = samples.shared_with_training([story], [DataDirectory(tmp_path)])
    assert result["8"] == {"samples": 1.0, "held_out": None}
