"""Checkpoint -> files that run elsewhere. Each is loaded back and compared with the model before it gets its name.

    python export_model.py
    python export_model.py --format onnx torchscript
    python export_model.py --checkpoint checkpoints/stories --format hf --output ./exported

onnx         best_model.onnx: one file, input_ids (batch, length) int64 -> logits (batch, length, vocabulary) float32, any batch, length up to block_size
torchscript  best_model.ts.pt: the same function for torch.jit.load, in Python or C++ without this repository
hf           hf/: a folder for transformers (AutoModelForCausalLM, AutoTokenizer) and all that reads its GPT-2 and Qwen3
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import Checked, notice, read_command_line, run_script

import torch

from export.graphs import write_onnx, write_torchscript
from export.hf_folder import write_hf
from export.verify import check_target, largest_difference, put_in_place, workplace
from formats.export_record import add_record
from formats.run_directory import load_model

# name -> what the file or folder is called ({} stands for the checkpoint's name without its ending), and what writes and reloads it
FORMATS = {"onnx": ("{}.onnx", write_onnx), "torchscript": ("{}.ts.pt", write_torchscript), "hf": ("hf", write_hf)}


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of export_model.py."""

    format: tuple[Literal[*FORMATS], ...] = ("onnx",)
    """What to write, one or several; without this flag onnx."""
    checkpoint: str = "./checkpoints"
    """A .pt file, an HF folder, or a run directory, also by its name below ./checkpoints. Default: the newest finished run there."""
    output: str | None = None
    """Directory for the files. Default: beside the checkpoint."""

    def problems(self) -> list[str]:
        return [] if self.format else [f"--format needs at least one of {', '.join(FORMATS)}"]


def check_formats(formats: Iterable[str]) -> None:
    """Raises ValueError for a name that is no format; train.py asks before it trains."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"unknown format {', '.join(unknown)}; take {', '.join(FORMATS)}")


def export(checkpoint: str | Path, formats: Iterable[str], output: Path | None) -> bool:
    """Write the formats beside the checkpoint or into `output`; True if all of them compute what the model computes.

    Raises ValueError, before anything is written, where that would delete the checkpoint or a folder that was not exported.
    """
    model, tokenizer, path, _ = load_model(str(checkpoint))
    output = output or path.parent
    targets = {name: output / FORMATS[name][0].format(path.stem) for name in formats}
    for target in targets.values():
        check_target(target, path)
    output.mkdir(parents=True, exist_ok=True)
    good = True
    for name, target in targets.items():
        _, write = FORMATS[name]
        with workplace(output) as directory:
            difference, allowed = largest_difference(model, write(model, tokenizer, directory / target.name))
            if difference > allowed:
                notice(f"error: {name}: logits differ by up to {difference:.1e} (allowed {allowed:.1e}); the file was deleted")
                good = False
                continue
            put_in_place(directory / target.name, target)
        entry = {"format": name, "checkpoint": path.name, "largest_logit_difference": difference, "torch": torch.__version__}
        add_record(output, target.name, entry)
        print(f"{target}: largest difference of a logit {difference:.1e}")
    return good


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, aliases={"model_path": "checkpoint"})
    return 0 if export(args.checkpoint, args.format, Path(args.output) if args.output else None) else 1


if __name__ == "__main__":
    run_script(main)
