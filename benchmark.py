"""Speed, memory and learning of the stages, also beside a peer that runs from its own checkout.

    python benchmark.py train --against nanogpt ../nanoGPT
    python benchmark.py generate --against nanogpt ../nanoGPT
    python benchmark.py prepare --text stories.txt --large_megabytes 1000
    python benchmark.py quality --against nanogpt ../nanoGPT --text tinyshakespeare.txt
    python benchmark.py tasks --task hellaswag --checkpoint checkpoints/data

prepare     megabytes per second and peak memory of prepare_data.py, a bare loop of tiktoken, and datasets.map in two processes
train       tokens per second and peak memory of train.py, as a fraction of what this machine's matrix products reach
generate    tokens per second of texts that grow, by each engine, beside transformers and nanoGPT, and what the memory allows
quality     how long training on a text (the last tenth is held out) takes to reach the peer's loss, and what it reaches in the peer's time
tasks       seconds to score a task, beside lm-evaluation-harness with the same model in transformers
statistics  how often the intervals and verdicts of compare.py are wrong, on simulated runs without any true difference

Ours and the peer's run in turn, `--rounds` times each; medians are printed. Other programs on the same cores spoil the figures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from utils import Checked, Count, choose_device, read_command_line, run_script

import tyro
from annotated_types import Ge

from benchmarks import generation, preparation, quality, statistics, tasks, training
from benchmarks.harness import workplace
from evaluation.tasks import DATA


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of benchmark.py."""

    stage: tyro.conf.Positional[Literal["prepare", "train", "generate", "quality", "tasks", "statistics"]]
    """prepare, train, generate, quality, tasks or statistics."""
    against: tuple[str, str] | None = None
    """A peer and its checkout: nanogpt DIR."""
    rounds: Count = 5
    """How often each side runs, in turn."""
    steps: Annotated[int, Ge(training.UNSTEADY + 2)] = 12
    """train: optimizer steps in a run; the first three are left out of the medians."""
    text: str | None = None
    """quality: a text file, e.g. tiny Shakespeare. prepare: documents to make the corpus from; default: the sample corpus."""
    megabytes: Count = 200
    """prepare: size of the corpus."""
    large_megabytes: Count | None = None
    """prepare: measure the memory for a corpus of this size too."""
    simulations: Count = 2000
    """statistics: studies that are simulated for each scenario and number of seeds."""
    task: str = "sample_name"
    """tasks: what to score, as evaluate.py names it."""
    task_data: str = DATA
    """tasks: where the files of tasks are."""
    items: Count = 200
    """tasks: how many of its items."""
    checkpoint: str | None = None
    """tasks: the model. Default: nano with random weights."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def problems(self) -> list[str]:
        problems = []
        if self.against is not None and self.against[0] != "nanogpt":
            problems.append(f"unknown peer {self.against[0]!r}; take nanogpt, followed by the directory of its checkout")
        if self.stage == "quality" and (self.text is None or self.against is None):
            problems.append("quality needs --text FILE and --against nanogpt DIR: the peer's time and loss are the measure")
        return problems


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    checkout = Path(args.against[1]) if args.against else None
    if checkout is not None and not (checkout / "train.py").is_file():
        raise FileNotFoundError(f"no train.py in {checkout}; give the directory of nanoGPT's checkout")
    if args.stage == "statistics":
        statistics.measure(args.simulations)
        return 0
    with workplace() as cwd:
        if args.stage == "train":
            training.measure(args.rounds, args.steps, choose_device(args.device), checkout, cwd)
        elif args.stage == "generate":
            generation.measure(args.rounds, checkout, cwd)
        elif args.stage == "prepare":
            preparation.measure(args.rounds, args.text, args.megabytes, args.large_megabytes, cwd)
        elif args.stage == "tasks":
            tasks.measure(args.rounds, args.checkpoint, args.task, Path(args.task_data), args.items, cwd)
        else:
            quality.measure(args.rounds, Path(args.text), checkout, cwd)
    return 0


if __name__ == "__main__":
    run_script(main)
