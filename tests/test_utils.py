"""The command line, atomic files, precision."""

import gc
from dataclasses import dataclass, field
from typing import Literal

import utils

import pytest
import torch

from config import GPTConfig
from formats import outputs
from training import machine


@dataclass(frozen=True)
class Flags:
    """A command line with every kind of flag."""

    files: tuple[str, ...] = ()
    number: int = 3
    compile: bool | Literal["auto"] = "auto"
    quiet: bool = False
    model: GPTConfig = field(default_factory=GPTConfig)


def read(*words: str) -> Flags:
    return utils.read_command_line(Flags, list(words), "doc", {"alias_of_number": "number"})


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--compile"], {"compile": True}),
        (["--no_compile"], {"compile": False}),
        (["--no-compile"], {"compile": False}),
        (["--compile=False"], {"compile": False}),
        (["--compile", "false"], {"compile": False}),
        (["--compile=auto"], {"compile": "auto"}),
        (["--quiet", "--number", "4"], {"quiet": True, "number": 4}),
        (["--quiet=true"], {"quiet": True}),
        (["--alias-of-number=7"], {"number": 7}),
        (["--files", "a", "b", "--quiet"], {"files": ("a", "b"), "quiet": True}),
        (["--files=a=b"], {"files": ("a=b",)}),
    ],
)
def test_spellings_of_flags(words, values):
    flags = read(*words)
    assert {name: getattr(flags, name) for name in values} == values


def test_nested_fields_are_flags():
    model = read("--n_layer", "2", "--flash=False", "--bias", "--n-head=4").model
    assert (model.n_layer, model.flash, model.bias, model.n_head) == (2, False, True, 4)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--files", "a", "--files", "b"], "--files is given twice"),
        (["--number", "x"], "--number"),
        (["--nubmer", "3"], "nubmer"),
        (["--n_embd", "100", "--n_head", "6"], "n_embd=100 is not divisible by n_head=6; try n_embd=102"),
    ],
)
def test_mistakes_become_one_sentence(words, part):
    with pytest.raises(ValueError) as caught:
        read(*words)
    assert part in str(caught.value) and "\n" not in str(caught.value) and "│" not in str(caught.value)


def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    outputs.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        outputs.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_precision_is_decided_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert machine.choose_precision("cpu", "auto")[0] == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert machine.choose_precision("cpu", "auto")[0] == torch.float32
    assert machine.choose_precision("cpu", "bfloat16") == (torch.bfloat16, "as asked")
    with pytest.raises(ValueError, match="float16"):
        machine.choose_precision("cpu", "float16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert machine.choose_precision("cuda", "auto")[0] == torch.float16


def test_compile_is_decided_with_a_reason(monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert machine.choose_compile("cuda", "auto")[0] is True and machine.choose_compile("mps", "auto")[0] is False
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert machine.choose_compile("cuda", "auto")[0] is False
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/" + name)
    assert machine.choose_compile("cpu", "auto")[0] is None  # to be measured
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.choose_compile("cpu", True) == (False, "no C++ compiler found")


def test_garbage_is_collected_again_once_a_script_has_started():
    gc.disable()  # as it is while a script imports
    try:
        with pytest.raises(SystemExit):
            utils.run_script(lambda: None if gc.isenabled() and gc.get_freeze_count() else 1)
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_device_that_is_not_there_is_refused():
    for name in ("cuda:99", "tpu", "cpu:3"):
        with pytest.raises(ValueError, match=name):
            utils.choose_device(name)
