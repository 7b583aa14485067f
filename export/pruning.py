"""A smaller or sparser model of the same family out of a trained one: every format, reference and script takes it.

Layers go first, then neurons of the MLPs, then single weights, each chosen in what the step before left. The same call gives the same
model. What each way costs, and what training gives back afterwards: MEASUREMENTS.md.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from utils import Checked, Natural, ProperFraction

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import GPTConfig
from evaluation.held_out import Prefix, model_hash, split_prefix
from evaluation.measures import check_finite, score_tokens, summarize
from export.verify import Source
from formats.data_directory import DataDirectory
from models import GPT

SAMPLE_TOKENS = 50_000  # of training data to choose neurons by, and of validation data to choose layers and measure the cost by
ROWS = 8  # windows read at once
MULTIPLE = 32  # quantised formats store weights in blocks of 32: GGUF's q8_0 and q4_0, ONNX's int4


@dataclass(frozen=True)
class Pruning(Checked):
    """What is taken out of the model before it is written; flags of export_model.py."""

    prune: ProperFraction = 0.0
    """Share of the weights inside the blocks that become zero: the smallest ones. The shape stays, so nothing gets faster."""
    prune_scope: Literal["matrix", "global"] = "matrix"
    """For --prune: the smallest of each matrix, or of all of them together."""
    prune_mlp: ProperFraction = 0.0
    """Share of the neurons that is removed from every block's MLP: those that matter least on training data."""
    prune_layers: Natural = 0
    """How many layers are removed: one after the other the one without which the validation loss is lowest."""

    def problems(self) -> list[str]:
        scope = type(self).prune_scope
        return [] if self.prune or self.prune_scope == scope else ["only --prune needs --prune_scope; say how much, e.g. --prune 0.3"]

    def __bool__(self) -> bool:
        return bool(self.prune or self.prune_mlp or self.prune_layers)


# ---------------------------------------------------------------- what is taken out


def network(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    model = GPT(config)
    model.load_state_dict(weights)
    return model.eval()


def with_zeros(model: GPT, share: float, scope: str) -> GPT:
    """The model in which the smallest weights of the matrices inside the blocks are 0: exactly `share` of them, rounded to a whole number;
    more only where more were 0 before.

    Magnitude pruning (Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"). The token table keeps its
    weights: it is also the output layer, and zeros there cost more (MEASUREMENTS.md).
    """
    weights = model.state_dict()
    matrices = [name for name, weight in weights.items() if name.startswith("h.") and weight.dim() == 2]
    for names in [matrices] if scope == "global" else [[name] for name in matrices]:
        values = torch.cat([weights[name].flatten() for name in names])
        values[values.abs().argsort(stable=True)[: round(share * len(values))]] = 0
        parts = values.split([weights[name].numel() for name in names])
        weights |= {name: part.view_as(weights[name]) for name, part in zip(names, parts, strict=True)}
    return network(model.config, weights)


@torch.inference_mode()
def importance(model: GPT, rows: Tensor) -> Tensor:
    """How much each neuron of each block's MLP matters, (n_layer, mlp_width) float32: the root of its mean squared activation, times the
    norm of the weights by which it enters the residual stream.

    Squared, these are Wanda's scores (Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", section 3),
    summed over a neuron's output weights. rows: token ids (B, T) int64.
    """
    squares = torch.zeros(model.config.n_layer, model.config.mlp_width)

    def adding(layer: int) -> Callable:
        def add(_, inputs: tuple[Tensor]) -> None:  # what it returned would take the place of the activations
            squares[layer] += inputs[0].square().sum(dim=(0, 1))

        return add

    hooks = [block.mlp.c_proj.register_forward_pre_hook(adding(layer)) for layer, block in enumerate(model.h)]
    try:
        for batch in tqdm(rows.split(ROWS), desc="neurons", unit="batch", disable=None, leave=False):
            model.features(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return (squares / rows.numel()).sqrt() * torch.stack([block.mlp.c_proj.weight.norm(dim=0) for block in model.h])


def remaining_width(config: GPTConfig, share: float) -> int:
    """Neurons left in each MLP: rounded down to a multiple of 32. Raises ValueError where none would be left."""
    width = config.mlp_width
    left = int(width * (1 - share) + 1e-6) // MULTIPLE * MULTIPLE
    if left == 0:
        most = f"pass at most {1 - MULTIPLE / width:.4g}" if width > MULTIPLE else "leave it out"
        raise ValueError(f"prune_mlp={share} would leave nothing of an MLP of {width} neurons, which go in steps of {MULTIPLE}; {most}")
    return left


def with_fewer_neurons(model: GPT, share: float, rows: Tensor) -> GPT:
    """The model without `share` of the neurons of every MLP, the least important ones. rows: as `importance` takes them.

    A gated neuron is a row of gate, a row of up and a column of the output matrix. Raises ValueError where no neuron would be left.
    """
    weights, left = model.state_dict(), remaining_width(model.config, share)
    for layer, scores in enumerate(importance(model, rows)):
        kept = scores.argsort(descending=True, stable=True)[:left].sort().values
        stacked = torch.cat((kept, kept + len(scores))) if model.h[layer].mlp.gated else kept
        mlp = f"h.{layer}.mlp"
        weights |= {name: weights[name][stacked] for name in (f"{mlp}.c_fc.weight", f"{mlp}.c_fc.bias") if name in weights}
        weights[f"{mlp}.c_proj.weight"] = weights[f"{mlp}.c_proj.weight"][:, kept]
    return network(replace(model.config, n_hidden=left), weights)


def without_layer(model: GPT, layer: int) -> GPT:
    """The model that passes over a layer."""
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("h.")}
    blocks = [block for number, block in enumerate(model.h) if number != layer]
    weights |= {f"h.{number}.{name}": weight for number, block in enumerate(blocks) for name, weight in block.state_dict().items()}
    return network(replace(model.config, n_layer=len(blocks)), weights)


def with_fewer_layers(model: GPT, count: int, loss: Callable[[GPT], float]) -> tuple[GPT, list[int]]:
    """The model without `count` layers, chosen one after the other as those without which `loss` is lowest; and their numbers from 0.

    Raises ValueError where no layer would be left.
    """
    layers, removed = [*range(model.config.n_layer)], []
    if count >= len(layers):
        raise ValueError(f"prune_layers={count}, but the model has {len(layers)} layers and one must stay; pass at most {len(layers) - 1}")
    with tqdm(total=sum(len(layers) - done for done in range(count)), desc="layers", unit="layer", disable=None, leave=False) as bar:
        for _ in range(count):
            losses = []
            for layer in range(len(layers)):
                losses.append(loss(without_layer(model, layer)))
                bar.update()
            least = int(np.argmin(losses))
            model = without_layer(model, least)
            removed.append(layers.pop(least))
    return model, removed


# ---------------------------------------------------------------- the data, and all of it


def sample_windows(directories: list[DataDirectory], block_size: int) -> Tensor:
    """About SAMPLE_TOKENS training tokens as windows (B, T) int64, from each directory as many; always the same ones.

    T is block_size, or what the smallest directory has. Raises ValueError, FileNotFoundError.
    """
    splits = [directory.tokens("train") for directory in directories]
    length = min(block_size, *map(len, splits))
    random, rows = np.random.default_rng(0), []
    for tokens in splits:
        windows, wanted = len(tokens) // length, max(1, SAMPLE_TOKENS // (length * len(splits)))
        starts = length * np.sort(random.choice(windows, min(windows, wanted), replace=False))
        rows += [tokens[start : start + length].astype(np.int64) for start in starts]
    return torch.from_numpy(np.stack(rows))


def measure(model: GPT, source: Source, prefix: Prefix) -> dict[str, float | None]:
    """Loss and bits per byte (None where they have no meaning) on the beginning of a validation split. model: the source's, or made of it.

    Raises ValueError for weights that give no probabilities.
    """
    score = score_tokens(model, prefix.tokens, source.tokenizer.eot_id)
    check_finite(score, source.path)
    summary = summarize(score, prefix.n_bytes)
    return {name: summary[name] for name in ("loss", "bits_per_byte")}


def smaller(source: Source, asked: Pruning, loss: Callable[[GPT], float]) -> tuple[GPT, list[str]]:
    """The pruned model, and in words what was done to it. loss: on validation data. Raises ValueError."""
    model, done = source.model, []
    config = model.config
    if asked.prune_mlp:
        remaining_width(config, asked.prune_mlp)  # refused before the search for layers takes its time
    if asked.prune_layers:
        model, removed = with_fewer_layers(model, asked.prune_layers, loss)
        done.append(f"without layer{'s' * (len(removed) > 1)} {', '.join(map(str, removed))} of 0 to {config.n_layer - 1}")
    if asked.prune_mlp:
        model = with_fewer_neurons(model, asked.prune_mlp, sample_windows(source.data, config.block_size))
        done.append(f"{model.config.mlp_width} of {config.mlp_width} neurons left in each MLP")
    if asked.prune:
        model = with_zeros(model, asked.prune, asked.prune_scope)
        done.append(f"zeros: {asked.prune:g} of the weights inside the blocks (by {asked.prune_scope})")
    return model, done


def pruned(source: Source, asked: Pruning, output: Path) -> tuple[Source, dict]:
    """What is exported in place of the source, and what export.json says of it: what was done, and loss and bits per byte before and after.

    Raises ValueError for amounts that this model can't lose, for an output where the model's own exports stand, and without its data.
    """
    if output.resolve() == source.path.resolve().parent:
        raise ValueError(f"{output} is where exports of the whole model stand; choose another --output for the pruned one")
    prefix = split_prefix(source.data[0], "val", SAMPLE_TOKENS)
    before = measure(source.model, source, prefix)
    model, done = smaller(source, asked, lambda tried: measure(tried, source, prefix)["loss"])
    after = measure(model, source, prefix)
    unit, name = ("loss", "nats per token") if before["bits_per_byte"] is None else ("bits_per_byte", "bits/byte")
    where = f"the first {len(prefix.tokens):,} validation tokens of {Path(source.data[0].name).resolve().name}"
    done += [f"{source.model.num_parameters():,} -> {model.num_parameters():,} parameters"]
    done += [f"{before[unit]:.4f} -> {after[unit]:.4f} {name} on {where}"]
    print(f"pruned: {'; '.join(done)}")
    earlier = (source.content.get("init_from") or {}).get("pruned")
    origin = {"name": str(source.path), "sha256": model_hash(source.model, source.tokenizer)}
    origin["pruned"] = "; then ".join(filter(None, [earlier, "; ".join(done)]))
    content = {key: value for key, value in source.content.items() if key not in ("resume", "val")}  # they are of another model
    content |= {"model_config": asdict(model.config), "model": model.state_dict(), "init_from": origin}
    amounts = {key: value for key, value in asdict(asked).items() if value and (key != "prune_scope" or asked.prune)}
    return replace(source, model=model, content=content), {"pruned": amounts | {"what": origin["pruned"], "before": before, "after": after}}
