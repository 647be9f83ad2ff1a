"""A small real workload: images with a convolution, batch normalization, dropout, tied and unused parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.assembly import build
from orchestrator.config import RunConfig
from orchestrator.errors import NonFiniteLossError
from orchestrator.evaluate import evaluate
from orchestrator.group import Group
from orchestrator.loop import train
from orchestrator.optimizer import build_optimizer
from orchestrator.plan import Plan
from orchestrator.precision import Precision
from orchestrator.settings import setting
from orchestrator.shards import Placement, derive_seed, even_placement
from orchestrator.state import TrainingState, weights_sha256
from orchestrator.step import StepTotals
from workloads.workload import Batch, Split, Sums

TRAIN, HELDOUT, CLASSES = 75, 150, 5


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """Settings of the toy, with switches for what goes wrong."""

    epochs: int | None = setting(2, low=1)
    """Passes."""

    batch_size: int = setting(32, low=1)
    """32 of 75 samples: the third step of an epoch has 11, which leaves shards empty."""

    norm: bool = setting(True)
    """Whether there is batch normalization."""

    ragged: bool = setting(True)
    """Whether there are parameters that no shard, or not every shard, uses."""

    nan_sample: int = setting(-1)
    """A sample whose loss is NaN."""

    blow_up: int = setting(-1)
    """A sample whose gradient overflows in fp16, in epoch 0."""

    items: str = setting("varying", choices=("varying", "none"))
    """How many items a sample has: 1 to 4 by its index, or none at all."""


class ToyModel(nn.Module):
    def __init__(self, norm: bool, ragged: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6) if norm else nn.GroupNorm(2, 6)
        self.hidden = nn.Linear(6, 12)
        self.dropout = nn.Dropout(0.3)
        self.rare = nn.Linear(12, 12)
        self.ragged = ragged
        if ragged:
            self.never = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(12, CLASSES, bias=False)
        self.back = nn.Linear(12, CLASSES, bias=False)
        self.back.weight = self.head.weight  # tied, as BERT's embedding and its decoder

    def forward(self, images_BCHW: Tensor, rare: bool) -> Tensor:
        x = F.relu(self.bn(self.conv(images_BCHW))).mean((2, 3))
        x = self.dropout(F.relu(self.hidden(x)))
        if rare or not self.ragged:  # parameters that are in the graph of some shards only
            x = x + self.rare(x)
        return self.head(x) + self.back(torch.tanh(x))


class ToySamples:
    modules = ("toys",)

    def __init__(self, config: ToyConfig, split: Split) -> None:
        self._config, self._split = config, split
        random = np.random.default_rng([7, split == "train"])
        size = TRAIN if split == "train" else HELDOUT
        self._labels = random.integers(0, CLASSES, size)
        self._images = random.normal(size=(size, 3, 8, 8)).astype(np.float32)
        self._images += self._labels[:, None, None, None] * 0.4

    def __len__(self) -> int:
        return len(self._labels)

    def microbatch(self, indices: np.ndarray, epoch: int, progress: float = 1.0) -> Batch:
        items = indices % 4 + 1 if self._config.items == "varying" else indices * 0
        factor = np.where((indices == self._config.blow_up) & (epoch == 0), 1e30, 1.0)
        factor = np.where(indices == self._config.nan_sample, np.nan, factor)
        mirrored = np.array([derive_seed(self._config.seed, epoch, int(i)) % 2 for i in indices], bool)
        mirrored &= self._split == "train"
        images = self._images[indices]
        images = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
        return {
            "images": torch.from_numpy(images),
            "labels": torch.from_numpy(self._labels[indices]),
            "items": torch.from_numpy(items),
            "factor": torch.from_numpy(factor).float(),
            "rare": torch.from_numpy((indices == 3).any(keepdims=True)),
        }


class ToyWorkload:
    """See workloads.workload.Workload."""

    decodes = False
    varying_inputs = ()
    turning_points = ()

    def __init__(self, config: ToyConfig) -> None:
        self.config = config

    def build_model(self) -> nn.Module:
        return ToyModel(self.config.norm, self.config.ragged)

    def samples(self, split: Split) -> ToySamples:
        return ToySamples(self.config, split)

    def nominal_count(self, samples: int) -> float:
        return 2.5 * samples

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        scores = model(batch["images"], bool(batch["rare"])).float()
        losses = F.cross_entropy(scores, batch["labels"], reduction="none") * batch["factor"]
        correct = (scores.argmax(1) == batch["labels"]) * batch["items"]
        return Sums((losses * batch["items"]).sum(), batch["items"].sum(), {"correct": correct.sum()})

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        count = totals["count"] or 1.0
        return {"loss": totals["loss"] / count, "accuracy": totals["correct"] / count}

    def save(self, model: nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "model.pt")


class Recorder:
    """An observer that notes everything and asks to stop after a step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.losses: list[float] = []
        self.scales: list[float] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self._stop_after, self._step = stop_after, 0

    def stop_wanted(self) -> bool:
        return bool(self._stop_after) and self._step + 1 >= self._stop_after

    def committed(self, state: TrainingState, totals: StepTotals, lr: float) -> None:
        self.losses.append(totals.loss)
        self.scales.append(state.precision.scaler.get_scale())
        self._step = state.step

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.evaluations.append((step, metrics))

    def starts_at(self, step: int) -> "Recorder":
        self._step = step
        return self


class RoundRecorder(Recorder):
    """Takes rounds of local steps as so many steps."""

    def round_committed(self, state: TrainingState, totals: Sequence[StepTotals], lrs: Sequence[float]) -> None:
        assert len(totals) == len(lrs)
        for total, lr in zip(totals, lrs, strict=True):
            self.committed(state, total, lr)


@dataclass
class Outcome:
    """What one rank saw of a run, comparable with ==."""

    sha256: str
    losses: list[float]
    metrics: dict[str, float]
    step: int
    finished: bool
    snapshot: dict[str, Tensor] = dataclasses.field(compare=False)
    scales: list[float] = dataclasses.field(compare=False)
    evaluations: list[tuple[int, dict[str, float]]] = dataclasses.field(compare=False)


def toy_plan(**given: object) -> Plan:
    config = build(ToyConfig, {"shards": 8, "lr": 0.05, "loader_processes": 0, "precision": "fp32", **given})
    return Plan("toy", config, TRAIN, HELDOUT, "toy")


def toy_state(plan: Plan) -> TrainingState:
    torch.manual_seed(derive_seed("weights", plan.config.seed))
    model = ToyModel(plan.config.norm, plan.config.ragged)
    return TrainingState(model, build_optimizer(plan.config, model), Precision(plan.config.precision, "cpu"))


def run_toy(
    group: Group,
    plan: Plan,
    placement: Placement | None = None,
    start: tuple[int, dict[str, Tensor]] | None = None,
    stop_after: int = 0,
) -> Outcome:
    """Train from the start, or from (step, snapshot) that rank 0 has and hands to the others."""
    workload, state = ToyWorkload(plan.config), toy_state(plan)
    if start and group.rank == 0:
        state.load(start[1], start[0])
    if start:
        state.receive(group)
    placement = placement or even_placement(plan.config.shards, group.world)
    recorder = Recorder(stop_after).starts_at(state.step)
    finished = train(plan, workload, state, group, placement, recorder)
    metrics = evaluate(workload, state.model, state.precision, group, 0)
    return Outcome(
        weights_sha256(state.model),
        recorder.losses,
        metrics,
        state.step,
        finished,
        state.snapshot(),
        recorder.scales,
        recorder.evaluations,
    )


def run_until_error(group: Group, plan: Plan) -> tuple[str, str, str, int]:
    """(message of the NonFiniteLossError, weights before the failed step, weights after it, steps done)."""
    state, workload = toy_state(plan), ToyWorkload(plan.config)
    before = weights_sha256(state.model)

    class Watch(Recorder):
        def committed(self, state: TrainingState, totals: StepTotals, lr: float) -> None:
            nonlocal before
            before = weights_sha256(state.model)

    try:
        train(plan, workload, state, group, even_placement(plan.config.shards, group.world), Watch())
    except NonFiniteLossError as error:
        return str(error), before, weights_sha256(state.model), state.step
    raise AssertionError("the loss stayed finite")
