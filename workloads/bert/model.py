"""BERT for masked-language modelling (Devlin et al. 2019, arXiv:1810.04805), its head on masked places only.

Our own module rather than transformers' BertForMaskedLM, whose import takes every worker 3.7 s of processor time
before its first step. Names and shapes of the parameters are transformers', and so is the order in which dropout
draws: the hidden states have the same bits, in training with our layers of dropout in theirs
(tests/bert/test_bert_training.py). export.py saves it as transformers' model.

B = microbatch, T = tokens, D = width, H = heads, F = width inside the feed-forward block, K = masked tokens of the
microbatch, V = vocabulary.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workloads.bert.attention import attend
from workloads.bert.config import Architecture, BertConfig
from workloads.bert.dropout import Dropout
from workloads.workload import Batch, Piece

EPSILON = 1e-12  # of LayerNorm, as in the authors' code (github.com/google-research/bert, modeling.py)
INITIAL_STD = 0.02
NEVER = -10000.0  # a logit whose exponential is 0 beside any other's, within fp16; so is then its gradient


class Embeddings(nn.Module):
    """Token, position and segment embeddings; all tokens are of segment 0, for there is no next sentence."""

    def __init__(self, size: Architecture, vocab_size: int, positions: int, dropout: float, pad_id: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, size.hidden_size, padding_idx=pad_id)
        self.position_embeddings = nn.Embedding(positions, size.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, size.hidden_size)
        self.LayerNorm = nn.LayerNorm(size.hidden_size, eps=EPSILON)
        self.dropout = Dropout(dropout)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.word_embeddings(input_ids_BT) + self.token_type_embeddings.weight[0]
        hidden_BTD = hidden_BTD + self.position_embeddings.weight[: input_ids_BT.shape[1]]
        embedded_BTD: Tensor = self.dropout(self.LayerNorm(hidden_BTD))
        return embedded_BTD


class SelfAttention(nn.Module):
    """Every token attends to all of its sequence, for sequences are full; or only where `allowed_B1TT` says so."""

    def __init__(self, size: Architecture, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_size = size.heads, size.hidden_size // size.heads
        self.part = (0, 1)  # which of how many equal parts of the heads are here
        self.dropout = dropout
        self.query = nn.Linear(size.hidden_size, size.hidden_size)
        self.key = nn.Linear(size.hidden_size, size.hidden_size)
        self.value = nn.Linear(size.hidden_size, size.hidden_size)

    def forward(self, hidden_BTD: Tensor, allowed_B1TT: Tensor | None) -> Tensor:
        query_BHTd, key_BHTd, value_BHTd = (
            linear(hidden_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        if dropout and self.part[1] > 1:
            return self._drop_as_a_whole(query_BHTd, key_BHTd, value_BHTd, allowed_B1TT)
        mixed_BHTd = attend(query_BHTd, key_BHTd, value_BHTd, allowed_B1TT, dropout)
        return mixed_BHTd.transpose(1, 2).flatten(2)

    def _drop_as_a_whole(
        self, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, allowed_B1TT: Tensor | None
    ) -> Tensor:
        """The same where some heads are elsewhere: dropout draws for all of them, as it does on one worker."""
        scores_BHTT = query_BHTd @ key_BHTd.transpose(-2, -1) * self.head_size**-0.5
        if allowed_B1TT is not None:
            scores_BHTT = scores_BHTT.masked_fill(~allowed_B1TT, float("-inf"))
        every_BHTT = scores_BHTT.new_ones(()).expand(len(scores_BHTT), self.heads, *scores_BHTT.shape[2:])
        kept_BHTT = F.dropout(every_BHTT, self.dropout).chunk(self.part[1], dim=1)[self.part[0]]
        mixed_BHTd: Tensor = (scores_BHTT.softmax(-1) * kept_BHTT) @ value_BHTd
        return mixed_BHTd.transpose(1, 2).flatten(2)


def same_document(documents_BT: Tensor) -> Tensor:
    """Which tokens may attend to which, bool [B, 1, T, T]: blocks on the diagonal, one for each document."""
    return (documents_BT[:, :, None] == documents_BT[:, None, :]).unsqueeze(1)


class Residual(nn.Module):
    """A linear layer, dropout, and the sum with what came before, normalized."""

    def __init__(self, inner: int, size: Architecture, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, size.hidden_size)
        self.LayerNorm = nn.LayerNorm(size.hidden_size, eps=EPSILON)
        self.dropout = Dropout(dropout)

    def forward(self, inner_BTF: Tensor, before_BTD: Tensor) -> Tensor:
        normal_BTD: Tensor = self.LayerNorm(self.dropout(self.dense(inner_BTF)) + before_BTD)
        return normal_BTD


class Layer(nn.Module):
    """Attention, then the feed-forward block."""

    def __init__(self, size: Architecture, dropout: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(size, dropout), "output": Residual(size.hidden_size, size, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size.hidden_size, size.intermediate_size)})
        self.output = Residual(size.intermediate_size, size, dropout)

    def forward(self, hidden_BTD: Tensor, allowed_B1TT: Tensor | None) -> Tensor:
        hidden_BTD = self.attention["output"](self.attention["self"](hidden_BTD, allowed_B1TT), hidden_BTD)
        output_BTD: Tensor = self.output(F.gelu(self.intermediate["dense"](hidden_BTD)), hidden_BTD)
        return output_BTD


class Encoder(nn.Module):
    """Embeddings and layers."""

    def __init__(self, size: Architecture, vocab_size: int, positions: int, dropout: float, pad_id: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(size, vocab_size, positions, dropout, pad_id)
        layers = nn.ModuleList(Layer(size, dropout) for _ in range(size.layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        hidden_BTD: Tensor = self.embeddings(input_ids_BT)
        allowed_B1TT = None if documents_BT is None else same_document(documents_BT)
        for layer in self.encoder["layer"].children():
            hidden_BTD = layer(hidden_BTD, allowed_B1TT)
        return hidden_BTD


class Head(nn.Module):
    """Logits over the vocabulary; the matrix is that of the token embeddings, the bias its own.

    Both also go by the names that the layer has in transformers' model, `decoder`, so that state_dict is its.
    """

    def __init__(self, size: Architecture, embeddings: nn.Embedding) -> None:
        super().__init__()
        vocab_size = embeddings.num_embeddings
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(size.hidden_size, size.hidden_size),
                "LayerNorm": nn.LayerNorm(size.hidden_size, eps=EPSILON),
            }
        )
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.decoder = nn.Linear(size.hidden_size, vocab_size, device="meta")  # both tensors are replaced
        self.decoder.weight, self.decoder.bias = embeddings.weight, self.bias

    @torch.no_grad()
    def widen(self, embeddings: nn.Embedding, more: int) -> None:
        """Add rows that no token has: neither predicted nor learnt, for their gradients are 0."""
        if more:
            embeddings.weight = nn.Parameter(F.pad(embeddings.weight, (0, 0, 0, more)))
            self.bias = nn.Parameter(F.pad(self.bias, (0, more), value=NEVER))
            embeddings.num_embeddings = self.decoder.out_features = len(self.bias)
            self.decoder.weight, self.decoder.bias = embeddings.weight, self.bias

    def forward(self, hidden_KD: Tensor) -> Tensor:
        hidden_KD = self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden_KD)))
        logits_KV: Tensor = self.decoder(hidden_KD)
        return logits_KV


class Bert(nn.Module):
    """The encoder and the head on the masked places.

    Attributes:
        size, dropout: as they were given.
    """

    def __init__(
        self, size: Architecture, vocab_size: int, positions: int, dropout: float, pad_id: int, multiple: int = 1
    ) -> None:
        super().__init__()
        self.size, self.dropout = size, dropout
        self.bert = Encoder(size, vocab_size, positions, dropout, pad_id)
        head = Head(size, self.bert.embeddings.word_embeddings)
        self.cls = nn.ModuleDict({"predictions": head})
        self._draw(pad_id)
        head.widen(self.bert.embeddings.word_embeddings, -vocab_size % multiple)

    @torch.no_grad()
    def _draw(self, pad_id: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=INITIAL_STD)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        self.bert.embeddings.word_embeddings.weight[pad_id].zero_()

    def forward(self, input_ids_BT: Tensor, masked_K: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Logits [K, V] at the flat places `masked_K` of B * T; the head is not computed for the others.

        With `documents_BT`, tokens attend to those of the same number in their sequence only.
        """
        hidden_KD = self.bert(input_ids_BT, documents_BT).flatten(0, 1).index_select(0, masked_K)
        logits_KV: Tensor = self.cls["predictions"](hidden_KD)
        return logits_KV


def build(config: BertConfig, vocab_size: int, pad_id: int) -> Bert:
    """A new model, fp32, on the CPU; weights from torch's global generator.

    They are N(0, 0.02), biases 0, as in Devlin et al. 2019. There is one position embedding per token of a sequence;
    the output layer is tied to the token embeddings.
    """
    sizes = (vocab_size, config.sequence_length, config.dropout, pad_id, config.vocab_multiple)
    return Bert(config.architecture(), *sizes)


def _through(layer: nn.Module, hidden_BTD: Tensor, batch: Batch | None) -> Tensor:
    allowed_B1TT = same_document(batch["documents"]) if batch and "documents" in batch else None
    through_BTD: Tensor = layer(hidden_BTD, allowed_B1TT)
    return through_BTD


def pieces(model: Bert) -> list[Piece]:
    """Embeddings, layers and head one by one, for a pipeline."""
    encoder, head = model.bert, model.cls["predictions"]
    layers = [Piece(functools.partial(_through, layer), layer) for layer in encoder.encoder["layer"].children()]
    last = Piece(lambda hidden, batch: head(hidden.flatten(0, 1).index_select(0, batch["masked"])), head)
    return [Piece(lambda _, batch: encoder.embeddings(batch["input_ids"]), encoder.embeddings), *layers, last]


def tensor_plan(model: Bert, part: int, parts: int) -> dict[str, Any]:
    """What is split among `parts` workers: heads and feed-forward width by columns, what follows them by rows."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel  # a second, for those who split

    plan: dict[str, Any] = {}
    for number, layer in enumerate(model.bert.encoder["layer"].children()):
        layer.get_submodule("attention.self").part = (part, parts)  # type: ignore[assignment]
        name = f"bert.encoder.layer.{number}"
        for linear in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"):
            plan[f"{name}.{linear}"] = ColwiseParallel()
        for linear in ("attention.output.dense", "output.dense"):
            plan[f"{name}.{linear}"] = RowwiseParallel()
    return plan


def loss_sum(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """Cross entropy in nats, summed over the masked tokens, in fp32."""
    return F.cross_entropy(logits_KV.float(), labels_K, reduction="sum")


@torch.no_grad()
def correct_sum(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """How many of the masked tokens have the highest logit, as fp32."""
    return (logits_KV.argmax(dim=-1) == labels_K).sum().float()
