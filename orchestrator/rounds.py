"""Training in rounds of local steps, for slow links: --sync local-sgd and diloco.

Every logical shard takes H = --local-steps optimizer steps alone, on its own microbatches, from the parameters that all
share; then the shards' results are averaged by the tree (Stich 2019, arXiv:1805.09767). The replicas are the shards,
not the workers: who computes which, and how many workers there are, changes no bit, as in every other run. Optimizer
state and running statistics are averaged too (for momentum: Yu, Jin and Yang 2019, arXiv:1905.03817), so that a round
begins with one state, which a joiner receives and a checkpoint holds; the paper of DiLoCo keeps its inner optimizer
states apart. diloco takes the averaged difference as the gradient of an outer Nesterov step (Douillard et al. 2023,
arXiv:2311.08105). A generation that breaks takes its round again.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from orchestrator import loop
from orchestrator.devices import seed
from orchestrator.errors import NonFiniteLossError
from orchestrator.evaluate import evaluate
from orchestrator.feed import batches
from orchestrator.group import Group
from orchestrator.plan import Plan, Request
from orchestrator.reduce import TreeReducer
from orchestrator.schedule import learning_rate
from orchestrator.shards import Placement, derive_seed
from orchestrator.state import TrainingState
from orchestrator.step import EXACT, StepTotals, ledger_of
from orchestrator.stepbook import seal
from workloads.workload import Workload

PER_STEP = 3  # loss, items, samples
PER_SHARD = 3  # ledger, 1 + the first step whose loss is not finite, stop


class Observer(loop.Observer, Protocol):
    """See loop.Observer; steps are told of a round at a time."""

    def round_committed(self, state: TrainingState, totals: Sequence[StepTotals], lrs: Sequence[float]) -> None:
        """A round has been taken; state.step counts its steps."""
        ...


def train(
    plan: Plan, workload: Workload, state: TrainingState, group: Group, placement: Placement, observer: Observer
) -> bool:
    """Train by the run's --sync; see loop.train."""
    if plan.config.sync == "allreduce":
        return loop.train(plan, workload, state, group, placement, observer)
    rounds = Rounds(plan, workload, state, group, placement)
    try:
        while state.step < plan.total_steps:
            if _evaluation_is_due(plan, state):
                processes = plan.config.loader_processes
                observer.evaluated(state.step, evaluate(workload, state.model, state.precision, group, processes))
                state.evaluated_step = state.step
            totals = rounds.compute(observer.stop_wanted())
            lrs = [learning_rate(plan.config, step, plan.total_steps) for step in rounds.steps]
            rounds.commit()
            observer.round_committed(state, totals, lrs)
            if totals[-1].stop:
                return state.step == plan.total_steps
        return True
    finally:
        rounds.close()


def _evaluation_is_due(plan: Plan, state: TrainingState) -> bool:
    """Whether a step after which there is one was in the last round."""
    last = range(max(0, state.step - plan.config.local_steps) + 1, state.step + 1)
    return state.evaluated_step != state.step and any(map(plan.evaluates_after, last))


class Rounds:
    """The rounds of one worker in one generation."""

    def __init__(
        self, plan: Plan, workload: Workload, state: TrainingState, group: Group, placement: Placement
    ) -> None:
        self._plan, self._workload, self._state, self._group = plan, workload, state, group
        self._own = placement.range_of(group.rank)
        _make_optimizer_state(state)
        self._shared = _averaged(state)
        self._numel = sum(t.numel() for t in self._shared)
        self._parameters = sum(p.numel() for p in state.parameters)
        self._head = PER_STEP * plan.config.local_steps + PER_SHARD * plan.config.shards
        self._reducer = TreeReducer([], self._head + self._numel, group)
        if plan.config.sync == "diloco" and state.outer is None:
            state.outer = torch.zeros(self._parameters, device=group.device)
        how = (plan.config.loader_processes, group.device, group.clock)
        self._feed = batches(workload.samples("train"), self._requests(), *how)
        self._base = self._read()
        self._open = False
        self._data_s = 0.0
        self._reducer.place(placement)

    @property
    def steps(self) -> range:
        """Of the round that begins with what is committed."""
        return self._steps_from(self._state.step)

    def _steps_from(self, step: int) -> range:
        return range(step, min(step + self._plan.config.local_steps, self._plan.total_steps))

    def _requests(self) -> Iterator[Request]:
        step = self._state.step
        while step < self._plan.total_steps:
            steps = self._steps_from(step)
            for shard in self._own:
                for later in steps:
                    request = self._plan.request(later, shard)
                    if len(request.indices):
                        yield request
            step = steps.stop

    def _read(self) -> Tensor:
        """What is averaged, as one fp32 vector."""
        return torch.cat([t.detach().reshape(-1).float() for t in self._shared])

    @torch.no_grad()
    def _write(self, flat: Tensor) -> None:
        for tensor, part in zip(self._shared, flat.split([t.numel() for t in self._shared]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def compute(self, stop: bool) -> list[StepTotals]:
        """A round of all own shards, summed over those of the others; raises NonFiniteLossError on every worker."""
        self._base, self._open, self._data_s = self._read(), True, 0.0
        self._state.model.train()
        self._reducer.start_step()
        self._group.clock.start(self._group.device)
        started = time.perf_counter()
        for shard in self._own:
            self._reducer.start_shard(shard)
            head = self._one_shard(shard, stop)
            self._reducer.add_extra(torch.cat([head, self._base - self._read()]))
            self._reducer.end_shard()
        self._group.clock.stop(len(self._own) * len(self.steps))
        computed = time.perf_counter()
        self._reducer.finish()
        seconds = (self._data_s, computed - started - self._data_s, time.perf_counter() - computed)
        return self._totals(self._reducer.extra[: self._head].double().cpu(), seconds)

    def _one_shard(self, shard: int, stop: bool) -> Tensor:
        """A shard's local steps, from the shared state; returns the head of its vector."""
        plan = self._plan
        self._write(self._base)
        head = torch.zeros(self._head, device=self._group.device)
        by_step, by_shard = self._split(head)
        by_shard[shard, 2] = float(stop)
        ledger = 0
        for number, step in enumerate(self.steps):
            _, start, end = plan.schedule.places(step, shard)
            if end == start:
                continue
            self._group.step_on()
            waiting_since = time.perf_counter()
            indices, batch = next(self._feed)
            self._data_s += time.perf_counter() - waiting_since
            seed(self._group.device, derive_seed("step", plan.config.seed, step, shard))
            with self._state.precision.autocast():
                sums = self._workload.sums(self._state.trained, batch)
            nominal = self._workload.nominal_count(end - start)
            for parameter in self._state.parameters:
                parameter.grad = None
            (sums.loss / nominal).backward()
            lr = learning_rate(plan.config, step, plan.total_steps)
            loop.update(self._state, lr, nominal / (float(sums.count) or 1.0), plan.config.clip_norm)
            by_step[number] = torch.stack(
                [sums.loss.detach(), sums.count, torch.tensor(len(indices), device=sums.loss.device)]
            )
            ledger = zlib.crc32(ledger_of(indices).to_bytes(4, "big"), ledger)
            if not torch.isfinite(sums.loss) and not by_shard[shard, 1]:
                by_shard[shard, 1] = number + 1
        by_shard[shard, 0] = ledger % EXACT
        return head

    def _split(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Views [local steps, PER_STEP] and [shards, PER_SHARD]."""
        cut = PER_STEP * self._plan.config.local_steps
        return head[:cut].view(-1, PER_STEP), head[cut:].view(-1, PER_SHARD)

    def _totals(self, head: Tensor, seconds: Sequence[float]) -> list[StepTotals]:
        by_step, by_shard = self._split(head)
        self._check_finite(by_shard[:, 1])
        ledgers = by_shard[:, 0].to(torch.int64).numpy()
        stop, totals = bool(by_shard[:, 2].sum() > 0), []
        for (loss, count, samples), step in zip(by_step.tolist(), self.steps, strict=False):
            ledger = seal(samples, self._plan.schedule.samples_in_step(step), ledgers, step)
            each = [second / len(self.steps) for second in seconds]
            totals.append(StepTotals(loss / (count or 1.0), round(samples), 1.0, stop, ledger, *each))
        return totals

    def _check_finite(self, bad: Tensor) -> None:
        for shard in torch.nonzero(bad).flatten().tolist():
            step = self.steps[int(bad[shard]) - 1]
            epoch, indices = self._plan.schedule.indices(self._plan.config.seed, step, shard)
            raise NonFiniteLossError(
                f"step {step}, epoch {epoch}: loss is not finite in shard {shard}: samples {indices.tolist()}"
            )

    def commit(self) -> None:
        """Take the outer step: the shards' average, or Nesterov's along it."""
        config, outer = self._plan.config, self._state.outer
        difference = self._reducer.extra[self._head :] / config.shards
        if config.sync == "diloco":
            assert outer is not None
            along = difference[: self._parameters]
            outer.mul_(config.outer_momentum).add_(along)
            along = along.add(outer, alpha=config.outer_momentum).mul_(config.outer_lr)
            difference = torch.cat([along, difference[self._parameters :]])
        self._write(self._base - difference)
        self._open = False
        self._state.step = self.steps.stop
        self._count_batches()

    def _count_batches(self) -> None:
        for module in self._state.model.modules():
            tracked = getattr(module, "num_batches_tracked", None)
            if isinstance(tracked, Tensor):
                tracked.fill_(self._state.step)

    def close(self) -> None:
        """Leave the state of the last committed round."""
        self._feed.close()
        if self._open:
            self._write(self._base)
            self._count_batches()
        for parameter in self._state.parameters:
            parameter.grad = None
        self._reducer.close()


def _averaged(state: TrainingState) -> list[Tensor]:
    """The live tensors that a round averages: parameters, then buffers and optimizer state of real numbers."""
    buffers = [b for b in state.model.buffers() if b.is_floating_point()]
    entries = [state.optimizer.state[p] for p in state.parameters]
    kept = [t for entry in entries for _, t in sorted(entry.items()) if isinstance(t, Tensor)]
    return [*state.parameters, *buffers, *kept]


def _make_optimizer_state(state: TrainingState) -> None:
    """Optimizers make their state in the first step, which a shard without samples would never take."""
    if all(state.optimizer.state.get(p) for p in state.parameters):
        return
    for parameter in state.parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in state.optimizer.param_groups:
        group["lr"] = 0.0
    state.optimizer.step()
    for parameter in state.parameters:
        parameter.grad = None
        for entry in state.optimizer.state[parameter].values():  # weight decay has left its mark, gradient or not
            if isinstance(entry, Tensor):
                entry.zero_()
