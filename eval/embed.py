"""Cell embeddings of a pretrained encoder: every cell, in input order, no vocabulary head."""

from __future__ import annotations

from pathlib import Path

import anndata

from data_prep.files import complete_file, require_new_file
from data_prep.sources import SourceOptions
from data_prep.version import VERSION
from eval.encode import encode_file
from pretrain.cell_state import FILE_NAME as STATE_NAME
from pretrain.encoders import encoder_of
from pretrain.export import folder_cell_state, load_exported
from pretrain.states import embed_cells

OBSM_KEY = "X_geneloom"
STATE = "state"


def embed_file(
    cells: Path,
    model: Path,
    out: Path,
    vocabulary: Path | None = None,
    options: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    pooling: str | None = None,
    layer: int | None = None,
    **settings,
) -> str:
    """Write the input file with embeddings in ``.obsm`` and return a sentence about it.

    Adds ``obsm["X_geneloom"]``, ``obs["geneloom_tokens"]`` and ``uns["geneloom"]``; nothing else
    is changed.

    Parameters
    ----------
    pooling
        ``state`` (`pretrain.cell_state`), ``mean`` or ``cls``; by default the cell state where the
        model folder has one and no layer is asked for, else the mean.
    layer
        For ``mean`` and ``cls``, as `pretrain.states.embed_layers` counts; by default -1.
    settings
        ``token_budget``, ``device`` and ``bf16`` of `pretrain.states.embed_layers`.

    Raises
    ------
    ValueError
        The model has no cell state, or one layer of it is asked for.
    """
    require_new_file(out)
    network, vocab = load_exported(model, vocabulary)
    state = folder_cell_state(model, vocab) if pooling in (None, STATE) else None
    if pooling is None:
        pooling = STATE if state and layer is None else "mean"
    if pooling == STATE and layer is not None:
        raise ValueError(f"--layer {layer}: belongs to --pooling mean or cls")
    if pooling == STATE and state is None:
        raise ValueError(
            f"--pooling {STATE}: {model} has no {STATE_NAME}; export the run again with its shards"
        )
    cell_set = encode_file(cells, vocab, options)
    encoder = encoder_of(network)
    if pooling == STATE and state:
        embeddings, layer = state.embed(cell_set.tokens, encoder, vocab, **settings), 0
    else:
        layer = -1 if layer is None else layer
        embeddings = embed_cells(cell_set.tokens, encoder, vocab, pooling, layer, **settings)
    data = anndata.read_h5ad(cells)
    data.obsm[OBSM_KEY] = embeddings
    data.obs["geneloom_tokens"] = cell_set.lengths
    data.uns["geneloom"] = {
        "version": VERSION,
        "model": model.name,
        "vocabulary_sha256": vocab.sha256,
        "pooling": pooling,
        "layer": layer,
    }
    with complete_file(out) as aside:
        data.write_h5ad(aside)
    empty = int((~cell_set.has_genes).sum())
    note = f"; {empty} cells without any gene of the vocabulary are NaN" if empty else ""
    kind = "cell states" if pooling == STATE else f"{pooling} of layer {layer}"
    return (
        f"{out}: {len(embeddings):,} cells x {embeddings.shape[1]} in obsm['{OBSM_KEY}'] "
        f"({kind}){note}"
    )
