"""Seconds from typing the command to the first committed step, against plain Ray Train (baseline_ray_train.py).

    python tests/bench/time_to_first_step.py --out time_to_first_step.json
    python tests/bench/time_to_first_step.py --workloads bert --visits 7
    python tests/bench/time_to_first_step.py --cold

Both start with no Ray cluster up and start a local one; two workers; our defaults for resnet (digits) and bert (the
documentation, tokens cached for both sides). Ours is the first record's time_s in metrics.jsonl, the baseline's is
taken after its first optimizer step; either less the moment its process was started. One visit to each side before
those that count warms the page cache and the token cache. Target, ratio of ours to the baseline: <= 0.5.

With --cold: ours alone, a second run against a first one, whose ORCHESTRATOR_CACHE is empty: bert on the documentation,
resnet on prepared JPEG files, both compiled too where --compile is given. The page cache is warm for both, or with
--drop-page-cache (root's) empty for the first one, as it is on a machine that has just been started.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
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


def ours(workload: str, *more: str, cache: Path | None = None, drop: bool = False) -> dict[str, float]:
    """One visit to our command line: seconds to the first step, and to the end; with a cache of its own for None."""
    if drop:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")  # man 5 proc: the page cache, dentries and inodes
    arguments = ["--workers", "2", "--steps", STEPS, "--resources-per-worker", "CPU=1", *more]
    with commands.visit() as folder:
        environment = {"ORCHESTRATOR_CACHE": str(cache or folder / "cache")}
        done, run = commands.train(workload, arguments, folder, **(environment if more else {}))
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


def warm_and_cold(settings: Namespace, workload: str) -> dict[str, Any]:
    """A second run against a first one."""
    with commands.visit() as folder:
        more = ["--compile", "true"] if settings.compile else ["--compile", "false"]
        if workload == "resnet":
            photos = commands.write_photos(folder, settings.images)
            prepare = ["-m", "orchestrator.prepare", "resnet", "--source", f"imagefolder:{photos}", "--file-mb", "8"]
            commands.run([*prepare, "--out", str(folder / "prepared")], folder)
            more += ["--data", f"parquet:{folder / 'prepared'}", "--model", "resnet8", "--image-size", "64"]
        cache = folder / "kept"
        paired.say(f"{workload}: filling the cache")
        ours(workload, *more, cache=cache)
        found = paired.alternate(
            {
                "warm": partial(ours, workload, *more, cache=cache),
                "cold": partial(ours, workload, *more, drop=settings.drop_page_cache),
            },
            settings.visits,
        )
    sides = [[visit["first_step"] for visit in found[side]] for side in ("warm", "cold")]
    compared = paired.compare(f"{workload}, second run / first run", *sides, TARGET)
    compared["unit"] = "s from the command to the first committed step"
    return compared


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=5)
    parser.add_argument("--cold", action="store_true", help="a second run against a first one, instead of Ray Train")
    parser.add_argument("--compile", action="store_true", help="with --cold: compiled")
    parser.add_argument("--drop-page-cache", action="store_true", help="with --cold: before each first run")
    parser.add_argument("--images", type=int, default=3000, help="with --cold: JPEG files of about 30 kB [3000]")
    parser.add_argument("--workloads", type=paired.words(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="count the first visits too")
    settings = parser.parse_args()
    report = paired.header("time_to_first_step", settings)
    compare = warm_and_cold if settings.cold else measure
    report["comparisons"] = [compare(settings, workload) for workload in settings.workloads]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
