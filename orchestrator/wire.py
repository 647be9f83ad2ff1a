"""The wire between a worker and a parameter server: a gradient one way, parameters the other, in one exchange.

A TCP connection for each pair. Ray puts arguments above 100 kB into its object store and looks for them there, which
costs small models several times what they compute. Little-endian; fp32 numbers as they lie in memory.
"""

import contextlib
import hmac
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import TrainingError
from orchestrator.sockets import family_of

Flat = NDArray[np.float32]
ASKED = struct.Struct("<IIIqIQQ")  # era, step, shard, version, samples; numbers of the gradient, of statistics
ANSWERED = struct.Struct("<BqqQ")  # how, version, staleness; bytes that follow
VOID, SAID, BROKE = range(3)
CONNECT_S = 20.0
SILENT_S = 60.0  # without a byte: whoever waits asks the dispatcher, which knows whether the server is there
NOTHING = np.empty(0, np.float32)
SECRET_BYTES = 32
log = logging.getLogger("orchestrator.wire")


@dataclass(frozen=True)
class Asked:
    """What a worker wants: to push the gradient of a microbatch, and to pull parameters; or, without one, to pull.

    Attributes:
        era: see served.Posting.
        step, shard, samples: of the microbatch.
        version: of the parameters that the worker has; they are sent where they have changed.
        gradient, statistics: fp32; empty for a pull.
    """

    era: int
    version: int
    step: int = 0
    shard: int = 0
    samples: int = 0
    gradient: Flat = field(default_factory=lambda: NOTHING)
    statistics: Flat = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True)
class Answer:
    """What a server says.

    Attributes:
        version: of its parameters.
        stale: updates since the version that was asked for, before this push.
        parameters: fp32, None: those of the version that was asked for.
    """

    version: int
    stale: int
    parameters: Flat | None


class Hatch:
    """A server's end: a thread for each worker.

    Args:
        host: to listen at.
        answer: called in those threads, None for what is void.
    """

    def __init__(self, host: str, answer: Callable[[Asked], Answer | None]) -> None:
        self._answer, self._secret = answer, secrets.token_bytes(SECRET_BYTES)
        self._socket = socket.create_server((host, 0), family=family_of(host), backlog=1024)
        self.address: tuple[str, int, bytes] = (host, self._socket.getsockname()[1], self._secret)
        threading.Thread(target=self._listen, name="hatch", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), name="hatch-worker", daemon=True).start()

    def close(self) -> None:
        """Take no more workers."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                _prepare(connection, CONNECT_S)
                if not hmac.compare_digest(_receive(connection, SECRET_BYTES), self._secret):
                    return
                connection.settimeout(None)
                while True:
                    self._one(connection)
            except OSError as error:
                log.info("the connection of a worker ended: %s", error)

    def _one(self, connection: socket.socket) -> None:
        era, step, shard, version, samples, *counts = ASKED.unpack(_receive(connection, ASKED.size))
        gradient, statistics = (np.empty(count, np.float32) for count in counts)
        for flat in (gradient, statistics):
            _fill(connection, _bytes_of(flat))
        try:
            answer = self._answer(Asked(era, version, step, shard, samples, gradient, statistics))
        except Exception as error:
            log.exception("what a worker asked failed")
            text = f"{type(error).__name__}: {error}".encode()
            connection.sendall(ANSWERED.pack(BROKE, 0, 0, len(text)) + text)
            return
        if answer is None:
            connection.sendall(ANSWERED.pack(VOID, 0, 0, 0))
            return
        flat = answer.parameters if answer.parameters is not None else NOTHING
        connection.sendall(ANSWERED.pack(SAID, answer.version, answer.stale, flat.nbytes))
        connection.sendall(_bytes_of(flat))


class Pipe:
    """A worker's end."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        """Raises OSError: nobody answers."""
        self._socket = socket.create_connection((host, port), timeout=CONNECT_S)
        _prepare(self._socket, SILENT_S)
        self._socket.sendall(secret)

    def ask(self, asked: Asked) -> None:
        """Send; an `answer` has to follow. Raises OSError."""
        counts = (asked.gradient.size, asked.statistics.size)
        self._socket.sendall(ASKED.pack(asked.era, asked.step, asked.shard, asked.version, asked.samples, *counts))
        for flat in (asked.gradient, asked.statistics):
            _send(self._socket, _bytes_of(flat))

    def answer(self, into: Flat) -> Answer | None:
        """What the server says; None: what was asked is void.

        Args:
            into: fp32 [numel], where parameters go that have changed.

        Raises:
            OSError: it is lost.
            TrainingError: it could not do what was asked.
        """
        how, version, stale, size = ANSWERED.unpack(_receive(self._socket, ANSWERED.size))
        if how == BROKE:
            text = _receive(self._socket, size).decode(errors="replace")
            raise TrainingError(f"a parameter server failed: {text}")
        if how == VOID:
            return None
        if size:
            _fill(self._socket, _bytes_of(into))
        return Answer(version, stale, into if size else None)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def _prepare(connection: socket.socket, timeout_s: float | None) -> None:
    connection.settimeout(timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _send(connection: socket.socket, view: memoryview) -> None:
    """All of it. The timeout counts for each piece; sendall's is for all of them together."""
    done = 0
    while done < len(view):
        done += connection.send(view[done:])


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes; raises OSError where the other end is gone."""
    into = bytearray(size)
    _fill(connection, memoryview(into))
    return bytes(into)


def _fill(connection: socket.socket, view: memoryview) -> None:
    """Receive as many bytes as `view` has; raises OSError where the other end is gone."""
    done = 0
    while done < len(view):
        count = connection.recv_into(view[done:])
        if not count:
            raise ConnectionError("closed at the other end")
        done += count


def _bytes_of(flat: Flat) -> memoryview:
    return flat.view(np.uint8).data
