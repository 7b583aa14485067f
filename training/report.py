"""What a run tells people: what it is about to do, one line a logged step, and loss.png."""

import warnings
from pathlib import Path

from utils import notice

from tqdm import tqdm

from formats.metrics import METRICS, MetricsLog, read_metrics
from formats.outputs import write_atomically, write_json, write_text
from formats.run_directory import CONFIG, TENSORBOARD, WRITTEN, check_branch, clear_run, written_names
from models import GPT
from training.estimates import peak_flops
from training.learner import Learner
from training.machine import Machine
from training.optimizers import lr_factor
from training.start import Start
from training.validation import Validation


def announce(start: Start, model: GPT, validation: Validation, machine: Machine, processes: int, memory: float, micro_batch: int) -> None:
    """Print what is about to happen: size, data, length, precision and memory; `pace` adds the time."""
    shape, config, data = start.model_config, start.config, start.data
    tokens = config.windows_per_step * shape.block_size
    together = f" on {processes} processes" if processes > 1 else ""
    epochs = config.max_steps * tokens / (data.samples_per_epoch * shape.block_size)
    network = f"{shape.arch}, {shape.n_layer} layers x {shape.n_embd}, {shape.n_head} heads, block {shape.block_size}"
    size = f"{model.num_parameters():,} parameters, {model.num_parameters(embedding=False):,} of them besides the token embedding"
    notice(f"model      {network}, vocabulary {shape.vocab_size}: {size}")
    prefix = f"the first {len(validation.prefix.tokens):,} tokens of {start.names[0]}"
    notice(f"data       {' '.join(start.names)}: {sum(map(len, data.sources)):,} training tokens; validation on {prefix}")
    batch = f"effective batch: {config.batch_size} x {config.gradient_accumulation_steps} windows{together}"
    schedule = f"{config.optimizer}, warmup {config.warmup_steps} steps, {config.lr_schedule} decay"
    notice(f"run        {config.max_steps:,} steps of {tokens:,} tokens ({batch}) = {epochs:.2f} epochs; {schedule}")
    if data.mixed:
        passes = (config.max_steps * config.windows_per_step * w / sum(data.weights) / n for w, n in zip(data.weights, data.windows))
        notice("mixture    " + ", ".join(f"{name}: {times:.2f} epochs" for name, times in zip(start.names, passes)))
    notice(f"precision  {machine.dtype_name} on {machine.device}: {machine.dtype_reason}")
    notice(f"memory     about {memory / 1e9:.1f} GB{' in each process' if processes > 1 else ''}")
    if micro_batch < config.batch_size // (1 if config.gradient_accumulation_steps % processes == 0 else processes):
        passes = f"{micro_batch} windows at a time, {config.windows_per_step // processes // micro_batch} passes a step"
        stays = f"the effective batch stays {config.windows_per_step}"
        notice(f"           too little memory is free for --batch_size {config.batch_size}: {passes}; {stays}")


def open_log(start: Start, learner: Learner) -> MetricsLog:
    """Make the run directory ready: cleared for a new run, the log cut to where a resumed one stood. Raises ValueError, OSError."""
    run_dir, resumed, content = start.run_dir, start.resumed, start.content()
    tensorboard_from = learner.progress.step + 1 if start.config.tensorboard else None
    if resumed is None:
        clear_run(run_dir)
    else:
        check_branch(resumed[0], run_dir)
        log = MetricsLog(run_dir / METRICS, (resumed[0].parent / METRICS, resumed[1]["resume"]["metrics"]), tensorboard_from)
    config = {"model": content["model_config"], "train": content["train_config"], "data": dict(zip(start.names, content["data"]))}
    config |= {"init_from": content["init_from"], "environment": learner.environment()}
    boards = start.config.tensorboard or (TENSORBOARD in written_names(run_dir) and (run_dir / TENSORBOARD).exists())
    config |= {"files": [*WRITTEN, *[TENSORBOARD] * boards]}  # with the step checkpoints, what --overwrite may delete
    write_json(run_dir / CONFIG, config)  # for people, but for this list
    write_text(run_dir / "tokenizer.json", content["tokenizer"])
    return log if resumed is not None else MetricsLog(run_dir / METRICS, None, tensorboard_from)


class StepLog:
    """Lines of metrics.jsonl on training steps. seconds: of each step since the last line; evaluations and checkpoints are not timed.
    The first line counts the time of compiling too.
    """

    def __init__(self, learner: Learner, log: MetricsLog | None, bar: tqdm):
        self.learner, self.log, self.bar = learner, log, bar
        self.tokens_per_step = learner.config.windows_per_step * learner.model.config.block_size
        self.peak_flops = peak_flops(learner.machine.device)
        self.seconds: list[float] = []
        self.compile_seconds = learner.machine.compile_seconds

    def write(self) -> None:
        """A line on the last step; rank 0's part."""
        rate = len(self.seconds) * self.tokens_per_step / max(1e-9, self.compile_seconds + sum(self.seconds))
        self.seconds.clear()
        self.compile_seconds = 0.0
        if self.log is None:
            return
        learner, step = self.learner, self.learner.progress.step
        loss, accuracy, norm = (value.item() for value in learner.last)
        line = {"step": step, "tokens": step * self.tokens_per_step, "loss": loss, "accuracy": accuracy}
        line |= {"lr_factor": lr_factor(step - 1, learner.config), "gradient_norm": norm}
        line |= {"skipped_steps": learner.progress.skipped_steps, "tokens_per_second": round(rate)}
        if self.peak_flops:
            line["mfu"] = round(rate * learner.model.flops_per_token() / self.peak_flops / learner.processes.count, 4)
        self.log.write(**line)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)


def plot_losses(run_dir: Path, entropy: float | None = None) -> None:
    """loss.png: training and validation loss in nats per token, the learning rate, and a perfect model's loss where it is known."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    lines = read_metrics(run_dir / METRICS)
    train = [(line["step"], line["loss"], line["lr_factor"]) for line in lines if line.get("loss") is not None]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure = Figure(figsize=(9, 5), dpi=110)
    axes = figure.subplots()
    if train:
        steps, losses, rates = zip(*train)
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training (one batch)")
        rate_axes = axes.twinx()
        rate_axes.plot(steps, rates, color="gray", linewidth=1, linestyle=":")
        rate_axes.set_ylabel("learning rate / peak (dotted)", color="gray")
        rate_axes.set_ylim(0, 1.05)
    if val:
        axes.plot(*zip(*val), color="tab:orange", marker="o", markersize=4, label="validation")
    for name in dict.fromkeys(name for line in lines for name in line.get("also", {})):
        also = [(line["step"], line["also"][name]["loss"]) for line in lines if name in line.get("also", {})]
        axes.plot(*zip(*also), marker="o", markersize=3, linestyle="--", label=f"validation, {name}")
        val = val + also
    if entropy is not None:
        axes.axhline(entropy, color="tab:green", linestyle="--", linewidth=1, label=f"a perfect model ({entropy:.3f})")
    values = sorted([loss for _, loss, _ in train] + [loss for _, loss in val])
    if values:  # the first steps from ln(vocab) down would flatten the rest
        low, high = min(values[0], entropy or values[0]), values[int(0.97 * (len(values) - 1))]
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run_dir.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    for text in figure.findobj(Text):  # a name such as $_$ is no formula
        text.set_parse_math(False)
    with warnings.catch_warnings(action="ignore"):  # a glyph that the font lacks in the title
        figure.tight_layout()
        write_atomically(run_dir / "loss.png", lambda file: figure.savefig(file, format="png"))
