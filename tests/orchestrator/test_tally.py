"""Held-out samples are handed out to workers that come and go; each chunk counts once, in its place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import TrainingError
from orchestrator.tally import DEATHS, FIRST_S, LEAST_S, Tally

NAMES = ("loss", "count")


def rows_of(chunks: range, chunk: int, samples: int) -> np.ndarray:
    """As a worker would sum them: the chunk's number, and its samples."""
    return np.asarray([[c, min(chunk, samples - c * chunk)] for c in chunks], np.float64)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3000),
    st.sampled_from([1, 64]),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("tttffl")), max_size=60),
)
def test_every_chunk_counts_once_whoever_is_lost(samples, chunk, workers, story):
    tally, held = Tally(samples, chunk, workers), {}
    deaths = 0
    for who, what in [*story, *[(0, "t"), (0, "f"), (1, "f"), (2, "f"), (3, "f")] * (samples + 1)]:
        name = f"w{who}"
        if what == "t" and name not in held:
            chunks = tally.take(name, 0.0)
            if chunks is not None:
                held[name] = chunks
        elif what == "f" and name in held:
            tally.finish(name, NAMES, rows_of(held.pop(name), chunk, samples), 1.0)
        elif what == "l" and deaths < DEATHS - 1:
            deaths += name in held
            held.pop(name, None)
            tally.lose(name)
        if tally.complete:
            break
    assert tally.complete
    assert tally.samples_done == samples
    found = tally.rows()
    assert found[:, 0].tolist() == list(range(len(found)))
    assert found[:, 1].sum() == samples
    assert (tally.left, tally.take("w9", 0.0)) == (0, None)


def test_samples_over_which_worker_after_worker_dies_are_named():
    tally = Tally(1000, 64, 1)
    first = tally.take("w0", 0.0)
    tally.finish("w0", NAMES, rows_of(first, 64, 1000), 1.0)
    for number in range(DEATHS - 1):
        assert tally.take(f"d{number}", 0.0).start == first.stop
        tally.lose(f"d{number}")
    tally.take("last", 0.0)
    with pytest.raises(TrainingError, match=f"samples {64 * first.stop} to "):
        tally.lose("last")


def test_who_does_not_get_on_is_found_by_what_others_need():
    tally = Tally(100_000, 64, 4)
    tally.take("slow", 0.0)
    chunks = tally.take("quick", 0.0)
    assert tally.stuck(FIRST_S - 1) == []
    assert tally.stuck(FIRST_S + 1) == ["slow", "quick"]
    tally.finish("quick", NAMES, rows_of(chunks, 64, 100_000), 1.0)
    assert tally.stuck(LEAST_S - 1) == []
    assert tally.stuck(LEAST_S + 1) == ["slow"]
    for _ in range(3):
        chunks = tally.take("quick", 100.0)
        tally.finish("quick", NAMES, rows_of(chunks, 64, 100_000), 110.0)
    assert tally.stuck(199.0) == [], "20 times the median of 10 s"
    assert tally.stuck(201.0) == ["slow"]
