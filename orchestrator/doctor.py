"""`python -m orchestrator.doctor`: looks at this machine and at a cluster, and says what to do about each finding.

Exit status: 0 no problem was found; 1 there is one; 2 unusable arguments.
"""

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from orchestrator.checkup import Finding, here, on_nodes
from orchestrator.command import Parser, leave, refuse
from orchestrator.connect import cluster, is_here
from orchestrator.errors import OrchestratorError
from orchestrator.resume import default_storage

MARKS = {"ok": "ok       ", "warning": "warning  ", "problem": "PROBLEM  "}


def tell(findings: Iterable[Finding]) -> int:
    """Print findings as they come; returns how many are problems."""
    problems = 0
    for finding in findings:
        problems += finding.level == "problem"
        print(MARKS[finding.level] + finding.what)
        if finding.advice:
            print(f"         do: {finding.advice}")
        sys.stdout.flush()
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(
        prog="python -m orchestrator.doctor",
        description="Look at this machine, the storage and the cluster; say what to do about each finding.",
        allow_abbrev=False,
    )
    parser.add_argument("--address", default="", help="Ray cluster [RAY_ADDRESS, else the one on this machine, if any]")
    parser.add_argument("--storage", default="", help="where runs will be [./runs]")
    try:
        settings = parser.parse_args(arguments)
        storage = settings.storage or default_storage()
        problems = tell(here(storage))
        if not (settings.address or os.environ.get("RAY_ADDRESS") or is_here()):
            print("no cluster was looked at: none is on this machine; give --address")
        else:
            with tempfile.TemporaryDirectory() as folder, cluster(settings.address, Path(folder) / "ray.log"):
                problems += tell(on_nodes(storage))
    except OrchestratorError as error:
        return refuse(error)
    print(f"{problems} problem(s)" if problems else "no problem")
    return 1 if problems else 0


if __name__ == "__main__":
    leave(main)
