"""The training itself: one optimizer step as a pure function of its number, and the loop with evaluations and checkpoints around it."""

import dataclasses
import hashlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoints_io as ckpt
from config import TrainConfig
from measures import Prefix, score_tokens, split_prefix, summarize
from models import GPT
from optimizers import lr_factor, make_optimizers, set_learning_rates
from run_log import MetricsLog
from token_files import DataDirectory, TrainingData
from utils import StopSignal, choose_compile, choose_precision, notice


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
    if not scaler.is_enabled() or torch.isfinite(norm):  # float16 overflows now and then: skip the step for all, lower the scale
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return loss_sum, hits, norm


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
        self.fingerprint = data.fingerprint
        self.prefix: Prefix = split_prefix(directories[0], "val", config.eval_tokens)
        self.precision = choose_precision(device, config.dtype)
        self.dtype = self.precision[0]
        self.optimizers = make_optimizers(model, config, self.dtype)
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=self.dtype == torch.float16)
        self.compiling = choose_compile(device, config.compile, model.flops_per_token() * config.max_steps * self.tokens_per_step)
        self.progress = Progress()
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # loss and gradient norm of the last step
        self.timed_steps, self.seconds = 0, 0.0
        self.last_summary: dict = {}

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.model.config.block_size

    def environment(self) -> dict[str, str]:
        """What else decides the last bits of the weights."""
        return {
            "torch": torch.__version__.split("+")[0],
            "threads": str(torch.get_num_threads()),
            "device": self.device.split(":")[0],
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": str(self.compiling[0]),
        }

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
        """Write the complete checkpoint of this step; only then delete old ones. Raises FloatingPointError, see check_finite."""
        self.check_finite()
        resume = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "samples_seen": self.progress.step * self.config.batch_size * self.config.gradient_accumulation_steps,
            "metrics": self.metrics.state(),
            "environment": self.environment(),
        }
        ckpt.save_checkpoint(ckpt.step_path(self.directory, self.progress.step), self.content() | {"resume": resume})
        ckpt.delete_old_checkpoints(self.directory, self.config.keep_checkpoints)

    def restore(self, path: Path, content: dict) -> None:
        """Go back to a complete checkpoint."""
        state = content["resume"]
        model, _ = ckpt.build_model(content, str(path))
        self.model.load_state_dict(model.state_dict())
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak_lr"] for group in optimizer.param_groups]  # flags may have changed them
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak_lr"] = peak
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        before, here = state["environment"], self.environment()
        changed = [f"{key} {before[key]} -> {here[key]}" for key in here if before[key] != here[key]]
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

    def check_finite(self) -> None:
        """Raise FloatingPointError if the last step's loss or gradient is no number: what they have touched must not be saved."""
        if self.last is None:
            return
        loss, norm = self.last
        finite_norm = self.scaler.is_enabled() or math.isfinite(norm.item())  # a scaler skips such steps
        if not math.isfinite(loss.item()) or not finite_norm:
            raise FloatingPointError(
                f"the loss is {loss.item()}, the gradient's norm {norm.item()} at step {self.progress.step} "
                f"(learning rates at {lr_factor(self.progress.step - 1, self.config):.3g} of their peaks); "
                "continue from the last checkpoint with --resume auto and a lower --learning_rate and --muon_learning_rate"
            )

    def train(self, metrics: MetricsLog, stop: StopSignal) -> None:
        """Train until max_steps or a signal, then save. Raises FloatingPointError for a loss that isn't finite."""
        config, progress, self.metrics = self.config, self.progress, metrics
        step_model = torch.compile(self.model, dynamic=False) if self.compiling[0] else self.model
        bar = tqdm(total=config.max_steps, initial=progress.step, desc="training", unit="step", disable=None)
        self.model.train()
        if progress.evaluation_due:
            progress.evaluation_due = not self.evaluate(stop)
            self.save()  # if it belonged to the last step, no later checkpoint would know that it is done
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
            self.last = loss, norm
            if logging or evaluating:
                self.check_finite()
            self.timed_steps += 1
            self.seconds += time.perf_counter() - started
            if logging:
                rate = self.timed_steps * self.tokens_per_step / max(1e-9, self.seconds)
                self.timed_steps, self.seconds = 0, 0.0
                self.metrics.write(
                    step=progress.step,
                    tokens=progress.step * self.tokens_per_step,
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
