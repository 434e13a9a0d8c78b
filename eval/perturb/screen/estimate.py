"""Estimate all single deletions of a cell from a few backward passes.

A deleted gene is no longer attended to, and all genes behind it move up by one rank. These two
effects are estimated separately by `estimate`.

The first effect is estimated to first order. Every token has a gate on its attention weights as a
key, in all layers; the bias added to the attention scores is the logarithm of the gate. The
negative derivative by this bias estimates the effect of closing the gate.

The second effect is not a small change, because the position embeddings of neighbouring ranks may
be as far apart as any two. Therefore the cell is computed with all genes behind a break moved up,
for some breaks, where the effect of moving is then known. Between the breaks it is interpolated
with the derivatives by the embeddings times the step of the position embedding.

The estimated value is the change toward the goal state, or of the classes of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import spearmanr
from transformers.models.bert.modeling_bert import BertEmbeddings

from data_prep.files import complete_file
from eval.perturb.screen.compare_copies import CopyEngine
from eval.perturb.screen.edits import ABSENT, GeneSets
from pretrain.model.architectures import architecture_of

if TYPE_CHECKING:
    from eval.perturb.screen.settings import Screen
    from eval.perturb.screen.subject import Subject

logger = logging.getLogger(__name__)

_CHECKED_CELLS = 3
_BREAKS = 17
_TOP = 50


def require_screenable(screen: Screen, subject: Subject) -> None:
    """Raise ValueError unless the screen deletes single genes, with a goal or a classifier."""
    genes = screen.genes
    if architecture_of(subject.engine.encoder).positions is None:
        raise ValueError(
            "--screen: follows the learned position embeddings of a bert; this model is a "
            "modernbert, whose positions are rotary: leave --screen out, all deletions are computed"
        )
    if screen.edit.kind != "delete" or genes.group or genes.anchor or genes.set_size > 1:
        raise ValueError("--screen: estimates deletions of single genes; leave it out for others")
    if screen.cells.states and screen.engine.score != "mean_state":
        raise ValueError(
            f"--screen: estimates --score mean_state, not {screen.engine.score}; leave --screen "
            "out, all deletions are computed"
        )
    if not screen.cells.states and subject.engine.head is None:
        raise ValueError("--screen: orders genes by a goal; give --start and --goal, or --head")
    if not screen.cells.states and subject.engine.reads_state:
        raise ValueError(
            "--screen: this head reads cell states, whose counted part has no derivative by a "
            "gene; leave --screen out, or train a head with `geneloom finetune cells --features "
            "mean`"
        )


def estimate(engine: CopyEngine, genes: np.ndarray, num_breaks: int = _BREAKS) -> np.ndarray:
    """Return float64 [columns, n], the estimated changes by deleting each gene of one cell.

    The rows are the first state after the start (the goal), or the classes of the head if there are
    no states.

    Parameters
    ----------
    genes
        int64 [n] tokens by rank, without special tokens.
    num_breaks
        Backward passes for the effect of moving up; with as many as tokens this effect is exact.
    """
    has_cls, embeddings = engine.vocabulary.has_cls, engine.encoder.embeddings
    assert isinstance(embeddings, BertEmbeddings)
    sequence = torch.from_numpy(engine.sequences(genes[None])).to(engine.encoder.device)
    length = sequence.shape[1]
    words = embeddings.word_embeddings(sequence).detach()
    positions = embeddings.position_embeddings.weight[:length].detach()
    steps = torch.zeros_like(positions)
    steps[1:] = positions[:-1] - positions[1:]
    gates = torch.zeros(length, device=words.device, requires_grad=True)
    with torch.enable_grad():
        by_gate = _derivatives(engine, words, gates, gates)[1]
    breaks = np.unique(np.linspace(1, length, max(2, num_breaks)).round().astype(int))
    values, slopes = [], []
    for first_moved in breaks:
        moved = words.clone()
        moved[0, first_moved:] += steps[first_moved:]
        moved.requires_grad_()
        with torch.enable_grad():
            value, by_word = _derivatives(engine, moved, moved, None)
        values.append(value)
        slopes.append((by_word[:, 0] * steps).sum(dim=2).double().cpu().numpy())
    # effect[:, b] is the effect of moving up all tokens from place b on; it is 0 at b = length.
    effect = _between(breaks, np.stack(values), np.stack(slopes), length)
    found = effect[:, 1:] - by_gate.double().cpu().numpy()
    return found[:, 1:-1] if has_cls else found


def _derivatives(
    engine: CopyEngine, words: torch.Tensor, by: torch.Tensor, gates: torch.Tensor | None
) -> tuple[np.ndarray, torch.Tensor]:
    """Return the value to estimate, float64 [columns], and its derivative by a tensor."""
    inputs, share = {"inputs_embeds": words}, None
    if gates is not None:
        inputs["attention_mask"] = gates[None, None, None].expand(1, 1, len(gates), len(gates))
        share = (gates[1:-1] if engine.vocabulary.has_cls else gates).softmax(dim=0)
    states = engine.forward(**inputs)
    if engine.states:
        # The mean is over the remaining genes before and after a deletion, so it has no gate.
        columns = engine.cosines(engine.embedding(states))[:1, 1]
    else:
        columns = engine.probabilities(states, share)[0]
    found = [torch.autograd.grad(c, by, retain_graph=True)[0] for c in columns]
    return columns.detach().cpu().numpy(), torch.stack(found)


def _between(breaks: np.ndarray, values: np.ndarray, slopes: np.ndarray, length: int) -> np.ndarray:
    """Return float64 [columns, length + 1]: the value at each break, interpolated if necessary.

    Parameters
    ----------
    values
        float64 [breaks, columns].
    slopes
        float64 [breaks, columns, length]: change by moving one more token.
    """
    places = np.arange(length)
    after = np.searchsorted(breaks, places, side="right").clip(1, len(breaks) - 1)
    rows = np.arange(values.shape[1])[:, None]
    # The step of a single token is large too, so half of it uses the slope before and half the
    # slope after it.
    steps = (slopes[after - 1, rows, places] + slopes[after, rows, places]) / 2
    effect = np.zeros((values.shape[1], length + 1))
    effect[:, :-1] = steps[:, ::-1].cumsum(axis=1)[:, ::-1]
    known = values - values[-1]
    for row in range(len(effect)):
        wrong = known[:, row] - effect[row, breaks]
        effect[row] += np.interp(np.arange(length + 1), breaks, wrong)
    return effect


def screened_sets(
    path: Path,
    subject: Subject,
    screen: Screen,
    sets: GeneSets,
    digest: str,
    show: Callable[[str, int, int], None],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the indices of the sets of genes with the largest estimates, and their agreement.

    Both are stored in a file, and read from it if it belongs to the same screen.
    """
    if path.exists():
        stored = pq.read_table(path)
        if (stored.schema.metadata or {}).get(b"geneloom_screen") != digest.encode():
            raise ValueError(f"{path}: is of another screen; give --out a new folder")
    else:
        _write_estimates(path, subject, screen, digest, show)
        stored = pq.read_table(path)
    chosen = {subject.vocabulary.token_of[g] for g in stored["gene"].to_pylist()[: screen.top]}
    rows = np.flatnonzero(np.isin(sets.members[:, 0], list(chosen)))
    agreement = {
        k: float(stored.schema.metadata[k.encode()]) for k in ("spearman", "overlap_of_top")
    }
    return rows, agreement


def _write_estimates(
    path: Path,
    subject: Subject,
    screen: Screen,
    digest: str,
    show: Callable[[str, int, int], None],
) -> None:
    """Estimate all genes in all cells and write them in order of their effect.

    The order follows the mean over donors of each donor's mean.
    """
    engine, genes = subject.engine, subject.cells.genes
    donors, codes = np.unique(subject.cells.table["donor"], return_inverse=True)
    rows = 1 if engine.states else len(engine.head.classes if engine.head else ())
    sums = np.zeros((len(donors), rows, subject.vocabulary.num_tokens))
    counts = np.zeros((len(donors), subject.vocabulary.num_tokens))
    for i, cell in enumerate(genes):
        sums[codes[i]][:, cell] += estimate(engine, cell)
        counts[codes[i], cell] += 1
        show("estimates", i + 1, len(genes))
    means = sums / np.maximum(counts, 1)[:, None]
    means = means.sum(axis=0) / np.maximum((counts > 0).sum(axis=0), 1)
    tokens = np.flatnonzero(counts.any(axis=0))
    size = np.abs(means[:, tokens]).max(axis=0)
    order = np.argsort(-size, kind="stable")
    table = pa.table(
        {
            "gene": [subject.names.gene_id(t) for t in tokens[order]],
            "name": [subject.names.name(t) for t in tokens[order]],
            "cells": counts.sum(axis=0)[tokens[order]].astype(np.int32),
            "estimate": means[:, tokens[order]].T.tolist(),
        }
    )
    agreement = agree(subject, screen)
    logger.info(
        "estimate against exact deletions in %d cells: Spearman %.3f, %.0f %% of the "
        "top %d in common", min(_CHECKED_CELLS, len(genes)), agreement["spearman"],
        100 * agreement["overlap_of_top"], _TOP,
    )  # fmt: skip
    metadata = {"geneloom_screen": digest} | {k: str(v) for k, v in agreement.items()}
    with complete_file(path) as aside:
        pq.write_table(table.replace_schema_metadata(metadata), aside)


def agree(subject: Subject, screen: Screen) -> dict[str, float]:
    """Return how well estimates agree with exact deletions, as means over some cells.

    ``spearman`` is the rank correlation of the values, ``overlap_of_top`` the share of the 50
    largest that are the same.
    """
    engine, genes = subject.engine, subject.cells.genes
    chosen = np.linspace(0, len(genes) - 1, min(_CHECKED_CELLS, len(genes))).astype(int)
    found: list[tuple[float, float]] = []
    for cell in chosen:
        members = genes[cell][:, None]
        sets = GeneSets(members, members != ABSENT)
        exact = engine.perturb(genes[cell], sets, screen.edit)
        for row, column in zip(estimate(engine, genes[cell]), _columns(engine), strict=True):
            true, guess = exact.values[column], row[exact.sets]
            k = min(_TOP, len(true))
            top = [set(np.argsort(-np.abs(v), kind="stable")[:k]) for v in (true, guess)]
            found.append((float(spearmanr(true, guess).statistic), len(top[0] & top[1]) / k))
    spearman, overlap = np.mean(found, axis=0).tolist()
    return {"spearman": spearman, "overlap_of_top": overlap}


def _columns(engine: CopyEngine) -> list[str]:
    if engine.states:
        return [f"toward_{engine.states[1]}"]
    return [f"class_{c}" for c in (engine.head.classes if engine.head else ())]
