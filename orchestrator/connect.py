"""A connection to Ray: the cluster that was named, the one that was found, or one of the command's own."""

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.command import Lasting
from orchestrator.errors import UserError, one_line
from orchestrator.own_ray import few_processes
from orchestrator.redact import redact

CONNECT_TIMEOUT_S = 5.0


class Redacted(logging.Formatter):
    """A log in the run folder has no keys in it."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextlib.contextmanager
def cluster(address: str, log_file: Path, environment: Mapping[str, str] | None = None) -> Iterator[bool]:
    """A connection to Ray, found or started; yields whether the cluster is a local one of our own.

    Args:
        environment: variables for the processes of a cluster of our own.

    Raises:
        UserError: there is no cluster at `address`.
    """
    _quiet_ray(log_file)
    import ray

    named, here = address or os.environ.get("RAY_ADDRESS", ""), ""
    if named in ("", "auto"):
        here = _known_here()
        named = here if _answers(here) else named
    arguments: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    own = named in ("", "local")  # Ray's own word for that would listen to all the network
    if own:
        # Nobody else talks to a cluster that lives as long as this command: no dashboard, loopback only.
        # Ray's workers-in-waiting, one a core, would be of use to few runs.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        arguments |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        _check_named(named, found=named == here)
        arguments |= {"address": named}
    # Importing Ray Train takes as long as starting a cluster: side by side.
    ahead = threading.Thread(target=importlib.import_module, args=("orchestrator.ray_backend",), daemon=True)
    ahead.start()
    # Until the run itself takes signals: end in order, or what ray.init has started stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with few_processes(environment or {}) if own else contextlib.nullcontext():
            ray.init(**arguments)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = one_line(error)
        raise (_cannot_start(reason) if own else _no_cluster(named, reason)) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray.init has put its own there, which says nothing
    try:
        yield own
    finally:
        ray.shutdown()


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"--address {address}: no Ray cluster answers ({reason}); start one with `ray start --head`, set "
        "RAY_AUTH_MODE=token if it demands a token, or give --address local for one of this command's own"
    )


def _cannot_start(reason: str) -> UserError:
    """Such as a temporary folder whose name leaves no room for that of a socket, or a home that cannot be written."""
    return UserError(
        f"Ray cannot start on this machine ({reason}); set RAY_TMPDIR to a short folder that can be written, "
        "RAY_AUTH_TOKEN_PATH to a file in one, or give --address of a cluster that runs"
    )


def _check_named(address: str, found: bool) -> None:
    """Say at once what ray.init would say after 20 s, and use this machine's token for a cluster on this machine.

    Args:
        found: whether `ray start` was given it on this machine, which is of that cluster then.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.util import get_node_ip_address

    host, _, port = address.rpartition(":")
    if address == "auto":
        raise _no_cluster(address, "none was started here with `ray start`")
    if address.startswith("ray://"):
        raise UserError(
            f"--address {address}: Ray Client is not used here; write HEAD:6379, or submit a job: README.md"
        )
    if "://" in address or not port.isdigit():
        return
    if not _answers(address):
        raise _no_cluster(address, "nothing listens there")
    # ray.init does this for addresses it finds itself; a token is not sent to other machines unasked.
    if found or host in ("127.0.0.1", "localhost", get_node_ip_address()):
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _known_here() -> str:
    """Address of the cluster that `ray start` last started here, "" if none; it may have ended since.

    Not ray.init's "auto", which also finds the private cluster of another command, and ends with it.
    """
    from ray._private.utils import read_ray_address

    return read_ray_address() or ""


def is_here() -> bool:
    """Whether a cluster that was started on this machine answers."""
    return _answers(_known_here())


def _answers(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _quiet_ray(log_file: Path) -> None:
    """Ray's own messages go to a file: the terminal belongs to the run."""
    # Ray's own variables: the controller looks after the workers this often, and asks nobody about usage.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a call that comes too late starts no cluster
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from ray._private import worker  # importing ray resets its loggers, so the handler comes after

    log_file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_file)
    handler.setFormatter(Redacted("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True  # some of Ray's modules clear its handlers when they are imported: the root keeps ours
    logging.getLogger().addHandler(handler)
    # Errors that the cluster publishes (a worker died) are printed whatever log_to_driver says: log them instead.
    worker.print_to_stdstream = lambda data, **_: logger.warning("%s", "\n".join(map(str, data["lines"])))
    _keep_terminal(log_file)


def _keep_terminal(log_file: Path) -> None:
    """Python's stdout and stderr stay where they are; what C++ and child processes write goes to the log."""
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        stream.flush()
        kept = os.fdopen(os.dup(number), "wb")
        setattr(sys, name, Lasting(kept, encoding="utf-8", errors="replace", line_buffering=True))
        os.dup2(log, number)
    os.close(log)
