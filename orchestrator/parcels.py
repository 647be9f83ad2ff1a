"""Messages between the processes of one machine, and batches of tensors that travel as memory, not through a pipe.

The memory has no name: it is gone with the last process that holds it, whatever ended that process, and no limit of
/dev/shm applies to it.
"""

import io
import mmap
import os
import pickle
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workloads.workload import Batch

HEADER = struct.Struct("!I")
ALIGNED = 64  # bytes, as torch aligns what it allocates: kernels may round otherwise where rows begin elsewhere
CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
Layout = list[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]]  # name, type, shape, strides, offset


def send(to: socket.socket, message: Any, descriptor: int | None = None) -> None:
    """Send anything that can be pickled, and a copy of a file descriptor with it."""
    data = pickle.dumps(message)
    data = HEADER.pack(len(data)) + data
    sent = socket.send_fds(to, [data], [] if descriptor is None else [descriptor])
    to.sendall(data[sent:])


def receive(of: socket.socket) -> tuple[Any, int]:
    """(the next message, the descriptor that came with it or -1); raises EOFError where the other end is closed."""
    try:
        header, descriptors, _, _ = socket.recv_fds(of, HEADER.size, 1, CLOSE_ON_EXEC)
        data = _all(of, header, HEADER.size)
        data = _all(of, b"", HEADER.unpack(data)[0])
    except ConnectionError:
        raise EOFError from None
    return pickle.loads(data), descriptors[0] if descriptors else -1


def _all(of: socket.socket, data: bytes, size: int) -> bytes:
    """`data` and what follows it, `size` bytes together."""
    while len(data) < size:
        more = of.recv(min(size - len(data), 1 << 20))
        if not more:
            raise EOFError
        data += more
    return data


def _memory(size: int) -> int:
    """The descriptor of new memory."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("samples", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, max(1, size))
    return descriptor


def pack(batch: Batch) -> tuple[Layout, int, int]:
    """(what is where, bytes, the descriptor of memory that holds a copy of the batch)."""
    layout: Layout = []
    offset = 0
    for name, tensor in batch.items():
        strides = torch.empty_like(tensor, device="meta").stride()  # the tensor's own, unless there are gaps
        layout.append((name, tensor.dtype, tuple(tensor.shape), strides, offset))
        offset += -(-tensor.nbytes // ALIGNED) * ALIGNED
    descriptor = _memory(offset)
    for name, tensor in _views(layout, mmap.mmap(descriptor, max(1, offset))).items():
        tensor.copy_(batch[name])
    return layout, offset, descriptor


def unpack(layout: Layout, size: int, descriptor: int) -> Batch:
    """The batch; closes the descriptor. Its tensors are the memory itself."""
    memory = mmap.mmap(descriptor, max(1, size))
    os.close(descriptor)
    return _views(layout, memory)


def _views(layout: Layout, memory: mmap.mmap) -> Batch:
    found = {}
    for name, kind, shape, strides, offset in layout:
        count = int(np.prod(shape))
        flat = torch.frombuffer(memory, dtype=kind, count=count, offset=offset) if count else torch.empty(0, dtype=kind)
        found[name] = flat.as_strided(shape, strides)
    return found


class _Pickler(pickle.Pickler):
    """Pickles maps of whole files by their names: whoever unpickles them maps the file too."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, np.memmap) and isinstance(thing.filename, str | Path):
            whole = thing.offset == 0 and thing.flags.c_contiguous and thing.nbytes == os.path.getsize(thing.filename)
            if whole:
                return np.memmap, (str(thing.filename), thing.dtype, "r", 0, thing.shape)
        return NotImplemented


def wrap(thing: Any) -> tuple[list[int], int]:
    """(sizes, descriptor): anything, pickled; many processes can unwrap it, and share the arrays in it."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(thing)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    descriptor, offset = _memory(sum(map(_up, sizes))), 0
    for part in parts:
        done = 0
        while done < part.nbytes:  # one write takes 2 GB at most
            done += os.pwrite(descriptor, part[done:], offset + done)
        offset += _up(part.nbytes)
    return sizes, descriptor


def unwrap(sizes: list[int], descriptor: int) -> Any:
    """What was wrapped; closes the descriptor. Arrays are views of the memory until they are written to."""
    memory = memoryview(mmap.mmap(descriptor, max(1, sum(map(_up, sizes))), mmap.MAP_PRIVATE))
    os.close(descriptor)
    parts, offset = [], 0
    for size in sizes:
        parts.append(memory[offset : offset + size])
        offset += _up(size)
    return pickle.loads(parts[0], buffers=parts[1:])


def _up(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
