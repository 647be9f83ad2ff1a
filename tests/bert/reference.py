"""transformers' own model, with our model's weights and layers of dropout."""

from typing import Any

import orchestrator.vision_ops  # noqa: F401  before transformers, which imports torchvision

# isort: split
import torch
import transformers

from workloads.bert.dropout import Dropout
from workloads.bert.export import config_of
from workloads.bert.model import Bert


def as_transformers(model: Bert) -> Any:
    """BertForMaskedLM with our model's own tensors, in its mode (training or not).

    Its layers of dropout become ours, which draw otherwise; that of attention's weights is torch's in both.
    """
    config = config_of(model)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and thrown away
        exported = transformers.BertForMaskedLM(config)
    exported.load_state_dict(model.state_dict(), assign=True)
    exported.tie_weights()
    for module in list(exported.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Dropout):
                setattr(module, name, Dropout(child.p))
    return exported.train(model.training)
