"""Microbatches in the order they are asked for, prepared ahead by processes where that pays."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from orchestrator.errors import DataError
from workloads.workload import Batch, Samples

Request = tuple[int, NDArray[np.int64]]  # (epoch, sample indices)


Fed = tuple[NDArray[np.int64], Batch]  # the sample indices as the data set was asked for them, and what it gave


class _Microbatches(Dataset[Fed | DataError]):
    """A map from a request to its batch, in the form that torch's DataLoader takes.

    A DataError is handed over as a value: torch would wrap its one line into a loader process's traceback.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, request: Request) -> Fed | DataError:
        epoch, indices = request
        try:
            return indices, self._samples.microbatch(indices, epoch)
        except DataError as error:
            return error


def batches(samples: Samples, requests: Iterable[Request], processes: int, device: torch.device) -> Iterator[Fed]:
    """The (indices, batch) of `requests`, in their order, batches on `device`.

    Args:
        processes: that prepare batches ahead; 0 prepares each when it is asked for, in this process.

    Raises:
        DataError: a sample cannot be read.
    """
    microbatches = _Microbatches(samples)
    if processes:
        loader: Iterable[Fed | DataError] = DataLoader(
            microbatches,
            sampler=requests,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=processes,
            prefetch_factor=4,
            pin_memory=device.type == "cuda",
        )
    else:
        loader = (microbatches[request] for request in requests)
    for fed in loader:
        if isinstance(fed, DataError):
            raise fed
        indices, batch = fed
        yield indices, {name: _on(device, tensor) for name, tensor in batch.items()}


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device; a GPU copies what is pinned while the host goes on."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
