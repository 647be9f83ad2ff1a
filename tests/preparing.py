"""Prepare data in this process: the parts one after the other, as the nodes of a cluster would make them."""

from pathlib import Path

from orchestrator import outfolder
from orchestrator.assembly import assemble
from orchestrator.partmaker import write_part
from orchestrator.prepare import Job, parser
from orchestrator.storage import Folder
from orchestrator.tables import Manifest
from workloads.registry import WORKLOADS


def job(workload: str, source: str, out: Path, *flags: str, **own: object) -> Job:
    """What there is to do; settings of the workload by name."""
    given = parser(workload).parse_args(["--source", source, "--out", str(out), *flags])
    entry = WORKLOADS[workload]
    config = entry.absolute_paths(assemble(entry.config_type(), {"data": source, **own}))
    outfolder.check(Folder(str(out), "--out"), workload)
    found = Job(workload, entry.prepare(config), given)
    found.find_done()
    return found


def do(todo: Job, numbers: list[int] | None = None) -> Manifest | None:
    """Make the parts that are missing, or some of them; the manifest when all are there."""
    outfolder.claim(todo.folder, todo.workload)
    for number in todo.missing() if numbers is None else numbers:
        part, spec = todo.parts[number], todo.specs[number]
        todo.take(write_part(todo.folder.uri, number, spec, todo.preparation, part))
    return None if todo.missing() else todo.finish()
