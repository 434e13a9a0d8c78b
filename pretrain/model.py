"""The masked encoder: Hugging Face's BERT, its vocabulary head at hidden genes only."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM

from data_prep.vocab import Vocabulary
from pretrain.config import ModelConfig


def bert_config(config: ModelConfig, vocabulary: Vocabulary) -> BertConfig:
    """Return the Hugging Face configuration of a model over a vocabulary."""
    return BertConfig(
        vocab_size=vocabulary.num_tokens,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.activation,
        hidden_dropout_prob=config.hidden_dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        max_position_embeddings=vocabulary.max_length,
        type_vocab_size=2,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=vocabulary.pad_token,
        tie_word_embeddings=True,
    )


class MaskedGeneModel(nn.Module):
    """Predicts hidden genes.

    Shapes: B cells, L places, D width, M hidden genes of the micro-batch, V vocabulary.
    """

    def __init__(self, bert: BertForMaskedLM, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.bert = bert
        if activation_checkpointing:
            bert.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        masked_places: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (float32 [M] cross-entropy in nats, int64 [M] place) of the hidden genes.

        The place is that of the hidden gene among all guesses, 0 = the first. Where the label is
        -100 the loss is 0 and the place V: no gene's.

        The head runs on M rows instead of B x L: at width 256 that is 51 instead of 84 MFLOP a
        token. M may be 0; the sum of the losses is then an attached zero.
        """
        hidden_BLD = self.bert.bert(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        hidden_MD = hidden_BLD.flatten(0, 1)[masked_places]
        # Cross-entropy in float32: in bfloat16 a loss of 6 is quantised to 1/64.
        logits_MV = self.bert.cls(hidden_MD).float()
        # Before the loss: what is counted in is freed again when the loss needs its memory.
        places_M = guess_places(logits_MV.detach(), labels)
        return functional.cross_entropy(logits_MV, labels, reduction="none"), places_M


def guess_places(logits_MV: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return int64 [M]: how many genes have a higher logit than the label; V where it is -100.

    Among T equal logits the label gets one of their T places, by its token modulo T. In bfloat16
    ties are the rule: counted from the best place, a model that has learnt nothing has a top-1 of
    100 %. A logit that is NaN gives V.
    """
    own_M1 = logits_MV.gather(1, labels.clamp(min=0)[:, None])
    counted_MV = torch.empty_like(logits_MV)
    # On a CPU the sum of floats takes a quarter of the time of a sum of booleans.
    below_M = torch.lt(logits_MV, own_M1, out=counted_MV).sum(dim=-1).long()
    not_above_M = torch.le(logits_MV, own_M1, out=counted_MV).sum(dim=-1).long()
    tied_M = (not_above_M - below_M).clamp(min=1)
    size = logits_MV.shape[1]
    return torch.where(labels < 0, size, size - not_above_M + labels % tied_M)


def build_model(config: ModelConfig, vocabulary: Vocabulary, seed: int) -> MaskedGeneModel:
    """Return a freshly initialised model; the same weights for the same seed."""
    torch.manual_seed(seed)
    bert = BertForMaskedLM._from_config(bert_config(config, vocabulary), attn_implementation="sdpa")
    return MaskedGeneModel(bert, config.activation_checkpointing)
