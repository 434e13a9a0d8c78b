"""One interface for the two architectures, BERT and ModernBERT, with all that differs between them.

Weights, configuration and modules are those of Hugging Face. The pass through a layer is
implemented here, so that the last layer computes hidden genes alone and local attention does not
look at all positions. `architecture_of` returns the interface of a network;
`pretrain.model.masked_gene_model` calls its functions from embeddings to logits.

Shapes: B cells, Q query positions, L positions, D width, E width of a head, V vocabulary, M hidden
genes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
)
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

from data_prep.genes.vocabulary import CLS, EOS, Vocabulary
from pretrain.model.attention import attention
from pretrain.model.packing import Packing, packed_attention, picked
from pretrain.model.window_attention import window_attention
from pretrain.settings.architecture import (
    BERT,
    MODERNBERT,
    layer_types,
    read_model_config,
)
from pretrain.settings.model_settings import ModelConfig

Network = BertForMaskedLM | ModernBertForMaskedLM
Encoder = BertModel | ModernBertModel
EncoderConfig = BertConfig | ModernBertConfig
# Cosine and sine of the rotary angles, each float32 [L, E / 2].
Rotation = tuple[torch.Tensor, torch.Tensor]


class Places(NamedTuple):
    """The positions that a layer computes, and how attention finds them.

    Attributes
    ----------
    asked_BQ
        int64, flat indices into B x L of the query positions; None: all positions.
    real_BL
        bool, True at real tokens, the first positions of each row; None: all.
    rotation
        The rotation of queries and keys; None: the positions are already part of the states.
    cells
        Where the cells are if they are packed: then B is 1 and L is T; None: padded rows.
    """

    asked_BQ: torch.Tensor | None
    real_BL: torch.Tensor | None
    rotation: Rotation | None
    cells: Packing | None = None


class Architecture:
    """The interface of an architecture for training, warm start and evaluation.

    Attributes
    ----------
    embedding, bias, positions
        Names of weights in a network's state: token embeddings [V, D], bias [V] of the head,
        position embeddings (None: it has none).
    tied
        Second names of the same tensors in files of weights.
    not_used
        Prefixes of names that files may contain but are not needed: heads of other objectives,
        buffers.
    lora_targets, layers_name
        Names of the projections that LoRA adapts, and of the list of layers.
    graphs_of_layers
        Number of different compiled graphs that the layers need for one shape.
    """

    embedding: ClassVar[str]
    bias: ClassVar[str]
    positions: ClassVar[str | None]
    tied: ClassVar[dict[str, str]]
    not_used: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[list[str]]
    layers_name: ClassVar[str]
    graphs_of_layers: ClassVar[int]

    @staticmethod
    def config(settings: ModelConfig, vocabulary: Vocabulary) -> EncoderConfig:
        """Return the Hugging Face configuration of a model with this vocabulary."""
        raise NotImplementedError

    @staticmethod
    def holder(encoder: Any) -> Any:
        """Return the module whose attribute `layers_name` is the list of layers."""
        raise NotImplementedError

    @staticmethod
    def attention_of(layer: Any) -> nn.Module:
        """Return the module of a layer whose second output is the attention weights."""
        raise NotImplementedError

    @staticmethod
    def finished(encoder: Any, states: torch.Tensor) -> torch.Tensor:
        """Return the states of a layer as the head would receive them after the last layer."""
        raise NotImplementedError

    @staticmethod
    def embedded(encoder: Any, input_ids: torch.Tensor, cells: Packing | None) -> torch.Tensor:
        """Return [B, L, D], the states before the first layer; for packed cells [1, T, D]."""
        raise NotImplementedError

    @staticmethod
    def rotations(encoder: Any, length: int, device: torch.device) -> list[Rotation | None]:
        """Return each layer's rotation of queries and keys at the first `length` positions."""
        raise NotImplementedError

    @staticmethod
    def through_layer(layer: Any, hidden_BLD: torch.Tensor, places: Places) -> torch.Tensor:
        """Return [B, Q, D], the output of a layer at the query positions."""
        raise NotImplementedError

    @staticmethod
    def logits(network: Any, states_MD: torch.Tensor) -> torch.Tensor:
        """Return [M, V], the head's logits for states that `finished` returned."""
        raise NotImplementedError


class _Bert(Architecture):
    """The BERT of Geneformer: post-norm, learned positions (Devlin et al. 2019)."""

    embedding = "bert.embeddings.word_embeddings.weight"
    bias = "cls.predictions.bias"
    positions = "bert.embeddings.position_embeddings.weight"
    # PyTorch files store the tied tensors under two names.
    tied: ClassVar = {
        "cls.predictions.decoder.weight": embedding,
        "cls.predictions.decoder.bias": bias,
    }
    # These are heads of other objectives, and the buffer 0, 1, 2, ... that older versions stored.
    not_used = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")
    # The authors of LoRA adapt the projections of queries and values.
    lora_targets: ClassVar = ["query", "value"]
    layers_name = "layer"
    graphs_of_layers = 2  # the last layer has its own graph

    @staticmethod
    def config(settings: ModelConfig, vocabulary: Vocabulary) -> BertConfig:
        return BertConfig(
            vocab_size=vocabulary.num_tokens,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            intermediate_size=settings.intermediate_size,
            hidden_act=settings.activation,
            hidden_dropout_prob=settings.hidden_dropout,
            attention_probs_dropout_prob=settings.attention_dropout,
            max_position_embeddings=vocabulary.max_length,
            type_vocab_size=2,
            initializer_range=settings.initializer_range,
            layer_norm_eps=settings.layer_norm_eps,
            pad_token_id=vocabulary.pad_token,
            tie_word_embeddings=True,
        )

    @staticmethod
    def holder(encoder: Any) -> Any:
        return encoder.encoder

    @staticmethod
    def attention_of(layer: Any) -> nn.Module:
        return layer.attention.self

    @staticmethod
    def finished(encoder: Any, states: torch.Tensor) -> torch.Tensor:
        return states

    @staticmethod
    def embedded(encoder: Any, input_ids: torch.Tensor, cells: Packing | None) -> torch.Tensor:
        if cells is None:
            return encoder.embeddings(input_ids=input_ids)
        places = (cells.padded_T % cells.length)[None]
        return encoder.embeddings(input_ids=input_ids[None], position_ids=places)

    @staticmethod
    def rotations(encoder: Any, length: int, device: torch.device) -> list[Rotation | None]:
        return [None] * encoder.config.num_hidden_layers

    @staticmethod
    def through_layer(layer: Any, hidden_BLD: torch.Tensor, places: Places) -> torch.Tensor:
        part = layer.attention.self
        asking_BQD = _asking(hidden_BLD, places.asked_BQ, places.cells is not None)
        mixed = part.query(asking_BQD), part.key(hidden_BLD), part.value(hidden_BLD)
        num_heads, dropout = part.num_attention_heads, part.dropout.p if layer.training else 0.0
        if places.cells is None:
            context_BQD = attention(*mixed, num_heads, places.real_BL, dropout)
        else:
            query, key, value = (x.squeeze(0).unflatten(-1, (num_heads, -1)) for x in mixed)
            context = packed_attention(query, key, value, places.cells, None, dropout)
            context_BQD = context.flatten(1)[None]
        asking_BQD = layer.attention.output(context_BQD, asking_BQD)
        return layer.output(layer.intermediate(asking_BQD), asking_BQD)

    @staticmethod
    def logits(network: Any, states_MD: torch.Tensor) -> torch.Tensor:
        return network.cls(states_MD)


class _ModernBert(Architecture):
    """ModernBERT (Warner et al. 2024): pre-norm, rotary, gated feed-forward, local layers."""

    embedding = "model.embeddings.tok_embeddings.weight"
    bias = "decoder.bias"
    positions = None
    tied: ClassVar = {"decoder.weight": embedding}
    not_used = ()
    # Queries, keys and values share one projection here.
    lora_targets: ClassVar = ["Wqkv"]
    layers_name = "layers"
    graphs_of_layers = 4  # first without norm, global, local, last with few queries

    @staticmethod
    def config(settings: ModelConfig, vocabulary: Vocabulary) -> ModernBertConfig:
        assert settings.global_every and settings.local_window
        bases = settings.rotary_base, settings.local_rotary_base
        special = vocabulary.special_tokens
        return ModernBertConfig(
            vocab_size=vocabulary.num_tokens,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            intermediate_size=settings.intermediate_size,
            hidden_activation=settings.activation,
            classifier_activation=settings.activation,
            embedding_dropout=settings.hidden_dropout,
            mlp_dropout=settings.hidden_dropout,
            attention_dropout=settings.attention_dropout,
            max_position_embeddings=vocabulary.max_length,
            initializer_range=settings.initializer_range,
            norm_eps=settings.layer_norm_eps,
            layer_types=layer_types(settings.num_layers, settings.global_every),
            local_attention=settings.local_window,
            rope_parameters={
                kind: {"rope_type": "default", "rope_theta": base}
                for kind, base in zip(("full_attention", "sliding_attention"), bases, strict=True)
            },
            # Hugging Face's default token ids belong to a vocabulary of words.
            pad_token_id=vocabulary.pad_token,
            cls_token_id=special.get(CLS),
            sep_token_id=special.get(EOS),
            bos_token_id=None,
            eos_token_id=None,
            decoder_bias=True,
            tie_word_embeddings=True,
        )

    @staticmethod
    def holder(encoder: Any) -> Any:
        return encoder

    @staticmethod
    def attention_of(layer: Any) -> nn.Module:
        return layer.attn

    @staticmethod
    def finished(encoder: Any, states: torch.Tensor) -> torch.Tensor:
        return encoder.final_norm(states)

    @staticmethod
    def embedded(encoder: Any, input_ids: torch.Tensor, cells: Packing | None) -> torch.Tensor:
        return encoder.embeddings(input_ids=input_ids if cells is None else input_ids[None])

    @staticmethod
    def rotations(encoder: Any, length: int, device: torch.device) -> list[Rotation | None]:
        # The module's own frequencies cannot be used: DeepSpeed turns buffers into bfloat16, in
        # which position 300 is 300 +- 1.
        types = encoder.config.layer_types
        made = {kind: _rotation(encoder.config, kind, length, device) for kind in set(types)}
        return [made[kind] for kind in types]

    @staticmethod
    def through_layer(layer: Any, hidden_BLD: torch.Tensor, places: Places) -> torch.Tensor:
        asked_BQ, real_BL, rotation, cells = places
        assert rotation is not None
        part = layer.attn
        # One projection gives queries, keys and values, so the queries of unneeded positions are
        # computed in vain. A part of its weight cannot be used alone, because ZeRO 3 gathers the
        # weight for its module only.
        mixed_BLD = part.Wqkv(layer.attn_norm(hidden_BLD))
        query, key, value = (
            x.unflatten(-1, (-1, part.head_dim)) for x in mixed_BLD.chunk(3, dim=-1)
        )
        cosine, sine = rotation
        key = _turned(key, cosine[None, :, None], sine[None, :, None])
        half = None if part.sliding_window is None else part.sliding_window - 1
        # With packed cells a window needs all positions in order: all queries are computed, and
        # only the needed ones are used.
        few = asked_BQ if cells is not None and half is not None else None
        place_BQ = None
        if asked_BQ is None or few is not None:
            query = _turned(query, cosine[None, :, None], sine[None, :, None])
        else:
            place_BQ = asked_BQ % hidden_BLD.shape[1]
            query = picked(query.flatten(0, 1), asked_BQ, cells is not None)
            query = _turned(query, cosine[place_BQ][:, :, None], sine[place_BQ][:, :, None])
        if cells is not None:
            context = packed_attention(
                query.squeeze(0), key.squeeze(0), value.squeeze(0), cells, half
            )[None]
            context_BQD = _asking(context.flatten(2), few, True)
        elif half is None:
            num_heads = key.shape[2]
            context_BQD = attention(
                query.flatten(2), key.flatten(2), value.flatten(2), num_heads, real_BL, 0.0
            )
        else:
            context = window_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), half, real_BL,
                place_BQ,
            )  # fmt: skip
            context_BQD = context.transpose(1, 2).flatten(2)
        hidden_BQD = _asking(hidden_BLD, asked_BQ, cells is not None) + part.Wo(context_BQD)
        return hidden_BQD + layer.mlp(layer.mlp_norm(hidden_BQD))

    @staticmethod
    def logits(network: Any, states_MD: torch.Tensor) -> torch.Tensor:
        return network.decoder(network.head(states_MD))


def _asking(
    hidden_BLD: torch.Tensor, asked_BQ: torch.Tensor | None, are_unique: bool
) -> torch.Tensor:
    """Return [B, Q, D], the states at the query positions; fillers repeat one position."""
    if asked_BQ is None:
        return hidden_BLD
    return picked(hidden_BLD.flatten(0, 1), asked_BQ, are_unique)


def _rotation(config: Any, kind: str, length: int, device: torch.device) -> Rotation:
    rotary = ModernBertRotaryEmbedding.compute_default_rope_parameters
    frequencies, _ = rotary(config, device, kind)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def at_places(rotations: list[Rotation | None], places: torch.Tensor) -> list[Rotation | None]:
    """Return the rotations at other positions: int64 indices into those of `rotations`."""
    made: dict[int, Rotation] = {}
    for rotation in rotations:
        if rotation is not None and id(rotation) not in made:
            made[id(rotation)] = rotation[0][places], rotation[1][places]
    return [None if r is None else made[id(r)] for r in rotations]


def _turned(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Return [..., E] queries or keys, each pair of dimensions rotated by its position's angle."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(states.dtype)


def _attention_by_windows(
    module: Any,
    query_BHLE: torch.Tensor,
    key_BHLE: torch.Tensor,
    value_BHLE: torch.Tensor,
    real_BL: torch.Tensor | None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return [B, L, H, E] for ModernBERT's own forward pass, which evaluation uses."""
    if module.sliding_window is None:
        mask = None
        if real_BL is not None:
            mask = real_BL[:, None, None].expand(-1, -1, query_BHLE.shape[2], -1)
        found = functional.scaled_dot_product_attention(
            query_BHLE, key_BHLE, value_BHLE, attn_mask=mask
        )
    else:
        half = module.sliding_window - 1
        found = window_attention(query_BHLE, key_BHLE, value_BHLE, half, real_BL)
    return found.transpose(1, 2), None


# Transformers knows this way of computing attention by name. With its own `sdpa`, which computes
# all pairs of positions and hides those beyond the window, six layers of 256 take 1.3 times as long
# at 512 positions and 1.7 times at 2,048 (window 32, one core).
_BY_WINDOWS = "geneloom_windows"
AttentionInterface.register(_BY_WINDOWS, _attention_by_windows)
# No mask over all pairs is made, because only the real positions need to be known.
AttentionMaskInterface.register(_BY_WINDOWS, lambda *, attention_mask, **others: attention_mask)

_ATTENTION = {BERT: "sdpa", MODERNBERT: _BY_WINDOWS}
_ARCHITECTURES: dict[str, Architecture] = {BERT: _Bert(), MODERNBERT: _ModernBert()}
_CONFIGS = {BERT: BertConfig, MODERNBERT: ModernBertConfig}
_NETWORKS: dict[str, Any] = {BERT: BertForMaskedLM, MODERNBERT: ModernBertForMaskedLM}


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture of a network or an encoder."""
    config: Any = model.config
    return _ARCHITECTURES[config.model_type]


def encoder_config(settings: ModelConfig, vocabulary: Vocabulary) -> EncoderConfig:
    """Return the Hugging Face configuration of a model with this vocabulary."""
    return _ARCHITECTURES[settings.architecture].config(settings, vocabulary)


def read_encoder_config(path: Path) -> EncoderConfig:
    """Return the configuration in a ``config.json``, with the errors of `read_model_config`."""
    return _CONFIGS[read_model_config(path)["model_type"]].from_json_file(str(path))


def network_class(config: EncoderConfig) -> Any:
    """Return Hugging Face's class for networks with a masked-gene head."""
    return _NETWORKS[config.model_type]


def new_network(config: EncoderConfig) -> Network:
    """Return a network with random weights from torch's random numbers."""
    how = attention_implementation(config)
    return network_class(config)._from_config(config, attn_implementation=how)


def attention_implementation(config: EncoderConfig) -> str:
    """Return transformers' name of the attention implementation that evaluation uses."""
    return _ATTENTION[config.model_type]


def new_encoder(config: EncoderConfig) -> Encoder:
    """Return an encoder with random weights and without a head."""
    how = attention_implementation(config)
    if isinstance(config, BertConfig):
        return BertModel._from_config(config, attn_implementation=how, add_pooling_layer=False)
    return ModernBertModel._from_config(config, attn_implementation=how)


def encoder_of(network: Any) -> Any:
    """Return the encoder of a network, without its head."""
    return network.base_model


def layers_of(encoder: Any) -> nn.ModuleList:
    """Return the layers of an encoder, the lowest first."""
    kind = architecture_of(encoder)
    return getattr(kind.holder(encoder), kind.layers_name)


def set_layers(encoder: Any, layers: nn.ModuleList) -> None:
    """Replace the layers of an encoder."""
    kind = architecture_of(encoder)
    setattr(kind.holder(encoder), kind.layers_name, layers)


def input_table(encoder: Any) -> torch.Tensor:
    """Return the token embeddings [V, D]."""
    return encoder.get_input_embeddings().weight


def to_bfloat16(encoder: Any) -> None:
    """Convert an encoder's weights to bfloat16, except the frequencies of rotary positions."""
    buffers = {n: b for n, b in encoder.named_buffers() if n.endswith("inv_freq")}
    nn.Module.to(encoder, torch.bfloat16)
    for name, values in buffers.items():
        module, _, own = name.rpartition(".")
        setattr(encoder.get_submodule(module), own, values)
