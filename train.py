"""Token files -> checkpoints: train a model, or continue a training.

    python train.py --preset nano
    python train.py --data_dir ./data_stories --preset mini --max_steps 2000 --out_dir ./checkpoints/stories
    python train.py --init_from checkpoints/stories --dataset book.txt --also_eval ./data_stories
    torchrun --nproc_per_node=2 train.py --preset nano --resume auto

A flag overrides `--preset`, which overrides what stands in config.py. Every field of GPTConfig and TrainConfig is a flag.
"""

import contextlib
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from utils import StopSignal, choose_device, duration, flag_types, lasting_output, notice, run_script

import torch
from tqdm import tqdm

from formats.checkpoint import load_weights, save_checkpoint
from formats.data_directory import META, DataDirectory
from formats.data_directory import check_place as check_data_place
from formats.export_record import check_exports
from formats.metrics import MetricsLog
from formats.outputs import check_sources
from formats.run_directory import (
    BEST,
    DATA,
    NEXT,
    delete_old_checkpoints,
    find_resumed,
    is_occupied,
    prepared_data,
    sole_trainer,
    step_checkpoints,
    step_path,
    written_paths,
)
from formats.tokenizer import TextTokenizer
from models import GPT
from training.data_order import Batches
from training.estimates import fitting_batch
from training.learner import Learner
from training.machine import LostProcess, Machine, explained_failures
from training.pace import make_objective
from training.processes import Processes
from training.report import StepLog, announce, open_log, plot_losses
from training.start import Arguments, Start, make_start, open_directories, read_arguments, read_source, run_directory
from training.step import training_step
from training.validation import Validation

# ---------------------------------------------------------------- the loop


def train(start: Start, learner: Learner, validation: Validation, log: MetricsLog | None, stop: StopSignal) -> None:
    """Train until max_steps, the end of patience or a signal, then save. log: rank 0's.

    Raises FloatingPointError where losses aren't finite any more.
    """
    config, progress, processes = start.config, learner.progress, learner.processes
    batches = Batches(start.data, learner.machine.device)

    def stopped() -> bool:
        return processes.any(bool(stop))

    with tqdm(total=config.max_steps, initial=progress.step, desc="training", unit="step", disable=None if log else True) as bar:
        step_log = StepLog(learner, log, bar)
        learner.model.train()
        if progress.evaluation_due:  # a signal cut it off, or the weights come from another model: what can they do so far?
            progress.evaluation_due = not evaluate(start, learner, validation, log, stop)
            save(start, learner, log)  # if it belonged to the last step, no later checkpoint would know that it is done
        while progress.step < config.max_steps and not stopped() and not processes.any(learner.out_of_patience):
            began = time.perf_counter()
            result = training_step(learner, batches, progress.step, stopped)
            if result is None:
                break
            learner.last = result
            progress.step += 1
            last = progress.step == config.max_steps
            evaluating = last or progress.step % config.eval_interval == 0
            saving = last or progress.step % config.checkpoint_interval == 0
            logging = progress.step % config.log_interval == 0
            sound = learner.check_finite() if logging or evaluating or saving or learner.machine.kind == "cpu" else True
            step_log.seconds.append(time.perf_counter() - began)
            if logging:
                step_log.write()
            bar.update()
            if evaluating:
                progress.evaluation_due = not evaluate(start, learner, validation, log, stop)
            if saving and (last or sound):
                save(start, learner, log)
    ended = stopped()
    if ended:
        stop.number = stop.number or signal.SIGTERM  # another process may have got it
    if ended or processes.any(learner.out_of_patience):
        save(start, learner, log)


def evaluate(start: Start, learner: Learner, validation: Validation, log: MetricsLog | None, stop: StopSignal) -> bool:
    """Validate, log, keep the best weights. Rank 0 does the work, the others wait. False if a signal came before it was done."""
    progress = learner.progress
    measures = validation.evaluate(learner, lambda: bool(stop)) if log else None
    if measures is not None:
        log.write(step=progress.step, **measures)
        progress.evaluations_since_best += 1
        if measures["val_loss"] < progress.best_val_loss:
            progress.best_val_loss, progress.evaluations_since_best = measures["val_loss"], 0
            weights = learner.evaluated.state_dict()
            save_checkpoint(start.run_dir / BEST, start.content() | {"step": progress.step, "model": weights, "val": validation.newest})
    return learner.processes.any(measures is not None)


def save(start: Start, learner: Learner, log: MetricsLog | None) -> None:
    """Write the complete checkpoint of this step; only then delete old ones. Raises FloatingPointError for weights in doubt."""
    learner.check_finite(saving=True)
    if log is not None:
        step, resume = learner.progress.step, learner.state() | {"metrics": log.state()}
        content = start.content() | {"step": step, "model": learner.model.state_dict(), "resume": resume}
        save_checkpoint(step_path(start.run_dir, step), content)
        delete_old_checkpoints(start.run_dir, start.config.keep_checkpoints)


# ---------------------------------------------------------------- before and after


def set_up(start: Start, device: str, processes: Processes) -> tuple[Learner, Validation]:
    """The network on its device with all that trains it, announced. Raises ValueError if it can't run here."""
    config = start.config
    machine = Machine.choose(device, config.dtype, start.compile(device))
    memory, micro_batch = fitting_batch(start.model_config, config, machine, processes)
    validation = Validation(start.directories[0], start.also, config)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    model = GPT(start.model_config).to(device)
    if start.source is not None:
        weights = dict(start.source["model"])
        if "wpe.weight" in weights:  # learned positions beyond block_size are left out
            weights["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
        load_weights(model, weights, start.source["origin"]["name"])
    announce(start, model, validation, machine, processes.count, memory, micro_batch)
    objective, machine = make_objective(start, model, machine, micro_batch, processes)
    learner = Learner(objective, config, machine, processes, micro_batch)
    processes.wait()  # until all have read what rank 0 is going to change
    if start.resumed is not None:
        path, content = start.resumed
        learner.restore(content["model"], content["resume"], str(path))
    else:
        learner.progress.evaluation_due = start.source is not None
    return learner, validation


def prepare_text(args: Arguments, asked: dict[str, object], run_dir: Path, source: dict | None) -> None:
    """Prepare --dataset into the run's own data/, unless it holds the same already; beside it while the run to be deleted is there."""
    import prepare_data

    given = {"input": (args.dataset,)} if Path(args.dataset).exists() else {"dataset": (args.dataset,)}
    choices = {"vocab_size": asked["vocab_size"]} if "vocab_size" in asked else {}
    name, tokenizer, data = args.tokenizer, None, run_dir / DATA
    if source is not None:
        name, tokenizer = str(run_dir / "tokenizer.json"), TextTokenizer(source["tokenizer"], source["origin"]["name"])
    preparing = prepare_data.Arguments(**given, output=str(data), tokenizer=name, seed=args.train.seed, **choices)
    if prepare_data.is_prepared(preparing) and (tokenizer is None or DataDirectory(data).tokenizer.same_ids(tokenizer)):
        notice(f"{data} holds {args.dataset} already")
        return
    if is_occupied(run_dir) and not args.overwrite:
        raise ValueError(f"{run_dir} holds a run on other data; choose another --out_dir, or --overwrite to delete it")
    if is_occupied(run_dir) or (data / META).is_file():
        check_data_place(data)
        preparing = replace(preparing, output=str(run_dir / NEXT / DATA))
    with prepare_data.advice_for(flag_types(Arguments)):
        prepare_data.tell(prepare_data.prepare(preparing, tokenizer))


def finish(start: Start, learner: Learner, validation: Validation, stop: StopSignal, seconds: float) -> None:
    """Draw the curves and say how it went."""
    run_dir, step = start.run_dir, learner.progress.step
    plot_losses(run_dir, validation.entropy(len(validation.prefix.tokens) / math.log(2)))
    if stop:
        notice(f"stopped by signal {stop.number} at step {step}, everything saved; continue with --resume auto")
        return
    early = ", stopped early: no better validation loss any more" if step < start.config.max_steps else ""
    print(f"{run_dir}: {step} steps in {duration(seconds)}, {validation.describe(validation.newest)}{early}")
    notice(f'next: python generate.py --checkpoint {run_dir} --prompt "Once upon a time"')


def read_inputs(args: Arguments, asked: dict[str, object], run_dir: Path, processes: Processes) -> Start:
    """All that the run starts from, checked; the data is prepared if it is to be. Raises ValueError, FileNotFoundError, OSError."""
    resumed = find_resumed(args.resume, run_dir)
    source = read_source(args.init_from) if args.init_from is not None and resumed is None else None
    if args.overwrite:
        read = (source and source["path"], args.dataset and Path(args.dataset))
        check_sources(written_paths(run_dir), filter(None, read), "out_dir")
    if args.dataset is None:
        return make_start(args, asked, resumed, source, *open_directories(args.train.data_dir, args.tokenizer, args.verify_data))
    if processes.first and not (resumed is not None and (run_dir / DATA / META).is_file()):
        prepare_text(args, asked, run_dir, source)
    processes.wait()
    data = DataDirectory(prepared_data(run_dir), verify=args.verify_data)
    data.name = str(run_dir / DATA)  # where it will be
    args = replace(args, train=replace(args.train, data_dir=(data.name,)))
    return make_start(args, asked, resumed, source, [data], [None])


def run(args: Arguments, asked: dict[str, object], device: str, processes: Processes) -> int:
    """The whole stage in one process of those that train together. Returns the exit code."""
    run_dir = run_directory(args, asked)
    writable = os.access(run_dir, os.W_OK) or not run_dir.is_dir()  # else only a finished run can say that it is there
    with sole_trainer(run_dir, args.train.tensorboard) if processes.first and writable else contextlib.nullcontext():
        if args.export:
            from export.formats import chosen, target_names

            check_exports(run_dir, target_names(chosen(args.export), BEST).values(), run_dir / BEST, overwrite=True)
        start = read_inputs(args, asked, run_dir, processes)
        finished = start.finished_step(args.overwrite, args.resume)
        if finished is None:
            learner, validation = set_up(start, device, processes)
            log, began = open_log(start, learner) if processes.first else None, time.perf_counter()
            with contextlib.closing(log) if log else contextlib.nullcontext(), StopSignal() as stop:
                train(start, learner, validation, log, stop)
            if processes.first:
                finish(start, learner, validation, stop, time.perf_counter() - began)
            if stop:
                return 128 + stop.number
        else:
            run_dir = start.resumed[0].parent if start.resumed is not None else run_dir
            if processes.first:
                print(f"{run_dir} holds this very run, finished at step {finished}")
    if not args.export or not processes.first:
        return 0
    import export_model

    return 0 if export_model.export(run_dir / BEST, args.export, run_dir, overwrite=True) else 1


def main(argv: list[str] | None = None) -> int:
    args, asked = read_arguments(argv, __doc__)
    if args.export:
        from export.formats import chosen

        chosen(args.export)  # what isn't installed is told before the training
    processes = Processes()
    device = processes.start(choose_device(args.train.device))
    half = max(1, args.train.batch_size // 2)
    advice = f"pass --batch_size {half} --gradient_accumulation_steps {-(-args.train.windows_per_step // half)} (the same effective batch)"
    try:
        shorter = f"{advice}, a shorter --block_size or a smaller --preset"
        with lasting_output(), explained_failures(device, shorter, processes.count):
            return run(args, asked, device, processes)
    except FloatingPointError as error:
        saved = step_checkpoints(run_directory(args, asked))
        onward = f"continue from {saved[0]} with --resume auto and" if saved else "start again with"
        notice(f"error: {error}; {onward} a lower --learning_rate and --muon_learning_rate")
        return 1
    except LostProcess as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        processes.stop()


if __name__ == "__main__":
    run_script(main)
