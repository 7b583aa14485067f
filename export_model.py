"""Checkpoint -> files that run elsewhere. Each is loaded back and compared with the model before it gets its name.

    python export_model.py
    python export_model.py --format onnx torchscript
    python export_model.py --checkpoint checkpoints/stories --format hf --output ./exported

onnx         best_model.onnx: one file, input_ids (batch, length) int64 -> logits (batch, length, vocabulary) float32
torchscript  best_model.ts.pt: the same function for torch.jit.load, in Python or C++ without this repository
hf           hf/: a folder for transformers (AutoModelForCausalLM, AutoTokenizer) and all that reads its GPT-2 and Qwen3
html         best_model.html: a page to talk to, for any browser, without a network
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from utils import Checked, notice, read_command_line, run_script

import torch

from export.graphs import write_onnx, write_torchscript
from export.hf_folder import write_hf
from export.page import Weights, write_html
from export.verify import Source, largest_difference, put_in_place, workplace
from formats.export_record import add_record, check_exports
from formats.outputs import sole_writer
from formats.run_directory import find_checkpoint, load_model

# name -> what the file or folder is called ({} stands for the checkpoint's name without its ending), and what writes and reloads it
FORMATS = {"onnx": ("{}.onnx", write_onnx), "torchscript": ("{}.ts.pt", write_torchscript), "hf": ("hf", write_hf)}
FORMATS |= {"html": ("{}.html", write_html)}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "hf": ("transformers",)}  # what writes or checks a format, beside torch


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of export_model.py."""

    format: tuple[Literal[*FORMATS], ...] = ("onnx",)
    """What to write, one or several; without this flag onnx."""
    checkpoint: str = "./checkpoints"
    """A .pt file, an HF folder, or a run directory, also by its name below ./checkpoints. Default: the newest finished run there."""
    output: str | None = None
    """Directory for the files. Default: beside the checkpoint."""
    html_weights: Weights = "auto"
    """Of --format html. auto: int8 where that costs less than 1% of bits per byte on the validation split, else float16."""

    def problems(self) -> list[str]:
        return [] if self.format else [f"--format needs at least one of {', '.join(FORMATS)}"]


def check_formats(formats: Iterable[str]) -> None:
    """Raises ValueError for a name that is no format, or whose packages are missing; train.py asks before it trains."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"unknown format {', '.join(unknown)}; take {', '.join(FORMATS)}")
    for name in formats:
        if missing := [package for package in PACKAGES.get(name, ()) if not find_spec(package)]:
            raise ValueError(f"format {name} needs packages that are not installed; run: pip install {' '.join(missing)}")


def target_names(formats: Iterable[str], checkpoint: str) -> dict[str, str]:
    """Format -> what its file or folder is called. checkpoint: the name of what is exported, e.g. best_model.pt."""
    return {name: FORMATS[name][0].format(Path(checkpoint).stem) for name in formats}


def export(checkpoint: str | Path, formats: Iterable[str], output: Path | None, **options) -> bool:
    """Write the formats beside the checkpoint or into `output`; True if all of them compute what the model computes.

    options: as Source has them. Raises ValueError, before anything is written, where that would replace the checkpoint or what was not
    exported.
    """
    path = find_checkpoint(str(checkpoint))
    output = output or path.parent
    check_formats(formats)
    with sole_writer(output, "export", "output", "export"):
        names = target_names(formats, path.name)
        check_exports(output, names.values(), path)
        source = Source(*load_model(str(path)), options)
        good = True
        for name, target in names.items():
            with workplace(output) as directory:
                loaded = FORMATS[name][1](source, directory / target)
                difference, allowed = largest_difference(loaded.reference or source.model, loaded.logits)
                if difference > allowed:
                    notice(f"error: {name}: logits differ by up to {difference:.1e} (allowed {allowed:.1e}); the file was deleted")
                    good = False
                    continue
                entry = {"format": name, "checkpoint": path.name, "largest_logit_difference": difference, "torch": torch.__version__}
                add_record(output, target, entry)  # first: what has its name is known to be ours
                put_in_place(directory / target, output / target)
            print(f"{output / target}: largest difference of a logit {difference:.1e}")
    return good


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, aliases={"model_path": "checkpoint"})
    output = None if args.output is None else Path(args.output)
    return 0 if export(args.checkpoint, args.format, output, html_weights=args.html_weights) else 1


if __name__ == "__main__":
    run_script(main)
