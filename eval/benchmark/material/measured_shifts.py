"""What perturbations did to expression, as measured: one row of genes for each perturbation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse
from sklearn.model_selection import KFold

from eval.benchmark.material.gene_pairs import GenePairs, read_edges
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, at_most
from eval.benchmark.scoring.shift_scores import pearson
from eval.benchmark.task_file import PerturbSeqTask, Size

_PER = 1e4


@dataclass(frozen=True)
class Shifts:
    """Measured shifts of expression.

    Attributes
    ----------
    names
        Perturbations, as the data call them.
    perturbed
        Gene ids of each perturbation, one or several.
    genes
        Gene ids of the columns of `values`, each once.
    values
        float64 [perturbations, genes]: log-fold change, or 1 and 0 for memberships.
    agreement
        Mean over perturbations of Pearson's correlation between shifts of two replicates: what
        no prediction is likely to exceed. None without replicates.
    excluded
        Reason -> count of perturbations or genes that were left out.
    """

    names: list[str]
    perturbed: list[tuple[str, ...]]
    genes: list[str]
    values: np.ndarray
    agreement: float | None
    excluded: dict[str, int]

    @cached_property
    def digest(self) -> str:
        """Hash of everything that scores depend on."""
        names = repr((self.names, self.perturbed, self.genes)).encode()
        return hashlib.sha256(names + self.values.tobytes()).hexdigest()

    @cached_property
    def are_memberships(self) -> bool:
        """Whether values only say which genes moved."""
        return set(np.unique(self.values)) <= {0.0, 1.0}

    @cached_property
    def _place(self) -> dict[str, int]:
        return {g: i for i, g in enumerate(self.genes)}

    def scored_genes(self, perturbation: int) -> np.ndarray:
        """Return bool [genes]: all but the perturbed ones, whose own shift is the intervention."""
        scored = np.ones(len(self.genes), dtype=bool)
        scored[[self._place[g] for g in self.perturbed[perturbation] if g in self._place]] = False
        return scored

    def sums(self, of_genes: Callable[[list[str]], np.ndarray], chosen: np.ndarray) -> np.ndarray:
        """Return float64 [chosen perturbations, features]: sums over the genes that each perturbs.

        `of_genes`: gene ids -> float [genes, features]; it is asked about all of them at once.
        """
        genes = sorted({g for i in chosen for g in self.perturbed[i]})
        place = {g: row for row, g in enumerate(genes)}
        found = of_genes(genes)
        return np.stack([found[[place[g] for g in self.perturbed[i]]].sum(axis=0) for i in chosen])

    def restrict(self, genes: np.ndarray, perturbations: np.ndarray, why: dict) -> Shifts:
        """Return chosen genes and perturbations (bool), with reasons added to `excluded`."""
        chosen = np.flatnonzero(perturbations)
        return Shifts(
            [self.names[i] for i in chosen],
            [self.perturbed[i] for i in chosen],
            [g for g, keep in zip(self.genes, genes, strict=True) if keep],
            self.values[perturbations][:, genes],
            self.agreement,
            self.excluded | {k: v for k, v in why.items() if v},
        )


def pseudobulk(counts: scipy.sparse.csr_matrix) -> np.ndarray:
    """Return float64 [genes]: log1p of summed counts per 10,000."""
    total = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    return np.log1p(total / max(total.sum(), 1.0) * _PER)


def measure_shifts(cells: TaskCells, task: PerturbSeqTask) -> Shifts:
    """Return the log-fold change of each perturbation against controls, mean over replicates.

    Counts of a replicate's cells are summed before the logarithm (pseudobulk), so that a cell more
    or less deep does not count more or less than its molecules. Columns without a gene id, and
    genes that too few cells have, are left out: their shifts are noise.

    Raises
    ------
    ValueError
        No control cells, or fewer perturbations measured than folds.
    """
    label = cells.metadata[task.perturbation].to_numpy(dtype=str)
    replicate = np.full(len(label), "all")
    if task.replicate:
        replicate = cells.metadata[task.replicate].to_numpy(dtype=str)
    is_control = label == task.control
    if not is_control.any():
        raise ValueError(
            f"{task.name}: no cell has '{task.control}' in '{task.perturbation}' (it holds "
            f"{', '.join(sorted(set(label))[:8])}); correct `control`"
        )
    has_id = np.array([bool(g) for g in cells.genes])
    detection = np.asarray((cells.counts > 0).mean(axis=0)).ravel()
    measured = has_id & (detection > 0) & (detection >= task.min_detection)
    control = {
        r: pseudobulk(cells.counts[is_control & (replicate == r)])
        for r in np.unique(replicate)
        if (is_control & (replicate == r)).sum() >= task.min_cells
    }
    names, values, agreements, few = [], [], [], 0
    for name in sorted(set(label[~is_control])):
        found = []
        for r, base in control.items():
            chosen = (label == name) & (replicate == r)
            if chosen.sum() >= task.min_cells:
                found.append((pseudobulk(cells.counts[chosen]) - base)[measured])
        if not found:
            few += 1
            continue
        names.append(name)
        values.append(np.mean(found, axis=0))
        pairs = [pearson(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
        agreements += [np.mean(pairs)] if pairs else []
    excluded = {"perturbations: too few cells in every replicate": few} if few else {}
    excluded["genes: without an id, or in too few cells"] = int((~measured).sum())
    if len(names) < task.folds:
        raise ValueError(
            f"{task.name}: {len(names)} perturbations with {task.min_cells} cells or more in a "
            f"replicate, fewer than {task.folds} folds"
        )
    return Shifts(
        names,
        [tuple(task.gene_ids.get(str(g), str(g)) for g in n.split("+")) for n in names],
        [g for g, keep in zip(cells.genes, measured, strict=True) if keep],
        np.stack(values),
        float(np.mean(agreements)) if agreements else None,
        {k: v for k, v in excluded.items() if v},
    )


def memberships(pairs: GenePairs) -> Shifts:
    """Return signatures as shifts: 1 for a gene that a perturbation moves, 0 for all others."""
    names, row = np.unique(pairs.source, return_inverse=True)
    values = np.zeros((len(names), len(pairs.looked_at)))
    values[row, np.searchsorted(pairs.looked_at, pairs.target)] = 1.0
    genes = pairs.looked_at.tolist()
    return Shifts(names.tolist(), [(n,) for n in names.tolist()], genes, values, None, {})


def perturbation_folds(
    shifts: Shifts, split: str, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (training, test) perturbations of each fold, int positions, sorted.

    ``genes``: genes are divided; a perturbation is tested where one of its genes is held out, and
    trained on where none is. ``combinations``: perturbations of several genes are divided, single
    ones are always trained on.

    Raises
    ------
    ValueError
        Fewer genes or combinations than folds.
    """
    divider = KFold(folds, shuffle=True, random_state=seed)
    if split == "combinations":
        several = np.array([i for i, p in enumerate(shifts.perturbed) if len(p) > 1])
        if len(several) < folds:
            raise ValueError(f"{len(several)} combinations of genes, fewer than {folds} folds")
        parts = [np.sort(several[test]) for _, test in divider.split(several)]
        everything = np.arange(len(shifts.names))
        return [(np.setdiff1d(everything, test), test) for test in parts]
    genes = sorted({g for p in shifts.perturbed for g in p})
    if len(genes) < folds:
        raise ValueError(f"{len(genes)} perturbed genes, fewer than {folds} folds")
    found = []
    for _, held in divider.split(genes):
        unseen = {genes[i] for i in held}
        tested = np.array([bool(unseen & set(p)) for p in shifts.perturbed])
        found.append((np.flatnonzero(~tested), np.flatnonzero(tested)))
    return found


def load_shifts(task: PerturbSeqTask, size: Size, bench: Bench) -> tuple[Shifts, TaskCells]:
    """Return measured shifts and context cells, at most `size.max_cells` of them.

    Raises
    ------
    ValueError
        As `load_cells`, `read_edges` and `measure_shifts`; too few perturbed genes are known.
    """
    if task.signatures:
        context = bench.cells(task.cells, (), size.max_cells)
        shifts = memberships(read_edges(task.signatures, bench.data))
    else:
        measured = bench.cells(task.cells, (task.perturbation, task.replicate))
        shifts = measure_shifts(measured, task)
        if task.context:
            context = bench.cells(task.context, (), size.max_cells)
        else:
            is_control = (measured.metadata[task.perturbation] == task.control).to_numpy()
            controls = np.flatnonzero(is_control)
            context = measured.subset(at_most(controls, size.max_cells, bench.seed))
    return _with_known_genes(shifts, context, task, bench.models), context


def _with_known_genes(
    shifts: Shifts, context: TaskCells, task: PerturbSeqTask, models: list[Model]
) -> Shifts:
    """Return shifts of perturbations that all vocabularies know.

    Of signatures, only genes that the context detects: what is not expressed at all is too easily
    told from what moves.
    """
    known = np.array(
        [
            all((m.reading_vocabulary.tokens_of(list(p)) >= 0).all() for m in models)
            for p in shifts.perturbed
        ]
    )
    genes = np.ones(len(shifts.genes), dtype=bool)
    if task.signatures:
        vocabulary = models[0].reading_vocabulary
        detected = np.asarray(context.counts.sum(axis=0)).ravel() > 0
        read = np.array([g for g, d in zip(context.genes, detected, strict=True) if d])
        genes &= np.isin(shifts.genes, read) & (vocabulary.tokens_of(shifts.genes) >= 0)
        # A signature of no gene, or of all, ranks nothing.
        moved = shifts.values[:, genes].sum(axis=1)
        known &= (moved > 0) & (moved < genes.sum())
    why = {
        "perturbations: of genes outside of a vocabulary, or without a gene": int((~known).sum()),
        "genes: not detected in the cells that are looked at": int((~genes).sum()),
    }
    if known.sum() < task.folds or not genes.any():
        raise ValueError(
            f"{task.name}: {int(known.sum())} perturbations of genes that the vocabulary knows, "
            f"fewer than {task.folds} folds; check `gene_ids`, or give --gene-names"
        )
    return shifts.restrict(genes, known, why)
