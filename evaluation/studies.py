"""Studies: the cells of a recipe, run one after the other as the scripts that one would call by hand.

Several processes, on one machine or on several with a shared folder, may run the same study: each call of a script has a lock, and what
another process does already is left to it. What was killed is continued by whoever comes next (train.py --resume auto is exact).
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils import Checked, Natural, StopSignal, describe, duration, notice

from filelock import FileLock, Timeout
from tqdm import tqdm

from evaluation.comparison import Variants
from evaluation.mixtures import Search
from evaluation.plans import Cell, Planner, Step, Texts
from evaluation.recipes import Script, read_recipe
from formats.data_directory import DataDirectory
from formats.metrics import METRICS
from formats.outputs import peek_json, write_json
from formats.run_directory import CONFIG
from formats.schemas import MetricsLine, check
from formats.scores import SCORES, content_hash, read_scores

LOOK_AGAIN, WAIT, SURE = 0.05, 0.5, 5  # seconds: between looks at a process, and at its log; of training, for an estimate
HOME = Path("studies")  # where studies live unless a flag says otherwise
TAIL = 2**16  # bytes of a log, more than its longest line
CHECKED = "study_checked.json"
NEARLY = 0.99  # of a budget in tokens: the last document of each source is cut between characters


class FailedCell(Exception):
    """A call failed, or what it made can't be used; the other cells go on."""


class Stopped(Exception):
    """A signal asked to end."""


def last_error(log: Path) -> str:
    """The last line of a log that tells an error, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")] or lines or ["it said nothing"]
    return told[-1].removeprefix("error: ")


def trained_share(run: Path) -> float:
    """How much of a training is done, 0 to 1, as the end of its log says."""
    config, path = peek_json(run / CONFIG), run / METRICS
    steps = config.get("train", {}).get("max_steps") if isinstance(config, dict) else None
    if not steps or not path.is_file():
        return 0.0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        whole = file.read().split(b"\n")[:-1]
    with contextlib.suppress(ValueError):  # a damaged line: the training itself will say so
        return check(whole[-1], MetricsLine, path, "").get("step", 0) / steps if whole else 0.0
    return 0.0


class Progress:
    """One bar for all cells, in their work; tells once how long all of it will take, as soon as that is known."""

    def __init__(self, cells: list[Cell]):
        self.cells = [cell for cell in cells if not cell.done]
        self.left = {cell: 0.0 if cell.train.recorded() else cell.work for cell in self.cells}  # nothing where only evaluating is left
        self.total, self.done = sum(self.left.values()), 0.0
        self.told = not self.total
        known = [(record["seconds"], record["share"] * cell.work) for cell in cells if (record := cell.train.recorded())]
        done = f"{len(cells) - len(self.cells)} of {len(cells)} cells are done already"
        notice(done if len(self.cells) < len(cells) else f"{len(cells)} cells")
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self.bar = tqdm(total=self.total or 1, disable=None, smoothing=0, bar_format=form)
        if known:
            self.estimate(*map(sum, zip(*known)))

    def tell(self, message: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            notice(message)

    def estimate(self, seconds: float, work: float) -> None:
        """From a part of the work that took so long: how long will the rest train? Told once."""
        if not self.told and work > 0:
            self.told = True
            count = sum(work > 0 for work in self.left.values())
            self.tell(f"about {duration(seconds / work * (self.total - self.done))} of training in {count} cells, plus evaluations")

    def update(self, title: str, work: float = 0.0) -> None:
        """A look at what is going on. work: what is done of the cell."""
        self.bar.set_description_str(title, refresh=False)
        self.bar.n = min(self.done + work, self.bar.total)
        self.bar.refresh()

    def finish(self, cell: Cell, how: str) -> None:
        self.done += self.left[cell]
        self.update(str(cell))
        self.tell(f"{cell}: {how}")


@dataclass
class Study:
    """A recipe's cells being run. failures: what went wrong, by the directory of the call."""

    planner: Planner
    stop: StopSignal
    failures: dict[Path, str] = field(default_factory=dict)

    # ------------------------------------------------------------ one call

    def acquire(self, path: Path, wait: bool) -> FileLock:
        """A lock that this process alone has. Raises Stopped, and Timeout if another process has it and we don't wait."""
        lock = FileLock(path)
        while not lock.is_locked:
            self.check_signals()
            try:
                lock.acquire(timeout=WAIT if wait else 0)
            except Timeout:
                if not wait:
                    raise
        return lock

    @contextlib.contextmanager
    def lock(self, directory: Path, wait: bool = True) -> Iterator[None]:
        """Be the only process that works on a directory; raises as `acquire`."""
        locks = self.planner.out_dir / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = self.acquire(locks / f"{directory.name}.lock", wait)
        try:
            for own in directory.glob(".*.lock"):  # of a script whose study was killed, and which goes on by itself
                self.acquire(own, wait).release()
            yield
        finally:
            lock.release()

    def check_signals(self) -> None:
        if self.stop:
            raise Stopped

    def run(self, step: Step, progress: Progress, cell: Cell | None = None, wait: bool = True) -> None:
        """Make one call, unless it is done. cell: whose training it is. Raises FailedCell, Stopped, Timeout."""
        if step.recorded():
            return
        if step.directory in self.failures:
            raise FailedCell(self.failures[step.directory])
        with self.lock(step.directory, wait):
            if step.recorded():  # another process did it meanwhile
                return
            began, before, log = time.monotonic(), trained_share(step.directory), self.log_of(step)
            code = self.call(step, log, progress, cell)
            if code or not step.product.is_file():
                how = f"killed by signal {-code}" if code < 0 else last_error(log) if code else f"it wrote no {step.product.name}"
                self.failures[step.directory] = f"{step.name}.py: {how} (all it said: {log})"
                raise FailedCell(self.failures[step.directory])
            step.write_record(time.monotonic() - began, 1 - before)

    def log_of(self, step: Step) -> Path:
        path = self.planner.out_dir / "logs" / f"{step.directory.name}-{step.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def call(self, step: Step, log: Path, progress: Progress, cell: Cell | None) -> int:
        """Run a script until its end and return its exit code. A signal is passed on, once, and what the script saves is waited for."""
        with open(log, "wb") as file:  # a session of its own, so that Ctrl-C reaches it once: by us
            process = subprocess.Popen(step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        asked, looked, first = False, -WAIT, None  # first: seconds and share at the first step of this call
        before = trained_share(step.directory)
        try:
            while process.poll() is None:
                if self.stop and not asked:
                    asked = True
                    process.terminate()
                if time.monotonic() - looked > WAIT:
                    looked, share = time.monotonic(), trained_share(step.directory) if cell else 0.0
                    progress.update(step.title, share * progress.left[cell] if cell else 0.0)
                    first = first or ((looked, share) if share > before else None)
                    if first and looked - first[0] > SURE:
                        progress.estimate(looked - first[0], (share - first[1]) * cell.work)
                time.sleep(LOOK_AGAIN)
        except BaseException:
            process.kill()
            raise
        if asked:
            raise Stopped
        return process.returncode

    # ------------------------------------------------------------ one cell

    def check_data(self, data: Step) -> None:
        """Raise FailedCell where a variant's data is smaller than its budget, or holds documents that models are measured on."""
        if data.directory in self.failures:
            raise FailedCell(self.failures[data.directory])
        options, budget = self.planner.recipe.options, data.flags.get("max_tokens", 0)
        key = content_hash(data.key, self.planner.measured_on, options.allow_overlap, options.allow_smaller, budget)
        if (peek_json(data.directory / CHECKED) or {}).get("key") == key:
            return
        tokens = DataDirectory(data.directory).meta["splits"]["train"]["tokens"]
        if tokens < NEARLY * budget and not options.allow_smaller:
            advice = "give more text, lower it for all, or set allow_smaller = true in [study]"
            raise FailedCell(f"{data.directory} has only {tokens:,} of max_tokens = {budget:,} training tokens; {advice}")
        directories = {name: step.directory for name, step in self.planner.held_out.items()}
        seen = {name: n for name, n in self.planner.texts.seen(data.directory, directories, self.planner.evaluation).items() if n}
        if seen and not options.allow_overlap:
            found = ", ".join(f"{n:,} of {name}" for name, n in seen.items())
            advice = "take other texts, or set allow_overlap = true in [study]"
            raise FailedCell(f"{data.directory} trains on documents that models are measured on ({found}); {advice}")
        write_json(data.directory / CHECKED, {"key": key, "held_out_documents_in_train": seen})

    def run_cell(self, cell: Cell, progress: Progress, wait: bool = True) -> None:
        """All that a cell needs, unless it is done. Raises FailedCell, Stopped, and Timeout if another process trains it."""
        for step in (*self.planner.shared, *cell.data):
            progress.update(step.title)
            self.run(step, progress)
        for step in cell.data:
            with self.lock(step.directory):
                try:
                    self.check_data(step)
                except (FailedCell, ValueError, OSError) as error:
                    self.failures[step.directory] = describe(error)
                    raise FailedCell(describe(error)) from None
        self.run(cell.train, progress, cell, wait)
        self.run(cell.evaluate, progress, wait=wait)

    def run_cells(self, cells: list[Cell], wait: bool = False) -> bool:
        """Run what isn't done; what went wrong is told, and the others go on. wait: for another process that works on a cell already,
        instead of coming back to it at the end. True if all is well. Raises Stopped."""
        todo, progress, well = [(cell, wait) for cell in cells if not cell.done], Progress(cells), True
        with contextlib.closing(progress.bar):
            while todo:
                cell, wait = todo.pop(0)
                try:
                    self.run_cell(cell, progress, wait)
                    progress.finish(cell, "done")
                except Timeout:
                    todo.append((cell, True))
                except FailedCell as error:
                    well = False
                    progress.finish(cell, f"failed, {error}")
        return well


# ---------------------------------------------------------------- all of it


@dataclass(frozen=True)
class StudyFlags(Checked):
    """Flags of compare.py for studies."""

    recipe: str | None = None
    """Run a whole study as a TOML file describes it: prepare, train, evaluate, compare. What is done already is not done again."""
    out_dir: str | None = None
    """For --recipe: the study's folder. Default: ./studies/NAME for NAME.toml."""
    data_root: str | None = None
    """For --recipe: where relative paths of texts begin. Default: as the recipe says, or here."""
    dry_run: bool = False
    """For --recipe: print the commands that are still to run, and run none."""
    cells: bool = False
    """For --recipe: print the number of cells, one for each variant, model and seed."""
    cell: Natural | None = None
    """For --recipe: run this cell only, counted from 0, with what it needs; several processes may do so at once."""

    def problems(self) -> list[str]:
        asked = [name for name in ("dry_run", "cells") if getattr(self, name)] + ["cell"] * (self.cell is not None)
        given = asked + [name for name in ("out_dir", "data_root") if getattr(self, name) is not None]
        problems = [f"--{' and --'.join(given)} belong to --recipe; name a recipe"] if given and self.recipe is None else []
        return problems + ([f"--{' and --'.join(asked)} exclude each other; give one of them"] if len(asked) > 1 else [])


def tell_plan(planner: Planner, cells: list[Cell], more: str) -> None:
    """Print the commands that are still to run. more: of what can't be known yet."""
    steps = dict.fromkeys(step for cell in cells for step in (*planner.shared, *cell.data, cell.train, cell.evaluate))
    todo = [step for step in steps if not step.recorded()]
    print(f"# {len(cells)} cells, {sum(cell.done for cell in cells)} done; {len(todo)} commands to run")
    for step in todo:
        print(f"# {step.title}\n{step}")
    print(more, end="")


def run_study(flags: StudyFlags, scripts: dict[str, Script], texts: Texts, finish: Callable[[Path, Variants], None]) -> int:
    """What --recipe asks for; returns the exit code. finish: compares variants and writes the result into the study's folder.

    Raises FileNotFoundError, ValueError, OSError.
    """
    recipe = read_recipe(Path(flags.recipe), scripts)
    planner = Planner(recipe, scripts, texts, Path(flags.out_dir or HOME / recipe.path.stem), flags.data_root)
    search = Search(planner) if recipe.mixture else None
    if flags.cells or flags.dry_run or flags.cell is not None:
        return _part_of(flags, planner, search)
    with StopSignal() as stop:
        study = Study(planner, stop)
        try:
            cells = search.pilots if search else planner.variants()
            well = study.run_cells(cells)
            if search:
                prediction = search.predict()
                write_json(planner.out_dir / "mixture.json", prediction.content())
                print(*prediction.describe(), sep="\n")
                cells = search.validation(prediction)
                well &= study.run_cells(cells)
        except Stopped:
            notice("stopped, everything saved; the same command goes on from here")
            return 128 + stop.number
    if missing := [str(cell) for cell in cells if not cell.done]:
        notice(f"not compared, for they failed: {'; '.join(missing)}")
    variants = scores_of(planner, cells)
    if len(variants) > 1:
        finish(planner.out_dir, variants)
    else:
        notice("fewer than two variants are done, so there is nothing to compare")
    return 0 if well else 1


def _part_of(flags: StudyFlags, planner: Planner, search: Search | None) -> int:
    """--cells, --dry_run or --cell of a study; returns the exit code."""
    cells = search.pilots if search else planner.variants()
    count, known = search.count if search else len(cells), search is None or all(cell.done for cell in search.pilots)
    if flags.cells:
        print(count)
        return 0
    if search and known:
        cells = cells + search.validation(search.predict())
    if flags.dry_run:
        tell_plan(planner, cells, "" if known else f"# and {count - len(cells)} cells more, for mixtures that these pilots decide\n")
        return 0
    if flags.cell >= count:
        raise ValueError(f"cell={flags.cell}, but {planner.recipe.path} has {count} cells, from 0 to {count - 1}")
    if flags.cell >= len(cells):
        raise ValueError(f"cell={flags.cell} trains a mixture that the pilots decide; run cells 0 to {len(cells) - 1} first")
    with StopSignal() as stop:
        try:
            return 0 if Study(planner, stop).run_cells([cells[flags.cell]], wait=True) else 1
        except Stopped:
            notice("stopped, everything saved; the same command goes on from here")
            return 128 + stop.number


def scores_of(planner: Planner, cells: list[Cell]) -> Variants:
    """What the cells that are done scored on what the recipe names; texts carry the recipe's names. Raises ValueError."""
    tasks, found = "tasks" in planner.recipe.evaluation, {}
    for cell in (cell for cell in cells if cell.done):
        sets = read_scores(cell.evaluate.directory / SCORES)  # maybe also of an earlier recipe
        texts = {known: sets[name] for name, known in planner.set_names.items() if name in sets}
        done = {name: scores for name, scores in sets.items() if tasks and "correct" in scores.columns}
        found.setdefault(cell.variant, {})[str(cell.train.directory)] = texts | done
    return found
