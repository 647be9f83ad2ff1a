"""Input alone, on one core: samples per second of our reading against what a user would write with libraries.

    python tests/bench/reading.py --out reading.json
    python tests/bench/reading.py --kinds tokens resume

    jpeg     encoded images of 400x300 to augmented tensors of 224x224; ours from an image folder and from prepared
             files, against torchvision's ImageFolder with a DataLoader, and against a Ray Data pipeline
    pixels   images of 32x32 that lie decoded in memory, augmented; against torchvision's CIFAR10 with a DataLoader
    tokens   prepared sequences of 128 tokens, masked; against `datasets` with transformers' collator (needs
             `pip install datasets`)
    resume   the order of 10 million samples: seconds until the first step's samples are known, at the beginning, in
             the middle and at the end of an epoch

Each visit is a process that is bound to one core, with its own processes if it starts some. Targets: a ratio of at
least 1 of ours to each; under 1 s to resume.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import commands
import paired

from orchestrator.blocks import BlockOrder
from orchestrator.shards import Schedule, sample_order

TARGET = paired.Target(1.0, at_least=True)
RESUME = paired.Target(1.0, at_least=False)
OURS = {"jpeg": ("folder", "parquet"), "pixels": ("memory",), "tokens": ("parquet",)}
THEIRS = {"jpeg": ("torchvision", "ray data"), "pixels": ("torchvision",), "tokens": ("datasets",)}
SAMPLES, BATCH, SHARDS, FILES = 10_000_000, 256, 8, 2000


def write_data(kinds: list[str], folder: Path, images: int) -> None:
    """What the sides read."""
    prepare = ["-m", "orchestrator.prepare"]
    if "jpeg" in kinds:
        source = f"imagefolder:{commands.write_photos(folder, images)}"
        flags = ["--source", source, "--out", str(folder / "parquet-jpeg"), "--file-mb", "4"]
        commands.run([*prepare, "resnet", *flags], folder)
    if "pixels" in kinds:
        commands.write_cifar10(folder)
    if "tokens" in kinds:
        out = folder / "parquet-tokens"
        flags = ["--source", "docs", "--out", str(out), "--sequence-length", "128", "--file-mb", "0.5"]
        commands.run([*prepare, "bert", *flags], folder)


def side(kind: str, name: str, data: Path) -> float:
    """Samples per second of one visit."""
    with commands.visit() as folder:
        cache = {"ORCHESTRATOR_CACHE": str(data / "cache"), "HF_HUB_OFFLINE": "1"}
        arguments = [str(commands.BENCH / "reading_sides.py"), kind, name, str(data)]
        return float(commands.last_json(commands.run(arguments, folder, **cache).stdout)["samples_per_s"])


def measure(kind: str, data: Path, visits: int) -> list[dict[str, Any]]:
    """All comparisons of one kind of data."""
    names = (*OURS[kind], *THEIRS[kind])
    found = paired.alternate({name: partial(side, kind, name, data) for name in names}, visits)
    comparisons = []
    for mine in OURS[kind]:
        for theirs in THEIRS[kind]:
            compared = paired.compare(f"{kind}, ours ({mine}) / {theirs}", found[mine], found[theirs], TARGET)
            comparisons.append(compared | {"unit": "samples/s on one core"})
    return comparisons


def resume() -> dict[str, Any]:
    """Seconds until the samples of a step are known by somebody who knew nothing."""
    found = {}
    for kind in ("in memory", f"in {FILES} files"):
        for place in ("beginning", "middle", "end"):
            started = time.perf_counter()
            order = sample_order if kind == "in memory" else BlockOrder((SAMPLES // FILES,) * FILES, 16)
            schedule = Schedule(SAMPLES, BATCH, SHARDS, order)
            step = {"beginning": 0, "middle": schedule.steps_per_epoch // 2, "end": schedule.steps_per_epoch - 1}[place]
            assert sum(len(schedule.indices(0, 7 * schedule.steps_per_epoch + step, v)[1]) for v in range(SHARDS))
            found[f"{kind}, {place}"] = round(time.perf_counter() - started, 4)
    worst = max(found.values())
    return {"seconds": found, "worst": worst, "target": str(RESUME), "met": RESUME.met(worst)}


def main() -> None:
    kinds = [*OURS, "resume"]
    parser = paired.parser(__doc__ or "", visits=5)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--images", type=int, default=1500, help="JPEG files [1500]")
    settings = parser.parse_args()
    report = paired.header("reading", settings)
    report["comparisons"] = []
    with commands.visit() as data:
        write_data(settings.kinds, data, settings.images)
        for kind in OURS:
            if kind in settings.kinds:
                report["comparisons"] += measure(kind, data, settings.visits)
    if "resume" in settings.kinds:
        report["resume"] = resume()
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
