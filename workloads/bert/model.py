"""BERT for masked-language modelling: transformers' BertForMaskedLM, its head on masked places only.

B = microbatch, T = tokens, D = width, K = masked tokens of the microbatch, V = vocabulary.
"""

import orchestrator.vision_ops  # noqa: F401  before transformers, which imports torchvision

# isort: split
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from workloads.bert.config import BertConfig


def build(config: BertConfig, vocab_size: int, pad_id: int) -> Any:
    """A new BertForMaskedLM, fp32, on the CPU; weights from torch's global generator.

    They are N(0, 0.02), as in Devlin et al. 2019. There is one position embedding per token of a sequence;
    the output layer is tied to the token embeddings.
    """
    size = config.architecture()
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocab_size,
            hidden_size=size.hidden_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=size.intermediate_size,
            max_position_embeddings=config.sequence_length,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            pad_token_id=pad_id,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )


def masked_logits(model: Any, input_ids_BT: Tensor, masked_K: Tensor) -> Tensor:
    """Logits [K, V] at the flat places `masked_K`; the head is not computed for the others.

    Every sequence is full, so no attention mask is needed.
    """
    hidden_BTD = model.bert(input_ids=input_ids_BT).last_hidden_state
    hidden_KD = hidden_BTD.flatten(0, 1).index_select(0, masked_K)
    logits_KV: Tensor = model.cls(hidden_KD)
    return logits_KV


def loss_sum(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """Cross entropy in nats, summed over the masked tokens, in fp32."""
    return F.cross_entropy(logits_KV.float(), labels_K, reduction="sum")


@torch.no_grad()
def correct_sum(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """How many of the masked tokens have the highest logit, as fp32."""
    return (logits_KV.argmax(dim=-1) == labels_K).sum().float()
