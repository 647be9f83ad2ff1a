"""Dynamic masking for masked-language modelling; the same sample is masked alike in any company.

Devlin et al. 2019 (arXiv:1810.04805), 3.1 and A.1: a share of the tokens is to be predicted; of these 80 %
are replaced by [MASK], 10 % by a random token, 10 % are kept. Anew in every epoch: RoBERTa
(arXiv:1907.11692), 4.1.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.shards import derive_seed

MASKED, REPLACED = 0.8, 0.1  # shares of the chosen tokens; the rest is kept
# Held-out text is masked alike for every --seed, so that held-out losses can be compared between runs.
HELDOUT_SEED = "heldout"


@dataclass(frozen=True)
class Masked:
    """A masked microbatch of B sequences of T tokens.

    Attributes:
        input_ids: int64 [B, T], what the model sees.
        masked: int64 [K], places to predict in the flattened [B * T], ascending.
        labels: int64 [K], the tokens that were there.
    """

    input_ids: NDArray[np.int64]
    masked: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Masking:
    """How tokens are masked: at `rate`, given the vocabulary's size and its special tokens."""

    rate: float
    vocab_size: int
    mask_id: int
    special_ids: Sequence[int]

    def ordinary(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which tokens may be masked: all but the special ones ([UNK] is one)."""
        return ~np.isin(tokens, self.special_ids)

    @functools.cached_property
    def _others(self) -> NDArray[np.int64]:
        """What a chosen token may be replaced by: any but a special one, as `ordinary`."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)

    def counts(self, ordinary: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens to predict in sequences with so many ordinary tokens: the rate, rounded, and at least one.

        A sequence without any ordinary token has none.
        """
        wanted = np.maximum(1, np.rint(self.rate * ordinary)).astype(np.int64)
        chosen: NDArray[np.int64] = np.minimum(ordinary, wanted)
        return chosen

    def apply(self, tokens: NDArray[np.integer], seeds: Sequence[int]) -> Masked:
        """Mask sequences `tokens` [B, T], each from its own seed alone."""
        tokens_BT = tokens.astype(np.int64)
        B, T = tokens_BT.shape
        noise_B3T = np.empty((B, 3, T))
        for row, seed in enumerate(seeds):
            np.random.Generator(np.random.Philox(key=seed)).random(out=noise_B3T[row])
        order_BT, fate_BT, pick_BT = noise_B3T[:, 0], noise_B3T[:, 1], noise_B3T[:, 2]

        ordinary_BT = self.ordinary(tokens_BT)
        # Special tokens sort behind every ordinary one: noise is below 1.
        ranks_BT = np.argsort(np.argsort(np.where(ordinary_BT, order_BT, 2.0), axis=1, kind="stable"), axis=1)
        chosen_BT = ranks_BT < self.counts(ordinary_BT.sum(axis=1))[:, None]

        random_BT = self._others[(pick_BT * len(self._others)).astype(np.int64)]
        changed_BT = np.where(fate_BT < MASKED, self.mask_id, random_BT)
        changed_BT = np.where(fate_BT < MASKED + REPLACED, changed_BT, tokens_BT)
        places = np.flatnonzero(chosen_BT)
        return Masked(np.where(chosen_BT, changed_BT, tokens_BT), places, tokens_BT.reshape(-1)[places])


def document_numbers(tokens_BT: NDArray[np.integer], sep_id: int) -> NDArray[np.int64]:
    """Which document of its sequence each token is of, int64 [B, T]: 0, 1, ...; a [SEP] ends its own.

    [CLS] is of the first, and the [SEP] that ends every sequence of the last.
    """
    is_sep_BT = tokens_BT == sep_id
    before_BT: NDArray[np.int64] = np.cumsum(is_sep_BT, axis=1) - is_sep_BT
    # Where a document ends with the sequence, the sequence's own [SEP] would be a document of one token.
    before_BT[:, -1] = before_BT[:, -2]
    return before_BT


def train_seeds(seed: int, epoch: int, indices: NDArray[np.int64]) -> list[int]:
    """One seed for each training sample: of (seed, epoch, its index) alone."""
    return [derive_seed("mask", seed, epoch, int(index)) for index in indices]


def heldout_seeds(indices: NDArray[np.int64]) -> list[int]:
    """One seed for each held-out sample: of its index alone."""
    return [derive_seed("mask", HELDOUT_SEED, int(index)) for index in indices]
