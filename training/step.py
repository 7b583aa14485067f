"""One optimizer step: a pure function of its number and of the learner's state."""

import contextlib
import math
from collections.abc import Callable

from utils import derived_seed

import torch

from training.data_order import Batches, samples_of_step
from training.learner import Learner, StepResult
from training.optimizers import lr_factor, set_learning_rates


def training_step(learner: Learner, batches: Batches, step: int, stopped: Callable[[], bool] = lambda: False) -> StepResult | None:
    """Optimizer step number `step` (0, 1, ...). Returns None, nothing changed, if `stopped` says so before one of its forward passes.

    A loss or gradient that isn't finite changes no weight and no momentum: the step is skipped and counted (Learner.skip_unless_finite).
    """
    config, machine, processes = learner.config, learner.machine, learner.processes
    set_learning_rates(learner.optimizers, lr_factor(step, config))
    index = samples_of_step(step, config.windows_per_step, processes.rank, processes.count)
    totals = torch.zeros(2, device=machine.device)  # loss, accuracy
    for micro_step, samples in enumerate(index.reshape(learner.micro_steps, learner.micro_batch)):
        if stopped():
            learner.model.zero_grad()
            return None
        rows = batches(samples)  # (B, T + 1)
        if learner.model.config.dropout:
            torch.manual_seed(derived_seed(config.seed, step, micro_step, processes.rank))
        last = micro_step + 1 == learner.micro_steps  # only then do processes exchange gradients
        with learner.objective.no_sync() if processes.count > 1 and not last else contextlib.nullcontext():
            with machine.autocast():
                loss, accuracy = learner.objective(rows)
            learner.scaler.scale(loss / learner.micro_steps).backward()
        totals += torch.stack((loss.detach(), accuracy)) / learner.micro_steps
    loss, accuracy = processes.average(totals)
    for optimizer in learner.optimizers:
        learner.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), config.grad_clip or math.inf)
    skip = learner.skip_unless_finite(loss, norm)
    for optimizer in learner.optimizers:
        optimizer.found_inf = skip
        optimizer.step()
    learner.scaler.update()
    learner.model.zero_grad()
    if learner.ema is not None:
        weight = 1 - min(config.ema_decay, (1 + step) / (10 + step))  # young means forget faster
        with torch.no_grad():
            torch._foreach_lerp_(list(learner.ema.parameters()), list(learner.model.parameters()), weight)
    return StepResult(loss, accuracy, norm)
