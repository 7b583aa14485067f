"""compare.py: the same documents for every run, paired differences with an honest error."""

import json
import math

import numpy as np
import pytest

from compare import document_bits, paired_difference, read_documents
from evaluation.held_out import Scorer, from_directory
from formats.data_directory import DataDirectory
from tests.conftest import tiny


@pytest.fixture(scope="module")
def worse_run(tmp_path_factory, sample_dir):
    """Trained on the same data for a moment only, with a tokenizer of its own."""
    import prepare_data
    import train

    data, run = tmp_path_factory.mktemp("byte_data"), tmp_path_factory.mktemp("worse")
    prepare_data.prepare(prepare_data.Arguments(sample=True, sample_stories=100, tokenizer="byte", output=str(data)))
    assert train.main(tiny(data_dir=data, out_dir=run, max_steps=3)) == 0
    return run


def test_the_better_run_comes_first(trained_run, worse_run, sample_dir, script, tmp_path):
    process = script("compare.py", worse_run, trained_run, "--data_dir", sample_dir, "--output", tmp_path / "out.json")
    first, second = process.stdout.splitlines()[1:]
    assert str(trained_run) in first and str(worse_run) in second and "standard errors" in second
    result = json.loads((tmp_path / "out.json").read_text())[str(sample_dir)]
    assert result[str(trained_run)]["above_best"] == 0 and result[str(worse_run)]["above_best"] > 0.5


def test_the_figures_are_those_of_evaluate(trained_run, sample_dir):
    from formats.run_directory import load_model

    texts = read_documents(DataDirectory(sample_dir), "test", None)
    bits = document_bits(str(trained_run), texts, "cpu", 8)
    model, tokenizer, _, _ = load_model(str(trained_run))
    expected = Scorer(model, tokenizer, "it").score(from_directory(DataDirectory(sample_dir), "test")).summary["bits_per_byte"]
    assert bits.sum() / sum(len(text.encode()) for text in texts) == pytest.approx(expected)


def test_standard_error_against_a_simulation():
    """The spread of the estimate over many drawn sets of documents is what the formula says for one set."""
    rng = np.random.default_rng(0)

    def draw():
        n_bytes = rng.integers(50, 500, 200).astype(float)
        a = n_bytes * 0.5 + rng.normal(0, 20, 200)
        return paired_difference(a + 0.01 * n_bytes + rng.normal(0, 5, 200), a, n_bytes)

    estimates, errors = zip(*(draw() for _ in range(400)))
    assert np.mean(estimates) == pytest.approx(0.01, abs=1e-3)
    assert np.std(estimates) == pytest.approx(np.mean(errors), rel=0.12)
    assert math.isnan(paired_difference(np.ones(1), np.zeros(1), np.ones(1))[1])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["a"], "two or more runs"),
        (["a", "a"], "named twice"),
        (["a", "b", "--split", "x"], "choice 'x'"),
        (["a", "b"], "no data directory"),
    ],
)
def test_mistakes_are_one_sentence(mistake, tmp_path, arguments, part):
    assert part in mistake("compare.py", *arguments, cwd=tmp_path)
