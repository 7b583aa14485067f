"""A run directory: what train.py writes into it, what may be resumed or deleted there, and what `--checkpoint NAME` means.

It holds best_model.pt (weights only), step_00001000.pt (complete, resumable), metrics.jsonl, config.json, tokenizer.json, loss.png.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from utils import notice

import torch

from config import GPTConfig, TrainConfig
from formats import data_directory, huggingface
from formats.checkpoint import Checkpoint, Uninitialised, load_checkpoint, load_weights
from formats.export_record import RECORD, read_record
from formats.metrics import METRICS
from formats.onnx_file import ENDING
from formats.outputs import check_names, fsync_directory, is_of_kind, peek_json, sole_writer
from formats.scores import SCORES
from formats.tokenizer import TextTokenizer
from models import GPT

BEST = "best_model.pt"
HOME = Path("checkpoints")  # where runs live unless a flag or config.py says otherwise
CONFIG, TENSORBOARD = "config.json", "tensorboard"
EVALUATION, PICTURE, SAMPLES = "evaluation.json", "evaluation.png", "evaluation.samples.txt"
# what evaluate.py writes beside a checkpoint -> its kind
EVALUATIONS = {EVALUATION: "evaluation", SCORES: "table of scores", PICTURE: "evaluation picture", SAMPLES: "list of samples"}
WRITTEN = (BEST, METRICS, CONFIG, "loss.png", "tokenizer.json")  # what train.py writes, beside step checkpoints
ELSEWHERE = (".ts.pt", ".pt2", ".gguf", ".html")  # endings of exports that none of our scripts reads
DATA, NEXT = "data", ".train.next"  # what --dataset prepares; the folder where it waits while the run is there that is to be deleted


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:08d}.pt"


def step_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    return sorted((path for path in run_dir.glob("step_*.pt") if re.fullmatch(r"step_\d{8,}\.pt", path.name)), reverse=True)


def is_finished(content: dict, config: TrainConfig | None = None) -> bool:
    """Whether a complete checkpoint stands at the end of its run. config: what the run should be now, if that may have changed."""
    config, progress = config or TrainConfig(**content["train_config"]), content["resume"]["progress"]
    out_of_patience = 0 < config.patience <= progress["evaluations_since_best"]
    return (content["step"] >= config.max_steps or out_of_patience) and not progress["evaluation_due"]


def _has_finished(run_dir: Path) -> bool:
    """Whether the run in a directory has come to its end. A best model without a log was copied there: nothing more will come."""
    paths = step_checkpoints(run_dir)
    if not paths:
        return not (run_dir / METRICS).exists()
    try:
        return is_finished(torch.load(paths[0], mmap=True, weights_only=True))  # mapped: the weights aren't read
    except Exception:  # a damaged file raises a dozen kinds
        return False


def find_checkpoint(name: str) -> Path:
    """What `--checkpoint NAME` means: a .pt or .onnx file; a run directory (its best model), an HF folder, or the name of one below
    ./checkpoints.

    ./checkpoints itself (the default) and `best_model.pt` alone mean the newest finished run at or below ./checkpoints, as does any other
    directory that only holds runs; where none has finished, the newest one. A directory of exports means the slim checkpoint there.

    Raises FileNotFoundError that lists what there is.
    """
    for path in (Path(name), HOME if name == BEST else HOME / name):
        if path.is_file():
            return path
        if path.is_dir():
            if huggingface.is_folder(path) and not (path / BEST).is_file():
                return path
            if path.resolve() != HOME.resolve() and (path / BEST).is_file():
                return path / BEST
            models = sorted(path.rglob(BEST), key=lambda model: model.stat().st_mtime, reverse=True)
            finished = (model for model in models if _has_finished(model.parent))
            found = next(chain(finished, models, step_checkpoints(path), sorted(path.glob("*.slim.pt"))), None)
            if found is not None:
                return found
    there = ", ".join(sorted(map(str, HOME.rglob(BEST))))
    raise FileNotFoundError(f"no checkpoint at {name}; {f'there is {there}' if there else 'train a model first: python train.py'}")


def load_content(name: str) -> tuple[Path, dict]:
    """What `--checkpoint NAME` means, told in a line, and its content. Raises FileNotFoundError, ValueError."""
    path = find_checkpoint(name)
    if path.suffix == ENDING:
        raise ValueError(f"{path} is an ONNX file, which only generate.py and evaluate.py read; take the checkpoint that it was made from")
    if path.name.endswith(ELSEWHERE):
        raise ValueError(f"{path} was exported for other programs; take the checkpoint that it was made from")
    content = huggingface.load_folder(path) if path.is_dir() else load_checkpoint(path)
    notice(f"{path}, step {content['step']}")
    return path, content


def read_tokenizer(content: dict, name: str) -> TextTokenizer:
    """The tokenizer of a checkpoint's content. Raises ValueError unless it has as many ids as the model."""
    tokenizer, known = TextTokenizer(content["tokenizer"], name), content["model_config"]["vocab_size"]
    if tokenizer.vocab_size != known:
        unlike = f"its tokenizer has {tokenizer.vocab_size} ids, but its model {known}"
        raise ValueError(f"{name} can't be used: {unlike}; put the tokenizer there that it was trained with, or take another model")
    return tokenizer


def load_model(name: str, device: str = "cpu") -> tuple[GPT, TextTokenizer, Path, dict]:
    """What `--checkpoint NAME` means: network in evaluation mode, tokenizer, the file or HF folder, its content.

    Raises FileNotFoundError, and ValueError where weights and configuration disagree.
    """
    path, content = load_content(name)
    tokenizer = read_tokenizer(content, str(path))
    with Uninitialised():  # its weights come from the file
        model = GPT(GPTConfig(**content["model_config"]))
    load_weights(model, content["model"], str(path))
    return model.to(device).eval(), tokenizer, path, content


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict] | None:
    """The newest complete checkpoint that is whole; damaged newer ones are named. None if the run has none at all.

    Raises ValueError if all are damaged.
    """
    paths = step_checkpoints(run_dir)
    for path in paths:
        try:
            return path, load_checkpoint(path, complete=True)
        except ValueError as error:
            notice(f"warning: {error}")
    if paths:
        raise ValueError(f"no checkpoint in {run_dir} can be read; start again with --overwrite")
    return None


def is_occupied(run_dir: Path) -> bool:
    """Whether a directory holds a run, whole or begun."""
    return (run_dir / METRICS).exists() or (run_dir / BEST).exists() or bool(step_checkpoints(run_dir))


def _is_checkpoint(path: Path) -> bool:
    """Whether train.py wrote this file; it may be damaged."""
    try:
        return torch.load(path, mmap=True, weights_only=True).keys() >= Checkpoint.__required_keys__
    except Exception:  # a foreign file raises a dozen kinds
        return False


def written_names(run_dir: Path) -> set[str]:
    """The names in a directory that its run wrote, as its config.json lists them. Empty where no run is."""
    config, steps = peek_json(run_dir / CONFIG), step_checkpoints(run_dir)
    ours = isinstance(config, dict) and {"model", "train", "data"} <= config.keys()
    if not ours and not any(map(_is_checkpoint, (run_dir / BEST, *steps))):
        return set()
    listed = config.get("files") if ours else None  # what was trained before there were lists may hold all
    names = {name for name in (*WRITTEN, TENSORBOARD) if not isinstance(listed, list) or name in listed}
    if isinstance(config, dict) and not ours:  # a checkpoint was put into somebody else's model folder
        names -= {CONFIG, "tokenizer.json"}
    return names | {path.name for path in steps}


def check_place(run_dir: Path, tensorboard: bool) -> None:
    """Raise ValueError where a run would replace what no run of ours wrote, or data."""
    ours = written_names(run_dir)
    if not ours and data_directory.written_names(run_dir):
        raise ValueError(f"{run_dir} holds prepared data; choose another --out_dir")
    names = [*WRITTEN, *[TENSORBOARD] * tensorboard, *(path.name for path in step_checkpoints(run_dir))]
    check_names(run_dir, [*names, *([] if ours else (*EVALUATIONS, RECORD))], ours, "out_dir", folders=(TENSORBOARD,))


def find_resumed(resume: str | None, run_dir: Path) -> tuple[Path, dict] | None:
    """The step checkpoint that --resume asks for; None to start from the beginning. Raises FileNotFoundError, ValueError."""
    if resume is None:
        return None
    if resume != "auto" and Path(resume).is_file():
        return Path(resume), load_checkpoint(Path(resume), complete=True)
    found = newest_checkpoint(run_dir if resume == "auto" else Path(resume))
    if found is None and resume != "auto":
        raise FileNotFoundError(f"no checkpoint at {resume}; give a run directory or a step_*.pt, or start without --resume")
    return found


def check_branch(path: Path, run_dir: Path) -> None:
    """Refuse to resume `path` where newer checkpoints would be mixed with those to come, or into another run's directory.

    Newer ones that are damaged are set aside. Raises ValueError.
    """
    if path.parent.resolve() != run_dir.resolve():
        if is_occupied(run_dir):
            raise ValueError(f"{run_dir} holds a run already; choose another --out_dir to continue {path} in")
        return
    for newer in (p for p in step_checkpoints(run_dir) if p.name > path.name):
        try:
            load_checkpoint(newer, complete=True)
        except ValueError:
            newer.rename(newer.with_suffix(".pt.damaged"))
        else:
            raise ValueError(f"{run_dir} goes on to {newer.name}; delete what is newer than {path.name}, or continue in another --out_dir")


def delete_old_checkpoints(run_dir: Path, keep: int | str) -> None:
    """Keep the newest `keep` step checkpoints (a number, or "all")."""
    if keep != "all":
        for path in step_checkpoints(run_dir)[keep:]:
            path.unlink()


def written_paths(run_dir: Path) -> list[Path]:
    """All that a run wrote into its directory, and what was evaluated and exported from it."""
    names = written_names(run_dir)
    if names and is_occupied(run_dir):
        names |= {name for name, kind in EVALUATIONS.items() if is_of_kind(run_dir / name, kind)}
        names |= {RECORD, *recorded} if (recorded := read_record(run_dir)) else set()
    return [run_dir / name for name in sorted(names)]


@contextlib.contextmanager
def sole_trainer(run_dir: Path, tensorboard: bool) -> Iterator[None]:
    """Hold a run directory for one training; whoever only reads needs no lock. Raises ValueError where another one trains, see also
    `check_place`."""
    ours = "|".join(map(re.escape, WRITTEN))
    with sole_writer(run_dir, "train", "out_dir", rf"{ours}|step_\d+\.pt"):
        check_place(run_dir, tensorboard)
        shutil.rmtree(run_dir / NEXT, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(run_dir / NEXT, ignore_errors=True)


def prepared_data(run_dir: Path) -> Path:
    """Where the data of a run with --dataset is: in its own data/, or still waiting to take that one's place."""
    waiting = run_dir / NEXT / DATA
    return waiting if (waiting / data_directory.META).is_file() else run_dir / DATA


def clear_run(run_dir: Path) -> None:
    """Make room for a new run: delete what the old one wrote and what was exported from it; data that waits takes its place.

    Other files stay. Raises ValueError, before anything is changed, and OSError.
    """
    with sole_writer(run_dir, "export", "out_dir", "export"):
        if prepared_data(run_dir) != run_dir / DATA:
            data_directory.move_data(prepared_data(run_dir), run_dir / DATA)
        for path in written_paths(run_dir):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        fsync_directory(run_dir)
