"""All settings of a simulation, checked before it starts; docs/simulator.md has their sources.

`make_settings` makes them and reports all wrong values together. Standard deviations and effects
are on the scale of natural logarithms of expression.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class SimulationSettings(BaseModel):
    """The settings of a simulation; together with the seed they determine every byte."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cells: int = Field(default=2_000, ge=1, description="cells without a perturbation")
    genes: int = Field(default=1_000, ge=2, description="the most expressed ones of a genome")
    tfs: int = Field(default=50, ge=1, description="genes that regulate others")
    types: int = Field(default=5, ge=1, description="cell types, leaves and nodes of one tree")
    donors: int = Field(default=4, ge=1, description="people the cells are of")
    batches: int = Field(default=2, ge=1, description="each with cells of all donors")
    depth: float | None = Field(
        default=None, gt=0, description="median counts of a cell; default as in PBMC"
    )
    seed: int = Field(default=0, ge=0, description="the same seed gives the same bytes")

    wiring: Literal["hubs", "opposed"] = Field(
        default="hubs",
        description="opposed: each gene has an activator and a repressor, equally strong; TFs none",
    )
    regulators_per_gene: float = Field(
        default=3.0, gt=0, description="mean, but for hubs cut short"
    )
    # share of regulations that raise their target
    activator_share: float = Field(default=0.7, ge=0, le=1)
    mean_effect: float = Field(default=1.0, gt=0, description="of a TF going from idle to full")
    switched_share: float = Field(
        default=0.35, ge=0, le=1, description="TFs switched between a type and its parent"
    )
    program_share: float = Field(
        default=0.0, ge=0, le=1, description="TFs of a type that follow one switch, on or off"
    )
    # level of a TF that is on in a type; one that is off has minus that
    switch_level: float = Field(default=1.2, gt=0)
    mature_share: float = Field(
        default=0.6, ge=0, le=1, description="cells at the end of their branch, not on the way"
    )
    tf_noise_sd: float = Field(default=0.5, ge=0, description="of a TF, cell by cell")
    basal_sd: float = Field(default=2.14, ge=0, description="of mean expression over all genes")
    dispersion: float = Field(
        default=0.5, gt=0, description="median over genes with a mean of one count"
    )
    # standard deviation of the logarithm of the dispersion, over genes
    dispersion_sd: float = Field(default=1.0, ge=0)
    library_sd: float = Field(default=0.43, ge=0, description="of counts per cell")
    donor_sd: float = Field(default=0.17, ge=0, description="of a gene between donors")
    donor_tf_sd: float = Field(default=0.15, ge=0, description="of a TF between donors")
    batch_sd: float = Field(default=0.15, ge=0, description="of a gene between batches")
    batch_depth_sd: float = Field(default=0.3, ge=0, description="of depth between batches")

    perturb_cells: int = Field(
        default=200, ge=1, description="at most so many cells of origin, evenly over the types"
    )
    # factor by which the expression of an overexpressed gene rises
    overexpression_fold: float = Field(default=8.0, gt=1)

    @model_validator(mode="after")
    def _leaves_genes_to_regulate(self) -> SimulationSettings:
        if self.tfs >= self.genes:
            raise ValueError(
                f"tfs={self.tfs} of genes={self.genes}: there must be more genes than "
                "transcription factors"
            )
        return self


def make_settings(**values: Any) -> SimulationSettings:
    """Return the settings.

    Raises
    ------
    ValueError
        A name is unknown or a value is out of its range; the message lists all problems.
    """
    try:
        return SimulationSettings(**values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            text = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{name}={problem['input']}: {text}" if name else text)
        known = ", ".join(SimulationSettings.model_fields)
        unknown = any(p["type"] == "extra_forbidden" for p in error.errors())
        raise ValueError(
            "simulation settings: " + "; ".join(problems) + (f" (known: {known})" * unknown)
        ) from error
