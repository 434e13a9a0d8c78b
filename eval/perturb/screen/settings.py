"""The settings of a screen, and the model and cells that it uses."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.genes.vocabulary import Vocabulary
from eval.perturb.screen.cells_and_genes import (
    CellChoice,
    GeneChoice,
    GeneNames,
    ScreenCells,
)
from eval.perturb.screen.compare_copies import (
    Engine,
    EngineSettings,
)
from eval.perturb.screen.edits import Edit


@dataclass(frozen=True)
class Screen:
    """All settings that determine the results of a screen, except the cells and the model.

    Attributes
    ----------
    gene_shifts
        Also compute the shift of every other gene, summed by donor.
    top
        Compute only so many genes, chosen by an estimate (`eval.perturb.screen.estimate`); 0: all
        of them.
    """

    edit: Edit
    genes: GeneChoice
    cells: CellChoice
    engine: EngineSettings
    gene_shifts: bool = False
    top: int = 0

    def num_computed(self, num_sets: int) -> int:
        """Return how many of `num_sets` sets are computed exactly."""
        return min(num_sets, self.top) if self.top else num_sets

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        found = asdict(self.edit) | asdict(self.genes) | asdict(self.cells)
        found |= self.engine.deciding()
        return json.loads(json.dumps(found | {"gene_shifts": self.gene_shifts, "top": self.top}))


@dataclass(frozen=True)
class Subject:
    """A model, and cells encoded as its tokens."""

    engine: Engine
    vocabulary: Vocabulary
    digest: str
    cells: ScreenCells
    names: GeneNames
