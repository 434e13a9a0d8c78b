"""Start training from the weights of an exported or published model; genes are matched by id.

`start_weights` fills the model of a new run. `require_same_start` checks that a resumed run names
the same weights.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.genes.vocabulary import Vocabulary
from pretrain.export.model_folder import (
    RECORD_NAME,
    folder_vocabulary,
    require_belonging,
    token_dictionary,
)
from pretrain.model.architectures import Architecture, architecture_of
from pretrain.model.masked_gene_model import MaskedGeneModel
from pretrain.settings.architecture import architecture_conflicts, read_architecture
from pretrain.settings.model_settings import ModelConfig
from pretrain.start.stored_weights import StoredWeights, stored_sha256, stored_weights

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 10
# A gene's median has changed if the change exceeds rounding; a common scale of all medians does not
# matter.
_MEDIAN_TOLERANCE = 1e-6


def start_weights(
    model: MaskedGeneModel, vocabulary: Vocabulary, config: ModelConfig, prior: str = "none"
) -> dict[str, Any]:
    """Fill a new model with the weights of ``config.init_from``, and return the record.

    Genes and special tokens keep their rows by name, whatever their token was. The row of a new
    gene is the mean row of the kept genes plus its random initialisation; its bias is their mean
    bias. With a random row alone, its score would be near 0, while trained rows give an absent gene
    a much lower score, so new genes would take the probability of all others. From the mean, a new
    gene is no more probable than the others on average (the exponential is convex), and the random
    part keeps new genes different from each other. Position embeddings are copied as far as they
    exist; the others stay random.

    Every rank calls this before DeepSpeed receives the model. With the same vocabulary, the model
    then equals the folder's model exactly.

    Parameters
    ----------
    prior
        ``objective.prior`` of the run.

    Raises
    ------
    ValueError
        The folder has no model or vocabulary, another architecture, missing or foreign tensors, few
        matching genes, or a head that was trained with another prior.
    """
    folder = config.init_from
    assert folder is not None
    stored, source = opened(model, config, prior)
    record = compared(folder, stored, model, vocabulary, source)
    rows = torch.from_numpy(source_rows(vocabulary, source))
    kind, parameters = architecture_of(model.bert), dict(model.bert.named_parameters())
    _fill(parameters, stored.tensors, rows, vocabulary.first_gene_token, kind)
    return record


def opened(
    model: MaskedGeneModel, config: ModelConfig, prior: str
) -> tuple[StoredWeights, Vocabulary]:
    """Return weights and vocabulary of ``config.init_from``; errors as in `start_weights`."""
    folder = config.init_from
    assert folder is not None
    _require_same_prior(folder, prior)
    theirs = read_architecture(folder / "config.json")
    for conflict in architecture_conflicts(config.model_dump(), folder, theirs):
        raise ValueError(conflict)
    source = folder_vocabulary(folder, config.init_vocabulary)
    kind, parameters = architecture_of(model.bert), dict(model.bert.named_parameters())
    stored = stored_weights(folder, kind, parameters)
    _require_complete(stored.path, stored.tensors, parameters, kind)
    require_belonging(folder, len(stored.tensors[kind.embedding]), source)
    return stored, source


def compared(
    folder: Path,
    stored: StoredWeights,
    model: MaskedGeneModel,
    vocabulary: Vocabulary,
    source: Vocabulary,
) -> dict[str, Any]:
    """Return the record of a start from stored weights; ValueError if too few genes match."""
    rows = source_rows(vocabulary, source)
    genes = _compare_genes(vocabulary, source, rows)
    _require_related(folder, genes, min(len(vocabulary.genes), len(source.genes)))
    kind, parameters = architecture_of(model.bert), dict(model.bert.named_parameters())
    # With rotary positions there are no embeddings to copy.
    own, there = (
        len(x[kind.positions]) if kind.positions else 0 for x in (parameters, stored.tensors)
    )
    return {
        "folder": str(folder.resolve()),
        "weights_file": stored.path.name,
        "weights_sha256": stored.sha256,
        "vocabulary_sha256": source.sha256,
        "genes": genes,
        "medians": _compare_medians(vocabulary, source, rows),
        "special_tokens": {
            "new": sorted(vocabulary.special_tokens.keys() - source.special_tokens.keys()),
            "dropped": sorted(source.special_tokens.keys() - vocabulary.special_tokens.keys()),
        },
        "positions": {
            "copied": min(own, there),
            "new": max(0, own - there),
            "cut": max(0, there - own),
        },
    }


def _require_same_prior(folder: Path, prior: str) -> None:
    """Raise ValueError if the folder's head was trained with another prior than this run's."""
    record = folder / RECORD_NAME
    theirs = json.loads(record.read_text()).get("prior") if record.exists() else None
    before = theirs["kind"] if theirs else "none"
    if before != prior:
        raise ValueError(
            f"{folder}: its head was trained with objective.prior={before}, this run has {prior}, "
            f"which changes what every logit means; give objective.prior={before}"
        )


def source_rows(vocabulary: Vocabulary, source: Vocabulary) -> np.ndarray:
    """Return int64 [num_tokens]: each token's counterpart in `source`, -1 if it has none."""
    tokens = token_dictionary(source)
    names = sorted(vocabulary.special_tokens, key=lambda name: vocabulary.special_tokens[name])
    return np.array([tokens.get(name, -1) for name in (*names, *vocabulary.genes)], dtype=np.int64)


def describe(record: dict[str, Any]) -> str:
    """Return a one-line description of what `start_weights` did."""
    genes, medians = record["genes"], record["medians"]
    kept, new = genes["kept"]["count"], genes["new"]["count"]
    parts = [f"{kept:,} of {kept + new:,} genes have weights"]
    parts += [f"{genes[k]['count']:,} are {k}{_named(genes[k])}" for k in ("new", "dropped")]
    for kind, names in record["special_tokens"].items():
        parts += [f"special tokens {kind}: {' '.join(names)}"] if names else []
    places = ", ".join(f"{n:,} {k}" for k, n in record["positions"].items() if n)
    parts += [f"positions: {places}"] if places else []
    if medians["changed"]:
        parts.append(
            f"medians of {medians['changed']:,} of these genes ({medians['changed'] / kept:.1%}) "
            f"are others (half of them by more than {medians['typical_change']:.2g}): the same "
            "cell gives another order of genes than the weights were trained on"
        )
    verb = f"go on at step {record['continued']['step']}" if "continued" in record else "start"
    return f"{verb} from {record['folder']} ({record['weights_sha256'][:12]}): " + "; ".join(parts)


def log_start(record: dict[str, Any]) -> None:
    """Log `describe`, as a warning if the medians of genes differ from those of the weights."""
    level = logging.WARNING if record["medians"]["changed"] else logging.INFO
    logger.log(level, "%s", describe(record))


def require_same_start(record: dict[str, Any], config: ModelConfig, allow_changes: bool) -> None:
    """Raise ValueError if the settings of a resumed run name other initial weights than `record`.

    The resumed run uses the weights of its checkpoint, but its settings would then be wrong about
    the start. The folder of the weights need not exist any more. With `allow_changes` the
    difference is only a warning.
    """
    # The record lacks this key in checkpoints of versions that knew only random initial weights.
    before, folder = record.get("init"), config.init_from
    new = "random"
    if before is not None and "counted" in before:
        before, new = None, "counted"  # its settings are part of the recipe
    problem = None
    if before is None and folder is not None:
        problem = f"from {new} weights, model.init_from={folder} would not be used; leave it out"
    elif before is not None and folder is None:
        problem = f"from {before['folder']}; give model.init_from={before['folder']} again"
    elif before is not None and folder is not None:
        problem = _other_weights(before, folder)
    if problem and not allow_changes:
        raise ValueError(f"resume: the run started {problem}")
    if problem:
        logger.warning("resume: the run started %s", problem)


def _other_weights(before: dict[str, Any], folder: Path) -> str | None:
    was = f"from {before['folder']} with weights {before['weights_sha256'][:12]}"
    found = stored_sha256(folder)
    if found is None:
        same = str(folder.resolve()) == before["folder"]
        return None if same else f"{was}; model.init_from={folder} holds no weights to compare"
    if found == before["weights_sha256"]:
        return None
    return f"{was}; model.init_from={folder} holds {found[:12]}; --allow-changes goes on regardless"


def _require_complete(
    path: Path,
    tensors: dict[str, torch.Tensor],
    parameters: dict[str, torch.nn.Parameter],
    kind: Architecture,
) -> None:
    """Raise ValueError, with all names, unless a file has exactly the tensors of the model.

    The number of rows of tokens and positions may differ.
    """
    problems = [f"{name} is missing" for name in sorted(parameters.keys() - tensors.keys())]
    problems += [f"{name} is foreign" for name in sorted(tensors.keys() - parameters.keys())]
    for name in sorted(parameters.keys() & tensors.keys()):
        rows = 1 if name in (kind.embedding, kind.bias, kind.positions) else 0
        stored, own = tensors[name].shape, parameters[name].shape
        if len(stored) != len(own) or stored[rows:] != own[rows:]:
            problems.append(f"{name} is {list(stored)} instead of {list(own)}")
    if not problems and len(tensors[kind.embedding]) != len(tensors[kind.bias]):
        problems.append(f"{kind.embedding} and {kind.bias} have different numbers of tokens")
    if problems:
        raise ValueError(f"{path}: the weights do not fit the model: {'; '.join(problems)}")


def _fill(
    parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
    rows: torch.Tensor,
    first_gene: int,
    kind: Architecture,
) -> None:
    """Copy tensors into the parameters; `rows` is the result of `source_rows`."""
    known = rows >= 0
    genes = known & (torch.arange(len(rows)) >= first_gene)
    with torch.no_grad():
        for name, parameter in parameters.items():
            stored = tensors[name]
            if name in (kind.embedding, kind.bias):  # one row for each token
                parameter[~known] += stored[rows[genes]].mean(dim=0)
                parameter[known] = stored[rows[known]]
            elif name == kind.positions:
                shared = min(len(parameter), len(stored))
                parameter[:shared] = stored[:shared]
            else:
                parameter.copy_(stored)


def _compare_genes(vocabulary: Vocabulary, source: Vocabulary, rows: np.ndarray) -> dict[str, dict]:
    """Return the counts and first examples of the genes kept, new and dropped."""
    known = rows[vocabulary.first_gene_token :] >= 0
    ours = set(vocabulary.genes)
    groups = {
        "kept": [g for g, k in zip(vocabulary.genes, known, strict=True) if k],
        "new": [g for g, k in zip(vocabulary.genes, known, strict=True) if not k],
        "dropped": [g for g in source.genes if g not in ours],
    }
    return {k: {"count": len(g), "examples": g[:_MAX_EXAMPLES]} for k, g in groups.items()}


def _require_related(folder: Path, genes: dict[str, dict], smaller: int) -> None:
    """Raise ValueError if less than half of the smaller vocabulary's genes are kept."""
    if genes["kept"]["count"] < smaller / 2:
        raise ValueError(
            f"model.init_from: the shards have {genes['new']['count']:,} genes that {folder} does "
            f"not know{_named(genes['new'])}, it has {genes['dropped']['count']:,} others"
            f"{_named(genes['dropped'])}, and only {genes['kept']['count']:,} are the same; are "
            "both Ensembl ids of one species, and the dictionaries the model's own?"
        )


def _compare_medians(
    vocabulary: Vocabulary, source: Vocabulary, rows: np.ndarray
) -> dict[str, float]:
    """Return how many medians of kept genes changed, and the median size of these changes.

    A common factor is ignored, because it does not change the order of genes.
    """
    ours = np.flatnonzero(rows >= 0)
    ours = ours[ours >= vocabulary.first_gene_token]
    ratio = vocabulary.median_of_token[ours] / source.median_of_token[rows[ours]]
    change = np.abs(ratio / np.median(ratio) - 1)
    changed = change[change > _MEDIAN_TOLERANCE]
    typical = float(np.median(changed)) if len(changed) else 0.0
    return {"changed": len(changed), "typical_change": typical}


def _named(group: dict) -> str:
    """Return ``: first, second, third ...`` for a group of genes, or nothing for an empty one."""
    shown = group["examples"][:3]
    more = " ..." if group["count"] > len(shown) else ""
    return f": {', '.join(shown)}{more}" if shown else ""
