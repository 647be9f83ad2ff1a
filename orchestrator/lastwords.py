"""The last lines of a worker's log, which outlives the worker: Ray keeps a file of each process on its node."""

import asyncio
import dataclasses
import logging
import traceback
from pathlib import Path
from typing import Any

from orchestrator.errors import MachineError, OrchestratorError
from orchestrator.failure import NONE, UNKNOWN, Failure, Place, kind_of, resume_command, short
from orchestrator.journal import Journal
from orchestrator.nodewatch import NodeWatch, on_node
from orchestrator.plan import Plan
from orchestrator.recovery import Roster
from orchestrator.redact import redact
from orchestrator.replicas import ReplicaRoster
from orchestrator.runfolder import RunFolder
from orchestrator.seats import Assignment
from orchestrator.shards import Placement

READ_S = 10.0  # Ray may have to start a process on the node
READ_BYTES = 64 * 1024
NOTED = 200  # lines, in logs/errors.log: Ray's files go with its session
log = logging.getLogger("orchestrator.lastwords")


def last_words(pid: int, logs: str = "") -> list[str]:
    """The last lines of what process `pid` of this node has written, keys redacted; none where there is no log.

    Args:
        logs: the folder; "": that of the Ray session that this process is part of.
    """
    if not logs:
        from ray._private.worker import _global_node

        logs = _global_node.get_logs_dir_path()
    found = sorted(Path(logs).glob(f"worker-*-{pid}.*"), key=lambda file: file.stat().st_mtime)
    if not found:
        return []
    worker = found[-1].stem  # an earlier process may have had the same number
    text = ""
    for ending in ("out", "err"):  # logging goes to stderr: the end
        file = Path(logs) / f"{worker}.{ending}"
        if file.exists():
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - READ_BYTES))
                text += stream.read().decode(errors="replace").rstrip() + "\n"
    return redact(text).splitlines()


def tell_failure(coordinator: Any, member_id: str, place: Place, error: Exception) -> bool:
    """Tell the coordinator of what a worker has raised, keys redacted: this process may know some that others do not.

    An error of ours ends the run, unless others train and this worker never did: what it lacks they have. Another one,
    and what is wrong with its machine, ends this worker alone, unless that would go on for ever. Returns whether the
    run is over.
    """
    import ray

    trace = redact("".join(traceback.format_exception(error)))
    if isinstance(error, OrchestratorError) and not isinstance(error, MachineError):
        found = dataclasses.replace(place, shards=getattr(error, "shards", ()))
        if ray.get(coordinator.fail.remote(redact(str(error)), error.exit_status, trace, kind_of(error), found)):
            return True
    text = redact(str(error) if isinstance(error, OrchestratorError) else f"{type(error).__name__}: {error}")
    ray.get(coordinator.worker_failed.remote(member_id, place, text, trace))
    return False


def at_fault(place: Place, roster: Roster, placement: Placement) -> Place:
    """Where an error belongs that every worker has found: with who holds the shard.

    In a replica group that is who has computed it, or the last stage, which has the loss.
    """
    kind = roster.parallel.kind if isinstance(roster, ReplicaRoster) else "ddp"
    holders = [rank for rank, held in enumerate(placement) if place.shards and place.shards[0] in held]
    seats = [m for m in roster.by_rank if m.rank // roster.size in holders]
    if seats and kind in ("fsdp", "hsdp"):
        seats = [m for m in seats if m.rank % roster.size == place.shards[0] % roster.size] or seats
    member = (seats[-1] if kind == "pipeline" else seats[0]) if seats else None
    return Place(member.rank, member.node, member.pid, place.step) if member else place


def last_loss(journal: Journal) -> tuple[str, Place | None]:
    """What took the last worker that the run has lost, and where."""
    left = journal.newest("worker_left")
    if left is None:
        return "workers_lost", None
    return left["why"], Place(left["rank"], left["node"], left["pid"], journal.recorded)


async def describe(found: Failure, place: Place, watch: NodeWatch, journal: Journal) -> Failure:
    """The same failure with its place and the end of the worker's log, of which errors.log gets more."""
    if await watch.reachable(place.node):
        lines = await last_words_on(place.node, place.pid)
        journal.error("\n".join([f"the last lines of rank {place.worker}, process {place.pid}:", *lines[-NOTED:]]))
    else:
        lines = ["(its log is on a node that does not answer any more)"]
    return dataclasses.replace(
        found,
        worker=place.worker,
        node=place.node,
        host=watch.host(place.node),
        pid=place.pid,
        step=place.step,
        log_tail=short(lines),
    )


def what_is_kept(found: Failure, run: Journal | RunFolder, plan: Plan) -> Failure:
    """The same failure, keys redacted, with the newest step and checkpoint and the command that goes on."""
    return kept(found, run, resume_command(plan.workload, plan.config.storage, plan.config.name))


def kept(found: Failure, run: Journal | RunFolder, resume: str) -> Failure:
    """See what_is_kept."""
    step, checkpoint = found.step, NONE
    try:
        step = step or (run.recorded if isinstance(run, Journal) else run.last_step())
        if newest := run.newest("checkpoint_saved", "checkpoint_loaded"):
            checkpoint = newest["step"]
    except (OrchestratorError, OSError):  # storage may be what failed, and that is to be told all the same
        log.exception("the run folder cannot be read")
        checkpoint = UNKNOWN
    return dataclasses.replace(
        found,
        error=redact(found.error.strip().replace("\n", " ")),
        step=step,
        checkpoint_step=checkpoint,
        resume=resume,
    )


def command_failed(error: Exception, folder: RunFolder, plan: Plan) -> Failure:
    """How a command failed that has no coordinator to ask; its traceback goes to errors.log, or else to ray.log."""
    try:
        folder.error("".join(traceback.format_exception(error)))
    except (OrchestratorError, OSError):
        log.exception("logs/errors.log cannot be written")
        log.error("what was to be written there:", exc_info=error)
    text = str(error) if isinstance(error, OrchestratorError) else f"{type(error).__name__}: {error}"
    kind = kind_of(error) if isinstance(error, OrchestratorError) else "command_failed"
    return what_is_kept(Failure(kind, text), folder, plan)


def write_end(assignment: Assignment, folder: RunFolder, found: Failure) -> dict[str, Any] | None:
    """Write the end of a run whose coordinator does not come back, unless it had, or another command has the run."""
    try:
        if (written := folder.result()) or folder.owner() != assignment.token:
            return written
        told = (assignment.uri, assignment.token, assignment.description, assignment.started_s)
        journal = Journal(assignment.plan, *told, again=True, closing=True)
        journal.end("failed", found.error, "", {}, found)
        return journal.result
    except (OrchestratorError, OSError):  # storage may be lost with it
        log.exception("the run's end cannot be written down")
        return None


async def last_words_on(node: str, pid: int) -> list[str]:
    """`last_words` of a process of any node; one line that says why where they are not to be had."""
    import ray

    if node == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(last_words, pid)
    try:
        lines: list[str] = await asyncio.wait_for(on_node(last_words, node).remote(pid), READ_S)
        return lines
    except (ray.exceptions.RayError, TimeoutError) as error:
        return [f"(its log is on a node that cannot be asked any more: {type(error).__name__})"]
