"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

# Before numpy and torch start their threads: the tests' own ranks share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Numba, once started, gives its number of threads to torch too.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import pytest  # noqa: E402

from tests.synthetic import make_shards  # noqa: E402

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real cells; tests skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real data not found at {DATA}")
    return DATA


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 120 fake cells, several buckets and blocks."""
    return make_shards(tmp_path_factory.mktemp("shards"))
