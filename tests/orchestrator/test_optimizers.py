"""torch's optimizers without torch.compile's shields: the same bits, and nothing of torch.compile imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.optimizer import eager

KINDS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
TRAIN = """
import sys, torch
from orchestrator.group import Group
from real import real_plan, run_real
group = Group(0, 1, torch.device("cpu"))
group.connect(None, 1, 60.0)
run_real(group, real_plan({workload!r}, steps=2, batch_size=8, shards=2))
group.close()
print([name for name in ("torch._dynamo", "torch._inductor", "torchao") if name in sys.modules])
"""


def trained(kind, arguments):
    """Weights and the optimizer's state after three steps, with a state dict taken and loaded after the first."""
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 3)
    optimizer = kind(model.parameters(), fused=True, **arguments)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 7)).square().sum().backward()
        optimizer.step()
        if step == 0:
            optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    return [*model.parameters(), *(v for entry in state["state"].values() for v in entry.values())], state


@pytest.mark.parametrize("name", KINDS)
def test_the_bits_are_those_of_torch(name):
    kind, arguments = KINDS[name]
    (mine, my_state), (theirs, their_state) = trained(eager(kind), arguments), trained(kind, arguments)
    assert len(mine) == len(theirs) > 2
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert my_state["param_groups"] == their_state["param_groups"]
    assert issubclass(eager(kind), kind)


@pytest.mark.parametrize("workload", ["resnet", "bert"])
def test_training_imports_nothing_of_torch_compile(workload):
    """Its import takes every worker 0.9 s of a core before its first step, and 70 MB."""
    command = [sys.executable, "-c", TRAIN.format(workload=workload)]
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parents[1]}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
