"""The house: budgets of size, which file may import which, and importing one does nothing but define things."""

import ast
import dataclasses
import re
import subprocess
import sys
import tokenize
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

import config

CORE = "config data tools chat reward grpo backbone policy engines rollout checkpoint eval train".split()
COMMANDS = ("eval", "train")  # the core's files that may use the folders; no folder imports them
FOLDERS = ("search", "toy", "analysis")  # a folder imports the core and the folders before it
PATHS = [ROOT / f"{name}.py" for name in CORE] + sorted(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PATHS}


# Lines, so that the house stays one that a reader gets through; lower them when it has shrunk.
FILE, CORE_FILES, ALL_FILES, FUNCTION, README, OPTIONS = 600, 5495, 10436, 60, 160, 90
CORE_CODE, ALL_CODE = 4000, 7500  # without blank lines, comments and docstrings


def lines(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def lines_of_code(path) -> int:
    """Those that have a token of the program."""
    text, found = path.read_text(encoding="utf-8"), set()
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.string.strip() and token.type not in (tokenize.COMMENT, tokenize.ENCODING):
                found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


def test_files_keep_their_budgets():
    sizes, code = ({name: count(path) for name, path in FILES.items()} for count in (lines, lines_of_code))
    assert not {name: size for name, size in sizes.items() if size > FILE}
    assert sum(sizes[name] for name in CORE) <= CORE_FILES and sum(sizes.values()) <= ALL_FILES
    assert sum(code[name] for name in CORE) <= CORE_CODE and sum(code.values()) <= ALL_CODE
    assert lines(ROOT / "README.md") <= README and len(dataclasses.fields(config.Config)) <= OPTIONS


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen(name):
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < FUNCTION, node.name


def test_the_readme_lists_the_files_in_the_order_of_their_imports():
    table = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert table == [*CORE, *FOLDERS]


def imports(name: str, everywhere: bool = True) -> set[str]:
    """The files of the house that a file imports; everywhere: inside of functions, too."""
    tree = ast.parse(FILES[name].read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & FILES.keys() - {name}


def allowed(name: str, other: str) -> bool:
    place, other_place = name.split(".")[0], other.split(".")[0]
    if place in CORE and other_place in CORE:
        return CORE.index(other_place) < CORE.index(place)
    if place in CORE:
        return place in COMMANDS
    if other_place in CORE:
        return other_place not in COMMANDS
    return FOLDERS.index(other_place) <= FOLDERS.index(place)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_it_may(name):
    assert not [other for other in imports(name) if not allowed(name, other)]


def test_the_core_starts_analysis_only_from_a_command():
    assert not [name for name in CORE for other in imports(name, everywhere=False) if other.startswith("analysis")]


def test_there_are_no_circles():
    list(TopologicalSorter({name: imports(name) for name in FILES}).static_order())


def test_the_house_is_complete():
    assert {p.stem for p in ROOT.glob("*.py")} == set(CORE)


def test_nothing_runs_on_import(tmp_path):
    """Importing all of it prints nothing, writes nothing, and starts neither threads nor a process group."""
    script = (
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
        f"import {', '.join(FILES)}\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized() and threading.active_count() == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
