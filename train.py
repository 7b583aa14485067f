"""Token files -> checkpoints: train a model, or continue a training.

    python train.py --preset nano
    python train.py --data_dir ./data_stories --preset mini --max_steps 2000 --out_dir ./checkpoints/stories
    python train.py --preset nano --resume auto
    python train.py --init_from checkpoints/stories --dataset book.txt --also_eval ./data_stories
    torchrun --nproc_per_node=2 train.py --preset nano

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
    write_atomically,
)

with needs_packages():
    import dataclasses
    import hashlib
    import importlib.util
    import math
    import sys
    import time
    from dataclasses import dataclass, field
    from pathlib import Path
    from typing import get_args

    import torch

    import config as settings
    from config import PRESETS, Arch, GPTConfig, TrainConfig
    from formats import checkpoint as ckpt
    from formats.data_directory import META, DataDirectory, TrainingData, parse_weighted
    from formats.metrics import METRICS, MetricsLog, plot_losses, write_config
    from models import GPT
    from preparation.tokenizer_kinds import make_tokenizer
    from training.estimates import check_memory, duration, seconds_per_step
    from training.processes import Processes
    from training.start import (
        CHANGEABLE,
        check_tokenizer,
        fit_to_data,
        fix_length,
        merge_resumed,
        read_source,
        source_shape,
        weights_for,
        with_values,
    )
    from training.step import Run

FAMILY_FIELDS = {"bias": None, "n_kv_head": None, "rope_theta": None}
LONG_ON_CPU = 6 * 3600  # seconds


@dataclass(frozen=True)
class Arguments:
    """What one call of train.py works on; how it trains stands in TrainConfig and GPTConfig."""

    data_dir: tuple[str, ...] = ("./data",)
    """Data directories, DIR or DIR:WEIGHT. Several are read as one; with weights they are mixed in those shares."""
    dataset: str | None = None
    """Instead of --data_dir: a file as prepare_data.py reads (or a hub dataset), which is prepared into the run's own data/ first."""
    tokenizer: str | None = None
    """For --dataset: gpt2 (default), bpe, wordpiece, word, char, byte or a tokenizer.json. For data without meta.json: its tokenizer."""
    out_dir: str | None = None
    """The run directory. Default: ./checkpoints for ./data, ./checkpoints/NAME for a data directory or dataset of that name."""
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
    lengths = [name for name in ("max_steps", "epochs", "max_tokens") if name in given_flags(words)]
    if len(lengths) > 1:
        raise ValueError(f"--{' and --'.join(lengths)} both set the length of the run; give one of them")
    if lengths:  # replaces whatever length config.py or a preset sets
        others = {name: None for name in ("epochs", "max_tokens") if name not in lengths}
        args, given = dataclasses.replace(args, train=dataclasses.replace(args.train, **others)), given | others.keys()
    if args.init_from is not None and preset is not None:
        raise ValueError("--preset chooses a shape and --init_from brings its own; leave --preset out")
    if args.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard; run: pip install tensorboard")
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
    source = {"input": (args.dataset,)} if Path(args.dataset).exists() else {"dataset": (args.dataset,)}
    asked = {"vocab_size": args.model.vocab_size} if "vocab_size" in given else {}
    prepare_args = prepare_data.Arguments(**source, output=str(run / "data"), tokenizer=args.tokenizer, seed=args.train.seed, **asked)
    if (run / "data" / META).is_file() and Path(args.dataset).is_file():
        meta = DataDirectory(run / "data").meta
        with open(args.dataset, "rb") as file:
            same_source = [s["sha256"] for s in meta["sources"]] == [hashlib.file_digest(file, "sha256").hexdigest()]
        if same_source and prepare_data.recorded(prepare_args).items() <= meta.items():
            notice(f"{run / 'data'} holds {args.dataset} already")
            return run / "data"
    if ckpt.is_occupied(run) and not args.overwrite:
        raise ValueError(f"{run} holds a run on other data; choose another --out_dir, or --overwrite to delete it")
    prepare_data.prepare(prepare_args)
    return run / "data"


def source_tokenizer(args: Arguments, source: dict, run: Path) -> Path:
    """The source's tokenizer as a file in the run directory. Raises ValueError if another one is asked for."""
    if args.tokenizer is not None:
        raise ValueError("--init_from brings its own tokenizer; leave --tokenizer out")
    path = run / "tokenizer.json"
    if not path.is_file() or not ckpt.is_occupied(run):
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(source["tokenizer"].encode()))
    return path


def open_data(
    args: Arguments, given: set[str], run: Path, resuming: bool, source: dict | None, processes: Processes
) -> tuple[list[DataDirectory], list]:
    """The data directories and their weights. source: the model of --init_from, whose tokenizer prepares --dataset."""
    if args.dataset is not None:
        if processes.first:
            if source is not None:
                args = dataclasses.replace(args, tokenizer=str(source_tokenizer(args, source, run)))
            prepare_dataset(args, given, run, resuming)
        processes.wait()
        return [DataDirectory(run / "data")], [None]
    names, weights = zip(*map(parse_weighted, args.data_dir))
    if args.tokenizer in ("bpe", "char"):
        raise ValueError(f"--tokenizer {args.tokenizer} is trained on text; for token files give the path of their tokenizer.json")
    tokenizer = make_tokenizer(args.tokenizer, (), 0) if args.tokenizer is not None else None
    directories = [DataDirectory(name, tokenizer) for name in names]
    if tokenizer is not None and tokenizer.sha256 != directories[0].tokenizer.sha256:
        raise ValueError(f"{names[0]} was prepared with another tokenizer than {args.tokenizer}; leave --tokenizer out")
    return directories, list(weights)


def announce(run: Run, memory: float) -> None:
    """Print what is about to happen: size, data, length, precision, memory and an honest estimate of the time."""
    model, data, config, device, tokens = run.model, run.data, run.config, run.device, run.tokens_per_step
    shape, steps_left = model.config, run.config.max_steps - run.progress.step
    processes = f" on {run.processes.count} processes" if run.processes.count > 1 else ""
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
        f"run        {config.max_steps:,} steps of {tokens:,} tokens (effective batch: {config.batch_size} x "
        f"{config.gradient_accumulation_steps} windows{processes}) = {epochs:.2f} epochs; "
        f"{config.optimizer}, warmup {config.warmup_steps} steps, {config.lr_schedule} decay"
    )
    if data.mixed:
        passes = (config.max_steps * tokens / shape.block_size * w / sum(data.weights) / n for w, n in zip(data.weights, data.windows))
        notice("mixture    " + ", ".join(f"{name}: {times:.2f} epochs" for name, times in zip(run.names, passes)))
    why, compiling = run.precision[1], run.compiling
    notice(f"precision  {run.environment()['dtype']} on {device}: {why}; compile {compiling[0]}: {compiling[1]}")
    notice(f"memory     about {memory / 1e9:.1f} GB{' in each process' if processes else ''}")
    seconds = steps_left * seconds_per_step(model, data, config, device, run.dtype) / run.processes.count
    notice(f"time       about {duration(seconds)} for {steps_left:,} steps at the speed just measured, plus evaluations")
    if device == "cpu" and seconds > LONG_ON_CPU:
        directories = "" if run.names == ["./data"] else " --data_dir " + " ".join(run.names)
        notice(f"           that is long; for a model in minutes: python train.py --preset nano{directories} --out_dir checkpoints/nano")


def open_also(names: tuple[str, ...], first: DataDirectory) -> list[DataDirectory]:
    """The directories of --also_eval. Raises ValueError for one with another tokenizer."""
    also = [DataDirectory(name, first.tokenizer) for name in names]
    for directory in also:
        if not directory.tokenizer.same_ids(first.tokenizer):
            raise ValueError(
                f"--also_eval {directory.name} has another tokenizer than {first.name}; prepare it with --tokenizer {first.name}"
            )
    return also


@dataclass
class Plan:
    """What this call will do, all questions answered and nothing written yet.

    resumed: the checkpoint to go on from and its content. source: the model to start from, as starting_point.read_source gives it.
    """

    model_config: GPTConfig
    config: TrainConfig
    directories: list[DataDirectory]
    also: list[DataDirectory]
    data: TrainingData
    resumed: tuple[Path, dict] | None
    source: dict | None

    @property
    def origin(self) -> dict | None:
        return self.source and self.source["origin"]

    def same_run(self, content: dict) -> bool:
        """Whether a checkpoint belongs to the run that this plan describes."""
        configs = dataclasses.asdict(self.model_config), dataclasses.asdict(self.config)
        same_config = (content["model_config"], content["train_config"]) == configs
        return same_config and content["data"] == self.data.fingerprint and content.get("init_from") == self.origin

    def finished(self, content: dict) -> bool:
        """Whether a complete checkpoint of this run stands at its end."""
        progress = content["resume"]["progress"]
        early = 0 < self.config.patience <= progress["evaluations_since_best"]
        return (content["step"] >= self.config.max_steps or early) and not progress["evaluation_due"]


def make_plan(args: Arguments, given: set[str], run_path: Path, processes: Processes) -> Plan:
    """Read what there is and decide. Raises ValueError, FileNotFoundError for what can't be done."""
    resumed = ckpt.find_resumed(args.resume, run_path)
    source = read_source(args.init_from) if args.init_from is not None and resumed is None else None
    directories, weights = open_data(args, given, run_path, resumed is not None, source, processes)
    if resumed is not None:
        model_config, config = merge_resumed(args.model, args.train, given - {"vocab_size"}, resumed[1])
    elif source is not None:
        check_tokenizer(source, directories[0].tokenizer, directories[0].name)
        model_config = source_shape(source, args.model, given)
        config = with_values(args.train, given, model_config.n_embd)
    else:
        model_config, config = fit_to_data(args.model, given, args.dataset is not None, directories[0].tokenizer), args.train
    data = TrainingData(directories, weights, model_config.block_size, config.seed)
    config = fix_length(config, "warmup_steps" in given or resumed is not None, data)
    if resumed is not None and resumed[1]["data"] != data.fingerprint:
        raise ValueError(f"{resumed[0]} was trained on other data; give its --data_dir, or another --out_dir")
    if resumed is not None and args.init_from is not None and (resumed[1].get("init_from") or {}).get("name") != args.init_from:
        raise ValueError(f"{resumed[0]} did not start from {args.init_from}; leave --init_from out, or choose another --out_dir")
    return Plan(model_config, config, directories, open_also(args.also_eval, directories[0]), data, resumed, source)


def is_done(plan: Plan, args: Arguments, run_path: Path) -> bool:
    """Whether the run directory holds this very run, finished. Raises ValueError if it holds another one."""
    if plan.resumed is not None:
        return plan.finished(plan.resumed[1])
    return not args.overwrite and ckpt.is_claimed(run_path, args.resume, plan.same_run, plan.finished)


def train(plan: Plan, run_path: Path, device: str, processes: Processes) -> tuple[Run, StopSignal]:
    """Carry out a plan. Raises ValueError if it doesn't fit into memory, FloatingPointError if the loss isn't finite any more."""
    config, resumed = plan.config, plan.resumed
    memory = check_memory(plan.model_config, config, device, processes.count)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    model = GPT(plan.model_config).to(device)
    if plan.source is not None:
        ckpt.load_weights(model, weights_for(plan.source, plan.model_config), plan.source["origin"]["name"])
    run = Run(run_path, model, config, plan.data, plan.directories, device, processes, plan.also, plan.origin)
    processes.wait()  # until all have read what rank 0 is going to change
    if resumed is not None:
        if processes.first:
            ckpt.check_branch(resumed[0], run_path)
        run.restore(*resumed)
    announce(run, memory)
    metrics = open_log(run, resumed) if processes.first else None
    try:
        with StopSignal() as stop:
            run.train(metrics, stop)
    finally:
        if metrics is not None:
            metrics.close()
    return run, stop


def finish(run: Run, stop: StopSignal, seconds: float, export: tuple[str, ...]) -> int:
    """Say how it went, draw and export; rank 0's part. Returns the exit code."""
    plot_losses(run.directory, run.floor(len(run.prefix.tokens) / math.log(2)))
    if stop:
        notice(f"stopped by signal {stop.number} at step {run.progress.step}, everything saved; continue with --resume auto")
        return 128 + stop.number
    early = ", stopped early: no better validation loss any more" if run.progress.step < run.config.max_steps else ""
    print(f"{run.directory}: {run.progress.step} steps in {duration(seconds)}, {run.describe(run.last_summary)}{early}")
    if export:
        import export_model

        if not export_model.export(run.directory / ckpt.BEST, export, run.directory):
            return 1
    notice(f'next: python generate.py --checkpoint {run.directory} --prompt "Once upon a time"')
    return 0


def open_log(run: Run, resumed: tuple[Path, dict] | None) -> MetricsLog:
    """Make the run directory ready: cleared for a new run, its log cut to where a resumed one stood."""
    run.directory.mkdir(parents=True, exist_ok=True)
    if resumed is None:
        ckpt.clear_run(run.directory)
    extra = {"data": dict(zip(run.names, run.fingerprint)), "init_from": run.source, "environment": run.environment()}
    write_config(run.directory, run.model.config, run.config, extra)
    write_atomically(run.directory / "tokenizer.json", lambda file: file.write(run.tokenizer.json.encode()))
    earlier = (resumed[0].parent / METRICS, resumed[1]["resume"]["metrics"]) if resumed else None
    return MetricsLog(run.directory / METRICS, earlier, run.progress.step + 1 if run.config.tensorboard else None)


def main(argv: list[str] | None = None) -> int:
    args, given = read_arguments(argv)
    if args.export:
        import export_model

        export_model.check_formats(args.export)
    processes = Processes()
    device = processes.start(choose_device(args.train.device))
    try:
        run_path = run_directory(args)
        plan = make_plan(args, given, run_path, processes)
        if is_done(plan, args, run_path):
            step = (plan.resumed or ckpt.newest_checkpoint(run_path))[1]["step"]
            if processes.first:
                print(f"{run_path} holds this very run, finished at step {step}")
            return 0
        started = time.perf_counter()
        run, stop = train(plan, run_path, device, processes)
        if processes.first:
            return finish(run, stop, time.perf_counter() - started, args.export)
        return 128 + stop.number if stop else 0
    except FloatingPointError as error:
        notice(f"error: {error}")
        return 1
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
            config = args.train
            effective, half = config.batch_size * config.gradient_accumulation_steps, max(1, config.batch_size // 2)
            raise ValueError(
                f"the memory of {device} is full; pass --batch_size {half} --gradient_accumulation_steps {-(-effective // half)} "
                "(the same effective batch), a shorter --block_size or a smaller --preset"
            ) from None
        if processes.count > 1 and any(word in text for word in ("gloo", "NCCL", "onnection", "peer", "imed out")):
            print(
                f"error: rank {processes.rank}: another process of this run has ended or can't be reached; "
                f"start it again with --resume auto ({text[:100]})",
                file=sys.stderr,
            )
            return 1
        raise
    finally:
        processes.stop()


if __name__ == "__main__":
    run_script(main)
