"""Rules of the house that a reader should be able to trust."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import utils
from tests.conftest import ROOT

SOURCES = sorted(ROOT.glob("*.py"))
SCRIPTS = {"prepare_data", "tokenizer_train", "train", "evaluate", "compare", "export_model", "generate", "benchmark"}
# A module imports only from those before it; a script, besides, another script whose stage it runs whole.
ORDER = ["config", "utils", "models", "twins", "optimizers", "sample_corpus", "text_sources", "tokenizers_io", "tokenizer_kinds"]
ORDER += ["token_files", "prepare_peers", "cleaning", "corpus", "document_encoder", "data_report", "run_log", "checkpoints_io"]
ORDER += ["measures", "estimates", "parallel", "batches", "trainer", "starting_point"]


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            yield owner, name, {keyword.arg: keyword.value for keyword in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_code_from_data(path):
    tree = ast.parse(path.read_text())
    for owner, name, keywords in calls(tree):
        if (owner, name) == ("torch", "load"):
            assert ast.unparse(keywords["weights_only"]) == "True"
        assert not (owner == "" and name in ("eval", "exec", "compile", "__import__")), name
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert not imported & {"pickle", "cPickle", "dill", "marshal", "shelve"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_go_down_only(path):
    ours = {source.stem for source in SOURCES}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    imported &= ours
    if path.stem in SCRIPTS:
        assert imported & SCRIPTS <= {"prepare_data", "export_model"}
    else:
        assert imported <= set(ORDER[: ORDER.index(path.stem)])


@pytest.mark.parametrize(
    "name", ["token_files", "tokenizers_io", "tokenizer_kinds", "corpus", "document_encoder", "data_report", "sample_corpus"]
)
def test_preparation_does_not_import_torch(name):
    import subprocess

    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_script_has_commands_to_paste_and_help(script):
    for name in sorted(SCRIPTS):
        doc = ast.get_docstring(ast.parse(Path(ROOT / f"{name}.py").read_text()))
        assert 2 <= len(re.findall(r"^ *python \w+\.py ?", doc, re.MULTILINE)) <= 4, name
        out = script(f"{name}.py", "--help").stdout
        assert doc.splitlines()[0][:30] in " ".join(out.split())


def test_the_readme_and_ci_run_the_same_test_command():
    command = "pip install -r tests/requirements.txt && python -m pytest -q"
    assert command in (ROOT / "README.md").read_text() and command in (ROOT / ".ci" / "run").read_text()


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    parts = [part for block in blocks for line in block.splitlines() for part in re.split(r"&&|\|", line)]
    words = [shlex.split(part, comments=True) for part in parts]
    return [line[1:] for line in words if len(line) > 1 and line[0] == "python" and line[1].endswith(".py")]


def test_every_flag_of_the_readme_exists():
    """Each command of the README, read as its script reads it, without running it."""
    commands = readme_commands()
    assert len(commands) > 20 and {name.removesuffix(".py") for name, *_ in commands} == SCRIPTS
    for name, *arguments in commands:
        module = importlib.import_module(name.removesuffix(".py"))
        if name == "train.py":
            module.read_arguments(arguments)
        else:
            utils.read_command_line(module.Arguments, arguments, None, {"model_path": "checkpoint", "max_length": "max_new_tokens"})


def test_the_readme_names_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in SOURCES if f"{path.name}" not in text]
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
