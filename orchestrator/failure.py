"""How a run failed, in the words of a person: what, where, the worker's last lines, what is kept, how to go on."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN = 12  # lines of a worker's log
WIDEST = 300  # characters of such a line
NONE, UNKNOWN = -1, -2  # instead of the step of a checkpoint
CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
MARK = re.compile(r":(job_id|actor_name|task_name):")  # Ray's own, for what reads its logs
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Place:
    """Where something happened.

    Attributes:
        worker: its rank; -1: it had none yet.
        node: Ray's id of it.
        pid: of the process.
        step: the last committed one.
        shards: at fault, where that is known better than who has found it.
        member: the worker's id, where it tells this itself.
    """

    worker: int
    node: str
    pid: int
    step: int
    shards: tuple[int, ...] = ()
    member: str = ""


@dataclass(frozen=True)
class Failure:
    """What result.json has under "failure".

    Attributes:
        kind: of the last incident (worker_killed, ...), or of the error (data_error, ...), or what else
            ended it: ray_train, different_weights, never_ready, workers_lost, command_failed, command_lost.
        error: one line.
        worker: rank of the worker; -1: it had none, or it was no worker.
        node, host: id and address of its node, "" where it was no worker.
        pid: of its process.
        step: the last committed one.
        log_tail: the last lines of the worker's log, tracebacks left out: those are in logs/errors.log.
        checkpoint_step: of the newest checkpoint; -1: there is none, -2: storage could not be asked.
        resume: the command that goes on.
    """

    kind: str
    error: str
    worker: int = -1
    node: str = ""
    host: str = ""
    pid: int = 0
    step: int = 0
    log_tail: list[str] = field(default_factory=list)
    checkpoint_step: int = NONE
    resume: str = ""

    @property
    def where(self) -> str:
        """Such as "worker 1 (process 4711) on 10.0.0.3 (node 5f2e...), after step 20"."""
        if not self.node:
            return f"after step {self.step}"
        who = f"worker {self.worker}" if self.worker >= 0 else "a worker that had no rank yet"
        return f"{who} (process {self.pid}) on {self.host or 'a node'} (node {self.node[:12]}), after step {self.step}"

    @property
    def kept(self) -> str:
        """What a resumed run begins with."""
        if self.checkpoint_step == UNKNOWN:
            return "what was there: storage could not be asked which checkpoint is the newest"
        if self.checkpoint_step == NONE:
            return "no checkpoint yet, a resumed run begins anew"
        return f"the checkpoint of step {self.checkpoint_step}"


def kind_of(error: BaseException) -> str:
    """NonFiniteLossError: non_finite_loss_error."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


def resume_command(workload: str, storage: str, name: str) -> str:
    """What to type to go on with a run."""
    words = ("python", "-m", "orchestrator.run", workload, "--storage", storage, "--name", name)
    return " ".join(shlex.quote(word) for word in words)


def story(failure: Failure, uri: str) -> list[str]:
    """The lines in which a terminal tells it.

    Args:
        uri: of the run folder.
    """
    lines = [f"failed: {failure.error}", f"where: {failure.where}"]
    if failure.log_tail:
        lines += ["its last lines:", *(f"  | {line}" for line in failure.log_tail)]
    lines.append(f"kept: {uri}, with {failure.kept}; tracebacks are in its logs/errors.log")
    return [*lines, f"resume with: {failure.resume}"]


def short(lines: Sequence[str], most: int = SHOWN) -> list[str]:
    """The last `most` lines of a log without control characters; of a traceback only the error that it ends with."""
    kept, inside = list[str](), False
    for raw in lines:
        line = CONTROL.sub("", raw).rstrip()
        if "Traceback (most recent call last)" in line:
            inside = True
            continue
        if inside and (not line or line[0] in " \t"):
            continue
        inside = False
        if line and not MARK.match(line) and not line.startswith(CHAINED):
            kept.append(line if len(line) <= WIDEST else line[: WIDEST - 3] + "...")
    return kept[-most:]
