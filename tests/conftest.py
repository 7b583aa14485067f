"""What the tests share: the real data where it is, small data of our own, and the scripts run as a user runs them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("SLM_TEST_DATA", ROOT.parent / "shared" / "data"))
if (DATA / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))

import utils  # noqa: E402

import torch  # noqa: E402

torch.set_num_threads(1)

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


@pytest.fixture
def script():
    """script("train.py", "--preset", "nano", cwd=..., code=0) -> the finished process; one thread, so that tests can share cores."""

    def run(name: str, *args, cwd: Path | None = None, code: int | None = 0, stdin: str = "", **env) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
        process = subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, args)], cwd=cwd, input=stdin, capture_output=True, text=True, env=environment
        )
        if code is not None:
            assert process.returncode == code, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
        if code == 2:
            assert "Traceback" not in process.stderr
            assert process.stderr.strip().splitlines()[-1].startswith("error: "), process.stderr
        return process

    return run


@pytest.fixture
def mistake(monkeypatch, capsys):
    """mistake("train.py", *arguments, cwd=...) -> the one sentence on stderr with which the script, run in this process, exits with 2."""

    def run(name: str, *args, cwd: Path) -> str:
        main = importlib.import_module(name.removesuffix(".py")).main
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_code:
            patch.chdir(cwd)
            utils.run_script(lambda: main([*map(str, args)]))
        stderr = capsys.readouterr().err
        assert exit_code.value.code == 2
        assert stderr.strip().splitlines()[-1].startswith("error: ")
        return stderr

    return run


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
