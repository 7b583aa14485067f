"""ONNX files with a cache, whole and rounded: they compute what the network computes, for Optimum's users and for our own scripts."""

import dataclasses
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from evaluation.likelihood import log_likelihoods
from export.onnx_cache import cache_graph, write_onnx_cache
from export.onnx_quantised import write_int4, write_int8
from export.quality import measure, sentence
from export.verify import Measurable, Source
from formats.data_directory import DataDirectory
from formats.onnx_file import OnnxFile
from formats.run_directory import load_model
from generation.loading import engine_of, load_engine, load_network
from generation.onnx_engine import CachedEngine, RecomputingEngine
from generation.shared_cache import SharedEngine, can_share
from models import GPT
from preparation.tokenizer_kinds import SPECIAL, char_tokenizer
from tests.test_engines import (  # noqa: F401 - the same tests for other engines: they ask for a `pair`
    MODELS,
    VOCABULARY,
    test_a_full_context_fits_and_one_token_more_does_not,
    test_a_text_depends_on_its_seed_alone,
    test_greedy_text_equals_the_uncached_one_token_for_token,
    test_logits_are_those_of_the_whole_text,
    test_what_is_forgotten_leaves_no_trace,
)

CHARACTERS = "".join(map(chr, range(0x4E00, 0x4E00 + VOCABULARY - len(SPECIAL))))


def wider(model: GPT) -> GPT:
    """With heads of 16, which a cache in place asks for."""
    torch.manual_seed(0)
    wide = GPT(dataclasses.replace(model.config, n_embd=64)).eval()
    for parameter in wide.parameters():
        torch.nn.init.normal_(parameter, std=0.15, mean=0.02)
    return wide


WIDE = {shape: wider(MODELS[shape]) for shape in ("gpt2", "qwen3")}


def source_of(model: GPT, path) -> Source:
    return Source(model, char_tokenizer([CHARACTERS]), path, {"train_config": {}})


def recomputing(model: GPT, path) -> RecomputingEngine:
    """Without a file: exporting one takes long, and test_a_plain_file_continues_texts_too has one."""
    run = lambda _, feeds: [model(torch.from_numpy(feeds["input_ids"]))[0].detach().numpy()]  # noqa: E731
    return RecomputingEngine(SimpleNamespace(config=model.config, session=lambda *_: SimpleNamespace(run=run), running=nullcontext))


def written(model: GPT, path) -> OnnxFile:
    write_onnx_cache(source_of(model, path), path)
    return OnnxFile.read(path)


ENGINES = {
    "cached": lambda model, path: CachedEngine(written(model, path)),
    "shared": lambda model, path: SharedEngine(written(model, path)),
    "recomputing": recomputing,
}


PAIRS = [(engine, shape) for engine in ("cached", "shared") for shape in WIDE] + [("recomputing", "qwen3")]  # the last knows no families


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, tmp_path_factory):
    name, shape = request.param
    return ENGINES[name](WIDE[shape], tmp_path_factory.mktemp("engine") / "model.onnx"), WIDE[shape]


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def source(request, trained_run) -> Source:
    return Source(*load_model(str(trained_run if request.param == "qwen3" else request.getfixturevalue("gpt2_run"))))


@pytest.fixture(scope="module")
def files(source, tmp_path_factory):
    """The three files of a run, as they were loaded back."""
    folder = tmp_path_factory.mktemp("files")
    writers = {"best_model_cache.onnx": write_onnx_cache, "best_model.int8.onnx": write_int8, "best_model.int4.onnx": write_int4}
    return folder, {name: write(source, folder / name) for name, write in writers.items()}


def optimum_feeds(ids: np.ndarray, mask: np.ndarray, past: dict) -> dict:
    """What ORTModelForCausalLM of Optimum hands over, positions being those of transformers' generate."""
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past


def test_names_and_shapes_are_optimum_s(source, files):
    folder, _ = files
    proto, config = onnx.load(folder / "best_model_cache.onnx"), source.model.config
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(folder / "best_model_cache.onnx", providers=["CPUExecutionProvider"])
    caches = [f"{layer}.{part}" for layer in range(config.n_layer) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{cache}" for cache in caches)]
    assert [value.name for value in session.get_inputs()] == names
    assert [value.name for value in session.get_outputs()] == ["logits", *(f"present.{cache}" for cache in caches)]
    assert {value.type for value in session.get_inputs()[:3]} == {"tensor(int64)"}
    assert session.get_inputs()[3].shape == ["batch_size", config.kv_heads, "past_sequence_length", config.head_dim]
    assert {node.domain for node in proto.graph.node} == {""}  # standard operators, for every runtime


@torch.inference_mode()
def test_a_padded_batch_as_optimum_runs_it(source, files):
    """Rows of different lengths padded on their left; a past of length 0 first, then single tokens: each row is as if alone."""
    session = onnxruntime.InferenceSession(files[0] / "best_model_cache.onnx", providers=["CPUExecutionProvider"])
    model, config = source.model, source.model.config
    texts = [torch.randint(config.vocab_size, (1, n), generator=torch.Generator().manual_seed(n)) for n in (29, 20, 12)]
    expected = [model(text)[0].numpy() for text in texts]
    begun = [20, 11, 3]
    padding = [max(begun) - n for n in begun]
    ids = np.concatenate([np.pad(text[:, :n].numpy(), ((0, 0), (pad, 0))) for text, n, pad in zip(texts, begun, padding)])
    mask = (np.arange(max(begun)) >= np.array(padding)[:, None]).astype(np.int64)
    names = [value.name.replace("present", "past_key_values") for value in session.get_outputs()[1:]]
    past = dict.fromkeys(names, np.zeros((3, config.kv_heads, 0, config.head_dim), np.float32))
    for step in range(10):
        logits, *present = session.run(None, optimum_feeds(ids, mask, past))
        assert np.isfinite(logits).all()
        for row, (n, right) in enumerate(zip(begun, expected)):
            np.testing.assert_allclose(logits[row, -1], right[0, n + step - 1], atol=1e-4, rtol=0)
        past = dict(zip(names, present))
        if step < 9:
            ids = np.stack([text[0, n + step : n + step + 1].numpy() for text, n in zip(texts, begun)])
            mask = np.concatenate((mask, np.ones((3, 1), np.int64)), axis=1)


def test_a_file_says_what_it_is(source, files):
    file = OnnxFile.read(files[0] / "best_model_cache.onnx")
    assert dataclasses.replace(file.config, n_hidden=None, n_kv_head=None, rope_theta=None) == dataclasses.replace(
        source.model.config, n_hidden=None, n_kv_head=None, rope_theta=None
    )
    assert file.tokenizer.same_ids(source.tokenizer) and file.cached and can_share(file)


def test_rounded_files_are_smaller_and_hold_the_table_once(source, files):
    folder, _ = files
    sizes = [sum(constant.ByteSize() for constant in onnx.load(path).graph.initializer) for path in map(folder.joinpath, files[1])]
    assert sizes[0] > 3 * sizes[1] > 3 * sizes[2]
    for name in ("best_model.int8.onnx", "best_model.int4.onnx"):
        graph, config = onnx.load(folder / name).graph, source.model.config
        assert sum(math.prod(constant.dims) == config.vocab_size * config.n_embd for constant in graph.initializer) == 1
        assert {node.op_type for node in graph.node} >= {"MatMulNBits", "GatherBlockQuantized"} and "MatMul" not in {
            n.op_type for n in graph.node
        }


def test_no_row_of_a_rounded_file_depends_on_its_neighbours(source, files):
    ids = torch.randint(source.model.config.vocab_size, (4, 20), generator=torch.Generator().manual_seed(0))
    for name in ("best_model.int8.onnx", "best_model.int4.onnx"):
        together, alone = files[1][name].logits(ids), torch.cat([files[1][name].logits(row[None]) for row in ids])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
        network, *_ = load_network(str(files[0] / name))
        engine = engine_of(network)
        logits = [engine.prefill(ids[:, :5]), *(engine.step(ids[:, i : i + 1])[:, 0] for i in range(5, 20))]
        torch.testing.assert_close(torch.stack(logits, dim=1), together[:, 4:], atol=1e-4, rtol=0)


def test_what_rounding_costs_is_measured(source, files, sample_dir):
    """On the files, by their runtime; 8 bits cost next to nothing, 4 bits little."""
    data = dataclasses.replace(source, options={"data_dir": (str(sample_dir),)})
    for name, most in (("best_model.int8.onnx", 0.01), ("best_model.int4.onnx", 0.04)):
        figures = measure(data, files[1][name])
        assert (
            figures["size"]
            == (files[0] / name).stat().st_size
            < figures["size_before"]
            == (files[0] / "best_model_cache.onnx").stat().st_size
        )
        assert abs(figures["loss"] / figures["loss_before"] - 1) < most
        assert figures["measured_tokens"] == len(DataDirectory(sample_dir).tokens("val")) and figures["tokens_per_second"] > 0
        assert f"{figures['bits_per_byte']:.4f} bits per byte" in sentence(figures) and "more than" not in sentence(figures)
        json.dumps(figures)


def test_a_cost_beyond_the_allowed_is_told(sample_dir, trained_run):
    source = dataclasses.replace(Source(*load_model(str(trained_run))), options={"data_dir": (str(sample_dir),)})
    files = [
        Measurable(100, lambda tokens, _, nats=nats: np.full(len(tokens), nats), None, "x", bits) for nats, bits in ((2.0, 32), (2.1, 4))
    ]
    told = sentence(measure(source, SimpleNamespace(rounded=files)))
    assert "(+5.00%, 1.00% more than 4 bits should cost)" in told and "tokens/s" not in told
    nowhere = dataclasses.replace(source, content={"train_config": {}}, options={})
    told = sentence(measure(nowhere, SimpleNamespace(rounded=files)))
    assert "quality was not measured: " in told and told.endswith("name prepared data with --data_dir")


def test_a_width_that_no_block_divides(tmp_path):
    model = GPT(dataclasses.replace(MODELS["gpt2"].config, n_embd=40, n_head=2)).eval()
    loaded = write_int8(source_of(model, tmp_path), tmp_path / "model.onnx")
    ids = torch.randint(VOCABULARY, (2, 9))
    assert (loaded.logits(ids) - model(ids)[0]).abs().max() < 0.05


def test_evaluate_measures_a_file_as_the_checkpoint(source, files, sample_dir, script, tmp_path):
    results = {}
    for checkpoint in (source.path, files[0] / "best_model_cache.onnx"):
        output = tmp_path / "out.json"
        arguments = ("--data_dir", sample_dir, "--split", "val", "--samples", 3, "--sample_tokens", 8, "--output", output)
        script("evaluate.py", "--checkpoint", checkpoint, *arguments)
        results[checkpoint.name] = json.loads(output.read_text())
        output.unlink()
        output.with_suffix(".npz").unlink()
    exact, file = results.values()
    assert file[str(sample_dir)]["val"]["loss"] == pytest.approx(exact[str(sample_dir)]["val"]["loss"], rel=1e-4)
    assert file[str(sample_dir)]["val"]["accuracy"] == pytest.approx(exact[str(sample_dir)]["val"]["accuracy"], abs=1e-3)
    (measured,), (expected,) = file["samples"].values(), exact["samples"].values()
    assert measured == {name: expected[name] for name in measured}
    network, *_ = load_network(str(files[0] / "best_model_cache.onnx"))
    requests = [(list(range(length)), list(range(9))) for length in (1, 2, 20, 20, 40)]  # what tasks ask for
    for got, right in zip(log_likelihoods(network, requests), log_likelihoods(source.model, requests), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-4)


def test_generate_continues_with_a_file(source, files, script):
    texts = []
    for checkpoint in (source.path, *(files[0] / name for name in files[1])):
        texts.append(script("generate.py", "--checkpoint", checkpoint, "--prompt", "Once", "--temperature", 0, "--max_length", 60).stdout)
    assert texts[0] == texts[1] and all(text.startswith("Once") for text in texts)


@pytest.mark.slow
def test_a_plain_file_continues_texts_too(trained_run, script, tmp_path):
    script("export_model.py", "--checkpoint", trained_run, "--format", "onnx", "--output", tmp_path)
    engine, tokenizer, path = load_engine(str(tmp_path / "best_model.onnx"))
    assert isinstance(engine, RecomputingEngine) and path.name == "best_model.onnx" and tokenizer.eot_id is not None
    texts = [
        script("generate.py", "--checkpoint", checkpoint, "--prompt", "Once", "--temperature", 0, "--max_length", 60).stdout
        for checkpoint in (trained_run, tmp_path / "best_model.onnx")
    ]
    assert texts[0] == texts[1]


def test_a_foreign_file_takes_what_lies_beside_it(source, files, mistake, tmp_path):
    proto = onnx.load(files[0] / "best_model_cache.onnx")
    texts = {prop.key: prop.value for prop in proto.metadata_props}
    del proto.metadata_props[:]
    proto.producer_name = "pytorch"
    onnx.save(proto, tmp_path / "model.onnx")
    assert "holds no config, and beside it is no config.json" in mistake(
        "generate.py", "--checkpoint", tmp_path / "model.onnx", cwd=tmp_path
    )
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    engine, *_ = load_engine(str(tmp_path / "model.onnx"))
    assert isinstance(engine, CachedEngine)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(engine.prefill(ids), source.model(ids)[0][:, -1], atol=1e-4, rtol=0)


def with_text(proto, name: str, change) -> bytes:
    text = next(prop for prop in proto.metadata_props if prop.key == name)
    text.value = change(text.value)
    return proto.SerializeToString()


def test_mistakes_are_one_sentence(source, files, mistake, tmp_path):
    whole = (files[0] / "best_model_cache.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("no file")
    other = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    other.input.add(name="x"), other.output.add(name="y")
    onnx.save(onnx.helper.make_model(other), tmp_path / "other.onnx")
    for name in ("cut", "empty", "text", "other"):
        assert f"{name}.onnx " in mistake("evaluate.py", "--checkpoint", tmp_path / f"{name}.onnx", "--samples", 1, cwd=tmp_path)
    path = files[0] / "best_model_cache.onnx"
    heads = {"n_head": 1} if source.model.config.arch == "gpt2" else {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    changes = {
        "can't be run by onnxruntime": lambda proto: with_text(proto, "config", lambda text: json.dumps(json.loads(text) | heads)),
        "its configuration is damaged": lambda proto: with_text(proto, "config", lambda text: "[" * 100_000),
        "its tokenizer is no Hugging Face tokenizer.json": lambda proto: with_text(proto, "tokenizer", lambda text: "{}"),
        "names that are not UTF-8": lambda proto: proto.SerializeToString().replace(b"Gather_0", b"\xffather_0"),
    }
    for expected, change in changes.items():
        (tmp_path / "changed.onnx").write_bytes(change(onnx.load(path)))
        assert expected in mistake("generate.py", "--checkpoint", tmp_path / "changed.onnx", "--prompt", "Once", cwd=tmp_path)
    for arguments in (
        ("export_model.py", "--checkpoint", path, "--output", tmp_path),
        ("train.py", "--init_from", path, "--data_dir", tmp_path),
    ):
        assert "is an ONNX file" in mistake(*arguments, cwd=tmp_path)


def test_the_graph_is_the_same_each_time(source):
    assert cache_graph(source).SerializeToString() == cache_graph(source).SerializeToString()
