"""Ways to share what workers learn (--sync) where they should differ: one slow worker, and a slow link.

    python tests/bench/syncs.py --case slow --out slow.json
    python tests/bench/syncs.py --case link --out link.json

slow: two workers of one machine, one of which sleeps for `--seconds` a step, if it has its even share of the work (a
fault schedule does that). link: two workers on hosts of their own, network namespaces whose cables carry `--rate`
(tc tbf; needs root). Each way trains the digits for as many steps; samples a second of the later three quarters of
the steps, the ratio to the first way, and the held-out accuracy after so few steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ray"))
import hosts
import paired
from commands import finish, kept_in, records, result, start

WAYS = {
    "slow": {
        "allreduce, even shares": ["--balance", "even"],
        "allreduce, measured shares": [],
        "parameter-server, staleness 0": ["--sync", "parameter-server"],
        "parameter-server, staleness 2": ["--sync", "parameter-server", "--staleness", "2"],
        "parameter-server, staleness inf": ["--sync", "parameter-server", "--staleness", "inf"],
    },
    "link": {
        "allreduce": [],
        "parameter-server, staleness 2": ["--sync", "parameter-server", "--staleness", "2"],
        "local-sgd, 8 steps": ["--sync", "local-sgd", "--local-steps", "8"],
        "diloco, 32 steps": ["--sync", "diloco", "--local-steps", "32"],
    },
}
COMMON = ["--workers", "2", "--checkpoint-every", "1000000", "--threads", "1"]


def rate(folder: Path) -> float:
    """Samples a second of the later three quarters of a run's steps, by the clock."""
    steps = records(folder)
    first = steps[len(steps) // 4]
    later = [r for r in steps if r["time_s"] > first["time_s"]]
    return sum(r["samples"] for r in later) / (later[-1]["time_s"] - first["time_s"])


def measured(folder: Path) -> dict[str, Any]:
    found = result(folder)
    figures = {"samples_per_s": round(rate(folder), 2), "accuracy": round(found["metrics"]["accuracy"], 4)}
    return figures | ({"staleness": found["staleness"]} if "staleness" in found else {})


def slow(settings: argparse.Namespace, flags: Sequence[str], folder: Path) -> dict[str, Any]:
    """On a Ray of the command's own."""
    schedule = folder / "slow.toml"
    schedule.write_text(
        f'[[fault]]\nkind = "slow"\nrank = 1\nstep = 2\nseconds = {settings.seconds}\nsteps = 1000000\nworkers = 2\n'
    )
    faults = ["--faults", str(schedule)]
    half = ["--resources-per-worker", "CPU=0.5"]
    command = ["resnet", "--steps", str(settings.steps), *COMMON, *half, *flags, *faults, *kept_in(folder)]
    done = finish(start(command), 900)
    if done.status:
        raise RuntimeError(done.out + done.err)
    return measured(folder / "run")


def link(settings: argparse.Namespace, flags: Sequence[str], folder: Path) -> dict[str, Any]:
    """On a cluster of three hosts: a head without workers, and two whose cables are slow from the first step on."""
    with hosts.built(hosts.Hosts, 3) as net:
        address = net.start_ray(0, cpus=0)
        for number in (1, 2):
            net.start_ray(number, cpus=1)
        for number in (0, 1, 2):
            limit = ["tc", "qdisc", "add", "dev", "v0", "root", "tbf", "rate", settings.rate, "burst", "64kb"]
            subprocess.run(net.on(number, [*limit, "latency", "400ms"]), check=True)
        train = [sys.executable, "-m", "orchestrator.run", "resnet", "--model", "resnet20"]
        command = [*train, "--steps", str(settings.steps), *COMMON, *flags, *kept_in(folder, "run", address)]
        done = finish(net.start(0, command), 1200)
    if done.status:
        raise RuntimeError(done.out + done.err)
    return measured(folder / "run")


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=2)
    parser.add_argument("--case", choices=list(WAYS), default="slow", help="[slow]")
    parser.add_argument("--ways", nargs="*", default=[], help="only those whose name holds one of these words [all]")
    parser.add_argument("--steps", type=int, default=96, help="[96]")
    parser.add_argument("--seconds", type=float, default=0.5, help="slow: added to each step of the slow worker [0.5]")
    parser.add_argument("--rate", default="20mbit", help="link: of each host's cable [20mbit]")
    settings = parser.parse_args()
    if settings.case == "link" and hosts.NOT_HERE:
        sys.exit(hosts.NOT_HERE)
    report = paired.header("syncs", settings)
    ways = {n: f for n, f in WAYS[settings.case].items() if not settings.ways or any(w in n for w in settings.ways)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(settings.visits):
        for name, flags in ways.items():
            with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
                found[name].append((slow if settings.case == "slow" else link)(settings, flags, Path(folder)))
            paired.say(f"{name}: {found[name][-1]}")
            report["ways"] = compared(found)
            if settings.out:
                settings.out.write_text(json.dumps(report, indent=1) + "\n")
    paired.emit(report, settings.out)


def compared(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The visits of each way, and its median rate as a ratio to the first one's."""
    rates = {name: statistics.median(v["samples_per_s"] for v in visits) for name, visits in found.items() if visits}
    first = next(iter(rates.values()))
    return {name: {"visits": found[name], "to_first": round(rate / first, 3)} for name, rate in rates.items()}


if __name__ == "__main__":
    main()
