"""Reduction alone: gradients summed over workers in fixed order, against gloo's all-reduce, on one machine.

    python tests/bench/reduction.py --out reduction.json
    python tests/bench/reduction.py --megabytes 45 --workers 2 --visits 30

Each worker is a process with one thread and one shard. Ours: TreeReducer from the first gradient of the last backward
pass to sums in p.grad, the copies into its buckets included. Baseline: all_reduce of one flat tensor of that size, in
place, to which DistributedDataParallel's views would point (its own copies are not counted). Parameters are of 2.3 MB
each (a 3x3 convolution of 256 channels). Both sides alternate in the same processes. Also given: ours as it is between
machines, without shared memory. Target, ratio of ours to the baseline: <= 0.5.
"""

import os
import time
from argparse import Namespace
from typing import Any

import paired
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from orchestrator import transport
from orchestrator.group import Group, OwnStore, reach_store
from orchestrator.reduce import TreeReducer
from orchestrator.shards import even_placement

TARGET = paired.Target(0.5, at_least=False)
PARAMETER = 256 * 256 * 9
WARM_UP = 2


def reducer(group: Group, count: int, shared: bool) -> tuple[TreeReducer, list[torch.Tensor]]:
    """A reducer of `count` parameters, and this worker's gradients of them."""
    parameters = [nn.Parameter(torch.zeros(PARAMETER)) for _ in range(count)]
    found = TreeReducer(parameters, 1, group)
    share, transport.share = transport.share, transport.share if shared else lambda group, floats: None
    found.place(even_placement(group.world, group.world))
    transport.share = share
    gradients = [torch.randn(PARAMETER) for _ in range(count)]
    return found, gradients


def ours(group: Group, found: TreeReducer, gradients: list[torch.Tensor]) -> float:
    """Seconds of one reduction."""
    dist.barrier()
    started = time.perf_counter()
    found.start_step()
    found.start_shard(group.rank)
    found.add_extra(torch.zeros(1))
    for i in reversed(range(len(gradients))):
        found._push(i, gradients[i])
    found.end_shard()
    found.finish()
    dist.barrier()
    return time.perf_counter() - started


def gloo(flat: torch.Tensor) -> float:
    """Seconds of one all-reduce."""
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(flat)
    dist.barrier()
    return time.perf_counter() - started


def work(rank: int, settings: Namespace, world: int, megabytes: int, port: int, answers: Any) -> None:
    """One worker; rank 0 tells what it timed."""
    torch.set_num_threads(1)
    group = Group(rank, world, torch.device("cpu")).connect(reach_store(("127.0.0.1", port)), 1, 120.0)
    count = max(1, round(megabytes * 1e6 / 4 / PARAMETER))
    near, far = reducer(group, count, True), reducer(group, count, False)
    flat = torch.zeros(count * PARAMETER)
    found: dict[str, list[float]] = {"ours": [], "gloo": [], "between machines": []}
    for visit in range(WARM_UP + settings.visits):
        for side in list(found)[:: 1 if visit % 2 else -1]:
            took = gloo(flat) if side == "gloo" else ours(group, *(near if side == "ours" else far))
            if visit >= WARM_UP:
                found[side].append(took)
    if rank == 0:
        answers.put(found)
    group.close()


def measure(settings: Namespace, world: int, megabytes: int) -> dict[str, Any]:
    """One size with one number of workers."""
    paired.say(f"{megabytes} MB, {world} workers")
    store = OwnStore("127.0.0.1")
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    processes = mp.start_processes(
        work, (settings, world, megabytes, store.address[1], answers), world, join=False, start_method="spawn"
    )
    found = answers.get()
    while not processes.join():
        pass
    compared = paired.compare(f"{megabytes} MB, {world} workers, ours / gloo", found["ours"], found["gloo"], TARGET)
    compared["unit"] = "s"
    far = paired.compare("", found["between machines"], found["gloo"], TARGET)
    compared["without_shared_memory"] = {key: far[key] for key in ("ratio", "spread")}
    return compared


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=15)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[45, 440])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    settings = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    report = paired.header("reduction", settings)
    report["comparisons"] = [
        measure(settings, world, megabytes) for megabytes in settings.megabytes for world in settings.workers
    ]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
