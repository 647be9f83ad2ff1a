"""Attention within documents: sequences hold several, and one must not see another."""

import dataclasses

import numpy as np
import pytest
import torch

from workloads.bert.attention import strictly
from workloads.bert.workload import BertWorkload


def test_attention_within_documents(config):
    """Another document's tokens change no logit; where a sequence has one document, it is ordinary attention."""
    workload = BertWorkload(dataclasses.replace(config, attention="document"))
    model = workload.build_model().eval()
    batch = workload.samples("train").microbatch(np.arange(8), 0)
    assert int(batch["documents"].max()) > 0, "no sequence has two documents"
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    first = batch["documents"] == 0
    changed["input_ids"][first] = batch["input_ids"][first].flip(0)
    places = torch.nonzero(~first.flatten()).flatten()
    assert len(places)

    def logits(of, documents=True):
        return model(of["input_ids"], places, of["documents"] if documents else None)

    assert torch.equal(logits(batch), logits(changed))
    assert not torch.equal(logits(batch, documents=False), logits(changed, documents=False))
    one = torch.zeros_like(batch["documents"])
    torch.testing.assert_close(model(batch["input_ids"], places, one), logits(batch, documents=False))
    sums = workload.sums(model, batch)
    assert torch.equal(sums.loss, bert_loss(model, batch))


def bert_loss(model, batch):
    return torch.nn.functional.cross_entropy(
        model(batch["input_ids"], batch["masked"], batch["documents"]), batch["labels"], reduction="sum"
    )


class Asked(torch.autograd.Function):
    """Twice as much; notes whether torch is strict about what adds in any order."""

    seen: list[tuple[str, bool]] = []

    @staticmethod
    def note(when: str) -> None:
        strict = (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        Asked.seen.append((when, strict))

    @staticmethod
    def forward(ctx, x):
        Asked.note("forward")
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        Asked.note("backward")
        return gradient * 2


@pytest.fixture
def warned():
    """Torch as a worker has it that promises the same bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    Asked.seen.clear()
    yield
    torch.use_deterministic_algorithms(False)


def test_torch_is_strict_in_attention_alone(warned):
    """Its CUDA kernels add in any order where they are only to warn, in the backward pass."""
    x = torch.ones(3, requires_grad=True)
    found = strictly(lambda: Asked.apply(x * 3))
    found.register_hook(lambda _: Asked.note("before"))
    Asked.apply(found).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 12.0))
    assert Asked.seen == [
        ("forward", True), ("forward", False), ("backward", False), ("before", False), ("backward", True)
    ]  # fmt: skip
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_torch_is_not_left_strict_by_what_fails(warned):
    with pytest.raises(ZeroDivisionError):
        strictly(lambda: torch.ones(1) * (1 / 0))
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_attention_without_gradients_is_computed_all_the_same(warned):
    with torch.no_grad():
        assert torch.equal(strictly(lambda: Asked.apply(torch.ones(2))), torch.full((2,), 2.0))
    assert Asked.seen == [("forward", True)]
