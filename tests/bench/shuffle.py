"""What mixing only some files at a time costs in accuracy: digits prepared as many small files, against all mixed.

    python tests/bench/shuffle.py --out shuffle.json

The default recipe on the digits, prepared as about 40 files; --shuffle-window 1, 4 and as many as there are files (a
shuffle of everything), some seeds each, by turns. Target: held-out accuracy at least 0.995 times that of all mixed.
"""

import json
import statistics
from argparse import Namespace
from functools import partial
from pathlib import Path

import commands
import paired

TARGET = paired.Target(0.995, at_least=True)
FILE_MB = "0.008"


def prepare(folder: Path) -> Path:
    """The digits as many files; returns where they are."""
    out = folder / "digits"
    flags = ["--source", "digits", "--out", str(out), "--file-mb", FILE_MB]
    commands.run(["-m", "orchestrator.prepare", "resnet", *flags], folder, ORCHESTRATOR_CACHE=str(folder / "cache"))
    return out


def accuracy(settings: Namespace, window: int, seeds: list[int]) -> float:
    """Of one run, with the next seed."""
    with commands.visit() as folder:
        data = prepare(folder)
        flags = ["--data", f"parquet:{data}", "--shuffle-window", str(window), "--seed", str(seeds.pop(0))]
        flags += ["--workers", "1", "--epochs", str(settings.epochs), "--loader-processes", "0"]
        _, run = commands.train("resnet", flags, folder)
        return float(json.loads((run / "result.json").read_text())["metrics"]["accuracy"])


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=3)
    parser.add_argument("--windows", nargs="+", type=int, default=[1, 4], help="files mixed at a time [1 4]")
    parser.add_argument("--everything", type=int, default=64, help="a window that is never full [64]")
    parser.add_argument("--epochs", type=int, default=30, help="[30]")
    settings = parser.parse_args()
    report = paired.header("shuffle", settings)
    windows = [*settings.windows, settings.everything]
    sides = {str(w): partial(accuracy, settings, w, list(range(settings.visits))) for w in windows}
    found = paired.alternate(sides, settings.visits)
    report["accuracies"] = found
    report["means"] = {window: round(statistics.fmean(values), 5) for window, values in found.items()}
    report["comparisons"] = [
        paired.compare(f"accuracy, {w} files mixed / all", found[str(w)], found[str(settings.everything)], TARGET)
        for w in settings.windows
    ]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
