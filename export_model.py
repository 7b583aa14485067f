"""Checkpoint -> files that run elsewhere. Each is loaded back and compared with the model before it gets its name.

python export_model.py
python export_model.py --format onnx torchscript
python export_model.py --checkpoint checkpoints/stories --format hf --output ./exported
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from utils import Checked, notice, read_command_line, run_script

import torch
from tqdm import tqdm

from export import quality
from export.companions import companions, write_companions
from export.formats import ALL, FORMATS, chosen, fitting, table, target_names
from export.pruning import Pruning, pruned
from export.verify import Mismatch, Source, put_in_place, quiet, verify, workplace
from formats.export_record import add_record, check_exports, model_sha256
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
    overwrite: bool = False
    """Replace earlier exports; whatever else stands there stays."""
    data_dir: tuple[str, ...] = ()
    """Prepared data on which quality is measured. Default: what the model was trained on."""
    html_weights: Literal["auto", "float16", "int8"] = "auto"
    """Numbers in the page of --format html; auto takes int8 where that costs less than 1% of bits per byte."""

    pruning: Pruning = field(default_factory=Pruning)

    def problems(self) -> list[str]:
        problems = [] if self.format else [f"--format needs at least one of {', '.join(FORMATS)}"]
        if self.pruning and self.output is None:
            problems.append("a pruned model is another one; give it a place of its own with --output")
        if self.html_weights != type(self).html_weights and not {"html", ALL} & {*self.format}:
            problems.append("only --format html has --html_weights; leave it out")
        measured = {name for name, format in FORMATS.items() if not format.exact} | {"html", ALL}
        if self.data_dir and not (self.pruning or measured & {*self.format}):
            problems.append("--data_dir is for rounding and pruning, whose cost is measured on it; leave it out")
        return problems


def write_verified(source: Source, name: str, path: Path) -> dict[str, float]:
    """Write one format, load it back, compare: the figures of what was measured. Raises Mismatch where it isn't the same model."""
    format = FORMATS[name]
    with tqdm(desc=f"{name}: writing", bar_format="{desc}{postfix} {elapsed}", disable=None, leave=False) as bar:
        loaded = format.write(source, path)
        bar.bar_format = None
        bar.set_description(f"{name}: checking", refresh=False)
        figures = verify(source, loaded, format.exact, bar)
    return figures if format.exact else figures | quality.measure(source, loaded)


def tell(figures: dict[str, float]) -> str:
    """The figures of an export in a few words."""
    words = [quality.sentence(figures)] if "bits_per_byte" in figures else []
    words.append(f"largest difference of a logit {figures['largest_logit_difference']:.1e}")
    if "greedy_tokens" in figures:
        ties = f" but for {figures['greedy_ties']} ties" if figures["greedy_ties"] else ""
        words.append(f"{figures['greedy_tokens']} greedy tokens the same{ties}")
    if "texts_encoded" in figures:
        words.append(f"{figures['texts_encoded']} texts encoded alike")
    return "; ".join(words)


def export(checkpoint: str | Path, formats: Iterable[str], output: Path | None, overwrite: bool, **options) -> bool:
    """Write the formats beside the checkpoint or into `output`; True if all of them compute what the model computes.

    overwrite: whether earlier exports may be replaced. options: as Source has them. Raises ValueError, before anything is written, where
    that would replace the checkpoint or what was not exported.
    """
    path, formats = find_checkpoint(str(checkpoint)), [*formats]
    output = output or path.parent
    with sole_writer(output, "export", "output", "export"):
        check_exports(output, target_names(chosen(formats), path.name).values(), path, overwrite)
        made_from = {"checkpoint_sha256": model_sha256(path)}
        source, done = Source(*load_model(str(path)), options), made_from
        if made_from["checkpoint_sha256"] != model_sha256(path):
            raise ValueError(f"{path} was replaced while it was read; export it again")
        if options.get("data_dir"):
            quality.held_out(source)  # what is wrong with it is told before anything is written
        names = target_names(fitting(formats, source), path.name)
        if options.get("pruning"):
            source, done = pruned(source, options["pruning"], output)  # another model than the checkpoint's
        beside = companions(source, output, overwrite) if any(FORMATS[name].beside for name in names) else {}
        good = True
        for name, target in names.items():
            with workplace(output) as directory, quiet():
                try:
                    figures = write_verified(source, name, directory / target)
                except Mismatch as error:
                    notice(f"error: {name}: {error}; the new {target} was deleted")
                    good = False
                    continue
                entry = {"format": name, "checkpoint": path.name, "torch": torch.__version__}
                if (directory / target).is_file():
                    entry["sha256"] = model_sha256(directory / target)
                add_record(output, target, entry | done | figures)  # first: what has its name is known to be ours
                put_in_place(directory / target, output / target)
            if FORMATS[name].beside:
                write_companions(output, beside, path.name)
                beside = {}
            print(f"{output / target}: {tell(figures)}")
    return good


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, f"{__doc__}\n{table()}", aliases={"model_path": "checkpoint"})
    output = None if args.output is None else Path(args.output)
    options = {name: value for name, value in vars(args).items() if name not in ("checkpoint", "format", "output", "overwrite")}
    return 0 if export(args.checkpoint, args.format, output, args.overwrite, **options) else 1


if __name__ == "__main__":
    run_script(main)
