"""How gradients are gathered in lots and cut into messages: each float in one of them, each cache line one worker's."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from orchestrator import lots
from orchestrator.tree import Bucket

NUMELS = st.lists(st.integers(1, 3 * lots.PIECE_FLOATS), min_size=1, max_size=6)


@given(numels=NUMELS, world=st.integers(1, 9))
def test_every_float_is_in_one_piece_of_one_worker(numels, world):
    seen = {bucket: [] for bucket in range(len(numels))}
    for pieces in lots.cuts(numels, world):
        at = 0
        for piece in pieces:
            assert piece.at == at, "pieces of a chunk lie end to end"
            length = piece.floats.stop - piece.floats.start
            assert 0 < length <= lots.PIECE_FLOATS
            at += length
            seen[piece.bucket].append((piece.floats.start, piece.floats.stop))
    for bucket, stretches in seen.items():
        assert stretches[0][0] == 0
        assert stretches[-1][1] == numels[bucket]
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(stretches))


@given(numels=NUMELS, world=st.integers(1, 9))
def test_chunks_are_of_one_size_and_share_no_cache_line(numels, world):
    cut = lots.cuts(numels, world)
    sizes = [sum(piece.floats.stop - piece.floats.start for piece in pieces) for pieces in cut]
    assert max(sizes) <= sum(map(lots.padded_numel, numels)) / world + lots.LINE_FLOATS
    lines = [
        {
            (piece.bucket, floats // lots.LINE_FLOATS)
            for piece in pieces
            for floats in (piece.floats.start, piece.floats.stop - 1)
        }
        for pieces in cut
    ]
    for i, some in enumerate(lines):
        assert all(some.isdisjoint(others) for others in lines[i + 1 :])


@given(sizes=st.lists(st.tuples(st.integers(1, 2 * lots.LOT_FLOATS), st.booleans()), max_size=12))
def test_only_what_is_alone_is_gathered_and_in_order(sizes):
    buckets = [Bucket([i], [0], numel, alone=alone) for i, (numel, alone) in enumerate(sizes)]
    gathered = lots.gather(buckets)
    assert [bucket for lot in gathered for bucket in lot] == buckets
    for lot in gathered:
        assert len(lot) == 1 or all(bucket.alone for bucket in lot)
        assert sum(bucket.numel for bucket in lot[:-1]) < lots.LOT_FLOATS
    for lot, following in itertools.pairwise(gathered):
        full = sum(bucket.numel for bucket in lot) >= lots.LOT_FLOATS
        assert full or not (lot[-1].alone and following[0].alone)
