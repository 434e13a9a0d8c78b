"""All settings of a pretraining run, checked before the run starts.

There is one frozen pydantic model per section (data, masking, batch, optimizer, ...); `RunConfig`
holds them all. `load_config` reads a YAML file, applies the overrides of the command line and
reports all wrong settings together. A value on the command line (``section.field=value``) wins over
the YAML file, and the YAML file wins over the defaults in this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from data_prep.running.redact import without_credentials
from pretrain.settings.architecture import take_architecture
from pretrain.settings.model_settings import ModelConfig, Section, filled_in
from pretrain.settings.settings_text import apply_override, explain

CONFIG_FOLDER = Path(__file__).parent / "configs"


class DataConfig(Section):
    """The source of the training cells, and what happens when a part of it is damaged."""

    shards: str = Field(description="folder made by `geneloom prepare`, or its URL")
    cache: Path | None = Field(
        default=None, description="folder for a local copy of what is read from a URL"
    )
    share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="of the training cells that the run uses, chosen by hash: those of a smaller "
        "share are among them",
    )
    on_damage: Literal["stop", "quarantine"] = Field(
        default="stop",
        description="a block with a wrong checksum: stop, or leave its cells out and count them",
    )
    num_workers: int = Field(
        default=1,
        ge=0,
        description="background threads per rank that read and mask; changes no batch",
    )

    @field_validator("shards", mode="before")
    @classmethod
    def _text_of_a_path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _url_has_a_cache(self) -> DataConfig:
        if "://" in self.shards and self.cache is None:
            raise ValueError("shards is a URL, read through a local copy: give data.cache=FOLDER")
        return self


class MaskingConfig(Section):
    """The masking rule: which genes are hidden, and what replaces them (BERT's 80/10/10 rule)."""

    probability: float = Field(default=0.15, gt=0, lt=1, description="share of a cell's genes")
    mask_share: float = Field(default=0.8, ge=0, le=1, description="of the hidden: becomes <mask>")
    random_share: float = Field(
        default=0.1, ge=0, le=1, description="of the hidden: becomes another gene"
    )
    hidden: Literal["mask", "remove"] = Field(
        default="mask",
        description="mask: something stands in their places; remove: they are taken out of the "
        "cell, with objective.gene_weight=0 only",
    )
    subset: int | None = Field(
        default=None,
        ge=2,
        description="a cell is shown as so many of its genes, drawn anew in each epoch, in the "
        "order of their ranks; they, not the whole cell, count in the token budgets",
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> MaskingConfig:
        if self.mask_share + self.random_share > 1:
            raise ValueError("mask_share + random_share exceed 1")
        fields = type(self).model_fields
        given = [k for k in ("mask_share", "random_share") if getattr(self, k) != fields[k].default]
        if given and self.hidden == "remove":
            raise ValueError(f"{', '.join(given)}: with hidden=remove nothing stands in; leave out")
        return self

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the weights. `hidden` and `subset` at their defaults are
        what older versions did, whose records do not name them."""
        newer = self.model_dump(include={"hidden", "subset"}, exclude_defaults=True)
        return self.model_dump(exclude={"hidden", "subset"}) | newer


class ObjectiveConfig(Section):
    """The training objective: the loss of single genes, the loss of whole cells, or both.

    The gene objective predicts each hidden gene at its own position. The cell objective predicts
    all hidden genes of a cell at once from the mean state of its visible genes. This mean is the
    cell embedding that is used after training, so the cell objective trains it directly.
    """

    gene_weight: float = Field(
        default=1.0,
        ge=0,
        description="of the mean loss of hidden genes; 0: the cell objective alone, held-out cells "
        "are still asked for each gene",
    )
    cell_weight: float = Field(
        default=0.0, ge=0, description="of the mean loss of cells; 0: no cell objective"
    )
    prior: Literal["none", "arithmetic"] = Field(
        default="none",
        description="arithmetic: what counting tells of a hidden gene is added to the head's "
        "logits, so that the network learns what counting does not tell",
    )

    @model_validator(mode="after")
    def _something_is_learned(self) -> ObjectiveConfig:
        if self.gene_weight == 0 == self.cell_weight:
            raise ValueError(
                "gene_weight and cell_weight are both 0: nothing would be learned; give one of "
                "them a weight above 0"
            )
        if self.prior != "none" and self.gene_weight == 0:
            raise ValueError(
                f"prior={self.prior}: belongs to the loss of single genes, which gene_weight=0 "
                "leaves out; leave one of them out"
            )
        return self


class BatchConfig(Section):
    """The batch size, given as budgets of padded tokens.

    A global batch holds tokens_per_step // bucket length cells, on any number of ranks.
    """

    tokens_per_step: int = Field(
        default=163_840, ge=64, description="padded tokens of one optimizer step"
    )
    tokens_per_micro_batch: int = Field(
        default=16_384,
        ge=64,
        description="padded tokens of one forward pass on one rank; changes last bits, and the "
        "noise of dropout",
    )


# These defaults were measured on 15,512 real cells at width 128, 4 layers, 8,192 tokens a step.
_MUON_DEFAULTS = {
    "muon_learning_rate": 0.02,
    "muon_weight_decay": 0.01,
    "muon_momentum": 0.95,
    "muon_newton_schulz_steps": 5,
}


class OptimConfig(Section):
    """The optimizer and its learning rate schedule: AdamW, or Muon together with AdamW.

    With Muon, the weight matrices inside the layers are trained by Muon and all other parameters by
    AdamW. Learning rates are functions of the global step. The defaults are the AdamW settings of
    Geneformer V1.
    """

    kind: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: the matrices inside the layers are orthogonalised (settings muon_...); "
        "embeddings, head, norms and biases have AdamW (all other settings)",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="peak")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="of the learning rate from the peak to the last step"
    )
    warmup_steps: int = Field(default=10_000, ge=0, description="optimizer steps up to the peak")
    weight_decay: float = Field(default=0.001, ge=0, description="not on biases and LayerNorm")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment, a step")
    beta2: float = Field(
        default=0.999, ge=0, lt=1, description="decay of the second moment, a step"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: float = Field(default=1.0, ge=0, description="global norm; 0: no clipping")
    muon_learning_rate: float | None = Field(
        default=None, gt=0, description="Muon's peak; default with kind=muon: 0.02"
    )
    muon_schedule: Literal["linear", "cosine", "constant"] | None = Field(
        default=None, description="of Muon's rate; default with kind=muon: as schedule"
    )
    muon_warmup_steps: int | None = Field(
        default=None, ge=0, description="up to Muon's peak; default with kind=muon: as warmup_steps"
    )
    muon_weight_decay: float | None = Field(
        default=None, ge=0, description="of Muon's matrices; default with kind=muon: 0.01"
    )
    muon_momentum: float | None = Field(
        default=None, ge=0, lt=1, description="Nesterov's; default with kind=muon: 0.95"
    )
    muon_newton_schulz_steps: int | None = Field(
        default=None, ge=1, le=20,
        description="towards an orthogonal matrix; default with kind=muon: 5",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _muon_defaults(cls, values: Any) -> Any:
        """Fill in the default settings of Muon, so that the record of a run names all of them."""
        if not isinstance(values, dict) or values.get("kind") != "muon":
            return values
        of_adamw = {k: cls.model_fields[k].default for k in ("schedule", "warmup_steps")} | values
        defaults = _MUON_DEFAULTS | {f"muon_{k}": of_adamw[k] for k in ("schedule", "warmup_steps")}
        return filled_in(values, defaults)

    @model_validator(mode="after")
    def _muon_settings_with_muon(self) -> OptimConfig:
        names = [n for n in type(self).model_fields if n.startswith("muon_")]
        given = [n for n in names if getattr(self, n) is not None]
        if self.kind != "muon" and given:
            raise ValueError(f"{', '.join(given)}: belong to kind=muon, kind is {self.kind}")
        return self


class RunSection(Section):
    """The settings of one run: its folder, length, numerical precision and time limits."""

    out: Path = Field(description="run folder")
    seed: int = Field(default=0, ge=0, description="of weights, order of cells, masks and dropout")
    epochs: int = Field(default=3, ge=1, description="how often each cell is seen")
    max_steps: int | None = Field(
        default=None, ge=1, description="stop earlier; the decay ends here too"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of the arithmetic; weights, moments and sums are kept in fp32; auto: bf16 on "
        "GPUs, fp32 elsewhere",
    )
    tf32: bool = Field(
        default=False, description="on GPUs, products of fp32 matrices with 10 bits of mantissa"
    )
    packing: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="cells end to end, without padding; auto: on GPUs, in bf16, if heads are a "
        "multiple of 8 wide, without CUDA graphs; no loss depends on it",
    )
    deepspeed: str = Field(default="zero1", description="file of deepspeed_configs/, or a path")
    log_every_steps: int = Field(default=10, ge=1, description="optimizer steps of a logged line")
    threads: int | None = Field(
        default=None, ge=1, description="torch threads per rank on CPU; changes last bits"
    )
    deterministic: bool = Field(
        default=False,
        description="on GPUs the same bits each time on as many ranks, slower (NCCL_ALGO=Ring and "
        "NCCL_PROTO=Simple where they are not set); on a CPU they always are",
    )
    compile: Literal["off", "default", "reduce-overhead"] = Field(
        default="off",
        description="torch.compile of the layers, a graph for each shape of a micro-batch, of "
        "packed cells one for all; reduce-overhead: with CUDA graphs, if a step has one "
        "micro-batch",
    )
    on_not_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a loss or gradient that is infinite or no number: stop, or leave the step's "
        "update out on all ranks",
    )
    max_skipped_steps: int = Field(
        default=3, ge=1, description="with on_not_finite=skip: as many are left out, then it stops"
    )
    skip_window_steps: int = Field(
        default=1000, ge=1, description="max_skipped_steps counts within so many steps"
    )
    collective_timeout_s: int = Field(
        default=600, ge=5, description="a hung collective fails after this"
    )
    heartbeat_s: float = Field(
        default=20,
        ge=0,
        description="a rank without a sign of life for this long ends the run, however long its "
        "steps are; a thread gives one a second; 0: nobody watches",
    )
    stall_s: float | None = Field(
        default=None,
        ge=0,
        description="a rank that stays in one step for this long ends the run, and all say where "
        "they are; 0: never; default: 0.8 x collective_timeout_s",
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _off_of_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value

    @property
    def stall_limit_s(self) -> float:
        """Return after how many seconds in one step a rank counts as stalled.

        The default is shorter than the timeout of a collective operation, because an error of that
        timeout would not say which rank the others were waiting for.
        """
        return 0.8 * self.collective_timeout_s if self.stall_s is None else self.stall_s

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the whole run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)


class EvaluationConfig(Section):
    """The evaluation on held-out cells, whose masks stay the same for the whole run."""

    every_steps: int = Field(default=1000, ge=1, description="and after the last step")
    at_start: bool = Field(
        default=False, description="before the first step too: what first weights and prior know"
    )
    max_cells: int = Field(default=2000, ge=1, description="held-out cells that are scored")
    baseline_cells: int = Field(
        default=50_000, ge=1, description="train cells the baselines are made of"
    )
    svd_cells: int = Field(
        default=50_000,
        ge=0,
        description="train cells of the corpus SVD that is stored with the model, read before the "
        "first step; 0: none",
    )
    expect_below_baseline_by: float = Field(
        default=0.25, gt=0, le=1, description="share of the steps; above them by then: a warning"
    )


class CheckpointConfig(Section):
    """When checkpoints are saved, and which of them are kept."""

    every_steps: int = Field(
        default=1000, ge=1, description="and after the last step, and on a signal"
    )
    keep: int = Field(default=2, ge=1, description="newest complete checkpoints that stay")
    keep_every_steps: int | None = Field(
        default=None, ge=1, description="checkpoints of multiples of this stay for ever"
    )
    keep_best: int = Field(
        default=0, ge=0, description="those with the lowest held-out losses that stay too"
    )

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> CheckpointConfig:
        if self.keep_every_steps and self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"keep_every_steps {self.keep_every_steps} is no multiple of every_steps "
                f"{self.every_steps}: those checkpoints would not exist"
            )
        return self


class RunConfig(Section):
    """All settings that a run depends on."""

    data: DataConfig
    run: RunSection
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _best_ones_are_evaluated(self) -> RunConfig:
        if self.checkpoint.keep_best and self.evaluation.every_steps % self.checkpoint.every_steps:
            raise ValueError(
                f"checkpoint.keep_best {self.checkpoint.keep_best}: evaluation.every_steps "
                f"{self.evaluation.every_steps} is no multiple of checkpoint.every_steps "
                f"{self.checkpoint.every_steps}: a checkpoint must have a held-out loss of its step"
            )
        return self

    @model_validator(mode="after")
    def _removed_genes_are_not_asked(self) -> RunConfig:
        if self.masking.hidden == "remove" and self.objective.gene_weight:
            raise ValueError(
                "masking.hidden=remove: a gene that is taken out of its cell has no place at which "
                "it could be asked for; give objective.gene_weight=0 and an "
                "objective.cell_weight, or masking.hidden=mask"
            )
        if self.masking.subset and self.objective.prior != "none":
            raise ValueError(
                f"objective.prior={self.objective.prior}: is counted in whole cells, where "
                "neighbours are nearer than in a subset; leave masking.subset out, or give "
                "objective.prior=none"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """Return the settings that determine the weights, as one flat dict.

        A resumed run must have the same values as the run that it continues.
        """
        decisive = {
            "model": self.model.decisive(),
            "masking": self.masking.decisive(),
            # Older versions had these defaults, and their records do not name these settings.
            "data": self.data.model_dump(include={"share"}, exclude_defaults=True),
            "objective": self.objective.model_dump(exclude_defaults=True),
            "batch": self.batch.model_dump(include={"tokens_per_step"}),
            # A value of None means that the setting does not apply; older records do not contain
            # it.
            "optim": self.optim.model_dump(exclude_none=True),
            "run": self.run.model_dump(include={"seed", "epochs", "max_steps", "precision"})
            # Older versions used the default of tf32, and their records do not name it.
            | self.run.model_dump(include={"tf32"}, exclude_defaults=True),
        }
        return {f"{s}.{k}": v for s, fields in decisive.items() for k, v in fields.items()}

    def to_yaml(self) -> str:
        """Return all settings, defaults included, as YAML; URLs without their credentials."""
        found = self.model_dump(mode="json")
        found["data"]["shards"] = without_credentials(found["data"]["shards"])
        return yaml.safe_dump(found, sort_keys=False)


def load_config(path: str | Path, overrides: list[str] = []) -> RunConfig:  # noqa: B006
    """Return the run configuration of a YAML file after the overrides are applied.

    Parameters
    ----------
    path
        A YAML file, or the name of one in ``pretrain/configs`` (e.g. ``geneformer_v1_6l``).
    overrides
        Settings as ``section.field=value``; each value is read as YAML.

    Raises
    ------
    ValueError
        The message lists all problems together: unknown settings with the nearest known name, wrong
        values, missing required settings, an architecture that differs from that of
        ``model.init_from``.
    """
    file = _find_config(path)
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not readable as YAML ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold sections (data, model, ...), found {content!r}")
    for override in overrides:
        apply_override(content, override)
    problems = take_architecture(content)
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        problems += [explain(e, RunConfig) for e in error.errors()]
        raise ValueError(f"{file}: " + "; ".join(problems)) from error
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    return config


def settings_to_resume_from(folder: str | Path | None) -> list[str]:
    """Return the two settings that the option ``--resume-from FOLDER`` stands for."""
    return [f"model.init_from={folder}", "model.init_moments=true"] if folder else []


def _find_config(path: str | Path) -> Path:
    named = CONFIG_FOLDER / f"{path}.yaml"
    if Path(path).is_file():
        return Path(path)
    if named.is_file():
        return named
    known = sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml"))
    raise ValueError(f"--config {path}: no such file, and none of the supplied ones: {known}")
