"""How weights move: Muon for the matrices inside the blocks, AdamW for the rest, and the learning rate over the run."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from config import TrainConfig
from models import GPT

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Muon": quintic iteration with the steepest slope at zero
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest (semi-)orthogonal matrices of a stack (N, rows, columns), approximately: all singular values end up near 1.

    Computed in `dtype`, returned in it. Rows of zeros stay zeros.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Differs from torch.optim.Muon in two ways: a weight that holds several maps in its rows (`parts`: q, k, v; gate, up) is
    orthogonalised map by map, and all maps of one shape go through one batched Newton-Schulz iteration.
    The step of a rows x columns matrix is scaled by sqrt(max(1, rows / columns)).
    As in torch's fused AdamW, a step with the attribute `found_inf` = 1 (a tensor on the device) changes nothing.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95, parts: dict | None = None, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.parts = parts or {}
        self.dtype = dtype
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "Muon takes no closure"
        skip = self.found_inf
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            rate = group["lr"] if skip is None else group["lr"] * (1 - skip)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = self.state[p]["momentum_buffer"]
                grad = p.grad if skip is None else p.grad.where(skip == 0, buffer)  # then buffer stays as it is
                buffer.lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(buffer, group["momentum"])  # Nesterov
                p.mul_(1 - rate * group["weight_decay"])
                rows = self.parts.get(p, p.size(0))
                for weight, direction in zip(p.split(rows), update.split(rows)):
                    by_shape[weight.shape].append((weight, direction))
            for shape, pairs in by_shape.items():
                directions = orthogonalize(torch.stack([direction for _, direction in pairs]), self.dtype)
                steps = directions.float() * (rate * -math.sqrt(max(1.0, shape[0] / shape[1])))
                torch._foreach_add_([weight for weight, _ in pairs], list(steps.unbind()))


def make_optimizers(model: GPT, config: TrainConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The run's optimizers; each group remembers its peak rate as `peak_lr`. dtype: that of the forward pass."""
    groups = model.parameter_groups(muon=config.optimizer == "muon")
    adamw = [{"params": groups["decay"], "weight_decay": config.weight_decay}, {"params": groups["no_decay"], "weight_decay": 0.0}]
    adamw = [group for group in adamw if group["params"]]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw, lr=config.learning_rate, betas=betas, fused=True)]
    if groups["muon"]:
        compute = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(groups["muon"], config.muon_learning_rate, config.weight_decay, parts=model.fused_parts(), dtype=compute))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, config: TrainConfig) -> float:
    """Learning rate of the optimizer step number `step` (0, 1, ...) as a fraction of its peak.

    Linear warmup over warmup_steps, then cosine or linear decay that reaches final_lr_fraction at the last step and stays there.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    last = config.max_steps - 1
    progress = min(1.0, (step - config.warmup_steps) / max(1, last - config.warmup_steps))
    falling = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * falling


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
