"""Spawned processes that are reused from test to test, and a way to run one function on several of them.

Importing torch costs seconds; forming a gloo group over processes that stay alive costs milliseconds.
"""

import atexit
import faulthandler
import itertools
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 120.0
START_TIMEOUT_S = 150.0  # importing torch beside a test of Ray's that computes on all cores, to which these give way
GROUP_TIMEOUT_S = 60.0


class WorkerDiedError(Exception):
    """A process ended without an answer."""


class RemoteError(Exception):
    """What a function raised could not be pickled; carries its traceback."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    group_timeout_s: float = GROUP_TIMEOUT_S,
    errors: bool = False,
    lost: tuple[int, ...] = (),
) -> list[Any]:
    """fn(group, *args) on `world_size` processes that form a gloo group; its results by rank.

    Args:
        timeout_s: after which processes that have not answered are killed and TimeoutError is raised; counted from
            when all of them have imported what `fn` needs.
        group_timeout_s: of the process group's collectives.
        errors: give what a rank raised as its result (a dead rank: WorkerDiedError) instead of raising it.
        lost: ranks that are not waited for, and are killed when the others have answered.
    """
    results = _POOL.run(fn, world_size, args, timeout_s, group_timeout_s, lost)
    raised = [result for result in results if isinstance(result, Exception)]
    if raised and not errors:
        # A rank that lost its peer raises RuntimeError; the peer's own error is the one to read.
        raise min(raised, key=lambda error: type(error) is RuntimeError)
    return results


def give_other_ranks() -> None:
    """The processes that are there have other ranks in the next run, as workers have in the next generation."""
    _POOL.turn()


class _Process:
    """A spawned process and the pipe to it."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # No daemon: loaders are its children. It ends with the pipe.
        self.process = context.Process(target=_serve, args=(theirs,), daemon=False)
        self.process.start()
        theirs.close()

    def say_where(self) -> None:
        """Its threads' tracebacks, on stderr."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            self.process.join(2)

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


class _Pool:
    def __init__(self) -> None:
        self._processes: list[_Process] = []
        self._store: Any = None
        self._run = itertools.count()

    def run(
        self,
        fn: Callable[..., Any],
        world: int,
        args: tuple[Any, ...],
        timeout_s: float,
        group_timeout_s: float,
        lost: tuple[int, ...],
    ) -> list[Any]:
        import torch.distributed as dist

        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        while len(self._processes) < world:
            self._processes.append(_Process())
        used, number = self._processes[:world], next(self._run)
        for rank, process in enumerate(used):
            process.pipe.send((fn, rank, world, self._store.port, number, group_timeout_s, args))
        # Members of a group wait for each other for a short time only.
        for rank, started in self._answers(used, range(world), START_TIMEOUT_S, "did not start").items():
            if isinstance(started, WorkerDiedError):
                self._forget(used)
                raise WorkerDiedError(f"rank {rank} died before it began")
        for process in used:
            process.pipe.send("go")
        results = self._answers(used, [rank for rank in range(world) if rank not in lost], timeout_s, "gave no result")
        results |= {rank: WorkerDiedError(f"rank {rank} was given up") for rank in lost}
        self._forget([used[rank] for rank in range(world) if isinstance(results[rank], WorkerDiedError)])
        return [results[rank] for rank in range(world)]

    def _answers(self, used: list[_Process], ranks: Iterable[int], timeout_s: float, otherwise: str) -> dict[int, Any]:
        """What each of `ranks` sends; a dead one: WorkerDiedError."""
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while open_pipes := {used[rank].pipe: rank for rank in ranks if rank not in results}:
            ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in open_pipes.values():
                    used[rank].say_where()
                self._forget(used)
                raise TimeoutError(f"ranks {sorted(open_pipes.values())} {otherwise} in {timeout_s} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    results[open_pipes[pipe]] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    results[open_pipes[pipe]] = WorkerDiedError(f"rank {open_pipes[pipe]} died")
        return results

    def _forget(self, used: list[_Process]) -> None:
        for process in used:
            process.end()
            self._processes.remove(process)

    def turn(self) -> None:
        self._processes.reverse()

    def close(self) -> None:
        self._forget(list(self._processes))


_POOL = _Pool()
atexit.register(_POOL.close)


def _serve(pipe: Connection) -> None:
    faulthandler.register(signal.SIGUSR1)
    # Every TCPStore client asks DNS for the name of 127.0.0.1: where nobody answers, for 5 s without RES_OPTIONS.
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", RES_OPTIONS="timeout:1 attempts:1")
    import torch
    import torch.distributed as dist

    from orchestrator.group import Group

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    stores: dict[int, Any] = {}
    while True:
        try:
            fn, rank, world, port, number, group_timeout_s, args = pipe.recv()
        except EOFError:
            return
        pipe.send("ready")
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            if port not in stores:
                stores[port] = dist.TCPStore("127.0.0.1", port, is_master=False)
            # torch keeps counting groups that failed to connect: a test must not spoil the next one.
            dist.distributed_c10d._world.group_count = 0
            group = Group(rank, world, torch.device("cpu")).connect(stores[port], number, group_timeout_s)
            try:
                answer = fn(group, *args)
            finally:
                group.close()
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error if _survives_pickling(error) else RemoteError(traceback.format_exc())
        pipe.send(answer)


def _survives_pickling(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False
