"""What a model guesses of hidden genes with and without a regulator: what masked training learns.

A part of a cell's genes is hidden, as in pretraining. The logit of each of them at its own place
stands against the same logit after the regulator is taken out of the cell. No prior is added.
"""

from __future__ import annotations

import numpy as np
import torch

from data_prep.genes.vocabulary import CLS, EOS, Vocabulary
from pretrain.model.architectures import Network

# Each gene is hidden once, with a quarter of the others.
_PARTS = 4


def logit_effects(
    network: Network,
    vocabulary: Vocabulary,
    genes: list[np.ndarray],
    tokens: np.ndarray,
    cells: list[np.ndarray],
    seed: int,
) -> np.ndarray:
    """Return float64 [tokens, num_tokens]: the size of the mean change of each gene's logit.

    The mean is over the cells in which the gene is hidden while the regulator is shown. Logits
    count from their mean over all genes. NaN where there is no such cell.

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
    sums, counts = np.zeros((2, len(tokens), vocabulary.num_tokens))
    for cell in sorted({int(c) for chosen in cells for c in chosen}):
        rows = [i for i, chosen in enumerate(cells) if cell in chosen]
        own = genes[cell]
        order = np.random.default_rng([seed, cell]).permutation(len(own))
        for part in np.array_split(order, _PARTS):
            is_hidden = np.zeros(len(own), dtype=bool)
            is_hidden[part] = True
            before = _own_logits(network, vocabulary, own, is_hidden)
            for row in rows:
                if tokens[row] in own[is_hidden]:
                    continue  # what is hidden tells nothing that could be taken away
                stays = own != tokens[row]
                after = _own_logits(network, vocabulary, own[stays], is_hidden[stays])
                hidden = own[is_hidden]
                sums[row, hidden] += after - before
                counts[row, hidden] += 1
    return np.abs(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))


def _own_logits(
    network: Network, vocabulary: Vocabulary, genes: np.ndarray, is_hidden: np.ndarray
) -> np.ndarray:
    """Return float64 [hidden], the logit of each hidden gene at its own place.

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
        of_genes = logits[:, vocabulary.first_gene_token :].mean(dim=1)
        own = logits[torch.arange(len(places)), torch.from_numpy(genes[is_hidden].astype(np.int64))]
    return (own - of_genes).double().cpu().numpy()
