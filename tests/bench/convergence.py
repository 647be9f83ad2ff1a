"""How far from synchronous training each way to share what workers learn (--sync) ends, on both default runs.

    python tests/bench/convergence.py --out convergence.json
    python tests/bench/convergence.py --workloads bert --ways diloco

The default run of each workload at its full length, two workers, one run per way: the metrics on the held-out split,
and the distance to the first way, `allreduce`. Nothing is timed: other load does not matter, but that it may change
how stale the asynchronous ways are. Target: an accuracy at most 0.02 below that of `allreduce`.
"""

import json
from typing import Any

import commands
import paired

WAYS = {
    "allreduce": [],
    "parameter-server, staleness 0": ["--sync", "parameter-server"],
    "parameter-server, staleness 2": ["--sync", "parameter-server", "--staleness", "2"],
    "parameter-server, staleness inf": ["--sync", "parameter-server", "--staleness", "inf"],
    "local-sgd, 8 steps": ["--sync", "local-sgd", "--local-steps", "8"],
    "diloco, 8 steps": ["--sync", "diloco", "--local-steps", "8"],
}
# With the paper's the default bert run is too short to leave the plateau of the words' own frequencies.
PAPER = {"diloco, 8 steps, the paper's momentum": [*WAYS["diloco, 8 steps"], "--outer-momentum", "0.9"]}
ACCURACY = {"resnet": "accuracy", "bert": "masked_accuracy"}
COMMON = ["--workers", "2", "--resources-per-worker", "CPU=0.5", "--threads", "1", "--precision", "fp32"]
TARGET = paired.Target(-0.02, at_least=True)


def trained(workload: str, flags: list[str]) -> dict[str, Any]:
    """One run to its end: what it reached, how stale its gradients were where they can be."""
    with commands.visit(alone=False) as folder:
        _, run = commands.train(workload, [*COMMON, *flags], folder)
        found = json.loads((run / "result.json").read_text())
    kept = ("metrics", "weights_sha256", "deterministic", "staleness", "wall_s")
    return {key: found[key] for key in kept if key in found}


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=None)
    parser.add_argument("--workloads", type=paired.words(list(ACCURACY)), default=list(ACCURACY))
    parser.add_argument(
        "--ways", nargs="*", default=[], help="beside the first, those that hold one of these words [all]"
    )
    settings = parser.parse_args()
    report = paired.header("convergence", settings)
    report["target"] = str(TARGET)
    report["runs"] = []
    for workload in settings.workloads:
        base, ways = 0.0, WAYS | PAPER
        first, *others = ways
        chosen = [name for name in others if not settings.ways or any(word in name for word in settings.ways)]
        for name in (first, *chosen):
            found = trained(workload, ways[name])
            reached = found["metrics"][ACCURACY[workload]]
            base = reached if name == first else base
            distance = round(reached - base, 5)
            run = {"workload": workload, "sync": name, "distance": distance, "met": TARGET.met(distance), **found}
            report["runs"].append(run)
            paired.say(f"{workload}, {name}: {reached:.4f}, {distance:+.4f}")
            if settings.out:  # what is known so far
                settings.out.write_text(json.dumps(report, indent=1) + "\n")
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
