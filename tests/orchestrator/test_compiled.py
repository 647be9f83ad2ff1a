"""--compile: the same weights for every number of workers, other ones than without; what is compiled, and what is not.

The network is a toy, for a C++ compiler takes seconds for each of its kernels; the compiler is the real one.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import run_distributed
from real import real_plan, run_real
from torch import nn
from toys import RoundRecorder, ToyConfig, ToyWorkload, toy_plan

from orchestrator import toolchain
from orchestrator.assembly import build
from orchestrator.batchnorm import RunningStatistics
from orchestrator.build import build_state
from orchestrator.compiled import compile_for
from orchestrator.errors import TrainingError, UserError
from orchestrator.group import Group
from orchestrator.plan import Plan
from orchestrator.rounds import train
from orchestrator.shards import Placement, even_placement, placement_from_counts
from orchestrator.state import TrainingState, weights_sha256
from workloads.workload import Sums

VALUES = 12


class Net(nn.Module):
    """Batch normalization, dropout, and places picked from the microbatch, more or fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(VALUES, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, values_BV, picked_K):
        hidden_BD = F.dropout(torch.relu(self.norm(self.first(values_BV))), 0.3, self.training)
        return self.last(hidden_BD.index_select(0, picked_K))


class NetSamples:
    modules = ()

    def __len__(self) -> int:
        return 75

    def microbatch(self, indices, epoch, progress=1.0):
        values = np.sin(np.outer(indices + 1, np.arange(VALUES)) + epoch).astype(np.float32)
        picked = np.repeat(np.arange(len(indices)), indices % 3 + 1)
        return {
            "values": torch.from_numpy(values),
            "picked": torch.from_numpy(picked),
            "labels": torch.from_numpy(np.repeat(indices % 3, indices % 3 + 1)),
        }


class NetWorkload(ToyWorkload):
    varying_inputs = (1,)

    def build_model(self):
        return Net()

    def samples(self, split):
        return NetSamples()

    def sums(self, model, batch):
        scores = model(batch["values"], batch["picked"])
        loss = F.cross_entropy(scores, batch["labels"], reduction="sum")
        return Sums(loss, torch.tensor(float(len(scores))), {})


def net_plan(**given: object) -> Plan:
    return toy_plan(**{"compile": True, "optimizer": "adamw", "lr": 0.01, "threads": 1, **given})


def compiled_state(plan: Plan, cache: str) -> tuple[TrainingState, list]:
    """A new state, compiled if the plan says so, and the events of that."""
    os.environ["ORCHESTRATOR_CACHE"] = cache
    workload, events = NetWorkload(plan.config), []
    state = build_state(plan, workload, torch.device("cpu"))
    compile_for(plan, workload, state, torch.device("cpu"), "here", lambda _, told: events.extend(told))
    return state, events


def report(group: Group, plan: Plan, cache: str):
    """What a worker reports when it has compiled."""
    return compiled_state(plan, cache)[1][0]


def run_net(group: Group, plan: Plan, cache: str, placement: Placement | None = None):
    """(weights, losses) of a whole run."""
    state, recorder = compiled_state(plan, cache)[0], RoundRecorder()
    placement = placement or even_placement(plan.config.shards, group.world)
    train(plan, NetWorkload(plan.config), state, group, placement, recorder)
    return weights_sha256(state.model), recorder.losses


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """A cache folder with what the toy model needs, as an earlier run leaves it."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    (told,) = run_distributed(report, 1, net_plan(), folder)
    assert not told.cached
    return folder


def test_the_weights_do_not_depend_on_the_workers(cache):
    """75 samples in microbatches of 4: the last one of an epoch has 3, and other shards come first on every worker."""
    (alone,) = run_distributed(run_net, 1, net_plan(), cache)
    assert run_distributed(run_net, 2, net_plan(), cache, placement_from_counts((3, 5))) == [alone, alone]
    (without,) = run_distributed(run_net, 1, net_plan(compile=False), cache)
    assert without[0] != alone[0], "compiled code rounds otherwise"


def look(group: Group, plan: Plan, cache: str):
    """(what the worker reports, whether the state was left alone, what whole and other microbatches differ by, ...)."""
    before = build_state(plan, NetWorkload(plan.config), torch.device("cpu")).snapshot()
    state, (told,) = compiled_state(plan, cache)
    same = all(torch.equal(before[name], tensor) for name, tensor in state.snapshot().items())
    untouched = same and all(p.grad is None for p in state.parameters)
    RunningStatistics(state.model)  # as in a step
    state.model.train()

    def difference(values: torch.Tensor, picked: int) -> float:
        """Between the compiled model, which rounds otherwise, and the model."""
        outputs = []
        for model in (state.trained, state.model):
            torch.manual_seed(0)
            outputs.append(model(values, torch.arange(picked) % len(values)).detach())
        return float((outputs[0] - outputs[1]).abs().max())

    whole = torch.linspace(-1, 1, 4 * VALUES).view(4, VALUES)
    compiled = [difference(whole, picked) for picked in (2, 5, 9, 30)]
    others = [difference(whole[:3], 5), difference(torch.cat([whole, whole]), 5), difference(whole, 1)]
    try:
        state.trained(whole.double(), torch.arange(4))
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    return told, untouched, compiled, others, refusal


def test_what_is_compiled_and_what_is_not(cache):
    """One graph for all numbers of places; another number of samples, or a single place, does without."""
    ((told, untouched, compiled, others, refusal),) = run_distributed(look, 1, net_plan(), cache)
    assert (told.node, told.cached, untouched) == ("here", True, True)
    assert toolchain.version() in told.machine
    assert list((Path(cache) / "compiled").glob("*/fxgraph"))
    assert all(compiled)
    assert others == [0.0] * 3
    assert "recompile" in refusal


def test_without_a_compiler(monkeypatch, cache):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(TrainingError, match=r"--compile true: node here: the C\+\+ compiler /nonexistent/g\+\+ cannot"):
        compiled_state(net_plan(), cache)
    monkeypatch.setenv("CXX", "false")
    assert "cannot compile for Python" in toolchain.problem()


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_where_torch_s_compiler_is_switched_off(monkeypatch, cache, name):
    """The run would be computed without it, and say that it was compiled."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(TrainingError, match=f"torch's compiler is switched off by {name}=1; unset that"):
        compiled_state(net_plan(), cache)


@pytest.mark.parametrize("given", [{"reduce": "ddp"}, {"sync": "parameter-server"}])
def test_what_it_does_not_go_with(given):
    with pytest.raises(UserError, match="--compile true: goes with"):
        build(ToyConfig, {"compile": "true", **given})


@pytest.mark.long  # seconds of g++ for each kernel; the first test covers the paths
@pytest.mark.parametrize("given", [{"sync": "diloco", "local_steps": 3}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_nor_with_local_steps_or_mixed_precision(given, cache):
    (alone,) = run_distributed(run_net, 1, net_plan(**given), cache, timeout_s=290)
    assert run_distributed(run_net, 3, net_plan(**given), cache, timeout_s=290) == [alone] * 3


REAL = {
    "resnet": {"model": "resnet8", "augment": "shift", "optimizer": "sgd", "batch_size": 256, "steps": 10},
    "bert": {"model": "tiny", "dropout": 0.1, "optimizer": "adamw", "batch_size": 32, "steps": 8},
}


@pytest.mark.long  # minutes of g++
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workload", REAL)
def test_the_workloads_themselves(workload, cache):
    plan = real_plan(workload, compile=True, **REAL[workload])
    (alone,) = run_distributed(run_real, 1, plan, cache, timeout_s=1700)
    assert run_distributed(run_real, 3, plan, cache, timeout_s=600) == [alone] * 3
    (without,) = run_distributed(run_real, 1, real_plan(workload, **REAL[workload]))
    assert without[0] != alone[0]
