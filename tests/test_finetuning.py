"""--init_from: weights from a checkpoint, a transformers folder or the hub, the source's tokenizer, and validation on old and new data."""

import json
import shutil

import pytest
import torch
import transformers

import prepare_data
import train
from config import FINE_TUNING, GPTConfig, TrainConfig
from formats.checkpoint import load_checkpoint
from formats.huggingface import config_from_hf, from_hf, to_hf
from formats.metrics import read_metrics
from formats.run_directory import load_model
from formats.tokenizer import TextTokenizer
from models import GPT
from preparation.tokenizer_kinds import byte_tokenizer
from tests.conftest import tiny
from training import start

FAMILIES = {
    "gpt2": GPTConfig(block_size=48, vocab_size=257, n_layer=2, n_head=2, n_embd=32),
    "qwen3": GPTConfig(block_size=48, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, arch="qwen3", rope_theta=500.0),
}


def hf_model(family: str):
    """A random model made by transformers itself."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.Qwen3Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=48,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    return transformers.Qwen3ForCausalLM(config).eval()


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    """A folder as transformers writes it, with our byte tokenizer."""
    path = tmp_path / request.param
    hf_model(request.param).save_pretrained(path)
    (path / "tokenizer.json").write_text(byte_tokenizer().json)
    return path


@torch.inference_mode()
def test_a_folder_of_transformers_gives_the_same_logits(folder):
    model, tokenizer, _, _ = load_model(str(folder))
    ids = torch.randint(257, (3, 48), generator=torch.Generator().manual_seed(1))
    assert (model(ids)[0] - hf_model(folder.name)(ids).logits).abs().max() < 2e-5
    assert tokenizer.vocab_size == 257


@pytest.mark.parametrize("family", FAMILIES)
def test_to_hf_and_back_is_the_identity(family):
    config = FAMILIES[family]
    weights = GPT(config).state_dict()
    back = from_hf(config, {f"{name}": weight for name, weight in to_hf(config, weights).items()})
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_published_gpt2_files_without_prefix_and_with_masks_are_read():
    config = FAMILIES["gpt2"]
    weights = GPT(config).state_dict()
    published = {name.removeprefix("transformer."): weight for name, weight in to_hf(config, weights).items()}
    published |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "lm_head.weight": weights["wte.weight"].clone()}
    back = from_hf(config, published)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("family", "change", "part"),
    [
        ("qwen3", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("qwen3", {"head_dim": 64}, "head_dim is 64"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type is 'yarn'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"model_type": "llama"}, "model_type is 'llama'"),
        ("gpt2", {"n_layer": None}, "n_layer=None"),
        ("gpt2", {"n_layer": 3}, "no weight|do not fit"),
    ],
)
def test_a_model_that_ours_cannot_be_is_refused(tmp_path, family, change, part):
    path = tmp_path / "folder"
    hf_model(family).save_pretrained(path)
    (path / "tokenizer.json").write_text(byte_tokenizer().json)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=part):
        load_model(str(path))


def test_config_of_the_reference_without_optional_fields():
    minimal = {"model_type": "gpt2", "n_positions": 48, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32}
    assert config_from_hf(minimal) == FAMILIES["gpt2"]
    with pytest.raises(ValueError, match="has no 'n_embd'"):
        config_from_hf({key: value for key, value in minimal.items() if key != "n_embd"})


def test_adapting_a_run_to_another_text(tmp_path, trained_run, sample_dir, script):
    """Starts where the source stands, uses its tokenizer, watches the old domain, and resumes by the same command line."""
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{i} little frogs jumped over a log, and {i % 7} fell in.\n" for i in range(900)))
    arguments = [
        "--init_from",
        str(trained_run),
        "--dataset",
        str(book),
        "--also_eval",
        str(sample_dir),
        "--out_dir",
        str(tmp_path / "run"),
    ]
    arguments += [
        "--max_steps",
        "12",
        "--eval_interval",
        "6",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--eval_tokens",
        "2000",
        "--batch_size",
        "4",
        "--resume",
        "auto",
    ]
    stderr = script("train.py", *arguments).stderr
    assert f"{sample_dir}: val loss" in stderr
    val = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in line]
    assert [line["step"] for line in val] == [0, 6, 12] and val[-1]["val_loss"] < val[0]["val_loss"] - 0.1
    old = [line["also"][str(sample_dir)]["loss"] for line in val]
    before = [line["val_loss"] for line in read_metrics(trained_run / "metrics.jsonl") if "val_loss" in line]
    assert old[0] == pytest.approx(before[-1], abs=1e-5)
    run, source = (load_checkpoint(path / "best_model.pt") for path in (tmp_path / "run", trained_run))
    assert run["tokenizer"] == source["tokenizer"] and run["model_config"] == source["model_config"]
    assert run["init_from"]["name"] == str(trained_run)
    assert run["train_config"]["learning_rate"] == FINE_TUNING["learning_rate"]
    assert "finished at step 12" in script("train.py", *arguments).stdout
    again = [word if word != str(trained_run) else str(tmp_path / "run") for word in arguments]
    assert "did not start from" in script("train.py", *again, code=2).stderr


def test_adapting_a_folder_of_transformers_to_prepared_data(folder, tmp_path, script):
    """Data prepared with the folder's tokenizer; a shorter block and dropout may be asked for."""
    (tmp_path / "text.txt").write_text("".join(f"{i} frogs.\n" for i in range(2000)))
    prepare = prepare_data.Arguments(input=(str(tmp_path / "text.txt"),), tokenizer=str(folder), output=str(tmp_path / "data"))
    prepare_data.prepare(prepare)
    arguments = tiny(preset=None, n_layer=None, n_head=None, n_embd=None, data_dir=tmp_path / "data", max_steps=6, dropout=0.1)
    script("train.py", "--init_from", folder, *arguments, "--out_dir", tmp_path / "run")
    model, _, _, content = load_model(str(tmp_path / "run"))
    assert model.config.block_size == 32 and model.config.dropout == 0.1 and content["step"] == 6


def test_the_tokenizer_of_the_source_is_enforced(tmp_path, trained_run, sample_dir, mistake):
    (tmp_path / "text.txt").write_text("".join(f"{i} frogs.\n" for i in range(2000)))
    prepare_data.prepare(prepare_data.Arguments(input=(str(tmp_path / "text.txt"),), tokenizer="byte", output=str(tmp_path / "bytes")))
    message = mistake("train.py", "--init_from", trained_run, "--data_dir", tmp_path / "bytes", cwd=tmp_path)
    assert "another tokenizer" in message and f"--tokenizer {trained_run}" in message
    message = mistake("train.py", *tiny(data_dir=sample_dir), "--also_eval", tmp_path / "bytes", cwd=tmp_path)
    assert "--also_eval" in message and "another tokenizer" in message


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--n_layer", "7"], "n_layer=2, not 7"),
        (["--block_size", "64"], "learned 32 positions"),
        (["--preset", "nano"], "--preset chooses a shape"),
        (["--dataset", "text.txt", "--tokenizer", "byte"], "brings its own tokenizer"),
    ],
)
def test_mistakes(tmp_path, trained_run, sample_dir, mistake, flags, part):
    (tmp_path / "text.txt").write_text("text\n" * 5000)
    data = [] if "--dataset" in flags else ["--data_dir", sample_dir]
    assert part in mistake("train.py", "--init_from", trained_run, *data, *flags, cwd=tmp_path)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").rglob("*.pt"))


def test_gpt2_by_name(tmp_path, monkeypatch):
    """From the hub's cache where it can be had; one sentence where not."""
    import huggingface_hub

    path = tmp_path / "cached"
    hf_model("gpt2").save_pretrained(path)
    (path / "tokenizer.json").write_text(byte_tokenizer().json)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(path))
    source = start.read_source("gpt2")
    assert asked == ["openai-community/gpt2"] and source["origin"]["name"] == "gpt2" and len(source["origin"]["sha256"]) == 64

    def offline(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="gpt2 can't be had from the Hugging Face hub"):
        start.read_source("gpt2")


def test_tokenizer_files_that_differ_in_format_only_are_the_same():
    ours = byte_tokenizer()
    pretty = TextTokenizer(json.dumps(json.loads(ours.json), indent=2))
    assert pretty.sha256 != ours.sha256 and pretty.same_ids(ours)
    values = json.loads(ours.json)
    values["normalizer"] = {"type": "Lowercase"}
    assert not TextTokenizer(json.dumps(values)).same_ids(ours)


def test_fine_tuning_values_give_way_to_flags():
    config = start.fine_tuning(TrainConfig(batch_size=3, max_steps=7), {"batch_size": 3, "max_steps": 7}, 128)
    assert config.batch_size == 3 and config.max_steps == 7 and config.epochs is None
    assert start.fine_tuning(TrainConfig(), {}, 1024).learning_rate == FINE_TUNING["learning_rate"] / 8
    assert start.fine_tuning(TrainConfig(), {}, 128).epochs == FINE_TUNING["epochs"]


def test_replay_mixes_the_old_domain_in(tmp_path, trained_run, sample_dir):
    """--data_dir new:0.8 old:0.2, with the validation of both."""
    shutil.copytree(sample_dir, tmp_path / "new")
    arguments = ["--init_from", str(trained_run), "--data_dir", f"{tmp_path / 'new'}:0.8", f"{sample_dir}:0.2", "--max_steps", "3"]
    arguments += ["--also_eval", str(sample_dir), "--out_dir", str(tmp_path / "run"), "--device", "cpu", "--eval_tokens", "2000"]
    assert train.main(arguments) == 0
    assert [share["share"] for share in load_checkpoint(tmp_path / "run" / "best_model.pt")["data"]] == ["4", "1"]
