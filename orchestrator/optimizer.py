"""Optimizers, by configuration."""

from collections.abc import Iterable

import torch
from torch import nn

from orchestrator.config import RunConfig


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019), fused kernels."""
    groups = list(_groups(config, model))
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
        for parameter in (p for group in sgd.param_groups for p in group["params"]):
            # torch makes them in the first step, of uninitialized memory if fp16 skips that step.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.momentum, config.beta2), fused=True)


def _groups(config: RunConfig, model: nn.Module) -> Iterable[dict[str, object]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.decay == "all":
        yield {"params": parameters, "weight_decay": config.weight_decay}
        return
    yield {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay}
    yield {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
