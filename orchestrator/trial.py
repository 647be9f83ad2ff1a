"""--precision auto: forward and backward of the run's own first microbatch, timed by turns in each precision.

It is measured, for it cannot be told from the device: on one CPU (AVX512 with bf16, no AMX) bf16 autocast takes 0.6 of
fp32's time for resnet18 and for a BERT of 256 hidden units, 0.8 and 1.0 of it for the small default models, and took
1.3 times as long for a BERT whose head is computed at every place.
"""

import copy
import time
from collections.abc import Mapping

import torch
from torch import nn

from orchestrator.devices import finish
from orchestrator.group import Group
from orchestrator.plan import Plan
from orchestrator.precision import Precision
from workloads.workload import Workload

# Of the time of what is chosen so far. Noise must not decide between one run's weights and another's: this is where
# those models, measured again and again beside other load, were never far from their side.
ENOUGH = 0.7
TURNS, BUDGET_S = 5, 1.0


def choose(seconds: Mapping[str, float]) -> str:
    """The precision to train in: the first one, unless a later one takes at most ENOUGH of its time, and so on.

    Args:
        seconds: of a microbatch, by precision, in the order of preference (fp32, bf16, fp16).
    """
    chosen, *others = seconds
    for kind in others:
        if seconds[kind] <= ENOUGH * seconds[chosen]:
            chosen = kind
    return chosen


def candidates(plan: Plan, device: torch.device) -> list[str]:
    """What this device can compute in and the run's --sync allows, in the order of preference."""
    if device.type != "cuda":
        return ["fp32", "bf16"]
    bf16 = ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else []
    return ["fp32", *bf16, *(["fp16"] if plan.config.sync == "allreduce" else [])]


def measure(plan: Plan, workload: Workload, model: nn.Module, group: Group) -> dict[str, float]:
    """Seconds of a microbatch in each precision, the best of up to TURNS turns, of BUDGET_S in all but for the first.

    `model` is copied and nothing of the run is touched but torch's global generator, which every step seeds.

    Raises:
        DataError: the first samples cannot be read.
        PeerLostError: the generation ended meanwhile.
    """
    schedule, config = plan.schedule, plan.config
    size = schedule.microbatch_size if config.reduce == "fixed" else config.batch_size // group.world
    indices = schedule.order(config.seed, 0, schedule.size, 0, min(size, schedule.size))
    batch = {n: t.to(group.device) for n, t in workload.samples("train").microbatch(indices, 0, 0.0).items()}
    model = copy.deepcopy(model).train()
    kinds = {kind: Precision(kind, group.device.type) for kind in candidates(plan, group.device)}

    # Of this process alone where it computes itself: the CPU may be shared with others.
    clock = time.process_time if group.device.type == "cpu" else time.perf_counter

    def once(precision: Precision) -> float:
        group.step_on()
        started = clock()
        with precision.autocast():
            sums = workload.sums(model, batch)
        precision.scaler.scale(sums.loss).backward()
        model.zero_grad(set_to_none=True)
        finish(group.device)
        return clock() - started

    for precision in kinds.values():  # kernels are chosen, and memory is taken, the first time
        once(precision)
    found: dict[str, float] = dict.fromkeys(kinds, float("inf"))
    began = time.perf_counter()
    for _ in range(TURNS):
        for kind, precision in kinds.items():
            found[kind] = min(found[kind], once(precision))
        if time.perf_counter() - began > BUDGET_S:
            break
    return found
