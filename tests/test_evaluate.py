"""evaluate.py and the measures behind it: each token once, exact against brute force, the entropy, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import export_model
import prepare_data
from config import GPTConfig
from evaluate import main
from evaluation import held_out, measures
from evaluation.held_out import compare_with_entropy, split_prefix
from evaluation.measures import batches_of_windows, score_tokens, strided_windows, windows_by_length
from formats.data_directory import DataDirectory
from formats.scores import read_scores
from models import GPT
from preparation.tokenizer_kinds import char_tokenizer, train_bpe
from tests.runs import documents


def evaluate(run, *args, code=0, output=None) -> dict:
    output = output or run.parent / "out.json"
    assert main([*map(str, ("--checkpoint", run, "--device", "cpu", *args, "--output", output))]) == code
    return json.loads(output.read_text())


def small_model(block_size=8, vocab_size=30) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16)).eval()
    torch.nn.init.normal_(model.wte.weight, std=0.5)
    return model


@given(n=st.integers(1, 60), block_size=st.integers(1, 12), data=st.data())
def test_windows_score_each_token_once(n, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    spans = list(strided_windows(n, block_size, stride))
    scored = [i for start, end, first in spans for i in range(first, end)]
    assert scored == list(range(n))
    assert all(start <= first and 0 < end - start <= block_size for start, end, first in spans)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), block_size=st.integers(1, 12), data=st.data())
def test_windows_keep_within_documents(lengths, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    ends = np.cumsum(lengths)
    spans = windows_by_length(ends, block_size, stride)
    batches = list(batches_of_windows(spans, data.draw(st.integers(1, 40))))
    assert np.array_equal(np.concatenate(batches), spans) and (np.diff(spans[:, 1] - spans[:, 0]) <= 0).all()
    assert sorted(i for _, end, first in spans.tolist() for i in range(first, end)) == list(range(ends[-1]))
    document = np.searchsorted(ends, np.arange(ends[-1]), side="right")
    assert all(document[start] == document[end - 1] for start, end, _ in spans.tolist())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stride", [8, 3])
def test_scores_equal_brute_force(stream, stride):
    """Token by token with a plain loop, in float64: documents from their own beginning, or all as one stream."""
    model = small_model()
    tokens = np.random.RandomState(0).randint(0, 12, 90).astype(np.uint16)  # some documents are longer than the context, some empty
    score = score_tokens(model, tokens, 0, batch_size=3, stride=stride, stream=stream)
    row, double, begin = [0, *tokens.tolist()], model.double(), 0
    positions, confidence = np.zeros((8, 2)), []
    for i, token in enumerate(tokens.tolist()):
        at = i - begin  # within the document
        start = begin + (0 if at < 8 else (at - 8) // stride * stride + stride)
        logits = double(torch.tensor([row[start : i + 1]]))[0][0, -1]
        nats = -logits.log_softmax(-1)[token].item()
        assert score.nats[i] == pytest.approx(nats, abs=1e-5)
        assert score.hits[i] == (logits.argmax().item() == token)
        assert score.top[i] == (token in logits.topk(5).indices.tolist())
        positions[i - start] += 1, nats
        confidence.append((logits.softmax(-1).max().item(), score.hits[i]))
        begin = i + 1 if token == 0 and not stream else begin
    assert score.positions == pytest.approx(positions, abs=1e-4)
    bins = [[hit - stated for stated, hit in confidence if low / 20 <= stated < (low + 1) / 20] for low in range(20)]
    assert score.calibration_error == pytest.approx(sum(abs(sum(b)) for b in bins) / 90, abs=1e-5)
    assert score.calibration[:, 0].tolist() == [len(b) for b in bins]


def test_no_score_depends_on_a_neighbour():
    model, rng = small_model(), np.random.RandomState(1)
    documents = [np.append(rng.randint(1, 30, rng.randint(0, 20)), 0) for _ in range(12)]

    def nats(order) -> list[np.ndarray]:
        row = np.concatenate([documents[i] for i in order])
        return np.split(score_tokens(model, row, 0).nats, measures.document_ends(row, 0)[:-1])

    order = rng.permutation(12)
    for i, scored in zip(order, nats(order)):
        assert scored == pytest.approx(nats([i])[0], abs=1e-5)


def test_a_tie_with_many_tokens_is_no_place_among_the_top_five():
    model = small_model()
    torch.nn.init.zeros_(model.wte.weight)
    score = score_tokens(model, np.arange(1, 20).astype(np.uint16), 0)
    assert not score.top.any() and score.nats == pytest.approx(np.full(19, math.log(30)))


def test_the_interval_is_that_of_a_ratio_over_documents():
    rng = np.random.RandomState(0)
    weights = rng.randint(50, 150, 400)
    values = 0.3 * weights + 4 * rng.randn(400)
    low, high = measures.ratio_interval(values, weights)
    residual = values - values.sum() / weights.sum() * weights
    error = math.sqrt(400) * residual.std(ddof=1) / weights.sum()  # Cochran 1977, Sampling Techniques, chapter 6
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.sum() / weights.sum(), abs=error / 5)
    assert measures.ratio_interval(values[:9], weights[:9]) is None
    assert measures.ratio_interval(np.ones(500), np.repeat([0, 1], [491, 9])) is None
    assert np.isfinite(measures.ratio_interval(np.ones(500), np.repeat([0, 1], [490, 10]))).all()  # none of the ten may be drawn


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    """The trained run as a folder of transformers."""
    folder = tmp_path_factory.mktemp("exported")
    assert export_model.main(["--checkpoint", str(trained_run), "--format", "hf", "--output", str(folder)]) == 0
    return folder / "hf"


def test_perplexity_equals_that_of_transformers(trained_run, sample_dir, exported):
    from transformers import AutoModelForCausalLM

    model, data = AutoModelForCausalLM.from_pretrained(exported), DataDirectory(sample_dir)
    tokens, nats = data.tokens("val").astype(np.int64), 0.0
    for document in np.split(tokens, measures.document_ends(tokens, data.tokenizer.eot_id)[:-1]):
        row = torch.tensor([data.tokenizer.eot_id, *document.tolist()])
        for start in range(0, len(document), 32):
            window = row[start : start + 33]
            with torch.no_grad():
                nats += torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
    for checkpoint in (trained_run, exported):
        result = evaluate(checkpoint, "--data_dir", sample_dir, "--split", "val", output=exported.parent / "out.json")
        assert result[str(sample_dir)]["val"]["perplexity"] == pytest.approx(math.exp(nats / len(tokens)), rel=1e-4)


def test_results_do_not_depend_on_the_batch_size(trained_run, sample_dir, tmp_path):
    results = {n: evaluate(trained_run, "--data_dir", sample_dir, "--batch_size", n, output=tmp_path / f"{n}.json") for n in (1, 3, 8)}
    one, three, eight = (result[str(sample_dir)] for result in results.values())
    for split in ("val", "test"):
        for many in (three, eight):
            assert one[split]["loss"] == pytest.approx(many[split]["loss"], abs=1e-6)
        assert one[split]["tokens"] == len(DataDirectory(sample_dir).tokens(split)) and one[split]["documents"] == 15
        assert one[split]["perplexity"] == pytest.approx(math.exp(one[split]["loss"]))
        bits = one[split]["loss"] * one[split]["tokens"] / math.log(2) / one[split]["bytes"]
        assert one[split]["bits_per_byte"] == pytest.approx(bits)


def test_training_and_evaluation_measure_the_same(trained_run, sample_dir):
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


def test_any_checkpoint_of_a_run_and_any_name_for_it(trained_run, sample_dir, tmp_path):
    names = ("step_00000020.pt", "best_model.pt", ".")
    step20, best, run = (evaluate(trained_run / name, "--data_dir", sample_dir, output=tmp_path / "out.json") for name in names)
    assert best == run != step20


def test_stride_gives_more_context_and_a_lower_loss(trained_run, sample_dir):
    plain = evaluate(trained_run, "--data_dir", sample_dir, "--split", "val")[str(sample_dir)]["val"]
    strided = evaluate(trained_run, "--data_dir", sample_dir, "--split", "val", "--stride", 8)[str(sample_dir)]["val"]
    assert strided["loss"] < plain["loss"] and strided["tokens"] == plain["tokens"]


def test_text_is_evaluated_like_token_files(trained_run, sample_dir, tmp_path):
    data = DataDirectory(sample_dir)
    (tmp_path / "val.txt").write_text(data.tokenizer.tokenizer.decode(data.tokens("val").tolist(), skip_special_tokens=False))
    files = evaluate(trained_run, "--data_dir", sample_dir, "--split", "val")[str(sample_dir)]["val"]
    text = evaluate(trained_run, "--text", tmp_path / "val.txt")[str(tmp_path / "val.txt")]["text"]
    for key in ("loss", "bits_per_byte", "tokens", "documents", "bytes"):
        assert text[key] == pytest.approx(files[key]), key


def test_the_entropy_is_below_every_honest_model_and_a_leak_is_called_one(trained_run, sample_dir, tmp_path, capsys):
    result = evaluate(trained_run, "--data_dir", sample_dir)[str(sample_dir)]["val"]
    assert 0.13 < result["entropy_bits_per_byte"] < 0.145 < result["bits_per_byte"] and result["above_entropy_bits_per_story"] > 0
    import shutil

    leaky = tmp_path / "leaky"
    shutil.copytree(sample_dir, leaky)
    entropy = json.loads((leaky / "entropy.json").read_text())
    (leaky / "entropy.json").write_text(json.dumps({split: [bits + 5000 for bits in values] for split, values in entropy.items()}))
    evaluate(trained_run, "--data_dir", leaky, code=1, output=tmp_path / "x")
    assert "below a perfect model" in capsys.readouterr().err


def test_the_comparison_with_the_entropy_is_paired_per_story():
    ends = measures.document_ends(np.array([5, 5, 0, 5, 0, 5, 5, 5, 0]), 0)
    bits = measures.per_document(np.array([1, 2, 3, 1, 1, 4, 0, 0, 0], float), ends)
    assert bits == pytest.approx([6, 2, 4])
    result = compare_with_entropy(bits, [5.0, 1.0, 1.0], n_bytes=10)
    assert result["above_entropy_bits_per_story"] == pytest.approx(5 / 3)
    assert result["above_entropy_standard_error"] == pytest.approx(np.std([1, 1, 3], ddof=1) / math.sqrt(3))
    assert result["entropy_bits_per_byte"] == pytest.approx(0.7)


def test_each_document_s_scores_are_kept_and_not_computed_again(trained_run, sample_dir, tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    first = evaluate(trained_run, "--data_dir", sample_dir, "--positions", output=output)[str(sample_dir)]
    scores = read_scores(tmp_path / "results.npz")
    assert list(scores) == [f"{sample_dir} val", f"{sample_dir} test"]
    data = DataDirectory(sample_dir)
    for split in ("val", "test"):
        columns = scores[f"{sample_dir} {split}"].columns
        assert columns["tokens"].sum() == first[split]["tokens"] and columns["nats"].sum() / columns["tokens"].sum() == first[split]["loss"]
        assert columns["bytes"].tolist() == [len(text.encode()) for text in documents(sample_dir, split)]
        assert columns["bytes"].sum() == data.meta["splits"][split]["bytes"]
        rows = first[split]["loss_by_position"]
        assert [row["from"] for row in rows] == [1, 2, 3, 5, 9, 17] and sum(row["tokens"] for row in rows) == first[split]["tokens"]
        low, high = first[split]["bits_per_byte_interval"]
        assert low < first[split]["bits_per_byte"] < high
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "s.txt").write_text("Once upon a time, there was a little girl.")
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "score_tokens", None)
        again = evaluate(trained_run, "--data_dir", sample_dir, "--positions", output=output)
        assert again[str(sample_dir)] == first
    evaluate(trained_run, "--text", tmp_path / "s.txt", output=output)
    assert list(read_scores(tmp_path / "results.npz")) == [*scores, f"{tmp_path / 's.txt'} text"]
    evaluate(trained_run / "step_00000020.pt", "--text", tmp_path / "s.txt", output=output)
    assert list(read_scores(tmp_path / "results.npz")) == [f"{tmp_path / 's.txt'} text"]  # another model: its scores only
    (tmp_path / "results.npz").write_bytes((tmp_path / "results.npz").read_bytes()[:300])
    assert evaluate(trained_run, "--data_dir", sample_dir, "--positions", output=output)[str(sample_dir)] == first


@pytest.mark.parametrize("name", ["out.png", "out.npz"])
def test_foreign_files_beside_the_results_stay(trained_run, sample_dir, mistake, tmp_path, name):
    (tmp_path / name).write_text("mine")
    arguments = ("--checkpoint", trained_run, "--data_dir", sample_dir, "--output", tmp_path / "out.json")
    assert f"{name} can't be written: it is there already" in mistake("evaluate.py", *arguments, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_no_bits_per_byte_with_unknown_tokens():
    tokenizer = char_tokenizer(["abc"])
    assert measures.why_no_bits_per_byte(tokenizer, np.array(tokenizer.encode("cab"))) is None
    assert "2 tokens are unknown" in measures.why_no_bits_per_byte(tokenizer, np.array(tokenizer.encode("cxyb")))


def test_empty_documents_have_no_bits_per_byte(trained_run, sample_dir, tmp_path, capsys):
    data = DataDirectory(sample_dir)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "tokenizer.json").write_text(data.tokenizer.json)
    np.full(20, data.tokenizer.eot_id, "<u2").tofile(tmp_path / "d" / "val.bin")
    result = evaluate(trained_run, "--data_dir", tmp_path / "d", output=tmp_path / "out.json")[str(tmp_path / "d")]["val"]
    assert result["bits_per_byte"] is None and result["documents"] == 20
    assert "val: no bits per byte, the documents are empty" in capsys.readouterr().err


def test_another_way_to_score_takes_no_usual_score_s_place(trained_run, sample_dir, tmp_path):
    for more in ([], ["--stride", 8], ["--stream"]):
        evaluate(trained_run, "--data_dir", sample_dir, "--split", "val", *more, output=tmp_path / "out.json")
    scores = read_scores(tmp_path / "out.npz")
    assert [*scores] == [f"{sample_dir} val{way}" for way in ("", " stride 8", " stream")]
    assert len({part.summary["loss"] for part in scores.values()}) == 3


def test_flags_that_change_nothing_are_told(trained_run, tmp_path, capsys):
    evaluate(trained_run, "--samples", 1, "--sample_tokens", 3, "--positions", "--task_data", "d", output=tmp_path / "out.json")
    told = capsys.readouterr().err
    assert "--positions changed nothing, for there is no --data_dir or --text" in told
    assert "--task_data changed nothing, for there is no --tasks" in told


def test_mistakes_are_found_before_the_work_begins(trained_run, sample_dir, mistake, tmp_path, monkeypatch):
    for work in ("Scorer.score", "samples.draw_samples", "run_tasks"):
        monkeypatch.setattr(f"evaluate.{work}", None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_bytes(b"\n\n")
    shutil.copytree(sample_dir, tmp_path / "cut")
    (tmp_path / "cut" / "val.bin").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    every = ("--checkpoint", trained_run, "--data_dir", sample_dir, "--tasks", "sample_color", "--output", tmp_path / "out.json")
    for arguments, part in (
        (("--prompts", "missing.txt"), "missing.txt"),
        (("--prompts", "latin.txt"), "latin.txt has bytes that are not UTF-8"),
        (("--prompts", "empty.txt"), "empty.txt holds no prompts"),
        (("--judge", "nowhere"), "no checkpoint at nowhere"),
        (("--train_data", "cut"), "val.bin has 0 bytes"),
        (("--text", "empty.txt"), "empty.txt holds no text"),
        (("--tasks", "missing.yaml"), "missing.yaml"),
    ):
        kept = every[:-4] + every[-2:] if arguments[0] == "--tasks" else every
        assert part in mistake("evaluate.py", *kept, "--samples", 2, *arguments, cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_tokenizer_is_refused(trained_run, mistake, tmp_path):
    (tmp_path / "s.txt").write_text("".join(f"line {i}\n" for i in range(500)))
    (tmp_path / "tok.json").write_text(train_bpe(["other text"], 270).json)
    options = {"input": (str(tmp_path / "s.txt"),), "tokenizer": str(tmp_path / "tok.json"), "output": str(tmp_path / "d")}
    prepare_data.prepare(prepare_data.Arguments(**options, report=False))
    assert "another tokenizer" in mistake("evaluate.py", "--checkpoint", trained_run, "--data_dir", tmp_path / "d", cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--data_dir", "nowhere"], "no data directory at nowhere"),
        (["--split", "vall"], "'vall'"),
        (["--stride", "99"], "stride=99 is above the model's block_size=32"),
        (["--text", "nothing.txt"], "no text files at nothing.txt"),
        (["--output", "out.png"], "give it another ending, e.g. .json"),
        (["--data_dir", "samples"], "the results have a part called samples already; write ./samples"),
        (["--temperature", "0.5", "--judge", "x"], "only --samples needs --temperature, --judge"),
    ],
)
def test_mistakes_are_one_sentence(trained_run, sample_dir, mistake, tmp_path, arguments, part):
    where = [] if "--checkpoint" in arguments else ["--checkpoint", trained_run]
    data = [] if {"--data_dir", "--text"} & set(arguments) else ["--data_dir", sample_dir]
    assert part in mistake("evaluate.py", *where, *data, *arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
