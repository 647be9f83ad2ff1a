"""int8 beside fp32: held-out metrics, size and latency of exported models, alternating in one process.

    python tests/bench/exports.py --runs runs/digits:static runs/docs:dynamic --out exports.json

The runs are those of `python -m orchestrator.run resnet` and `... bert`. Beside them --brief names networks of a size
that is used, trained here for --steps steps: what they know is little, what they cost is as ever. Targets: at most 0.3
of fp32's bytes, at most 0.5 points lost, faster than the fastest fp32.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import paired
from finished_runs import finish

from orchestrator.config import RunConfig
from orchestrator.export import main as export
from workloads.bert.config import BertConfig
from workloads.resnet.config import ResnetConfig

BRIEF: dict[str, tuple[str, RunConfig, str]] = {
    "resnet18": ("resnet", ResnetConfig(model="resnet18", image_size=32, batch_size=32), "static"),
    "bert-mini": ("bert", BertConfig(model="mini", vocab_size=8192, sequence_length=128, batch_size=16), "dynamic"),
}


def exported(run: Path, mode: str, out: Path, rounds: int) -> dict[str, Any]:
    """What an export says of itself."""
    if export([str(run), "--quantize", mode, "--out", str(out), "--rounds", str(rounds)]):
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
    parser.add_argument("--brief", nargs="*", default=sorted(BRIEF), choices=sorted(BRIEF), help="[all]")
    parser.add_argument("--steps", type=int, default=40, help="of training for --brief [40]")
    parser.add_argument("--rounds", type=int, default=101, help="[101]")
    settings = parser.parse_args()
    report = paired.header("exports", settings)
    report["exports"] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for given in settings.runs:
            run, _, mode = given.rpartition(":")
            out = Path(scratch) / f"out-{len(report['exports'])}"
            report["exports"][Path(run).name] = exported(Path(run), mode, out, settings.rounds)
            keep(report, settings.out)
        for name in settings.brief:
            workload, config, mode = BRIEF[name]
            run = Path(scratch) / name
            finish(run, workload, config, settings.steps, lr=1e-3)
            report["exports"][name] = exported(run, mode, Path(scratch) / f"out-{name}", settings.rounds)
            keep(report, settings.out)
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
