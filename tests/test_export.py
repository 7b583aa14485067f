"""export_model.py: what is exported computes what the model computes, or it is not kept; and nothing else is deleted for it."""

import json
import os
import shutil

import utils

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export_model
from config import GPTConfig
from export.graphs import write_onnx, write_torchscript
from export.verify import Loaded, Source, example_ids, largest_difference
from formats.export_record import RECORD, add_record, read_record
from formats.run_directory import load_model
from generation.sampling import Sampling
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer
from models import GPT
from tests.conftest import tiny


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory, sample_dir):
    import train

    run = tmp_path_factory.mktemp("gpt2")
    assert train.main(tiny(arch="gpt2", data_dir=sample_dir, out_dir=run, max_steps=3)) == 0
    return run


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_exports_equal_the_model_at_any_shape(family, trained_run, gpt2_run, script, tmp_path):
    run = trained_run if family == "qwen3" else gpt2_run
    script("export_model.py", "--checkpoint", run, "--format", "onnx", "torchscript", "--output", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_model.onnx", "best_model.ts.pt", RECORD]
    model, *_ = load_model(str(run))
    assert model.config.arch == family
    onnx.checker.check_model(onnx.load(tmp_path / "best_model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "best_model.onnx", providers=["CPUExecutionProvider"])
    script_model = torch.jit.load(tmp_path / "best_model.ts.pt")
    generator = torch.Generator().manual_seed(2)
    for shape in ((1, 1), (1, 2), (2, 1), (3, 17), (5, 31), (1, 32), (4, 32)):
        ids = torch.randint(512, shape, generator=generator)
        with torch.inference_mode():
            expected = model(ids)[0].numpy()
        (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
        assert logits.dtype == np.float32 and logits.shape == (*shape, 512)
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
        np.testing.assert_allclose(script_model(ids).detach().numpy(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_folder_for_transformers(family, trained_run, gpt2_run, sample_dir, tmp_path):
    """Another program loads model and tokenizer from the folder alone: same ids, same logits, same greedy text."""
    transformers = pytest.importorskip("transformers")
    run = trained_run if family == "qwen3" else gpt2_run
    for _ in range(2):  # the second export replaces the first
        assert export_model.main(["--checkpoint", str(run), "--format", "hf", "--output", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [RECORD, "hf"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model, tokenizer, *_ = load_model(str(run))
    ids = tokenizer.encode("Once upon a time, there was a naïve frog.")
    assert theirs.encode("Once upon a time, there was a naïve frog.") == ids and theirs.eos_token_id == tokenizer.eot_id
    prompt = torch.tensor([ids[:8]])
    row = Row(ids[:8], 12)
    [*Writer(TorchEngine(model), tokenizer, Sampling(0.0)).write([row])]
    got = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert got[0].tolist() == row.ids


def test_a_file_that_computes_something_else_is_deleted(trained_run, tmp_path, monkeypatch, capsys):
    file_name, write = export_model.FORMATS["onnx"]

    def wrong(source, path):
        loaded = write(source, path)
        return Loaded(lambda ids: loaded.logits(ids) + 1e-3)

    monkeypatch.setitem(export_model.FORMATS, "onnx", (file_name, wrong))
    assert export_model.main(["--checkpoint", str(trained_run), "--format", "onnx", "--output", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == [] and "the file was deleted" in capsys.readouterr().err


def test_the_record_lists_every_export_and_no_path(trained_run, tmp_path):
    assert export_model.main(["--checkpoint", str(trained_run), "--output", str(tmp_path)]) == 0  # onnx, without --format
    assert export_model.main(["--checkpoint", str(trained_run), "--format", "torchscript", "--output", str(tmp_path)]) == 0
    record = read_record(tmp_path)
    assert record.keys() == {"best_model.onnx", "best_model.ts.pt"}
    entry = record["best_model.onnx"]
    assert entry.pop("largest_logit_difference") <= 1e-4
    assert entry == {"format": "onnx", "checkpoint": "best_model.pt", "torch": torch.__version__}
    assert str(tmp_path) not in (tmp_path / RECORD).read_text() and str(trained_run) not in (tmp_path / RECORD).read_text()


def test_a_record_leads_nowhere_else(tmp_path):
    names = ["best_model.onnx", "hf", "", ".", "..", "../x", "/etc/x", "hf/", "a/b", "..\\x", "C:x"]
    (tmp_path / RECORD).write_text(json.dumps({"files": {name: {} for name in names}}))
    assert read_record(tmp_path).keys() == {"best_model.onnx", "hf"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": ["x"]}', "\xff", "[" * 100_000])
def test_a_damaged_record_is_begun_afresh(tmp_path, capsys, content):
    (tmp_path / RECORD).write_bytes(content.encode("latin-1"))
    add_record(tmp_path, "best_model.onnx", {"format": "onnx"})
    assert "is damaged" in capsys.readouterr().err and read_record(tmp_path) == {"best_model.onnx": {"format": "onnx"}}


@pytest.mark.parametrize(("format", "name"), [("hf", "hf"), ("torchscript", "best_model.ts.pt")])
def test_a_folder_that_was_not_exported_stays(trained_run, tmp_path, mistake, format, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes").write_text("mine")
    (tmp_path / "hf.tmp").mkdir()
    stderr = mistake("export_model.py", "--checkpoint", trained_run, "--format", "onnx", format, "--output", tmp_path, cwd=tmp_path)
    assert "so it is no export to replace" in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({name, "hf.tmp"}) and (tmp_path / name / "notes").read_text() == "mine"


def test_the_source_is_never_the_target(trained_run, tmp_path, mistake):
    """Not even where the record says that it was exported."""
    models = tmp_path / "models"
    assert export_model.main(["--checkpoint", str(trained_run), "--format", "hf", "--output", str(models)]) == 0
    shutil.copy(trained_run / "best_model.pt", models / "hf")
    for source in ("models/hf", "models/hf/best_model.pt"):
        stderr = mistake("export_model.py", "--checkpoint", source, "--format", "hf", "--output", models, cwd=tmp_path)
        assert "is what would be exported" in stderr
    assert (models / "hf" / "model.safetensors").is_file() and (models / "hf" / "best_model.pt").is_file()


ARCHITECTURES = [{"arch": "gpt2"}, {"arch": "gpt2", "flash": False}, {"arch": "qwen3", "n_kv_head": 1}, {"arch": "qwen3", "flash": False}]


@pytest.mark.parametrize("shape", ARCHITECTURES, ids=str)
def test_torchscript_follows_the_device_of_its_input(tmp_path, shape):
    """A device in the graph, from the machine that traced it, would end it anywhere else. Constants without dimensions go everywhere."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=100, **shape)).eval()
    loaded = write_torchscript(Source(model, None, tmp_path, {}), tmp_path / "model.ts.pt").logits
    ids = torch.randint(100, (3, 17))
    assert torch.allclose(loaded(ids), model(ids)[0], atol=1e-6)
    code, constants = loaded.code_with_constants
    assert "device=_" in code and '"cpu"' not in code and "cpu" not in str(loaded.inlined_graph)
    assert all(value.dim() == 0 for value in vars(constants)["const_mapping"].values())


def test_the_tolerance_grows_with_the_logits():
    model = GPT(GPTConfig.nano(n_layer=1, n_embd=32, block_size=16, vocab_size=100)).eval()
    for scale, allowed in ((0.0, 1e-4), (1e4, None)):
        model.ln_f.weight.data.fill_(scale)
        largest = max(1.0, max(model(example_ids(model, *shape))[0].abs().max().item() for shape in ((1, 1), (3, 16), (1, 16))))
        difference, tolerance = largest_difference(model, lambda ids, model=model, by=largest: model(ids)[0] + 5e-5 * by)
        assert tolerance == pytest.approx(allowed or 1e-4 * largest) and difference == pytest.approx(tolerance / 2, rel=1e-2)
    assert largest > 100


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "medium"])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("write", [write_onnx, write_torchscript])
def test_large_models_with_large_logits_pass(tmp_path, preset, arch, write):
    """Random weights with logits of about 100, as published GPT-2 has them."""
    torch.manual_seed(0)
    model = GPT(getattr(GPTConfig, preset)(arch=arch, vocab_size=5000)).eval()
    with torch.inference_mode():
        logits = model(example_ids(model, 1, 64))[0]
    model.ln_f.weight.data.mul_(100 / logits.abs().max())
    difference, allowed = largest_difference(model, write(Source(model, None, tmp_path, {}), tmp_path / "model").logits)
    print(f"{preset} {arch} {write.__name__}: {difference:.2e}, allowed {allowed:.2e}")
    assert difference <= allowed and allowed > 5e-3


FAST_FORMATS = ["torchscript", "hf", pytest.param("onnx", marks=pytest.mark.slow)]


@pytest.mark.parametrize("format", FAST_FORMATS)
def test_a_full_disk_ends_an_export_and_leaves_nothing(trained_run, small_disk, mistake, format):
    (small_disk / "mine").write_bytes(bytes(600_000))
    assert "No space left on device" in mistake(
        "export_model.py", "--checkpoint", trained_run, "--format", format, "--output", small_disk, cwd=small_disk
    )
    assert [path.name for path in small_disk.iterdir()] == ["mine"]


@pytest.mark.parametrize("format", FAST_FORMATS)
def test_an_interrupted_export_leaves_nothing(trained_run, tmp_path, monkeypatch, format):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(SystemExit) as code:
        utils.run_script(lambda: export_model.main(["--checkpoint", str(trained_run), "--format", format, "--output", str(tmp_path)]))
    assert code.value.code == 130 and not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(mistake, trained_run, tmp_path):
    assert "'gif'" in mistake("export_model.py", "--format", "gif", "--checkpoint", trained_run, cwd=tmp_path)
    assert "--format needs at least one of onnx" in mistake("export_model.py", "--format", "--checkpoint", trained_run, cwd=tmp_path)
    assert "no checkpoint at" in mistake("export_model.py", "--format", "onnx", cwd=tmp_path)
    with pytest.raises(ValueError, match="unknown format gif"):
        export_model.check_formats(["onnx", "gif"])
