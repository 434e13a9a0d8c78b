"""The summary of a run: its steps, losses and counts of cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.measure.step_loss import StepLoss


@dataclass
class RunSummary:
    """The results of one run; `stopped` is True if a signal ended it early.

    `losses` (of genes) and `cell_losses` are the means of each step, 0 if that objective is off.
    The counts of cells are over all steps of the run except the skipped ones, including the steps
    before a resume (digest: see `RankStep`).
    """

    first_step: int
    last_step: int
    total_steps: int
    losses: list[float] = field(default_factory=list)
    cell_losses: list[float] = field(default_factory=list)
    cells_seen: int = 0
    cells_digest: int = 0
    cells_quarantined: int = 0
    heldout: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False

    def add(self, counts: dict[str, int], loss: StepLoss, skipped: bool) -> None:
        """Add the counts and losses of one step."""
        self.losses.append(loss.loss / counts["masked"])
        self.cell_losses.append(loss.cell_loss / counts["scored"])
        if skipped:
            return
        self.cells_seen += counts["cells"]
        self.cells_digest = (self.cells_digest + counts["digest"]) % 2**64
        self.cells_quarantined += counts["quarantined"]

    def cells_record(self) -> dict[str, Any]:
        """Return the counts of cells so far, for checkpoints and metrics."""
        return {
            "cells_seen": self.cells_seen,
            "cells_digest": f"{self.cells_digest:016x}",
            "cells_quarantined": self.cells_quarantined,
        }
