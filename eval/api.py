"""For notebooks: cells as AnnData in, AnnData or a table out, no files to look after."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import anndata
import pandas as pd

from data_prep.sources.source_spec import SourceOptions
from eval.cells.embed import embed_file
from eval.perturb.screen.cells_and_genes import ALL, CellChoice, GeneChoice, States
from eval.perturb.screen.compare_copies import EngineSettings
from eval.perturb.screen.edits import Edit, Kind
from eval.perturb.screen.results import Results
from eval.perturb.screen.run import perturb_file
from eval.perturb.screen.settings import Screen


def embed_cells(
    adata: anndata.AnnData,
    model: Path | str,
    vocabulary: Path | None = None,
    options: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    **settings,
) -> anndata.AnnData:
    """Return a copy of the cells with embeddings in ``.obsm["X_geneloom"]``.

    Parameters
    ----------
    adata
        Raw counts.
    model
        Folder of ``geneloom export``, or Geneformer's (then give `vocabulary`: its dictionaries).
    settings
        Those of `eval.cells.embed.embed_file`: `pooling`, `layer`, `device`, `bf16`,
        `token_budget`.
    """
    with tempfile.TemporaryDirectory() as folder:
        cells, out = Path(folder) / "cells.h5ad", Path(folder) / "out.h5ad"
        adata.write_h5ad(cells)
        embed_file(cells, Path(model), out, vocabulary, options, **settings)
        return anndata.read_h5ad(out)


def perturb(
    adata: anndata.AnnData,
    model: Path | str | None = None,
    kind: Kind = "delete",
    genes: str | Sequence[str] = ALL,
    *,
    head: Path | str | None = None,
    group: bool = False,
    set_size: int = 1,
    anchor: str | None = None,
    rank_shift: int = 1,
    to_quantile: float | None = None,
    states: States | None = None,
    keep: dict[str, str] | None = None,
    donor: str | None = None,
    max_cells: int | None = None,
    seed: int = 0,
    top: int = 0,
    engine: EngineSettings = EngineSettings(),  # noqa: B008  frozen
    vocabulary: Path | None = None,
    options: SourceOptions = SourceOptions(),  # noqa: B008  frozen
) -> pd.DataFrame:
    """Return what each perturbation does to each cell: one row per cell and perturbation.

    Columns ``cell_id``, ``donor``, ``name``, ``kind``, ``changed``, ``shift``, and, where they
    were asked for, ``toward_<state>`` and ``class_<label>``. The table has as many rows as there
    are copies (cells x genes for all genes): for large screens use
    `eval.perturb.screen.run.perturb_file`, which streams them into a folder.

    Parameters
    ----------
    adata
        Raw counts.
    model, head
        One of them: a pretrained model, or a classifier of ``geneloom finetune --save-head``.
    genes
        ``all``, or ids and symbols.

    The others are those of `Edit`, `GeneChoice`, `CellChoice` and `Screen`, errors too.
    """
    named = (genes,) if isinstance(genes, str) else tuple(genes)
    screen = Screen(
        Edit(kind, rank_shift, to_quantile),
        GeneChoice(named, group, set_size, anchor),
        CellChoice(keep or {}, states, donor, max_cells=max_cells, seed=seed),
        engine,
        top=top,
    )
    with tempfile.TemporaryDirectory() as folder:
        cells, out = Path(folder) / "cells.h5ad", Path(folder) / "screen"
        adata.write_h5ad(cells)
        perturb_file(
            cells, out, screen, None if model is None else Path(model),
            None if head is None else Path(head), vocabulary, options,
        )  # fmt: skip
        results = Results.open(out)
        parts = pd.concat(results.shifts(), ignore_index=True)
        of_cell = results.cells.set_index("cell")[["cell_id", "donor"]]
        of_set = results.perturbations.set_index("perturbation")[["name", "kind"]]
        table = parts.join(of_cell, on="cell").join(of_set, on="perturbation")
    return table[["cell_id", "donor", "name", "kind", "changed", *results.columns]]
