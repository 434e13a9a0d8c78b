"""The curve of the held-out loss over the number of training cells, with intervals.

The loss of n cells is taken as a + b (n / N)^-c, with N the whole corpus: a is what no number of
cells brings away, a + b the loss of the corpus. Intervals come from a bootstrap: held-out cells are
drawn anew, the same for all sizes, and with several seeds the seeds too. A curve flattens by its
form; a straight line over the logarithm of the cells does not: the two bracket what cells bring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_POWERS = np.geomspace(0.02, 3.0, 120)
_DRAWS = 2000
_INTERVAL = (2.5, 97.5)
FEWEST_SIZES, _OF_LINE = 4, 3


@dataclass(frozen=True)
class Scored:
    """The losses of all trainings in the same held-out cells.

    Attributes
    ----------
    shares
        float64 [sizes], ascending; the last is 1.
    losses
        float64 [seeds, sizes, cells], nats; the mean of each cell's hidden genes.
    half
        float64 [seeds, cells], of the whole corpus with half the tokens.
    genes
        int64 [cells], hidden genes of each cell.
    """

    shares: np.ndarray
    losses: np.ndarray
    half: np.ndarray
    genes: np.ndarray


@dataclass(frozen=True)
class Saturation:
    """What was drawn and fitted; the first row of each array is of the cells as they are.

    Attributes
    ----------
    curves
        float64 [1 + draws, 3]: a, b, c.
    slopes
        float64 [1 + draws], nats that ten times the cells bring by a straight line over the
        logarithm of the cells, through the three largest sizes.
    losses
        float64 [1 + draws, sizes].
    half
        float64 [1 + draws].
    """

    curves: np.ndarray
    slopes: np.ndarray
    losses: np.ndarray
    half: np.ndarray

    def at(self, share: float) -> np.ndarray:
        """Return float64 [1 + draws], the loss of so many times the corpus."""
        return curve(self.curves, share)

    def gains(self, equal: str) -> dict[str, np.ndarray]:
        """Return float64 [1 + draws] nats of each gain, as docs/formats.md names them.

        With equal epochs, more cells bring more tokens too: of what doubling both brings, the part
        of the tokens is taken away. A doubling is near the sizes that were measured, so it is of
        the line.
        """
        whole, both = self.at(1.0), self.slopes * np.log10(2)
        tokens = self.half - self.losses[:, -1]
        cells = both if equal == "tokens" else both - tokens
        return {
            "ten_times_cells": whole - self.at(10.0),
            "ten_times_cells_line": self.slopes,
            "twice_cells": cells,
            "twice_tokens": tokens,
            "tokens_above_cells": tokens - cells,
        }


def curve(parameters: np.ndarray, share: float | np.ndarray) -> np.ndarray:
    """Return the losses a + b share^-c of parameters [..., 3]."""
    a, b, c = np.moveaxis(parameters, -1, 0)
    return a + b * np.asarray(share, dtype=np.float64) ** -c


def fit_curves(shares: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return float64 [rows, 3]: a >= 0, b >= 0 and c with the least squares for losses [rows, k].

    The power is one of 120 from 0.02 to 3; for each, a and b are solved exactly.
    """
    mean = losses.mean(axis=1)
    best = np.full(len(losses), np.inf)
    found = np.zeros((len(losses), 3))
    for power in _POWERS:
        x = shares**-power
        spread = x - x.mean()
        b = np.maximum(losses @ spread / (spread @ spread), 0)
        a = mean - b * x.mean()
        below = a < 0
        b = np.where(below, losses @ x / (x @ x), b)
        a = np.maximum(a, 0)
        errors = ((losses - a[:, None] - b[:, None] * x) ** 2).sum(axis=1)
        better = errors < best
        best[better] = errors[better]
        found[better] = np.stack([a, b, np.full(len(a), power)], axis=1)[better]
    return found


def saturation(scored: Scored, draws: int = _DRAWS) -> Saturation:
    """Return the curve of the cells as they are, and of `draws` sets of cells drawn from them."""
    rng = np.random.default_rng(0)
    seeds, cells = len(scored.losses), len(scored.genes)
    drawn = rng.multinomial(cells, np.full(cells, 1 / cells), draws)
    weights = np.concatenate([np.ones((1, cells)), drawn]) * scored.genes
    weights /= weights.sum(axis=1, keepdims=True)
    of_seeds = np.full((1 + draws, seeds), 1 / seeds)
    if seeds > 1:
        of_seeds[1:] = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    # Cells without hidden genes have the weight 0, and no loss.
    losses, half = np.nan_to_num(scored.losses), np.nan_to_num(scored.half)
    by_size = np.einsum("ds,skc,dc->dk", of_seeds, losses, weights, optimize=True)
    by_half = np.einsum("ds,sc,dc->d", of_seeds, half, weights, optimize=True)
    decades = np.log10(scored.shares[-_OF_LINE:])
    spread = decades - decades.mean()
    slopes = -by_size[:, -_OF_LINE:] @ spread / (spread @ spread)
    return Saturation(fit_curves(scored.shares, by_size), slopes, by_size, by_half)


def with_interval(values: np.ndarray) -> dict[str, float]:
    """Return the first value, and the 95 % interval of the others, as numbers of JSON."""
    low, high = np.percentile(values[1:], _INTERVAL)
    return {"value": float(values[0]), "low": float(low), "high": float(high)}
