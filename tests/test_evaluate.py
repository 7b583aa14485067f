"""evaluate.py and the measures behind it: each token once, exact against brute force, the entropy, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config import GPTConfig
from evaluate import compare_with_entropy
from evaluation import measures
from evaluation.measures import Score, score_tokens, strided_windows
from formats.data_directory import DataDirectory
from models import GPT
from preparation.tokenizer_kinds import char_tokenizer, train_bpe
from training.validation import split_prefix


def evaluate(script, run, *args, code=0) -> dict:
    output = run.parent / "out.json"
    script("evaluate.py", "--checkpoint", run, "--device", "cpu", *args, "--output", output, code=code)
    return json.loads(output.read_text())


@given(n=st.integers(1, 60), block_size=st.integers(1, 12), data=st.data())
def test_windows_score_each_token_once(n, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    spans = list(strided_windows(n, block_size, stride))
    scored = [i for start, end, first in spans for i in range(first, end)]
    assert scored == list(range(n))
    assert all(start <= first and 0 < end - start <= block_size for start, end, first in spans)


def test_scores_equal_brute_force():
    """Window by window with a plain loop, in float64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=2, n_head=2, n_embd=16)).eval()
    torch.nn.init.normal_(model.wte.weight, std=0.5)
    tokens = np.random.RandomState(0).randint(0, 30, 45).astype(np.uint16)
    score = score_tokens(model, tokens, 0, batch_size=3)
    stream, double = [0, *tokens.tolist()], model.double()
    for i in range(45):
        start = i - i % 8
        logits = double(torch.tensor([stream[start : i + 1]]))[0][0, -1]
        assert score.nats[i] == pytest.approx(-logits.log_softmax(-1)[tokens[i]].item(), abs=1e-5)
        assert score.hits[i] == (logits.argmax().item() == tokens[i])


def test_results_do_not_depend_on_the_batch_size(trained_run, sample_dir, script):
    one = evaluate(script, trained_run, "--data_dir", sample_dir, "--batch_size", 1)[str(sample_dir)]
    many = evaluate(script, trained_run, "--data_dir", sample_dir, "--batch_size", 7)[str(sample_dir)]
    for split in ("val", "test"):
        assert one[split]["loss"] == pytest.approx(many[split]["loss"], abs=1e-6)
        assert one[split]["tokens"] == len(DataDirectory(sample_dir).tokens(split)) and one[split]["documents"] == 15
        assert one[split]["perplexity"] == pytest.approx(math.exp(one[split]["loss"]))
        bits = one[split]["loss"] * one[split]["tokens"] / math.log(2) / one[split]["bytes"]
        assert one[split]["bits_per_byte"] == pytest.approx(bits)


def test_training_and_evaluation_measure_the_same(trained_run, sample_dir, script):
    """The whole validation split fits into --eval_tokens of neither; the prefix that training logs is scored again here."""
    logged = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()][-1]
    data = DataDirectory(sample_dir)
    prefix = split_prefix(data, "val", 2000)
    assert 1500 < len(prefix.tokens) <= 2000 and prefix.tokens[-1] == data.tokenizer.eot_id
    from formats.run_directory import load_model

    model, tokenizer, _, content = load_model(str(trained_run))
    assert content["step"] == logged["step"]
    summary = measures.summarize(score_tokens(model, prefix.tokens, tokenizer.eot_id), prefix.n_bytes)
    assert summary["bits_per_byte"] == pytest.approx(logged["val_bits_per_byte"], rel=1e-5)
    assert prefix.entropy_bits / prefix.n_bytes < summary["bits_per_byte"]


def test_any_checkpoint_of_a_run_and_any_name_for_it(trained_run, sample_dir, script):
    step20 = evaluate(script, trained_run / "step_00000020.pt", "--data_dir", sample_dir)[str(sample_dir)]
    best = evaluate(script, trained_run / "best_model.pt", "--data_dir", sample_dir)[str(sample_dir)]
    assert best == evaluate(script, trained_run, "--data_dir", sample_dir)[str(sample_dir)] != step20


def test_stride_gives_more_context_and_a_lower_loss(trained_run, sample_dir, script):
    plain = evaluate(script, trained_run, "--data_dir", sample_dir, "--split", "val")[str(sample_dir)]["val"]
    strided = evaluate(script, trained_run, "--data_dir", sample_dir, "--split", "val", "--stride", 8)[str(sample_dir)]["val"]
    assert strided["loss"] < plain["loss"] and strided["tokens"] == plain["tokens"]


def test_text_is_evaluated_like_token_files(trained_run, sample_dir, script, tmp_path):
    data = DataDirectory(sample_dir)
    (tmp_path / "val.txt").write_text(data.tokenizer.tokenizer.decode(data.tokens("val").tolist(), skip_special_tokens=False))
    files = evaluate(script, trained_run, "--data_dir", sample_dir, "--split", "val")[str(sample_dir)]["val"]
    text = evaluate(script, trained_run, "--text", tmp_path / "val.txt")[str(tmp_path / "val.txt")]["text"]
    for key in ("loss", "bits_per_byte", "tokens", "documents", "bytes"):
        assert text[key] == pytest.approx(files[key]), key


def test_the_entropy_is_below_every_honest_model_and_a_leak_is_called_one(trained_run, sample_dir, script, tmp_path):
    result = evaluate(script, trained_run, "--data_dir", sample_dir)[str(sample_dir)]["val"]
    assert 0.13 < result["entropy_bits_per_byte"] < 0.145 < result["bits_per_byte"] and result["above_entropy_bits_per_story"] > 0
    import shutil

    leaky = tmp_path / "leaky"
    shutil.copytree(sample_dir, leaky)
    entropy = json.loads((leaky / "entropy.json").read_text())
    (leaky / "entropy.json").write_text(json.dumps({split: [bits + 5000 for bits in values] for split, values in entropy.items()}))
    assert (
        "below a perfect model"
        in script("evaluate.py", "--checkpoint", trained_run, "--data_dir", leaky, "--output", tmp_path / "x", code=1).stderr
    )


def test_the_comparison_with_the_entropy_is_paired_per_story():
    tokens = np.array([5, 5, 0, 5, 0, 5, 5, 5, 0])
    nats = np.log(2) * np.array([1, 2, 3, 1, 1, 4, 0, 0, 0], float)
    score = Score(nats, np.zeros(9, bool))
    assert score.per_document(tokens, 0) / np.log(2) == pytest.approx([6, 2, 4])
    result = compare_with_entropy(score, tokens, 0, [5.0, 1.0, 1.0], n_bytes=10)
    assert result["above_entropy_bits_per_story"] == pytest.approx(5 / 3)
    assert result["above_entropy_standard_error"] == pytest.approx(np.std([1, 1, 3], ddof=1) / math.sqrt(3))
    assert result["entropy_bits_per_byte"] == pytest.approx(0.7)


def test_no_bits_per_byte_with_unknown_tokens():
    tokenizer = char_tokenizer(["abc"])
    assert measures.why_no_bits_per_byte(tokenizer, np.array(tokenizer.encode("cab"))) is None
    assert "2 tokens are unknown" in measures.why_no_bits_per_byte(tokenizer, np.array(tokenizer.encode("cxyb")))


def test_another_tokenizer_is_refused(trained_run, sample_dir, script, tmp_path):
    (tmp_path / "s.txt").write_text("".join(f"line {i}\n" for i in range(500)))
    (tmp_path / "tok.json").write_text(train_bpe(["other text"], 270).json)
    script("prepare_data.py", "--input", tmp_path / "s.txt", "--tokenizer", tmp_path / "tok.json", "--output", tmp_path / "d")
    process = script("evaluate.py", "--checkpoint", trained_run, "--data_dir", tmp_path / "d", code=2)
    assert "another tokenizer" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--data_dir", "nowhere"], "no data directory at nowhere"),
        (["--split", "vall"], "'vall'"),
        (["--stride", "99"], "stride=99 is above the model's block_size=32"),
        (["--text", "nothing.txt"], "no text files at nothing.txt"),
    ],
)
def test_mistakes_are_one_sentence(trained_run, sample_dir, mistake, tmp_path, arguments, part):
    where = [] if "--checkpoint" in arguments else ["--checkpoint", trained_run]
    data = [] if {"--data_dir", "--text"} & set(arguments) else ["--data_dir", sample_dir]
    assert part in mistake("evaluate.py", *where, *data, *arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
