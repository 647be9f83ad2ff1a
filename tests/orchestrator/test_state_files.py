"""A state as a safetensors file: the library's own, but not copied."""

import math

import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint import DTYPES, pieces_of

NAMES = st.text("ab.1_", max_size=8)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@given(named=st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=12))
def test_a_state_is_the_file_that_the_library_writes_and_reads(named):
    """But for which of two equally wide types comes first."""
    tensors = {name: torch.arange(math.prod(shape)).reshape(shape).to(dtype) for name, (dtype, shape) in named.items()}
    content = b"".join(pieces_of(tensors))
    read = safetensors.torch.load(content)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].equal(tensor)
    types = {dtype for dtype, _ in named.values()}
    if len({dtype.itemsize for dtype in types}) == len(types):
        assert content == safetensors.torch.save(tensors)


def test_a_state_is_written_from_where_it_lies():
    """Two copies of it would be 2 GB of BERT-base's."""
    tensor = torch.zeros(1000)
    _, content = pieces_of({"w": tensor})
    tensor[7] = 1.0
    assert torch.frombuffer(content, dtype=torch.float32)[7] == 1.0
