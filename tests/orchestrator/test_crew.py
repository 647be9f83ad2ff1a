"""Parameter servers as the dispatcher sees them, without Ray: what is lost before it is written is missed."""

import asyncio
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from toys import toy_plan

from orchestrator.crew import Crew
from orchestrator.dispatcher import Dispatcher
from orchestrator.errors import NonFiniteWeightsError, StorageError
from orchestrator.keeper import MISSES, Keeper
from orchestrator.served import Restored


class LostError(Exception):
    """As Ray says it."""


class Handle:
    """A server; `lost` is before it has given its part of a checkpoint."""

    def __init__(self, lost: bool = False) -> None:
        self.lost, self.asked = lost, list[int]()
        for name in ("snapshot", "write", "weights_sha256", "written"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    def _future(self, result: Any, error: Exception | None = None) -> "asyncio.Future[Any]":
        made = asyncio.get_running_loop().create_future()
        made.set_exception(error) if error else made.set_result(result)
        return made

    def _snapshot(self) -> Any:
        return self

    def _write(self, step: int, *parts: "Handle") -> Any:
        self.asked.append(step)
        return self._future(None, LostError() if any(part.lost for part in parts) else None)

    def _weights_sha256(self, *parts: "Handle") -> Any:
        return self._future(f"of {len(parts)} parts", LostError() if any(part.lost for part in parts) else None)

    def _written(self) -> Any:
        return self._future(True)


def crew(*handles: Handle) -> Crew:
    made = Crew(toy_plan(sync="parameter-server"), "", "token", True)
    made.handles = list(handles)
    return made


def test_a_checkpoint_is_written_when_all_have_given_their_part():
    async def story() -> None:
        there = crew(Handle(), Handle())
        await there.written()
        there.checkpoint(5)
        await there.written()
        assert there.handles[0].asked == [5]

    asyncio.run(story())


def test_a_server_that_is_lost_before_its_part_is_written_is_missed():
    async def story() -> None:
        there = crew(Handle(), Handle(lost=True))
        there.checkpoint(5)
        with pytest.raises(LostError):
            await there.written()

    asyncio.run(story())


class Slow(Handle):
    """A server that never is ready."""

    def __init__(self) -> None:
        super().__init__()
        never = lambda era, step: asyncio.get_running_loop().create_future()  # noqa: E731
        self.restore = SimpleNamespace(remote=never)
        self.address = SimpleNamespace(remote=lambda: asyncio.sleep(0))


def test_a_server_that_is_never_ready_is_ended():
    async def story() -> None:
        there, ended = crew(Handle(), Slow()), []
        there.missing = lambda: asyncio.sleep(0, [])
        there.end = ended.append
        restored = there.handles[0]._future
        there.handles[0].address = there.handles[1].address
        there.handles[0].restore = SimpleNamespace(remote=lambda era, step: restored(Restored(3, ())))
        with pytest.raises(TimeoutError):
            await there.stand(0.05, [])
        assert ended == [1]

    asyncio.run(story())


@pytest.mark.parametrize("lost", [[], [0]])
def test_a_worker_that_alone_does_not_reach_the_servers_is_given_up(lost):
    """Unless a server is lost, or it has finished something since."""
    given_up, member = [], SimpleNamespace(id="a")
    members = SimpleNamespace(
        roster=SimpleNamespace(seated={"a": member}), kill=given_up.append, lose=lambda *told: given_up.append(told)
    )
    run: Any = SimpleNamespace(_members=members, _crew=SimpleNamespace(era=1), _misses={}, _outcome="")
    run._recovering = bool(lost)
    run._check_servers = lambda era: asyncio.sleep(0)
    missed = lambda: asyncio.run(Keeper.server_missed(run, 1, "a", "refused"))  # noqa: E731
    told = [missed() for _ in range(MISSES - 1)]
    run._misses.pop("a", None)
    told += [missed() for _ in range(MISSES - 1)]
    assert not given_up
    told.append(missed())
    assert set(told) == {not lost}
    assert bool(given_up) == (not lost)
    if given_up:
        assert given_up[0][:2] == ("a", "worker_unreachable")
        assert given_up[1] is member


def test_a_stop_tells_the_hash_of_the_weights_that_it_wrote():
    told: list[tuple[int, str]] = []

    async def stopped(step: int, sha256: str) -> None:
        told.append((step, sha256))

    async def story() -> None:
        run: Any = SimpleNamespace(_crew=crew(Handle(), Handle()), _handout=SimpleNamespace(oldest=4), stopped=stopped)
        run._members, run._checkpoint = SimpleNamespace(begun=True), lambda: run._crew.checkpoint(4)
        run._last_checkpoint = lambda **given: Dispatcher._last_checkpoint(run, **given)
        await Dispatcher._stop(run)

    asyncio.run(story())
    assert told == [(4, "of 2 parts")]


@pytest.mark.parametrize(("newest", "due"), [(None, 4), ({"step": 2}, 4), ({"step": 4}, 0)])
def test_an_evaluation_that_was_lost_is_made_again(newest, due):
    plan = toy_plan(sync="parameter-server", steps=20, eval_every=1)
    every = plan.schedule.steps_per_epoch
    found = None if newest is None else {"step": newest["step"] * every}
    run = SimpleNamespace(_plan=plan, _journal=SimpleNamespace(newest=lambda kind: found))
    assert Dispatcher._evaluation_due(run, 4 * every) == due * every
    assert Dispatcher._evaluation_due(run, 4 * every - 1) == 0


def test_nodes_that_will_go_are_seen_between_two_steps():
    """In the middle of one, some servers have taken it and others have not."""
    asked: list[str] = []
    members = SimpleNamespace(roster=SimpleNamespace(draining=frozenset("n")), stopping=False, notify=lambda: None)
    run: Any = SimpleNamespace(_members=members, _handout=None, _draining=frozenset(), _committing=True, _outcome="")
    run._saving = False
    run._checkpoint = lambda: asked.append("checkpoint")
    Dispatcher._look(run)
    run._committing = run._recovering = run._ripe = run._halting = False
    run._saving = True
    Dispatcher._look(run)
    assert not asked, "one that was asked for before is being written"
    run._saving = False
    Dispatcher._look(run)
    Dispatcher._look(run)
    assert asked == ["checkpoint"], "once"


@pytest.mark.parametrize(("minimum", "leaves"), [(1, True), (2, False)])
def test_a_worker_leaves_a_node_that_will_go_if_enough_stay(minimum, leaves):
    left: list[str] = []
    seated = {name: SimpleNamespace(id=name, node=f"node of {name}") for name in "ab"}
    roster = SimpleNamespace(seated=seated, draining={"node of a"}, minimum=minimum, training=False)
    members = SimpleNamespace(roster=roster, excluded=lambda name: False, let_go=lambda m: left.append(m.id))
    run: Any = SimpleNamespace(_members=members, _outcome="", _handout=object(), _crew=SimpleNamespace(era=1))
    run._committing = False
    answer = Dispatcher._next(run, "a", 1)
    assert (left, answer is not None) == ((["a"], True) if leaves else ([], False))
    assert Dispatcher._next(run, "b", 1) is None


def test_servers_write_a_checkpoint_by_time(monkeypatch):
    now = [500.0]
    monkeypatch.setattr("orchestrator.keeper.time.monotonic", lambda: now[0])
    run = Mock(_plan=toy_plan(sync="parameter-server", checkpoint_every="30s"))
    run._evaluation_due.return_value = 0
    Dispatcher._restart(run, Restored(-1, ()), 0.1)
    Dispatcher._checkpoint_if_due(run, range(3, 4))
    assert not run._checkpoint.called
    now[0] += 31.0
    Dispatcher._checkpoint_if_due(run, range(4, 5))
    run._checkpoint.assert_called_once_with()


@pytest.mark.parametrize("nodes", [[], ["a1"], ["a1", "b2", "c3"]])
def test_a_server_that_is_replaced_comes_to_who_has_the_data(nodes, monkeypatch):
    """To any of their nodes, and anywhere if none of them is left; Ray itself says which."""
    import ray
    from ray._raylet import node_labels_match_selector

    actor_class = Mock()
    monkeypatch.setattr(ray, "remote", lambda _: actor_class)
    monkeypatch.setattr(ray, "get_runtime_context", Mock())
    crew()._start(0, nodes)
    asked = actor_class.options.call_args.kwargs
    labels = lambda node: {"ray.io/node-id": node}  # noqa: E731
    fits = [
        node
        for node in ("a1", "b2", "c3", "d4")
        if node_labels_match_selector(labels(node), asked["label_selector"] or {})
    ]
    assert fits == (nodes or ["a1", "b2", "c3", "d4"])
    for instead in asked["fallback_strategy"] or []:
        assert node_labels_match_selector(labels("d4"), instead["label_selector"])
    assert bool(asked["fallback_strategy"]) == bool(nodes)


def test_a_stop_while_servers_are_put_back_counts_what_is_kept():
    """Steps after the newest checkpoint went with the server."""
    done: list[object] = []
    journal = SimpleNamespace(saved=50, go_back=done.append)
    run: Any = SimpleNamespace(_handout=None, _members=SimpleNamespace(begun=True), _journal=journal)
    run._end_by_members = done.append
    asyncio.run(Dispatcher._stop(run))
    assert done == [50, ""]
    journal.saved = -1
    asyncio.run(Dispatcher._stop(run))
    assert done[2:] == [0, ""]
    run._members.begun = False
    asyncio.run(Dispatcher._stop(run))
    assert done[4:] == [""], "nothing was trained yet"


def test_without_a_checkpoint_servers_go_back_to_the_beginning():
    """Not to a step before it: steps are counted from there."""
    plan, back = toy_plan(sync="parameter-server"), list[int]()
    members = SimpleNamespace(begun=True, notify=lambda: None)
    run: Any = SimpleNamespace(_plan=plan, _members=members, _journal=SimpleNamespace(go_back=back.append), _book=set())
    run._evaluation_due, run._regroup = lambda step: 0, lambda: None
    Dispatcher._restart(run, Restored(-1), 0.1)
    assert back == [0]
    assert run._handout.oldest == 0


def test_a_failure_is_named_after_what_a_server_says():
    told: list[str] = []

    async def fail(message: str, exit_status: int, text: str, kind: str) -> None:
        told.append(kind)

    run: Any = SimpleNamespace(fail=fail)
    said = SimpleNamespace(cause=NonFiniteWeightsError("the weights are not finite"))
    asyncio.run(Dispatcher._fail_for(run, said))  # type: ignore[arg-type]
    asyncio.run(Dispatcher._fail_for(run, StorageError("away")))
    asyncio.run(Dispatcher._fail_for(run, RuntimeError("ours")))
    assert told == ["non_finite_weights_error", "storage_error", "ray_train"]


def test_too_many_lost_servers_are_no_worker_s_fault():
    ended: list[tuple[str, str]] = []
    plan = toy_plan(sync="parameter-server", max_incidents=1)
    journal, members = (
        SimpleNamespace(break_off=lambda *given: None),
        SimpleNamespace(roster=SimpleNamespace(seated={})),
    )
    run: Any = SimpleNamespace(_journal=journal, _members=members, _servers_lost=1, _plan=plan)
    run._end_by_members = lambda *given: ended.append(given)
    Dispatcher._miss_server(run, "server 1: its process ended")
    assert ended == [("2 servers were lost, and --max-incidents allows 1", "server_lost")]
