"""Initialise the weights of genes with what is counted in the training cells.

`start_counted` is called once, before the first training step. It fills up to three parts:

- ``medians``: dimensions 2 j and 2 j + 1 of a gene's embedding are 0.06 sin and 0.06 cos of w_j
  log(median), w = 0.5, 1, 2, ... 64. The ratio of a gene's median to those of its neighbours tells
  most about which gene is masked, and a product of two such embeddings gives this ratio.
- ``svd``: the next dimensions are the gene's loadings of the corpus SVD
  (`pretrain.counting.corpus_svd`), each scaled to a root mean square of 0.06 over the genes of the
  training cells and cut at four times that.
- ``frequency``: the head's bias is the log of a gene's share of all tokens, the unigram baseline.

The remaining dimensions stay random, with a small standard deviation. Medians come from the
vocabulary, and everything else is counted in training cells. Special tokens keep their random
weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.errors import SharedFailure
from data_prep.genes.vocabulary import Vocabulary
from data_prep.shards.reader import ShardSet
from pretrain.counting.baselines import RankBaselines
from pretrain.counting.corpus_svd import MAX_CELLS, corpus_svd
from pretrain.counting.counted_tables import counted_tables
from pretrain.model.architectures import architecture_of, encoder_of, input_table
from pretrain.model.masked_gene_model import MaskedGeneModel
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks
from pretrain.settings.model_settings import ModelConfig

logger = logging.getLogger(__name__)

_FREQUENCIES = 2.0 ** np.arange(-1, 7)
_SCALE = 0.06
_CUT = 4  # times the root mean square, because a few genes have most of a component


class CannotCount(SharedFailure, ValueError):
    """The vocabulary or the cells lack what `model.init_genes=counted` needs."""


@dataclass(frozen=True)
class CountedGenes:
    """The counted initial weights of tokens.

    Attributes
    ----------
    dimensions
        float32 [V, counted dimensions]; rows of special tokens are not used.
    bias
        float32 [V], or None if it is not counted.
    record
        The parts that were counted, the data they were counted in, and a hash of both arrays.
    """

    dimensions: np.ndarray
    bias: np.ndarray | None
    record: dict[str, Any]


def require_countable(settings: ModelConfig, vocabulary: Vocabulary) -> None:
    """Raise ValueError if medians are asked for and the vocabulary has no medians of its own."""
    if settings.init_genes != "counted" or "medians" not in settings.counted:
        return
    if len(np.unique(vocabulary.medians)) < 2:
        raise CannotCount(
            f"model.init_genes=counted: all medians of the vocabulary are "
            f"{vocabulary.medians[0]:g}, so it has none; prepare the cells with medians (`geneloom "
            "medians` counts them), or give model.counted=[frequency,svd]"
        )


def count_genes(shards: ShardSet, settings: ModelConfig, quarantine: bool = False) -> CountedGenes:
    """Return the initial weights of genes, counted in the training cells.

    In a narrow model medians take at most half of the width, and the SVD takes the rest.

    Raises
    ------
    ValueError
        The vocabulary has no medians, there are no training cells, or a block is damaged.
    """
    vocabulary, width = shards.vocabulary, settings.hidden_size
    require_countable(settings, vocabulary)
    parts: dict[str, Any] = {}
    columns = [np.zeros((vocabulary.num_tokens, 0), dtype=np.float32)]
    if "medians" in settings.counted:
        columns.append(median_dimensions(vocabulary, min(len(_FREQUENCIES), width // 4)))
        parts["medians"] = {"dimensions": columns[-1].shape[1]}
    if "svd" in settings.counted:
        svd = corpus_svd(shards, settings.counted_components, None, MAX_CELLS, quarantine)
        room = width - sum(c.shape[1] for c in columns)
        columns.append(loading_dimensions(svd.components[:, :room]))
        parts["svd"] = {
            "dimensions": columns[-1].shape[1], "asked": settings.counted_components,
            "cells": svd.origin["cells"], "residual": svd.origin["residual"],
        }  # fmt: skip
    bias = None
    if "frequency" in settings.counted:
        bias = log_frequency(shards, quarantine)
        parts["frequency"] = {"most_cells": MAX_CELLS}
    dimensions = np.concatenate(columns, axis=1)
    digest = hashlib.sha256(dimensions.tobytes())
    digest.update(b"" if bias is None else bias.tobytes())
    record = {
        "counted": parts,
        "rest": settings.counted_rest,
        "shards_fingerprint": shards.fingerprint,
        "vocabulary_sha256": vocabulary.sha256,
        "sha256": digest.hexdigest(),
    }
    return CountedGenes(dimensions, bias, record)


def median_dimensions(vocabulary: Vocabulary, number: int) -> np.ndarray:
    """Return float32 [V, 2 x number], sine and cosine alternating; zeros at special tokens."""
    logs = np.log(np.nan_to_num(vocabulary.median_of_token, nan=1.0))
    angles = logs[:, None] * _FREQUENCIES[:number]
    found = _SCALE * np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(len(logs), -1)
    found[: vocabulary.first_gene_token] = 0
    return found.astype(np.float32)


def loading_dimensions(components: np.ndarray) -> np.ndarray:
    """Return float32 [V, components], loadings scaled to the same size over genes that have any."""
    known = np.any(components != 0, axis=1)
    size = np.sqrt(np.mean(components[known].astype(np.float64) ** 2, axis=0))
    scaled = _SCALE * components / np.where(size > 0, size, 1)
    return scaled.clip(-_CUT * _SCALE, _CUT * _SCALE).astype(np.float32)


def log_frequency(shards: ShardSet, quarantine: bool) -> np.ndarray:
    """Return float32 [V], the log share of each gene among all tokens.

    Special tokens get the value of the rarest gene.
    """
    settings = {"method": 1, "cells": MAX_CELLS, "quarantine": quarantine}
    tables = counted_tables(
        shards,
        "log-frequency",
        settings,
        lambda left_out: {
            "log": RankBaselines(shards, MAX_CELLS, left_out).log_probabilities["unigram"][0]
        },
        quarantine=quarantine,
    )
    found = tables["log"].astype(np.float32)
    return np.maximum(found, found[np.isfinite(found)].min())


def start_counted(
    model: MaskedGeneModel,
    shards: ShardSet,
    settings: ModelConfig,
    quarantine: bool,
    ranks: Ranks,
) -> dict[str, Any]:
    """Write the counted weights into a model with random weights, and return their record.

    Rank 0 counts, and all other ranks receive exactly its numbers.
    """
    counted, said = None, {}
    if ranks.is_first:
        try:
            counted = count_genes(shards, settings, quarantine)
            said = {"record": counted.record, "dimensions": counted.dimensions.shape[1]}
        except ValueError as error:
            said = {"error": str(error)}
    said = json.loads(dist.first_rank_says(json.dumps(said)))
    if "error" in said:
        raise CannotCount(said["error"])
    # The last column is the bias, the others are the dimensions.
    table = torch.zeros(shards.vocabulary.num_tokens, said["dimensions"] + 1)
    if counted is not None:
        table[:, :-1] = torch.from_numpy(counted.dimensions)
        table[:, -1] = 0 if counted.bias is None else torch.from_numpy(counted.bias)
    table = table.to(ranks.device)
    dist.sum_in_place(table)
    table = table.cpu()
    bias = table[:, -1] if "frequency" in settings.counted else None
    fill(model, table[:, :-1], bias, shards.vocabulary.first_gene_token, settings)
    if ranks.is_first:
        logger.info("%s", describe(said["record"]))
    return said["record"]


def fill(
    model: MaskedGeneModel,
    dimensions: torch.Tensor,
    bias: torch.Tensor | None,
    first_gene: int,
    settings: ModelConfig,
) -> None:
    """Write counted weights into a model with random weights.

    Parameters
    ----------
    dimensions, bias
        As in `CountedGenes`.
    """
    number = dimensions.shape[1]
    with torch.no_grad():
        if number:
            genes = input_table(encoder_of(model.bert))[first_gene:]
            genes *= settings.counted_rest / settings.initializer_range
            genes[:, :number] = dimensions[first_gene:]
        if bias is not None:
            parameters = dict(model.bert.named_parameters())
            parameters[architecture_of(model.bert).bias].copy_(bias)


def describe(record: dict[str, Any]) -> str:
    """Return a one-line description of the counted parts."""
    parts = record["counted"]
    said = []
    if "medians" in parts:
        said.append(f"medians in {parts['medians']['dimensions']} dimensions")
    if svd := parts.get("svd"):
        fewer = "" if svd["dimensions"] == svd["asked"] else f" of {svd['asked']}"
        said.append(
            f"{svd['dimensions']}{fewer} components of the SVD of {svd['cells']:,} training cells"
        )
    if "frequency" in parts:
        said.append("log frequency in the bias of the head")
    return f"genes start from what was counted: {', '.join(said)}"
