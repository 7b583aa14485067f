"""What learns: the network with all that an optimizer step changes. All of it is in each complete checkpoint."""

import copy
import dataclasses
import math
import sys
from typing import NamedTuple

from utils import notice

import torch
from torch import Tensor
from tqdm import tqdm

from config import TrainConfig
from formats.checkpoint import load_weights
from models import GPT, NextTokenLoss
from training.machine import Machine
from training.optimizers import make_optimizers
from training.processes import Processes

SKIPS_IN_A_ROW = 5  # steps without a finite loss and gradient before a run ends
SKIPS_IN_A_ROW_FP16 = 30  # there a skipped step halves the loss scale, and the first ones are expected


@dataclasses.dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    best_val_loss: float = math.inf
    evaluations_since_best: int = 0
    evaluation_due: bool = False  # a signal came before the evaluation that belongs to `step`
    skipped_steps: int = 0  # their loss or gradient was not finite


class StepResult(NamedTuple):
    """One optimizer step. loss: mean in nats; accuracy: of its tokens; norm: of the gradient before clipping; tensors on the device."""

    loss: Tensor
    accuracy: Tensor
    norm: Tensor


def passes_of_step(config: TrainConfig, processes: int, micro_batch: int | None = None) -> tuple[int, int]:
    """Forward passes of an optimizer step in each process, and windows in each; micro_batch: at most so many windows.

    Raises ValueError if a step can't be divided equally among the processes.
    """
    batch, accumulation = config.batch_size, config.gradient_accumulation_steps
    if accumulation % processes and batch % processes:
        neither = f"gradient_accumulation_steps={accumulation} and batch_size={batch}: neither can be divided by {processes} processes"
        raise ValueError(f"{neither}; give --gradient_accumulation_steps {-(-accumulation // processes) * processes}")
    windows = config.windows_per_step // processes
    most = min(batch if accumulation % processes == 0 else batch // processes, micro_batch or windows)
    size = next(size for size in range(most, 0, -1) if windows % size == 0)
    return windows // size, size


class Learner:
    """The network, its optimizers, loss scaler, running mean of weights (ema) and progress.

    objective: the training loss as a module, its gradients averaged over processes; micro_steps, micro_batch:
    forward passes of a step in this process, and windows in each; last: the newest step's result.
    """

    def __init__(
        self, objective: NextTokenLoss, config: TrainConfig, machine: Machine, processes: Processes, micro_batch: int | None = None
    ):
        model = objective.model
        self.model, self.config, self.machine, self.processes = model, config, machine, processes
        self.micro_steps, self.micro_batch = passes_of_step(config, processes.count, micro_batch)
        self.optimizers = make_optimizers(model, config, machine.dtype)
        self.scaler = torch.amp.GradScaler(machine.kind, enabled=machine.dtype == torch.float16)
        self.ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
        self.objective: torch.nn.Module = processes.wrap(objective, machine.device)
        self.progress = Progress()
        self.last: StepResult | None = None
        self.skipped = torch.zeros(2, device=machine.device)  # steps skipped in a row, and in all since the last look

    @property
    def evaluated(self) -> GPT:
        """The weights that are evaluated, sampled and kept as the best model."""
        return self.model if self.ema is None else self.ema

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.progress.evaluations_since_best

    def skip_unless_finite(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1 if the optimizers are to skip this step, else 0, on the device: a GPU is never waited for. Counts it."""
        skip = 1 - (norm.isfinite() & loss.isfinite()).float()
        self.skipped = torch.stack((self.skipped[0] * skip + skip, self.skipped[1] + skip))
        return skip

    def check_finite(self, saving: bool = False, validation_loss: float = 0.0) -> bool:
        """Whether the weights are beyond doubt: the last step was not skipped (with float16, a skipped step only lowers the loss scale).

        Raises FloatingPointError after several skipped steps in a row, before weights in doubt are saved, or for a validation loss that
        isn't finite.
        """
        in_a_row, new = map(int, self.skipped.tolist())
        self.skipped[1] = 0
        self.progress.skipped_steps += new
        fp16 = self.scaler.is_enabled()
        sound = fp16 or not in_a_row
        if not math.isfinite(validation_loss):
            raise FloatingPointError(f"no finite loss in validation but {validation_loss}, at {self._last_step()}")
        if in_a_row >= (SKIPS_IN_A_ROW_FP16 if fp16 else SKIPS_IN_A_ROW) or (saving and not sound):
            raise FloatingPointError(f"{in_a_row} steps in a row had no finite loss and gradient, the last at {self._last_step()}")
        if new:
            tqdm.write(f"step {self.progress.step:>6,}  skipped {new} without a finite loss and gradient", file=sys.stderr)
        return sound

    def _last_step(self) -> str:
        rates = ", ".join(f"{optimizer.param_groups[0]['lr']:.3g} ({type(optimizer).__name__})" for optimizer in self.optimizers)
        scale = f", loss scale {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        values = f"loss {self.last.loss.item():.4g}, gradient norm {self.last.norm.item():.4g}, " if self.last else ""
        return f"step {self.progress.step} ({values}learning rates {rates}{scale})"

    def environment(self) -> dict[str, str]:
        """What else decides the last bits of the weights."""
        return {
            "torch": torch.__version__.split("+")[0],
            "threads": str(torch.get_num_threads()),
            "device": self.machine.kind,
            "dtype": self.machine.dtype_name,
            "compile": str(self.machine.compile),
            "processes": str(self.processes.count),
            "micro_batch": str(self.micro_batch),
        }

    def state(self) -> dict:
        """What a complete checkpoint holds beyond the model's weights, as plain values and tensors."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "progress": dataclasses.asdict(self.progress),
            "samples_seen": self.progress.step * self.config.windows_per_step,
            "environment": self.environment(),
        }

    def restore(self, weights: dict[str, Tensor], state: dict, name: str) -> None:
        """Go back to a complete checkpoint: its weights and its `state()`."""
        load_weights(self.model, weights, name)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak_lr"] for group in optimizer.param_groups]  # flags may have changed them
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak_lr"] = peak
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.progress = Progress(**state["progress"])
        before, here = state["environment"], self.environment()
        changed = [f"{key} {before[key]} -> {here[key]}" for key in here if before.get(key, here[key]) != here[key]]
        if changed:
            notice(f"warning: resumed in another environment ({', '.join(changed)}): the same data, but not bit for bit the same weights")
        notice(f"resumed {name} at step {self.progress.step}")
