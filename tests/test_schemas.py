"""Nothing read from disk is trusted: a damaged file ends in one sentence that names it, or loads with the same meaning."""

import copy
import json
import os
import shutil
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import prepare_data
from evaluation.measures import Score, check_finite
from formats.checkpoint import load_checkpoint
from formats.data_directory import DataDirectory
from formats.huggingface import config_from_hf, load_folder
from formats.metrics import read_metrics
from formats.run_directory import find_resumed, load_model, newest_checkpoint
from formats.tokenizer import EOT, TextTokenizer, load_tokenizer
from preparation.tokenizer_kinds import byte_tokenizer, make_tokenizer, train_bpe
from tests.conftest import tiny

DEEP = "[" * 100_000
BYTE = byte_tokenizer()


def edit(path: Path, change) -> None:
    """Change a JSON file: a function that changes its content in place or returns another, or the text to write instead."""
    if callable(change):
        content = json.loads(path.read_text())
        changed = change(content)
        change = json.dumps(content if changed is None else changed)
    path.write_text(change)


def pipe(path: Path) -> None:
    """A named pipe in a file's place: whoever opens it waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def replace(**values):
    return lambda content: content | values


def of_split(split: str, **values):
    return lambda content: content["splits"][split].update(values)


# ---------------------------------------------------------------- data directories


def read_all(path) -> dict:
    """All that a reader of a data directory uses."""
    data = DataDirectory(path)
    splits = {split: (data.tokens(split).tolist(), data.entropy(split)) for split in data.splits}
    described = {split: values["sha256"] for split, values in data.meta["splits"].items()} if data.meta else None
    return {"splits": splits, "tokenizer": data.tokenizer.sha256, "described": described}


@pytest.fixture
def data(sample_dir, tmp_path) -> Path:
    return Path(shutil.copytree(sample_dir, tmp_path / "data"))


META = {
    "negative bytes": (of_split("val", bytes=-5), "splits.val.bytes=-5 must be at least 0"),
    "text for a number": (of_split("val", tokens="9"), "splits.val.tokens='9' must be a valid integer"),
    "true for a number": (of_split("test", documents=True), "splits.test.documents=True"),
    "a fraction": (of_split("test", bytes=1.5), "splits.test.bytes=1.5"),
    "no hash": (of_split("test", sha256="abc"), "splits.test.sha256='abc'"),
    "unknown key of a split": (of_split("test", size=1), "splits.test.size is unknown"),
    "version true": (replace(format_version=True), "format version True"),
    "version 1.0": (replace(format_version=1.0), "format version 1.0"),
    "version text": (replace(format_version="1"), "format version '1'"),
    "version null": (replace(format_version=None), "format version None"),
    "no version": (lambda meta: {key: value for key, value in meta.items() if key != "format_version"}, "it has no 'format_version'"),
    "dtype": (replace(dtype="uint32"), "dtype='uint32'"),
    "vocabulary beyond uint16": (replace(vocab_size=65_537), "vocab_size=65537"),
    "another vocabulary": (replace(vocab_size=513), "vocab_size=513, but its tokenizer's is 512"),
    "another end": (replace(eot_id=7), "eot_id=7, but its tokenizer's is 0"),
    "true for an id": (replace(eot_id=False), "eot_id=False"),
    "another tokenizer": (replace(tokenizer_sha256="0" * 64), "is not the tokenizer that meta.json names"),
    "no splits": (replace(splits={}), "splits has no 'train'"),
    "splits as a list": (replace(splits=[1]), "splits=[1] must be an object"),
    "unknown key": (replace(format=3), "format is unknown here"),
    "wrong seed": (replace(seed=-1), "seed=-1"),
    "wrong counts": (replace(counts={"empty": None}), "counts.empty=None"),
    "a list": ("[]", "must be an object"),
    "half a file": ('{"format_version": 1', "no JSON"),
    "nothing": ("", "no JSON"),
    "deeply nested": (DEEP, "no JSON"),
    "deeply nested within": (lambda meta: json.dumps(meta)[:-1] + ', "made_with": {"a": ' + DEEP, "no JSON"),
}


def test_what_prepare_data_writes_passes(data, tmp_path):
    assert set(read_all(data)["splits"]) == {"train", "val", "test"}
    (tmp_path / "s.txt").write_text("".join(f"a line {i} é\n" for i in range(300)))
    flags = {"input": (str(tmp_path / "s.txt"),), "max_documents": 250, "max_tokens": 10**6, "output": str(tmp_path / "other")}
    prepare_data.prepare(prepare_data.Arguments(**flags, tokenizer="word", vocab_size=50, report=False))
    assert "unknown_tokens" in DataDirectory(tmp_path / "other").meta and read_all(tmp_path / "other")


@pytest.mark.parametrize("case", META)
def test_meta_json_is_checked(data, case):
    change, part = META[case]
    if case == "deeply nested within":
        change = change(json.loads((data / "meta.json").read_text()))
    edit(data / "meta.json", change)
    with pytest.raises(ValueError) as error:
        read_all(data)
    assert part in str(error.value) and ("meta.json" in str(error.value)) and len(str(error.value)) < 600


NAN = '{"val": [NaN], "test": []}'
ENTROPY = {
    "one number for all": (replace(val=[5.0]), "1 numbers for the 15 documents of val"),
    "negative": (lambda content: content["val"].__setitem__(3, -1.0), "val.3=-1.0 must be at least 0"),
    "NaN": (NAN, "val.0=nan must be a finite number"),
    "infinity": (NAN.replace("NaN", "1e999"), "val.0=inf must be a finite number"),
    "text": (replace(val="x"), "val='x'"),
    "null": (replace(test=None), "test=None"),
    "a list": ("[]", "must be an object"),
    "unknown split": (replace(valid=[]), "valid is unknown here"),
    "deeply nested": (DEEP, "no JSON"),
}


@pytest.mark.parametrize("name", ["entropy.json", "floor.json"])
@pytest.mark.parametrize("case", ENTROPY)
def test_the_entropy_is_checked(data, name, case):
    (data / "entropy.json").rename(data / name)
    change, part = ENTROPY[case]
    edit(data / name, change)
    with pytest.raises(ValueError) as error:
        read_all(data)
    assert part in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"new": 3, "remove": []}', '{"new": [], "remove": [1]}', DEEP])
def test_a_damaged_commit_marker_is_named(data, content):
    (data / "commit.json").write_text(content)
    with pytest.raises(ValueError, match=r"commit\.json is damaged: .*; delete it and prepare the data again"):
        DataDirectory(data)


def test_a_token_file_changed_at_equal_size_is_found_everywhere(data, trained_run, tmp_path, mistake):
    ids = np.fromfile(data / "val.bin", np.uint16)
    ids[5], ids[6] = ids[6], ids[5]
    ids.tofile(data / "val.bin")
    again = tiny(data_dir=data, out_dir=trained_run, resume="auto", max_steps=40, eval_interval=15, checkpoint_interval=10)
    for name, *arguments in (
        ("train.py", *tiny(data_dir=data, out_dir=tmp_path / "run")),
        ("train.py", *again),
        ("evaluate.py", "--checkpoint", trained_run, "--data_dir", data),
        ("compare.py", trained_run, trained_run / "step_00000030.pt", "--data_dir", data, "--split", "val"),
    ):
        message = mistake(name, *arguments, cwd=tmp_path)
        assert "val.bin was changed since it was prepared" in message and "prepare the data again" in message


def test_larger_token_files_are_verified_if_asked(data, trained_run, tmp_path, mistake, monkeypatch):
    monkeypatch.setattr("formats.data_directory.ALWAYS_VERIFIED", 100)
    ids = np.fromfile(data / "val.bin", np.uint16)
    ids[[5, 6]] = ids[[6, 5]] + np.uint16(1)
    ids.tofile(data / "val.bin")
    assert len(DataDirectory(data).tokens("val")) == len(ids)
    for name, *arguments in (
        ("train.py", *tiny(data_dir=data, out_dir=tmp_path / "run")),
        ("evaluate.py", "--checkpoint", trained_run, "--data_dir", data),
        ("compare.py", trained_run, trained_run / "step_00000030.pt", "--data_dir", data, "--split", "val"),
    ):
        assert "val.bin was changed" in mistake(name, *arguments, "--verify_data", cwd=tmp_path)


@pytest.mark.parametrize(
    ("name", "put", "part"),
    [
        ("meta.json", directory, "meta.json is no file"),
        ("meta.json", pipe, "meta.json is no file"),
        ("entropy.json", directory, "entropy.json is no file"),
        ("entropy.json", pipe, "entropy.json is no file"),
        ("commit.json", directory, "commit.json is no file"),
        ("commit.json", pipe, "commit.json is no file"),
        ("tokenizer.json", directory, "no tokenizer at"),
        ("tokenizer.json", pipe, "no tokenizer at"),
        ("train.bin", directory, "no file "),
        ("train.bin", pipe, "no file "),
    ],
)
def test_what_is_no_file_is_neither_read_nor_overlooked(data, tmp_path, mistake, name, put, part):
    put(data / name)
    assert part in mistake("train.py", *tiny(data_dir=data, out_dir=tmp_path / "run"), cwd=tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.bin", "entropy.json"])
def test_an_unreadable_file_is_one_sentence(data, tmp_path, mistake, name):
    (data / name).chmod(0)
    assert "Permission denied" in mistake("train.py", *tiny(data_dir=data, out_dir=tmp_path / "run"), cwd=tmp_path)


def test_the_tokenizer_of_a_directory_without_meta_json_counts(data, trained_run, tmp_path, mistake):
    (data / "meta.json").unlink()
    (data / "tokenizer.json").write_text(BYTE.json)
    ids = np.arange(200, dtype=np.uint16)
    for split in ("train", "val", "test"):
        ids.tofile(data / f"{split}.bin")
    message = mistake("evaluate.py", "--checkpoint", trained_run, "--data_dir", data, cwd=tmp_path)
    assert "was prepared with another tokenizer than the model" in message


def test_a_resumed_run_keeps_its_tokenizer(data, tmp_path, mistake):
    """Where no meta.json tells of a change, only sizes could."""
    import train

    (data / "meta.json").unlink()
    flags = tiny(data_dir=data, out_dir=tmp_path / "run", max_steps=2, checkpoint_interval=1, eval_tokens=200)
    assert train.main(flags) == 0
    edit(data / "tokenizer.json", replace(normalizer={"type": "Lowercase"}))
    longer = [word if word != "2" or flags[i - 1] != "--max_steps" else "4" for i, word in enumerate(flags)]
    assert "another tokenizer" in mistake("train.py", *longer, "--resume", "auto", cwd=tmp_path)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="session")
def contents(trained_run) -> dict[str, dict]:
    return {name: torch.load(trained_run / name, weights_only=True) for name in ("best_model.pt", "step_00000030.pt")}


def without(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def at(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value(content[path[-1]]) if callable(value) else value

    return change


WTE = ("model", "wte.weight")
CHECKPOINT = {
    "no tokenizer": (without("tokenizer"), "it has no 'tokenizer'"),
    "unknown field": (lambda c: c.update(config=1), "config is unknown here"),
    "version true": (at("format_version", value=True), "format version True"),
    "step text": (at("step", value="30"), "step='30' must be a valid integer"),
    "step negative": (at("step", value=-1), "step=-1"),
    "tokenizer None": (at("tokenizer", value=None), "tokenizer=None"),
    "data": (at("data", value={}), "data={} must be a valid list"),
    "init_from": (at("init_from", value=3), "init_from=3"),
    "model a list": (at("model", value=[]), "model=[]"),
    "a weight that is none": (at(*WTE, value=3), "model.wte.weight=3"),
    "no n_head": (without("model_config", "n_head"), "differ in n_head"),
    "unknown n_heads": (lambda c: c["model_config"].update(n_heads=2), "differ in n_heads"),
    "n_head 0": (at("model_config", "n_head", value=0), "n_head=0"),
    "n_head 3": (at("model_config", "n_head", value=3), "not divisible"),
    "n_layer text": (at("model_config", "n_layer", value="2"), "n_layer='2'"),
    "huge n_layer": (at("model_config", "n_layer", value=10**9), "n_layer=1000000000"),
    "huge n_embd": (at("model_config", "n_embd", value=2 * 10**12), "n_embd=2000000000000"),
    "large n_embd": (at("model_config", "n_embd", value=2**16), "wte.weight has shape (512, 32) where its configuration has (512, 65536)"),
    "huge n_hidden": (at("model_config", "n_hidden", value=10**30), "n_hidden"),
    "another vocabulary": (at("model_config", "vocab_size", value=65_000), "wte.weight has shape"),
    "another family": (at("model_config", "arch", value="gpt2"), "bias|weight"),
    "train_config unknown": (lambda c: c["train_config"].update(lr=2), "differ in lr"),
    "train_config wrong": (at("train_config", "learning_rate", value=-1.0), "learning_rate=-1.0"),
    "NaN": (at(*WTE, value=lambda w: w.index_fill(0, torch.tensor([3]), float("nan"))), "wte.weight holds numbers that are not finite"),
    "infinity": (at("model", "ln_f.weight", value=lambda w: w / 0), "ln_f.weight holds numbers that are not finite"),
    "int8": (at(*WTE, value=lambda w: w.to(torch.int8)), "wte.weight holds no plain floating-point numbers but int8"),
    "one value for all": (at(*WTE, value=lambda w: torch.zeros(1).expand(w.shape)), "wte.weight holds no plain"),
    "a weight missing": (without("model", "ln_f.weight"), "it has no weight 'ln_f.weight'"),
    "a weight too many": (lambda c: c["model"].update(extra=torch.ones(1)), "no place for: extra"),
    "another shape": (at(*WTE, value=lambda w: w[:-1].clone()), "wte.weight has shape (511, 32)"),
}
COMPLETE = {
    "no progress": (without("resume", "progress"), "resume has no 'progress'"),
    "progress step": (at("resume", "progress", "step", value=None), "resume.progress.step=None"),
    "best NaN": (at("resume", "progress", "best_val_loss", value=float("nan")), "resume.progress.best_val_loss=nan"),
    "unknown progress": (lambda c: c["resume"]["progress"].update(x=1), "resume.progress.x is unknown"),
    "optimizers": (at("resume", "optimizers", value={}), "resume.optimizers={}"),
    "metrics": (at("resume", "metrics", value={"bytes": -1, "crc32": 0}), "resume.metrics.bytes=-1"),
    "environment": (at("resume", "environment", value=None), "resume.environment=None"),
    "train_config lacks": (without("train_config", "seed"), "differ in seed"),
    "ema": (at("resume", "ema", value={}), "n_layer=2, but it holds only 0 weights"),
}


@pytest.mark.parametrize("case", [*CHECKPOINT, *COMPLETE])
def test_checkpoints_are_checked(contents, tmp_path, case):
    change, part = (CHECKPOINT | COMPLETE)[case]
    for name, original in contents.items():
        if case in COMPLETE and name == "best_model.pt":
            continue
        content = copy.deepcopy(original)
        change(content)
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError) as error:
            load_checkpoint(tmp_path / name)
        assert (
            any(one in str(error.value) for one in part.split("|")) and name in str(error.value) and "take another one" in str(error.value)
        )


def test_every_script_refuses_weights_that_are_not_finite(contents, sample_dir, trained_run, tmp_path, mistake):
    content = copy.deepcopy(contents["best_model.pt"])
    content["model"]["h.0.mlp.c_proj.weight"][2, 3] = float("nan")
    path = tmp_path / "nan.pt"
    torch.save(content, path)
    for name, *arguments in (
        ("evaluate.py", "--checkpoint", path, "--data_dir", sample_dir),
        ("compare.py", path, trained_run, "--data_dir", sample_dir),
        ("generate.py", "--checkpoint", path, "--prompt", "x"),
        ("export_model.py", "--checkpoint", path),
        ("train.py", "--init_from", path, "--data_dir", sample_dir),
    ):
        assert "h.0.mlp.c_proj.weight holds numbers that are not finite" in mistake(name, *arguments, cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.pt"]


def test_results_that_are_not_finite_are_never_written(contents, sample_dir, trained_run, tmp_path, mistake):
    """Finite weights too large for float32's products."""
    content = copy.deepcopy(contents["best_model.pt"])
    content["model"]["ln_f.weight"] *= 1e38
    content["model"]["wte.weight"] *= 1e4
    torch.save(content, tmp_path / "large.pt")
    for name, *arguments in (
        ("evaluate.py", "--checkpoint", tmp_path / "large.pt"),
        ("compare.py", trained_run, tmp_path / "large.pt"),
    ):
        message = mistake(name, *arguments, "--data_dir", sample_dir, "--output", tmp_path / "out.json", cwd=tmp_path)
        assert "large.pt computes numbers that are not finite" in message
    assert not (tmp_path / "out.json").exists()
    check_finite(Score(*[np.ones(3)] * 5), "a good model")


def test_a_best_model_in_the_place_of_a_step_checkpoint_is_passed_over(trained_run, tmp_path, capsys):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    shutil.copy(run / "best_model.pt", run / "step_00000030.pt")
    path, _ = newest_checkpoint(run)
    assert path.name == "step_00000020.pt"
    assert "step_00000030.pt holds weights only and can't be resumed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds weights only"):
        find_resumed(str(run / "step_00000030.pt"), run)


def test_a_model_and_a_tokenizer_of_different_sizes_are_refused(contents, sample_dir, tmp_path, mistake):
    for tokenizer, ids in ((BYTE, 257), (train_bpe(["many words of a long text"] * 3, 300), None)):
        torch.save(contents["best_model.pt"] | {"tokenizer": tokenizer.json}, tmp_path / "m.pt")
        for name, *arguments in (("generate.py", "--checkpoint"), ("export_model.py", "--checkpoint"), ("train.py", "--init_from")):
            more = ["--data_dir", sample_dir] if name == "train.py" else []
            message = mistake(name, *arguments, tmp_path / "m.pt", *more, cwd=tmp_path)
            assert f"its tokenizer has {ids or tokenizer.vocab_size} ids, but its model 512" in message


# ---------------------------------------------------------------- metrics


def test_damaged_lines_of_metrics_are_left_out_and_named(tmp_path, capsys):
    good = '{"step": 1, "tokens": 8, "loss": null, "also": {"d": {"loss": 1.5}}}\n'
    bad = ['{"step": "1"}', "[]", '{"step": 1, "loss": NaN}', DEEP, '{"step": 1, "also": {"d": 3}}', "\x00"]
    (tmp_path / "metrics.jsonl").write_text(good + "\n".join(bad) + "\n" + good + '{"step": 9')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(bad) and all(f"line {i}, is damaged" in line for i, line in enumerate(lines, 2))
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_a_pipe_in_the_place_of_metrics_is_not_waited_for(trained_run, sample_dir, tmp_path, mistake):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    pipe(run / "metrics.jsonl")
    again = tiny(data_dir=sample_dir, out_dir=run, max_steps=40, eval_interval=15, checkpoint_interval=10, resume="auto")
    assert "metrics.jsonl is no file" in mistake("train.py", *again, cwd=tmp_path)


# ---------------------------------------------------------------- folders of transformers

# config.json of openai-community/gpt2; the last line is what gpt2-medium's has besides
GPT2_PUBLISHED = json.loads("""{
  "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1,
  "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
  "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257,
  "n_special": 0, "predict_special_tokens": true}""")
# config.json of Qwen/Qwen3-0.6B, but for its head_dim of 128, which ours can't have
QWEN3_PUBLISHED = json.loads("""{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
  "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
  "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
  "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
  "use_sliding_window": false, "vocab_size": 151936}""")


def test_published_configurations_are_read():
    assert config_from_hf(GPT2_PUBLISHED).n_embd == 768
    config = config_from_hf(QWEN3_PUBLISHED)
    assert (config.n_kv_head, config.head_dim, config.theta) == (8, 64, 1e6)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A small model of each family as transformers itself writes it, with our byte tokenizer."""
    shape = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    gpt2 = transformers.GPT2Config(**shape, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1}
    size = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 16, "tie_word_embeddings": True}
    qwen3 = transformers.Qwen3Config(**shape, **heads, **size)
    paths = {}
    for name, model in (("gpt2", transformers.GPT2LMHeadModel(gpt2)), ("qwen3", transformers.Qwen3ForCausalLM(qwen3))):
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
        (paths[name] / "tokenizer.json").write_text(BYTE.json)
    return paths


@pytest.fixture
def folder(folders, tmp_path):
    """folder("gpt2") -> a copy to damage."""
    return lambda family: Path(shutil.copytree(folders[family], tmp_path / family))


OPTIONS = [
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"scale_attn_weights": None}, "scale_attn_weights is None"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}"),
    ("gpt2", {"hidden_size": 64}, "sets hidden_size=64"),
    ("gpt2", {"rope_scaling": {"type": "linear"}}, "sets rope_scaling={'type': 'linear'}"),
    ("gpt2", {"quantization_config": {"load_in_8bit": True}}, "sets quantization_config={'load_in_8bit': True}"),
    ("gpt2", {"auto_map": {"AutoModelForCausalLM": "other.Model"}}, "sets auto_map="),
    ("qwen3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
    ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ("qwen3", {"rope_parameters": {"type": "linear", "rope_theta": 1e4}}, "type is 'linear'"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "sets factor=2.0"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("qwen3", {"rope_parameters": "yarn"}, "rope_parameters is 'yarn'"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("qwen3", {"rope_theta": 5e5}, "several values of rope_theta, 500000.0 and 10000.0"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4}, "use_sliding_window is True"),
    ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types is ['sliding_attention']"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("qwen3", {"num_experts": 8}, "sets num_experts=8"),
]


@pytest.mark.parametrize(("family", "change", "part"), OPTIONS, ids=str)
def test_an_option_that_ours_does_not_compute_is_refused_by_name_and_value(folder, family, change, part):
    path = folder(family)
    edit(path / "config.json", replace(**change))
    with pytest.raises(ValueError, match="can't be read as an HF folder") as error:
        load_folder(path)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt2", {"attn_pdrop": 0.3, "use_cache": False, "torch_dtype": "float16", "_name_or_path": "x", "n_ctx": 16}),
        ("gpt2", {"rope_scaling": None, "quantization_config": None, "output_hidden_states": True}),
        ("qwen3", {"rope_scaling": None, "sliding_window": 4096, "max_window_layers": 0, "attention_dropout": 0.1}),
        ("qwen3", {"partial_rotary_factor": 1.0, "use_sliding_window": False}),
        ("qwen3", {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": {"rope_type": "default"}}),
    ],
)
def test_harmless_options_change_nothing(folder, folders, family, change):
    path = folder(family)
    edit(path / "config.json", replace(**change))
    ours, theirs = load_folder(path), load_folder(folders[family])
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    model, _, _, _ = load_model(str(path))
    ids = torch.arange(16)[None]
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert (model(ids)[0] - reference(ids).logits).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("family", "change", "part"),
    [
        ("gpt2", {"n_head": 0}, "n_head=0"),
        ("qwen3", {"num_attention_heads": 0}, "n_head=0"),
        ("qwen3", {"num_key_value_heads": 0}, "n_kv_head=0"),
        ("gpt2", {"n_layer": 10**9}, "n_layer=1000000000"),
        ("qwen3", {"num_hidden_layers": 10**9, "layer_types": None}, "n_layer=1000000000"),
        ("gpt2", {"n_embd": 10**12}, "n_embd=1000000000000"),
        ("gpt2", {"n_embd": 10**30}, "n_embd=1" + "0" * 30),
        ("gpt2", {"n_positions": 32}, "transformer.wpe.weight has shape (16, 32)"),
        ("qwen3", {"intermediate_size": 96}, "mlp.down_proj.weight has shape (32, 64)"),
        ("gpt2", {"n_embd": "32"}, "n_embd='32'"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type is ['gpt2']"),
        ("gpt2", "[]", "config.json is damaged"),
        ("gpt2", "{", "config.json is damaged"),
        ("gpt2", '{"model_type": ' + "[" * 100_000, "config.json is damaged"),
    ],
)
def test_the_shape_of_a_folder_is_checked(folder, family, change, part):
    path = folder(family)
    edit(path / "config.json", replace(**change) if isinstance(change, dict) else change)
    with pytest.raises(ValueError, match="can't be read as an HF folder") as error:
        load_folder(path)
    assert part in str(error.value)


def qkv(q: int, k: int):
    """Other rows for queries and keys that add up to the same number."""
    return lambda w: w | {f"model.layers.0.self_attn.{n}_proj.weight": torch.randn(rows, 32) for n, rows in (("q", q), ("k", k))}


@pytest.mark.parametrize(
    ("family", "change", "part"),
    [
        ("qwen3", qkv(40, 8), "k_proj.weight has shape (8, 32) where its configuration has (16, 32)"),
        ("gpt2", lambda w: w | {"transformer.wte.weight": w["transformer.wte.weight"].to(torch.int8)}, "no plain floating-point numbers"),
        (
            "qwen3",
            lambda w: w | {"model.norm.weight": torch.full((32,), float("nan"))},
            "model.norm.weight holds numbers that are not finite",
        ),
        (
            "qwen3",
            lambda w: {name: weight for name, weight in w.items() if "k_norm" not in name},
            "has no weight 'model.layers.0.self_attn.k_n",
        ),
        ("gpt2", lambda w: w | {"transformer.h.1.ln_1.weight": torch.ones(32)}, "no place for: transformer.h.1.ln_1.weight"),
        ("gpt2", lambda w: w | {"lm_head.weight": torch.zeros(257, 32)}, "its output layer is not its embedding"),
        ("gpt2", lambda w: w | {"lm_head.weight": torch.zeros(2)}, "its output layer is not its embedding"),
    ],
)
def test_the_weights_of_a_folder_are_checked(folder, family, change, part):
    path = folder(family)
    weights = change(load_file(path / "model.safetensors"))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors")
    with pytest.raises(ValueError, match="can't be read as an HF folder") as error:
        load_folder(path)
    assert part in str(error.value)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[]", "is damaged"),
        ("{}", "it has no 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "weight_map.a=3"),
        ('{"weight_map": {"a": "../part"}}', "a file outside of the folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "a file outside of the folder"),
        ('{"weight_map": {"a": "nothing"}}', "has no nothing"),
        ('{"weight_map": {"a": ".."}}', "is no file|outside"),
        ('{"weight_map": {"a": "part", "b": "part2"}}', "two of its files hold"),
        ('{"weight_map": ' + "[" * 100_000, "is damaged"),
    ],
)
def test_the_index_of_a_folder_is_checked(folder, content, part):
    path = folder("gpt2")
    (path / "model.safetensors").rename(path / "part")
    shutil.copy(path / "part", path / "part2")
    (path / INDEX).write_text('{"metadata": {"total_size": 3}, "weight_map": {"a": "part"}}')
    load_folder(path)
    (path / INDEX).write_text(content)
    with pytest.raises(ValueError) as error:
        load_folder(path)
    assert any(one in str(error.value) for one in part.split("|"))


@pytest.mark.parametrize("put", [pipe, directory])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", INDEX])
def test_a_folder_with_what_is_no_file(folder, tmp_path, mistake, put, name):
    path = folder("gpt2")
    if name == INDEX:
        (path / "model.safetensors").unlink()
    put(path / name)
    assert "is no file" in mistake("generate.py", "--checkpoint", path, "--prompt", "x", cwd=tmp_path)


def test_a_folder_whose_tokenizer_is_not_its_models(folder, tmp_path, mistake):
    path = folder("qwen3")
    (path / "tokenizer.json").write_text(train_bpe(["more ids than that"], 270).json)
    for name, flag in (("generate.py", "--checkpoint"), ("export_model.py", "--checkpoint"), ("train.py", "--init_from")):
        assert "ids, but its model 257" in mistake(name, flag, path, cwd=tmp_path)


# ---------------------------------------------------------------- tokenizers

SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def tokenizer_json(model: dict, *added: dict) -> str:
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return json.dumps({"version": "1.0", **parts, "added_tokens": [{"id": 0, "content": EOT} | SPECIAL, *added], "model": model})


VOCAB = {EOT: 0, "a": 1, "b": 2}
FEW = {"type": "BPE", "vocab": VOCAB, "merges": []}
TOKENIZERS = {
    "an id of 2^31": (tokenizer_json(FEW | {"vocab": VOCAB | {"x": 2**31}}), "ids up to 2147483648"),
    "an added id of 2^31": (tokenizer_json(FEW, {"id": 2**31, "content": "x"} | SPECIAL), "ids up to 2147483648"),
    "one id too many": (tokenizer_json(FEW | {"vocab": VOCAB | {"x": 65_536}}), "ids up to 65536"),
    "too many pieces": (
        tokenizer_json({"type": "Unigram", "unk_id": 0, "vocab": [[f"x{i}", 0.0] for i in range(65_537)]}),
        "ids up to 65536",
    ),
    "a negative id": (tokenizer_json(FEW | {"vocab": {EOT: 0, "a": -1}}), "no Hugging Face tokenizer.json"),
    "an ordinary end": (tokenizer_json(FEW).replace('"special": true', '"special": false'), "is an ordinary token in it"),
    "an end in the vocabulary only": (json.dumps(json.loads(tokenizer_json(FEW)) | {"added_tokens": []}), "is an ordinary token in it"),
    "no end": (tokenizer_json(FEW).replace(EOT, "<|x|>"), f"has no {EOT}"),
    "the same id twice": (tokenizer_json(FEW | {"vocab": VOCAB | {"b": 1}}), "the same id"),
    "word without unknown": (tokenizer_json({"type": "WordLevel", "vocab": VOCAB, "unk_token": "<unk>"}), "no Hugging Face tokenizer.json"),
    "bpe without unknown": (tokenizer_json(FEW | {"unk_token": "<unk>"}), "no Hugging Face tokenizer.json"),
    "unigram without unknown": (
        tokenizer_json({"type": "Unigram", "unk_id": None, "vocab": [[EOT, 0.0]]}),
        "no Hugging Face tokenizer.json",
    ),
    "dropout": (tokenizer_json(FEW | {"dropout": 0.1}), "its dropout=0.1"),
    "no model": ("{}", "it has no 'model'"),
    "half a file": (BYTE.json[:1000], "no JSON"),
    "deeply nested": (DEEP, "no JSON"),
    "deeply nested normalizer": (BYTE.json.replace('"normalizer":null', f'"normalizer":{DEEP}'), "no JSON"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_are_checked(tmp_path, mistake, case):
    text, part = TOKENIZERS[case]
    (tmp_path / "t.json").write_text(text)
    (tmp_path / "s.txt").write_text("a text\n" * 300)
    message = mistake("prepare_data.py", "--input", "s.txt", "--tokenizer", "t.json", "--output", "data", cwd=tmp_path)
    assert part in message and "t.json" in message and len(message) < 600 and not (tmp_path / "data").exists()


def test_a_tokenizer_that_loses_text_warns(tmp_path, capsys):
    (tmp_path / "drops.json").write_text(tokenizer_json(FEW))
    make_tokenizer(str(tmp_path / "drops.json"), [], 0)
    assert "leaves out characters that it doesn't know, such as 'O'" in capsys.readouterr().err
    unigram = {"type": "Unigram", "unk_id": 1, "vocab": [[EOT, 0.0], ["<unk>", 0.0]]}
    (tmp_path / "unknown.json").write_text(tokenizer_json(unigram))
    tokenizer = make_tokenizer(str(tmp_path / "unknown.json"), [], 0)
    assert "no bits per byte" in capsys.readouterr().err
    assert tokenizer.unknown_id == 1 and set(tokenizer.encode("any text")) == {1}  # so they are counted, with a warning
    (tmp_path / "byte.json").write_text(BYTE.json)
    make_tokenizer(str(tmp_path / "byte.json"), [], 0)
    assert capsys.readouterr().err == ""


def test_unigrams_with_other_scores_are_other_tokenizers():
    pieces = [[EOT, 0.0], ["a", -1.0], ["b", -1.0], ["ab", -3.0]]
    one, other = (
        TextTokenizer(tokenizer_json({"type": "Unigram", "unk_id": 1, "vocab": v})) for v in (pieces, [*pieces[:3], ["ab", -1.0]])
    )
    assert one.encode("ab") != other.encode("ab") and not one.same_ids(other) and one.same_ids(TextTokenizer(one.json + "\n"))


# ---------------------------------------------------------------- any damage at all

PLAIN = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)


@st.composite
def mutations(draw, original: dict) -> str:
    """The JSON text of a copy in which one to three values were replaced, deleted or added, anywhere."""
    content = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        action = draw(st.sampled_from(["replace", "delete", "add"]))
        if isinstance(place, list) and (action == "add" or key is None):
            place.append(draw(VALUES))
        elif action == "add" or key is None:
            place[draw(st.text(max_size=8))] = draw(VALUES)
        elif action == "delete":
            del place[key]
        else:
            place[key] = draw(VALUES)
    text = json.dumps(content)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


FUZZ = hypothesis.settings(max_examples=40, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))


@FUZZ
@hypothesis.given(data=st.data())
def test_any_change_of_meta_json_is_refused_or_harmless(sample_dir, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed_data"
    if not path.exists():
        shutil.copytree(sample_dir, path)
    (path / "meta.json").write_text(data.draw(mutations(json.loads((sample_dir / "meta.json").read_text()))))
    try:
        read = read_all(path)
    except (ValueError, FileNotFoundError) as error:
        assert "meta.json" in str(error) or ".bin" in str(error) or "tokenizer.json" in str(error), error
        return
    known = read_all(sample_dir)
    if "sample" not in DataDirectory(path).meta:
        known["splits"] = {split: (ids, None) for split, (ids, _) in known["splits"].items()}
    assert read == known


@FUZZ
@hypothesis.given(data=st.data(), family=st.sampled_from(["gpt2", "qwen3"]))
def test_any_change_of_a_folders_config_is_refused_or_harmless(folders, tmp_path_factory, data, family):
    path = tmp_path_factory.getbasetemp() / f"fuzzed_{family}"
    if not path.exists():
        shutil.copytree(folders[family], path)
    original = json.loads((folders[family] / "config.json").read_text())
    text = data.draw(mutations(original))
    (path / "config.json").write_text(text)
    try:
        model, _, _, content = load_model(str(path))
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error)
        return
    expected = load_folder(folders[family])
    assert content["model_config"] | {"rope_theta": 0} == expected["model_config"] | {"rope_theta": 0}
    theirs = json.loads(text)
    theta = (theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}).get("rope_theta", theirs.get("rope_theta"))
    assert family == "gpt2" or model.config.theta == (1e4 if theta is None else theta)


@FUZZ
@hypothesis.given(data=st.data())
def test_any_change_of_a_tokenizer_is_refused_or_in_use(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed_tokenizer.json"
    path.write_text(
        data.draw(mutations(json.loads(tokenizer_json(FEW | {"vocab": VOCAB, "merges": [["a", "b"]]} | {"vocab": VOCAB | {"ab": 3}}))))
    )
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert max(tokenizer.encode("a ba b"), default=0) < tokenizer.vocab_size <= 65_536
