"""The machine that a run computes on: precision and compilation, decided once, and what its failures mean."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from utils import describe, is_full_memory

import torch


def choose_precision(device: str, requested: str) -> tuple[torch.dtype, str]:
    """The one place that decides the precision of forward and backward passes: (torch dtype, reason for people).

    Weights and optimizer state stay float32. Raises ValueError for a precision that the device can't train in.
    """
    kind = device.partition(":")[0]
    if requested != "auto":
        if requested == "float16" and kind != "cuda":
            raise ValueError(f"dtype='float16' needs a CUDA GPU, not {device}; pass --dtype bfloat16 or float32")
        return getattr(torch, requested), "as asked"
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bfloat16"
        return torch.float16, "this GPU has no bfloat16; float16 with a loss scaler"
    if kind == "cpu":
        checks = (getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        if any(check() for check in checks):
            return torch.bfloat16, "this CPU has bfloat16 instructions"
        return torch.float32, "this CPU has no bfloat16 instructions"
    return torch.float32, f"the safe choice on {kind}"


def choose_compile(device: str, requested: bool | str) -> tuple[bool | None, str]:
    """Whether to use torch.compile, and why; None where that is to be measured. Without a C++ compiler a CPU runs eagerly and says so."""
    kind = device.partition(":")[0]
    if kind == "cpu" and requested is not False and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))):
        return False, "no C++ compiler found"
    if requested != "auto":
        return bool(requested), "as asked"
    if kind == "cuda":
        from torch.utils._triton import has_triton

        return (True, "it pays on a GPU") if has_triton() else (False, "this GPU or machine has no Triton")
    return (None, "to be measured") if kind == "cpu" else (False, f"untried on {kind}")


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes, decided once, with reasons for people.

    dtype: torch's, of forward and backward passes; compile: None as long as it is to be measured; compile_seconds: what it took.
    """

    device: str
    dtype: torch.dtype
    dtype_reason: str
    compile: bool | None
    compile_reason: str
    compile_seconds: float = 0.0

    @classmethod
    def choose(cls, device: str, dtype: str, compile: bool | str) -> "Machine":
        """device: as choose_device gave it. Raises ValueError."""
        return cls(device, *choose_precision(device, dtype), *choose_compile(device, compile))

    @property
    def kind(self) -> str:
        """cpu, cuda or mps."""
        return self.device.partition(":")[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self):
        """The context of forward passes. Weights stay float32."""
        return torch.autocast(self.kind, dtype=self.dtype, enabled=self.dtype != torch.float32)


class LostProcess(RuntimeError):
    """Another of the processes that train together has ended."""


@contextlib.contextmanager
def explained_failures(device: str, advice: str, processes: int = 1) -> Iterator[None]:
    """What torch raises for a full memory becomes a ValueError with advice, and for another process that is gone a LostProcess."""
    try:
        yield
    except RuntimeError as error:
        text = describe(error)
        if is_full_memory(error):
            raise ValueError(f"the memory of {device} is full; {advice}") from None
        if processes > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text):
            lost = f"rank {os.environ.get('RANK')}: another process of this run has ended or can't be reached"
            raise LostProcess(f"{lost}; start it again with --resume auto ({text[:100]})") from None
        raise
