"""Seconds from typing the command to the first committed step, against plain Ray Train (baseline_ray_train.py).

    python tests/bench/time_to_first_step.py --out time_to_first_step.json
    python tests/bench/time_to_first_step.py --workloads bert --visits 7

Both start with no Ray cluster up and start a local one; two workers; our defaults for resnet (digits) and bert (the
documentation, tokens cached for both sides). Ours is the first record's time_s in metrics.jsonl, the baseline's is
taken after its first optimizer step; either less the moment its process was started. One visit to each side before
those that count warms the page cache and the token cache. Target, ratio of ours to the baseline: <= 0.5.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import commands
import paired

TARGET = paired.Target(0.5, at_least=False)
WORKLOADS = ("resnet", "bert")
STEPS = "2"
DIFFERENCES = [
    "ours: the documented command line with --workers 2; baseline: Ray's documented script, imports at the top",
    "baseline: Ray's defaults (dashboard, usage report, controller polling every 2 s); ours switches them as it ships",
    "each side masks in its own way; the tokenised arrays, the images, the model and the global batch are the same",
]


def ours(workload: str) -> dict[str, float]:
    """One visit to our command line: seconds to the first step, and to the end."""
    arguments = ["--workers", "2", "--steps", STEPS, "--resources-per-worker", "CPU=1"]
    with commands.visit() as folder:
        done, run = commands.train(workload, arguments, folder)
        first = commands.records(run / "metrics.jsonl")[0]
        return {"first_step": first["time_s"] - done.started_s, "end": done.wall_s}


def baseline(workload: str) -> dict[str, float]:
    """One visit to plain Ray Train."""
    with commands.visit() as folder:
        done = commands.run([str(commands.BENCH / "baseline_ray_train.py"), workload, "--steps", STEPS], folder)
        first_s = commands.last_json(done.stdout)["first_step_s"]
        return {"first_step": first_s - done.started_s, "end": done.wall_s}


def measure(settings: Namespace, workload: str) -> dict[str, Any]:
    """The comparison of one workload."""
    paired.say(f"{workload}: warming up")
    sides: dict[str, Callable[[], dict[str, float]]] = {
        "ours": partial(ours, workload),
        "ray train": partial(baseline, workload),
    }
    if settings.warm_up:
        paired.alternate(sides, 1)
    paired.say(f"{workload}: measuring")
    found = paired.alternate(sides, settings.visits)
    columns = {
        key: [[visit[key] for visit in found[side]] for side in ("ours", "ray train")] for key in ("first_step", "end")
    }
    compared = paired.compare(f"{workload}, ours / Ray Train", *columns["first_step"], TARGET)
    compared["unit"] = "s from the command to the first committed step"
    whole = paired.compare("", *columns["end"], TARGET)
    compared["whole_command"] = {key: whole[key] for key in ("ratio", "spread", "ours_median", "baseline_median")}
    compared["differences"] = DIFFERENCES
    return compared


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=5)
    parser.add_argument("--workloads", type=paired.words(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="count the first visits too")
    settings = parser.parse_args()
    report = paired.header("time_to_first_step", settings)
    report["comparisons"] = [measure(settings, workload) for workload in settings.workloads]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
