"""A worker's piece of a tensor that is spread over a replica group, and the whole of it again."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This worker's piece, in the memory of `tensor`."""
    piece: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return piece


def piece_like(whole: Tensor, like: Tensor) -> Tensor:
    """This worker's piece of `whole`, cut as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return local(distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None))


def as_cut(piece: Tensor, like: Tensor) -> Tensor:
    """The same piece, known to be one where it is cut as `like` is."""
    if not isinstance(like, DTensor) or piece.shape != local(like).shape:
        return piece
    shape: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(piece, like.device_mesh, like.placements, run_check=False, **shape)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which every worker of the replica group has a piece; all of it call it."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def channels_last(whole: Tensor) -> Tensor:
    """The same numbers in the order of memory in which those of a whole model lie, and are added up."""
    return whole.contiguous(memory_format=torch.channels_last)
