"""A process group of one generation: who is in it, the collectives that training needs, and how they are aborted."""

import contextlib
import datetime
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.communicators import abort_communicators, meet, slice_group
from orchestrator.devices import finish, host_of
from orchestrator.messages import Messages
from orchestrator.sockets import Lines
from orchestrator.stopwatch import Stopwatch
from orchestrator.stores import CONNECT_TIMEOUT_S, PeerLostError
from orchestrator.waiting import Errands, of_this_thread, wait_holding

CONNECT_TIMEOUT = datetime.timedelta(seconds=CONNECT_TIMEOUT_S)
gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
LOST = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe")  # what DistributedDataParallel raises


@dataclass
class Group:
    """The workers of a generation, as seen by one of them. With one worker nothing is ever sent.

    Attributes:
        place: counts what this worker has got through (shards, chunks of an evaluation): a sign of progress.
        waiting: whether it waits for the others in a collective.
        clock: of its own computing.
        drag: called with the pieces of work that come next; a rehearsal makes a worker slow by it.
        broken: whether a collective has failed, or this worker leaves in the middle of one.
        inside: the "xla" group of this worker's TPU slice; None: there is no other worker in it.
    """

    rank: int
    world: int
    device: torch.device
    place: int = 0
    waiting: bool = False
    clock: Stopwatch = field(default_factory=Stopwatch)
    drag: Callable[[int], None] = lambda pieces: None
    inside: Any = None
    _over: threading.Event = field(default_factory=threading.Event)
    _lines: Lines = field(default_factory=Lines)
    _process_group: dist.ProcessGroup | None = None  # None: that of all workers
    _store: dist.Store | None = None
    _timeout: datetime.timedelta = datetime.timedelta()
    broken: bool = False
    _ending: Any = field(default_factory=threading.Lock)
    _errands: Errands = field(init=False)

    def __post_init__(self) -> None:
        self._errands = Errands("collectives", self._over.is_set)

    def connect(self, store: dist.TCPStore | None, generation: int, timeout_s: float) -> "Group":
        """Build the process group of `generation`; blocks until all members are there.

        Args:
            store: reached by all members; None for one worker.
            timeout_s: of collectives; a lost or frozen peer is found earlier, by `abort`.

        Raises:
            PeerLostError: a member does not come, or `abort` was called meanwhile.
        """
        if store is None:
            assert self.world == 1
            return self
        self._lines.begin((store.host, store.port))
        if self._over.is_set():
            raise PeerLostError("the generation was ended before it began")
        named = dist.PrefixStore(f"generation-{generation}", store)
        cuda = self.device.type == "cuda"
        with self._peers():
            if cuda:  # NCCL waits without end for who does not come
                meet(named, "here", self.rank, self.world)
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=named,
                rank=self.rank,
                world_size=self.world,
                timeout=datetime.timedelta(seconds=min(timeout_s, CONNECT_TIMEOUT_S)),
                device_id=self.device if cuda else None,
            )
            self._store, self._timeout = named, datetime.timedelta(seconds=timeout_s)
            dist.distributed_c10d._set_pg_timeout(self._timeout)
            self._learn_servers("all")
        if self.device.type == "xla":
            self.inside = slice_group(named, self.rank, self._timeout)
        return self

    def among(self, partition: list[list[int]]) -> "Group":
        """The workers of this group beside which this one stands in `partition`; every worker calls it alike.

        Raises:
            PeerLostError: a member is lost, or `abort` was called meanwhile.
        """
        mine = next(ranks for ranks in partition if self.rank in ranks)
        found: dist.ProcessGroup | None = None
        if self.world > 1:
            with self._peers():
                made = [dist.new_group(ranks, timeout=min(self._timeout, CONNECT_TIMEOUT)) for ranks in partition]
                found = made[partition.index(mine)]
                dist.distributed_c10d._set_pg_timeout(self._timeout, found)
                self._learn_servers(str(partition))
        return _Part(
            mine.index(self.rank), len(mine), self.device, clock=self.clock, _over=self._over, _process_group=found,
            _timeout=self._timeout, whole=self,
        )  # fmt: skip

    def errands(self, name: str) -> Errands:
        """A thread that waits for others, and is left behind if it must be."""
        return Errands(name, self._over.is_set)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """For what torch does by itself."""
        assert self._process_group is not None
        return self._process_group

    def _learn_servers(self, groups: str) -> None:
        if self.device.type != "cuda" and self._store is not None:
            self._lines.learn(self._store, groups, self.rank, self.world)

    def close(self) -> None:
        """Leave; connections of the process group are closed."""
        self._errands.close()
        if dist.is_initialized():
            self._end_nccl()
            dist.destroy_process_group()
        dist.distributed_c10d._world.group_count = 0  # part of keys in the next store, one that failed counted too

    def abort(self) -> None:
        """End the generation here, from any thread: collectives that wait, and all later ones, raise PeerLostError."""
        self._over.set()
        if self.world == 1:
            return
        self.hang_up()
        self._lines.cut_store()  # whoever closes this group may wait there for the others
        self._end_nccl()

    def hang_up(self) -> None:
        """Leave in the middle of a message: whoever waits for this worker, or here for others, gets an error."""
        self._lines.cut()

    def _end_nccl(self) -> None:
        """NCCL's way to close waits for the others, who may be gone: communicators are ended by this worker alone.

        But not while others may still need what this one has sent.
        """
        with self._ending:
            if self.device.type != "cuda" or not dist.is_initialized() or self._store is None:
                return
            if not (self.broken or self._over.is_set()):
                with contextlib.suppress(RuntimeError):
                    self._store.set_timeout(CONNECT_TIMEOUT)  # a worker's own store has minutes
                    meet(self._store, "done", self.rank, self.world)
            abort_communicators()
            self._store = None

    @property
    def over(self) -> bool:
        """Whether `abort` was called."""
        return self._over.is_set()

    def step_on(self, pieces: int = 1) -> None:
        """A sign of progress between pieces of work; raises PeerLostError once the generation is over."""
        self.place += 1
        self.drag(pieces)
        if self._over.is_set():
            raise PeerLostError("the generation was ended")

    def excuses(self, error: RuntimeError) -> bool:
        """Whether an error of this worker only says that another one is gone."""
        return self._over.is_set() or isinstance(error, PeerLostError) or bool(LOST.search(str(error)))

    @contextlib.contextmanager
    def others_wait(self) -> Iterator[None]:
        """Collectives happen within that are not this class's: a peer that stands still is not this worker's fault."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.place += 1

    @contextlib.contextmanager
    def _peers(self, queued: bool = False) -> Iterator[None]:
        """What torch raises within is somebody else's end.

        Args:
            queued: whether a GPU may still have to do it; else it is done, and not with what an abort leaves behind.
        """
        with self.others_wait():
            try:
                yield
                if self.device.type == "cuda" and not queued:
                    finish(self.device)
                    if self._over.is_set():
                        raise PeerLostError("the generation was ended")
            except RuntimeError as error:
                self.broken = True
                raise PeerLostError(str(error)) from error

    def settle(self) -> None:
        """Until all collectives that were waited for are done on the device too."""
        with self._peers():
            pass

    def _collective(self, do: Callable[..., Any], *what: Any, **how: Any) -> None:
        """By gloo in a thread that can be left behind; NCCL can be aborted, and its streams are those of a thread."""
        with self._peers():
            how["group"] = self._process_group or dist.group.WORLD
            if self.device.type == "cuda":
                do(*what, **how)
            else:
                self._errands.run(of_this_thread(do), *what, **how)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite `tensor` with that of rank `source`."""
        if self.world > 1:
            sent = tensor.to(host_of(self.device))
            self._collective(dist.broadcast, sent, group_src=source)
            if sent is not tensor:
                tensor.copy_(sent)

    def sum(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the sum over workers; exact only where at most one adds a non-zero."""
        if self.world > 1:
            sent = tensor.to(host_of(self.device))
            self._collective(dist.all_reduce, sent)
            if sent is not tensor:
                tensor.copy_(sent)

    def broadcast_object(self, value: Any) -> Any:
        """The `value` that rank 0 gave."""
        values = [value]
        if self.world > 1:
            self._collective(dist.broadcast_object_list, values, group_src=0, device=host_of(self.device))
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """What every rank gave, by rank."""
        values = [value] * self.world
        if self.world > 1:
            self._collective(dist.all_gather_object, values, value)
        return values

    def start_sum(self, tensor: Tensor) -> dist.Work:
        """Begin to overwrite `tensor` with the sum over workers; `wait` ends it."""
        with self._peers(queued=True):
            return dist.all_reduce(tensor, group=self._process_group, async_op=True)  # type: ignore[no-any-return]

    def start_exchange(self, received: Tensor, sent: Tensor, receive: list[int], send: list[int]) -> dist.Work:
        """Begin an all-to-all of stretches of flat tensors, of these lengths by rank."""
        with self._peers(queued=True):
            group = self._process_group
            return dist.all_to_all_single(received, sent, receive, send, group, async_op=True)  # type: ignore[no-any-return]

    def start_gather(self, gathered: Tensor, own: Tensor) -> dist.Work:
        """Begin to collect every rank's `own` in `gathered`, by rank."""
        with self._peers(queued=True):
            return gather_single(gathered, own, self._process_group, async_op=True)  # type: ignore[no-any-return]

    def wait(self, work: dist.Work) -> None:
        """Until a started collective is done; on a GPU, what follows waits for it."""
        with self._peers(queued=True):
            if self.device.type == "cuda":
                work.wait()
            else:
                self._errands.run(wait_holding, self._process_group or dist.group.WORLD, work)

    def messages(self) -> Messages:
        """Between these workers; not of one that is alone."""
        return Messages(lambda: self._process_group or dist.group.WORLD, self._timeout)


@dataclass
class _Part(Group):
    """Some workers of a generation; signs of life are those of `whole`, and so is its end."""

    whole: Group | None = None

    def step_on(self, pieces: int = 1) -> None:
        assert self.whole is not None
        self.whole.step_on(pieces)

    def hang_up(self) -> None:
        assert self.whole is not None
        self.whole.hang_up()

    def others_wait(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        assert self.whole is not None
        return self.whole.others_wait()
