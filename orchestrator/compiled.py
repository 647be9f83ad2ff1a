"""--compile: the model's forward and backward compiled by torch, before a worker takes its first seat.

The same bits for any number of workers: every worker compiles one graph, from the run's first microbatch, with shapes
that are fixed but for those that the workload declares as varying; and one more for each turning point of the run, from
which on inputs have other shapes. Another number of samples (the last microbatch of an epoch) is computed without the
compiler: that depends on the samples alone, not on who has seen which before; so is a varying size that torch has
compiled no code for. Any other graph that would have to be compiled anew is refused. Compiled code differs with the
CPU's vector unit and the C++ compiler, the `machine`: bits are promised for one kind of it.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator import toolchain
from orchestrator.batchnorm import RunningStatistics
from orchestrator.devices import chosen, cpu, kind_of
from orchestrator.digest import digest
from orchestrator.errors import OrchestratorError, TrainingError, one_line
from orchestrator.events import Event, ModelCompiled
from orchestrator.feed import batches
from orchestrator.plan import Plan, Request
from orchestrator.state import TrainingState
from orchestrator.storage import cache_folder
from workloads.workload import Batch, Workload

Report = Callable[[list[dict[str, Any]], list[Event]], object]
ANY_FLAG = re.compile("")
LEAST = 2  # torch gives sizes of 0 and 1 graphs of their own, whatever was marked as varying


class CompiledModel(nn.Module):
    """A model that is compiled for microbatches of `samples`, and called as it is for others.

    Args:
        varying: places of the inputs whose first dimension is not the number of samples.

    Attributes:
        calls: of what is compiled, until it is `sealed`: from then on nothing is compiled any more.
    """

    def __init__(self, model: nn.Module, samples: int, varying: tuple[int, ...]) -> None:
        super().__init__()
        self._model, self._samples, self._varying = model, samples, varying
        self._compiled = torch.compile(model, fullgraph=True, dynamic=False)
        self.calls, self.sealed = 0, False
        self._known = set[Any]()

    def _kinds(self, inputs: tuple[Tensor, ...]) -> Any:
        """Of the inputs, all but the sizes that vary."""
        return tuple((t.dtype, t.shape[place in self._varying :]) for place, t in enumerate(inputs))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Raises RuntimeError where a whole microbatch needs a graph that there is none of when this was sealed."""
        if len(inputs[0]) != self._samples or any(len(inputs[place]) < LEAST for place in self._varying):
            output: Tensor = self._model(*inputs)
        elif self.sealed:
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    output = self._compiled(*inputs)
            except RuntimeError as error:  # sums over more than 4096 have other code than those over fewer
                if not (self._varying and "recompile" in str(error) and self._kinds(inputs) in self._known):
                    raise
                output = self._model(*inputs)
        else:
            self._known.add(self._kinds(inputs))
            for place in self._varying:
                torch._dynamo.mark_dynamic(inputs[place], 0)
            output = self._compiled(*inputs)
            self.calls += 1
        return output


def compile_for(
    plan: Plan, workload: Workload, state: TrainingState, device: torch.device, node: str, report: Report
) -> str:
    """Compile what the run trains, if it is to be compiled; returns what its bits depend on: the device, the machine.

    Args:
        report: takes records of steps (none) and events (one).

    Raises:
        TrainingError: this machine cannot compile it.
        DataError: the first microbatch cannot be read.
    """
    if not plan.config.compile:
        return kind_of(device)
    if problem := toolchain.problem():
        raise TrainingError(f"--compile true: node {node}: {problem}")
    started = time.monotonic()
    try:
        requests = _requests(plan, workload)
        fed = list(batches(workload.samples("train"), requests, 0, device))
        # Of a varying size torch's keys have no number, and what it compiles depends on the one that it was shown.
        shown = [sorted((name, tuple(t.shape)) for name, t in batch.items()) for _, batch in fed]
        with _cache(plan.config.threads, device, digest(shown) if workload.varying_inputs else "") as machine:
            state.trained = _first_microbatches(plan, workload, state, fed)
    except OrchestratorError:
        raise
    except Exception as error:
        said = one_line(error)
        raise TrainingError(f"--compile true: node {node}: {type(error).__name__}: {said}") from error
    missed = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]
    report([], [ModelCompiled(node, os.getpid(), machine, round(time.monotonic() - started, 3), not missed)])
    return ", ".join([device.type, machine, *chosen(), f"torch {torch.__version__}"])


@contextmanager
def _cache(threads: int, device: torch.device, shapes: str) -> Iterator[str]:
    """Torch's compiler set up to keep all it makes in the cache folder of this machine, whose description this gives.

    What is compiled for other `shapes` is kept apart.

    Workers of one machine take turns: the first compiles, the others find it done.
    """
    folder = cache_folder() / "compiled"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    # What is set below holds for this thread alone; a GPU's backward pass may be compiled in autograd's.
    os.environ |= {"TORCHINDUCTOR_DETERMINISTIC": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    import torch._dynamo
    import torch._inductor.config as inductor

    inductor.compile_threads = threads
    inductor.cpp.vec_isa_ok = True  # the CPU decides, not a probe that a busy machine may fail
    inductor.deterministic = True  # a GPU's kernels are not chosen by timing
    # Generated code draws number by number on a CPU: BERT-mini's forward pass took 0.40 s with it, 0.28 without.
    inductor.fallback_random = device.type == "cpu"
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    machine = _machine(device)
    # Torch's own keys say nothing of the CPU, and a cache folder may be shared.
    folder = folder / re.sub(r"[^A-Za-z0-9.]+", "-", f"{machine} {shapes[:16]}").strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    with (folder / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield machine


def _machine(device: torch.device) -> str:
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # The compiler's own name of the vector unit leaves out what -march=native may use.
    return f"{pick_vec_isa()}, {toolchain.version()}, {cpu(ANY_FLAG)}"


def _requests(plan: Plan, workload: Workload) -> list[Request]:
    """The run's first microbatch, once for every shape that it could have."""
    request = plan.request(0, 0)
    return [request._replace(progress=share) for share in (0.0, *workload.turning_points)]


def _first_microbatches(
    plan: Plan, workload: Workload, state: TrainingState, fed: Sequence[tuple[Any, Batch]]
) -> nn.Module:
    """Forward and backward of the run's first microbatch, as in a step, once for every shape that it could have.

    Leaves the state as it was.
    """
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    model = CompiledModel(state.model, len(fed[0][0]), workload.varying_inputs)
    # Its momentum is a constant of the graph.
    statistics = RunningStatistics(state.model) if plan.config.sync == "allreduce" else None
    state.model.train()
    try:
        for indices, batch in fed:
            with state.precision.autocast():
                sums = workload.sums(model, batch)
            state.precision.scaler.scale(sums.loss / workload.nominal_count(len(indices))).backward()
    finally:
        if statistics:
            statistics.close()
        for buffer, kept in buffers:
            buffer.copy_(kept)
        for parameter in state.parameters:
            parameter.grad = None
    model.sealed = True
    if model.calls < len(fed):
        raise TrainingError(
            "--compile true: this run's microbatches are too small; leave it out, or use fewer --shards"
        )
    return model
