"""What a training will cost: memory and time, estimated before it starts."""

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from config import GPTConfig, TrainConfig
from formats.data_directory import TrainingData
from models import CHUNK, GPT, GPU_CHUNK, NextTokenLoss
from utils import choose_compile, choose_precision

# Bytes kept for the backward pass per token and block, in units of n_embd and of the MLP's width: measured (MEASUREMENTS.md).
# Without compilation qwen3's norms and rotations keep copies in float32; compiled, it needs no more than gpt2.
ACTIVATIONS = {("gpt2", 2): (22, 7), ("gpt2", 4): (36, 11), ("qwen3", 2): (95, 10), ("qwen3", 4): (112, 18)}
ATTENTION_PROBABILITY = 24  # bytes for each, where they are held: with dropout and without the fused kernel
LIBRARIES = 0.45e9  # what Python and torch take before the first tensor
PEAK_FLOPS = {  # dense bfloat16 or float16 with tensor cores, from the makers' data sheets; the first name that fits counts
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "T4": 65e12,
    "V100": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device: str) -> float | None:
    """The GPU's floating-point operations per second in half precision, None where it isn't known."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def memory_estimate(model: GPT, config: TrainConfig, dtype: torch.dtype, micro_batch: int, device: str, compiled: bool) -> float:
    """Bytes at the peak of a training step, roughly: libraries, weights with gradients and optimizer state, activations, logits."""
    groups = model.parameter_groups(muon=config.optimizer == "muon")
    element = 4 if dtype == torch.float32 else 2
    each = (
        4 + 4 + 4 * bool(config.ema_decay) + (element if element < 4 else 0)
    )  # weights, gradients, running mean, copies in half precision
    states = (each + 4) * sum(p.numel() for p in groups["muon"]) + (each + 8) * sum(p.numel() for p in groups["decay"] + groups["no_decay"])
    shape, tokens = model.config, micro_batch * model.config.block_size
    of_width, of_mlp = ACTIVATIONS["gpt2" if compiled else shape.arch, element]
    per_block = of_width * shape.n_embd + of_mlp * shape.mlp_width
    if shape.dropout or not shape.flash:
        per_block += ATTENTION_PROBABILITY * shape.n_head * shape.block_size
    activations = tokens * shape.n_layer * per_block
    rows = min(tokens, CHUNK.get(device, GPU_CHUNK))
    logits = rows * shape.vocab_size * (4 + 2 * element) + 4 * model.wte.weight.numel()  # and the output layer's part of the gradient
    return LIBRARIES + states + activations + logits


def available_memory(device: str) -> float | None:
    """Bytes that this process could still take, None where the system doesn't tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0] + LIBRARIES
    limits = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(limits, default=None)


def smaller_batch(config: TrainConfig, fits: Callable[[int], bool]) -> str:
    """Flags that keep the effective batch with the largest micro-batch that fits, as advice for people."""
    effective = config.batch_size * config.gradient_accumulation_steps
    for batch in range(config.batch_size - 1, 0, -1):
        if effective % batch == 0 and fits(batch):
            return f"pass --batch_size {batch} --gradient_accumulation_steps {effective // batch}, the same effective batch of {effective}"
    return "even --batch_size 1 would be too large: take a smaller model (--preset nano) or a shorter --block_size"


def check_memory(model_config: GPTConfig, config: TrainConfig, device: str, processes: int) -> float:
    """The estimated bytes at the peak of a training step, in each process. Raises ValueError if they aren't there."""
    with torch.device("meta"):
        model = GPT(model_config)
    dtype, together = choose_precision(device, config.dtype)[0], processes if device == "cpu" else 1
    tokens = config.max_steps * config.batch_size * config.gradient_accumulation_steps * model_config.block_size
    compiled = choose_compile(device, config.compile, model.flops_per_token() * tokens)[0]

    def needed(batch_size: int) -> float:
        micro_batch = max(1, batch_size // processes)
        return memory_estimate(model, config, dtype, micro_batch, device, compiled) * together

    need, free = needed(config.batch_size), available_memory(device)
    if free is not None and need > free:
        advice = smaller_batch(config, lambda batch_size: needed(batch_size) <= free)
        raise ValueError(f"this training needs about {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; {advice}")
    return need / together


def seconds_per_step(model: GPT, data: TrainingData, config: TrainConfig, device: str, dtype) -> float:
    """Seconds of an optimizer step without compilation: forward and backward passes over at most 4,096 tokens, scaled to the batch.

    The median of up to five passes, but no more than fit into two seconds, after one to warm up. Weights stay as they are.
    """
    rows = min(config.batch_size, max(1, 4096 // model.config.block_size))
    batch = torch.from_numpy(data.batch(np.arange(rows)).astype("int64")).to(device)
    objective, times = NextTokenLoss(model), []
    while len(times) < 2 or (len(times) < 6 and sum(times) < 2):
        started = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = objective(batch)
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
