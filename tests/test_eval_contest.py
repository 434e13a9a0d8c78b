"""The contest of all kinds of task: keys of stored units, seconds that are shared, what goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eval.benchmark.outcome import Store
from eval.benchmark.task_file import Size

if TYPE_CHECKING:
    from eval.benchmark.contest.contest import Contest

GOLDEN = Path(__file__).parent / "golden" / "benchmark_units.json"
# Hashes of files' bytes, or of measured numbers: other versions of h5py or numpy may change them.
FROM_FILES = ("cells", "context", "truth", "shifts")


def contest_of(kind: str, folder: Path) -> Contest:
    """Return a contest on the material of the kind's own tests."""
    from eval.benchmark.material.models_and_cells import Bench, Model

    def bench(models: list[Any]) -> Bench:
        return Bench(models, folder, Store(folder / "units", {}), 0, "cpu", False)

    if kind in ("cells", "annotation"):
        from eval.benchmark.kinds.annotation import Annotation
        from eval.benchmark.kinds.cell_tasks import ClassesOfCells
        from tests import test_eval_annotation, test_eval_cell_tasks

        test_eval_cell_tasks.make_cells(120, num_genes=60).write_h5ad(folder / "cells.h5ad")
        models = test_eval_cell_tasks.planted_models(folder / "cells.h5ad")
        if kind == "cells":
            return ClassesOfCells(
                test_eval_cell_tasks.TASK, test_eval_cell_tasks.SIZE, bench(models)
            )
        return Annotation(test_eval_annotation.TASK, test_eval_annotation.SIZE, bench(models))
    if kind == "genes":
        from eval.benchmark.kinds.gene_tasks import ClassesOfGenes
        from tests import test_eval_genes as made

        made.write_data(folder)
        vocabulary = made.make_vocabulary()
        models = [made.knowing_model(vocabulary), made.constant_model(vocabulary)]
        return ClassesOfGenes(made.make_task(), made.SIZE, bench(models))
    if kind == "integration":
        from eval.benchmark.kinds.integration import Integration
        from pretrain.model.masked_gene_model import build_model
        from tests import test_eval_integration as made

        made.make_cells(120, num_genes=80).write_h5ad(folder / "cells.h5ad")
        vocabulary = made.vocabulary_of(folder / "cells.h5ad")
        network = build_model(made.MODEL, vocabulary, 0).bert
        size = Size.model_validate({"seeds": 2, "epochs": 2, "learning_rate": 5e-3})
        return Integration(made.TASK, size, bench([Model("m", folder, network, vocabulary, "m")]))
    if kind in ("attention", "context"):
        from eval.benchmark.kinds.attention_task import AttentionToGenes
        from eval.benchmark.kinds.context import Context
        from tests import matched_worlds, test_eval_attention, test_eval_context

        vocabulary = matched_worlds.write_world(folder)
        name = "attending" if kind == "attention" else "sensitive"
        network = matched_worlds.passing_model(vocabulary)  # its weights are in no key
        models = matched_worlds.bench_of(
            folder, vocabulary, **{name: network, "zeros": network}
        ).models
        if kind == "attention":
            return AttentionToGenes(
                test_eval_attention.TASK, Size.model_validate({"seeds": 3}), bench(models)
            )
        return Context(test_eval_context.TASK, test_eval_context.SIZE, bench(models))
    if kind == "perturb_seq":
        from eval.benchmark.kinds.perturb_seq import MeasuredShifts
        from tests import test_eval_perturb_seq as made

        made.write_cells(folder)
        return MeasuredShifts(made.make_task(), made.SIZE, bench(made.make_models()))
    if kind == "perturbation":
        from eval.benchmark.kinds.perturbation import Perturbation
        from tests import test_eval_state_shift as made

        made.write_data(folder)
        return Perturbation(made.make_task(), made.SIZE, bench(made.make_models()))
    if kind == "targets":
        from eval.benchmark.kinds.targets import Targets
        from tests import test_eval_targets as made

        made.write_data(folder)
        return Targets(made.make_task(), made.SIZE, bench(made.make_models()))
    from eval.benchmark.kinds.cooperativity import Cooperativity
    from eval.benchmark.kinds.simulated_shifts import SimulatedShifts
    from tests import test_eval_simulated_shifts as made

    made.write_data(folder)
    models = [made.make_model(folder)]
    if kind == "cooperativity":
        return Cooperativity(made.cooperativity(), made.SIZE, bench(models))
    return SimulatedShifts(made.shifts(), made.SIZE, bench(models))


@pytest.mark.parametrize(
    "kind",
    [
        "cells", "annotation", "genes", "attention", "context", "perturb_seq", "perturbation",
        "targets", "cooperativity", "simulated_shifts",
        # Imports jax for its scores.
        pytest.param("integration", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_units_keep_their_names(kind, tmp_path):
    """A benchmark that was killed finds what is done: keys are those of the first release.

    The golden file was written by each kind's own loop, before there was one contest. Whoever
    changes a number on purpose changes what decides it, or the next run would mix both.
    """
    contest = contest_of(kind, tmp_path)
    fold = contest.folds(0)[0]
    found = {}
    for row in contest.rows:
        key = contest.key(row, fold)
        key |= {k: k for k in FROM_FILES if k in key}
        name = f"{row.name} | {row.role} | {row.model.name if row.model else None}"
        found[name] = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    assert found == json.loads(GOLDEN.read_text())[kind]


def test_a_unit_is_named_by_all_that_decides_it(tmp_path):
    from eval.benchmark.outcome import Outcome

    store = Store(tmp_path, {"task": "x"})
    outcome = Outcome("a", "baseline", None, 0, {"auroc": 0.5}, 1.0)
    assert store.outcome({"fold": 0}, lambda: outcome) == outcome
    expected = hashlib.sha256(b'{"fold": 0, "task": "x"}').hexdigest()[:24]
    assert [p.name for p in tmp_path.iterdir()] == [f"{expected}.json"]


def test_what_is_made_once_is_paid_by_all_who_use_it():
    """Four folds of two seeds; a value of a seed is used by two of them, one without by four."""
    from eval.benchmark.material.once import Once

    clock, made = [0.0], []
    once = Once(lambda: clock[0])

    def slowly(name: str, seconds: float):
        def make() -> str:
            made.append(name)
            clock[0] += seconds
            return name

        return make

    bills = []
    for fold in range(4):
        started, correction = clock[0], once.watch()
        once.get("all", None, slowly("all", 8.0))
        once.get("of seed", fold // 2, slowly(f"seed {fold // 2}", 6.0))
        bills.append(clock[0] - started + correction(2, 4))
    assert made == ["all", "seed 0", "seed 1"]
    assert bills == [8 / 4 + 6 / 2] * 4
    once.get("of seed", 0, slowly("seed 0", 6.0))
    assert made[-1] == "seed 0", "values of another seed are not kept"
