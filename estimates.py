"""What a training will cost: memory and time, estimated before it starts."""

import statistics
import time

import torch

from config import TrainConfig
from models import GPT
from token_files import TrainingData

LIBRARIES = 0.3e9  # what Python and torch take before the first tensor


def memory_estimate(model: GPT, config: TrainConfig, dtype) -> float:
    """Bytes at the peak of a training step, roughly: weights, gradients and optimizer state in float32, activations, logits, libraries."""
    groups = model.parameter_groups(muon=config.optimizer == "muon")
    states = 12 * sum(p.numel() for p in groups["muon"]) + 16 * sum(p.numel() for p in groups["decay"] + groups["no_decay"])
    shape, element = model.config, 4 if dtype == torch.float32 else 2
    per_token = shape.n_layer * (8 * shape.n_embd + element * (8 * shape.n_embd + 3 * shape.mlp_width)) + shape.vocab_size * (
        8 + 2 * element
    )
    return LIBRARIES + states + config.batch_size * shape.block_size * per_token


def seconds_per_step(model: GPT, data: TrainingData, config: TrainConfig, device: str, dtype) -> float:
    """Seconds of an optimizer step without compilation: forward and backward passes over at most 4,096 tokens, scaled to the batch.

    The median of up to five passes, but no more than fit into two seconds, after one to warm up. Weights stay as they are.
    """
    rows = min(config.batch_size, max(1, 4096 // model.config.block_size))
    batch = torch.from_numpy(data.batch(0, rows).astype("int64")).to(device)
    times: list[float] = []
    while len(times) < 2 or (len(times) < 6 and sum(times) < 2):
        started = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            _, loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / rows * config.batch_size * config.gradient_accumulation_steps


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
