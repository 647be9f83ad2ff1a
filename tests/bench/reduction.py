"""Reduction alone: gradients summed over workers in fixed order, against gloo's all-reduce.

    python tests/bench/reduction.py --out reduction.json
    python tests/bench/reduction.py --megabytes 45 --workers 2 --wires together --visits 30

Each worker is a process with one thread. Ours: TreeReducer from the first gradient of the last backward pass to sums in
p.grad, the copies into its buckets included. Baseline: all_reduce of one flat tensor of that size, in place, to which
DistributedDataParallel's views would point (its own copies are not counted). Parameters are of 2.3 MB each (a 3x3
convolution of 256 channels). Both sides alternate in the same processes.

--wires: `together`, workers of one machine, ours in shared memory; `loopback`, the same without shared memory; `hosts`,
one worker a host (network namespaces; needs root); a rate (1gbit), hosts with cables of that rate; 2x5gbit, two workers
a host. Every worker has one shard, or --shards / workers of them: then the blocks that were complete before the last
backward pass are pushed before the clock starts; with --pause they have the time of an all-reduce to travel, as
they have while a shard is computed. Targets, ratio of ours to the baseline: together <= 0.5, else <= 1.0.
"""

import contextlib
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import paired
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import wires
from torch import nn

from orchestrator import sharedmemory
from orchestrator.group import Group
from orchestrator.reduce import TreeReducer
from orchestrator.shards import even_placement
from orchestrator.stores import OwnStore, reach_store

PARAMETER = 256 * 256 * 9
WARM_UP = 2


class Ours:
    """A reducer and gradients for it."""

    def __init__(self, group: Group, count: int, shards: int, loopback: bool) -> None:
        self._shards, self._group = even_placement(shards, group.world).range_of(group.rank), group
        self._reducer = TreeReducer([nn.Parameter(torch.zeros(PARAMETER)) for _ in range(count)], 1, group)
        network = sharedmemory._network
        if loopback:
            sharedmemory._network = lambda: group.rank
        self._reducer.place(even_placement(shards, group.world))
        sharedmemory._network = network
        self._gradients = [torch.randn(PARAMETER) for _ in range(count)]

    def seconds(self, pause_s: float) -> float:
        """Of one reduction."""
        self._reducer.start_step()
        for shard in self._shards[:-1]:
            self._pass(shard, [gradient.clone() for gradient in self._gradients])
        gradients = self._gradients
        if len(self._shards) > 1:  # they are added to
            gradients = [gradient.clone() for gradient in gradients]
            time.sleep(pause_s)
        dist.barrier()
        started = time.perf_counter()
        self._pass(self._shards[-1], gradients)
        self._reducer.finish()
        dist.barrier()
        return time.perf_counter() - started

    def _pass(self, shard: int, gradients: list[torch.Tensor]) -> None:
        self._reducer.start_shard(shard)
        self._reducer.add_extra(torch.zeros(1))
        for i in reversed(range(len(gradients))):
            self._reducer.add_gradient(i, gradients[i])
        self._reducer.end_shard()

    def close(self) -> None:
        self._reducer.close()


def gloo(flat: torch.Tensor) -> float:
    """Seconds of one all-reduce."""
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(flat)
    dist.barrier()
    return time.perf_counter() - started


def work(rank: int, settings: Namespace, case: dict[str, Any], names: list[str], ports: Any, answers: Any) -> None:
    """One worker; rank 0 tells what it timed."""
    torch.set_num_threads(1)
    world, host = case["workers"], "127.0.0.1"
    if names:
        each = world // len(names)
        wires.enter(names[rank // each])
        host = wires.address(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "v0" if names else "lo"
    if rank == 0:
        own = OwnStore(host)
        for _ in range(1, world):
            ports.put(own.address[1])
    store = own.store if rank == 0 else reach_store((host, ports.get()))
    group = Group(rank, world, torch.device("cpu")).connect(store, 1, 120.0)
    count = max(1, round(case["megabytes"] * 1e6 / 4 / PARAMETER))
    ours = Ours(group, count, case["shards"], case["wires"] == "loopback")
    flat = torch.zeros(count * PARAMETER)
    found: dict[str, list[float]] = {"ours": [], "gloo": []}
    pause_s = 0.0
    for visit in range(WARM_UP + settings.visits):
        for side in list(found)[:: 1 if visit % 2 else -1]:
            took = gloo(flat) if side == "gloo" else ours.seconds(pause_s)
            if visit >= WARM_UP:
                found[side].append(took)
            elif side == "gloo" and settings.pause:
                pause_s = took
    if rank == 0:
        answers.put(found)
    ours.close()
    group.close()


@contextlib.contextmanager
def network(case: dict[str, Any]) -> Iterator[list[str]]:
    """The hosts of a case, if any."""
    if case["wires"] in ("together", "loopback"):
        yield []
    else:
        each, _, rate = case["wires"].rpartition("x")
        with wires.hosts(case["workers"] // int(each or 1), rate.removeprefix("hosts")) as names:
            yield names


def measure(settings: Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """One size with one number of workers on one kind of network."""
    name = "{megabytes} MB, {workers} workers, {shards} shards, {wires}".format(**case)
    paired.say(name)
    context = mp.get_context("spawn")
    ports, answers = context.SimpleQueue(), context.SimpleQueue()
    with network(case) as names:
        arguments = (settings, case, names, ports, answers)
        processes = mp.start_processes(work, arguments, case["workers"], join=False, start_method="spawn")
        found = answers.get()
        while not processes.join():
            pass
    target = paired.Target(0.5 if case["wires"] == "together" else 1.0, at_least=False)
    return paired.compare(f"{name}, ours / gloo", found["ours"], found["gloo"], target) | {"unit": "s"}


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=15)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[45, 440])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--shards", type=int, default=0, help="0: as many as workers")
    parser.add_argument("--pause", action="store_true", help="see above")
    parser.add_argument("--wires", nargs="+", default=["together", "loopback", "hosts", "1gbit"])
    settings = parser.parse_args()
    report = paired.header("reduction", settings)
    report["comparisons"] = [
        measure(settings, {"megabytes": megabytes, "workers": world, "shards": settings.shards or world, "wires": wire})
        for wire in settings.wires
        for megabytes in settings.megabytes
        for world in settings.workers
    ]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
