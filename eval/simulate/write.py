"""Write a simulated tissue as a folder of files, which is either complete or absent.

`simulate` writes the network, the cells, the perturbed cells and the record. The same settings give
the same bytes.
"""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse
from anndata.io import sparse_dataset, write_elem

from data_prep.files import complete_folder, file_sha256, require_new
from data_prep.genes.vocabulary import open_vocabulary
from eval.simulate.cells import BLOCK_CELLS, SimulatedBlock, Simulation, stream
from eval.simulate.changes import (
    Perturbation,
    choose_origins,
    draw_changed,
    log_change,
    mean_effects,
    reached_genes,
    read_perturbations,
    subset,
    true_shifts,
)
from eval.simulate.compare import measure_cells, write_plot
from eval.simulate.settings import SimulationSettings

logger = logging.getLogger(__name__)

FORMAT, RECORD = "geneloom-simulation/1", "simulation.json"
_HDF5 = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "chunks": (1 << 16,)}


def simulate(
    settings: SimulationSettings,
    out: Path,
    perturb: str = "all",
    gene_ids: Path | None = None,
    compare: Path | None = None,
) -> dict:
    """Write a folder of simulated cells with their truth, and return its record.

    The memory is that of a block of 512 cells x genes and of the perturbed cells, whatever the
    number of cells.

    Parameters
    ----------
    perturb
        As in `read_perturbations`.
    gene_ids
        Text file with one id per line, or a vocabulary for `open_vocabulary`; by default the ids
        are SIMG00001 and so on.
    compare
        Real cells whose moments are measured for comparison with the simulated ones.

    Raises
    ------
    ValueError
        `out` is not an empty folder, a gene cannot be perturbed, there are too few gene ids, or the
        real cells have no raw counts.
    """
    require_new(out)
    ids = choose_ids(settings, gene_ids)
    simulation = Simulation(settings)
    perturbations = read_perturbations(perturb, ids, simulation.network.tfs)
    real = measure_cells(compare, settings.genes) if compare else None
    with complete_folder(out, RECORD) as folder:
        write_network(folder, simulation, ids)
        origins = write_cells(folder, simulation, ids)
        if perturbations:
            write_perturbed(folder, simulation, ids, origins, perturbations)
        record = {
            "format": FORMAT,
            "settings": settings.model_dump() | {"depth": simulation.depth},
            "perturbations": [[p.kind, p.name] for p in perturbations],
            "regulations": int(simulation.network.weights.nnz),
            "versions": {p: _version(p) for p in ("geneloom", "numpy", "anndata")},
        }
        moments = {"simulated": measure_cells(folder / "cells.h5ad", settings.genes)}
        if real:
            moments["real"] = real
            write_plot(folder / "comparison.png", moments)
        record["moments"] = {name: m.summary() for name, m in moments.items()}
        record["files"] = {p.name: file_sha256(p) for p in sorted(folder.iterdir())}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def choose_ids(settings: SimulationSettings, source: Path | None) -> list[str]:
    """Return the ids of the genes: new ones, or a random choice from a file in its order."""
    if source is None:
        return [f"SIMG{i:05d}" for i in range(1, settings.genes + 1)]
    if source.suffix == ".txt":
        try:
            text = source.read_text()
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: not readable as text ({error})") from error
        known = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        known = list(open_vocabulary(source).genes)
    if len(set(known)) < len(known):
        raise ValueError(f"{source}: a gene id stands twice; give each once")
    if len(known) < settings.genes:
        raise ValueError(
            f"{source}: {len(known)} gene ids for {settings.genes} genes; give more, or --genes "
            f"{len(known)}"
        )
    rng = stream(settings.seed, "ids")
    return [known[i] for i in np.sort(rng.choice(len(known), settings.genes, replace=False))]


def type_names(settings: SimulationSettings) -> np.ndarray:
    return np.array([f"type{k}" for k in range(settings.types)])


def write_network(folder: Path, simulation: Simulation, ids: list[str]) -> None:
    """Write network.parquet (all paths of regulation) and programs.parquet (TFs by type)."""
    network, genes = simulation.network, np.array(ids)
    tf, gene = np.nonzero(network.distances)
    weight = network.weights.toarray()[tf, gene]
    total = network.total_weights[tf, gene]
    is_direct = network.distances[tf, gene] == 1
    table = {
        "tf": genes[network.tfs[tf]],
        "target": genes[gene],
        "direct": is_direct,
        "steps": network.distances[tf, gene],
        "weight": weight,
        "total_weight": total,
        "sign": np.sign(np.where(is_direct, weight, total)).astype(np.int8),
    }
    pq.write_table(pa.table(table), folder / "network.parquet")
    names = type_names(simulation.settings)
    kind, place = np.indices(simulation.programs.shape).reshape(2, -1)
    programs = {
        "cell_type": names[kind],
        "parent": names[simulation.parents[kind]],
        "tf": genes[network.tfs[place]],
        "drive": simulation.programs[kind, place],
        "activity": network.activities(simulation.programs)[kind, place],
    }
    pq.write_table(pa.table(programs), folder / "programs.parquet")


def write_cells(folder: Path, simulation: Simulation, ids: list[str]) -> SimulatedBlock:
    """Write cells.h5ad block by block, and return the cells that are to be perturbed."""
    origins = choose_origins(simulation)
    kept, totals = [], []
    with GrowingFile(folder / "cells.h5ad", simulation.settings.genes) as file:
        for number in range(simulation.num_blocks):
            block = simulation.block(number)
            file.add(block.counts)
            totals.append(block.counts.sum(axis=1))
            kept.append(subset([block], origins))
            logger.debug("block %d of %d", number + 1, simulation.num_blocks)
        table = cell_table(simulation, np.arange(simulation.settings.cells))
        table["n_counts"] = np.concatenate(totals)
        file.finish(table, gene_table(simulation, ids))
    return subset(kept, origins)


def write_perturbed(
    folder: Path,
    simulation: Simulation,
    ids: list[str],
    origins: SimulatedBlock,
    perturbations: list[Perturbation],
) -> None:
    """Write perturbed.h5ad, controls.h5ad (the original cells), effects and shifts."""
    names, genes = type_names(simulation.settings), gene_table(simulation, ids)
    table = cell_table(simulation, origins.cells)
    with GrowingFile(folder / "controls.h5ad", len(ids), "expected") as file:
        file.add(origins.counts, origins.expected)
        control = {"perturbation": "none", "kind": "control", "origin": table.index}
        file.finish(table.assign(**control, n_counts=origins.counts.sum(axis=1)), genes)
    kinds = simulation.cells["type"].to_numpy()[origins.cells]
    tables = []
    with (
        GrowingFile(folder / "perturbed.h5ad", len(ids), "expected_change") as file,
        GrowingTable(folder / "effects.parquet") as effects,
        GrowingTable(folder / "shifts.parquet") as shifts,
    ):
        for one in perturbations:
            change = log_change(simulation, origins, one)
            counts = draw_changed(simulation, origins, one, change)
            file.add(counts, origins.expected * np.expm1(change))
            label = {"perturbation": one.name, "kind": one.kind}
            rows = table.assign(**label, origin=table.index, n_counts=counts.sum(axis=1))
            rows.index = pd.Index([f"{i}:{one.kind}:{one.name}" for i in table.index])
            tables.append(rows)
            effects.add(_effects(label, simulation, origins, kinds, one, change, ids))
            move, toward = true_shifts(simulation, origins, one, change)
            moved = {"origin": table.index, "cell_type": names[kinds], "shift": move}
            moved |= {f"toward_{n}": toward[:, k] for k, n in enumerate(names)}
            shifts.add(pd.DataFrame(label | moved))
        rows = pd.concat(tables)
        for column in ("perturbation", "kind", "origin"):
            rows[column] = pd.Categorical(rows[column])
        file.finish(rows, genes)


def _effects(
    label: dict[str, str],
    simulation: Simulation,
    origins: SimulatedBlock,
    kinds: np.ndarray,
    one: Perturbation,
    change: np.ndarray,
    ids: list[str],
) -> pd.DataFrame:
    """Return the rows of effects.parquet for one perturbation."""
    reached = reached_genes(simulation, one)
    means = mean_effects(origins, kinds, change, reached["gene"].to_numpy())
    means.insert(0, "cell_type", type_names(simulation.settings)[means.pop("type")])
    relation = dict(zip(reached["gene"], reached["relation"], strict=True))
    means.insert(0, "relation", means["gene"].map(relation))
    means["gene"] = np.array(ids)[means["gene"]]
    return pd.DataFrame(label, index=means.index).join(means)


def cell_table(simulation: Simulation, cells: np.ndarray) -> pd.DataFrame:
    """Return the obs table of chosen cells."""
    settings, rows = simulation.settings, simulation.cells.iloc[cells]
    names = type_names(settings)
    donors = [f"donor{k}" for k in range(settings.donors)]
    batches = [f"batch{k}" for k in range(settings.batches)]
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(rows["type"], names),
            "branch": pd.Categorical.from_codes(rows["branch"], names),
            "pseudotime": rows["pseudotime"].to_numpy(),
            "donor": pd.Categorical.from_codes(rows["donor"], donors),
            "batch": pd.Categorical.from_codes(rows["batch"], batches),
        },
        index=pd.Index([f"cell{i:07d}" for i in cells]),
    )


def gene_table(simulation: Simulation, ids: list[str]) -> pd.DataFrame:
    """Return the var table: which genes are TFs, and how they are expressed."""
    is_tf = np.zeros(len(ids), dtype=bool)
    is_tf[simulation.network.tfs] = True
    columns = {"is_tf": is_tf, "basal": simulation.basal, "dispersion": simulation.dispersion}
    return pd.DataFrame(columns, index=pd.Index(ids))


class GrowingFile:
    """An h5ad file to which cells are added block by block, with at most one further layer."""

    def __init__(self, path: Path, num_genes: int, layer: str | None = None) -> None:
        self._file = h5py.File(path, "w")
        write_elem(self._file, "layers", {})
        self._keys = ["X"] if layer is None else ["X", f"layers/{layer}"]
        for key, dtype in zip(self._keys, (np.int32, np.float32), strict=False):
            empty = scipy.sparse.csr_matrix((0, num_genes), dtype=dtype)
            empty.indptr = empty.indptr.astype(np.int64)
            write_elem(self._file, key, empty, dataset_kwargs=_HDF5)

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add(self, *matrices: np.ndarray) -> None:
        """Append cells: the counts, and the layer if there is one; [cells, genes] each."""
        for key, matrix in zip(self._keys, matrices, strict=True):
            stored = sparse_dataset(self._file[key])
            for start in range(0, len(matrix), BLOCK_CELLS):
                rows = matrix[start : start + BLOCK_CELLS]
                stored.append(scipy.sparse.csr_matrix(rows, dtype=stored.dtype))

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        """Write the tables that turn the file into an AnnData file."""
        write_elem(self._file, "obs", obs)
        write_elem(self._file, "var", var)
        self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


class GrowingTable:
    """A Parquet file to which tables are added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> GrowingTable:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer:
            self._writer.close()

    def add(self, rows: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(rows, preserve_index=False)
        writer = self._writer or pq.ParquetWriter(self._path, table.schema)
        self._writer = writer
        writer.write_table(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the code runs from a checkout that is not installed
        return "not installed"
