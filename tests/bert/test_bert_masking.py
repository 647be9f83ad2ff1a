"""Masking: the paper's shares, special tokens left alone, and every sample masked by its own seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.bert.masking import Masking, document_numbers, heldout_seeds, train_seeds

VOCAB, SPECIAL, MASK = 50, (0, 1, 2, 3, 4), 4
rates = st.floats(0.01, 0.9)


def sequences(seed: int, count: int, length: int) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (count, length)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    return tokens


@settings(max_examples=50, deadline=None)
@given(rate=rates, seed=st.integers(0, 2**62), count=st.integers(1, 6), length=st.integers(4, 40))
def test_the_right_number_is_masked_and_never_a_special_token(rate, seed, count, length):
    tokens = sequences(seed, count, length)
    masked = Masking(rate, VOCAB, MASK, SPECIAL).apply(tokens, train_seeds(seed, 0, np.arange(count)))
    ordinary = (tokens > 4).sum(axis=1)
    wanted = np.minimum(ordinary, np.maximum(1, np.rint(rate * ordinary)))
    assert (np.bincount(masked.masked // length, minlength=count) == wanted).all()
    flat = tokens.reshape(-1)
    assert (masked.labels == flat[masked.masked]).all()
    assert (masked.labels > 4).all()
    assert (np.diff(masked.masked) > 0).all()
    seen = masked.input_ids.reshape(-1)
    untouched = np.delete(np.arange(flat.size), masked.masked)
    assert (seen[untouched] == flat[untouched]).all()
    assert np.isin(seen[masked.masked], [0, 1, 2, 3], invert=True).all()


@settings(max_examples=50, deadline=None)
@given(rate=rates, seed=st.integers(0, 2**62), epoch=st.integers(0, 100), order=st.permutations(range(6)))
def test_a_sample_is_masked_alike_alone_and_in_any_company(rate, seed, epoch, order):
    tokens, masking = sequences(1, 6, 20), Masking(rate, VOCAB, MASK, SPECIAL)
    together = masking.apply(tokens[list(order)], train_seeds(seed, epoch, np.array(order)))
    for row, index in enumerate(order):
        alone = masking.apply(tokens[[index]], train_seeds(seed, epoch, np.array([index])))
        assert (alone.input_ids[0] == together.input_ids[row]).all()
        mine = together.masked[together.masked // 20 == row] - 20 * row
        assert (alone.masked == mine).all()


def test_four_fifths_become_mask_a_tenth_random_a_tenth_stay():
    tokens = np.full((4000, 42), 7, np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    masked = Masking(0.25, VOCAB, MASK, SPECIAL).apply(tokens, train_seeds(0, 0, np.arange(4000)))
    assert len(masked.masked) == 4000 * 10
    seen = masked.input_ids.reshape(-1)[masked.masked]
    # Four standard deviations of a share of 40,000 draws are below 0.01.
    assert np.mean(seen == MASK) == pytest.approx(0.8, abs=0.01)
    assert np.mean((seen != MASK) & (seen != 7)) == pytest.approx(0.1 * 44 / 45, abs=0.01)
    random = seen[(seen != MASK) & (seen != 7)]
    assert set(random) == set(range(5, VOCAB)) - {7}
    places = np.bincount(masked.masked % 42, minlength=42)[1:-1]
    assert abs(places - 1000).max() < 150, "each of 40 places expects 1000"


def test_masking_differs_between_epochs_seeds_and_samples():
    tokens, masking = sequences(1, 1, 60), Masking(0.15, VOCAB, MASK, SPECIAL)
    cases = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]
    found = [masking.apply(tokens, train_seeds(s, e, np.array([i]))).masked for s, e, i in cases]
    assert len({tuple(places) for places in found}) == len(cases)


def test_a_sequence_of_special_tokens_alone_has_nothing_masked():
    tokens = np.array([[2, 1, 1, 3], [2, 9, 1, 3]], np.int32)
    masked = Masking(0.15, VOCAB, MASK, SPECIAL).apply(tokens, heldout_seeds(np.arange(2)))
    assert masked.masked.tolist() == [5]


def test_the_masking_is_the_one_it_always_was():
    """Golden values: another masking would silently change every result."""
    tokens = (np.arange(2 * 12).reshape(2, 12) + 5).astype(np.int32)
    masked = Masking(0.3, VOCAB, MASK, SPECIAL).apply(tokens, train_seeds(3, 1, np.array([4, 5])))
    assert masked.masked.tolist() == GOLDEN_PLACES
    assert masked.input_ids.reshape(-1)[masked.masked].tolist() == GOLDEN_SEEN


GOLDEN_PLACES = [0, 1, 6, 11, 12, 17, 19, 21]
GOLDEN_SEEN = [4, 4, 4, 4, 17, 4, 4, 4]


def test_document_numbers():
    """A [SEP] ends its document, and the one at the end of every sequence belongs to the last."""
    cls, sep = 2, 3
    tokens = np.array(
        [[cls, 9, sep, 9, 9, sep], [cls, 9, 9, 9, 9, sep], [cls, 9, 9, 9, sep, sep], [cls, sep, 9, sep, 9, sep]]
    )
    assert document_numbers(tokens, sep).tolist() == [
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 2, 2],
    ]
