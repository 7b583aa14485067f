"""generate.py --backend: an ONNX file takes the place of a checkpoint only if it was certainly made from it."""

import shutil
import sys
from pathlib import Path

import utils

import pytest
import torch

import export_model
from formats.export_record import find_export, model_sha256, read_record
from generation.loading import EXPORT, choose_threads, load_engine
from generation.onnx_engine import OnnxEngine
from generation.torch_engine import TorchEngine

FILE, CACHE = "best_model_cache.onnx", "small_language_models"
FLAGS = ("--device", "cpu", "--temperature", 0, "--max_new_tokens", 40)


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def original(request, tmp_path_factory) -> Path:
    """A directory with a checkpoint of each family, and the ONNX file and the HF folder made from it."""
    directory = tmp_path_factory.mktemp("beside")
    shutil.copy(request.getfixturevalue("trained_run" if request.param == "qwen3" else "gpt2_run") / "best_model.pt", directory)
    assert export_model.export(directory / "best_model.pt", [EXPORT, "hf"], None, overwrite=False)
    return directory


@pytest.fixture
def beside(original, tmp_path, monkeypatch) -> Path:
    """A copy of it to spoil; and an empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(original, tmp_path / "model")


def test_all_backends_write_the_same_text(beside, script, tmp_path):
    (tmp_path / "prompts.txt").write_text("Once\n\nOne day there was\n")
    for prompts in (("--prompt", "Once"), ("--prompt_file", tmp_path / "prompts.txt"), ("--prompt", "Once", "--draft", beside)):
        ends = {b: script("generate.py", "--checkpoint", beside, *prompts, *FLAGS, "--backend", b) for b in ("torch", "auto", "onnx")}
        assert len({end.stdout for end in ends.values()}) == 1
        count = 2 if "--draft" in prompts else 1
        told = f"{beside / FILE}, in onnxruntime"
        assert [end.stderr.count(told) for end in ends.values()] == [0, count, count]
        assert "best_model.pt, step" in ends["torch"].stderr and "best_model.pt, step" not in ends["auto"].stderr
    assert not (tmp_path / "cache" / CACHE).exists()
    assert isinstance(load_engine(str(beside / FILE))[0], OnnxEngine)


def retrain(beside: Path) -> None:
    content = torch.load(beside / "best_model.pt", weights_only=True)
    content["model"]["ln_f.weight"] *= 1.01
    torch.save(content, beside / "best_model.pt")


def cut(beside: Path) -> None:
    (beside / FILE).write_bytes((beside / FILE).read_bytes()[:-1])


def flip(beside: Path) -> None:
    content = bytearray((beside / FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (beside / FILE).write_bytes(content)


@pytest.mark.parametrize("spoil", [retrain, cut, flip])
def test_auto_takes_no_other_file(beside, script, spoil):
    arguments = ("generate.py", "--checkpoint", beside, "--prompt", "Once", *FLAGS)
    spoil(beside)
    process = script(*arguments)
    assert process.stdout == script(*arguments, "--backend", "torch").stdout
    assert f"{beside / FILE} is not used" in process.stderr and "best_model.pt, step" in process.stderr


def test_auto_takes_no_rounded_or_pruned_file_and_none_of_another_name(beside, trained_run, script):
    (beside / FILE).unlink()
    assert export_model.export(beside / "best_model.pt", ["onnx_int8"], None, overwrite=True)
    arguments = ("generate.py", "--checkpoint", beside, "--prompt", "Once", *FLAGS)
    script("export_model.py", "--checkpoint", beside, "--format", EXPORT, "--prune_layers", 1, "--output", beside / "pruned")
    shutil.copy(beside / "best_model.pt", beside / "pruned")
    assert "onnxruntime" not in script(*arguments).stderr
    assert "checkpoint_sha256" not in read_record(beside / "pruned")[FILE]
    assert find_export(beside / "pruned", EXPORT, beside / "pruned" / "best_model.pt") is None
    assert find_export(beside, EXPORT, trained_run / "step_00000030.pt") is None


def test_onnx_makes_a_missing_file_once(beside, script, tmp_path):
    (beside / FILE).unlink()
    arguments = ("generate.py", "--checkpoint", beside, "--prompt", "Once", *FLAGS)
    expected = script(*arguments).stdout
    first = script(*arguments, "--backend", "onnx")
    (made,) = (tmp_path / "cache" / CACHE).glob(f"*/{FILE}")
    assert made.parent.name == model_sha256(beside / "best_model.pt") and "is exported for onnxruntime, once" in first.stderr
    written = made.stat().st_mtime_ns
    shutil.move(beside / "best_model.pt", beside / "renamed.pt")
    arguments = (arguments[0], "--checkpoint", beside / "renamed.pt", *arguments[3:], "--backend", "onnx")
    second = script(*arguments)
    assert "exported" not in second.stderr and str(made) in second.stderr and made.stat().st_mtime_ns == written
    for damage in (b"", b"damaged"):
        made.write_bytes(damage)
        (made.parent / "export.json").write_bytes(damage or b"[]")
        third = script(*arguments)
        assert "is exported" in third.stderr
        assert first.stdout == second.stdout == third.stdout == expected
    assert not (beside / FILE).exists()


def test_a_folder_of_transformers(beside, script):
    folder = beside / "hf"
    before = model_sha256(folder)
    (folder / "notes.txt").write_text("no part of the model")
    assert model_sha256(folder) == before
    arguments = ("generate.py", "--checkpoint", folder, "--prompt", "Once", *FLAGS)
    expected = script(*arguments)
    assert script(*arguments, "--backend", "onnx").stdout == expected.stdout and "onnxruntime" not in expected.stderr
    script("export_model.py", "--checkpoint", folder, "--format", EXPORT)
    assert "hf_cache.onnx, in onnxruntime" in script(*arguments).stderr
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    assert "hf_cache.onnx is not used" in script(*arguments).stderr


def test_without_onnxruntime(beside, script, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = ("generate.py", "--checkpoint", beside, "--prompt", "Once", *FLAGS)
    process = script(*arguments)
    assert "torch is used instead" in process.stderr and process.stdout.startswith("Once")
    assert "pip install onnx onnxruntime" in mistake(*arguments, "--backend", "onnx", cwd=beside)


def test_mistakes_are_one_sentence(beside, mistake, monkeypatch):
    arguments = ("generate.py", "--prompt", "Once", *FLAGS)
    assert "leave --backend out" in mistake(*arguments, "--checkpoint", beside / FILE, "--backend", "torch", cwd=beside)
    assert "backend" in mistake(*arguments, "--backend", "tensorflow", cwd=beside)
    with pytest.raises(ValueError, match="backend onnx computes on the CPU, not on cuda"):
        load_engine(str(beside), "cuda", "onnx")
    assert isinstance(load_engine(str(beside), "meta")[0], TorchEngine)  # auto on another device than the CPU
    (beside / FILE).unlink()
    monkeypatch.setattr(export_model, "verify", lambda *_: (_ for _ in ()).throw(export_model.Mismatch("it differs")))
    assert "can't be exported; take --backend torch" in mistake(*arguments, "--checkpoint", beside, "--backend", "onnx", cwd=beside)
    hashes = iter("ab")
    monkeypatch.setattr(export_model, "model_sha256", lambda _: next(hashes))
    assert "was replaced while it was read" in mistake("export_model.py", "--checkpoint", beside, "--format", EXPORT, cwd=beside)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_model_that_vanished_does_not_end_the_conversation(beside, script, backend):
    """Another one takes its place, by the same backend."""
    other = shutil.copytree(beside, beside.with_name("other"))
    lines = f"Once\n/model {beside}/gone.pt\nOnce\n/model {other}\nOnce\n"
    process = script("generate.py", "--checkpoint", beside, "--interactive", *FLAGS, "--backend", backend, stdin=lines)
    assert process.stderr.count("error: ") == 1 and f"no checkpoint at {beside}/gone.pt" in process.stderr
    texts = process.stdout.split("Once")[1:]
    assert texts[: len(texts) // 3] * 3 == texts
    assert str(other / FILE if backend == "onnx" else other / "best_model.pt") in process.stderr


def test_threads_suit_the_size(beside, monkeypatch):
    monkeypatch.setattr(utils, "_all_threads", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [utils.threads_for(size) for size in (10**6, 10**8)] == [1, 6]
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    choose_threads(load_engine(str(beside), backend="torch")[0])
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    choose_threads(load_engine(str(beside), backend="torch")[0])
    assert chosen == [1, 6] and utils.threads_for(10**6) == 6
