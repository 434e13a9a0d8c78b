"""The wheel: whole, runs outside the checkout, and each folder needs only what it declares."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data_prep.version import VERSION
from tests.synthetic import write_cells

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_prep", "pretrain", "launch", "eval", "deepspeed_configs")
LEFT_OUT = {"launch/demo.sh", "deepspeed_configs/README.md"}
# Of the extra `eval`, as they are imported.
EVAL_ONLY = ("anndata", "optuna", "peft", "scanpy", "scib_metrics", "sklearn", "umap")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what a wheel of this checkout unpacks to."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", folder, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert f"-{VERSION}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def geneloom(
    installed: Path, lines: list[tuple[str, ...]], cwd: Path
) -> subprocess.CompletedProcess:
    """Run commands of the unpacked wheel in another folder, in one process until one fails."""
    code = f"""
import data_prep, sys; from pathlib import Path
assert Path(data_prep.__file__).is_relative_to({str(installed)!r}), data_prep.__file__
from launch.cli import main
for line in {lines!r}:
    sys.argv = ["geneloom", *line]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{{line}}: {{end.code}}")
"""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
        # Kernels would be compiled anew for another folder, which takes half a minute.
        env=os.environ | {"PYTHONPATH": str(installed), "NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip


def test_every_file_of_the_packages_is_in_it(installed):
    for name in PACKAGES:
        for path in (ROOT / name).rglob("*"):
            inside = str(path.relative_to(ROOT))
            if path.is_dir() or "__pycache__" in inside or inside in LEFT_OUT:
                continue
            assert (installed / inside).exists(), f"{inside} is not in the wheel: see setup.py"
    assert not (installed / "tests").exists()


@pytest.mark.long
def test_it_works_outside_the_checkout(installed, tmp_path):
    write_cells(tmp_path / "cells.h5ad", num_cells=60)
    lines = [
        ("--help",),
        ("prepare", "cells.h5ad", "--vocab", "build", "--heldout", "0.1", "--out", "shards"),
        ("report", "shards"),
        ("pretrain", "--config", "tiny", "--dry-run", "data.shards=shards", "run.out=r",
         "optim.warmup_steps=1", "run.deepspeed=zero2"),
        ("benchmark", "--list"),
    ]  # fmt: skip
    done = geneloom(installed, lines, tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "quick" in done.stdout, "what the last of them prints"
    assert (tmp_path / "shards" / "report.html").exists()


def test_what_is_declared_is_what_is_imported():
    """Of every package that a folder imports at its top: setup.py names it, in the right list."""
    names = importlib.metadata.packages_distributions()
    setup = (ROOT / "setup.py").read_text()
    required = _declared(setup.partition("install_requires=")[2].partition("],")[0])
    for_eval = required | _declared(setup.partition("EVAL = ")[2].partition("]")[0])
    # They come with what is declared: jinja2, numba, scikit-learn.
    brought = {"markupsafe", "llvmlite", "threadpoolctl"}
    ours = {*PACKAGES, "tests", "benchmarks"}
    for folder in ("data_prep", "pretrain", "launch", "eval"):
        allowed = (for_eval if folder == "eval" else required) | brought
        for path in (ROOT / folder).rglob("*.py"):
            for name in _imported_at_the_top(path) - ours - set(sys.stdlib_module_names):
                found = {d.lower().replace("_", "-") for d in names[name]}
                assert found & allowed, f"{path.relative_to(ROOT)} imports {name}: see setup.py"


def _declared(text: str) -> set[str]:
    entries = (line.strip().strip('",') for line in text.splitlines())
    return {e.split("=")[0].split(">")[0].lower() for e in entries if e and e[0].isalpha()}


def _imported_at_the_top(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


# As if these packages were not installed.
_BLOCK = "import importlib, pkgutil, sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"


@pytest.mark.parametrize(
    ("folder", "absent"),
    [
        ("data_prep", (*EVAL_ONLY, "torch", "transformers", "deepspeed")),
        pytest.param("pretrain", (*EVAL_ONLY, "deepspeed"), marks=pytest.mark.long),
        ("launch", (*EVAL_ONLY, "torch", "transformers", "deepspeed", "numpy", "anndata")),
    ],
)
def test_a_folder_is_imported_without_what_it_does_not_need(folder, absent):
    code = _BLOCK.format(absent=absent) + (
        f"import {folder}\n"
        f"for found in pkgutil.walk_packages({folder}.__path__, '{folder}.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_that_lacks_a_package_says_what_to_install(tmp_path):
    code = _BLOCK.format(absent=("anndata", "scanpy")) + (
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['geneloom', 'embed', 'c.h5ad', '--model', "
        "'m', '--out', 'o.h5ad']\nfrom launch.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("pip install 'geneloom[eval]'")
    assert "Traceback" not in done.stderr
