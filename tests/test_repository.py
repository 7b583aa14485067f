"""Rules of the house that a reader should be able to trust."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import utils

import pytest

from tests.conftest import ROOT

IGNORED = {"tests", "data", "checkpoints", "runs"} | {path.name for path in ROOT.iterdir() if path.name.startswith(".")}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in IGNORED)
SCRIPTS = {"prepare_data", "tokenizer_train", "train", "evaluate", "compare", "export_model", "generate", "benchmark"}
WHOLE_STAGES = {"prepare_data", "export_model"}  # what another script may run whole
# What a module may import: its own room, the rooms before it, and utils. Rooms that share a line never import each other.
ROOMS = [["config"], ["models"], ["formats"], ["generation"], ["evaluation"], ["preparation", "training", "export"], ["benchmarks"]]


def module_name(path: Path) -> str:
    """formats/tokenizer.py -> formats.tokenizer"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """The modules of this repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def level(name: str) -> int:
    """How high a module stands: the place of its room, above all of them the scripts."""
    return next((i for i, rooms in enumerate(ROOMS) if name.split(".")[0] in rooms), len(ROOMS))


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            yield owner, name, {keyword.arg: keyword.value for keyword in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_code_from_data(path):
    tree = ast.parse(path.read_text())
    for owner, name, keywords in calls(tree):
        if (owner, name) == ("torch", "load"):
            assert ast.unparse(keywords["weights_only"]) == "True"
        assert not (owner == "" and name in ("eval", "exec", "compile", "__import__")), name
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert not imported & {"pickle", "cPickle", "dill", "marshal", "shelve"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down_only(path):
    name = module_name(path)
    imported = imports(path) - {"utils"}
    if name in SCRIPTS:
        assert imported & SCRIPTS <= WHOLE_STAGES
    elif name == "utils":
        assert not imported
    else:
        assert all(other.split(".")[0] == name.split(".")[0] or level(other) < level(name) for other in imported), imported


def test_imports_have_no_circles():
    graph = {name: imports(path) for name, path in MODULES.items()}
    while free := {name for name, imported in graph.items() if not imported & graph.keys()}:
        graph = {name: imported for name, imported in graph.items() if name not in free}
    assert not graph


def test_a_room_holds_its_docstring_and_imports_nothing():
    for path in SOURCES:
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str), path
        else:
            assert path.parent == ROOT or (path.parent / "__init__.py").is_file(), path


@pytest.mark.parametrize("name", ["formats.tokenizer", "formats.data_directory", *(n for n in MODULES if n.startswith("preparation."))])
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
    assert not [path.name for path in SOURCES if path.name != "__init__.py" and path.name not in text]
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
