"""What the tests share: the real data where it is, small data of our own, and the scripts run as a user runs them."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("SLM_TEST_DATA", ROOT.parent / "shared" / "data"))
if (DATA / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))

import utils  # noqa: E402

import torch  # noqa: E402

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with Ctrl-C ignored

TINY = {"preset": "nano", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 2}
TINY |= {"learning_rate": 1e-2, "device": "cpu", "dtype": "float32", "eval_tokens": 2000, "log_interval": 1}


def tiny(**changes) -> list[str]:
    """Flags of train.py for a model that trains in a second, with changes; a flag that is None is left out."""
    return [word for name, value in (TINY | changes).items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA} (SLM_TEST_DATA)")
    return DATA


def check_end(process: subprocess.CompletedProcess, code: int | None) -> subprocess.CompletedProcess:
    """That it ended with this code, if one is given; with 2 only after one sentence."""
    if code is not None:
        assert process.returncode == code, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
    if code == 2:
        assert "Traceback" not in process.stderr
        assert process.stderr.strip().splitlines()[-1].startswith("error: "), process.stderr
    return process


def run_here(name: str, *args, cwd: Path = ROOT, code: int | None = 0, stdin: str | None = None) -> subprocess.CompletedProcess:
    """How a script's main, run in this process, ended. A process of its own would spend seconds on imports before it does anything."""
    main = importlib.import_module(name.removesuffix(".py")).main
    out, err = io.StringIO(newline=None), io.StringIO(newline=None)
    text = sys.stdin if stdin is None else io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.stdin", text)
    with contextlib.chdir(cwd), streams[0], streams[1], streams[2], pytest.raises(SystemExit) as stop:
        utils.run_script(lambda: main([*map(str, args)]))
    return check_end(subprocess.CompletedProcess([name, *args], stop.value.code, out.getvalue(), err.getvalue()), code)


@pytest.fixture
def script():
    """script("train.py", "--preset", "nano", cwd=..., code=0) -> how it ended, in this process; `program` starts one."""
    return run_here


@pytest.fixture
def program():
    """As `script`, in a process of its own, with variables of the environment; one thread, so that tests can share cores."""

    def run(name: str, *args, cwd: Path | None = None, code: int | None = 0, stdin: str = "", **env) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
        command = [sys.executable, str(ROOT / name), *map(str, args)]
        return check_end(subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, env=environment), code)

    return run


@pytest.fixture
def mistake():
    """mistake("train.py", *arguments, cwd=...) -> what stands on stderr, one sentence at its end, when the script exits with 2."""
    return lambda name, *args, cwd: run_here(name, *args, cwd=cwd, code=2).stderr


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory) -> Path:
    """A small sample corpus: 300 training stories, 15 for val and test, as a data directory."""
    import prepare_data

    directory = tmp_path_factory.mktemp("sample")
    prepare_data.prepare(prepare_data.Arguments(sample=True, sample_stories=300, vocab_size=512, output=str(directory), report=False))
    return directory


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, sample_dir) -> Path:
    """A run directory of a tiny qwen3 model, 30 steps."""
    import train

    directory = tmp_path_factory.mktemp("run")
    arguments = tiny(data_dir=sample_dir, out_dir=directory, max_steps=30, eval_interval=15, checkpoint_interval=10)
    assert train.main(arguments) == 0
    return directory


@pytest.fixture(scope="session")
def gpt2_run(tmp_path_factory, sample_dir) -> Path:
    """A run directory of a tiny gpt2 model, 3 steps."""
    import train

    directory = tmp_path_factory.mktemp("gpt2")
    assert train.main(tiny(arch="gpt2", data_dir=sample_dir, out_dir=directory, max_steps=3)) == 0
    return directory


@pytest.fixture(scope="session", params=["qwen3", "gpt2"])
def exported(request, tmp_path_factory) -> tuple[Path, Path]:
    """A run of each family, and a folder with its exports in every format that computes exactly what the model computes."""
    import export_model
    from export.formats import FORMATS

    run = request.getfixturevalue("trained_run" if request.param == "qwen3" else "gpt2_run")
    output = tmp_path_factory.mktemp("exported")
    names = [name for name, format in FORMATS.items() if format.exact and not format.missing()]
    assert export_model.main(["--checkpoint", str(run), "--format", *names, "--output", str(output)]) == 0
    return run, output


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
