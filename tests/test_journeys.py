"""The ways that people take through the stages, each as its commands in their order; small models and texts where time asks for them."""

import json
import os
import re
import shutil

import numpy as np
import pytest

import compare
import evaluate
import train
from formats.data_directory import DataDirectory
from formats.run_directory import load_model
from preparation.tokenizer_kinds import train_bpe
from tests.conftest import tiny
from tests.test_config import copy_project
from training import estimates

SMALL = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "16", "--device", "cpu", "--dtype", "float32"]


def write_texts(directory, word: str, files: int = 3):
    """A folder of texts about one thing, 60 documents each."""
    directory.mkdir()
    for i in range(files):
        documents = [f"Story {i}.{j} tells of a {word} that met {j % 7} others. They went home.\n" for j in range(60)]
        (directory / f"{i}.txt").write_text("<|endoftext|>\n".join(documents))


def test_the_main_job_of_the_readme(tmp_path, program):
    program("prepare_data.py", "--sample", "--sample_stories", 200, "--vocab_size", 400, cwd=tmp_path)
    process = program("train.py", "--preset", "nano", *SMALL, "--max_steps", 3, "--eval_tokens", 1000, cwd=tmp_path)
    assert "a perfect model" in process.stdout
    process = program("generate.py", "--prompt", "Once upon a time", "--max_new_tokens", 20, cwd=tmp_path)
    assert process.stdout.startswith("Once upon a time") and "checkpoints/best_model.pt" in process.stderr


def test_two_versions_of_a_dataset_by_editing_config(tmp_path, program):
    """data_dir is changed in config.py, train.py run, changed again, run again; compare.py tells which data made the better model."""
    copy_project(tmp_path)
    config = tmp_path / "config.py"
    original = config.read_text()
    small = "model_config = ModelConfig(block_size=16, n_layer=1, n_head=2, n_embd=16)"
    assert original.count("model_config = ModelConfig.small()") == original.count("train_config = TrainConfig()") == 1
    write_texts(tmp_path / "dataset_v1", "frog")
    write_texts(tmp_path / "dataset_v2", "lantern")
    for version in ("v1", "v2"):
        inputs = sorted((tmp_path / f"dataset_{version}").glob("*.txt"))
        tokenizer = ["--tokenizer", "bpe", "--vocab_size", 300] if version == "v1" else ["--tokenizer", "./data_v1"]
        output = ["--output", f"./data_{version}", "--no_report"]
        program(tmp_path / "prepare_data.py", "--input", *inputs, *output, *tokenizer, cwd=tmp_path)
        edited = original.replace("model_config = ModelConfig.small()", small)
        edited = edited.replace("train_config = TrainConfig()", f'train_config = TrainConfig(data_dir="./data_{version}", max_steps=20)')
        config.write_text(edited)
        program(tmp_path / "train.py", cwd=tmp_path)
        saved = json.loads((tmp_path / "checkpoints" / f"data_{version}" / "config.json").read_text())
        assert saved["train"]["data_dir"] == [f"./data_{version}"]
    runs = [f"checkpoints/data_{version}" for version in ("v1", "v2")]
    process = program(tmp_path / "compare.py", *runs, "--data_dir", "./data_v1", "./data_v2", cwd=tmp_path)
    tables = process.stdout.split("./data_v2 test: ")
    assert all(run in table for run in runs for table in tables) and process.stdout.count("one seed doesn't cover") == 2


def test_a_text_in_one_go_and_a_bare_name_for_its_model(tmp_path, script):
    write_texts(tmp_path / "path", "frog", files=1)
    (tmp_path / "path" / "0.txt").rename(tmp_path / "path" / "dataset.txt")
    tokenizer = ["--tokenizer", "bpe", "--vocab_size", 300]
    script("train.py", "--dataset", "path/dataset.txt", "--epochs", 10, "--batch_size", 32, *SMALL, *tokenizer, cwd=tmp_path)
    model = ["--model_path", "best_model.pt"]
    for which in (model, []):
        process = script("generate.py", *which, "--prompt", "Once upon a time", "--max_length", 100, cwd=tmp_path)
        assert process.stdout.startswith("Once upon a time") and "checkpoints/dataset/best_model.pt" in process.stderr


def test_no_name_means_the_newest_finished_run(tmp_path, trained_run, sample_dir, monkeypatch):
    """Two finished runs and a newer one that was stopped: the newest finished one is taken."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate((".", "stories", "begun")):
        shutil.copytree(trained_run, tmp_path / "checkpoints" / name, dirs_exist_ok=True)
        times = (1_000_000_000 + i, 1_000_000_000 + i)
        os.utime(tmp_path / "checkpoints" / name / "best_model.pt", times)
    (tmp_path / "checkpoints" / "begun" / "step_00000030.pt").unlink()  # its newest checkpoint stands at step 20 of 30
    assert str(load_model("./checkpoints")[2]) == str(load_model("best_model.pt")[2]) == "checkpoints/stories/best_model.pt"
    assert str(load_model("begun")[2]) == "checkpoints/begun/best_model.pt"
    with pytest.raises(ValueError, match=r"checkpoints and checkpoints/stories mean the same model, checkpoints/stories/best_model\.pt"):
        compare.main(["checkpoints", "checkpoints/stories", "--data_dir", str(sample_dir)])
    for name in (".", "stories"):
        (tmp_path / "checkpoints" / name / "best_model.pt").unlink()
    assert str(load_model("./checkpoints")[2]) == "checkpoints/begun/best_model.pt"  # better than nothing


def nanogpt_directory(directory, tokenizer, texts: list[str]) -> None:
    """Token files as nanoGPT's prepare.py writes them: train and val, no EOT, nothing that describes them."""
    directory.mkdir()
    for split, part in (("train", texts[: len(texts) * 9 // 10]), ("val", texts[len(texts) * 9 // 10 :])):
        np.array(tokenizer.encode("".join(part)), "<u2").tofile(directory / f"{split}.bin")


def train_evaluate_compare(capsys, directory) -> str:
    """The three stages on a directory, in this process; returns what they said."""
    small = [*SMALL, "--max_steps", "2", "--batch_size", "2", "--eval_tokens", "500", "--data_dir", str(directory)]
    for seed in ("1", "2"):
        assert train.main([*small, "--seed", seed, "--out_dir", f"checkpoints/{seed}"]) == 0
    assert evaluate.main(["--checkpoint", "checkpoints/1", "--data_dir", str(directory), "--device", "cpu"]) == 0
    assert compare.main(["a=checkpoints/1", "b=checkpoints/2", "--data_dir", str(directory), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "test" not in captured.out and captured.out.count("bits/byte") >= 3
    return captured.err


def test_a_directory_of_nanogpt_with_gpt2_tokens(tmp_path, real_data, capsys, monkeypatch):
    from formats.tokenizer import gpt2_tokenizer

    monkeypatch.chdir(tmp_path)
    text = (real_data / "tinyshakespeare.txt").read_text()[:40_000]
    nanogpt_directory(tmp_path / "shakespeare", gpt2_tokenizer(), text.splitlines(keepends=True))
    said = train_evaluate_compare(capsys, "shakespeare")
    assert "GPT-2" in said and "has no test split" in said


def test_a_directory_of_nanogpt_with_large_ids(tmp_path, sample_dir, capsys, monkeypatch):
    """The same without GPT-2's files: another tokenizer of more than 1,000 tokens stands in for them."""
    text = "".join(DataDirectory(sample_dir).tokenizer.decode(DataDirectory(sample_dir).tokens("train").tolist()))
    tokenizer = train_bpe([text], 1200)
    monkeypatch.setattr("formats.data_directory.gpt2_tokenizer", lambda: tokenizer)
    monkeypatch.chdir(tmp_path)
    nanogpt_directory(tmp_path / "stories", tokenizer, text[:60_000].splitlines(keepends=True))
    said = train_evaluate_compare(capsys, "stories")
    assert "GPT-2" in said and "has no test split" in said


def test_too_little_memory_for_the_batch(tmp_path, sample_dir, capsys, monkeypatch, mistake):
    """The micro-batch shrinks by itself; the training is that of the whole batch, and can be resumed with more memory."""
    small = ["--n_layer", "1", "--n_head", "2", "--n_embd", "64", "--block_size", "128", "--device", "cpu", "--dtype", "float32"]
    arguments = [*small, "--data_dir", str(sample_dir), "--max_steps", "3", "--log_interval", "1"]
    assert train.main([*arguments, "--out_dir", str(tmp_path / "enough")]) == 0
    whole = capsys.readouterr()
    assert "windows at a time" not in whole.err
    monkeypatch.setattr(estimates, "available_memory", lambda device: estimates.LIBRARIES + 9e6)
    assert train.main([*arguments, "--out_dir", str(tmp_path / "little")]) == 0
    said = capsys.readouterr().err
    windows, passes = map(int, re.search(r"(\d+) windows at a time, (\d+) passes a step; the effective batch stays 128", said).groups())
    assert 1 <= windows < 32 and windows * passes == 128
    runs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("enough", "little")]
    for a, b in zip(*runs, strict=True):
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-4)
    monkeypatch.setattr(estimates, "available_memory", lambda device: 1e6)
    assert "one window at a time" in mistake("train.py", *arguments, "--out_dir", "none", cwd=tmp_path) and not (tmp_path / "none").exists()


def test_exporting_a_finished_run(tmp_path, trained_run, sample_dir, script):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    same = tiny(data_dir=sample_dir, out_dir=run, max_steps=30, eval_interval=15, checkpoint_interval=10)
    process = script("train.py", *same, "--export", "onnx")
    assert "finished at step 30" in process.stdout and (run / "best_model.onnx").is_file()
