"""README.md of an HF folder: what the model is, what it was trained on and for how long, what was measured, how to use it."""

import re
from pathlib import Path, PurePath

from utils import parse_weighted

from evaluation.held_out import model_hash
from export.slim import measured_in_training
from export.verify import Source
from formats.data_directory import SPLITS, DataDirectory
from formats.scores import SCORES, ItemScores, read_scores

FAMILIES = {"gpt2": "GPT-2", "qwen3": "Qwen3"}
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")  # this folder
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=100, do_sample=True, temperature=0.8)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```"""


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A table in Markdown; None becomes a dash."""
    written = [["-" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    lines = [header, ("---",) * len(header), *written]
    return "\n".join("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines)


def _architecture(source: Source) -> str:
    config, model = source.model.config, source.model
    rows = [
        ("family", FAMILIES[config.arch]),
        ("parameters", model.num_parameters()),
        ("blocks", config.n_layer),
        ("width", config.n_embd),
        ("attention heads", f"{config.n_head}, with {config.kv_heads} of keys and values"),
        ("width of the MLP", config.mlp_width),
        ("context in tokens", config.block_size),
        ("vocabulary", source.tokenizer.vocab_size),
    ]
    return _table(("architecture", ""), rows)


def _opened(name: str, known: dict[str, str]) -> DataDirectory | None:
    """A data directory, if it is still there and is what the model was trained on."""
    try:
        directory = DataDirectory(name)
        return directory if directory.meta and directory.fingerprint() == known else None
    except (ValueError, OSError):
        return None


def _data(source: Source) -> str | None:
    """What the model was trained on: names, and documents and bytes where the data is still there."""
    rows: list[tuple[object, ...]] = []
    origins: dict[str, None] = {}
    for name, known in zip(source.content.get("train_config", {}).get("data_dir", ()), source.content.get("data", ())):
        path, weight = parse_weighted(name)
        directory = _opened(path, {split: text for split, text in known.items() if split in SPLITS})
        counts = directory.meta["splits"]["train"] if directory else {}
        origins |= dict.fromkeys(PurePath(str(one.get("name"))).name for one in (directory.meta.get("sources", ()) if directory else ()))
        tokens = re.match(r"(\d+) tokens", known.get("train", ""))
        numbers = counts.get("documents"), counts.get("bytes"), tokens and int(tokens[1])
        rows.append((Path(path).resolve().name, weight, *numbers))
    if not rows:
        return None
    header = ("training data", "weight", "documents", "bytes of text", "tokens")
    made_of = f"\n\nMade of {', '.join([*origins][:10])}{' and others' if len(origins) > 10 else ''}." if origins else ""
    return f"## Training data\n\n{_table(header, rows)}{made_of}"


def _budget(source: Source) -> str | None:
    """How long it was trained."""
    config, step, block = source.content.get("train_config"), source.content.get("step"), source.model.config.block_size
    if not config or not step:
        return None
    windows = config["batch_size"] * config["gradient_accumulation_steps"]
    budget = f"{step:,} steps of {windows:,} windows of {block:,} tokens: {step * windows * block:,} tokens"
    origin = source.content.get("init_from") or {}
    began = f"It started from {PurePath(origin['name']).name}." if origin else "It started from random weights."
    began = f"Then it was pruned: {origin['pruned']}." if "pruned" in origin else began
    return f"## Training\n\n{budget}, with {config['optimizer']} and seed {config['seed']}. {began}"


def _known_scores(source: Source) -> dict[str, ItemScores]:
    """What evaluate.py measured of this very model and left beside it."""
    try:
        scores = read_scores(source.path.parent / SCORES)
    except (ValueError, OSError):  # the card does without
        return {}
    mine = model_hash(source.model, source.tokenizer) if scores else None
    return {name: one for name, one in scores.items() if one.model == mine}


def _interval(measure: dict) -> str:
    between = f" [{measure['low']:.4f}, {measure['high']:.4f}]" if measure.get("low") is not None else ""
    return f"{measure['value']:.4f}{between}"


def _measures(source: Source) -> str | None:
    """What was measured while training, and by evaluate.py."""
    val, scores = measured_in_training(source), _known_scores(source)
    texts = {"validation, while training": val} if val else {}
    texts |= {PurePath(name).name: one.summary for name, one in scores.items() if one.kind == "text"}
    columns = {"loss": "loss (nats per token)", "perplexity": "perplexity", "accuracy": "accuracy", "bits_per_byte": "bits per byte"}
    rows = [(name, *(None if of.get(key) is None else f"{of[key]:.4f}" for key in columns)) for name, of in texts.items()]
    tables = [_table(("measured on", *columns.values()), rows)] if rows else []
    tasks = {name: one.summary for name, one in scores.items() if one.kind == "task"}
    rows = [(name, of["metrics"][0], _interval(of["measures"][of["metrics"][0]])) for name, of in tasks.items()]
    tables += [_table(("task", "metric", "value [95% interval]"), rows)] if rows else []
    return "## Measured\n\n" + "\n\n".join(tables) if tables else None


def model_card(source: Source) -> str:
    """The text of README.md, with the front matter that the Hugging Face hub reads (huggingface.co/docs/hub/model-cards)."""
    path, step, family = source.path.resolve(), source.content.get("step"), source.model.config.arch
    name = path.name if path.is_dir() else path.parent.name
    about = f"A small language model of the {FAMILIES[family]} family with {source.model.num_parameters():,} parameters."
    begins = "The tokenizer puts `<|endoftext|>` in front of a text, as every training text began."
    front = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- {family}\n- small-language-model\n---"
    title = f"# {name or 'model'}" + (f", step {step:,}" if step else "")
    use = f"## Use\n\n{USE}\n\n{begins}"
    parts = (front, title, about, _architecture(source), _data(source), _budget(source), _measures(source), use)
    return "\n\n".join(part for part in parts if part) + "\n"
