"""Loader processes of BERT map the file of token ids: none has a copy of it."""

import pickle

import numpy as np

from workloads.bert.masking import Masking
from workloads.bert.workload import BertSamples


def samples(sequences: np.ndarray) -> BertSamples:
    return BertSamples(sequences, Masking(0.15, 100, 4, (0, 1, 2, 3, 4)), seed=7, sep_id=3)


def test_a_mapped_file_is_mapped_again(tmp_path):
    ids = np.random.default_rng(0).integers(5, 100, (5000, 16)).astype("<i4")
    file = tmp_path / "train.int32"
    ids.tofile(file)
    mapped = samples(np.memmap(file, dtype="<i4", mode="r").reshape(-1, 16))
    sent = pickle.dumps(mapped)
    assert len(sent) < 10_000 < ids.nbytes
    there = pickle.loads(sent)
    assert isinstance(there._sequences, np.memmap)
    assert len(there) == len(mapped) == 5000
    which = np.array([4999, 0, 77])
    for name, values in mapped.microbatch(which, 1).items():
        assert values.equal(there.microbatch(which, 1)[name])
    assert len(pickle.dumps(there)) < 10_000, "a process of a process too"


def test_an_array_in_memory_is_sent():
    ids = np.random.default_rng(0).integers(5, 100, (50, 16)).astype("<i4")
    there = pickle.loads(pickle.dumps(samples(ids)))
    assert (there._sequences == ids).all()
