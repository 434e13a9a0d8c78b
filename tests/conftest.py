"""Shared fixtures."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before numpy and torch start their threads: the tests' own ranks share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Numba, once started, gives its number of threads to torch too.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import pytest  # noqa: E402

from tests.built_once import BuiltOnce  # noqa: E402
from tests.ranks import close_pool, run_ranks  # noqa: E402
from tests.runs import run_training, tiny_config  # noqa: E402
from tests.synthetic import make_shards  # noqa: E402

# First, so that no process works alone on one of them while the others have nothing left.
_LONGEST = (
    "test_docs", "test_launch_hosts", "test_notebooks", "test_pretrain_faults", "test_readme",
    "test_launch_slurm", "test_pretrain_kill", "test_launch_supervise", "test_pretrain_compile",
    "test_launch_doctor", "test_pretrain_matrix", "test_pretrain_resume",
)  # fmt: skip
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
DATA = SHARED / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first."""
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real cells; tests skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real data not found at {DATA}")
    return DATA


@pytest.fixture(scope="session", autouse=True)
def _pool_of_ranks() -> Iterator[None]:
    """End the rank processes after the last test; it fails if they are not clean."""
    yield
    close_pool()


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function: name of a case of small real files -> its folder, made when asked for."""
    script = SHARED / "cases" / "make.py"
    if not script.exists() or not DATA.is_dir():
        pytest.skip(f"the small real files are made by {script} out of {DATA}, which are not here")
    spec = importlib.util.spec_from_file_location("make_cases", script)
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)

    @functools.cache
    def folder(name: str) -> Path:
        made = tmp_path_factory.mktemp(name)
        try:
            getattr(make, name)(made)
        except ImportError as error:
            pytest.skip(f"{name}: {error}")
        return made

    return folder


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltOnce]:
    """Folders that all test workers read and nobody writes to."""
    once = BuiltOnce(tmp_path_factory)
    yield once
    once.require_untouched()


@pytest.fixture(scope="session")
def shards(built_once: BuiltOnce) -> Path:
    """Shards of 120 fake cells, several buckets and blocks."""
    folder = built_once.folder("cells", make_shards) / "shards"

    # Otherwise the ranks of the first tests would all compile the same kernels: 25 s each where
    # the folder of compiled code is still empty.
    def compile_kernels(logs: Path) -> None:
        dropout = {"model__attention_dropout": 0.02, "run__max_steps": 4}
        run_ranks(1, run_training, tiny_config(folder, logs / "run", **dropout))

    built_once.folder("compiled", compile_kernels)
    return folder


@pytest.fixture(scope="session")
def trained(built_once: BuiltOnce, shards: Path) -> Path:
    """A run of `tiny_config` on one rank: ten steps, checkpoints of steps 5 and 10."""

    def train(folder: Path) -> None:
        run_ranks(1, run_training, tiny_config(shards, folder / "run"))

    return built_once.folder("trained", train) / "run"
