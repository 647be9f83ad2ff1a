"""`python -m orchestrator.rehearse WORKLOAD --faults FILE`: train undisturbed, train under faults, compare.

On a cluster of several nodes of its own on this machine, or on --address. The settings are those of orchestrator.run.
Exit status: 0 the same weights from the same samples, and every fault fired; 1 not; 2 unusable configuration. With
--parallel fsdp losses within a tolerance take the place of the same weights.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.assembly import assemble
from orchestrator.command import Parser, leave, refuse
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.faults import Fault
from orchestrator.nodewatch import node_token
from orchestrator.resume import default_storage
from orchestrator.run import REHEARSAL, check_faults, never_happen, read_faults, read_settings
from orchestrator.runfolder import EVENTS, METRICS, RunFolder
from orchestrator.settings import flag
from orchestrator.storage import Folder
from workloads.registry import WORKLOADS

POLL_S = 0.1
TOLERANCE = 1e-3  # of a loss, with --parallel fsdp, whose last bits depend on the workers: tests/bench/parallel.py
ADD_NODE = "--faults: add-node is only for a cluster of the rehearsal's own; leave --address out"


@dataclass
class Stage:
    """Where a rehearsal takes place. `cluster`: None on somebody else's."""

    address: str
    cpus: float
    cluster: Any = None

    def add_node(self) -> None:
        """One more node like the others."""
        if self.cluster is None:
            raise UserError(ADD_NODE)
        self.cluster.add_node(wait=False, num_cpus=self.cpus, include_dashboard=False)


@contextlib.contextmanager
def stage(address: str, nodes: int, cpus: float) -> Iterator[Stage]:
    """The cluster at `address`, or one with `nodes` nodes on this machine for as long as the rehearsal lasts."""
    if address:
        yield Stage(address, cpus)
        return
    from ray.cluster_utils import Cluster

    node_token()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(wait=False, num_cpus=cpus, include_dashboard=False)
        yield Stage(cluster.address, cpus, cluster)
    finally:
        cluster.shutdown()


def train(workload: str, arguments: Sequence[str], where: Stage, folder: RunFolder) -> None:
    """One run of the command line; adds a node when its schedule says so. Raises UserError if it is refused."""
    print(f"rehearse: {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "orchestrator.run", workload, *arguments, "--address", where.address]
    process = subprocess.Popen(command)
    added = 0
    try:
        while process.poll() is None:
            wanted = sum(e["event"] == "fault_fired" and e["kind"] == "add-node" for e in _lines(folder, EVENTS))
            for _ in range(wanted - added):
                where.add_node()
                added += 1
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode == 2:
        raise UserError("orchestrator.run did not accept the settings; its line says why")


def _lines(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    text = folder.folder.read_text(name) or ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def ledger(folder: RunFolder) -> list[tuple[int, int, str, float]]:
    """(step, samples, ledger, loss) of every committed step, in the order they were written."""
    return [(r["step"], r["samples"], r["ledger"], r["loss"]) for r in _lines(folder, METRICS)]


def problems(
    faults: Sequence[Fault], undisturbed: RunFolder, disturbed: RunFolder, tolerance: float = 0.0
) -> list[str]:
    """What speaks against the disturbed run, a line each; none: it passed.

    Args:
        tolerance: by which share losses may differ; 0: neither they nor the weights may.
    """
    found: list[str] = []
    results = [folder.result() or {"status": "no result"} for folder in (undisturbed, disturbed)]
    for name, result in zip(("undisturbed", "disturbed"), results, strict=True):
        if result["status"] != "finished":
            found.append(f"the {name} run did not finish: {result['status']}")
    fired = {e["fault"]: e["problem"] for e in _lines(disturbed, EVENTS) if e["event"] == "fault_fired"}
    for number, fault in enumerate(faults):
        if number not in fired:
            found.append(f"fault {number + 1} ({fault.kind}) did not fire")
        elif fired[number]:
            found.append(f"fault {number + 1} ({fault.kind}) did not take effect: {fired[number]}")
    if found:
        return found
    if not tolerance and results[0]["weights_sha256"] != results[1]["weights_sha256"]:
        found.append("the final weights differ")
    expected, got = ledger(undisturbed), ledger(disturbed)
    if [row[0] for row in got] != list(range(1, len(expected) + 1)):
        found.append("not every step was committed exactly once")
        return found
    for (*samples, loss), (*others, other) in zip(expected, got, strict=True):
        if samples != others or abs(loss - other) > tolerance * abs(loss):
            found.append(f"step {samples[0]} used other samples, or has another loss")
            break
    return found


def table(faults: Sequence[Fault], disturbed: RunFolder) -> str:
    """Faults and what came of them, and the incidents with the seconds of each phase."""
    fired = {e["fault"]: e for e in _lines(disturbed, EVENTS) if e["event"] == "fault_fired"}
    lines = [f"{'fault':<14}{'rank':>7}{'planned':>10}{'fired at step':>15}"]
    for number, fault in enumerate(faults):
        planned = f"step {fault.step}" if fault.step >= 0 else f"{fault.time_s:g} s"
        at = fired[number]["step"] if number in fired else "-"
        whom = str(fault.rank) if fault.rank >= 0 else f"node {fault.node}" if fault.node >= 0 else ""
        lines.append(f"{fault.kind:<14}{whom:>7}{planned:>10}{at:>15}")
    keys = ("detect_s", "regroup_s", "restore_s", "recompute_s", "recovery_s")
    lines += ["", f"{'incident':<20}{'step':>6}{'workers':>9}{'lost':>6}" + "".join(f"{key:>13}" for key in keys)]
    for incident in (disturbed.result() or {}).get("incidents", []):
        workers = f"{incident['workers_before']}->{incident['workers_after']}"
        seconds = "".join(f"{incident[key]:>13.3f}" for key in keys)
        lines.append(f"{incident['kind']:<20}{incident['step']:>6}{workers:>9}{incident['steps_lost']:>6}{seconds}")
    return "\n".join(lines)


def _verdict(undisturbed: RunFolder, disturbed: RunFolder, found: Sequence[str], tolerance: float) -> str:
    lines = []
    for name, folder in (("undisturbed", undisturbed), ("disturbed", disturbed)):
        result = folder.result() or {}
        sha256, wall_s = str(result.get("weights_sha256", ""))[:16], result.get("wall_s", float("nan"))
        goodput = result.get("goodput", float("nan"))
        lines.append(f"{name:<12} {wall_s:8.1f} s  goodput {goodput:.3f}  weights {sha256}  {folder.uri}")
    passed = f"the same samples, losses within {tolerance:.1%}" if tolerance else "the same weights"
    return "\n".join([*lines, *([f"FAILED: {line}" for line in found] or [f"passed: {passed}"])])


def rehearse(workload: str, arguments: Sequence[str]) -> int:
    """The whole command; returns the exit status."""
    parser = Parser(
        prog=f"python -m orchestrator.rehearse {workload}",
        description="Train undisturbed and under a schedule of faults, and compare. All settings of orchestrator.run.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=3, help="Nodes of the rehearsal's own cluster. [3]")
    parser.add_argument("--cpus-per-node", type=float, default=1, help="CPUs that each of them declares. [1]")
    parser.add_argument("--faults", metavar="FILE", help="TOML schedule of faults; see orchestrator/faults.py.")
    os.environ[REHEARSAL] = "1"
    mine, rest = parser.parse_known_args(arguments)
    given, dry, _ = read_settings(workload, rest)
    faults = read_faults(mine.faults)
    if not faults:
        raise UserError("--faults: not given; write a schedule, see orchestrator/faults.py, and give its file")
    if dry:
        raise UserError("--dry-run: a rehearsal has none; use it with python -m orchestrator.run")
    config = assemble(WORKLOADS[workload].config_type(), given)
    check_faults(config, faults)
    if idle := never_happen(config, config.steps or math.inf, faults):
        raise UserError(f"--faults {mine.faults}: {idle[0]}, and a rehearsal fails where one does not")
    staleness, tolerance = config.staleness, TOLERANCE if config.parallel.kind == "fsdp" else 0.0
    if staleness.steps:
        raise UserError(
            f"--staleness {staleness}: the result depends on timing, so there are no equal weights to look for; "
            "rehearse with --staleness 0"
        )
    if config.reduce == "ddp":
        raise UserError(
            "--reduce ddp: its sums depend on the workers, so there are no equal weights; rehearse with fixed"
        )
    name = given.pop("name", time.strftime("rehearsal-%Y%m%d-%H%M%S"))
    storage, address = given.pop("storage", default_storage()), given.pop("address", "")
    shared = [f"{flag(key)}={value}" for key, value in given.items()]
    folders = [RunFolder(Folder(storage).child(f"{name}-{kind}")) for kind in ("undisturbed", "disturbed")]
    if any(folder.config() for folder in folders):
        raise UserError(f"--name {name}: was rehearsed already in {storage}; give another name")
    if mine.cpus_per_node < 1 or mine.cpus_per_node % 1:
        raise UserError(
            f"--cpus-per-node {mine.cpus_per_node:g}: Ray's nodes have whole ones; give 1 or more, and a worker less "
            "with --resources-per-worker CPU=0.5"
        )
    if address and any(fault.kind == "add-node" for fault in faults):
        raise UserError(ADD_NODE)
    with stage(address, mine.nodes, mine.cpus_per_node) as where:
        for kind, folder, extra in zip(
            ("undisturbed", "disturbed"), folders, ([], ["--faults", mine.faults]), strict=True
        ):
            train(workload, [*shared, "--storage", storage, "--name", f"{name}-{kind}", *extra], where, folder)
            if kind == "undisturbed" and (folder.result() or {"status": "no result"})["status"] != "finished":
                print("the undisturbed run did not finish, so that there is nothing to compare with", file=sys.stderr)
                return 1
            if given.get("precision", "auto") == "auto":  # near a tie, the second run could measure otherwise
                shared.append(f"--precision={folder.precision()}")
    found = problems(faults, folders[0], folders[1], tolerance)
    print(f"\n{table(faults, folders[1])}\n\n{_verdict(folders[0], folders[1], found, tolerance)}", flush=True)
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: one line and status 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        print(
            f"usage: python -m orchestrator.rehearse {{{','.join(WORKLOADS)}}} --faults FILE ...; more with a workload"
        )
        return 0
    try:
        if not arguments or arguments[0] not in WORKLOADS:
            raise UserError(f"name a workload: {', '.join(WORKLOADS)}; see `python -m orchestrator.run --help`")
        return rehearse(arguments[0], arguments[1:])
    except OrchestratorError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    leave(main)
