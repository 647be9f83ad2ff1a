"""From a plan to a running training: the cluster, the coordinator, Ray Train's TorchTrainer, and the way back."""

import contextlib
import dataclasses
import logging
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.clerk import clerk
from orchestrator.cluster_fit import Node
from orchestrator.coordinator import Coordinator
from orchestrator.errors import GoingOnError, UserError, last_line
from orchestrator.failure import Failure
from orchestrator.faults import Fault
from orchestrator.lastwords import command_failed, write_end
from orchestrator.offer import offer
from orchestrator.plan import Plan
from orchestrator.progress import Progress
from orchestrator.resume import choose, fewer, settle_accelerator
from orchestrator.runfolder import RunFolder
from orchestrator.seats import NAMESPACE, READ_BACK_S, Assignment, Status
from orchestrator.training import Training, coordinator_name
from orchestrator.worker_device import check_torch_xla

POLL_S = 0.5
TEARDOWN_S = 20.0
# The coordinator's last gauges go with its process: so long, and a cluster that reports them every second has them
# (RAY_metrics_report_interval_ms), as Prometheus wants the step at which a run has ended.
LAST_NUMBERS_S = 2.5
COORDINATOR_BACK_S = 60.0
FROZEN_S = 90.0  # of a coordinator, at least: its workers give it up after 150 s
log = logging.getLogger("orchestrator.launch")


@dataclass(frozen=True)
class Ending:
    """How a command ended; `failure` where it failed."""

    outcome: str
    message: str
    exit_status: int
    result: dict[str, Any] | None
    failure: Failure | None = None


def nodes() -> list[Node]:
    """The cluster's living nodes, and what is free on them: nothing where Ray starts no more, for the node will go."""
    import ray
    from ray._private.state import available_resources_per_node, state

    free = {**available_resources_per_node(), **{node: {} for node in state.get_draining_nodes()}}
    return [
        Node(n["Resources"], n.get("Labels") or {}, n["NodeManagerAddress"], free.get(n["NodeID"], {}))
        for n in ray.nodes()
        if n["Alive"]
    ]


def launch(
    plan: Plan,
    folder: RunFolder,
    description: str,
    started_s: float,
    own_cluster: bool,
    faults: tuple[Fault, ...] = (),
) -> Ending:
    """Train `plan` on the connected cluster and wait for the end.

    SIGINT and SIGTERM ask for a checkpoint and a stop; a second one stops at once.

    Raises:
        UserError: the request does not fit on the cluster, or the run is going on already.
    """
    import ray

    if own_cluster and any(fault.kind == "node-loss" for fault in faults):
        raise UserError("--faults: node-loss: this Ray has one node, the command's own; use orchestrator.rehearse")
    found = nodes()
    offered = None if own_cluster else offer()
    config, accelerator = settle_accelerator(plan.config, found, offered)
    workers = choose(config, accelerator, found, offered)
    if accelerator.shape:
        check_torch_xla(found, accelerator.shape)
    plan = dataclasses.replace(plan, config=config)
    settled = {name: getattr(config, name) for name in ("accelerator", "accelerator_type", "topology", "precision")}
    folder.settle(**settled)
    # A cluster of the command's own never gets more nodes.
    maximum = workers if own_cluster else max(workers, plan.config.workers.maximum)
    assignment = Assignment(
        plan, folder.uri, uuid.uuid4().hex, description, started_s, workers, maximum, own_cluster, faults
    )
    coordinator = _start_coordinator(assignment)

    tried = last = workers

    def again() -> int:
        nonlocal tried, last
        try:
            found = choose(config, accelerator, nodes(), offered)
        except UserError:  # a node has gone without which the least do not fit: it may come back
            return workers
        # What is free may lie in parts that no worker fits into; with some of them the others are asked for later.
        tried = fewer(config, tried) if found == last and not accelerator.shape else found
        last = found
        return tried

    trainer = Training(assignment, coordinator, accelerator, offered, again)
    try:
        trainer.start()
        with clerk(str(plan.config.log), folder, assignment.token), _signals(coordinator) as interrupted:
            status = _follow(plan, coordinator, trainer, interrupted)
            over_s = time.monotonic()
            # Ray Train takes its workers down; a connection that is closed under it would end this process.
            if status.generation:
                trainer.join(TEARDOWN_S)
            if not own_cluster:
                time.sleep(max(0.0, over_s + LAST_NUMBERS_S - time.monotonic()))
    except ray.exceptions.RayError as error:
        message = f"the run's coordinator was lost ({type(error).__name__})"
        if getattr(error, "actor_init_failed", False):
            why = re.sub(r"^orchestrator\.errors\.\w+: ", "", last_line(error))
            message = f"the run's coordinator could not begin: {why}"
        lost = dataclasses.replace(command_failed(error, folder, plan), kind="coordinator_lost", error=message)
        return Ending("failed", message, 1, write_end(assignment, folder, lost), lost)
    finally:
        trainer.halt()
    told = (status.result or {}).get("failure")
    failure = Failure(**told) if told else None
    return Ending(status.outcome, status.message, status.exit_status, status.result, failure)


def _start_coordinator(assignment: Assignment) -> Any:
    """The run's coordinator, on the node of this command, without which there is no run; it is started anew if lost."""
    import ray
    from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]

    kind: type[Coordinator] = Coordinator
    if assignment.plan.config.sync == "parameter-server":
        from orchestrator.dispatcher import Dispatcher as kind
    actor_class: Any = ray.remote(kind).options(
        name=coordinator_name(assignment.uri),
        namespace=NAMESPACE,
        num_cpus=0,
        max_concurrency=10_000,
        max_restarts=-1,
        label_selector={RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
    )
    try:
        return actor_class.remote(assignment)
    except ValueError:
        name = assignment.plan.config.name
        raise GoingOnError(f"--name {name}: this run is going on already on this cluster") from None


@contextlib.contextmanager
def _signals(coordinator: Any) -> Iterator[list[int]]:
    """First SIGINT, SIGTERM or SIGHUP (a terminal that is gone): ask for a checkpoint and a stop. Second: at once."""
    taken: list[int] = []

    def take(number: int, _: object) -> None:
        taken.append(number)
        if len(taken) > 1:
            raise KeyboardInterrupt
        coordinator.request_stop.remote()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, take) for number in numbers}
    try:
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(plan: Plan, coordinator: Any, trainer: threading.Thread, interrupted: list[int]) -> Status:
    import ray

    # While it begins it reads the run's logs, however long that takes; then it waits for storage alone.
    limit_s, told, back_s = max(FROZEN_S, 1.5 * plan.config.storage_patience), False, COORDINATOR_BACK_S
    silent_since, again = time.monotonic(), False
    with Progress(plan.total_steps, lambda: len(nodes())) as progress:
        while True:
            alive = trainer.is_alive()
            try:
                status: Status = ray.get(coordinator.status.remote(), timeout=limit_s if told else None)
                silent_since, told = time.monotonic(), True
                back_s = COORDINATOR_BACK_S + status.step * READ_BACK_S
                if again and interrupted:  # its successor knows nothing of it
                    coordinator.request_stop.remote()
                again = False
            except ray.exceptions.ActorUnavailableError:  # its process was lost: Ray starts another
                if time.monotonic() - silent_since > back_s:
                    raise
                again, told = True, False
                time.sleep(POLL_S)
                continue
            except ray.exceptions.GetTimeoutError:  # stopped, or starved: nobody else would notice
                log.warning("the run's coordinator does not answer for %g s; it is started anew", limit_s)
                ray.kill(coordinator, no_restart=False)
                silent_since, again, told, back_s = time.monotonic(), True, False, limit_s
                continue
            progress.show(status, stopping=bool(interrupted))
            if status.outcome:
                return status
            if not alive:
                reason = "Ray Train ended before the run did; see logs/errors.log and ray.log in the run folder"
                ray.get(coordinator.fail.remote(reason, 1, reason))
                continue
            time.sleep(POLL_S)
