"""int8 beside fp32: held-out metrics, size and latency of exported models, alternating in one process.

    python tests/bench/exports.py --runs runs/digits:static runs/docs:dynamic --out exports.json

The runs are those of `python -m orchestrator.run resnet` and `... bert`. Beside them --brief names networks of a size
that is used, trained here for a few steps: what they know is little, what they cost is as ever. Those of 224 pixels
tell tiles of 320 pixels from the photographs in --photos, by which photograph they are of (apt:
lomiri-wallpapers-16.04, 15 of them); every third tile is held out. Targets: at most 0.3 of fp32's bytes, at most 0.5
points lost, faster than the fastest fp32.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import paired
from finished_runs import finish
from PIL import Image

from orchestrator.config import RunConfig
from orchestrator.export import main as export
from workloads.bert.config import BertConfig
from workloads.resnet.config import ResnetConfig

TILE, SHORTER, MOST = 320, 1600, 60  # pixels of a tile, of a photograph's shorter side; tiles of a photograph


@dataclass(frozen=True)
class Brief:
    """A network that is trained for a few steps, and how it is quantized."""

    workload: str
    config: RunConfig
    quantize: str
    steps: int
    lr: float = 1e-3


def briefs(photos: str) -> dict[str, Brief]:
    """By name; `photos`: the data of those that need it."""
    of_photos = {"data": photos, "image_size": 224, "batch_size": 16}
    return {
        "resnet18": Brief("resnet", ResnetConfig(model="resnet18", image_size=32, batch_size=32), "static", 40),
        "resnet18-224": Brief("resnet", ResnetConfig(model="resnet18", **of_photos), "static", 120),
        "resnet50-224": Brief("resnet", ResnetConfig(model="resnet50", **of_photos), "static", 120),
        "bert-mini": Brief(
            "bert", BertConfig(model="mini", vocab_size=8192, sequence_length=128, batch_size=16), "dynamic", 40
        ),
        "bert-base": Brief(
            "bert", BertConfig(model="base", vocab_size=8192, sequence_length=128, batch_size=8), "dynamic", 40, 1e-4
        ),
    }


def tiles(photos: Path, folder: Path) -> str:
    """An image folder of tiles, a class for each photograph."""
    files = sorted(file for file in photos.iterdir() if file.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        sys.exit(f"--photos {photos}: no photographs are there")
    for file in files:
        image = Image.open(file).convert("RGB")
        scale = SHORTER / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        corners = [
            (x, y) for y in range(0, image.height - TILE + 1, TILE) for x in range(0, image.width - TILE + 1, TILE)
        ]
        for number, (x, y) in enumerate(corners[:MOST]):
            where = folder / ("train" if number % 3 else "val") / file.stem
            where.mkdir(parents=True, exist_ok=True)
            image.crop((x, y, x + TILE, y + TILE)).save(where / f"{number}.jpg", quality=90)
    return f"imagefolder:{folder}"


def exported(run: Path, mode: str, out: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """What an export says of itself."""
    flags = ["--rounds", str(settings.rounds), "--calibration-samples", settings.calibration_samples]
    flags += ["--fine-tune-steps", str(settings.fine_tune_steps)]
    if export([str(run), "--quantize", mode, "--out", str(out), *flags]):
        raise SystemExit(f"{run}: not exported")
    record = json.loads((out / "export.json").read_text())
    return {key: record[key] for key in ("workload", "quantize", "measured_on", "table")}


def keep(report: dict[str, Any], out: Path | None) -> None:
    """What is known so far: the larger networks take minutes."""
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=None)
    parser.add_argument("--runs", nargs="*", default=[], help="FOLDER:QUANTIZE of finished runs [none]")
    names = sorted(briefs(""))
    parser.add_argument("--brief", nargs="*", default=names, choices=names, help="[all]")
    parser.add_argument("--photos", type=Path, default=Path("/usr/share/backgrounds"), help="[/usr/share/backgrounds]")
    parser.add_argument("--steps", type=int, default=0, help="of training for --brief [40 to 120]")
    parser.add_argument("--calibration-samples", default="512", help="[512]")
    parser.add_argument("--fine-tune-steps", type=int, default=100, help="where calibration loses too much [100]")
    parser.add_argument("--rounds", type=int, default=101, help="[101]")
    settings = parser.parse_args()
    report = paired.header("exports", settings)
    report["exports"] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for given in settings.runs:
            run, _, mode = given.rpartition(":")
            out = Path(scratch) / f"out-{len(report['exports'])}"
            report["exports"][Path(run).name] = exported(Path(run), mode, out, settings)
            keep(report, settings.out)
        for name in settings.brief:
            photos = tiles(settings.photos, Path(scratch) / "tiles") if name.endswith("-224") else ""
            brief, run = briefs(photos)[name], Path(scratch) / name
            paired.say(f"{name}: training")
            finish(run, brief.workload, brief.config, settings.steps or brief.steps, brief.lr)
            paired.say(f"{name}: exporting")
            report["exports"][name] = exported(run, brief.quantize, Path(scratch) / f"out-{name}", settings)
            keep(report, settings.out)
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
