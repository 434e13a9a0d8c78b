"""Embed the cells of a file with a pretrained encoder: every cell, in the order of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import complete_file, require_new_file
from data_prep.running.workers import Progress
from data_prep.sources.source_spec import SourceOptions
from data_prep.version import VERSION
from eval.cells.read_cells import CellSet, encode_file
from eval.cells.settings import EmbedOptions
from eval.options import choose_device
from pretrain.cell_states.cell_state import FILE_NAME as STATE_NAME
from pretrain.cell_states.frozen_states import embed_cells
from pretrain.export.model_folder import folder_cell_state, load_exported
from pretrain.model.architectures import encoder_of

OBSM_KEY = "X_geneloom"
STATE = "state"


def embed_file(
    cells: Path,
    model: Path,
    out: Path,
    options: EmbedOptions = EmbedOptions(),
    reading: SourceOptions = SourceOptions(),
    progress: Progress | None = None,
) -> str:
    """Write the embeddings of a file's cells in the file's order, and return a summary sentence.

    A ``.h5ad`` or ``.zarr`` output is the input with ``obsm["X_geneloom"]``,
    ``obs["geneloom_tokens"]`` and ``uns["geneloom"]``; nothing else is changed. A ``.parquet``
    output is a table of ``cell_id``, ``geneloom_tokens`` and ``embedding`` (float32 lists of the
    same length), with the same record as text under ``geneloom`` in its schema.

    Raises
    ------
    ValueError
        `out` exists or has another suffix; or the cell state is asked for, and the model has none
        or a layer is given.
    """
    if out.suffix not in (".h5ad", ".zarr", ".parquet"):
        raise ValueError(f"--out {out}: must end in .h5ad, .zarr or .parquet")
    require_new_file(out)
    network, vocab = load_exported(model, options.vocabulary)
    pooling, layer = options.pooling, options.layer
    settings: dict[str, Any] = {
        "token_budget": options.token_budget, "device": choose_device(options.device),
        "bf16": options.bf16, "progress": progress,
    }  # fmt: skip
    state = folder_cell_state(model, vocab) if pooling in (None, STATE) else None
    if pooling is None:
        pooling = STATE if state and layer is None else "mean"
    if pooling == STATE and layer is not None:
        raise ValueError(f"--layer {layer}: belongs to --pooling mean or cls")
    if pooling == STATE and state is None:
        raise ValueError(
            f"--pooling {STATE}: {model} has no {STATE_NAME}; export the run again with its shards"
        )
    cell_set = encode_file(cells, vocab, reading)
    encoder = encoder_of(network)
    if pooling == STATE and state:
        embeddings, layer = state.embed(cell_set.tokens, encoder, vocab, **settings), 0
    else:
        layer = -1 if layer is None else layer
        embeddings = embed_cells(cell_set.tokens, encoder, vocab, pooling, layer, **settings)
    record = {
        "version": VERSION,
        "model": model.name,
        "vocabulary_sha256": vocab.sha256,
        "pooling": pooling,
        "layer": layer,
    }
    if out.suffix == ".parquet":
        _write_table(out, cell_set, embeddings, record)
    else:
        _write_cells(out, cells, cell_set, embeddings, record)
    empty = int((~cell_set.has_genes).sum())
    note = f"; {empty} cells without any gene of the vocabulary are NaN" if empty else ""
    kind = "cell states" if pooling == STATE else f"{pooling} of layer {layer}"
    return (
        f"{out}: {len(embeddings):,} cells x {embeddings.shape[1]} in obsm['{OBSM_KEY}'] "
        f"({kind}){note}"
    )


def _write_cells(
    out: Path, cells: Path, encoded: CellSet, embeddings: np.ndarray, record: dict[str, Any]
) -> None:
    data = anndata.read_h5ad(cells)
    data.obsm[OBSM_KEY] = embeddings
    data.obs["geneloom_tokens"] = encoded.lengths
    data.uns["geneloom"] = record
    with complete_file(out) as aside:
        (data.write_h5ad if out.suffix == ".h5ad" else data.write_zarr)(aside)


def _write_table(
    out: Path, encoded: CellSet, embeddings: np.ndarray, record: dict[str, Any]
) -> None:
    width = embeddings.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), width)
    columns = {
        "cell_id": encoded.metadata.index.astype(str).to_numpy(),
        "geneloom_tokens": encoded.lengths,
        "embedding": vectors,
    }
    table = pa.table(columns).replace_schema_metadata({"geneloom": json.dumps(record)})
    with complete_file(out) as aside:
        pq.write_table(table, aside)
