"""What memory a training will need, estimated before it starts; what a GPU could compute."""

import contextlib
from pathlib import Path

import torch

from config import GPTConfig, TrainConfig
from models import CHUNK, GPT, GPU_CHUNK
from training.learner import passes_of_step
from training.machine import Machine
from training.processes import Processes

# Bytes kept for the backward pass per token and block, in units of n_embd and of the MLP's width: measured (MEASUREMENTS.md).
# Without compilation qwen3's norms and rotations keep copies in float32; compiled, it needs no more than gpt2.
ACTIVATIONS = {("gpt2", 2): (22, 7), ("gpt2", 4): (36, 11), ("qwen3", 2): (95, 10), ("qwen3", 4): (112, 18)}
ATTENTION_PROBABILITY = 24  # bytes for each, where they are held: with dropout and without the fused kernel
LIBRARIES = 0.45e9  # what Python and torch take before the first tensor
# 1e12 operations a second, dense bfloat16 or float16 with tensor cores, from the makers' data sheets; the first name that fits counts
PEAKS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "T4": 65, "V100": 125}
PEAKS |= {"4090": 165, "3090": 71}


def peak_flops(device: str) -> float | None:
    """The GPU's floating-point operations per second in half precision, None where it isn't known."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def memory_estimate(model: GPT, config: TrainConfig, dtype: torch.dtype, micro_batch: int, device: str, compiled: bool) -> float:
    """Bytes at the peak of a training step, roughly: libraries, weights with gradients and optimizer state, activations, logits."""
    groups = model.parameter_groups(muon=config.optimizer == "muon")
    element = 4 if dtype == torch.float32 else 2
    each = 4 + 4 + 4 * bool(config.ema_decay) + (element if element < 4 else 0)  # weight, gradient, running mean, copy in half precision
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


def fitting_batch(model_config: GPTConfig, config: TrainConfig, machine: Machine, processes: Processes) -> tuple[float, int]:
    """Bytes at the peak of a training step in each process, and the windows of its forward passes: as configured where the memory
    allows it, else the most that fit everywhere. Raises ValueError in all processes if a single window is too much for one."""
    with torch.device("meta"):
        model = GPT(model_config)
    together = processes.count if machine.kind == "cpu" else 1
    free = available_memory(machine.device)

    def need(size: int) -> float:
        return memory_estimate(model, config, machine.dtype, size, machine.kind, machine.compile)

    _, size = passes_of_step(config, processes.count)
    while size and free is not None and need(size) * together > free:
        size = passes_of_step(config, processes.count, size - 1)[1] if size > 1 else 0
    size = processes.least(size)
    if not size:
        needs = f"about {need(1) * together / 1e9:.1f} GB even with one window at a time, and {(free or 0) / 1e9:.1f} GB are free"
        raise ValueError(f"this training needs {needs}; take a smaller model (--preset nano) or a shorter --block_size")
    return need(size), size
