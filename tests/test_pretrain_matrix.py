"""The same numbers on any number of ranks, at any ZeRO stage, with any accumulation.

The whole table, as Markdown: ``python -m tests.test_pretrain_matrix``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.order import EpochPlan
from data_prep.shards.reader import ShardSet
from pretrain.config import RunConfig
from tests.ranks import run_ranks
from tests.runs import OFFLOAD, final_state, tiny_config
from tests.synthetic import make_shards

_RANKS = (1, 2, 3)
_STAGES = ("zero0", "zero1", "zero2", "zero3")
_ACCUMULATIONS = (1, 2, 3, 4)
# Of a full step: 24 cells divide by every number of ranks, and their shares into 1 to 4 parts.
_LENGTH, _STEP_CELLS = 64, 24
# Measured: 2e-7 and 3e-6, see docs/reliability.md.
_LOSS_LIMIT, _WEIGHT_LIMIT = 1e-6, 2e-5


@dataclass(frozen=True)
class Case:
    """One way to compute the same run; `accumulation`: micro-batches per rank in a full step."""

    ranks: int
    deepspeed: str
    accumulation: int

    def config(self, shards: Path, folder: Path) -> RunConfig:
        """Return ten steps of it: an epoch of seven, whose last turns are not full, and three."""
        rows = -(-_STEP_CELLS // self.ranks // self.accumulation)
        return tiny_config(
            shards,
            folder / f"{self.ranks}-{self.deepspeed}-{self.accumulation}",
            batch__tokens_per_step=_STEP_CELLS * _LENGTH,
            batch__tokens_per_micro_batch=rows * _LENGTH,
            run__deepspeed=self.deepspeed,
            checkpoint__every_steps=100,
        )


@dataclass(frozen=True)
class Result:
    """What came out: losses [steps], all weights in one array, cells served."""

    losses: np.ndarray
    weights: np.ndarray
    cells: tuple[int, int]


_REFERENCE = Case(1, "zero0", 1)
# Every number of ranks with every stage and with every accumulation.
_DIAGONAL = [
    [Case(ranks, stage, (ranks + i) % 4 + 1) for i, stage in enumerate(_STAGES)] for ranks in _RANKS
]
_WHOLE = [
    [Case(ranks, stage, accumulation) for accumulation in _ACCUMULATIONS]
    for ranks, stage in product(_RANKS, _STAGES + OFFLOAD)
]


def _train_all(configs: Sequence[RunConfig]) -> list[Result]:
    """Train one run after the other on these ranks: starting costs more than training."""
    from pretrain.ranks import dist
    from pretrain.train import train

    results = []
    for config in configs:
        summary = train(config)
        weights = final_state(config.run.out)["weight"]
        results.append(
            Result(
                np.array(summary.losses),
                np.concatenate([weights[name] for name in sorted(weights)]),
                (summary.cells_seen, summary.cells_digest),
            )
        )
    dist.leave()
    return results


def _results(cases: Sequence[Case], shards: Path, folder: Path) -> list[Result]:
    configs = [case.config(shards, folder) for case in cases]
    for case, config in zip(cases, configs, strict=True):
        _require_accumulation(case, config)
    of_ranks = run_ranks(cases[0].ranks, _train_all, configs)
    for others in of_ranks[1:]:
        for mine, first in zip(others, of_ranks[0], strict=True):
            np.testing.assert_array_equal(mine.losses, first.losses)
    return of_ranks[0]


def _require_accumulation(case: Case, config: RunConfig) -> None:
    """Assert that ranks have so many micro-batches in full steps, which are most."""
    from pretrain.batches.step_dataset import micro_batch_slots

    plan = EpochPlan(
        ShardSet(config.data.shards), "train", config.run.seed, config.batch.tokens_per_step
    )
    budget = config.batch.tokens_per_micro_batch
    sizes = [plan.step(step).num_cells for step in range(10)]
    assert sizes.count(_STEP_CELLS) >= 6
    for rank in range(case.ranks):
        slots = micro_batch_slots(_STEP_CELLS, _LENGTH, rank, case.ranks, budget)
        assert len(slots) == case.accumulation
        assert all(stop > start for start, stop in slots)


@pytest.fixture(scope="module")
def one_length(tmp_path_factory) -> Path:
    """Shards with hardly any short cells: 126 of one length and 9 of another."""
    return _one_length(tmp_path_factory.mktemp("one_length"))


def _one_length(folder: Path) -> Path:
    return make_shards(folder, num_cells=150, num_genes=_LENGTH, detected=5)


@pytest.fixture(scope="module")
def reference(one_length, tmp_path_factory) -> Result:
    return _results([_REFERENCE], one_length, tmp_path_factory.mktemp("reference"))[0]


@pytest.mark.parametrize(
    "cases",
    [
        # On most ranks the stage that divides most.
        pytest.param(cases[1::2] if cases[0].ranks < 3 else cases[-1:], id=f"{cases[0].ranks}-part")
        for cases in _DIAGONAL
    ]
    + [
        pytest.param(cases, id=f"{cases[0].ranks}-diagonal", marks=pytest.mark.long)
        for cases in _DIAGONAL
    ]
    + [
        pytest.param(cases, id=f"{cases[0].ranks}-{cases[0].deepspeed}", marks=pytest.mark.slow)
        for cases in _WHOLE
    ],
)
def test_ranks_stages_and_accumulation_change_nothing(cases, reference, one_length, tmp_path):
    for case, result in zip(cases, _results(cases, one_length, tmp_path), strict=True):
        assert result.cells == reference.cells, case
        loss, weight = _differences(result, reference)
        assert loss <= _LOSS_LIMIT, (case, loss)
        assert weight <= _WEIGHT_LIMIT, (case, weight)


def _differences(result: Result, reference: Result) -> tuple[float, float]:
    """Return the largest relative difference of a loss, and the largest of a weight."""
    assert len(result.losses) == len(reference.losses)
    loss = np.abs(result.losses - reference.losses) / reference.losses
    return float(loss.max()), float(np.abs(result.weights - reference.weights).max())


def _print_table() -> None:
    header = [
        "ranks",
        "DeepSpeed",
        "1 micro-batch",
        *(f"{a} micro-batches" for a in _ACCUMULATIONS[1:]),
    ]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = _one_length(folder)
        reference = _results([_REFERENCE], shards, folder / "reference")[0]
        for cases in _WHOLE:
            shown = []
            for result in _results(cases, shards, folder):
                loss, weight = _differences(result, reference)
                shown.append(f"{loss:.0e}, {weight:.0e}" if weight else "the same bits")
            print(f"| {cases[0].ranks} | {cases[0].deepspeed} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    _print_table()
