"""A run without Ray and without training: a real journal, a real desk, and members with real lines."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from toys import toy_plan

from orchestrator.balancer import Balancer
from orchestrator.channel import Beat, Line
from orchestrator.events import GenerationStarted
from orchestrator.journal import Journal
from orchestrator.membership import Membership
from orchestrator.recovery import Member, Roster
from orchestrator.seats import Order, Seat

WAIT_S = 20.0


class Watched(Membership):
    """Notes every beat that was heard."""

    def __init__(self, *args: object) -> None:
        self.beats: asyncio.Queue[tuple[str, Beat]] = asyncio.Queue()
        super().__init__(*args)

    def _heard(self, member_id: str, beat: Beat) -> None:
        super()._heard(member_id, beat)
        self.beats.put_nowait((member_id, beat))


class Run:
    """The coordinator's side of a run with 8 shards.

    Attributes:
        ended: reasons why the run cannot go on.
        killed: members whose processes were to be killed.
    """

    def __init__(
        self, folder: Path, workers: int, stall_s: float = 0.0, max_incidents: int = 100, again: bool = False
    ) -> None:
        self.folder = folder
        self.journal = Journal(toy_plan(shards=8), str(folder), "token", "", 0.0, again)
        roster = Roster(1, workers, workers, self.journal.generation, again)
        balancer = Balancer(self.journal, 8, 1000, enabled=True)
        self.members = Watched(self.journal, roster, balancer, stall_s, max_incidents)
        self.ended: list[str] = []
        self.killed: asyncio.Queue[str] = asyncio.Queue()
        self.members.end_run, self.members.kill = self._end, lambda m: self.killed.put_nowait(m.id)
        self.workers: list[Worker] = []

    def _end(self, reason: str, kind: str = "") -> None:
        self.ended.append(reason)
        self.members.abandon()

    async def open(self) -> None:
        self.port = await self.members.desk.open("127.0.0.1")
        self.members.start(self.members.tick_forever())

    def worker(self, name: str, node: str = "n0") -> "Worker":
        self.workers.append(Worker(self, name, node))
        return self.workers[-1]

    async def enlist(self, names: str) -> list["Worker"]:
        """A worker for each letter, all seated and training."""
        workers = [self.worker(name) for name in names]
        await self.seat(*workers)
        return workers

    async def seat(self, *workers: "Worker", why: str = "", load_s: float = 0.0, loaded: int = 0) -> None:
        """All ask for a seat and get one; training begins, after the checkpoint `loaded` where nobody has state."""
        for answer in await asyncio.gather(*(worker.join(why) for worker in workers)):
            assert isinstance(answer, Seat), answer
        self.begin(*workers, load_s=load_s, loaded=loaded)

    def begin(self, *workers: "Worker", load_s: float = 0.0, loaded: int = 0) -> None:
        """Rank 0 says that all have the state, as Coordinator.begin hears it."""
        seat = workers[0].seat
        step = loaded if seat.step < 0 else seat.step
        for worker in workers:
            worker.step = step
        started = GenerationStarted(seat.generation, step, len(workers), [], [], [], "cpu")
        self.journal.generation_begins(started, load_s, 0.0, [])
        self.members.begun = True

    def steps(self, *numbers: int, by: list["Worker"]) -> None:
        """These steps are committed by these workers, and reported."""
        generation = self.members.roster.generation
        base = {"loss": 1.0, "samples": 32, "step_s": 0.1, "time_s": time.time(), "generation": generation}
        self.journal.steps([{"step": number, **base} for number in numbers])
        for worker in by:
            worker.step = numbers[-1]

    def events(self, kind: str) -> list[dict]:
        records = [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]
        return [record for record in records if record["event"] == kind]

    def recorded(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    async def incidents(self, reachable: bool = True) -> list[dict]:
        async def look(node: str) -> bool:
            return reachable

        await self.journal.settle(look)
        return self.events("incident")


class Worker:
    """A member with a line; while `beats` is clear its heart stands still, as after SIGSTOP."""

    def __init__(self, run: Run, name: str, node: str) -> None:
        self.run, self.name, self.node = run, name, node
        self.step = self.rank = -1
        self.waiting = True
        self.computed = 0, 0  # shards, milliseconds
        self.beats = threading.Event()
        self.beats.set()
        self.orders: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.seat: Seat | None = None
        loop = asyncio.get_running_loop()
        told = lambda *order: loop.call_soon_threadsafe(self.orders.put_nowait, order)  # noqa: E731
        self.line = Line(("127.0.0.1", run.port), run.members.desk.secret, name, self.look, told)

    def look(self) -> Beat:
        self.beats.wait(3 * WAIT_S)
        return Beat(self.seat.generation if self.seat else 0, self.step, 0, self.waiting, *self.computed)

    async def join(self, why: str = "") -> Seat | Order:
        member = Member(self.name, self.node, 1, "cpu", self.step, self.rank, (self.name, 1))
        answer = await asyncio.wait_for(self.run.members.join(member, why), WAIT_S)
        if isinstance(answer, Seat):
            self.seat, self.rank = answer, answer.rank
        return answer

    async def told(self) -> tuple[str, int]:
        return await asyncio.wait_for(self.orders.get(), WAIT_S)

    async def heard(self, waiting: bool) -> None:
        """Until the coordinator knows whether this worker, in its seat, waits for others."""
        assert self.seat
        self.waiting, wanted = waiting, (self.name, self.seat.generation, waiting)
        while True:
            name, beat = await asyncio.wait_for(self.run.members.beats.get(), WAIT_S)
            if (name, beat.generation, beat.waiting) == wanted:
                return

    def die(self) -> None:
        """What the kernel does for a process that is killed."""
        self.line.close()


def play(story: Callable[[Run], Awaitable[None]], folder: Path, workers: int = 2, **settings: float) -> None:
    """Run `story` in an event loop of its own; afterwards nobody is left."""

    async def main() -> None:
        run = Run(folder, workers, **settings)
        await run.open()
        try:
            await asyncio.wait_for(story(run), 3 * WAIT_S)
        finally:
            run.members.abandon()
            for worker in run.workers:
                worker.beats.set()
                worker.line.close()

    asyncio.run(main())
