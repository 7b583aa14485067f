"""export_model.py: what is exported computes what the model computes, or it is not kept; and nothing else is deleted for it."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import utils

import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, processors

import export_model
from config import GPTConfig
from export import verify
from export.companions import encoder, prompting_tokenizer
from export.formats import FORMATS, Format, chosen
from export.graphs import write_onnx, write_torch_export, write_torchscript
from export.slim import measured_in_training, write_slim
from export.verify import Loaded, Mismatch, Source, compare_texts, compare_tokenizers, example_ids, example_shapes, largest_difference
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.data_directory import DataDirectory
from formats.export_record import RECORD, add_record, read_record
from formats.huggingface import config_from_hf
from formats.run_directory import load_model
from formats.tokenizer import KINDS, TextTokenizer
from models import GPT, KVCache
from preparation.tokenizer_kinds import byte_tokenizer, make_tokenizer
from tests.conftest import ROOT, tiny

BYTE = byte_tokenizer()
FILES = {
    "onnx": "best_model.onnx",
    "torchscript": "best_model.ts.pt",
    "torch_export": "best_model.pt2",
    "hf": "hf",
    "pt": "best_model.slim.pt",
}
EXACT = {name: format.file.format("best_model") for name, format in FORMATS.items() if format.exact and not format.missing()}
BESIDE = ["config.json", "tokenizer.json"]
TEXT = "Once upon a time, there was a naïve frog. 人人生而自由 \n\n  \tдом 🙂"


def small_model(vocab_size: int = BYTE.vocab_size, **shape) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "arch": "qwen3", "vocab_size": vocab_size} | shape)
    ).eval()


def source_of(model: GPT, tokenizer: TextTokenizer = BYTE, path: Path = Path("model.pt")) -> Source:
    return Source(model, tokenizer, path, {"train_config": {}, "data": [], "step": 0, "tokenizer": tokenizer.json})


def run(checkpoint, *flags, output=None) -> int:
    return export_model.main(["--checkpoint", str(checkpoint), *flags, *(["--output", str(output)] if output else [])])


@functools.cache
def load(name: str, path: Path) -> Loaded:
    """An export in its own runtime, as somebody else loads it: logits, and the ids of a text by the tokenizer that it carries."""
    if name == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        carried = session.get_modelmeta().custom_metadata_map["tokenizer"]
        return Loaded(lambda ids: torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0]), encode=plain(carried))
    if name == "hf":
        transformers = pytest.importorskip("transformers")
        reference, theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)
        return Loaded(lambda ids: reference(ids).logits, encode=lambda text: theirs.encode(text, add_special_tokens=False))
    if name == "pt":
        model, tokenizer, *_ = load_model(str(path))
        return Loaded(lambda ids: model(ids)[0], encode=tokenizer.encode)
    inside = {"tokenizer": ""}
    if name == "torch_export":
        return Loaded(torch.export.load(path, extra_files=inside).module(), encode=plain(inside["tokenizer"]))
    return Loaded(torch.jit.load(path, _extra_files=inside), encode=plain(inside["tokenizer"].decode()))


def plain(text: str):
    reader = Tokenizer.from_str(text)
    return lambda text: reader.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", FILES)
def test_exports_equal_the_model_at_any_shape(exported, name):
    source, output = exported
    model, tokenizer, *_ = load_model(str(source))
    loaded = load(name, output / FILES[name])
    generator = torch.Generator().manual_seed(2)
    for shape in ((1, 1), (1, 2), (2, 1), (3, 17), (5, 31), (1, 32), (4, 32)):
        ids = torch.randint(512, shape, generator=generator)
        with torch.inference_mode():
            logits, expected = loaded.logits(ids), model(ids)[0]
        assert logits.dtype == torch.float32 and logits.shape == (*shape, 512)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_the_folder_holds_what_a_file_needs(exported):
    source, output = exported
    assert sorted(path.name for path in output.iterdir()) == sorted([*EXACT.values(), *BESIDE, RECORD])
    onnx.checker.check_model(onnx.load(output / "best_model.onnx"))
    inside = onnxruntime.InferenceSession(output / "best_model.onnx").get_modelmeta().custom_metadata_map
    model, tokenizer, *_ = load_model(str(source))
    for name in ("tokenizer", "config"):
        assert inside[name] == (output / f"{name}.json").read_text() and (output / "hf" / f"{name}.json").is_file()
    read = dataclasses.asdict(config_from_hf(json.loads(inside["config"])))
    own = dataclasses.asdict(model.config)
    assert {name: read[name] for name in ("arch", "block_size", "vocab_size", "n_layer", "n_head", "n_embd")}.items() <= own.items()
    ids = Tokenizer.from_file(str(output / "tokenizer.json")).encode(TEXT).ids
    assert ids == [tokenizer.eot_id, *tokenizer.encode(TEXT)]


def test_the_record_holds_the_figures_and_no_path(exported):
    source, output = exported
    record = read_record(output)
    assert record.keys() == {*EXACT.values(), *BESIDE}
    assert FILES.items() <= EXACT.items()
    for name, file in EXACT.items():
        entry = record[file]
        assert entry["largest_logit_difference"] <= 1e-4 and entry["greedy_tokens"] >= 5 * 16
        assert entry.get("texts_encoded") == (None if name == "html" else len(verify.TEXTS))  # only a browser runs a page's tokenizer
        assert entry.items() >= {"format": name, "checkpoint": "best_model.pt", "torch": torch.__version__}.items()
    assert str(output) not in (output / RECORD).read_text() and str(source) not in (output / RECORD).read_text()


@pytest.mark.parametrize("name", FILES)
def test_token_ids_are_equal_in_many_languages(exported, real_data, name):
    source, output = exported
    tokenizer, encode = load_model(str(source))[1], load(name, output / FILES[name]).encode
    paths = sorted((real_data / "multilingual").glob("udhr_*.txt"))
    assert len(paths) == 48
    for path in paths:
        text = path.read_text(encoding="utf-8")[:3000]
        assert encode(text) == tokenizer.encode(text), path.name


# ---------------------------------------------------------------- the HF folder


def test_transformers_continues_a_plain_prompt_as_generate_does(exported, script):
    """The EOT that begins every training text comes from the folder's own tokenizer."""
    transformers = pytest.importorskip("transformers")
    source, output = exported
    model, tokenizer = (kind.from_pretrained(output / "hf") for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    for prompt in ("Once upon a time", "The cat", ""):
        flags = ["--prompt", prompt, "--temperature", 0, "--max_new_tokens", 16, "--device", "cpu"]
        ours = script("generate.py", "--checkpoint", source, *flags).stdout
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=16, do_sample=False)
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == ours.removesuffix("\n")


def test_the_tokenizer_of_the_folder(exported, tmp_path):
    transformers = pytest.importorskip("transformers")
    source, output = exported
    ours = load_model(str(source))[1]
    (eot, ids), second = (ours.eot_id, ours.encode(TEXT)), ours.encode("two")
    theirs = transformers.AutoTokenizer.from_pretrained(output / "hf")
    theirs.save_pretrained(tmp_path)
    for tokenizer in (theirs, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(TEXT).input_ids == [eot, *ids] and tokenizer(TEXT, add_special_tokens=False).input_ids == ids
        assert tokenizer(TEXT, "two").input_ids == [eot, *ids, eot, *second]
        assert tokenizer(["two", TEXT])["input_ids"] == [[eot, *second], [eot, *ids]]
        assert tokenizer.decode([eot, *ids], skip_special_tokens=True) == TEXT and tokenizer.decode(ids) == TEXT
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == eot
    again = TextTokenizer((output / "hf" / "tokenizer.json").read_text())
    assert again.same_ids(ours) and ours.same_ids(again) and again.encode(TEXT) == ids


def test_our_scripts_read_the_folder_without_a_second_eot(exported, sample_dir, script, tmp_path):
    """Round trips: the same perplexity by evaluate.py, at step 0 of train.py --init_from, and on data prepared with its tokenizer."""
    source, output = exported
    script("prepare_data.py", "--sample", "--sample_stories", 300, "--tokenizer", output / "hf", "--output", tmp_path / "data")
    for split in ("train", "val"):
        assert (tmp_path / "data" / f"{split}.bin").read_bytes() == (sample_dir / f"{split}.bin").read_bytes()
    perplexities = []
    for checkpoint in (source, output / "hf"):
        result = tmp_path / "result.json"
        script("evaluate.py", "--checkpoint", checkpoint, "--data_dir", sample_dir, "--split", "val", "--device", "cpu", "--output", result)
        perplexities.append(json.loads(result.read_text())[str(sample_dir)]["val"]["perplexity"])
    begin = ["--data_dir", tmp_path / "data", "--out_dir", tmp_path / "run", "--max_steps", 1, "--device", "cpu", "--sample_tokens", 0]
    script("train.py", "--init_from", output / "hf", *begin)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    perplexities.append(next(line["val_perplexity"] for line in lines if line["step"] == 0))
    assert perplexities == pytest.approx([perplexities[0]] * 3, rel=1e-4)


def test_the_model_card(exported, tmp_path, script, sample_dir):
    """Its front matter is YAML; its numbers are the model's own, and evaluations of another model beside it are not."""
    import yaml

    source, output = exported
    card = (output / "hf" / "README.md").read_text()
    front = yaml.safe_load(re.fullmatch(r"---\n(.*?)\n---\n.*", card, re.DOTALL)[1])
    model, _, _, content = load_model(str(source))
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation" and model.config.arch in front["tags"]
    counts = DataDirectory(sample_dir).meta["splits"]["train"]
    for number in (model.num_parameters(), counts["documents"], counts["bytes"], counts["tokens"], content["step"] * 8 * 32):
        assert f"{number:,}" in card, number
    assert f"{content['val']['bits_per_byte']:.4f}" in card and str(source.parent) not in card
    shutil.copytree(source, tmp_path / "run")
    script("evaluate.py", "--checkpoint", tmp_path / "run", "--data_dir", sample_dir, "--split", "test", "--device", "cpu")
    loss = json.loads((tmp_path / "run" / "evaluation.json").read_text())[str(sample_dir)]["test"]["loss"]
    assert run(tmp_path / "run", "--format", "hf") == 0
    assert f"{sample_dir.name} test | {loss:.4f}" in (tmp_path / "run" / "hf" / "README.md").read_text()
    other = load_checkpoint(tmp_path / "run" / "best_model.pt")
    other["model"]["ln_f.weight"] *= 2
    save_checkpoint(tmp_path / "run" / "best_model.pt", other)
    assert run(tmp_path / "run", "--format", "hf", "--overwrite") == 0
    assert " test | " not in (tmp_path / "run" / "hf" / "README.md").read_text()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt2"])
def test_a_tokenizer_that_puts_the_eot_in_front(kind):
    """It is the same file but for that, gives the same ids, and isn't changed twice."""
    ours = make_tokenizer(kind, ["one little two little three little frogs"] * 9, 600)
    text = prompting_tokenizer(ours)
    assert prompting_tokenizer(TextTokenizer(text)) == text
    template = re.search(r'"post_processor":\s*(\{"type":"TemplateProcessing".*?\}\}\})', text)[1]
    assert text.replace(template, "null") == ours.json
    assert TextTokenizer(text).same_ids(ours) and encoder(text, ours.eot_id)("two frogs") == ours.encode("two frogs")


@pytest.mark.parametrize("indent", [None, 2])
def test_what_else_a_tokenizer_does_behind_a_text_stays(indent):
    content = json.loads(BYTE.json)
    content["post_processor"] = json.loads(processors.ByteLevel(trim_offsets=False).__getstate__())
    other = TextTokenizer(json.dumps(content, indent=indent))
    added = json.loads(prompting_tokenizer(other))["post_processor"]
    assert added["type"] == "Sequence" and [part["type"] for part in added["processors"]] == ["ByteLevel", "TemplateProcessing"]
    assert encoder(prompting_tokenizer(other), other.eot_id)("a b") == [97, 32, 98]
    del content["post_processor"]
    assert encoder(prompting_tokenizer(TextTokenizer(json.dumps(content))), other.eot_id)("a b") == [97, 32, 98]


# ---------------------------------------------------------------- a slim checkpoint


def test_a_step_checkpoint_becomes_slim(trained_run, sample_dir, tmp_path, script, mistake):
    newest = shutil.copy(trained_run / "step_00000030.pt", tmp_path)
    shutil.copy(trained_run / "metrics.jsonl", tmp_path)
    assert run(newest, "--format", "pt") == 0
    slim = tmp_path / "step_00000030.slim.pt"
    assert slim.stat().st_size < 0.6 * os.path.getsize(newest)
    content, full, best = load_checkpoint(slim), load_checkpoint(Path(newest)), load_checkpoint(trained_run / "best_model.pt")
    assert content.keys() == full.keys() - {"resume"} | {"val"} and best["step"] == 30 and content["val"] == best["val"]
    assert all(torch.equal(content["model"][name], weight) for name, weight in full["model"].items())
    assert all(content[name] == full[name] for name in content if name not in ("model", "val"))
    out = script("generate.py", "--checkpoint", slim, "--prompt", "Once", "--temperature", 0, "--device", "cpu").stdout
    assert out == script("generate.py", "--checkpoint", newest, "--prompt", "Once", "--temperature", 0, "--device", "cpu").stdout
    assert "weights only" in mistake("train.py", "--data_dir", sample_dir, "--resume", slim, cwd=tmp_path)


def test_what_a_log_says_counts_only_where_it_is_the_run_s(trained_run, tmp_path):
    newest = shutil.copy(trained_run / "step_00000030.pt", tmp_path)
    source = Source(*load_model(newest))
    assert measured_in_training(source) is None  # no log
    log = (trained_run / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(log.replace('"loss": ', '"loss": 1'))
    assert measured_in_training(source) is None
    (tmp_path / "metrics.jsonl").write_text(log + '{"step": 31, "val_loss": 1.0}\n')
    assert measured_in_training(source) == load_checkpoint(trained_run / "best_model.pt")["val"]
    source.content["resume"]["ema"] = source.content["model"]  # those were evaluated
    assert measured_in_training(source) is None


# ---------------------------------------------------------------- checks that fail


class Recording:
    """An engine on the eager network, with a cache; wrong by `error` at each step after the first."""

    def __init__(self, model: GPT, error: float = 0.0):
        self.config, self.model, self.error = model.config, model, error

    def prefill(self, ids, lengths):
        self.caches = [KVCache(self.config, 1) for _ in ids]
        return torch.stack([self.model(row[None, :n], kv_cache=cache)[0][0, -1] for row, n, cache in zip(ids, lengths, self.caches)])

    def step(self, ids):
        logits = torch.cat([self.model(row[None], kv_cache=cache)[0] for row, cache in zip(ids, self.caches)])
        return logits + self.error


def changed(model: GPT, change):
    """What computes the model's logits, but where `change` (logits, ids) puts others."""
    return Loaded(lambda ids: change(model(ids)[0].clone(), ids), encode=BYTE.encode)


def nan_at_the_end(logits, ids):
    logits[:, -1, 0] = torch.nan
    return logits


WRONG = {
    "logits differ by up to 1.0e-03": lambda model: changed(model, lambda logits, ids: logits + 1e-3),
    "logits differ by up to inf": lambda model: changed(model, nan_at_the_end),
    "by up to inf (": lambda model: changed(model, lambda logits, ids: logits[:, :1]),
    "behind '' differ by": lambda model: changed(model, lambda logits, ids: logits + (ids.size(1) == 20)),  # no shape of the first check
    "with its cache differ by 1.0e-03": lambda model: dataclasses.replace(
        changed(model, lambda logits, ids: logits), engine=Recording(model, 1e-3)
    ),
    "its tokenizer gives 'All human": lambda model: dataclasses.replace(
        changed(model, lambda logits, ids: logits), encode=lambda text: [1]
    ),
    "puts no <|endoftext|> in front": lambda model: dataclasses.replace(
        changed(model, lambda logits, ids: logits), encode=encoder(BYTE.json, BYTE.eot_id)
    ),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_is_not_the_same_model_is_deleted(tmp_path, monkeypatch, capsys, sentence):
    model = small_model()
    checkpoint = tmp_path / "model.pt"
    write_slim(source_of(model, path=checkpoint), checkpoint)

    def wrong(source, path):
        write_slim(source, path)
        return WRONG[sentence](model)

    monkeypatch.setattr("export.slim.write_slim", wrong)
    assert run(checkpoint, "--format", "pt", output=tmp_path / "o") == 1
    assert not (tmp_path / "o").exists()
    found = capsys.readouterr().err.splitlines()[-1]
    assert found.startswith("error: pt: ") and found.endswith("; the new model.slim.pt was deleted")
    assert sentence in found


def test_a_cache_that_is_right_passes_and_its_figure_is_kept():
    for arch in ("qwen3", "gpt2"):
        model = small_model(arch=arch)
        figures = compare_texts(source_of(model), model, Loaded(lambda ids: model(ids)[0], Recording(model)), 1e-4)  # noqa: B023
        assert figures["greedy_tokens"] == 5 * 17 and figures["greedy_ties"] == 0 and 0 < figures["largest_difference_with_cache"] < 1e-5


def test_two_tokens_within_the_tolerance_are_a_tie_and_no_failure():
    """All tokens but one have the same logits, so that rounding chooses among them; another one outside of the tolerance does not pass."""
    model = small_model()
    model.wte.weight.data[1:] = model.wte.weight.data[1].clone()
    tie = torch.zeros(BYTE.vocab_size).index_fill(0, torch.tensor([7]), 5e-5)
    figures = compare_texts(source_of(model), model, changed(model, lambda logits, ids: logits + tie), 1e-4)
    assert figures["greedy_ties"] > 0
    with pytest.raises(Mismatch, match=r"differ by 5\.0e-04"):
        compare_texts(source_of(model), model, changed(model, lambda logits, ids: logits + 10 * tie), 1e-4)


def test_rounded_numbers_are_held_to_their_reference():
    model, rounded = small_model(), small_model()
    rounded.ln_f.weight.data *= 1.01
    with verify.tqdm(disable=True) as bar:
        loaded = Loaded(lambda ids: rounded(ids)[0], encode=BYTE.encode, reference=rounded)
        assert verify.verify(source_of(model), loaded, False, bar)["largest_logit_difference"] == 0
        figures = verify.verify(source_of(model), dataclasses.replace(loaded, reference=None), False, bar)
        assert figures["largest_logit_difference"] > 1e-4 and "greedy_tokens" not in figures
        for exact, reference in ((True, None), (False, model)):
            with pytest.raises(Mismatch):
                verify.verify(source_of(model), dataclasses.replace(loaded, reference=reference), exact, bar)
        with pytest.raises(Mismatch):
            verify.verify(source_of(model), Loaded(lambda ids: nan_at_the_end(rounded(ids)[0].clone(), ids)), False, bar)


def test_tokenizers_are_compared_in_many_scripts():
    """All kinds pass, and a normalizer that isn't the model's is found."""
    for tokenizer in (make_tokenizer(kind, ["one little two little three little frogs"], 600) for kind in KINDS if kind != "gpt2"):
        source = source_of(small_model(tokenizer.vocab_size), tokenizer)
        assert compare_tokenizers(source, encoder(prompting_tokenizer(tokenizer), tokenizer.eot_id)) == len(verify.TEXTS)
    assert len(set(map(tuple, map(BYTE.encode, verify.TEXTS)))) == len(verify.TEXTS)
    with pytest.raises(Mismatch, match="its tokenizer gives 'cafe"):
        compare_tokenizers(source_of(small_model()), lambda text: BYTE.encode(unicodedata.normalize("NFC", text)))


def test_the_tolerance_grows_with_the_logits():
    model = GPT(GPTConfig.nano(n_layer=1, n_embd=32, block_size=16, vocab_size=100)).eval()
    for scale, allowed in ((0.0, 1e-4), (1e4, None)):
        model.ln_f.weight.data.fill_(scale)
        largest = max(1.0, max(model(example_ids(model, *shape))[0].abs().max().item() for shape in example_shapes(16)))
        difference, tolerance = largest_difference(model, lambda ids, model=model, by=largest: model(ids)[0] + 5e-5 * by)
        assert tolerance == pytest.approx(allowed or 1e-4 * largest) and difference == pytest.approx(tolerance / 2, rel=1e-2)
    assert largest > 100


# ---------------------------------------------------------------- shapes of models


ARCHITECTURES = [{"arch": "gpt2"}, {"arch": "gpt2", "flash": False}, {"arch": "qwen3", "n_kv_head": 1}, {"arch": "qwen3", "flash": False}]


@pytest.mark.parametrize("shape", ARCHITECTURES, ids=str)
def test_torchscript_follows_the_device_of_its_input(tmp_path, shape):
    """A device in the graph, from the machine that traced it, would end it anywhere else. Constants without dimensions go everywhere."""
    model = small_model(**shape)
    loaded = write_torchscript(source_of(model), tmp_path / "model.ts.pt").logits
    ids = torch.randint(100, (3, 17))
    assert torch.allclose(loaded(ids), model(ids)[0], atol=1e-6)
    code, constants = loaded.code_with_constants
    assert "device=_" in code and '"cpu"' not in code and "cpu" not in str(loaded.inlined_graph)
    assert all(value.dim() == 0 for value in vars(constants)["const_mapping"].values())


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("write", [write_onnx, write_torchscript, write_torch_export])
def test_the_shortest_contexts(tmp_path, block_size, write):
    for shape in ARCHITECTURES[1:3]:
        model = small_model(block_size=block_size, **shape)
        source = source_of(model)
        with verify.tqdm(disable=True) as bar:
            figures = verify.verify(source, write(source, tmp_path / "model.pt2"), True, bar)
        assert figures["greedy_tokens"] == 5 * (block_size + 1 - max(1, block_size // 2))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "medium"])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("write", [write_onnx, write_torchscript, write_torch_export])
def test_large_models_with_large_logits_pass(tmp_path, preset, arch, write):
    """Random weights with logits of about 100, as published GPT-2 has them."""
    torch.manual_seed(0)
    model = GPT(getattr(GPTConfig, preset)(arch=arch, vocab_size=5000)).eval()
    with torch.inference_mode():
        logits = model(example_ids(model, 1, 64))[0]
    model.ln_f.weight.data.mul_(100 / logits.abs().max())
    difference, allowed = largest_difference(model, write(source_of(model), tmp_path / "model.pt2").logits)
    print(f"{preset} {arch} {write.__name__}: {difference:.2e}, allowed {allowed:.2e}")
    assert difference <= allowed and allowed > 5e-3


# ---------------------------------------------------------------- names, and what may be replaced


def test_an_export_is_replaced_only_when_asked(trained_run, tmp_path, mistake, capsys):
    arguments = ["--checkpoint", trained_run, "--format", "pt", "torchscript", "--output", tmp_path]
    assert export_model.main([*map(str, arguments)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert "was exported before; replace it with --overwrite" in mistake("export_model.py", *arguments, cwd=tmp_path)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert export_model.main([*map(str, arguments), "--overwrite"]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"best_model.slim.pt", "best_model.ts.pt", RECORD}
    (tmp_path / "mine.slim.pt").write_text("mine")
    shutil.copy(trained_run / "best_model.pt", tmp_path / "mine.pt")
    foreign = ["--checkpoint", tmp_path / "mine.pt", "--format", "pt", "--overwrite"]
    assert "so it is no export to replace" in mistake("export_model.py", *foreign, cwd=tmp_path)
    assert (tmp_path / "mine.slim.pt").read_text() == "mine"


def test_what_lies_beside_a_file_replaces_nothing(trained_run, gpt2_run, tmp_path, mistake):
    """Beside a run's own files nothing more is written; elsewhere it is checked and recorded like an export."""
    own = tmp_path / "run"
    shutil.copytree(trained_run, own)
    config = (own / "config.json").read_bytes()
    assert run(own, "--format", "torchscript") == 0
    assert (own / "config.json").read_bytes() == config and read_record(own).keys() == {"best_model.ts.pt"}
    shared = tmp_path / "shared"
    assert run(trained_run, "--format", "torchscript", output=shared) == 0
    other = shutil.copy(gpt2_run / "best_model.pt", tmp_path / "other.pt")
    another = ["--checkpoint", other, "--format", "torchscript", "--output", shared]
    assert "config.json was exported before" in mistake("export_model.py", *another, cwd=tmp_path)
    assert not (shared / "other.ts.pt").exists()
    assert run(other, "--format", "torchscript", "--overwrite", output=shared) == 0
    assert json.loads((shared / "config.json").read_text())["model_type"] == "gpt2"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    refused = mistake("export_model.py", *another[:-1], foreign, "--overwrite", cwd=tmp_path)
    assert "config.json is not in export.json" in refused and [path.name for path in foreign.iterdir()] == ["config.json"]


def test_a_training_replaces_what_it_exported(tmp_path, trained_run, sample_dir, script):
    directory = tmp_path / "run"
    shutil.copytree(trained_run, directory)
    same = tiny(data_dir=sample_dir, out_dir=directory, max_steps=30, eval_interval=15, checkpoint_interval=10)
    written = {"pt": "best_model.slim.pt", "torchscript": "best_model.ts.pt", "onnx_cache": "best_model_cache.onnx", "hf": "hf"}
    written |= {"html": "best_model.html", "gguf": "best_model.gguf", "onnx_int8": "best_model.int8.onnx"}
    (directory / "mine.gguf").write_text("mine")
    for _ in range(2):
        assert "greedy tokens the same" in script("train.py", *same, "--export", *written).stdout
    assert "unknown format gif" in script("train.py", *same, "--export", "gif", code=2).stderr
    later = [*same, "--overwrite", "--max_steps", 1]
    del later[later.index("--max_steps") : later.index("--max_steps") + 2]
    assert all((directory / name).exists() for name in (*written.values(), RECORD))
    script("train.py", *later)
    assert not {*written.values(), RECORD} & {path.name for path in directory.iterdir()}
    assert (directory / "mine.gguf").read_text() == "mine"


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
    flags = ["--format", "onnx", format, "--output", tmp_path, "--overwrite"]
    assert "so it is no export to replace" in mistake("export_model.py", "--checkpoint", trained_run, *flags, cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({name, "hf.tmp"}) and (tmp_path / name / "notes").read_text() == "mine"


def test_the_source_is_never_the_target(trained_run, tmp_path, mistake):
    """Not even where the record says that it was exported."""
    models = tmp_path / "models"
    assert run(trained_run, "--format", "hf", output=models) == 0
    shutil.copy(trained_run / "best_model.pt", models / "hf")
    for source in ("models/hf", "models/hf/best_model.pt"):
        flags = ["--format", "hf", "--output", models, "--overwrite"]
        assert "is what would be exported" in mistake("export_model.py", "--checkpoint", source, *flags, cwd=tmp_path)
    assert (models / "hf" / "model.safetensors").is_file() and (models / "hf" / "best_model.pt").is_file()


# ---------------------------------------------------------------- the table of formats


def test_all_means_what_can_be_written_here(trained_run, tmp_path, monkeypatch, capsys):
    """What is left out is told with its reason; asked for by name it is a mistake."""
    table = {"pt": FORMATS["pt"], "far": Format("{}.far", "nowhere:at_all", "far away", packages=("no-such-package",))}
    table["strange"] = Format("{}.s", "nowhere:at_all", "strange", fits="tests.test_export:never")
    monkeypatch.setattr("export.formats.FORMATS", table)
    checkpoint = tmp_path / "model.pt"
    write_slim(source_of(small_model(), path=checkpoint), checkpoint)
    assert export_model.export(checkpoint, ["all"], tmp_path / "o", False)
    assert [path.name for path in (tmp_path / "o").glob("model*")] == ["model.slim.pt"]
    told = capsys.readouterr().err
    assert "far is left out: run: pip install no-such-package" in told and "strange is left out: it never fits" in told
    for name, sentence in (("far", "pip install no-such-package"), ("strange", "it never fits")):
        with pytest.raises(ValueError, match=sentence):
            export_model.export(checkpoint, [name], tmp_path / "p", False)
    assert not (tmp_path / "p").exists()


def never(source: Source) -> str:
    return "it never fits"


def test_data_for_measuring_is_that_of_the_training_or_named(trained_run, sample_dir, tmp_path):
    model, tokenizer, path, content = load_model(str(trained_run))
    assert [data.name for data in Source(model, tokenizer, path, content).data] == [str(sample_dir)]
    gone = content | {"train_config": content["train_config"] | {"data_dir": (str(tmp_path / "gone"),)}}
    with pytest.raises(ValueError, match="--data_dir"):
        Source(model, tokenizer, path, gone).data  # noqa: B018
    assert Source(model, tokenizer, path, gone, {"data_dir": (str(sample_dir),)}).data[0].name == str(sample_dir)
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        Source(small_model(), BYTE, path, gone, {"data_dir": (str(sample_dir),)}).data  # noqa: B018


def test_help_names_every_format_and_loads_no_runtime():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import export_model, train; from export.formats import chosen; chosen(['all']); "
    )
    code += "found = {'onnx', 'onnxscript', 'onnxruntime', 'transformers'} & sys.modules.keys(); print(found); sys.exit(bool(found))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def test_every_format_has_a_line_of_help(script):
    out = " ".join(script("export_model.py", "--help").stdout.split())
    assert all(f"{name} {format.file.format('best_model')} {format.help}" in out for name, format in FORMATS.items())


# ---------------------------------------------------------------- faults


FAST_FORMATS = ["torchscript", "hf", "pt", "html", "onnx_cache", "onnx_int8", "gguf", "gguf_q8_0"]
FAST_FORMATS += [pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "torch_export")]


@pytest.mark.parametrize("format", FAST_FORMATS)
def test_a_full_disk_ends_an_export_and_leaves_nothing(trained_run, small_disk, mistake, format):
    (small_disk / "mine").write_bytes(bytes(600_000))
    flags = ["--checkpoint", trained_run, "--format", format, "--output", small_disk]
    assert re.search("No space left on device|is the disk full", mistake("export_model.py", *flags, cwd=small_disk))
    assert [path.name for path in small_disk.iterdir()] == ["mine"]


@pytest.mark.parametrize("format", FAST_FORMATS)
def test_an_interrupted_export_leaves_nothing(trained_run, tmp_path, monkeypatch, format):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(SystemExit) as code:
        utils.run_script(lambda: run(trained_run, "--format", format, output=tmp_path))
    assert code.value.code == 130 and not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(mistake, trained_run, tmp_path):
    assert "'gif'" in mistake("export_model.py", "--format", "gif", "--checkpoint", trained_run, cwd=tmp_path)
    assert "--format needs at least one of onnx" in mistake("export_model.py", "--format", "--checkpoint", trained_run, cwd=tmp_path)
    assert "no checkpoint at" in mistake("export_model.py", "--format", "onnx", cwd=tmp_path)
    with pytest.raises(ValueError, match="unknown format gif"):
        chosen(["onnx", "gif"])
    for flags, sentence in {
        ("--format", "pt", "--html_weights", "int8"): "only --format html has --html_weights",
        ("--format", "pt", "--data_dir", "x"): "--data_dir is for rounding and pruning",
        ("--format", "onnx_int8", "--data_dir", "nowhere"): "no data directory at nowhere",
    }.items():
        refused = mistake("export_model.py", "--checkpoint", trained_run, *flags, "--output", tmp_path / "o", cwd=tmp_path)
        assert sentence in refused and not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["best_model.ts.pt", "best_model.pt2", "best_model.gguf", "best_model.html"])
def test_what_only_others_read_is_no_checkpoint(mistake, tmp_path, name):
    (tmp_path / name).touch()
    for program in ("generate.py", "export_model.py"):
        assert "was exported for other programs" in mistake(program, "--checkpoint", name, cwd=tmp_path)


def test_what_does_not_fit_is_told_before_a_model_is_pruned(trained_run, mistake, tmp_path, monkeypatch):
    monkeypatch.setattr("export.gguf_file.why_not", never)
    flags = ["--checkpoint", trained_run, "--format", "gguf", "--prune", 0.5, "--output", tmp_path / "o"]
    monkeypatch.setattr(export_model, "pruned", lambda *_: pytest.fail("pruned"))
    assert "it never fits" in mistake("export_model.py", *flags, cwd=tmp_path)


def test_libraries_say_nothing_of_their_own(trained_run, tmp_path, script):
    """gguf and onnxruntime's quantizer log each step, the latter by setting up logging for the whole process."""
    said = script("export_model.py", "--checkpoint", trained_run, "--format", "onnx_int8", "gguf", "html", "--output", tmp_path).stderr
    assert len(said.splitlines()) == 2 and "int8 weights cost" in said
