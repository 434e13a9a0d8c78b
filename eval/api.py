"""For notebooks: the commands of evaluation as functions, with the same settings.

Cells are an `anndata.AnnData` or a file; what a command writes beside them comes back in memory.
Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.sources.source_spec import SourceOptions
from eval.benchmark.cli import BenchmarkOptions, OwnTask
from eval.cells.settings import AttentionOptions, EmbedOptions
from eval.finetune.settings import FinetuneGenesOptions, FinetuneOptions, FinetuneSettings
from eval.perturb.screen.cells_and_genes import CellChoice, GeneChoice, States
from eval.perturb.screen.edits import Edit
from eval.perturb.screen.settings import EngineSettings, ModelChoice, Screen
from eval.probe.settings import ProbeSettings
from eval.saturate.settings import SaturateOptions

if TYPE_CHECKING:
    import anndata
    import pandas as pd

    from eval.probe.run import Probe

    Cells = anndata.AnnData | Path | str

__all__ = [
    "AttentionOptions", "BenchmarkOptions", "CellChoice", "Edit", "EmbedOptions", "EngineSettings",
    "FinetuneGenesOptions", "FinetuneOptions", "FinetuneSettings", "GeneChoice", "ModelChoice",
    "OwnTask", "ProbeSettings", "SaturateOptions", "Screen", "SourceOptions", "States", "attention",
    "benchmark", "embed", "embed_cells", "finetune", "finetune_genes", "perturb", "predict",
    "predict_genes", "probe", "report", "saturate", "simulate",
]  # fmt: skip


@contextlib.contextmanager
def _as_file(cells: Cells) -> Iterator[tuple[Path, Path]]:
    """Yield the file of cells, and a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="geneloom-") as folder:
        path = Path(folder) / "cells.h5ad"
        if isinstance(cells, (str, Path)):
            path = Path(cells)
        else:
            cells.write_h5ad(path)
        yield path, Path(folder)


def embed(
    cells: Cells,
    model: Path | str,
    options: EmbedOptions = EmbedOptions(),
    reading: SourceOptions = SourceOptions(),
) -> anndata.AnnData:
    """Return a copy of the cells with embeddings in ``.obsm["X_geneloom"]``, as ``geneloom embed``.

    Parameters
    ----------
    cells
        Raw counts.
    model
        Folder of ``geneloom export``, or Geneformer's (then name its dictionaries as
        ``EmbedOptions(vocabulary=...)``).

    Raises
    ------
    ValueError
        As `eval.cells.embed.embed_file`.

    Examples
    --------
    >>> embed(cells, "model", EmbedOptions(pooling="mean", layer=0)).obsm["X_geneloom"]
    """
    import anndata

    from eval.cells.embed import embed_file

    with _as_file(cells) as (path, folder):
        embed_file(path, Path(model), folder / "out.h5ad", options, reading)
        return anndata.read_h5ad(folder / "out.h5ad")


embed_cells = embed  # as it was called before


def finetune(
    cells: Cells,
    model: Path | str,
    label: str,
    out: Path | str,
    options: FinetuneOptions = FinetuneOptions(),
    reading: SourceOptions = SourceOptions(),
) -> dict[str, Any]:
    """Return, and write into `out`, the scores of ``geneloom finetune cells`` beside baselines.

    `label` is a column of obs. Errors as of `eval.finetune.score_cells.finetune_cells`.

    Examples
    --------
    >>> options = FinetuneOptions(donor="donor", save_head=Path("head"))
    >>> finetune(cells, "model", "cell_type", "scores", options)["summary"]
    """
    from eval.finetune.score_cells import finetune_cells

    with _as_file(cells) as (path, _):
        return finetune_cells(path, Path(model), label, Path(out), options, reading)


def finetune_genes(
    cells: Cells,
    genes: pd.DataFrame | Path | str,
    model: Path | str,
    label: str,
    out: Path | str,
    options: FinetuneGenesOptions = FinetuneGenesOptions(),
    reading: SourceOptions = SourceOptions(),
) -> dict[str, Any]:
    """Return, and write into `out`, the scores of ``geneloom finetune genes`` beside baselines.

    Parameters
    ----------
    genes
        Table with the column ``ensembl_id`` or ``gene``, and `label`; or its file.

    Raises
    ------
    ValueError
        As `eval.benchmark.finetune_genes.finetune_genes`.

    Examples
    --------
    >>> options = FinetuneGenesOptions(save_head=Path("head"))
    >>> finetune_genes(cells, "genes.csv", "model", "dosage", "scores", options)["summary"]
    """
    from eval.benchmark.finetune_genes import finetune_genes as score

    with _as_file(cells) as (path, folder):
        table = folder / "genes.csv"
        if isinstance(genes, (str, Path)):
            table = Path(genes)
        else:
            genes.to_csv(table, index=False)
        return score(path, table, Path(model), label, Path(out), options, reading)


def predict(
    cells: Cells,
    head: Path | str,
    reading: SourceOptions = SourceOptions(),
    device: str = "auto",
) -> anndata.AnnData:
    """Return a copy of the cells with a trained head's classes, as ``geneloom predict``.

    Columns and errors as of `eval.finetune.predict.predict_file`.

    Examples
    --------
    >>> predict(cells, "head").obs["geneloom_cell_type"]
    """
    import anndata

    from eval.finetune.predict import predict_file
    from eval.options import choose_device

    with _as_file(cells) as (path, folder):
        predict_file(path, Path(head), folder / "out.h5ad", reading, choose_device(device))
        return anndata.read_h5ad(folder / "out.h5ad")


def predict_genes(
    cells: Cells,
    head: Path | str,
    reading: SourceOptions = SourceOptions(),
    device: str = "auto",
) -> pd.DataFrame:
    """Return the table of genes of ``geneloom predict --out FILE.csv``, by a head of genes.

    Columns as of `eval.finetune.predict.gene_table`, errors as of `predict_file` there.

    Examples
    --------
    >>> predict_genes(cells, "head").query("cells >= 20")
    """
    import pandas as pd

    from eval.finetune.predict import predict_file
    from eval.options import choose_device

    with _as_file(cells) as (path, folder):
        out = folder / "genes.csv"
        predict_file(path, Path(head), out, reading, choose_device(device))
        return pd.read_csv(out, dtype={"gene": str}, keep_default_na=False)


def probe(
    model: Path | str,
    cells: Cells,
    label: str,
    settings: ProbeSettings = ProbeSettings(),
    reading: SourceOptions = SourceOptions(),
) -> Probe:
    """Return what frozen cells know of a column of obs, beside counting, as ``geneloom probe``.

    Errors as of `eval.probe.run.probe_cells`.

    Examples
    --------
    >>> probe("run", cells, "cell_type", ProbeSettings(seeds=5)).scores
    """
    from eval.probe.run import probe_cells

    with _as_file(cells) as (path, _):
        return probe_cells(model, path, label, settings, reading)


def perturb(
    cells: Cells,
    model: ModelChoice | Path | str,
    screen: Screen = Screen(),
    reading: SourceOptions = SourceOptions(),
) -> pd.DataFrame:
    """Return what each perturbation does to each cell, as ``geneloom perturb``.

    One row per cell and perturbation: ``cell_id``, ``donor``, ``name``, ``kind``, ``changed``,
    ``shift``, and, where they were asked for, ``toward_<state>`` and ``class_<label>``. There are
    as many rows as copies (cells x genes for all genes): large screens belong into a folder
    (`eval.perturb.screen.run.perturb_file`).

    Parameters
    ----------
    cells
        Raw counts.
    model
        A model's folder; a head is ``ModelChoice(head=Path("head"))``.

    Raises
    ------
    ValueError
        As `eval.perturb.screen.run.perturb_file`.

    Examples
    --------
    >>> perturb(cells, "model", Screen(Edit("activate"), GeneChoice(("GATA4", "TBX5"), group=True)))
    """
    import pandas as pd

    from eval.perturb.screen.results import Results
    from eval.perturb.screen.run import perturb_file

    chosen = model if isinstance(model, ModelChoice) else ModelChoice(Path(model))
    with _as_file(cells) as (path, folder):
        perturb_file(path, folder / "screen", screen, chosen, reading)
        results = Results.open(folder / "screen")
        parts = pd.concat(results.shifts(), ignore_index=True)
        of_cell = results.cells.set_index("cell")[["cell_id", "donor"]]
        of_set = results.perturbations.set_index("perturbation")[["name", "kind"]]
        table = parts.join(of_cell, on="cell").join(of_set, on="perturbation")
    return table[["cell_id", "donor", "name", "kind", "changed", *results.columns]]


def attention(
    cells: Cells,
    model: Path | str,
    options: AttentionOptions = AttentionOptions(),
    reading: SourceOptions = SourceOptions(),
) -> pd.DataFrame:
    """Return how much each gene is attended to in each head, as ``geneloom attention``.

    Columns and errors as of `eval.cells.attention_tables`; pairs of genes belong into a folder.

    Examples
    --------
    >>> attention(cells, "model", AttentionOptions(group="donor")).groupby("gene")["attention"]
    """
    import pandas as pd

    from eval.cells.attention_tables import attention_file

    with _as_file(cells) as (path, folder):
        attention_file(path, Path(model), folder / "out", options, reading)
        return pd.read_parquet(folder / "out" / "received.parquet")


def benchmark(
    models: Sequence[Path | str],
    out: Path | str,
    options: BenchmarkOptions = BenchmarkOptions(),
    own: OwnTask = OwnTask(),
    reading: SourceOptions = SourceOptions(),
) -> dict[str, Any]:
    """Run tasks as ``geneloom benchmark``; return what ``results.json`` in `out` holds.

    `reading` says how ``own.cells`` is read. Errors as of `eval.benchmark.run.run_benchmark`; tasks
    that failed are in ``skipped``.

    Examples
    --------
    >>> own = OwnTask(cells=Path("cells.h5ad"), label="cell_type", group="donor")
    >>> benchmark(["model"], "bench", own=own)["tasks"]
    """
    from eval.benchmark.cli import run_tasks

    return run_tasks([Path(m) for m in models], Path(out), options, own, reading=reading)[0]


def saturate(
    shards: Path | str,
    out: Path | str,
    config: str = "geneloom_tiny",
    overrides: Sequence[str] = (),
    options: SaturateOptions = SaturateOptions(),
    reading: SourceOptions = SourceOptions(),
) -> dict[str, Any]:
    """Return what growing shares of a corpus bring, as ``geneloom saturate``; `out` goes on.

    Errors as of `eval.saturate.run.saturate`; `reading` is of the cells to probe.

    Examples
    --------
    >>> saturate("shards", "saturation", overrides=["run.max_steps=500"])["words"]
    """
    from eval.saturate.run import saturate as measure

    return measure(shards, Path(out), config, overrides, options, reading)


def simulate(out: Path | str, perturb: str = "all", **settings: Any) -> dict[str, Any]:
    """Write cells of a known gene network, as ``geneloom simulate``; return the folder's record.

    Parameters
    ----------
    perturb
        ``none``, ``all`` (each transcription factor), or gene ids as ``A,B,A+B``.
    settings
        Those of `eval.simulate.settings.SimulationSettings`; ValueError for any other.

    Examples
    --------
    >>> simulate("cells", perturb="none", cells=600, genes=200, tfs=20)
    """
    from eval.simulate.settings import make_settings
    from eval.simulate.write import simulate as write

    return write(make_settings(**settings), Path(out), perturb)


def report(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the page of a folder that a command made, and return its path: ``geneloom report``.

    Errors as of `eval.report.any_folder.write_stage_report`.

    Examples
    --------
    >>> report("run")
    """
    from eval.report.any_folder import write_stage_report

    return Path(write_stage_report(Path(folder), None if out is None else Path(out)))
