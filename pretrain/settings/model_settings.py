"""Settings of the model: its architecture, sizes, and initial weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain.settings.architecture import BERT, MODERNBERT


class Section(BaseModel):
    """A section of the settings; it is frozen and refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def filled_in(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which absent or None values are replaced by defaults that are not None."""
    return given | {k: v for k, v in defaults.items() if given.get(k) is None and v is not None}


def _unlike_bert(default: Any, modernbert: Any, description: str, **limits: Any) -> Any:
    """Return a field whose default depends on the architecture; None: there is no such setting."""
    extra = {MODERNBERT: modernbert}
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


class ModelConfig(Section):
    """The encoder, with tied embeddings.

    The architecture `bert` has post-norm and learned positions; its defaults are those of V1 with 6
    layers (Geneformer, Nature 2023). The architecture `modernbert` has pre-norm, rotary positions,
    gated feed-forward parts, and layers that attend to neighbours only (Warner et al. 2024). With
    `init_from`, the folder's config.json decides architecture and sizes.
    """

    architecture: Literal["bert", "modernbert"] = Field(
        default="bert", description="Hugging Face's model whose weights and config these are"
    )
    num_layers: int = Field(default=6, ge=1, description="encoder layers")
    hidden_size: int = Field(default=256, ge=8, description="width of a token's state")
    num_heads: int = Field(default=4, ge=1, description="attention heads of a layer; divides width")
    intermediate_size: int = Field(default=512, ge=8, description="width of the feed-forward part")
    hidden_dropout: float = _unlike_bert(
        0.02, 0.0, "share of states set to zero in training", ge=0, lt=1
    )
    attention_dropout: float = _unlike_bert(
        0.02, 0.0, "share of attention weights set to zero in training; bert only", ge=0, lt=1
    )
    activation: Literal["relu", "gelu"] = _unlike_bert("relu", "gelu", "of the feed-forward part")
    initializer_range: float = Field(
        default=0.02, gt=0, description="standard deviation of random weights"
    )
    layer_norm_eps: float = _unlike_bert(1e-12, 1e-5, "added to the variance", gt=0)
    local_window: int | None = _unlike_bert(
        None,
        32,
        "places that a place sees in a local layer, half of them on each side; modernbert only",
        ge=2,
        multiple_of=2,
    )
    global_every: int | None = _unlike_bert(
        None,
        3,
        "the first layer and every so many sees the whole cell, the others are local; modernbert "
        "only",
        ge=1,
    )
    rotary_base: float | None = _unlike_bert(
        None, 160_000.0, "of the positions of global layers; modernbert only", gt=1
    )
    local_rotary_base: float | None = _unlike_bert(
        None, 10_000.0, "of the positions of local layers; modernbert only", gt=1
    )
    init_genes: Literal["random", "counted"] = Field(
        default="random",
        description="what the weights of genes are before the first step; counted: what counting "
        "the training cells tells of them",
    )
    counted: tuple[Literal["medians", "frequency", "svd"], ...] = Field(
        default=("medians", "frequency", "svd"),
        min_length=1,
        description="parts of init_genes=counted: medians and loadings of the corpus SVD in the "
        "embeddings, log frequency as the bias of the head",
    )
    counted_components: int = Field(
        default=50, ge=1, description="of the corpus SVD; fewer where the width has no room"
    )
    counted_rest: float = Field(
        default=0.002,
        ge=0,
        description="standard deviation of the dimensions of a gene that are not counted",
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute layers in backward"
    )
    init_from: Path | None = Field(
        default=None,
        description="start from these weights: `geneloom export`'s folder, or a BERT's or "
        "ModernBERT's",
    )
    init_vocabulary: Path | None = Field(
        default=None,
        description="Geneformer's dictionaries, where init_from has no vocabulary.json",
    )
    init_moments: bool = Field(
        default=False,
        description="go on from init_from's moments and step count too: a DeepSpeed checkpoint "
        "(ZeRO 1 to 3, universal) of the same vocabulary",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_architecture(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("architecture") != MODERNBERT:
            return given
        defaults = {name: cls.default_of(name, MODERNBERT) for name in cls.model_fields}
        return filled_in(given, defaults)

    @classmethod
    def default_of(cls, name: str, architecture: str) -> Any:
        """Return the default of a setting, which may depend on the architecture."""
        field = cls.model_fields[name]
        extra = field.json_schema_extra
        own = extra if isinstance(extra, dict) and architecture != BERT else {}
        return own.get(architecture, field.get_default())

    @model_validator(mode="after")
    def _only_settings_of_the_architecture(self) -> ModelConfig:
        foreign = {
            k: v
            for k in ("local_window", "global_every", "rotary_base", "local_rotary_base")
            if self.architecture == BERT and (v := getattr(self, k)) is not None
        }
        if foreign:
            raise ValueError(
                f"{_listed(foreign)}: of architecture modernbert, but this model is a bert; leave "
                "it out, or give model.architecture=modernbert"
            )
        if self.architecture == MODERNBERT and self.attention_dropout:
            raise ValueError(
                f"attention_dropout {self.attention_dropout}: of architecture bert; a modernbert "
                "drops no attention weights: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _counted_belongs_to_new_weights(self) -> ModelConfig:
        fields = type(self).model_fields
        names = [k for k in fields if k.startswith("counted")]
        unused = {k: v for k in names if (v := getattr(self, k)) != fields[k].default}
        if self.init_genes == "random" and unused:
            raise ValueError(f"{_listed(unused)}: belongs to init_genes=counted")
        if len(set(self.counted)) < len(self.counted):
            raise ValueError(f"counted: each part once, given {list(self.counted)}")
        if self.init_genes == "counted" and self.init_from:
            raise ValueError(
                f"init_genes=counted, but the weights of genes are those of init_from "
                f"{self.init_from}: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _vocabulary_of_something(self) -> ModelConfig:
        given = [k for k in ("init_vocabulary", "init_moments") if getattr(self, k)]
        if given and not self.init_from:
            raise ValueError(f"{given[0]} belongs to init_from, which is not given")
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if self.architecture == MODERNBERT and self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} is odd: rotary "
                "positions of a modernbert turn pairs of dimensions"
            )
        return self

    def decisive(self) -> dict[str, Any]:
        """Return the settings that determine the weights and apply to this model, as JSON values.

        Paths are left out, because the record of a run contains a hash of the weights it started
        from.
        """
        fields, without = (
            type(self).model_fields,
            {"activation_checkpointing", "init_from", "init_vocabulary", "init_moments"},
        )
        if self.init_genes == "random":
            without |= {"init_genes", *(k for k in fields if k.startswith("counted"))}
        values = self.model_dump(mode="json", exclude=without)
        return {k: v for k, v in values.items() if v is not None}


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items())
