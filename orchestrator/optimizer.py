"""Optimizers, by configuration."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from orchestrator.config import RunConfig


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum or Nesterov's (Sutskever et al. 2013), Adam (Kingma and Ba 2015), AdamW; fused kernels.

    AdamW is Loshchilov and Hutter's of 2019.
    """
    groups = list(parameter_groups(config, model))
    fused = all(p.device.type != "xla" for p in model.parameters())  # XLA fuses what it is given
    if config.optimizer in ("sgd", "nesterov"):
        # Without any momentum the two are one, and torch refuses to call it Nesterov's.
        nesterov = config.optimizer == "nesterov" and config.momentum > 0
        sgd = eager(torch.optim.SGD)(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)
        for parameter in (p for group in sgd.param_groups for p in group["params"]):
            # torch makes them in the first step, of uninitialized memory if fp16 skips that step.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = eager(torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW)
    return kind(groups, lr=config.lr, betas=(config.momentum, config.beta2), fused=fused)


@functools.cache
def eager(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """torch's own class without what shields it from torch.compile, which here compiles models only.

    The shields import torch._dynamo: 0.9 s of a core and 75 MB in every worker before its first step.
    """
    plain = inspect.unwrap(kind.step)

    @torch.no_grad()
    def step(self: torch.optim.Optimizer, closure: None = None) -> None:
        """See torch.optim.Optimizer; without a closure."""
        plain(self)

    shielded = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    whole = {name: inspect.unwrap(getattr(torch.optim.Optimizer, name)) for name in shielded}
    return type(kind.__name__, (kind,), {**whole, "step": step, "__module__": __name__})


def parameter_groups(config: RunConfig, model: nn.Module) -> Iterable[dict[str, Any]]:
    """The parameters in the order in which the optimizer numbers them, with their weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.decay == "all":
        yield {"params": parameters, "weight_decay": config.weight_decay}
        return
    yield {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay}
    yield {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}


def parameter_order(config: RunConfig, model: nn.Module) -> list[str]:
    """Names of the parameters in the order of the optimizer of a whole model."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in parameter_groups(config, model) for p in group["params"]]
