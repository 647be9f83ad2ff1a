"""BERT pretraining as a workload: masked tokens, the loss summed over them, and a model to load elsewhere."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.tables import Table
from workloads.bert import model as bert
from workloads.bert.config import BertConfig
from workloads.bert.data import prepare
from workloads.bert.masking import Masking, document_numbers, heldout_seeds, train_seeds
from workloads.bert.windows import window
from workloads.bert.wordpiece import MASK, PAD, SEP
from workloads.workload import Batch, Piece, Split, Sums


@dataclass(frozen=True)
class Mapped:
    """A file that is an array."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> NDArray[Any]:
        """The array, read as it is used."""
        return np.memmap(self.file, self.dtype, "r", shape=self.shape)


class BertSamples:
    """One split: packed sequences, masked when they are asked for."""

    def __init__(
        self,
        sequences: NDArray[np.int32] | Table,
        masking: Masking,
        seed: int | None,
        sep_id: int | None,
        short: tuple[int, float] = (0, 0.0),
    ) -> None:
        """Args:
        sequences: token ids [sequences, T], or a table of them (column tokens).
        masking: how they are masked.
        seed: of the masking in training; None: held out, masked by fixed seeds.
        sep_id: what ends a document, where tokens attend to their own only.
        short: (S, share): S tokens of each sequence are used in the first `share` of the run.
        """
        self._sequences = sequences
        self._masking = masking
        self._seed = seed
        self._sep_id = sep_id
        self._short = short
        self.modules = ("workloads.bert.workload",)

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the file too; numpy would send it what is in it."""
        mapped = self._sequences
        if not isinstance(mapped, np.memmap):
            return self.__dict__
        return self.__dict__ | {"_sequences": Mapped(str(mapped.filename), str(mapped.dtype), mapped.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state)
        if isinstance(self._sequences, Mapped):
            self._sequences = self._sequences.open()

    def __len__(self) -> int:
        return len(self._sequences)

    def microbatch(self, indices: NDArray[np.int64], epoch: int, progress: float = 1.0) -> Batch:
        """The samples at `indices` [B]; T is the short length where `progress` says so.

        Returns:
            input_ids: int64 [B, T]; masked: int64 [K], places in [B * T]; labels: int64 [K], the tokens
            there; documents, where tokens attend to their own only: int64 [B, T].
        """
        seeds = heldout_seeds(indices) if self._seed is None else train_seeds(self._seed, epoch, indices)
        tokens, (short, share) = self._tokens(indices, epoch), self._short
        if progress < share:
            tokens = window(tokens, short, indices, epoch)
        masked = self._masking.apply(tokens, seeds)
        batch = {
            "input_ids": torch.from_numpy(masked.input_ids),
            "masked": torch.from_numpy(masked.masked),
            "labels": torch.from_numpy(masked.labels),
        }
        if self._sep_id is not None:
            batch["documents"] = torch.from_numpy(document_numbers(tokens, self._sep_id))
        return batch

    def _tokens(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int32]:
        if isinstance(self._sequences, np.ndarray):
            return self._sequences[indices]
        if self._seed is not None:
            self._sequences.fetch_ahead(self._seed, epoch, int(indices[0]))
        column = self._sequences.rows(indices, ["tokens"])["tokens"].combine_chunks()
        tokens: NDArray[np.int32] = column.flatten().to_numpy(zero_copy_only=False)
        return tokens.reshape(len(indices), -1)


class BertWorkload:
    """Masked-language-model pretraining; see workloads.workload.Workload for what each method promises."""

    def __init__(self, config: BertConfig) -> None:
        """Prepares the data or finds it in the cache. Raises UserError where that fails."""
        self._config = config
        self._prepared = prepare(config)
        vocabulary = self._prepared.vocabulary
        self._short = (config.short_length, config.short_share if config.short_length else 0.0)
        masking = Masking(config.mask_rate, len(vocabulary), vocabulary.id(MASK), vocabulary.special_ids)
        sep_id = vocabulary.id(SEP) if config.attention == "document" else None
        self._samples: dict[Split, BertSamples] = {
            "train": BertSamples(self._prepared.train, masking, config.seed, sep_id, self._short),
            "heldout": BertSamples(self._prepared.heldout, masking, None, sep_id),
        }

    @property
    def decodes(self) -> bool:
        """Sequences are tokenized already."""
        return False

    @property
    def fingerprint(self) -> str:
        """Of the sequences and the vocabulary."""
        return self._prepared.summary.fingerprint

    def build_model(self) -> nn.Module:
        """A new BERT, fp32, on the CPU; weights from torch's global generator."""
        vocabulary = self._prepared.vocabulary
        return bert.build(self._config, len(vocabulary), vocabulary.id(PAD))

    def samples(self, split: Split) -> BertSamples:
        """The training split, masked anew in every epoch, or the held-out one, masked alike in every run."""
        return self._samples[split]

    @property
    def varying_inputs(self) -> tuple[int, ...]:
        """The masked places, of which sequences have more or fewer."""
        return (1,)

    @property
    def turning_points(self) -> tuple[float, ...]:
        """Where sequences become whole."""
        _, share = self._short
        return (share,) if 0.0 < share < 1.0 else ()

    def nominal_count(self, samples: int) -> float:
        """Masked tokens expected in so many training sequences, whole ones; each step divides by its own in the end."""
        return samples * max(1.0, self._config.mask_rate * self._prepared.maskable)

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Cross entropy summed over the masked tokens, their number, and how many are predicted right."""
        documents = (batch["documents"],) if "documents" in batch else ()
        return self.finish(model(batch["input_ids"], batch["masked"], *documents), batch, model.training)

    def finish(self, logits_KV: Tensor, batch: Batch, training: bool) -> Sums:
        """See sums."""
        labels_K = batch["labels"]
        count = torch.full((), float(labels_K.numel()), device=labels_K.device)  # torch.tensor would wait for a GPU
        return Sums(bert.loss_sum(logits_KV, labels_K), count, {"correct": bert.correct_sum(logits_KV, labels_K)})

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of the encoder."""
        assert isinstance(model, bert.Bert)
        return list(model.bert.encoder["layer"].children())

    @property
    def pieces_read(self) -> bool:
        """Where tokens attend to their own documents only, every layer has to know which those are."""
        return self._config.attention == "document"

    def pieces(self, model: nn.Module) -> list[Piece]:
        """Embeddings, layers, head."""
        assert isinstance(model, bert.Bert)
        return bert.pieces(model)

    def tensor_plan(self, model: nn.Module, part: int, parts: int) -> dict[str, Any]:
        """Heads, and the width inside the feed-forward blocks, are split: Shoeybi et al. 2019, arXiv:1909.08053."""
        assert isinstance(model, bert.Bert)
        return bert.tensor_plan(model, part, parts)

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Held-out loss in nats, its exponential, the share predicted right, and the training text's entropy.

        The entropy is what a model without context would reach on the training text: the loss to beat.
        """
        count = max(totals["count"], 1.0)
        loss = totals["loss"] / count
        return {
            "masked_lm_loss": loss,
            "perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf,
            "masked_accuracy": totals["correct"] / count,
            "unigram_entropy": self._prepared.unigram_entropy,
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what transformers' from_pretrained needs, for the model and for the tokenizer."""
        from workloads.bert.export import save  # imports transformers, which takes seconds: only where it is needed

        assert isinstance(model, bert.Bert)
        save(model, self._prepared, folder)
