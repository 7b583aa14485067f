"""Checkpoint -> files that run elsewhere. Each is loaded back and compared with the model before it gets its name.

python export_model.py
python export_model.py --format onnx torchscript
python export_model.py --checkpoint checkpoints/stories --format hf --output ./exported
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import Checked, notice, read_command_line, run_script

import torch

from export.formats import ALL, FORMATS, chosen, fitting, table, target_names
from export.verify import Source, largest_difference, put_in_place, workplace
from formats.export_record import add_record, check_exports
from formats.outputs import sole_writer
from formats.run_directory import find_checkpoint, load_model


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of export_model.py."""

    format: tuple[Literal[*FORMATS, ALL], ...] = ("onnx",)
    """What to write, one or several; all of them, or without this flag onnx. The names stand above."""
    checkpoint: str = "./checkpoints"
    """A .pt file, an HF folder, or a run directory, also by its name below ./checkpoints. Default: the newest finished run there."""
    output: str | None = None
    """Directory for the files. Default: beside the checkpoint."""

    def problems(self) -> list[str]:
        return [] if self.format else [f"--format needs at least one of {', '.join(FORMATS)}"]


def export(checkpoint: str | Path, formats: Iterable[str], output: Path | None) -> bool:
    """Write the formats beside the checkpoint or into `output`; True if all of them compute what the model computes.

    Raises ValueError, before anything is written, where that would replace the checkpoint or what was not exported.
    """
    path = find_checkpoint(str(checkpoint))
    output = output or path.parent
    formats = [*formats]
    with sole_writer(output, "export", "output", "export"):
        check_exports(output, target_names(chosen(formats), path.name).values(), path)
        source = Source(*load_model(str(path)))
        names = target_names(fitting(formats, source), path.name)
        good = True
        for name, target in names.items():
            with workplace(output) as directory:
                difference, allowed = largest_difference(source.model, FORMATS[name].write(source, directory / target).logits)
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
    args = read_command_line(Arguments, argv, f"{__doc__}\n{table()}", aliases={"model_path": "checkpoint"})
    return 0 if export(args.checkpoint, args.format, None if args.output is None else Path(args.output)) else 1


if __name__ == "__main__":
    run_script(main)
