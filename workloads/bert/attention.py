"""Attention with the same bits every time, on GPUs too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, allowed_B1TT: Tensor | None, dropout: float
) -> Tensor:
    """torch's scaled dot product attention, [B, H, T, d] of the queries' dtype.

    Where bits are promised its CUDA kernels are asked for strictly: a warning is all that they give for it otherwise,
    and add in any order (aten/src/ATen/native/transformers/cuda/attention_backward.cu, torch 2.13).
    """

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(
            query_BHTd, key_BHTd, value_BHTd, attn_mask=allowed_B1TT, dropout_p=dropout
        )

    if not (query_BHTd.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return plain()
    # A compiled backward pass is not called from here; heads of other sizes are padded, and the last node is not the
    # kernel's.
    if torch.compiler.is_compiling() or query_BHTd.shape[-1] % 8:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            return plain()
    return strictly(plain)


def strictly(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives, by kernels that are deterministic there and in the last operation's backward pass."""
    with _strict():
        found = compute()
    if found.grad_fn is not None:
        found.grad_fn.register_prehook(lambda *_: torch._C._set_deterministic_algorithms(True, warn_only=False))
        found.grad_fn.register_hook(lambda *_: torch._C._set_deterministic_algorithms(True, warn_only=True))
    return found


@contextmanager
def _strict() -> Iterator[None]:
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(True, warn_only=True)  # as build.prepare_torch has it
