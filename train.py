"""Token files -> checkpoints: train a model, or continue a training.

    python train.py --preset nano
    python train.py --data_dir ./data_stories --preset mini --max_steps 2000 --out_dir ./checkpoints/stories
    python train.py --dataset path/to/dataset.txt --epochs 10 --batch_size 32
    python train.py --preset nano --resume auto

A flag overrides `--preset`, which overrides what stands in config.py. Every field of GPTConfig and TrainConfig is a flag.
"""

from utils import (
    StopSignal,
    choose_compile,
    choose_device,
    choose_precision,
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
    from dataclasses import dataclass, field
    from pathlib import Path

    import torch
    from tqdm import tqdm

    import checkpoints_io as ckpt
    import config as settings
    from config import PRESETS, GPTConfig, TrainConfig
    from measures import Prefix, score_tokens, split_prefix, summarize
    from models import GPT
    from optimizers import lr_factor, make_optimizers, set_learning_rates
    from token_files import META, DataDirectory, TrainingData, parse_weighted
    from tokenizers_io import KINDS, TextTokenizer, make_tokenizer

# What may change when a run is resumed; everything else would make it another run.
CHANGEABLE = {"max_steps", "epochs", "eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints", "log_interval"}
CHANGEABLE |= {"device", "dtype", "compile", "warmup_steps"}
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
        given = given | values.keys() | {f.name for f in dataclasses.fields(GPTConfig)} - {"vocab_size"}
    arch = flags.get("--arch")
    if arch in ("gpt2", "qwen3") and arch != model.arch:
        model = dataclasses.replace(model, arch=arch, **FAMILY_FIELDS)
    args = parse_command_line(Arguments, words, __doc__, default=Arguments(model=model, train=train))
    if args.dataset is not None and "data_dir" in given:
        raise ValueError("give either --data_dir or --dataset, not both")
    if args.resume is not None and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them")
    if "max_steps" in given_flags(words) and "epochs" in given:
        raise ValueError("--max_steps and --epochs both set the length of the run; give one of them")
    if "max_steps" in given_flags(words):
        args = dataclasses.replace(args, train=dataclasses.replace(args.train, epochs=None))
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


def prepare_dataset(args: Arguments, given: set[str], run: Path) -> Path:
    """Prepare --dataset into the run's own data/, unless it holds the same already. Returns that directory."""
    import prepare_data

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


def open_data(args: Arguments, given: set[str], run: Path) -> tuple[list[DataDirectory], list]:
    """The data directories and their weights."""
    if args.dataset is not None:
        return [DataDirectory(prepare_dataset(args, given, run))], [None]
    names, weights = zip(*map(parse_weighted, args.data_dir))
    tokenizer = make_tokenizer(args.tokenizer, (), 0) if args.tokenizer in ("gpt2", "byte") else None
    if args.tokenizer is not None and tokenizer is None:
        if args.tokenizer in KINDS:
            raise ValueError(f"--tokenizer {args.tokenizer} is trained on text; for token files give the path of their tokenizer.json")
        tokenizer = make_tokenizer(args.tokenizer, (), 0)
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


def fix_length(config: TrainConfig, given: set[str], preset: bool, data: TrainingData) -> TrainConfig:
    """The configuration with epochs turned into steps, and warmup at most a tenth of the run unless it was a flag."""
    max_steps = config.max_steps
    if config.epochs is not None:
        if data.mixed:
            raise ValueError("--epochs has no meaning for weighted directories; give --max_steps")
        max_steps = max(1, math.ceil(config.epochs * data.samples_per_epoch / (config.batch_size * config.gradient_accumulation_steps)))
    warmup = config.warmup_steps if "warmup_steps" in given and not preset else min(config.warmup_steps, max_steps // 10)
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


# ---------------------------------------------------------------- one step


def step_seed(seed: int, step: int, micro_step: int) -> int:
    """Seed of dropout: a pure function, so that nothing else that draws random numbers changes a training."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{micro_step}".encode(), digest_size=8).digest(), "big") >> 1


def training_step(model, raw_model: GPT, optimizers, scaler, data: TrainingData, config: TrainConfig, step: int, device: str, dtype):
    """Optimizer step number `step` (0, 1, ...). model: raw_model or its compiled form.

    Returns mean loss in nats, token accuracy and norm of the gradient before clipping, as tensors on the device.
    """
    set_learning_rates(optimizers, lr_factor(step, config))
    accumulation, kind = config.gradient_accumulation_steps, torch.device(device).type
    loss_sum, hits = 0.0, 0.0
    for micro_step in range(accumulation):
        first = (step * accumulation + micro_step) * config.batch_size
        rows = torch.from_numpy(data.batch(first, config.batch_size).astype("int64")).to(device, non_blocking=True)  # (B, T + 1)
        if raw_model.config.dropout:
            torch.manual_seed(step_seed(config.seed, step, micro_step))
        with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            logits, loss = model(rows[:, :-1], rows[:, 1:])
        scaler.scale(loss / accumulation).backward()
        loss_sum = loss_sum + loss.detach() / accumulation
        if (step + 1) % config.log_interval == 0:
            hits = hits + (logits.detach().argmax(dim=-1) == rows[:, 1:]).float().mean() / accumulation
        del logits
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return loss_sum, hits, norm


# ---------------------------------------------------------------- what is said before the start


def memory_estimate(model: GPT, config: TrainConfig, dtype) -> float:
    """Bytes at the peak of a training step, roughly: weights, gradients and optimizer state in float32, activations and logits."""
    groups = model.parameter_groups(muon=config.optimizer == "muon")
    states = 12 * sum(p.numel() for p in groups["muon"]) + 16 * sum(p.numel() for p in groups["decay"] + groups["no_decay"])
    shape, element = model.config, 4 if dtype == torch.float32 else 2
    per_token = shape.n_layer * (8 * shape.n_embd + element * (8 * shape.n_embd + 3 * shape.mlp_width)) + shape.vocab_size * (
        8 + 2 * element
    )
    return states + config.batch_size * shape.block_size * per_token


def seconds_per_step(model: GPT, data: TrainingData, config: TrainConfig, device: str, dtype) -> float:
    """Time of an optimizer step without compilation: one small forward and backward pass, timed after a warm-up, scaled to the batch."""
    rows = min(config.batch_size, max(1, 4096 // model.config.block_size))
    batch = torch.from_numpy(data.batch(0, rows).astype("int64")).to(device)
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            _, loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds / rows * config.batch_size * config.gradient_accumulation_steps


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def announce(model: GPT, data: TrainingData, config: TrainConfig, names: list[str], device: str, precision, compiling, start: int) -> None:
    """Print what is about to happen: size, data, length, precision, memory and an honest estimate of the time."""
    shape, tokens = model.config, config.batch_size * config.gradient_accumulation_steps * model.config.block_size
    epochs = config.max_steps * tokens / (data.samples_per_epoch * shape.block_size)
    notice(
        f"model      {shape.arch}, {shape.n_layer} layers x {shape.n_embd}, {shape.n_head} heads, block {shape.block_size}, "
        f"vocabulary {shape.vocab_size}: {model.num_parameters():,} parameters ({model.num_parameters(embedding=False):,} without embedding)"
    )
    notice(f"data       {' '.join(names)}: {sum(map(len, data.sources)):,} training tokens")
    notice(
        f"run        {config.max_steps:,} steps of {tokens:,} tokens ({config.batch_size} x {config.gradient_accumulation_steps} windows) "
        f"= {epochs:.2f} epochs; {config.optimizer}, warmup {config.warmup_steps} steps, {config.lr_schedule} decay"
    )
    notice(f"precision  {str(precision[0]).removeprefix('torch.')} on {device}: {precision[1]}; compile {compiling[0]}: {compiling[1]}")
    notice(f"memory     about {memory_estimate(model, config, precision[0]) / 1e9:.1f} GB")
    seconds = (config.max_steps - start) * seconds_per_step(model, data, config, device, precision[0])
    notice(f"time       about {duration(seconds)} for {config.max_steps - start:,} steps at the speed just measured, plus evaluations")
    if device == "cpu" and seconds > LONG_ON_CPU:
        directories = "" if names == ["./data"] else " --data_dir " + " ".join(names)
        notice(f"           that is long; for a model in minutes: python train.py --preset nano{directories} --out_dir checkpoints/nano")


# ---------------------------------------------------------------- the run


@dataclass
class Progress:
    """Where a run stands; all of it is in each complete checkpoint."""

    step: int = 0
    best_val_loss: float = math.inf
    evaluation_due: bool = False  # a signal came before the evaluation that belongs to `step`


class Run:
    """A training in its run directory: the loop, its evaluations and checkpoints."""

    def __init__(self, run: Path, model: GPT, config: TrainConfig, data: TrainingData, directories: list[DataDirectory], device: str):
        self.directory, self.model, self.config, self.data, self.device = run, model, config, data, device
        self.names = [directory.name for directory in directories]
        self.tokenizer = directories[0].tokenizer
        self.fingerprint = {directory.name: directory.fingerprint() for directory in directories}
        self.prefix: Prefix = split_prefix(directories[0], "val", config.eval_tokens)
        self.precision = choose_precision(device, config.dtype)
        self.dtype = self.precision[0]
        self.optimizers = make_optimizers(model, config, self.dtype)
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        self.seconds = 0.0
        self.last_summary: dict = {}

    def floor(self, per: float) -> float | None:
        """What a perfect model needs for the validation prefix, in bits divided by `per`."""
        return None if self.prefix.floor_bits is None else self.prefix.floor_bits / per

    def content(self) -> dict:
        """What every checkpoint holds."""
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "train_config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.json,
            "data": self.fingerprint,
            "step": self.progress.step,
            "model": self.model.state_dict(),
        }

    def save(self) -> None:
        """Write the complete checkpoint of this step; only then delete old ones."""
        resume = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "samples_seen": self.progress.step * self.config.batch_size * self.config.gradient_accumulation_steps,
            "metrics": self.metrics.state(),
            "environment": {
                "torch": torch.__version__.split("+")[0],
                "threads": torch.get_num_threads(),
                "device": self.device.split(":")[0],
            },
        }
        ckpt.save_checkpoint(ckpt.step_path(self.directory, self.progress.step), self.content() | {"resume": resume})
        ckpt.delete_old_checkpoints(self.directory, self.config.keep_checkpoints)

    def restore(self, path: Path, content: dict) -> None:
        """Go back to a complete checkpoint. Raises ValueError if it can't be continued."""
        if "resume" not in content:
            raise ValueError(f"{path} holds weights only and can't be resumed; give a step_*.pt or the run directory")
        state = content["resume"]
        model, _ = ckpt.build_model(content, str(path))
        self.model.load_state_dict(model.state_dict())
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        here = {"torch": torch.__version__.split("+")[0], "threads": torch.get_num_threads(), "device": self.device.split(":")[0]}
        changed = [f"{key} {state['environment'][key]} -> {here[key]}" for key in here if state["environment"][key] != here[key]]
        if changed:
            notice(f"warning: resumed in another environment ({', '.join(changed)}): the same data, but not bit for bit the same weights")
        notice(f"resumed {path} at step {self.progress.step}")

    def evaluate(self, stop: StopSignal) -> bool:
        """Score the validation prefix; log it; keep the best weights. False if a signal came before it was done."""
        self.model.eval()
        score = score_tokens(
            self.model,
            self.prefix.tokens,
            self.tokenizer.eot_id,
            self.model.config.block_size,
            self.device,
            batch_size=self.config.batch_size,
            autocast=self.dtype if self.dtype != torch.float32 else None,
            stop=lambda: bool(stop),
        )
        self.model.train()
        if score is None:
            return False
        summary = self.last_summary = summarize(score, self.prefix.n_bytes)
        self.metrics.write(step=self.progress.step, **{f"val_{key}": value for key, value in summary.items()})
        if summary["loss"] < self.progress.best_val_loss:
            self.progress.best_val_loss = summary["loss"]
            ckpt.save_checkpoint(self.directory / ckpt.BEST, self.content() | {"val": summary})
        tqdm.write(f"step {self.progress.step:>6,}  {self.describe(summary)}", file=sys.stderr)
        return True

    def describe(self, summary: dict) -> str:
        line = f"val loss {summary['loss']:.4f}, accuracy {summary['accuracy']:.3f}"
        if summary["bits_per_byte"] is not None:
            line += f", {summary['bits_per_byte']:.4f} bits/byte"
            floor = self.floor(self.prefix.n_bytes)
            line += f" (a perfect model: {floor:.4f})" if floor is not None else ""
        return line

    def train(self, metrics: "ckpt.MetricsLog", compile_it: bool, stop: StopSignal) -> None:
        """Train until max_steps or a signal; then the last checkpoint is written. Raises FloatingPointError for a loss that isn't finite."""
        config, progress, self.metrics = self.config, self.progress, metrics
        step_model = torch.compile(self.model, dynamic=False) if compile_it else self.model
        tokens_per_step = config.batch_size * config.gradient_accumulation_steps * self.model.config.block_size
        bar = tqdm(total=config.max_steps, initial=progress.step, desc="training", unit="step", disable=None)
        self.model.train()
        if progress.evaluation_due:
            progress.evaluation_due = not self.evaluate(stop)
        while progress.step < config.max_steps and not stop:
            started = time.perf_counter()
            loss, hits, norm = training_step(
                step_model, self.model, self.optimizers, self.scaler, self.data, config, progress.step, self.device, self.dtype
            )
            progress.step += 1
            last = progress.step == config.max_steps
            evaluating = last or progress.step % config.eval_interval == 0
            saving = last or progress.step % config.checkpoint_interval == 0
            logging = progress.step % config.log_interval == 0
            if (logging or evaluating or saving) and not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {progress.step} (learning rate factor {lr_factor(progress.step - 1, config):.3g}); "
                    "lower --learning_rate and --muon_learning_rate, then continue with --resume auto"
                )
            self.seconds += time.perf_counter() - started
            if logging:
                rate = config.log_interval * tokens_per_step / max(1e-9, self.seconds)
                self.seconds = 0.0
                self.metrics.write(
                    step=progress.step,
                    tokens=progress.step * tokens_per_step,
                    loss=loss.item(),
                    accuracy=hits.item(),
                    lr_factor=lr_factor(progress.step - 1, config),
                    gradient_norm=norm.item(),
                    tokens_per_second=round(rate),
                )
                bar.set_postfix_str(f"loss {loss.item():.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            if evaluating:
                progress.evaluation_due = not self.evaluate(stop)
            if saving:
                self.save()
        bar.close()
        if stop:
            self.save()


def finished_alike(content: dict, model_config: GPTConfig, config: TrainConfig, fingerprint: dict) -> bool:
    """Whether a run directory's newest checkpoint is the end of this very run."""
    same = content["model_config"] == dataclasses.asdict(model_config) and content["train_config"] == dataclasses.asdict(config)
    return same and content["data"] == fingerprint and content["step"] >= config.max_steps


def main(argv: list[str] | None = None) -> int:
    args, given = read_arguments(argv)
    run_path = run_directory(args)
    if args.export:
        import export_model

        export_model.check_formats(args.export)
    directories, weights = open_data(args, given, run_path)
    model_config = fit_to_data(args, given, directories[0].tokenizer)
    fingerprint = {directory.name: directory.fingerprint() for directory in directories}
    device = choose_device(args.train.device)

    resumed = None
    if args.resume is not None:
        if args.resume == "auto" or Path(args.resume).is_dir():
            resumed = ckpt.newest_checkpoint(run_path if args.resume == "auto" else Path(args.resume))
        else:
            resumed = Path(args.resume), ckpt.load_checkpoint(Path(args.resume))
        if resumed is None and args.resume != "auto":
            raise FileNotFoundError(f"no step checkpoint in {args.resume}; start the run without --resume")
    if resumed is not None:
        model_config, config = merge_resumed(args, given - {"vocab_size"}, resumed[1])
        if resumed[1]["data"] != fingerprint:
            raise ValueError(
                f"{resumed[0]} was trained on other data than {' '.join(fingerprint)}; give its --data_dir, or another --out_dir"
            )
    else:
        config = args.train
    data = TrainingData(directories, weights, model_config.block_size, config.seed)
    config = fix_length(config, given, args.preset is not None, data)

    if resumed is None and ckpt.is_occupied(run_path):
        if args.overwrite:
            ckpt.clear_run(run_path)
        elif args.resume == "auto":
            ckpt.clear_run(run_path)  # begun, but without any complete checkpoint to continue from
        else:
            newest = ckpt.newest_checkpoint(run_path)
            if newest is not None and finished_alike(newest[1], model_config, config, fingerprint):
                print(f"{run_path} holds this very run, finished at step {newest[1]['step']}")
                return 0
            raise ValueError(
                f"{run_path} holds another run; continue it with --resume auto, delete it with --overwrite, or choose --out_dir"
            )

    torch.manual_seed(config.seed)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    model = GPT(model_config).to(device)
    run = Run(run_path, model, config, data, directories, device)
    if resumed is not None:
        run.restore(*resumed)
    tokens_left = (config.max_steps - run.progress.step) * config.batch_size * config.gradient_accumulation_steps * model_config.block_size
    compiling = choose_compile(device, config.compile, model.flops_per_token() * tokens_left)
    announce(model, data, config, run.names, device, run.precision, compiling, run.progress.step)

    run_path.mkdir(parents=True, exist_ok=True)
    ckpt.write_config(run_path, model_config, config, {"data": fingerprint, "device": device, "precision": str(run.dtype)})
    metrics = ckpt.MetricsLog(run_path / ckpt.METRICS)
    if resumed is not None:
        metrics.truncate(resumed[1]["resume"]["metrics"])
    started = time.perf_counter()
    try:
        with StopSignal() as stop:
            run.train(metrics, compiling[0], stop)
    except FloatingPointError as error:
        notice(f"error: {error}")
        return 1
    finally:
        metrics.close()
    ckpt.plot_losses(run_path, run.floor(len(run.prefix.tokens) / math.log(2)))
    if stop:
        notice(f"stopped by signal {stop.number} at step {run.progress.step}, everything saved; continue with --resume auto")
        return 128 + stop.number
    print(f"{run_path}: {run.progress.step} steps in {duration(time.perf_counter() - started)}, {run.describe(run.last_summary)}")
    if args.export:
        export_model.export(run_path / ckpt.BEST, args.export, run_path)
    notice(f'next: python generate.py --checkpoint {run_path} --prompt "Once upon a time"')
    return 0


if __name__ == "__main__":
    run_script(main)
