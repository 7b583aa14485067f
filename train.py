"""Token files -> checkpoints: train a model, or continue a training.

    python train.py --preset nano
    python train.py --data_dir ./data_stories --preset mini --max_steps 2000 --out_dir ./checkpoints/stories
    python train.py --dataset path/to/dataset.txt --epochs 10 --batch_size 32
    python train.py --preset nano --resume auto

A flag overrides `--preset`, which overrides what stands in config.py. Every field of GPTConfig and TrainConfig is a flag.
"""

from utils import (
    StopSignal,
    choose_device,
    given_flags,
    needs_packages,
    normalize_flags,
    notice,
    parse_command_line,
    run_script,
)

with needs_packages():
    import dataclasses
    import hashlib
    import math
    import sys
    import time
    from collections.abc import Callable
    from dataclasses import dataclass, field
    from pathlib import Path
    from typing import get_args

    import torch

    import checkpoints_io as ckpt
    import config as settings
    from config import PRESETS, Arch, GPTConfig, TrainConfig
    from estimates import duration, memory_estimate, seconds_per_step
    from models import GPT
    from run_log import METRICS, MetricsLog, plot_losses, write_config
    from token_files import META, DataDirectory, TrainingData, parse_weighted
    from tokenizers_io import TextTokenizer, make_tokenizer
    from trainer import Run

# What may change when a run is resumed; everything else would make it another run.
CHANGEABLE = {"max_steps", "epochs", "eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints", "log_interval"}
CHANGEABLE |= {"device", "dtype", "compile", "warmup_steps", "learning_rate", "muon_learning_rate"}
FAMILY_FIELDS = {"bias": None, "n_kv_head": None, "rope_theta": None}
LONG_ON_CPU = 6 * 3600  # seconds


@dataclass(frozen=True)
class Arguments:
    """What one call of train.py works on; how it trains stands in TrainConfig and GPTConfig."""

    data_dir: tuple[str, ...] = ("./data",)
    """Data directories, DIR or DIR:WEIGHT. Several are read as one; with weights they are mixed in those shares."""
    dataset: str | None = None
    """Instead of --data_dir: a text file (or hub dataset) that is prepared into the run's own data/ first."""
    tokenizer: str | None = None
    """For --dataset: gpt2 (default), bpe, byte, char or a tokenizer.json. For a data directory without meta.json: its tokenizer."""
    out_dir: str | None = None
    """The run directory. Default: ./checkpoints for ./data, ./checkpoints/NAME for a data directory or dataset of that name."""
    preset: str | None = None
    """nano, mini, tiny, small or medium: a model and the training values that go with it."""
    resume: str | None = None
    """auto: continue the run in the run directory if there is one, else start it. Or the path of a run or step checkpoint."""
    overwrite: bool = False
    """Delete the run that occupies the run directory and start afresh."""
    export: tuple[str, ...] = ()
    """Formats to export the best model to at the end, as export_model.py --format."""
    model: GPTConfig = field(default_factory=lambda: settings.model_config)
    train: TrainConfig = field(default_factory=lambda: settings.train_config)


# ---------------------------------------------------------------- what to train


def read_arguments(argv: list[str] | None) -> tuple[Arguments, set[str]]:
    """The command line, and the names of the fields that it (or its preset) sets explicitly. Raises ValueError."""
    words = normalize_flags(Arguments, sys.argv[1:] if argv is None else list(argv), {})
    given = given_flags(words)
    flags = dict(zip(words, words[1:]))
    model, train = settings.model_config, settings.train_config
    preset = flags.get("--preset")
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; take one of {', '.join(PRESETS)}")
        make_model, values = PRESETS[preset]
        model, train = make_model(), dataclasses.replace(train, **values)
        given = given | (values.keys() | {f.name for f in dataclasses.fields(GPTConfig)}) - CHANGEABLE - {"vocab_size"}
    arch = flags.get("--arch")
    if arch in get_args(Arch) and arch != model.arch:
        model = dataclasses.replace(model, arch=arch, **FAMILY_FIELDS)
    args = parse_command_line(Arguments, words, __doc__, default=Arguments(model=model, train=train))
    if not args.data_dir:
        raise ValueError("--data_dir needs a directory; make one with prepare_data.py")
    if args.dataset is not None and "data_dir" in given:
        raise ValueError("give either --data_dir or --dataset, not both")
    if args.resume is not None and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them")
    if "max_steps" in given_flags(words) and "epochs" in given:
        raise ValueError("--max_steps and --epochs both set the length of the run; give one of them")
    if "max_steps" in given_flags(words):
        args, given = dataclasses.replace(args, train=dataclasses.replace(args.train, epochs=None)), given | {"epochs"}
    return args, given


def run_directory(args: Arguments) -> Path:
    """Where the run lives, from the flags alone."""
    if args.out_dir is not None:
        return Path(args.out_dir)
    if args.resume not in (None, "auto"):
        path = Path(args.resume)
        return path.parent if path.suffix == ".pt" else path
    if args.dataset is not None:
        return Path("checkpoints") / Path(args.dataset).stem
    directories = [Path(parse_weighted(text)[0]) for text in args.data_dir]
    if directories == [Path("data")]:
        return Path("checkpoints")
    return Path("checkpoints") / "+".join(directory.resolve().name for directory in directories)


def prepare_dataset(args: Arguments, given: set[str], run: Path, resuming: bool) -> Path:
    """Prepare --dataset into the run's own data/, unless it holds the same already or a run on it is resumed. Returns that directory."""
    import prepare_data

    if resuming and (run / "data" / META).is_file():
        return run / "data"
    source = {"input": (args.dataset,)} if Path(args.dataset).exists() else {"dataset": args.dataset}
    asked = {"vocab_size": args.model.vocab_size} if "vocab_size" in given else {}
    prepare_args = prepare_data.Arguments(**source, output=str(run / "data"), tokenizer=args.tokenizer, seed=args.train.seed, **asked)
    if (run / "data" / META).is_file() and Path(args.dataset).is_file():
        meta = DataDirectory(run / "data").meta
        with open(args.dataset, "rb") as file:
            same_source = [s["sha256"] for s in meta["sources"]] == [hashlib.file_digest(file, "sha256").hexdigest()]
        if same_source and meta["made_with"] == prepare_data.made_with(prepare_args) and meta["seed"] == args.train.seed:
            notice(f"{run / 'data'} holds {args.dataset} already")
            return run / "data"
    if ckpt.is_occupied(run) and not args.overwrite:
        raise ValueError(f"{run} holds a run on other data; choose another --out_dir, or --overwrite to delete it")
    prepare_data.prepare(prepare_args)
    return run / "data"


def open_data(args: Arguments, given: set[str], run: Path, resuming: bool) -> tuple[list[DataDirectory], list]:
    """The data directories and their weights."""
    if args.dataset is not None:
        return [DataDirectory(prepare_dataset(args, given, run, resuming))], [None]
    names, weights = zip(*map(parse_weighted, args.data_dir))
    if args.tokenizer in ("bpe", "char"):
        raise ValueError(f"--tokenizer {args.tokenizer} is trained on text; for token files give the path of their tokenizer.json")
    tokenizer = make_tokenizer(args.tokenizer, (), 0) if args.tokenizer is not None else None
    directories = [DataDirectory(name, tokenizer) for name in names]
    if tokenizer is not None and tokenizer.sha256 != directories[0].tokenizer.sha256:
        raise ValueError(f"{names[0]} was prepared with another tokenizer than {args.tokenizer}; leave --tokenizer out")
    return directories, list(weights)


def fit_to_data(args: Arguments, given: set[str], tokenizer: TextTokenizer) -> GPTConfig:
    """The model's shape with the tokenizer's vocabulary. Raises ValueError if a flag asks for another."""
    asked = args.model.vocab_size
    if "vocab_size" in given and args.dataset is None and asked != tokenizer.vocab_size:
        raise ValueError(f"vocab_size={asked}, but the data's tokenizer has {tokenizer.vocab_size} ids; leave --vocab_size out")
    return dataclasses.replace(args.model, vocab_size=tokenizer.vocab_size)


def fix_length(config: TrainConfig, keep_warmup: bool, data: TrainingData) -> TrainConfig:
    """The configuration with epochs turned into steps, and warmup at most a tenth of the run unless it is to be kept."""
    max_steps = config.max_steps
    if config.epochs is not None:
        if data.mixed:
            raise ValueError("--epochs has no meaning for weighted directories; give --max_steps")
        max_steps = max(1, math.ceil(config.epochs * data.samples_per_epoch / (config.batch_size * config.gradient_accumulation_steps)))
    warmup = config.warmup_steps if keep_warmup else min(config.warmup_steps, max_steps // 10)
    return dataclasses.replace(config, max_steps=max_steps, warmup_steps=warmup)


def merge_resumed(args: Arguments, given: set[str], content: dict) -> tuple[GPTConfig, TrainConfig]:
    """The saved run's configuration, with those changes that flags ask for. Raises ValueError for a change that makes it another run."""
    saved = {GPTConfig: content["model_config"], TrainConfig: content["train_config"]}
    merged = []
    for kind, now in ((GPTConfig, args.model), (TrainConfig, args.train)):
        values = saved[kind].copy()
        for name in [f.name for f in dataclasses.fields(kind) if f.name in given]:
            value = getattr(now, name)
            if value != values[name] and name not in CHANGEABLE:
                raise ValueError(
                    f"the run to resume has {name}={values[name]}, not {value}; leave the flag out, or start in another --out_dir"
                )
            values[name] = value
        merged.append(kind(**values))
    return merged[0], merged[1]


def announce(run: Run) -> None:
    """Print what is about to happen: size, data, length, precision, memory and an honest estimate of the time."""
    model, data, config, device, tokens = run.model, run.data, run.config, run.device, run.tokens_per_step
    shape, steps_left = model.config, run.config.max_steps - run.progress.step
    epochs = config.max_steps * tokens / (data.samples_per_epoch * shape.block_size)
    notice(
        f"model      {shape.arch}, {shape.n_layer} layers x {shape.n_embd}, {shape.n_head} heads, block {shape.block_size}, "
        f"vocabulary {shape.vocab_size}: {model.num_parameters():,} parameters, "
        f"{model.num_parameters(embedding=False):,} of them besides the token embedding"
    )
    notice(
        f"data       {' '.join(run.names)}: {sum(map(len, data.sources)):,} training tokens; "
        f"validation on the first {len(run.prefix.tokens):,} tokens of {run.names[0]}"
    )
    notice(
        f"run        {config.max_steps:,} steps of {tokens:,} tokens ({config.batch_size} x {config.gradient_accumulation_steps} windows) "
        f"= {epochs:.2f} epochs; {config.optimizer}, warmup {config.warmup_steps} steps, {config.lr_schedule} decay"
    )
    why, compiling = run.precision[1], run.compiling
    notice(f"precision  {run.environment()['dtype']} on {device}: {why}; compile {compiling[0]}: {compiling[1]}")
    notice(f"memory     about {memory_estimate(model, config, run.dtype) / 1e9:.1f} GB")
    seconds = steps_left * seconds_per_step(model, data, config, device, run.dtype)
    notice(f"time       about {duration(seconds)} for {steps_left:,} steps at the speed just measured, plus evaluations")
    if device == "cpu" and seconds > LONG_ON_CPU:
        directories = "" if run.names == ["./data"] else " --data_dir " + " ".join(run.names)
        notice(f"           that is long; for a model in minutes: python train.py --preset nano{directories} --out_dir checkpoints/nano")


def find_resumed(args: Arguments, run: Path) -> tuple[Path, dict] | None:
    """The step checkpoint that --resume asks for; None to start from the beginning. Raises FileNotFoundError, ValueError."""
    if args.resume is None:
        return None
    if args.resume != "auto" and Path(args.resume).is_file():
        content = ckpt.load_checkpoint(Path(args.resume))
        if "resume" not in content:
            raise ValueError(f"{args.resume} holds weights only and can't be resumed; give a step_*.pt or the run directory")
        return Path(args.resume), content
    found = ckpt.newest_checkpoint(run if args.resume == "auto" else Path(args.resume))
    if found is None and args.resume != "auto":
        raise FileNotFoundError(f"no checkpoint at {args.resume}; give a run directory or a step_*.pt, or start without --resume")
    return found


def is_claimed(args: Arguments, run: Path, same_run: Callable[[dict], bool], max_steps: int) -> bool:
    """Whether a new run's directory holds that very run, finished. Raises ValueError if it holds another one that must not be deleted."""
    if args.overwrite or not ckpt.is_occupied(run):
        return False
    newest = ckpt.newest_checkpoint(run)
    if newest is not None and same_run(newest[1]) and newest[1]["step"] >= max_steps:
        return True
    best = run / ckpt.BEST
    if args.resume == "auto" and newest is None and (not best.exists() or same_run(ckpt.load_checkpoint(best))):
        return False  # this run, begun, but stopped before its first complete checkpoint
    raise ValueError(f"{run} holds another run; continue it with --resume auto, delete it with --overwrite, or choose another --out_dir")


def check_branch(resumed: tuple[Path, dict], run: Path) -> None:
    """Refuse to resume where newer checkpoints would be mixed with those to come, or into another run's directory. Raises ValueError."""
    path, _ = resumed
    if path.parent.resolve() != run.resolve():
        if ckpt.is_occupied(run):
            raise ValueError(f"{run} holds a run already; choose another --out_dir to continue {path} in")
        return
    newer = [p for p in ckpt.step_checkpoints(run) if p.name > path.name]
    for damaged in [p for p in newer if not ckpt.is_whole(p)]:
        damaged.rename(damaged.with_suffix(".pt.damaged"))
        newer.remove(damaged)
    if newer:
        raise ValueError(f"{run} goes on to {newer[0].name}; delete what is newer than {path.name}, or continue in another --out_dir")


def main(argv: list[str] | None = None) -> int:
    args, given = read_arguments(argv)
    run_path = run_directory(args)
    if args.export:
        import export_model

        export_model.check_formats(args.export)
    device = choose_device(args.train.device)
    resumed = find_resumed(args, run_path)
    directories, weights = open_data(args, given, run_path, resumed is not None)
    if resumed is not None:
        model_config, config = merge_resumed(args, given - {"vocab_size"}, resumed[1])
    else:
        model_config, config = fit_to_data(args, given, directories[0].tokenizer), args.train
    data = TrainingData(directories, weights, model_config.block_size, config.seed)
    config = fix_length(config, "warmup_steps" in given or resumed is not None, data)

    def same_run(content: dict) -> bool:
        same_config = content["model_config"] == dataclasses.asdict(model_config) and content["train_config"] == dataclasses.asdict(config)
        return same_config and content["data"] == data.fingerprint

    if resumed is not None and resumed[1]["data"] != data.fingerprint:
        raise ValueError(f"{resumed[0]} was trained on other data; give its --data_dir, or another --out_dir")
    if resumed is not None:
        finished = resumed[1]["step"] >= config.max_steps and not resumed[1]["resume"]["progress"]["evaluation_due"]
    else:
        finished = is_claimed(args, run_path, same_run, config.max_steps)
    if finished:
        print(f"{run_path} holds this very run, finished at step {resumed[1]['step'] if resumed else config.max_steps}")
        return 0
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    run = Run(run_path, GPT(model_config).to(device), config, data, directories, device)
    if resumed is not None:
        check_branch(resumed, run_path)
        run.restore(*resumed)
    announce(run)
    run_path.mkdir(parents=True, exist_ok=True)
    if resumed is None:
        ckpt.clear_run(run_path)
    write_config(run_path, model_config, config, {"data": dict(zip(run.names, data.fingerprint)), "environment": run.environment()})
    started = time.perf_counter()
    metrics = MetricsLog(run_path / METRICS, resumed and (resumed[0].parent / METRICS, resumed[1]["resume"]["metrics"]))
    try:
        with StopSignal() as stop:
            run.train(metrics, stop)
    except FloatingPointError as error:
        notice(f"error: {error}")
        return 1
    except torch.OutOfMemoryError:
        raise ValueError("the GPU's memory is full; halve --batch_size and double --gradient_accumulation_steps") from None
    finally:
        metrics.close()
    plot_losses(run_path, run.floor(len(run.prefix.tokens) / math.log(2)))
    if stop:
        notice(f"stopped by signal {stop.number} at step {run.progress.step}, everything saved; continue with --resume auto")
        return 128 + stop.number
    print(f"{run_path}: {run.progress.step} steps in {duration(time.perf_counter() - started)}, {run.describe(run.last_summary)}")
    if args.export and not export_model.export(run_path / ckpt.BEST, args.export, run_path):
        return 1
    notice(f'next: python generate.py --checkpoint {run_path} --prompt "Once upon a time"')
    return 0


if __name__ == "__main__":
    run_script(main)
