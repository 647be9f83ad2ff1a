"""The wire between the coordinator and its workers, over loopback."""

import asyncio
import contextlib
import os
import queue
import resource
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from orchestrator import channel
from orchestrator.channel import Beat, Desk, Line

WAIT_S = 20.0
HOST = "127.0.0.1"


def run(main: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own, in which nothing may go wrong unseen."""
    errors: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        await asyncio.wait_for(main, 3 * WAIT_S)
        assert not errors

    asyncio.run(watched())


class Office:
    """A desk that notes what it hears, in order."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[tuple[str, Beat | None]] = asyncio.Queue()
        self.gone: list[str] = []
        self.desk = Desk("secret", lambda member, beat: self.news.put_nowait((member, beat)), self._gone)
        self.port = 0

    async def open(self) -> "Office":
        self.port = await self.desk.open(HOST)
        return self

    def _gone(self, member: str) -> None:
        self.gone.append(member)
        self.news.put_nowait((member, None))

    async def next(self, wanted: Callable[[str, Beat | None], bool]) -> tuple[str, Beat | None]:
        """The next news of a kind; what comes before is dropped."""
        while True:
            news = await asyncio.wait_for(self.news.get(), WAIT_S)
            if wanted(*news):
                return news

    async def beat(self, member: str, step: int = 0) -> Beat:
        _, beat = await self.next(lambda who, beat: who == member and beat is not None and beat.step >= step)
        assert beat is not None
        return beat

    async def end(self, member: str) -> None:
        await self.next(lambda who, beat: who == member and beat is None)


class Worker:
    """A worker's end; what it is told goes into a queue."""

    def __init__(self, port: int, member: str, secret: str = "secret") -> None:
        self.now = Beat(1, 0, 0, False)
        self.orders: queue.Queue[tuple[str, int]] = queue.Queue()
        self.line = Line((HOST, port), secret, member, lambda: self.now, lambda *order: self.orders.put(order))

    async def told(self) -> tuple[str, int]:
        return await asyncio.to_thread(self.orders.get, timeout=WAIT_S)


def test_beats_arrive_and_orders_arrive():
    async def main() -> None:
        office = await Office().open()
        a, b = Worker(office.port, "a"), Worker(office.port, "b")
        assert await office.beat("a") == Beat(1, 0, 0, False)
        await office.beat("b")
        a.now = Beat(7, 3, 12, True)
        assert await office.beat("a", step=3) == Beat(7, 3, 12, True)
        a.now = Beat(7, 4, 13, False, 9, 250, True)
        assert await office.beat("a", step=4) == Beat(7, 4, 13, False, 9, 250, True)
        office.desk.tell("a", "ping")
        office.desk.tell("a", "pause", 7)
        office.desk.tell("b", "end", 6)
        office.desk.tell("nobody", "end", 6)
        assert await a.told() == ("pause", 7), "a ping is not told"
        assert await b.told() == ("end", 6)
        office.desk.tell_all("checkpoint")
        assert {await a.told(), await b.told()} == {("checkpoint", 0)}
        a.line.close()
        b.line.close()

    run(main())


@pytest.mark.parametrize("secret", ["wrong", "secre", ""])
def test_a_wrong_secret_is_refused(secret):
    async def main() -> None:
        office = await Office().open()
        stranger, friend = Worker(office.port, "a", secret), Worker(office.port, "b")
        assert await stranger.told() == ("gone", 0)
        await office.beat("b")
        office.desk.tell("a", "end", 1)
        friend.line.close()
        await office.end("b")
        assert office.gone == ["b"], "a stranger is no member"
        assert stranger.orders.empty()

    run(main())


async def refused(port: int, sent: bytes) -> None:
    """Send this on a connection of its own, and wait for the other end to close it."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(sent)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
    writer.close()


@pytest.mark.parametrize("sent", [b"\xff\xfe a\n", b"\n", b"x" * 100_000, "s\u00e9cret a\n".encode()])
def test_rubbish_is_refused_quietly(sent):
    async def main() -> None:
        office = await Office().open()
        await refused(office.port, sent)
        assert not office.gone

    run(main())


@pytest.mark.parametrize(
    "sent", [b"1 2 3 4 5 6\n", b"1 2 3 4 5 6 7 8\n", b"1 2 three 0 0 0 0\n", b"9" * 100_000 + b"\n"]
)
def test_a_member_that_sends_rubbish_is_cut_off_and_reported(sent):
    async def main() -> None:
        office = await Office().open()
        await refused(office.port, b"secret a\n1 5 0 0 0 0 0\n" + sent)
        await office.beat("a", step=5)
        await office.end("a")
        assert office.gone == ["a"]

    run(main())


def test_who_closes_is_reported_once():
    async def main() -> None:
        office = await Office().open()
        names = [f"m{i}" for i in range(12)]
        workers = {name: Worker(office.port, name) for name in names}
        for name in names:
            await office.beat(name)
        for name in names[:-1]:
            workers[name].line.close()
        for _ in names[:-1]:
            await office.next(lambda who, beat: beat is None)
        await office.beat(names[-1])
        workers[names[-1]].line.close()
        await office.end(names[-1])
        assert sorted(office.gone) == sorted(names)
        assert all(worker.orders.empty() for worker in workers.values()), "who closes is told nothing"

    run(main())


def test_hanging_up_reports_nothing():
    async def main() -> None:
        office = await Office().open()
        a, b = Worker(office.port, "a"), Worker(office.port, "b")
        await office.beat("a")
        await office.beat("b")
        office.desk.tell("a", "dump", 3)
        office.desk.hang_up("a")
        office.desk.hang_up("nobody")
        office.desk.tell("a", "end", 3)
        assert await a.told() == ("dump", 3), "what was said before is delivered"
        assert await a.told() == ("gone", 0)
        a.line.close()
        b.line.close()
        await office.end("b")
        assert office.gone == ["b"]

    run(main())


def test_a_member_that_connects_anew_is_not_gone_when_its_old_wire_ends():
    async def main() -> None:
        office = await Office().open()
        old = Worker(office.port, "a")
        await office.beat("a")
        new = Worker(office.port, "a")
        new.now = Beat(2, 2, 0, False)
        await office.beat("a", step=2)
        old.line.close()
        office.desk.tell("a", "pause", 2)
        assert await new.told() == ("pause", 2)
        witness = Worker(office.port, "b")
        await office.beat("b")
        witness.line.close()
        await office.end("b")
        assert office.gone == ["b"]
        new.line.close()
        await office.end("a")
        assert office.gone == ["b", "a"]

    run(main())


def test_a_worker_learns_that_the_desk_went_away():
    workers: list[Worker] = []

    async def main() -> None:
        office = await Office().open()
        workers.append(Worker(office.port, "a"))
        await office.beat("a")

    run(main())
    assert workers[0].orders.get(timeout=WAIT_S) == ("gone", 0)
    workers[0].line.close()
    assert workers[0].orders.empty()


def listener() -> socket.socket:
    """A desk that only listens."""
    server = socket.create_server((HOST, 0))
    server.settimeout(WAIT_S)
    return server


def test_nobody_listens():
    with listener() as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        Worker(port, "a")


def test_a_worker_that_hears_nothing_is_cut_off(monkeypatch):
    """The coordinator's machine may be gone without a word."""
    monkeypatch.setattr(channel, "DESK_SILENT_S", 0.5)
    with listener() as server:
        worker = Worker(server.getsockname()[1], "a")
        with server.accept()[0]:
            assert worker.orders.get(timeout=WAIT_S) == ("gone", 0)
        worker.line.close()


def test_orders_may_come_in_pieces():
    with listener() as server:
        worker = Worker(server.getsockname()[1], "a")
        with server.accept()[0] as wire, wire.makefile("rb") as lines:
            wire.settimeout(WAIT_S)
            assert lines.readline() == b"secret a\n"
            for piece in (b"pau", b"se 3\nen", b"d 4\nping 0\ncheckpoint", b" 0\n"):
                wire.sendall(piece)
                assert lines.readline() == b"1 0 0 0 0 0 0\n"  # a beat: the piece before has been read, or will be soon
            orders = [worker.orders.get(timeout=WAIT_S) for _ in range(3)]
            worker.line.close()
    assert orders == [("pause", 3), ("end", 4), ("checkpoint", 0)]
    assert worker.orders.empty()


@pytest.fixture
def many_files() -> Iterator[None]:
    """More open files than select can number."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    files = [os.open(os.devnull, os.O_RDONLY)]
    while files[-1] < 1100:
        files.append(os.dup(files[0]))
    yield
    for file in files:
        os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_with_many_open_files_hears_orders(many_files):
    async def main() -> None:
        office = await Office().open()
        worker = Worker(office.port, "a")
        await office.beat("a")
        office.desk.tell("a", "pause", 1)
        order = await asyncio.to_thread(worker.orders.get, timeout=5.0)
        worker.line.close()
        assert order == ("pause", 1)

    run(main())
