"""Baseline of elastic_cost.py: the orchestrator's own training loop with nothing elastic around it.

    PYTHONPATH=. torchrun --standalone --nproc-per-node 2 tests/bench/bare_loop.py resnet --steps 60 ...

The same plan, shards, gradients and optimizer; no Ray, no coordinator, no heartbeat, nobody who asks for a pause and
nothing that is written. Prints one JSON line: the seconds of each step on rank 0 and the weights' hash.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

from orchestrator.assembly import assemble
from orchestrator.build import build_state, prepare_torch, settle_loader
from orchestrator.group import Group
from orchestrator.loop import Observer, train
from orchestrator.plan import Plan
from orchestrator.resume import resolve
from orchestrator.run import read_settings
from orchestrator.shards import even_placement
from orchestrator.state import TrainingState, weights_sha256
from orchestrator.step import StepTotals
from workloads.registry import WORKLOADS


class Seconds(Observer):
    """Notes how long each step took."""

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self._since_s = time.perf_counter()

    def stop_wanted(self) -> bool:
        return False

    def committed(self, state: TrainingState, totals: StepTotals, lr: float) -> None:
        now = time.perf_counter()
        self.step_s.append(now - self._since_s)
        self._since_s = now

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self._since_s = time.perf_counter()


def main() -> None:
    name, rank, world = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    entry = WORKLOADS[name]
    given, _, _ = read_settings(name, sys.argv[2:])
    config = resolve(entry.absolute_paths(assemble(entry.config_type(), given)))
    summary = entry.check_data(config)
    plan = Plan(name, config, summary.train_samples, summary.heldout_samples, summary.fingerprint, summary.blocks)
    prepare_torch(config.threads, same_bits=True)
    workload, device = entry.build(config), torch.device("cpu")
    plan = settle_loader(plan, workload)
    state, seconds = build_state(plan, workload, device), Seconds()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    group = Group(rank, world, device).connect(store if world > 1 else None, 1, 600.0)
    train(plan, workload, state, group, even_placement(config.shards, world), seconds)
    if rank == 0:
        print(json.dumps({"step_s": seconds.step_s, "weights_sha256": weights_sha256(state.model)}))
    group.close()


if __name__ == "__main__":
    main()
