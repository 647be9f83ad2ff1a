"""Attention within documents: sequences hold several, and one must not see another."""

import dataclasses

import numpy as np
import torch

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
