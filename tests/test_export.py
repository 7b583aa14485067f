"""export_model.py: what is exported computes what the model computes, or it is not kept."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export_model
from formats.checkpoint import load_model
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_model.onnx", "best_model.ts.pt"]
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
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model, tokenizer, *_ = load_model(str(run))
    ids = tokenizer.encode("Once upon a time, there was a naïve frog.")
    assert theirs.encode("Once upon a time, there was a naïve frog.") == ids and theirs.eos_token_id == tokenizer.eot_id
    prompt = torch.tensor([ids[:8]])
    expected = model.generate(prompt, 12, temperature=0)
    got = twin.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(got, expected)


def test_a_file_that_computes_something_else_is_deleted(trained_run, tmp_path, monkeypatch, capsys):
    original = export_model.write_onnx

    def wrong(model, tokenizer, path):
        run = original(model, tokenizer, path)
        return lambda ids: run(ids) + 1e-3

    monkeypatch.setitem(export_model.FORMATS, "onnx", (".onnx", wrong))
    assert export_model.main(["--checkpoint", str(trained_run), "--format", "onnx", "--output", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == [] and "the file was deleted" in capsys.readouterr().err


def test_mistakes_are_one_sentence(script, trained_run, tmp_path):
    assert "unknown format gif" in script("export_model.py", "--format", "gif", "--checkpoint", trained_run, code=2).stderr
    assert "no checkpoint at" in script("export_model.py", "--format", "onnx", cwd=tmp_path, code=2).stderr
