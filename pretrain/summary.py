"""What a run did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.measure.step_loss import StepLoss


@dataclass
class RunSummary:
    """What a run did; `stopped` is True when a signal ended it early.

    `losses` of genes and `cell_losses` are means of each step, 0 where nothing is asked; the counts
    of cells are of all steps of the run but those skipped, those before a resume included (digest:
    see `RankStep`).
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
        """Add what one step served, and its losses."""
        self.losses.append(loss.loss / counts["masked"])
        self.cell_losses.append(loss.cell_loss / counts["scored"])
        if skipped:
            return
        self.cells_seen += counts["cells"]
        self.cells_digest = (self.cells_digest + counts["digest"]) % 2**64
        self.cells_quarantined += counts["quarantined"]

    def cells_record(self) -> dict[str, Any]:
        """Return what checkpoints and metrics say of the cells so far."""
        return {
            "cells_seen": self.cells_seen,
            "cells_digest": f"{self.cells_digest:016x}",
            "cells_quarantined": self.cells_quarantined,
        }
