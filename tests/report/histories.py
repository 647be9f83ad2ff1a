"""Run folders that no run has written: as long, as troubled and as unfinished as a test wants them."""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.config import to_toml
from orchestrator.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    GenerationStarted,
    Incident,
    RunEnded,
    RunStarted,
    record,
)
from orchestrator.failure import Failure
from workloads.resnet.config import ResnetConfig

BEGAN_S = 1_780_000_000.0
KINDS = ("worker_killed", "node_lost", "node_drained", "workers_joined", "worker_frozen", "rebalanced")
SHA256 = "5f" * 32
FAILURE = Failure(
    "storage_error", "storage does not answer", 1, "ab" * 28, "10.0.0.1", 4711, 200,
    ["reading part 7", "curl: <timed out>"], 160, "python -m orchestrator.run resnet --storage s3://b --name run",
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """What `write_run` made up.

    Attributes:
        folder: the run's.
        incidents: their steps.
    """

    folder: Path
    incidents: list[int]


def ranges(workers: int, shards: int) -> list[list[int]]:
    """Even shares."""
    bounds = [rank * shards // workers for rank in range(workers + 1)]
    return [[a, b] for a, b in itertools.pairwise(bounds)]


def write_run(
    folder: Path,
    steps: int = 200,
    incidents: int = 3,
    status: str = "finished",
    shards: int = 8,
    began_s: float = BEGAN_S,
    step_s: float = 0.5,
    **settings: object,
) -> Written:
    """A run of `steps` steps; status "" leaves it without an end."""
    folder.mkdir(parents=True)
    config = ResnetConfig(name=folder.name, storage=str(folder.parent), shards=shards, steps=steps, epochs=None)
    config = ResnetConfig(**{**vars(config), **settings})
    (folder / "config.toml").write_text(to_toml(config, "resnet"))
    generator = np.random.default_rng(0)
    struck = sorted({int(s) for s in np.linspace(steps * 0.1, steps * 0.9, incidents)}) if incidents else []
    generation, workers = 1, 4
    events: list[tuple[Event, float]] = [
        (RunStarted("resnet", steps, shards, 128, "digits & <b>numbers</b>: 1,437", False, 1), began_s),
        (_generation(generation, 0, workers, shards), began_s + 1),
    ]
    generations = np.ones(steps, np.int64)
    for number, step in enumerate(struck):
        kind = KINDS[number % len(KINDS)]
        after = 3 if workers == 4 else 4
        generation += 1
        at_s = began_s + 1 + step * step_s
        found = Incident(kind, step, workers, after, 0, 0.41, 0.2, 0.1, 0.05, 0.06, generation, "rank 1 <process 7>")
        workers = after
        events += [(_generation(generation, step, workers, shards), at_s), (found, at_s + 0.1)]
        generations[step:] = generation
    for step in range(max(1, steps // 5), steps + 1, max(1, steps // 5)):
        at_s = began_s + 1 + step * step_s
        events.append((CheckpointSaved(step, 10_000, 0.01, 0.2), at_s))
        events.append((Evaluated(step, {"accuracy": 0.5 + 0.4 * step / steps, "cross_entropy": 1.0}), at_s))
    events.sort(key=lambda pair: pair[1])
    if status:
        reason = "" if status == "finished" else "storage does not answer"
        events.append((RunEnded(status, steps, reason), began_s + 2 + steps * step_s))
    (folder / "events.jsonl").write_text("".join(json.dumps(record(e, t)) + "\n" for e, t in events))
    noise = generator.normal(0, 0.05, steps)
    with (folder / "metrics.jsonl").open("w") as out:
        for i in range(steps):
            loss = 2.3 / (1 + 5 * i / steps) + noise[i]
            out.write(
                f'{{"step": {i + 1}, "epoch": {i // 12}, "loss": {loss:.6f}, "lr": 0.1, '
                f'"samples": 128, "ledger": "0011aabb", "samples_per_s": {128 / step_s:.1f}, "step_s": {step_s}, '
                f'"data_share": 0.05, "compute_share": 0.7, "reduce_share": 0.15, "workers": 4, '
                f'"generation": {generations[i]}, "time_s": {began_s + 1 + (i + 1) * step_s:.3f}}}\n'
            )
    if status:
        result = {
            "status": status, "workload": "resnet", "steps": steps, "samples": steps * 128, "loss": 0.4,
            "metrics": {"accuracy": 0.9}, "weights_sha256": SHA256, "wall_s": steps * step_s + 2,
            "samples_per_s": 128 / step_s, "goodput": 0.97, "generations": generation, "incidents": [],
        }  # fmt: skip
        if status == "failed":
            result["failure"] = dataclasses.asdict(FAILURE)
        (folder / "result.json").write_text(json.dumps(result))
    return Written(folder, struck)


def _generation(number: int, step: int, workers: int, shards: int) -> GenerationStarted:
    nodes = [f"10.0.0.{rank}" for rank in range(workers)]
    pids = list(range(4000 + 10 * number, 4000 + 10 * number + workers))
    return GenerationStarted(number, step, workers, ranges(workers, shards), nodes, pids, "cpu")
