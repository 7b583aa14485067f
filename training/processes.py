"""Several processes that train one model together, as torchrun starts them; without torchrun there is one, and nothing here costs anything.

Tensors travel by NCCL between GPUs and by gloo between CPUs; decisions (is there a signal?) always by gloo, so that asking never
waits for a GPU.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells each process
TIMEOUT = timedelta(minutes=30)  # longer than any evaluation, during which the others wait for rank 0


class Processes:
    """This process among those of the run. rank: 0 is the one that evaluates, saves and logs; count: how many there are."""

    def __init__(self):
        """Raises ValueError for variables of torchrun that don't go together."""
        told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | {name: os.environ[name] for name in TORCHRUN if name in os.environ}
        numbers = [told[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        sound = all(map(str.isdecimal, numbers)) and int(told["RANK"]) < int(told["WORLD_SIZE"])
        if not sound or (told["WORLD_SIZE"] != "1" and "MASTER_PORT" not in told):
            given = " ".join(f"{name}={told[name]}" for name in TORCHRUN if name in os.environ)
            raise ValueError(f"{given}: so torchrun sets no variables; unset them, or start with torchrun --nproc_per_node=N train.py")
        self.rank, self.count, self.local_rank = map(int, numbers)
        self.control = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def start(self, device: str) -> str:
        """Meet the other processes. Returns this process's own device: with torchrun, CUDA means one GPU for each process of a machine."""
        if self.count == 1:
            return device
        if device == "cuda":
            if self.local_rank >= (gpus := torch.cuda.device_count()):
                raise ValueError(
                    f"process {self.local_rank} of this machine finds no GPU of its own; pass torchrun --nproc_per_node={gpus}"
                )
            device = f"cuda:{self.local_rank}"
            torch.cuda.set_device(self.local_rank)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return device

    def wrap(self, module: nn.Module, device: str) -> nn.Module:
        """The module with gradients averaged over the processes."""
        if self.count == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.startswith("cuda") else None)

    def average(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All must ask."""
        if self.count == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flags.item())

    def least(self, value: int) -> int:
        """The smallest of the processes' values. All must ask."""
        if self.count == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MIN, group=self.control)
        return int(values.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier(group=self.control)

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
