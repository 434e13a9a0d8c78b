"""The shape of the house: import arrows, torch-free parts, sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import section

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data_prep", "pretrain", "launch", "eval")
# Which folders, or modules of folders, each folder may import.
ALLOWED = {
    "data_prep": {"data_prep"},
    "pretrain": {
        "pretrain",
        "data_prep.vocab",
        "data_prep.shards",
        "data_prep.order",
        "data_prep.hashing",
        "data_prep.errors",
        "data_prep.files",
        "data_prep.launchers",
        "data_prep.network",
        "data_prep.owner",
        "data_prep.redact",
        "data_prep.version",
    },
    "launch": {
        "launch",
        "pretrain.config",
        "pretrain.ds_config",
        "data_prep.errors",
        "data_prep.files",
        "data_prep.launchers",
        "data_prep.network",
        "data_prep.owner",
        "data_prep.redact",
        "data_prep.stages",
        "data_prep.version",
    },
    "eval": {"eval", "pretrain", "data_prep"},
}
NEVER_TORCH = [
    "data_prep",
    "launch",
    "pretrain/config.py",
    "pretrain/architecture.py",
    "pretrain/ds_config.py",
]


def modules(folder: str) -> list[Path]:
    path = ROOT / folder
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_arrows(folder):
    ours = (*FOLDERS, "tests", "benchmarks")
    for path in modules(folder):
        for name in imports(path):
            if name.split(".")[0] in ours:
                assert any(name == a or name.startswith(a + ".") for a in ALLOWED[folder]), (
                    f"{path.relative_to(ROOT)} must not import {name}"
                )


@pytest.mark.parametrize("folder", NEVER_TORCH)
def test_no_torch(folder):
    for path in modules(folder):
        heavy = {n for n in imports(path) if n.split(".")[0] in ("torch", "deepspeed")}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_init_files_are_empty():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            assert path.read_text() == "", path


# The files that someone reads to understand a run, in this order; docs/architecture.md names them.
READING_PATH = (
    "pretrain/config.py", "pretrain/train.py", "pretrain/engine.py", "pretrain/data.py",
    "pretrain/masking.py", "pretrain/model.py", "pretrain/optim.py", "data_prep/order.py",
    "data_prep/shards.py", "data_prep/rank.py",
)  # fmt: skip


def test_the_reading_path_fits_in_an_afternoon():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in READING_PATH}
    assert sum(lines.values()) < 3_000, lines
    assert lines["pretrain/train.py"] <= 300
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = section(page, "the-reading-path")
    places = [named.index(f"`{name}`") for name in READING_PATH]
    assert places == sorted(places), "docs/architecture.md names them in another order"


def test_no_file_is_long():
    for path in [p for f in FOLDERS for p in modules(f)]:
        assert len(path.read_text().splitlines()) <= 500, path


def test_functions_are_short():
    for path in [p for f in FOLDERS for p in modules(f)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                # Without signature and docstring: the options of a command are a long list.
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def test_help_needs_no_heavy_import():
    code = (
        "import sys; sys.argv = ['geneloom', '--help']\n"
        "import launch.cli\n"
        "app = launch.cli.build_app(None)\n"
        "assert not {'torch', 'anndata', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
