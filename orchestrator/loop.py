"""The training loop."""

from typing import Protocol

import torch
from torch import Tensor

from orchestrator.ddp import DdpGradients
from orchestrator.devices import compute_now
from orchestrator.evaluate import evaluate
from orchestrator.group import Group
from orchestrator.plan import Plan
from orchestrator.schedule import learning_rate
from orchestrator.shards import Placement
from orchestrator.state import TrainingState
from orchestrator.step import GradientSource, ShardedGradients, StepTotals
from workloads.workload import Workload


class Observer(Protocol):
    """Who is told of a worker's progress, and may ask it to stop."""

    def stop_wanted(self) -> bool:
        """Whether training should stop after the step that is about to begin."""
        ...

    def committed(self, state: TrainingState, totals: StepTotals, lr: float) -> None:
        """A step has been taken; state.step counts it."""
        ...

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The held-out split was evaluated after `step` steps."""
        ...


def train(
    plan: Plan,
    workload: Workload,
    state: TrainingState,
    group: Group,
    placement: Placement,
    observer: Observer,
) -> bool:
    """Train from state.step to the plan's end, or until somebody asks to stop; returns whether the end was reached.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite; nothing was updated with it.
        PeerLostError: another worker of the group is lost; state is that of the last committed step.
    """
    gradients = gradient_source(plan, workload, state, group, placement)
    try:
        while state.step < plan.total_steps:
            if plan.evaluates_after(state.step) and state.evaluated_step != state.step:
                using, among, in_step = state.evaluation(workload, group)
                processes = plan.config.loader_processes
                metrics = evaluate(using, state.model, state.precision, among, processes, in_step)
                observer.evaluated(state.step, metrics)
                state.evaluated_step = state.step
            totals = gradients.compute(state.step, observer.stop_wanted())
            lr = learning_rate(plan.config, state.step, plan.total_steps)
            update(state, lr, totals.gradient_scale, plan.config.clip_norm)
            gradients.committed(state.step)
            state.step += 1
            observer.committed(state, totals, lr)
            if totals.stop:
                return state.step == plan.total_steps
        return True
    finally:
        gradients.close()


def update(state: TrainingState, lr: float, gradient_scale: float, clip_norm: float) -> None:
    """One optimizer step with the reduced gradients in p.grad; fp16 steps with an overflow are skipped.

    What p.grad holds at first is not written to, except by fp16's scaler: workers of one machine may share it.
    """
    scaler = state.precision.scaler
    scaler.unscale_(state.optimizer)
    if gradient_scale != 1.0:
        multiply_gradients(state, gradient_scale)
    if clip_norm:
        norm = state.gradient_norm()
        factor = clip_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if factor < 1.0:
            multiply_gradients(state, factor, own=gradient_scale != 1.0)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    scaler.step(state.optimizer)
    scaler.update()
    compute_now(state.parameters[0].device)


def multiply_gradients(state: TrainingState, factor: Tensor | float, own: bool = False) -> None:
    """Give the parameters new gradients, multiplied by `factor`.

    Args:
        own: whether nobody else has those that they have: then they are changed where they are.
    """
    held = [(p, p.grad) for p in state.parameters if p.grad is not None]
    if own:
        torch._foreach_mul_([gradient for _, gradient in held], factor)  # type: ignore[arg-type]
        return
    products = torch._foreach_mul([gradient for _, gradient in held], factor)  # type: ignore[arg-type]
    for (parameter, _), product in zip(held, products, strict=True):
        parameter.grad = product


def gradient_source(
    plan: Plan, workload: Workload, state: TrainingState, group: Group, placement: Placement
) -> GradientSource:
    """The gradients of the run's --reduce."""
    processes = plan.config.loader_processes
    if plan.config.reduce == "ddp":
        return DdpGradients(plan, workload, state, group, processes)
    if state.split:
        from orchestrator.pipeline_step import split_gradients  # its imports of torch.distributed take a second

        return split_gradients(plan, workload, state, placement, processes)
    return ShardedGradients(plan, workload, state, group, placement, processes)
