"""The wire between the coordinator and its workers: signs of life one way, ends of generations the other.

One TCP connection a worker. The kernel closes it when the process dies, so a death is known in milliseconds; a
frozen process, or one behind a cut network, falls silent. Lines of ASCII words; the first one is the secret.
"""

import asyncio
import contextlib
import hmac
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

BEAT_S = 0.25
PING_S = 1.0
CONNECT_S = 20.0
DESK_SILENT_S = 30.0  # a worker that hears nothing for so long is cut off
log = logging.getLogger("orchestrator.channel")


@dataclass(frozen=True)
class Beat:
    """A worker's sign of life.

    Attributes:
        place: grows with every piece of work that is done.
        waiting: whether it waits for the other workers.
        reading: whether it waits for samples, or for storage.
        shards: computed in this generation.
        busy_ms: milliseconds in which they were computed; waiting for others is not in it.
    """

    generation: int
    step: int
    place: int
    waiting: bool
    shards: int = 0
    busy_ms: int = 0
    reading: bool = False


@dataclass
class Pulse:
    """What is known of a worker: when it was last heard, and when it last got on. Seconds since 1970."""

    heard_s: float
    moved_s: float
    beat: Beat


class Desk:
    """The coordinator's end, in its event loop."""

    def __init__(self, secret: str, heard: Callable[[str, Beat], None], gone: Callable[[str], None]) -> None:
        """Args:
        heard: gets a member and its beat.
        gone: gets a member whose connection ended without `hang_up`.
        """
        self.secret, self._heard, self._gone = secret, heard, gone
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> int:
        """Listen on `host`; returns the port."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        return int(self._server.sockets[0].getsockname()[1])

    def tell(self, member: str, word: str, generation: int = 0) -> None:
        """Send an order; one to a member that is gone is dropped."""
        writer = self._writers.get(member)
        if writer is not None and not writer.is_closing():
            writer.write(f"{word} {generation}\n".encode())

    def tell_all(self, word: str) -> None:
        for member in list(self._writers):
            self.tell(member, word)

    def hang_up(self, member: str) -> None:
        """Close a member's connection without `gone` being told."""
        writer = self._writers.pop(member, None)
        if writer is not None:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        member = ""
        try:
            secret, _, member = (await reader.readline()).decode().strip().partition(" ")
            if not hmac.compare_digest(secret.encode(), self.secret.encode()):
                return
            self._writers[member] = writer
            async for line in reader:
                generation, step, place, waiting, shards, busy_ms, reading = (int(word) for word in line.split())
                self._heard(member, Beat(generation, step, place, bool(waiting), shards, busy_ms, bool(reading)))
        except (OSError, ValueError):
            log.info("the connection of %s broke", member)
        finally:
            writer.close()
            if self._writers.get(member) is writer:
                del self._writers[member]
                self._gone(member)


class Line:
    """A worker's end: a thread that beats and listens, also while the training thread computes."""

    def __init__(
        self,
        address: tuple[str, int],
        secret: str,
        member: str,
        look: Callable[[], Beat],
        told: Callable[[str, int], None],
    ) -> None:
        """Connect.

        Args:
            look: gives the beat to send.
            told: gets an order and a generation: "end", "pause", "stop", "checkpoint", "dump"; "fault" and its number;
                "gone": the wire broke.

        Raises:
            OSError: nobody answers at `address`.
        """
        self._socket = socket.create_connection(address, timeout=CONNECT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(f"{secret} {member}\n".encode())
        self._ready = selectors.DefaultSelector()  # not select.select, which knows 1024 descriptors
        self._ready.register(self._socket, selectors.EVENT_READ)
        self._look, self._told = look, told
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up; `told` is not called any more."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(CONNECT_S)
        self._ready.close()
        self._socket.close()

    def _loop(self) -> None:
        try:
            self._listen()
        except OSError as error:
            log.info("the connection to the coordinator broke: %s", error)
        except Exception:
            log.exception("the heartbeat ends")
        if not self._closed.is_set():
            self._told("gone", 0)

    def _listen(self) -> None:
        rest, next_beat_s, heard_s = b"", 0.0, time.monotonic()
        while not self._closed.is_set():
            now = time.monotonic()
            if now >= next_beat_s:
                beat = self._look()
                self._socket.sendall(" ".join(str(int(word)) for word in astuple(beat)).encode() + b"\n")
                next_beat_s = now + BEAT_S
            if now - heard_s > DESK_SILENT_S:
                raise OSError(f"silent for {DESK_SILENT_S:.0f} s")
            if self._ready.select(max(0.0, next_beat_s - now)):
                data = self._socket.recv(4096)
                if not data:
                    raise OSError("closed by the coordinator")
                heard_s = now
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    word, generation = line.decode().split()
                    if word != "ping":
                        self._told(word, int(generation))
