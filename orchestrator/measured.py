"""Exported models side by side: held-out metrics, size and latency, fp32 and int8 alternating in one process."""

import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.errors import UserError
from orchestrator.evaluate import evaluate
from orchestrator.exported import loading, open_session
from orchestrator.feed import LoaderLostError
from orchestrator.group import Group
from orchestrator.pace import clock
from orchestrator.precision import Precision
from orchestrator.programs import Asked
from orchestrator.state import weights_sha256
from workloads.exporting import Exporting
from workloads.workload import Samples, Workload

BATCHES = (1, 32)
FEWEST_ROUNDS = 5
TOLD_EVERY_S = 5.0
SIZE_TARGET, POINTS_TARGET = 0.3, 0.5  # of fp32's bytes; percentage points

T = TypeVar("T")
log = logging.getLogger("orchestrator.measured")


def load_trained(exporting: Exporting, folder: Path, sha256: str) -> nn.Module:
    """The model of a run from its model/; raises UserError where that is not what the run has written."""
    with loading("model/ of the run"):
        model = exporting.load(folder)
    if weights_sha256(model) != sha256:
        raise UserError("model/ of the run is not what its result.json tells; train again under another --name")
    return model


def onnx_model(path: Path, names: Sequence[str], threads: int) -> Asked:
    """An ONNX file, run by onnxruntime."""
    session = open_session(str(path), threads)

    def ask(*inputs: Tensor) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return Asked(ask)


def load_program(path: Path) -> Asked:
    """A torch.export program, as it was written."""
    return Asked(torch.export.load(path).module())


@dataclass(frozen=True)
class Candidate:
    """One way to run the model.

    Attributes:
        kind: fp32, int8, "int8 fine-tuned".
        engine: torch or onnxruntime.
        file: what it is run from.
        model: to be called with the inputs.
    """

    kind: str
    engine: str
    file: Path
    model: nn.Module

    @property
    def file_bytes(self) -> int:
        """Size on disk, weights that lie beside the file included."""
        return sum(file.stat().st_size for file in self.file.parent.glob(self.file.name + "*"))


@dataclass(frozen=True)
class Row:
    """What was measured of a candidate.

    Attributes:
        latency_ms: batch -> median.
    """

    kind: str
    engine: str
    file_bytes: int
    metrics: Mapping[str, float]
    latency_ms: dict[int, float] = field(default_factory=dict)

    @property
    def is_int8(self) -> bool:
        return self.kind != "fp32"


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, and every few seconds a word on how many of them are done: a bar on a terminal, elsewhere a line."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, what, total, dynamic_ncols=True, leave=False)
        return
    began_s = told_s = time.monotonic()
    for done, item in enumerate(items):
        now_s = time.monotonic()
        if done and now_s - told_s >= TOLD_EVERY_S:
            left_s = (now_s - began_s) * (total - done) / done
            print(f"{what} {done:,} of {total:,}  {clock(left_s)} left", file=sys.stderr, flush=True)
            told_s = now_s
        yield item


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """torch computes on all cores that this process may use within: those of its container, where that has fewer."""
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no control groups of version 2, or no limit: "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    torch.set_num_threads(max(before, cores))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def heldout_metrics(workload: Workload, model: nn.Module, loader_processes: int) -> dict[str, float]:
    """The workload's metrics of its held-out split, as at the end of training, in fp32."""
    group = Group(0, 1, torch.device("cpu"))
    try:
        return evaluate(workload, model, Precision("fp32", "cpu"), group, loader_processes)
    except LoaderLostError as error:
        log.warning("%s; now without loader processes", error)
        return evaluate(workload, model, Precision("fp32", "cpu"), group, 0)


@torch.no_grad()
def latencies(
    candidates: Sequence[Candidate], samples: Samples, names: Sequence[str], rounds: int, seconds: float
) -> list[dict[int, float]]:
    """Median milliseconds of each candidate by batch: all are asked in every round, one after the other.

    Each twice, and the second time counts: the first brings its code and weights back into the processor's caches,
    which a slow candidate before it would otherwise have taken from it alone.

    Args:
        samples: real inputs; repeated where there are fewer than a batch.
        names: of the model's inputs in a batch.
        rounds: at most so many, for each batch;
        seconds: and none begins later than so many seconds after the first, but for FEWEST_ROUNDS.
    """
    found: list[dict[int, float]] = [{} for _ in candidates]
    for size in BATCHES:
        batch = samples.microbatch(np.resize(np.arange(len(samples)), size), 0)
        inputs = [batch[name] for name in names]
        taken_s: list[list[float]] = [[] for _ in candidates]
        began = time.perf_counter()
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
                break
            for candidate, own in zip(candidates, taken_s, strict=True):
                candidate.model(*inputs)
                started = time.perf_counter()
                candidate.model(*inputs)
                own.append(time.perf_counter() - started)
        for row, own in zip(found, taken_s, strict=True):
            row[size] = float(np.median(own)) * 1e3
    return found


def fastest_fp32(rows: Sequence[Row], batch: int) -> Row:
    """What int8 has to beat."""
    return min((row for row in rows if not row.is_int8), key=lambda row: row.latency_ms[batch])


def compared(rows: Sequence[Row], accuracy: str) -> list[dict[str, Any]]:
    """The rows as plain JSON, int8 beside fp32: of the same engine in size and accuracy, the fastest in latency."""
    found = []
    for row in rows:
        plain: dict[str, Any] = {
            "model": row.kind,
            "engine": row.engine,
            "file_bytes": row.file_bytes,
            "metrics": dict(row.metrics),
            "latency_ms": {str(batch): round(ms, 4) for batch, ms in row.latency_ms.items()},
        }
        if row.is_int8:
            own = next(other for other in rows if not other.is_int8 and other.engine == row.engine)
            plain["size_ratio"] = round(row.file_bytes / own.file_bytes, 4)
            plain["points_lost"] = round(100 * (own.metrics[accuracy] - row.metrics[accuracy]), 4)
            plain["latency_ratio"] = {
                str(batch): round(ms / fastest_fp32(rows, batch).latency_ms[batch], 4)
                for batch, ms in row.latency_ms.items()
            }
            plain["meets"] = {
                f"size at most {SIZE_TARGET}": plain["size_ratio"] <= SIZE_TARGET,
                f"at most {POINTS_TARGET} points lost": plain["points_lost"] <= POINTS_TARGET,
                **{f"faster at batch {batch}": ratio < 1 for batch, ratio in plain["latency_ratio"].items()},
            }
        found.append(plain)
    return found


def table(compared_rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The rows for people; a second part says of each int8 row what it misses."""
    head = ["model", "engine", *metrics, "MB", *(f"ms at {batch}" for batch in BATCHES), "to fp32: MB", "ms"]
    lines, misses = [head], []
    for row in compared_rows:
        ratios = row.get("latency_ratio", {})
        lines.append(
            [
                row["model"],
                row["engine"],
                *(f"{row['metrics'][name]:.4f}" for name in metrics),
                f"{row['file_bytes'] / 1e6:.3f}",
                *(f"{row['latency_ms'][str(batch)]:.3f}" for batch in BATCHES),
                f"{row['size_ratio']:.3f}" if ratios else "",
                ", ".join(f"{ratios[str(batch)]:.2f}" for batch in BATCHES) if ratios else "",
            ]
        )
        missed = [words for words, met in row.get("meets", {}).items() if not met]
        if missed:
            misses.append(f"{row['model']} with {row['engine']} is not: {'; '.join(missed)}")
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(shown + misses)


def hardware(threads: int) -> dict[str, Any]:
    """What the latencies were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
    }
