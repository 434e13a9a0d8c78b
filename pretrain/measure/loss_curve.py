"""The curve of held-out losses of a run, and what is remarked of it."""

from __future__ import annotations

import logging
import math
from typing import Any

from pretrain.counting.baselines import ARITHMETIC

# Cells and masks are always the same, so a loss this far above the lowest one is no noise.
_TOLERANCE = 0.02


def heldout_history(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss) of the evaluations in a run's records; a loss of None is infinite."""
    heldout = (m for m in records if m["kind"] == "heldout")
    return [(m["step"], math.inf if m["loss"] is None else m["loss"]) for m in heldout]


def curve_remark(
    history: list[tuple[int, float]],
    baselines: dict[str, float],
    total_steps: int,
    expected_by: float,
) -> tuple[int, str] | None:
    """Return (logging level, text) if something new begins at the last evaluation, else None.

    A state that continues is not reported again. The remark is a function of the curve alone, so a
    resumed run makes the same remarks.

    Parameters
    ----------
    history
        (step, held-out loss) of all evaluations, in order; at least one.
    baselines
        Held-out losses that the model should beat.
    expected_by
        Share of `total_steps` after which a loss that was never below them causes a warning.
    """
    step = history[-1][0]
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in history]
    bar, best, known, unknown = _bar(baselines)
    is_below = [loss < bar for loss in losses]
    if is_below[-1] and not any(is_below[:-1]):
        return logging.INFO, (
            f"step {step}: held-out loss {losses[-1]:.4f} is below {best} for the first time, by "
            f"{bar - losses[-1]:.4f}; {known}"
        )
    warnings = []
    is_due = [at >= expected_by * total_steps for at, _ in history]
    if not any(is_below) and is_due[-1] and not any(is_due[:-1]):
        warnings.append(
            f"after {step / total_steps:.0%} of the steps the held-out loss {losses[-1]:.4f} has "
            f"not been below {best}: {unknown}. Look at "
            "optim.learning_rate, optim.warmup_steps and the number of training cells"
        )
    if not is_below[-1] and any(is_below[-2:]):
        warnings.append(f"the held-out loss has risen to {losses[-1]:.4f}, above {best} again")
    if _is_diverging(losses) and not _is_diverging(losses[:-1]):
        lowest = min(range(len(losses)), key=losses.__getitem__)
        warnings.append(
            f"the held-out loss {losses[-1]:.4f} is {losses[-1] / losses[lowest] - 1:.1%} above "
            f"its lowest ({losses[lowest]:.4f} in step {history[lowest][0]}): the run diverges or "
            "overfits"
        )
    return (logging.WARNING, f"step {step}: " + "; ".join(warnings)) if warnings else None


def _bar(baselines: dict[str, float]) -> tuple[float, str, str, str]:
    """Return the loss to beat, its name, and what a loss below or above it means."""
    if ARITHMETIC in baselines:
        bar = baselines[ARITHMETIC]
        return (
            bar,
            f"counting ({ARITHMETIC}, {bar:.4f})",
            "from here on the model knows more than medians and frequencies tell",
            "the model has learned less than counting tells, without learning",
        )
    name, bar = min(baselines.items(), key=lambda item: item[1])
    return (
        bar,
        f"the best baseline ({name}, {bar:.4f})",
        "from here on the model uses more than a gene's own rank",
        "the model knows no more than each gene's rank",
    )


def _is_diverging(losses: list[float]) -> bool:
    return len(losses) > 0 and losses[-1] > min(losses) * (1 + _TOLERANCE)
