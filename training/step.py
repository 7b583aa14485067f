"""The training itself: one optimizer step as a pure function of its number, and the loop with evaluations and checkpoints around it."""

import contextlib
import copy
import dataclasses
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import TrainConfig
from evaluation.measures import score_tokens, split_prefix, summarize
from formats import checkpoint as ckpt
from formats.data_directory import DataDirectory, TrainingData
from formats.metrics import MetricsLog
from models import GPT, NextTokenLoss
from training.data_order import Batches, samples_of_step, step_seed
from training.estimates import peak_flops
from training.optimizers import lr_factor, make_optimizers, set_learning_rates
from training.processes import Processes
from utils import StopSignal, choose_compile, choose_precision, notice

SKIPS_IN_A_ROW = 5  # steps without a finite loss and gradient before a run ends
SKIPS_IN_A_ROW_FP16 = 30  # there a skipped step halves the loss scale, and the first ones are expected


@dataclass
class Progress:
    """Where a run stands; all of it is in each complete checkpoint."""

    step: int = 0
    best_val_loss: float = math.inf
    evaluations_since_best: int = 0
    evaluation_due: bool = False  # a signal came before the evaluation that belongs to `step`
    skipped_steps: int = 0  # their loss or gradient was no finite number


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. loss: mean in nats; accuracy: of its tokens; norm: of the gradient before clipping; tensors on the device."""

    loss: Tensor
    accuracy: Tensor
    norm: Tensor


class Run:
    """A training in its run directory: the loop, its evaluations and checkpoints.

    directories: the data; the first one's validation split chooses the best model. also: further directories to evaluate on.
    source: what the weights came from, None for random ones.
    """

    def __init__(
        self,
        run: Path,
        model: GPT,
        config: TrainConfig,
        data: TrainingData,
        directories: list[DataDirectory],
        device: str,
        processes: Processes | None = None,
        also: list[DataDirectory] | None = None,
        source: dict | None = None,
    ):
        self.directory, self.model, self.config, self.data, self.device, self.source = run, model, config, data, device, source
        self.processes = processes or Processes()
        self.names = [directory.name for directory in directories]
        self.tokenizer = directories[0].tokenizer
        self.fingerprint = data.fingerprint
        self.prefix = split_prefix(directories[0], "val", config.eval_tokens)
        self.also = {directory.name: split_prefix(directory, "val", config.eval_tokens) for directory in also or []}
        self.precision = choose_precision(device, config.dtype)
        self.dtype = self.precision[0]
        self.optimizers = make_optimizers(model, config, self.dtype)
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=self.dtype == torch.float16)
        self.compiling = choose_compile(device, config.compile, model.flops_per_token() * config.max_steps * self.tokens_per_step)
        self.batches = Batches(data, device)
        self.micro_steps, self.micro_batch = self.share_of_step()
        self.objective: torch.nn.Module = NextTokenLoss(model)
        self.ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
        self.progress = Progress(evaluation_due=source is not None)  # what does the model know before it learns?
        self.last: StepResult | None = None
        self.skipped = torch.zeros(2, device=device)  # steps skipped in a row, and in all since the last look
        self.timed_steps, self.seconds = 0, 0.0
        self.last_summary: dict = {}
        self.peak_flops = peak_flops(device)

    def share_of_step(self) -> tuple[int, int]:
        """Forward passes of a step in this process, and windows in each. Raises ValueError if a step can't be divided equally."""
        batch, accumulation, count = self.config.batch_size, self.config.gradient_accumulation_steps, self.processes.count
        if accumulation % count == 0:
            return accumulation // count, batch
        if batch % count == 0:
            return accumulation, batch // count
        raise ValueError(
            f"gradient_accumulation_steps={accumulation} and batch_size={batch}: neither can be divided by {count} processes; "
            f"give --gradient_accumulation_steps {-(-accumulation // count) * count}"
        )

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.model.config.block_size

    @property
    def evaluated(self) -> GPT:
        """The weights that are evaluated, sampled and kept as the best model."""
        return self.model if self.ema is None else self.ema

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.progress.evaluations_since_best

    # ------------------------------------------------------------ one step

    def training_step(self, stop: StopSignal) -> StepResult | None:
        """Optimizer step number `progress.step` (0, 1, ...), which then is one more.

        A loss or gradient that isn't finite changes nothing but the count in `skipped`. A signal in the midst of it drops what was
        computed and returns None.
        """
        config, step, device = self.config, self.progress.step, torch.device(self.device).type
        set_learning_rates(self.optimizers, lr_factor(step, config))
        windows = config.batch_size * config.gradient_accumulation_steps
        index = samples_of_step(step, windows, self.processes.rank, self.processes.count)
        totals = torch.zeros(2, device=self.device)  # loss, accuracy
        for micro_step, samples in enumerate(index.reshape(self.micro_steps, self.micro_batch)):
            if self.processes.any(bool(stop)):
                self.zero_gradients()
                return None
            rows = self.batches(samples)  # (B, T + 1)
            if self.model.config.dropout:
                torch.manual_seed(step_seed(config.seed, step, micro_step, self.processes.rank))
            more = micro_step + 1 < self.micro_steps and self.processes.count > 1
            with self.objective.no_sync() if more else contextlib.nullcontext():
                with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
                    loss, accuracy = self.objective(rows)
                self.scaler.scale(loss / self.micro_steps).backward()
            totals += torch.stack((loss.detach(), accuracy)) / self.micro_steps
        self.processes.average(totals)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        skip = 1 - (norm.isfinite() & totals[0].isfinite()).float()  # stays on the device: a GPU is never waited for
        for optimizer in self.optimizers:
            optimizer.found_inf = skip
            optimizer.step()
        self.scaler.update()
        self.zero_gradients()
        if self.ema is not None:
            weight = 1 - min(config.ema_decay, (1 + step) / (10 + step))  # young means forget faster
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), weight)
        self.skipped = torch.stack((self.skipped[0] * skip + skip, self.skipped[1] + skip))
        self.progress.step += 1
        return StepResult(totals[0], totals[1], norm)

    def zero_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def check_skipped(self) -> bool:
        """Whether the last step was skipped for a loss or gradient that isn't finite. Raises FloatingPointError after several in a row."""
        in_a_row, new = map(int, self.skipped.tolist())
        self.skipped[1] = 0
        self.progress.skipped_steps += new
        if in_a_row >= (SKIPS_IN_A_ROW_FP16 if self.scaler.is_enabled() else SKIPS_IN_A_ROW):
            raise FloatingPointError(f"{in_a_row} steps in a row {self.trouble()}")
        if new:
            tqdm.write(f"step {self.progress.step:>6,}  skipped {new} without a finite loss and gradient", file=sys.stderr)
        return bool(in_a_row) and not self.scaler.is_enabled()

    def trouble(self) -> str:
        """What happened to the last step, and what to do."""
        rates = ", ".join(f"{optimizer.param_groups[0]['lr']:.3g} ({type(optimizer).__name__})" for optimizer in self.optimizers)
        scale = f", loss scale {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        values = f"loss {self.last.loss.item():.4g}, gradient norm {self.last.norm.item():.4g}, " if self.last is not None else ""
        saved = ckpt.step_checkpoints(self.directory)
        onward = f"continue from {saved[0]} with --resume auto and" if saved else "start again with"
        return (
            f"had no finite loss and gradient and were skipped, the last at step {self.progress.step} ({values}learning rates {rates}"
            f"{scale}); {onward} a lower --learning_rate and --muon_learning_rate"
        )

    # ------------------------------------------------------------ checkpoints

    def environment(self) -> dict[str, str]:
        """What else decides the last bits of the weights."""
        return {
            "torch": torch.__version__.split("+")[0],
            "threads": str(torch.get_num_threads()),
            "device": self.device.split(":")[0],
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": str(self.compiling[0]),
            "processes": str(self.processes.count),
        }

    def content(self, model: GPT) -> dict:
        """What every checkpoint holds."""
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "train_config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.json,
            "data": self.fingerprint,
            "init_from": self.source,
            "step": self.progress.step,
            "model": model.state_dict(),
        }

    def save(self) -> None:
        """Write the complete checkpoint of this step; only then delete old ones.

        Raises FloatingPointError instead if the last step had no finite loss and gradient: who knows since when the weights are spoilt.
        """
        if self.check_skipped():
            raise FloatingPointError(f"{int(self.skipped[0])} steps in a row {self.trouble()}")
        if not self.processes.first:
            return
        resume = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "progress": dataclasses.asdict(self.progress),
            "samples_seen": self.progress.step * self.config.batch_size * self.config.gradient_accumulation_steps,
            "metrics": self.metrics.state(),
            "environment": self.environment(),
        }
        ckpt.save_checkpoint(ckpt.step_path(self.directory, self.progress.step), self.content(self.model) | {"resume": resume})
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
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.progress = Progress(**state["progress"])
        before, here = state["environment"], self.environment()
        changed = [f"{key} {before[key]} -> {here[key]}" for key in here if before.get(key, here[key]) != here[key]]
        if changed:
            notice(f"warning: resumed in another environment ({', '.join(changed)}): the same data, but not bit for bit the same weights")
        notice(f"resumed {path} at step {self.progress.step}")

    # ------------------------------------------------------------ evaluation

    def floor(self, per: float) -> float | None:
        """What a perfect model needs for the validation prefix, in bits divided by `per`."""
        return None if self.prefix.floor_bits is None else self.prefix.floor_bits / per

    def evaluate(self, stop: StopSignal) -> bool:
        """Score the validation prefixes; log them; keep the best weights. False if a signal came before it was done.

        Rank 0 does the work, the others wait. Raises FloatingPointError for a loss that isn't finite.
        """
        done = self._evaluate(stop) if self.processes.first else False
        return self.processes.any(done)

    def _evaluate(self, stop: StopSignal) -> bool:
        summaries = {}
        self.evaluated.eval()
        for name, prefix in {"": self.prefix, **self.also}.items():
            score = score_tokens(
                self.evaluated,
                prefix.tokens,
                self.tokenizer.eot_id,
                self.model.config.block_size,
                self.device,
                batch_size=self.micro_batch,
                autocast=self.dtype if self.dtype != torch.float32 else None,
                stop=lambda: bool(stop),
            )
            if score is None:
                break
            summaries[name] = summarize(score, prefix.n_bytes)
        if len(summaries) < 1 + len(self.also):
            self.evaluated.train()
            return False
        summary = self.last_summary = summaries.pop("")
        if not math.isfinite(summary["loss"]):
            raise FloatingPointError(f"the validation loss is {summary['loss']}: steps up to {self.progress.step} {self.trouble()}")
        sample = self.sample_text()
        self.evaluated.train()
        further = {"also": summaries} if summaries else {}
        text = {"sample": sample} if self.config.sample_tokens else {}
        self.metrics.write(step=self.progress.step, **{f"val_{key}": value for key, value in summary.items()}, **further, **text)
        self.progress.evaluations_since_best += 1
        if summary["loss"] < self.progress.best_val_loss:
            self.progress.best_val_loss, self.progress.evaluations_since_best = summary["loss"], 0
            ckpt.save_checkpoint(self.directory / ckpt.BEST, self.content(self.evaluated) | {"val": summary})
        tqdm.write(f"step {self.progress.step:>6,}  {self.describe(summary)}", file=sys.stderr)
        for name, other in summaries.items():
            tqdm.write(f"             {name}: {self.describe(other, floor=False)}", file=sys.stderr)
        if sample:
            printable = "".join(character if character.isprintable() else " " for character in sample)
            tqdm.write(f"             {' '.join(printable.split())}", file=sys.stderr)
        return True

    def sample_text(self) -> str:
        """A text that the model writes now, with random numbers of its own: the training never notices."""
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, self.progress.step, -1, 0))
        prompt, eot = self.config.sample_prompt, self.tokenizer.eot_id
        ids = [eot, *self.tokenizer.encode(prompt)]
        tokens = []
        if self.config.sample_tokens:
            for token in self.evaluated.stream(
                torch.tensor([ids], device=self.device), self.config.sample_tokens, generator=generator, temperature=0.8
            ):
                if token.item() == eot:
                    break
                tokens.append(token.item())
        return self.tokenizer.decode(ids[1:] + tokens)

    def describe(self, summary: dict, floor: bool = True) -> str:
        line = f"val loss {summary['loss']:.4f}, accuracy {summary['accuracy']:.3f}"
        if summary["bits_per_byte"] is not None:
            line += f", {summary['bits_per_byte']:.4f} bits/byte"
            perfect = self.floor(self.prefix.n_bytes) if floor else None
            line += f" (a perfect model: {perfect:.4f})" if perfect is not None else ""
        return line

    # ------------------------------------------------------------ the loop

    def train(self, metrics: MetricsLog | None, stop: StopSignal) -> None:
        """Train until max_steps, the end of patience or a signal, then save. metrics: rank 0's log.

        Raises FloatingPointError where the loss isn't finite any more.
        """
        config, progress, self.metrics = self.config, self.progress, metrics
        if self.compiling[0]:
            self.objective.compile(dynamic=False)
        self.objective = self.processes.wrap(self.objective, self.device)
        bar = tqdm(
            total=config.max_steps, initial=progress.step, desc="training", unit="step", disable=None if self.processes.first else True
        )
        self.model.train()
        if progress.evaluation_due:
            progress.evaluation_due = not self.evaluate(stop)
            self.save()  # if it belonged to the last step, no later checkpoint would know that it is done
        stopped = self.processes.any(bool(stop))
        while progress.step < config.max_steps and not stopped and not self.processes.any(self.out_of_patience):
            started = time.perf_counter()
            result = self.training_step(stop)
            if result is None:
                stopped = True
                break
            self.last = result
            last = progress.step == config.max_steps
            evaluating = last or progress.step % config.eval_interval == 0
            saving = last or progress.step % config.checkpoint_interval == 0
            logging = progress.step % config.log_interval == 0
            bad = self.check_skipped() if logging or evaluating or saving or self.device == "cpu" else False
            self.timed_steps += 1
            self.seconds += time.perf_counter() - started
            if logging and self.processes.first:
                self.log(bar)
            bar.update()
            if evaluating:
                progress.evaluation_due = not self.evaluate(stop)
            if saving and (last or not bad):
                self.save()
        bar.close()
        stopped = stopped or self.processes.any(bool(stop))
        if stopped or self.processes.any(self.out_of_patience):
            stop.number = stop.number or (signal.SIGTERM if stopped else None)  # another process may have got it
            self.save()

    def log(self, bar: tqdm) -> None:
        """A line of metrics.jsonl on the last step."""
        rate = self.timed_steps * self.tokens_per_step / max(1e-9, self.seconds)
        self.timed_steps, self.seconds = 0, 0.0
        loss = self.last.loss.item()
        mfu = {"mfu": round(rate * self.model.flops_per_token() / self.peak_flops / self.processes.count, 4)} if self.peak_flops else {}
        self.metrics.write(
            step=self.progress.step,
            tokens=self.progress.step * self.tokens_per_step,
            loss=loss,
            accuracy=self.last.accuracy.item(),
            lr_factor=lr_factor(self.progress.step - 1, self.config),
            gradient_norm=self.last.norm.item(),
            skipped_steps=self.progress.skipped_steps,
            tokens_per_second=round(rate),
            **mfu,
        )
        bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
