"""What goes wrong around Ray: room that others take, kinds of nodes that nobody lists, disks and terminals that go."""

import asyncio
import errno
import io
import os
import pty
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig

from orchestrator import offer as offers
from orchestrator.cluster_fit import Offer
from orchestrator.command import Lasting
from orchestrator.crew import Crew
from orchestrator.dispatcher import Dispatcher
from orchestrator.keeper import Keeper
from orchestrator.ray_policy import GrowingPolicy, StaticPolicy
from orchestrator.sockets import family_of


@pytest.mark.parametrize("kind", [GrowingPolicy, StaticPolicy])
def test_a_group_that_could_not_start_is_chosen_anew(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight were free when the command looked; now there are five, then six."""
    policy, rooms = kind(ScalingConfig(num_workers=8)), iter([5, 6])
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    policy.choose = lambda: next(rooms)
    asked = [policy.make_decision_for_non_running_worker_group() for _ in range(3)]
    assert [decision.num_workers for decision in asked] == [8, 5, 6]
    assert asked[1].resources_per_worker == asked[0].resources_per_worker


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({"ray.io/node-id": "a"}, None),
        ({"ray.io/node-id": "a", "ray.io/node-group": "headgroup"}, Offer(known=False)),
    ],
)
def test_an_autoscaler_that_tells_nobody_what_it_has(labels: dict, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """KubeRay's: Ray keeps the kind of each node as its label."""
    from ray._private.state import state

    monkeypatch.setattr(type(state), "get_cluster_config", lambda self: None)
    monkeypatch.setattr(offers, "_configuration_here", lambda: None)
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: None)
    nodes = [{"Alive": True, "Labels": labels}, {"Alive": False, "Labels": {"ray.io/node-group": "gone"}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert offers.offer() == found


def test_what_an_autoscaler_of_the_first_version_may_add_is_what_is_left(tmp_path: Any) -> None:
    """Three may come at most, and some are there."""
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "max_workers: 3\nhead_node_type: head\navailable_node_types:\n  head: {resources: {}}\n"
        "  small: {resources: {CPU: 1}, max_workers: 9}\n  large: {resources: {CPU: 8}, max_workers: 2}\n"
    )
    counts = [[count for _, _, count in offers._node_types(file, there) or ()] for there in (0, 2, 3, 5)]
    assert counts == [[3, 2], [1, 1], [0, 0], [0, 0]]


class Full(io.RawIOBase):
    """A file on a disk that is full for a while."""

    def __init__(self) -> None:
        self.full, self.kept = True, b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.kept += bytes(data)
        return len(data)


def test_a_full_disk_under_the_log_costs_lines() -> None:
    disk = Full()
    stream = Lasting(io.BufferedWriter(disk), encoding="utf-8", line_buffering=True)
    for number in range(3):
        print(f"step {number}", file=stream, flush=True)
    disk.full = False
    print("step 3", file=stream, flush=True)
    assert disk.kept.endswith(b"step 3\n")


def test_a_terminal_that_is_gone_costs_lines() -> None:
    ours, theirs = pty.openpty()
    stream = Lasting(os.fdopen(theirs, "wb"), encoding="utf-8", line_buffering=True)
    print("step 1", file=stream, flush=True)
    os.close(ours)
    for number in range(3):
        print(f"step {number}", file=stream, flush=True)
    assert os.path.samestat(os.fstat(theirs), os.stat(os.devnull))
    stream.close()


class Kept(Keeper):
    """A keeper whose servers live, and do not hand over their parts once."""

    def __init__(self, outcomes: list[Exception | None]) -> None:
        self._saving, self._saved_step, self._saved_s, self._outcome = False, 0, 0.0, ""
        self._handout = SimpleNamespace(oldest=10)
        self.told: list[str] = []
        self.checked = 0
        self.tasks: list[asyncio.Task] = []
        self._journal = SimpleNamespace(error=self.told.append)
        self._members = SimpleNamespace(start=lambda work: self.tasks.append(asyncio.ensure_future(work)))
        self._crew = crew = object.__new__(Crew)
        crew.era, crew._asked = 1, None
        outcome = iter(outcomes)

        async def asked() -> None:
            if error := next(outcome):
                raise error

        crew.checkpoint = lambda step: setattr(crew, "_asked", asked())

    async def _check_servers(self, era: int) -> None:
        self.checked += 1


def test_a_checkpoint_that_failed_is_not_the_last_one() -> None:
    async def story() -> None:
        keeper = Kept([ray.exceptions.OutOfDiskError("no room for objects"), None])
        keeper._checkpoint()
        assert keeper._saving
        await asyncio.gather(*keeper.tasks)
        assert (keeper._saving, keeper._saved_step, keeper.checked) == (False, 0, 1)
        assert "no room for objects" in keeper.told[0]
        keeper._checkpoint()
        await asyncio.gather(*keeper.tasks[1:])
        assert (keeper._saving, keeper._saved_step, keeper.checked) == (True, 10, 1)

    asyncio.run(story())


@pytest.mark.parametrize(("handed_out", "stops"), [(False, True), (True, False)])
def test_a_stop_does_not_wait_for_servers_that_are_put_back(handed_out: bool, stops: bool) -> None:
    dispatcher: Any = object.__new__(Dispatcher)
    started: list[Any] = []
    roster = SimpleNamespace(draining=frozenset())
    dispatcher._members = SimpleNamespace(roster=roster, stopping=True, start=started.append)
    dispatcher._draining, dispatcher._outcome = frozenset(), ""
    dispatcher._committing = dispatcher._ripe = dispatcher._halting = False
    dispatcher._recovering = True
    dispatcher._handout = SimpleNamespace(complete=False, holders=[], between_steps=True) if handed_out else None
    dispatcher._stop = lambda: "the stop"
    dispatcher._may_stop = lambda handout: True
    dispatcher._look()
    assert started == (["the stop"] if stops else [])


@pytest.mark.parametrize(
    ("host", "family"), [("10.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("fd00::7", socket.AF_INET6)]
)
def test_addresses_of_either_kind(host: str, family: int) -> None:
    assert family_of(host) == family
