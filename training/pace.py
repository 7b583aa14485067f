"""How long a training will take, and whether compiling it pays: measured before it starts, and told."""

import statistics
import time
from dataclasses import replace

from utils import duration, notice

import numpy as np
import torch

from models import GPT, NextTokenLoss
from training.machine import Machine
from training.processes import Processes
from training.start import Start

# Seconds of training without compilation from which on `compile auto` tries it. Compiling took 23 seconds on a CPU and made training 1.6
# times as fast (MEASUREMENTS.md, section 4); 1.2 times would win back 20 seconds of 120.
WORTH_COMPILING = 120
LONG_ON_CPU = 6 * 3600  # seconds


def seconds_per_step(objective: NextTokenLoss, start: Start, machine: Machine, rows: int) -> tuple[float, float]:
    """Seconds of an optimizer step's forward and backward passes, and what the first pass took longer, which is compiling if anything.

    Measured on `rows` windows and scaled to the batch: the median of up to five passes, but no more than fit into two seconds.
    Weights stay as they are.
    """
    batch, times = torch.from_numpy(start.data.batch(np.arange(rows)).astype("int64")).to(machine.device), []
    while len(times) < 2 or (len(times) < 6 and sum(times[1:]) < 2):
        started = time.perf_counter()
        with machine.autocast():
            loss, _ = objective(batch)
        loss.backward()
        objective.zero_grad(set_to_none=True)
        if machine.kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    usual = statistics.median(times[1:])
    return usual / rows * start.config.windows_per_step, max(0.0, times[0] - usual)


def make_objective(start: Start, model: GPT, machine: Machine, micro_batch: int, processes: Processes) -> tuple[NextTokenLoss, Machine]:
    """The training objective, and the machine with `compile` decided: by measuring it where that was left open and the run is long."""
    steps = start.config.max_steps - (start.resumed[1]["step"] if start.resumed else 0)
    plain, compiled = NextTokenLoss(model), NextTokenLoss(model)
    compiled.compile(dynamic=False)
    eager, whole = 0.0, 0.0  # seconds of a step, and of all, without compilation
    if not machine.compile:
        eager, _ = seconds_per_step(plain, start, machine, min(micro_batch, max(1, 4096 // model.config.block_size)))
        whole = steps * eager / processes.count
        notice(f"time       about {duration(whole)} for {steps:,} steps at the speed just measured, plus evaluations")
        if machine.kind == "cpu" and whole > LONG_ON_CPU:
            directories = "" if start.names == ["./data"] else " --data_dir " + " ".join(start.names)
            notice(
                f"           that is long; for a model in minutes: python train.py --preset nano{directories} --out_dir checkpoints/nano"
            )
    if machine.compile is None and not processes.any(whole > WORTH_COMPILING):
        machine = replace(machine, compile=False, compile_reason="so short a run would not win its time back")
    if machine.compile is not False:
        notice("compile    compiling, up to a minute ...")
        seconds, compiling = seconds_per_step(compiled, start, machine, micro_batch)
        machine = replace(machine, compile_seconds=compiling)
        if machine.compile is None:
            pays = bool(processes.least(seconds < eager))
            machine = replace(machine, compile=pays, compile_reason=f"measured, {eager / seconds:.2f} times the speed")
        if machine.compile:
            whole = steps * seconds / processes.count
            notice(f"time       about {duration(whole)} for {steps:,} steps, after {duration(compiling)} of compiling, plus evaluations")
    notice(f"compile    {machine.compile}: {machine.compile_reason}")
    return (compiled if machine.compile else plain), machine
