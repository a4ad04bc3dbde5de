"""The house: a file imports only files above it, and importing one does nothing but define things."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

HOUSE = [
    "config",
    "data",
    "reward",
    "web",
    "searchdb",
    "tools",
    "grpo",
    "policy",
    "rollout",
    "toy",
    "plan",
    "results",
    "judge",
    "eval",
    "train",
    "report",
]


@pytest.mark.parametrize("name", HOUSE)
def test_a_file_imports_only_files_above_it(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported & set(HOUSE) <= set(HOUSE[: HOUSE.index(name)])


def test_the_house_is_complete():
    assert {p.stem for p in ROOT.glob("*.py")} == set(HOUSE)


def test_nothing_runs_on_import(tmp_path):
    """Importing all of it prints nothing, writes nothing, and starts neither threads nor a process group."""
    script = (
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
        f"import {', '.join(HOUSE)}\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized() and threading.active_count() == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
