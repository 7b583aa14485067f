"""What a run starts from: nothing, a run to resume, or another model's weights; and the configuration that follows, resolved once."""

import dataclasses
import hashlib
import math
import os
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_type_hints

from utils import Checked, normalize_flags, notice, parse_flags, parse_weighted, replace_fields

from config import FINE_TUNING, PRESETS, GPTConfig, TrainConfig, model_config, train_config
from formats import huggingface
from formats.checkpoint import load_checkpoint
from formats.data_directory import DataDirectory
from formats.run_directory import BEST, HOME, is_finished, is_occupied, load_content, newest_checkpoint, read_tokenizer
from formats.tokenizer import KINDS, TextTokenizer, gpt2_tokenizer, load_tokenizer
from training.data_order import TrainingData

# What may differ from the run that is resumed; anything else would make it another run. The data is compared by its hash.
CHANGEABLE = {"data_dir", "out_dir", "max_steps", "epochs", "max_tokens", "patience", "warmup_steps", "learning_rate", "muon_learning_rate"}
CHANGEABLE |= {"eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints", "log_interval", "sample_tokens", "sample_prompt"}
CHANGEABLE |= {"tensorboard", "device", "dtype", "compile"}
OF_THIS_RUN = {"dropout", "flash", "block_size"}  # what may differ from the shape of the model of --init_from
PLACES = {"data_dir", "out_dir"}  # where a run lives, not what it is
LENGTHS = ("max_steps", "epochs", "max_tokens")

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium")}

# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Arguments(Checked):
    """What one call of train.py works on; how it trains stands in TrainConfig and GPTConfig."""

    dataset: str | None = None
    """Instead of --data_dir: a file as prepare_data.py reads (or a hub dataset), which is prepared into the run's own data/ first."""
    tokenizer: str | None = None
    """For --dataset: gpt2 (default), bpe, wordpiece, word, char, byte or a tokenizer.json. For data without meta.json: its tokenizer."""
    preset: str | None = None
    """nano, mini, tiny, small or medium: a model and the training values that go with it."""
    resume: str | None = None
    """auto: continue the run in the run directory if there is one, else start it. Or the path of a run or step checkpoint."""
    init_from: str | None = None
    """Start from the weights of a checkpoint, run directory, HF folder (GPT-2 or Qwen3) or gpt2, with fine-tuning's rates and length."""
    also_eval: tuple[str, ...] = ()
    """Further data directories to evaluate on while training, e.g. the old domain; the best model is chosen by the first --data_dir."""
    overwrite: bool = False
    """Delete the run that occupies the run directory and start afresh."""
    verify_data: bool = False
    """Compare token files above 2 GB too with the SHA-256 in meta.json before training; smaller ones always are."""
    export: tuple[str, ...] = ()
    """Formats to export the best model to at the end, as export_model.py --format."""
    model: GPTConfig = field(default_factory=lambda: model_config)
    train: TrainConfig = field(default_factory=lambda: train_config)


def changed(config, values: dict, where: str):
    """A copy of a configuration with values that stand in config.py. Raises ValueError that says where."""
    try:
        return dataclasses.replace(config, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.py: {where}: {error}") from None


def preset_of(words: list[str]) -> tuple[GPTConfig, TrainConfig, dict[str, object]]:
    """config.py's configurations with the values of --preset and the family of --arch, and those that the preset asks for by name.

    What may change from run to run counts as asked for only by a flag, so that a preset doesn't shorten a longer run when it is resumed.
    """
    flags = dict(word.partition("=")[::2] if "=" in word else (word, following) for word, following in zip(words, [*words[1:], ""]))
    model, train, asked = model_config, train_config, {}
    name = flags.get("--preset")
    if name is not None:
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; take one of {', '.join(PRESETS)}")
        make_model, values = PRESETS[name]
        model, train = make_model(), changed(train, values, f"PRESETS[{name!r}]")
        asked = {key: value for key, value in (dataclasses.asdict(model) | values).items() if key not in CHANGEABLE | {"vocab_size"}}
    arch = flags.get("--arch", model.arch)
    if arch != model.arch and arch in get_args(get_type_hints(GPTConfig)["arch"]):
        model = dataclasses.replace(model, arch=arch, bias=None, n_kv_head=None, rope_theta=None)  # the family's own
        asked = {key: value for key, value in asked.items() if key not in ("bias", "n_kv_head", "rope_theta")}
    return model, train, asked


def read_arguments(argv: list[str] | None, doc: str | None) -> tuple[Arguments, dict[str, object]]:
    """The command line over preset and config.py; and name -> value of the fields that flags or the preset set. Raises ValueError."""
    for name, value, kind in (("model_config", model_config, GPTConfig), ("train_config", train_config, TrainConfig)):
        if not isinstance(value, kind):
            raise ValueError(f"config.py: {name} must be a {kind.__name__}, not {value!r}")
    words = normalize_flags(Arguments, sys.argv[1:] if argv is None else list(argv), {})
    model, train, asked = preset_of(words)
    args = parse_flags(Arguments, words, doc, default=Arguments(model=model, train=train))
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    flags = {name: value for name, value in (vars(args.model) | vars(args.train)).items() if name in given}
    lengths = [name for name in LENGTHS if name in flags]
    problems = {
        "give either --data_dir or --dataset, not both": args.dataset and "data_dir" in flags,
        "--resume continues a run and --overwrite deletes it; give one of them": args.resume and args.overwrite,
        f"--{' and --'.join(lengths)} both set the length of the run; give one of them": len(lengths) > 1,
        "--preset chooses a shape and --init_from brings its own; leave --preset out": args.init_from and args.preset,
        "--init_from brings its own tokenizer; leave --tokenizer out": args.init_from and args.dataset and args.tokenizer,
        "--tensorboard needs the package tensorboard; run: pip install tensorboard": args.train.tensorboard
        and not find_spec("tensorboard"),
    }
    if any(problems.values()):
        raise ValueError("; ".join(problem for problem, there in problems.items() if there))
    if lengths:  # replaces whatever length config.py or a preset sets
        others = {name: None for name in ("epochs", "max_tokens") if name not in lengths}
        args, flags = dataclasses.replace(args, train=dataclasses.replace(args.train, **others)), flags | others
    return args, asked | flags


def run_directory(args: Arguments, asked: dict[str, object]) -> Path:
    """Where the run lives: where a flag says, beside the checkpoint to resume, where config.py says, or below ./checkpoints by the name
    of its data."""
    if args.resume not in (None, "auto") and "out_dir" not in asked:
        path = Path(args.resume)
        return path.parent if path.suffix == ".pt" else path
    if args.train.out_dir is not None:
        return Path(args.train.out_dir)
    if args.dataset is not None:
        return HOME / Path(args.dataset).stem
    directories = [Path(parse_weighted(text)[0]) for text in args.train.data_dir]
    return HOME if directories == [Path("data")] else HOME / "+".join(directory.resolve().name for directory in directories)


# ---------------------------------------------------------------- the configuration


def resolve(args: Arguments, asked: dict, vocab_size: int, resumed: dict | None, source: dict | None) -> tuple[GPTConfig, TrainConfig]:
    """The run's configuration: that of the resumed checkpoint, of the source's model, or as asked; changed where that may be.

    vocab_size: the data's. Raises ValueError for a change that would make it another run or another model.
    """
    if resumed is not None:
        owner, places = "the run to resume", {name: getattr(args.train, name) for name in PLACES}
        asked = {name: value for name, value in asked.items() if name != "vocab_size"} | places
        another = ", or start in another --out_dir"
        model = replace_fields(GPTConfig(**resumed["model_config"]), asked, CHANGEABLE, owner, another)
        return model, replace_fields(TrainConfig(**resumed["train_config"]), asked, CHANGEABLE, owner, another)
    if source is not None:
        name, shape = source["origin"]["name"], source["model_config"]
        if asked.get("block_size", 0) > shape["block_size"]:
            raise ValueError(f"block_size={asked['block_size']}, but {name} has learned {shape['block_size']} positions; pass at most that")
        model = replace_fields(GPTConfig(**shape | {"dropout": 0.0, "flash": True}), asked, OF_THIS_RUN, name)
        return model, fine_tuning(args.train, asked, model.n_embd)
    if asked.get("vocab_size") not in (None, vocab_size) and args.dataset is None:
        raise ValueError(f"vocab_size={asked['vocab_size']}, but the data's tokenizer has {vocab_size} ids; leave --vocab_size out")
    return dataclasses.replace(args.model, vocab_size=vocab_size), args.train


def fine_tuning(config: TrainConfig, asked: dict[str, object], n_embd: int) -> TrainConfig:
    """The configuration with fine-tuning's values, for a model of this width, in the fields that nobody asked for."""
    values = {name: value for name, value in FINE_TUNING.items() if name not in asked}
    if any(asked.get(name) is not None for name in LENGTHS):
        values["epochs"] = asked.get("epochs")
    if "learning_rate" in values:
        values["learning_rate"] *= min(1.0, 128 / n_embd)
    elif "muon_learning_rate" in values and config.optimizer == "muon":
        notice(f"--muon_learning_rate is {values['muon_learning_rate']}, fine-tuning's own; --learning_rate is the AdamW part's")
    return changed(config, values, "FINE_TUNING")


def fix_length(config: TrainConfig, keep_warmup: bool, data: TrainingData) -> TrainConfig:
    """The configuration with epochs or tokens turned into steps, and warmup at most a tenth of the run unless it is to be kept."""
    max_steps = config.max_steps
    if config.max_tokens is not None:
        max_steps = math.ceil(config.max_tokens / (config.windows_per_step * data.block_size))
    if config.epochs is not None:
        if data.mixed:
            raise ValueError("--epochs has no meaning for weighted directories; give --max_steps or --max_tokens")
        max_steps = max(1, math.ceil(config.epochs * data.samples_per_epoch / config.windows_per_step))
    warmup = config.warmup_steps if keep_warmup else min(config.warmup_steps, max_steps // 10)
    return dataclasses.replace(config, max_steps=max_steps, warmup_steps=warmup)


# ---------------------------------------------------------------- another model's weights


def read_source(name: str) -> dict:
    """The model that `--init_from NAME` means, as the content of a checkpoint with an `origin`, its name and a hash of its
    weights, the `path` of its file or folder if it is on this machine, and the `folder` that holds its tokenizer.

    NAME is whatever --checkpoint takes, or gpt2, gpt2-medium from the Hugging Face hub. Raises FileNotFoundError, ValueError.
    """
    if name in HUB_NAMES and not Path(name).exists():
        path, folder = None, name
        content = huggingface.load_folder(download(name))
    else:
        path, content = load_content(name)
        folder = path if path.is_dir() else path.parent
    read_tokenizer(content, name)  # refused before anything is prepared with it
    digest = hashlib.sha256()
    for key, weight in sorted(content["model"].items()):
        digest.update(key.encode() + weight.contiguous().numpy().tobytes())
    return content | {"origin": {"name": name, "sha256": digest.hexdigest()}, "path": path, "folder": str(folder)}


def download(name: str) -> Path:
    """The folder with GPT-2's published weights, fetched once. Raises ValueError if the hub can't be reached."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", "tokenizer.json"]
    try:
        return Path(snapshot_download(HUB_NAMES[name], allow_patterns=files, etag_timeout=5))
    except Exception as error:  # its own kinds, requests', httpx', the system's
        instead = "give --init_from a folder with its config.json, model.safetensors and tokenizer.json, or a checkpoint"
        raise ValueError(f"{name} can't be had from the Hugging Face hub ({type(error).__name__}); {instead}") from None


# ---------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Start:
    """What a run starts from, all questions answered and nothing written yet.

    directories: the data; also: further directories to evaluate on; resumed: the checkpoint to go on from and its content;
    source: the model to start from, as read_source gives it.
    """

    run_dir: Path
    model_config: GPTConfig
    config: TrainConfig
    directories: list[DataDirectory]
    also: list[DataDirectory]
    data: TrainingData
    resumed: tuple[Path, dict] | None
    source: dict | None

    @property
    def names(self) -> list[str]:
        """The data directories as the user named them."""
        return [directory.name for directory in self.directories]

    def compile(self, device: str) -> bool | str:
        """What is asked of torch.compile: for auto in a resumed run on the same kind of device, what its earlier part did."""
        before = self.resumed[1]["resume"]["environment"] if self.resumed else {}
        if self.config.compile != "auto" or before.get("device") != device.partition(":")[0]:
            return self.config.compile
        return before["compile"] == "True"

    def content(self) -> dict:
        """What every checkpoint of the run holds besides its step and weights."""
        return {
            "model_config": dataclasses.asdict(self.model_config),
            "train_config": dataclasses.asdict(self.config),
            "tokenizer": self.directories[0].tokenizer.json,
            "data": self.data.fingerprint,
            "init_from": self.resumed[1].get("init_from") if self.resumed else self.source and self.source["origin"],
        }

    def same_run(self, content: dict) -> bool:
        """Whether a checkpoint belongs to this very run, wherever its directories are."""
        mine, train = self.content(), TrainConfig(**content["train_config"])
        train = dataclasses.replace(train, **{name: getattr(self.config, name) for name in PLACES})
        return train == self.config and all(content.get(key) == mine[key] for key in ("model_config", "data", "init_from"))

    def finished_step(self, overwrite: bool, resume: str | None) -> int | None:
        """The last step of this very run, if the run directory holds it finished. Raises ValueError if another one is in the way."""
        if self.resumed is not None:
            content = self.resumed[1]
            return content["step"] if is_finished(content, self.config) else None
        if overwrite or not is_occupied(self.run_dir):
            return None
        newest = newest_checkpoint(self.run_dir)
        if newest is not None and self.same_run(newest[1]) and is_finished(newest[1]):
            return newest[1]["step"]
        best = self.run_dir / BEST
        if resume == "auto" and newest is None and (not best.exists() or self.same_run(load_checkpoint(best))):
            return None  # this run, begun, but stopped before its first complete checkpoint
        choices = "continue it with --resume auto, delete it with --overwrite, or choose another --out_dir"
        raise ValueError(f"{self.run_dir} holds another run; {choices}")


def make_start(
    args: Arguments, asked: dict, resumed: tuple[Path, dict] | None, source: dict | None, directories: list, weights: list
) -> Start:
    """Put together what was read, and resolve the configuration. Raises ValueError, FileNotFoundError for what can't be done.

    directories, weights: as open_directories gives them.
    """
    first = directories[0]
    if source is not None:  # else the data's ids would mean nothing to the model
        name = source["origin"]["name"]
        first.check_tokenizer(TextTokenizer(source["tokenizer"], name), name, source["folder"])
    model_config, config = resolve(args, asked, first.tokenizer.vocab_size, resumed and resumed[1], source)
    data = TrainingData(directories, weights, model_config.block_size, config.seed)
    config = fix_length(config, "warmup_steps" in asked or resumed is not None, data)
    if resumed is not None:
        path, content = resumed
        if content["data"] != data.fingerprint:
            before = " ".join(content["train_config"]["data_dir"])
            raise ValueError(f"{path} was trained on other data; give its --data_dir {before}, or another --out_dir")
        first.check_tokenizer(read_tokenizer(content, str(path)), path, path.parent)
        if args.init_from is not None and (content.get("init_from") or {}).get("name") != args.init_from:
            raise ValueError(f"{path} did not start from {args.init_from}; leave --init_from out, or choose another --out_dir")
    also = [DataDirectory(name, first.tokenizer, args.verify_data) for name in args.also_eval]
    for directory in also:
        directory.check_tokenizer(first.tokenizer, first.name, first.name, "--also_eval ")
    return Start(run_directory(args, asked), model_config, config, directories, also, data, resumed, source)


def open_directories(
    names: tuple[str, ...], tokenizer_name: str | None, verify: bool = False
) -> tuple[list[DataDirectory], list[Fraction | None]]:
    """The data directories DIR or DIR:WEIGHT and their weights. tokenizer_name: gpt2 or a path, for directories without meta.json."""
    paths, weights = zip(*map(parse_weighted, names))
    if tokenizer_name in KINDS and tokenizer_name != "gpt2":
        raise ValueError(f"--tokenizer {tokenizer_name} is trained on text; for token files give the path of their tokenizer.json")
    tokenizer = None if tokenizer_name is None else gpt2_tokenizer() if tokenizer_name == "gpt2" else load_tokenizer(tokenizer_name)
    directories = [DataDirectory(path, tokenizer, verify) for path in paths]
    if tokenizer is not None and not tokenizer.same_ids(directories[0].tokenizer):
        raise ValueError(f"{paths[0]} was prepared with another tokenizer than {tokenizer_name}; leave --tokenizer out")
    return directories, list(weights)
