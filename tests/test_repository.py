"""Rules of the house that a reader should be able to trust."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import utils

import pytest

from tests.conftest import ROOT

IGNORED = {"tests", "data", "checkpoints", "runs"} | {path.name for path in ROOT.iterdir() if path.name.startswith(".")}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in IGNORED)
SCRIPTS = {"prepare_data", "tokenizer_train", "train", "evaluate", "compare", "export_model", "generate", "benchmark"}
WHOLE_STAGES = {"prepare_data", "export_model", "evaluate"}  # what another script may run whole
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


def test_preparation_does_not_import_torch():
    light = ["formats.tokenizer", "formats.data_directory", "formats.scores", *(n for n in MODULES if n.startswith("preparation."))]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(light)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_script_has_commands_to_paste_and_help(script):
    for name in sorted(SCRIPTS):
        doc = ast.get_docstring(ast.parse(Path(ROOT / f"{name}.py").read_text()))
        assert 2 <= len(re.findall(r"^ *python \w+\.py ?", doc, re.MULTILINE)) <= 5, name
        out = script(f"{name}.py", "--help").stdout
        assert doc.splitlines()[0][:30] in " ".join(out.split())


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALIASES = {"model_path": "checkpoint", "max_length": "max_new_tokens"}
OF_OTHER_PROGRAMS = {"build", "index-url", "n_ctx", "nproc_per_node", "check", "model", "model_args"}  # pip, torchrun, ruff, lm_eval
LARGEST_README = 10_240  # bytes


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def flags_of(script: str) -> set[str]:
    """The flags of a script, with their aliases and, as booleans have it, with `no_`."""
    names = utils.flag_types(importlib.import_module(script).Arguments).keys()
    return names | {f"no_{name}" for name in names} | {alias for alias, name in ALIASES.items() if name in names}


def commands(page: Path) -> list[list[str]]:
    """The commands with our scripts in a page's bash blocks, as words after `python`."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    parts = [part for block in blocks for line in block.splitlines() for part in re.split(r"&&|\|", line)]
    words = [shlex.split(part, comments=True) for part in parts]
    return [line[1:] for line in words if len(line) > 1 and line[0] == "python" and line[1].endswith(".py")]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[Path, str]]:
    """Where a page's relative links and pictures lead: (file, anchor or "")."""
    targets = re.findall(r"\]\(([^()\s]+)\)", page.read_text(encoding="utf-8"))
    parts = [target.partition("#") for target in targets if "://" not in target]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in parts]


def test_the_readme_and_ci_run_the_same_test_command():
    command = "pip install -r tests/requirements.txt && python -m pytest -q"
    assert command in (ROOT / "README.md").read_text() and command in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= LARGEST_README


def test_the_docs_show_commands_of_every_script():
    names = {name.removesuffix(".py") for page in PAGES for name, *_ in commands(page)}
    assert sum(len(commands(page)) for page in PAGES) > 50 and names == SCRIPTS


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_of_the_docs_is_accepted(page):
    """Each command, read as its script reads it, without running it."""
    for name, *arguments in commands(page):
        module = importlib.import_module(name.removesuffix(".py"))
        if name == "train.py":
            module.read_arguments(arguments, None)
        else:
            utils.read_command_line(module.Arguments, arguments, None, ALIASES)


def test_every_flag_that_the_docs_mention_exists():
    known = OF_OTHER_PROGRAMS.union(*map(flags_of, SCRIPTS), ["help"])
    for page in PAGES:
        mentioned = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", page.read_text(encoding="utf-8")))
        unknown = [name for name in mentioned - known if name not in ("max_", "hello")]  # `--max_*`, `--prompt=--hello`
        assert not unknown, f"{page_name(page)} mentions flags that no script has: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_of_the_docs_leads_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), f"{page_name(page)} links to {path}, which is not there"
        assert not anchor or anchor in anchors(path), f"{page_name(page)} links to {path.name}#{anchor}, which is no heading there"


def test_the_readme_links_every_page_of_the_docs():
    linked = {path for path, _ in links(ROOT / "README.md")}
    assert not [page_name(page) for page in PAGES[1:] if page not in linked]


def test_docs_house_names_every_file():
    """The table of rooms in docs/house.md: nothing missing, nothing that is gone."""
    named = set(re.findall(r"`(\w+\.py)`", (ROOT / "docs" / "house.md").read_text(encoding="utf-8")))
    there = {path.name for path in SOURCES if path.name != "__init__.py"}
    assert (there - named, named - there) == (set(), set()), "(missing in docs/house.md, named there but gone)"
