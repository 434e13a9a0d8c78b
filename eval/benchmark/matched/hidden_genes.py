"""What a model expects of hidden places with and without a regulator: what masked training learns.

A part of a cell's genes is hidden, as in pretraining. The logits of all genes at these places stand
against the same logits after the regulator is taken out of the cell. No prior is added.
"""

from __future__ import annotations

import numpy as np
import torch

from data_prep.genes.vocabulary import CLS, EOS, Vocabulary
from pretrain.model.architectures import Network

# Each gene is hidden once, with a quarter of the others.
_PARTS = 4
# Stretches of a cell's ranks. A regulator that raises a gene moves it up: the gene is expected more
# among high ranks and less among low ones, which a mean over all places would hide.
_STRETCHES = 4


def logit_effects(
    network: Network,
    vocabulary: Vocabulary,
    genes: list[np.ndarray],
    tokens: np.ndarray,
    cells: list[np.ndarray],
    seed: int,
) -> np.ndarray:
    """Return float64 [tokens, num_tokens]: by how much each gene's logit at hidden places changes.

    Changes are averaged over the hidden places of each quarter of a cell's ranks, over cells; what
    is returned is the root mean square of the four means. Logits count from their mean over all
    genes. NaN for a regulator that no cell shows beside a hidden gene.

    In simulated cells true targets are found better than by the change of a hidden gene's own logit
    at its own place (AUROC .88 and .80; docs/results.md, "A positive control").

    Parameters
    ----------
    genes
        Gene tokens of every cell, by rank.
    tokens
        int [regulators], taken out one by one.
    cells
        For each of them the cells it is taken out of.
    seed
        Of the parts that are hidden together; they depend on the cell, not on the regulators.
    """
    sums = np.zeros((len(tokens), _STRETCHES, vocabulary.num_tokens))
    counts = np.zeros((len(tokens), _STRETCHES, 1))
    for cell in sorted({int(c) for chosen in cells for c in chosen}):
        rows = [i for i, chosen in enumerate(cells) if cell in chosen]
        own = genes[cell]
        order = np.random.default_rng([seed, cell]).permutation(len(own))
        for part in np.array_split(order, _PARTS):
            is_hidden = np.zeros(len(own), dtype=bool)
            is_hidden[part] = True
            stretch = np.flatnonzero(is_hidden) * _STRETCHES // len(own)
            before = _logits(network, vocabulary, own, is_hidden)
            for row in rows:
                if tokens[row] in own[is_hidden]:
                    continue  # what is hidden tells nothing that could be taken away
                stays = own != tokens[row]
                after = _logits(network, vocabulary, own[stays], is_hidden[stays])
                np.add.at(sums[row], stretch, after - before)
                np.add.at(counts[row], stretch, 1)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    is_seen = counts.any(axis=1)
    squares = np.where(is_seen, np.nansum(means**2, axis=1), np.nan)
    return np.sqrt(squares / np.maximum((counts > 0).sum(axis=1), 1))


def _logits(
    network: Network, vocabulary: Vocabulary, genes: np.ndarray, is_hidden: np.ndarray
) -> np.ndarray:
    """Return float64 [hidden, num_tokens], the logits of all genes at each hidden place.

    One cell is computed at a time, so no number depends on what is computed beside it.
    """
    shown = np.where(is_hidden, vocabulary.mask_token, genes)
    places = np.flatnonzero(is_hidden)
    if vocabulary.has_cls:
        first, last = (vocabulary.special_tokens[name] for name in (CLS, EOS))
        shown, places = np.concatenate([[first], shown, [last]]), places + 1
    inputs = torch.from_numpy(shown[None].astype(np.int64)).to(network.device)
    with torch.no_grad():
        logits = network(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, places]
        of_genes = logits[:, vocabulary.first_gene_token :].mean(dim=1, keepdim=True)
    return (logits - of_genes).double().cpu().numpy()
