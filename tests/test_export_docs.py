"""Every snippet of docs/export.md does what the page says: it continues a prompt as generate.py does, where its packages are installed."""

import contextlib
import io
import re
import shutil
import subprocess

import pytest

from formats.run_directory import load_model
from tests import runs
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
PROMPT, LENGTH = "Once upon a time", 20


def blocks(language: str) -> dict[str, str]:
    """Heading of each section of the page -> its block in a language, for sections that have one."""
    sections = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    found = {heading: re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) for heading, text in sections}
    assert all(len(snippets) <= 1 for snippets in found.values())
    return {heading: snippets[0] for heading, snippets in found.items() if snippets}


SNIPPETS = blocks("python")


def files(snippet: str) -> set[str]:
    return set(re.findall(r"exported/([\w.]+)", snippet)) - {"tokenizer.json", "config.json"}


@pytest.fixture
def place(exported, tmp_path):
    """A folder with exported/ in it."""
    (tmp_path / "exported").symlink_to(exported[1])
    return tmp_path


@pytest.fixture
def greedy(exported, script):
    """What the model writes behind the prompt: ids of the prompt, its EOT in front, and of the whole text; and what generate.py prints."""
    model, tokenizer, *_ = load_model(str(exported[0]))
    ids = [tokenizer.eot_id, *tokenizer.encode(PROMPT)]
    flags = ["--prompt", PROMPT, "--temperature", 0, "--max_new_tokens", LENGTH, "--device", "cpu"]
    text = script("generate.py", "--checkpoint", exported[0], *flags).stdout.removesuffix("\n")
    return ids, runs.greedy(model, ids, LENGTH), text


@pytest.mark.parametrize("heading", SNIPPETS)
def test_a_snippet_continues_a_prompt_as_generate_does(place, greedy, heading):
    for package in re.findall(r"^(?:import|from) (\w+)", SNIPPETS[heading], re.MULTILINE):
        pytest.importorskip(package)
    assert files(SNIPPETS[heading]) and all((place / "exported" / name).exists() for name in files(SNIPPETS[heading]))
    out = io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(out):
        exec(SNIPPETS[heading], {})
    assert out.getvalue().removesuffix("\n") == greedy[2]


@pytest.mark.slow
def test_torchscript_runs_in_cpp(place, greedy):
    """Compiled with the libtorch of the pip package, by the commands of the page."""
    if not (shutil.which("cmake") and shutil.which("g++")):
        pytest.skip("needs cmake and g++")
    prompt, expected, _ = greedy
    (place / "main.cpp").write_text(blocks("cpp")["TorchScript"])
    (place / "CMakeLists.txt").write_text(blocks("cmake")["TorchScript"])
    build, start = re.search(r"```\n(cmake .*)\n(\./.*)\n```", PAGE).groups()
    subprocess.run(["bash", "-c", build], cwd=place, check=True, capture_output=True)
    command = [start.split()[0], *map(str, prompt)]
    out = subprocess.run(command, cwd=place, check=True, capture_output=True, text=True).stdout
    assert [*prompt, *map(int, out.split())] == expected
