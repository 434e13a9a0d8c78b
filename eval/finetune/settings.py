"""How an encoder is fine-tuned and scored: what the settings are called, mean and default to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eval.options import Bf16Option, DeviceOption, VocabOption

# What the search for settings looks for (`eval.finetune.search`).
SEARCHED = (
    "learning_rate", "weight_decay", "freeze_layers", "dropout", "epochs", "layer_decay"
)  # fmt: skip
_CHANGE_NOTHING = (("layer_decay", 1.0),)
# Rules of a training that are no settings: they came later, and results from before are others.
_DROPOUT_RULE, _START_RULE = {"dropout_around": "mean"}, {"may_keep_start": True}
_PENALTY_RULE = {"penalty": "by whole groups, or 1"}
_GENES_RULE = {"genes": "count once"}


@dataclass(frozen=True)
class FinetuneSettings:
    """How a classifier is trained; the same for pretrained and random weights.

    Attributes
    ----------
    epochs
        Passes over the labelled cells.
    steps
        0: as `epochs` say. A few hundred cells are not learnt in five passes.
    start
        ``probe``: of a regression on the frozen states (`eval.finetune.probe_start`).
    features
        What a head of cells reads: the ``mean`` of the last layer, or the cell ``state``, where the
        model has one (its counted part stays, its learned part follows the encoder). ``auto``:
        whichever tells held-out training cells better in a probe; the state where there is nothing
        to choose by, the mean where the head begins at random.
    learning_rate
        Of AdamW; linear warm-up over `warmup_share` of all steps, linear decay to 0. Geneformer:
        5e-5.
    head_learning_rate
        None: as `learning_rate`.
    layer_decay
        The rate of the k-th layer from the top (k = 0: the top one) is `learning_rate` times this
        to the power k, that of the embeddings below all layers of the encoder; heads have theirs.
    batch_cells
        Cells of one optimizer step, over all ranks.
    freeze_layers
        The embeddings too; 0 trains everything.
    weight_decay, dropout
        Of AdamW; before each head, around the mean state where training begins at the probe.
    token_budget
        Padded tokens of one forward pass; no result depends on it but by rounding.
    bf16
        Weights stay float32.
    lora_rank, lora_alpha
        Adapters of queries and values (in a ModernBERT of keys too), beside the heads.
    patience
        The best weights are returned, perhaps those of the probe that training began at; of all
        epochs the last. Only where the validation cells have
        `eval.scores.splits.FEWEST_VALIDATION_CELLS` of each class.
    class_weights
        Inverse frequency, since macro-F1 is the headline.
    """

    epochs: Annotated[int, typer.Option(min=1)] = 5
    steps: Annotated[int, typer.Option(min=0, help="at least, in more epochs if need be")] = 0
    start: Annotated[
        Literal["probe", "random"],
        typer.Option(help="head's first weights: probe (of the frozen encoder) or random"),
    ] = "random"
    features: Annotated[
        Literal["auto", "state", "mean"],
        typer.Option(help="what a head of cells reads: state, mean, or the better one (auto)"),
    ] = "auto"
    learning_rate: Annotated[float, typer.Option(help="peak, of the encoder")] = 2e-4
    head_learning_rate: Annotated[float | None, typer.Option(help="peak, of the head")] = None
    layer_decay: Annotated[
        float, typer.Option(help="rate of a layer, as a share of that of the layer above it")
    ] = 1.0
    batch_cells: Annotated[int, typer.Option(min=1)] = 16
    freeze_layers: Annotated[int, typer.Option(min=0, help="lowest layers not trained")] = 0
    weight_decay: float = 0.001
    dropout: float = 0.1
    token_budget: int = 16_384
    bf16: Bf16Option = False
    device: str = "cpu"
    warmup_share: float = 0.1
    lora_rank: Annotated[
        int, typer.Option(min=0, help="train low-rank adapters instead of the encoder; 0: off")
    ] = 0
    lora_alpha: int = 16
    patience: Annotated[
        int, typer.Option(min=0, help="epochs without a better validation loss; 0: all epochs")
    ] = 0
    class_weights: Annotated[bool, typer.Option(help="classes weigh alike in the loss")] = True

    def __post_init__(self) -> None:
        least = {
            "epochs": 1, "steps": 0, "batch_cells": 1, "freeze_layers": 0, "weight_decay": 0,
            "token_budget": 1, "lora_rank": 0, "lora_alpha": 1, "patience": 0, "warmup_share": 0,
            "dropout": 0,
        }  # fmt: skip
        wrong = [f"{k}={getattr(self, k)} (at least {v})" for k, v in least.items()
                 if not getattr(self, k) >= v]  # fmt: skip
        if not self.learning_rate > 0:
            wrong.append(f"learning_rate={self.learning_rate} (above 0)")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            wrong.append(f"head_learning_rate={self.head_learning_rate} (above 0)")
        if not 0 < self.layer_decay <= 1:
            wrong.append(f"layer_decay={self.layer_decay} (above 0, at most 1)")
        if self.start not in ("probe", "random"):
            wrong.append(f"start={self.start} (probe or random)")
        if self.features not in ("auto", "state", "mean"):
            wrong.append(f"features={self.features} (auto, state or mean)")
        wrong += [f"{k}={getattr(self, k)} (below 1)" for k in ("warmup_share", "dropout")
                  if not getattr(self, k) < 1]  # fmt: skip
        if self.device not in ("cpu", "cuda"):
            wrong.append(f"device={self.device} (cpu or cuda)")
        if wrong:
            raise ValueError("fine-tuning settings: " + ", ".join(wrong))

    def deciding(self) -> dict[str, Any]:
        """Return what decides a training's result, as JSON, for keys of what is kept.

        The device is left out, for it changes only the last bits, and so are settings that came
        later, where they change nothing: a key that was written before them stays. So are the
        features, for what a head reads depends on the model too: see `reading`.
        """
        return {
            k: v
            for k, v in asdict(self).items()
            if k not in ("device", "features") and (k, v) not in _CHANGE_NOTHING
        }

    def reading(self, has_state: bool) -> dict[str, Any]:
        """Return what heads of cells read, as JSON for keys, of a model with a cell state or none.

        Heads of means have the keys that they always had.
        """
        if not has_state or not self.may_read_state:
            return {}
        return {"reads": "cell state" if self.features == "state" else "chosen"}

    @property
    def may_read_state(self) -> bool:
        """Whether heads of cells may read a model's cell state."""
        return self.features == "state" or (self.features == "auto" and self.start == "probe")

    @property
    def of_training(self) -> dict[str, Any]:
        """What else decides a training: rules that are no settings, where they change a number."""
        around_mean = self.start == "probe" and self.dropout > 0
        return (_DROPOUT_RULE if around_mean else {}) | (_START_RULE if self.may_keep_start else {})

    @property
    def of_training_on_cells(self) -> dict[str, Any]:
        """As `of_training`; the penalties of probes of genes are chosen as they were before."""
        return self.of_training | (_PENALTY_RULE if self.start == "probe" else {})

    @property
    def of_training_on_genes(self) -> dict[str, Any]:
        """As `of_training`, with what heads of genes have of their own."""
        return self.of_training | (_GENES_RULE if self.genes_count_once else {})

    @property
    def genes_count_once(self) -> bool:
        """Whether each gene weighs the same, however many cells hold it, as scores count genes.

        Heads that begin at random are trained as published, where each occurrence weighs the same.
        """
        return self.start == "probe"

    @property
    def may_keep_start(self) -> bool:
        """Whether validation may say that the probe was better than all that came after it."""
        return self.start == "probe" and self.patience > 0


# What cells of a task of one's own are trained with: few cells in many steps, from a good start.
OF_CELLS = FinetuneSettings(
    steps=300, start="probe", learning_rate=3e-4, head_learning_rate=1e-3, batch_cells=8
)

# Genes: few labels with many occurrences, so that a step needs few cells.
OF_GENES = FinetuneSettings(
    steps=300, start="probe", learning_rate=3e-4, head_learning_rate=1e-3, batch_cells=4
)
_FEWEST_FOLDS = 3


@dataclass(frozen=True)
class FinetuneOptions:
    """How cells are classified and scored; the help of an option says what it is.

    `save_head`: that classifier is trained once more, on all labelled cells (at most
    `max_train_per_class`): the scores say how well such a one does. `settings.device` is what
    `device` means here; on several ranks it is that of the rank.
    """

    donor: Annotated[str | None, typer.Option(help="column of obs; donors stay whole")] = None
    seeds: Annotated[int, typer.Option(help="splits and trainings, at least 3")] = 3
    settings: FinetuneSettings = OF_CELLS
    max_train_per_class: Annotated[
        int | None, typer.Option(min=1, help="few-shot; default all")
    ] = None
    max_test_per_class: Annotated[int | None, typer.Option(min=1, help="default all")] = None
    save_head: Annotated[
        Path | None, typer.Option(help="new folder: a classifier of all labelled cells")
    ] = None
    vocabulary: VocabOption = None
    device: DeviceOption = "auto"


@dataclass(frozen=True)
class FinetuneGenesOptions:
    """How genes are classified and scored; the help of an option says what it is.

    `save_head`: that classifier is trained once more, on all labelled genes: the scores say how
    well such a one does. `settings.device` is what `device` means here; on several ranks it is that
    of the rank.
    """

    folds: Annotated[int, typer.Option(help="over genes, at least 3")] = 5
    seeds: Annotated[int, typer.Option(min=1, help="times that genes are divided anew")] = 1
    settings: FinetuneSettings = OF_GENES
    positive: Annotated[
        str | None,
        typer.Option(help="class that is looked for among all others"),
    ] = None
    max_cells: Annotated[
        int | None, typer.Option(min=10, help="cells that genes are looked at in, drawn")
    ] = 120
    save_head: Annotated[
        Path | None, typer.Option(help="new folder: a classifier of all labelled genes")
    ] = None
    gene_names: Annotated[
        Path | None, typer.Option(help="symbol -> gene id (JSON), for tables and cells of symbols")
    ] = None
    vocabulary: VocabOption = None
    device: DeviceOption = "auto"

    def __post_init__(self) -> None:
        if self.folds < _FEWEST_FOLDS:
            raise ValueError(
                f"--folds {self.folds}: at least {_FEWEST_FOLDS}, or there is no interval to report"
            )
        if self.settings.patience:
            raise ValueError(
                f"--patience {self.settings.patience}: early stopping needs genes of its own, and "
                "labelled genes are too few to spare some; leave it out"
            )
