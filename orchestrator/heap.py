"""Large blocks of memory that go back to the kernel as soon as they are freed."""

import ctypes

M_MMAP_THRESHOLD = -3  # malloc.h


def return_large_blocks(size: int) -> None:
    """Let what takes `size` bytes or more be pages of its own, for as long as this process lives.

    On the heap its place is too small for the next one as soon as something that stays lies behind it, and the heap
    grows. See mallopt(3); a C library without it has other heaps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, size)
