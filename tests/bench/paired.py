"""What every benchmark here shares: sides that take turns, ratios of neighbours, and one JSON object at the end.

Only ratios count: both sides run in the same command, one visit after the other (A B A B ...; every second round
in reverse, so that a drift of the machine favours nobody), and visit i of one side is compared with visit i of the
other. Absolute numbers of a shared machine are printed for orientation.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """What a ratio should be.

    Attributes:
        bound: the limit, itself allowed.
        at_least: whether the ratio must reach it; otherwise it must not exceed it.
    """

    bound: float
    at_least: bool

    def met(self, ratio: float) -> bool:
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


def alternate(sides: Mapping[str, Callable[[], Any]], visits: int) -> dict[str, list[Any]]:
    """Visit the sides in turn; side -> what each of its visits returned."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for visit in range(visits):
        for name in list(sides) if visit % 2 == 0 else reversed(list(sides)):
            say(f"visit {visit + 1}/{visits}: {name}")
            found[name].append(sides[name]())
    return found


def compare(name: str, ours: Sequence[float], baseline: Sequence[float], target: Target) -> dict[str, Any]:
    """One comparison: the median of the pairs' ratios ours/baseline, its spread, both medians."""
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    ratio = statistics.median(ratios)
    return {
        "comparison": name,
        "ratio": round(ratio, 4),
        "target": str(target),
        "met": target.met(ratio),
        "spread": spread(ratios),
        "ours_median": round(statistics.median(ours), 4),
        "baseline_median": round(statistics.median(baseline), 4),
        "pairs": [[round(a, 4), round(b, 4)] for a, b in zip(ours, baseline, strict=True)],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest and largest."""
    return {"min": round(min(values), 5), "max": round(max(values), 5)}


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "torchvision", "ray", "transformers")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def parser(doc: str, visits: int | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have; visits None: there are no sides to visit."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if visits is not None:
        made.add_argument("--visits", type=int, default=visits, help=f"visits to each side [{visits}]")
    made.add_argument("--out", type=Path, help="also write the JSON object to this file")
    return made


def words(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the allowed words, separated by commas."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [word for word in chosen if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]}: choose from {', '.join(allowed)}, separated by commas")
        return chosen

    return parse


def header(benchmark: str, settings: argparse.Namespace) -> dict[str, Any]:
    """The head of a report; call it before measuring. From now on SIGTERM ends the visit that is going on properly."""
    signal.signal(signal.SIGTERM, _end)
    return {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["python", *sys.argv]),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()},
        "hardware": hardware(),
    }


def _end(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice; the second would cut the tidying short
    sys.exit(128 + number)


def emit(report: Mapping[str, Any], out: Path | None) -> None:
    """The report as one JSON object on stdout, and in `out`."""
    text = json.dumps(report, indent=1)
    print(text, flush=True)
    if out:
        out.write_text(text + "\n")


def say(line: str) -> None:
    """Progress for people; stdout is for the JSON object."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)
