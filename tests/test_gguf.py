"""GGUF files: what stands in them, by gguf's own reader; what llama.cpp can't carry is refused; what it computes, by llama.cpp itself."""

import dataclasses
import json
import os
import signal

import gguf
import numpy as np
import pytest
import torch

import export_model
from config import GPTConfig
from evaluation.measures import score_tokens
from export import gguf_file, llama_runtime
from export.gguf_file import UNUSED, kind_of, read_gguf, why_not, write_gguf, write_q4_0, write_q8_0
from export.llama_runtime import Crash, LlamaFile, open_files
from export.verify import PROMPTS, Source
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.data_directory import DataDirectory
from formats.export_record import RECORD, read_record
from formats.run_directory import load_model
from formats.tokenizer import EOT, TextTokenizer, gpt2_tokenizer
from models import GPT
from preparation.sample_corpus import load_grammar, stories
from preparation.tokenizer_kinds import byte_tokenizer, make_tokenizer, train_bpe
from tests.conftest import tiny
from tests.runs import greedy

STORIES = [text for text, _ in stories(load_grammar(), 0, "test", 40)]
BPE = train_bpe(STORIES, 400)
BYTE = byte_tokenizer()
ODD = [
    "",
    " ",
    "\n\n  \t",
    "naïve café 北京 🙂",
    "a" * 300,
    "\x00\x01",
    EOT,
    f"a{EOT}b",
    "don't we'll I'VE",
    "\u200d\u0301 x",
    "\r\n",
    "  3  1/2 ",
]
FAMILIES = {
    "qwen3": {"arch": "qwen3"},
    "grouped": {"arch": "qwen3", "n_kv_head": 1, "rope_theta": 500.0},
    "gpt2": {"arch": "gpt2"},
    "no bias": {"arch": "gpt2", "bias": False},
}


def source_of(path, tokenizer=BPE, **changes) -> Source:
    """A random network whose every weight, norms and biases too, differs from the others."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 48, "vocab_size": tokenizer.vocab_size}
    model = GPT(GPTConfig(**shape | changes)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return Source(model, tokenizer, path / "best_model.pt", {})


def without_llama(monkeypatch):
    monkeypatch.setattr(gguf_file, "open_files", lambda paths, block_size: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_the_model_under_the_names_that_llama_cpp_knows(family, tmp_path):
    source = source_of(tmp_path, **FAMILIES[family])
    config, weights = source.model.config, source.model.state_dict()
    loaded = write_gguf(source, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in reader.tensors)
    arch = config.arch
    assert said["general.architecture"] == arch and said["general.name"] == tmp_path.name
    assert (said[f"{arch}.context_length"], said[f"{arch}.block_count"], said[f"{arch}.attention.head_count"]) == (48, 2, 2)
    assert (said[f"{arch}.embedding_length"], said[f"{arch}.feed_forward_length"]) == (64, config.mlp_width)
    assert torch.equal(tensors["token_embd.weight"], weights["wte.weight"]) and "output.weight" not in tensors
    fused = weights["h.1.attn.c_attn.weight"]
    if arch == "gpt2":
        assert said["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
        assert torch.equal(tensors["position_embd.weight"], weights["wpe.weight"])
        assert torch.equal(tensors["blk.1.attn_qkv.weight"], fused)
        assert torch.equal(tensors["blk.1.ffn_down.bias"], weights["h.1.mlp.c_proj.bias"] if config.bias else torch.zeros(64))
        assert len(tensors) == 4 + 2 * 12
    else:
        kv = config.kv_heads * 32
        assert (said["qwen3.attention.head_count_kv"], said["qwen3.rope.freq_base"]) == (config.kv_heads, config.theta)
        assert said["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
        assert {said[f"qwen3.{key}"] for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")} == {32}
        assert torch.equal(torch.cat([tensors[f"blk.1.attn_{part}.weight"] for part in "qkv"]), fused)
        assert tensors["blk.1.attn_k.weight"].shape == (kv, 64) and len(tensors) == 2 + 2 * 11
        assert torch.equal(tensors["blk.0.ffn_gate.weight"], weights["h.0.mlp.c_fc.weight"][: config.mlp_width])
    ids = torch.randint(400, (3, 48))
    assert torch.allclose(loaded.logits(ids), source.model(ids)[0], atol=1e-5)
    assert read_gguf(tmp_path / "model.gguf")[0].config == dataclasses.replace(
        config,
        bias=arch == "gpt2",
        n_hidden=config.mlp_width,
        **({"n_kv_head": config.kv_heads, "rope_theta": config.theta} if arch == "qwen3" else {}),
    )


def with_holes() -> TextTokenizer:
    """Bytes, and far behind them the end of a text and padding; ids between them belong to nothing."""
    content = json.loads(BYTE.json)
    (end,) = content["added_tokens"]
    content["added_tokens"] = [end | {"id": 300}, end | {"id": 310, "content": "<|pad|>"}]
    content["model"]["vocab"] |= {EOT: 300, "<|pad|>": 310}  # else `tokenizers` closes the hole
    return TextTokenizer(json.dumps(content))


@pytest.mark.parametrize("tokenizer", [BPE, BYTE, with_holes()], ids=["bpe", "byte", "holes"])
def test_the_tokenizer_in_a_file_gives_the_same_ids(tokenizer, tmp_path):
    loaded = write_gguf(source_of(tmp_path, tokenizer, arch="qwen3"), tmp_path / "model.gguf")
    for text in (*ODD, *STORIES[:10]):
        assert loaded.encode(text) == tokenizer.encode(text)
    said = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"], said["tokenizer.ggml.add_bos_token"]) == ("gpt2", "gpt-2", True)
    assert said["tokenizer.ggml.bos_token_id"] == said["tokenizer.ggml.eos_token_id"] == tokenizer.eot_id
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(set(tokens)) == len(tokens) == len(types) == tokenizer.vocab_size
    of_type = {kind: [i for i, found in enumerate(types) if found == kind] for kind in gguf.TokenType}
    assert set(of_type[gguf.TokenType.CONTROL]) == tokenizer.special_ids and tokens[tokenizer.eot_id] == EOT
    assert all(tokens[i] == UNUSED.format(i) for i in of_type[gguf.TokenType.UNUSED])
    assert len(of_type[gguf.TokenType.UNUSED]) == (310 - 256 - 1 if tokenizer.vocab_size == 311 else 0)
    assert said.get("tokenizer.ggml.padding_token_id") == (310 if tokenizer.vocab_size == 311 else None)


def changed(tokenizer: TextTokenizer, **model) -> TextTokenizer:
    content = json.loads(tokenizer.json)
    content["model"] |= model
    return TextTokenizer(json.dumps(content))


REFUSED = {
    "char": (make_tokenizer("char", STORIES, 0), "unlike this tokenizer"),
    "word": (make_tokenizer("word", STORIES, 100), "unlike this tokenizer"),
    "wordpiece": (make_tokenizer("wordpiece", STORIES, 600), "unlike this tokenizer"),
    "lowercase": (train_bpe(STORIES, 300, make_tokenizer("byte", [], 0, lowercase=True).tokenizer.normalizer), "has no Lowercase"),
    "nfc": (make_tokenizer("byte", [], 0, nfc=True), "has no NFC"),
    "ignored merges": (changed(BPE, ignore_merges=True), "unlike this tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(name, tmp_path):
    tokenizer, reason = REFUSED[name]
    assert reason in why_not(source_of(tmp_path, tokenizer, arch="qwen3"))


def test_a_refused_tokenizer_is_one_sentence_and_nothing_is_written(trained_run, mistake, tmp_path):
    tokenizer = REFUSED["char"][0]
    model = source_of(tmp_path, tokenizer, arch="qwen3").model
    content = load_checkpoint(trained_run / "best_model.pt") | {"tokenizer": tokenizer.json, "model": model.state_dict()}
    save_checkpoint(tmp_path / "best_model.pt", content | {"model_config": dataclasses.asdict(model.config)})
    stderr = mistake("export_model.py", "--checkpoint", tmp_path / "best_model.pt", "--format", "gguf", cwd=tmp_path)
    assert "llama.cpp reads byte-level BPE" in stderr and [path.name for path in tmp_path.iterdir()] == ["best_model.pt"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("write", "kind", "levels"), [(write_q8_0, "Q8_0", 127), (write_q4_0, "Q4_0", 8)])
def test_rounded_files_hold_what_is_near(family, write, kind, levels, tmp_path, monkeypatch):
    """Matrices by blocks of 32, each number within a step of the block's largest; all else as it was."""
    without_llama(monkeypatch)
    source = source_of(tmp_path, **FAMILIES[family])
    loaded = write(source, tmp_path / "model.gguf")
    exact, stored = gguf_file.to_gguf(source.model), gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert [tensor.name for tensor in stored] == [*exact]
    for tensor in stored:
        values, expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type), exact[tensor.name]
        if tensor.name.endswith(("norm.weight", ".bias")) or tensor.name == "position_embd.weight":
            assert tensor.tensor_type.name == "F32" and np.array_equal(values, expected)
        else:
            assert tensor.tensor_type.name == ("Q8_0" if tensor.name == "token_embd.weight" else kind)
            steps = np.abs(expected.reshape(-1, 32)).max(axis=1, keepdims=True) / (127 if tensor.tensor_type.name == "Q8_0" else levels)
            assert (np.abs(values - expected).reshape(-1, 32) <= 1.01 * steps).all() and not np.array_equal(values, expected)
    ids = torch.randint(400, (2, 48))
    assert torch.equal(loaded.logits(ids), loaded.reference(ids)[0]) and not torch.equal(loaded.logits(ids), source.model(ids)[0])
    before, after = loaded.rounded
    assert (before.bits, after.bits) == (32, 8 if kind == "Q8_0" else 4) and before.size > 2 * after.size and after.pace is None
    tokens = np.concatenate([np.array([*BPE.encode(text), BPE.eot_id], np.uint16) for text in STORIES[:3]])
    for measured, model in ((before, source.model), (after, loaded.reference)):
        assert np.allclose(measured.score(tokens, BPE.eot_id), score_tokens(model, tokens, BPE.eot_id).nats, atol=1e-4)


def test_rows_that_blocks_do_not_divide_stay_in_16_bits(tmp_path, monkeypatch, capsys):
    without_llama(monkeypatch)
    source = source_of(tmp_path, arch="gpt2", n_embd=36, n_hidden=64)
    write_q8_0(source, tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_qkv.weight"] == kinds["token_embd.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert "7 matrices such as token_embd.weight stay in 16 bits" in capsys.readouterr().err
    assert kind_of("blk.0.ffn_up.weight", np.zeros((64, 36), np.float32), gguf_file.Quant.F32) == gguf_file.Quant.F32


def flip_behind_the_writer(monkeypatch, at: int):
    """Turn one bit of the written file, `at` bytes from its end (or, positive, from its beginning)."""
    write = gguf_file._write

    def damaged(source, path, *arguments):
        write(source, path, *arguments)
        content = bytearray(path.read_bytes())
        content[at] ^= 0x40
        path.write_bytes(content)

    monkeypatch.setattr(gguf_file, "_write", damaged)


@pytest.mark.parametrize("format", ["gguf", "gguf_q8_0", "gguf_q4_0"])
@pytest.mark.parametrize("at", [-2001, 40, 2], ids=["weight", "key", "magic"])
def test_a_damaged_file_is_found_and_deleted(trained_run, tmp_path, monkeypatch, capsys, format, at):
    without_llama(monkeypatch)
    flip_behind_the_writer(monkeypatch, at)
    assert export_model.main(["--checkpoint", str(trained_run), "--format", format, "--output", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == [] and "was deleted" in capsys.readouterr().err


def test_what_rounding_costs_is_printed_and_recorded(trained_run, tmp_path, monkeypatch, script):
    without_llama(monkeypatch)
    ended = script("export_model.py", "--checkpoint", trained_run, "--format", "gguf", "gguf_q4_0", "--output", tmp_path)
    entries = read_record(tmp_path)
    assert entries.keys() == {"best_model.gguf", "best_model.q4_0.gguf"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*entries, RECORD])
    entry = entries["best_model.q4_0.gguf"]
    assert entry["size"] == (tmp_path / "best_model.q4_0.gguf").stat().st_size
    assert entry["size_before"] == (tmp_path / "best_model.gguf").stat().st_size
    assert entry["runtime"] == "our network" and "tokens_per_second" not in entry
    assert 0 < abs(entry["bits_per_byte"] / entry["bits_per_byte_before"] - 1) < 0.1
    assert f"{entry['bits_per_byte_before']:.4f} -> {entry['bits_per_byte']:.4f} bits per byte" in ended.stdout


def test_a_missing_llama_cpp_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(llama_runtime, "find_spec", lambda name: None)
    assert open_files([tmp_path / "model.gguf"], 32) is None
    assert "llama-cpp-python is not installed" in capsys.readouterr().err


def test_a_llama_cpp_that_crashes_is_told(monkeypatch, capsys, tmp_path):
    def crash(path, block_size):
        raise Crash

    monkeypatch.setattr(llama_runtime, "find_spec", lambda name: name)
    monkeypatch.setattr(llama_runtime, "LlamaFile", crash)
    assert open_files([tmp_path / "model.gguf"], 32) is None
    assert "crashes on this processor" in capsys.readouterr().err


# ---------------------------------------------------------------- by llama.cpp


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture
def opened(llama_cpp):
    """opened(path, **options) -> the file in llama.cpp, one thread."""
    models = []

    def open_file(path, **options):
        models.append(llama_cpp.Llama(str(path), n_threads=1, n_threads_batch=1, verbose=False, **options))
        return models[-1]

    yield open_file
    for model in models:
        model.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sample_dir):
    """trained("gpt2") -> a run of that family that has learned something; each is trained once."""
    import train

    runs = {}

    def run_of(family: str):
        if family not in runs:
            runs[family] = tmp_path_factory.mktemp("trained")
            shape = {name: value for name, value in FAMILIES[family].items() if name != "bias"} | {"block_size": 128, "n_embd": 64}
            arguments = tiny(data_dir=sample_dir, out_dir=runs[family], max_steps=150, **shape)
            assert train.main(arguments + (["--no_bias"] if family == "no bias" else [])) == 0
        return runs[family]

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_writes_the_same_greedy_text(family, trained, opened, tmp_path):
    """Five prompts, 64 tokens each, with llama.cpp's own defaults: keys and values in float16, GELU by a table."""
    assert export_model.main(["--checkpoint", str(trained(family)), "--format", "gguf", "--output", str(tmp_path)]) == 0
    model, tokenizer, *_ = load_model(str(trained(family)))
    llama = opened(tmp_path / "best_model.gguf", n_ctx=128, logits_all=True)
    largest = 0.0
    for prompt in PROMPTS:
        ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
        assert llama.tokenize(prompt.encode()) == ids
        expected = greedy(model, ids, 64)
        llama.reset()
        llama.eval(ids)
        got = [*ids]
        for _ in range(64):
            got.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval(got[-1:])
        assert tokenizer.decode(got) == tokenizer.decode(expected)
        with torch.inference_mode():
            logits = model(torch.tensor([got]))[0][0].numpy()
        largest = max(largest, np.abs(llama.scores[: len(got)] - logits).max() / np.abs(logits).max())
    print(f"{family}: largest difference of a logit {largest:.1e} of the largest logit")
    assert largest < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [BPE, BYTE, with_holes()], ids=["bpe", "byte", "holes"])
def test_llama_cpp_gives_the_same_ids(tokenizer, opened, tmp_path):
    write_gguf(source_of(tmp_path, tokenizer, arch="qwen3"), tmp_path / "model.gguf")
    llama = opened(tmp_path / "model.gguf", vocab_only=True)
    for text in (*ODD, *STORIES):
        assert llama.tokenize(text.encode(), special=False) == [tokenizer.eot_id, *tokenizer.encode(text)]
        ids = tokenizer.encode(text)
        assert llama.detokenize(ids) == text.encode()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bpe", "byte"])
def test_llama_cpp_reads_48_languages_as_we_do(kind, real_data, opened, tmp_path):
    texts = [path.read_text(encoding="utf-8") for path in sorted((real_data / "multilingual").glob("udhr_*.txt"))]
    tokenizer = gpt2_tokenizer() if kind == "gpt2" else train_bpe(texts, 2000) if kind == "bpe" else BYTE
    source = source_of(tmp_path, tokenizer, arch="gpt2")
    write_gguf(source, tmp_path / "model.gguf")
    llama = opened(tmp_path / "model.gguf", n_ctx=48, logits_all=True)
    assert len(texts) >= 47
    for text in texts:
        ids = [tokenizer.eot_id, *tokenizer.encode(text)]
        assert llama.tokenize(text.encode(), special=False) == ids
        llama.reset()
        llama.eval(ids[:48])
        with torch.inference_mode():
            logits = source.model(torch.tensor([ids[:48]]))[0][0].numpy()
        assert np.abs(llama.scores[:48] - logits).max() < 1e-2 * np.abs(logits).max()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("write", [write_q8_0, write_q4_0])
def test_llama_cpp_measures_rounded_files(llama_cpp, family, write, trained, sample_dir, tmp_path):
    """It computes with rounded activations too, so its figures are near those of the rounded weights, not the same."""
    run = trained(family)
    source = Source(*load_model(str(run)))
    loaded = write(source, tmp_path / "model.gguf")
    before, after = loaded.rounded
    if after.runtime != "llama.cpp":
        pytest.skip("llama.cpp as it was built here crashes on this processor")
    data = DataDirectory(sample_dir)
    tokens = np.asarray(data.tokens("val"))
    for measured, model, near in ((before, source.model, 1e-3), (after, loaded.reference, 2e-2)):
        expected = score_tokens(model, tokens, source.tokenizer.eot_id).nats
        assert np.abs(measured.score(tokens, source.tokenizer.eot_id).mean() - expected.mean()) < near
        assert measured.pace() > 0


@pytest.mark.slow
def test_a_file_that_llama_cpp_refuses_is_no_export(llama_cpp, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(gguf_file.Mismatch, match=r"llama\.cpp can't run it"):
        LlamaFile(path, 32)


def die(model) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_crash_of_llama_cpp_ends_only_its_own_process(llama_cpp, tmp_path):
    write_gguf(source_of(tmp_path, arch="qwen3"), tmp_path / "model.gguf")
    file = LlamaFile(tmp_path / "model.gguf", 48)
    assert file.pace() > 0
    for _ in range(2):
        with pytest.raises(Crash):
            file.ask(die)
