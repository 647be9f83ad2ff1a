"""Ends that are not the usual ones: weights of mixed machines, storage that has gone, logs behind their checkpoint."""

import asyncio
from types import SimpleNamespace

import pytest
import ray

from orchestrator import clerk
from orchestrator.coordinator import Coordinator
from orchestrator.errors import UserError
from orchestrator.server import _keep_logs
from orchestrator.track import TRACKED


@pytest.mark.parametrize("mixed", [False, True])
def test_weights_of_mixed_devices_are_rank_0s_and_of_alike_ones_equal(tmp_path, mixed):
    """That they may differ was told when they met; the whole training is not lost for it."""
    told = list[tuple[str, ...]]()

    async def story() -> None:
        coordinator = object.__new__(Coordinator)
        members = [SimpleNamespace(id=name, device=f"cpu {name if mixed else ''}") for name in "ab"]
        seated = {member.id: member for member in members}
        roster = SimpleNamespace(generation=1, training=True, by_rank=members, seated=seated)
        coordinator._members = SimpleNamespace(roster=roster, changed=asyncio.Condition())
        coordinator._journal = SimpleNamespace(figures={})
        coordinator._outcome, coordinator._finished = "", {}

        def end(*given) -> None:
            told.append(given[:4])
            coordinator._outcome = "over"

        coordinator._end = coordinator._fail = end
        first = asyncio.create_task(coordinator.finish("a", 1, "of a", {}))
        await asyncio.sleep(0)
        await coordinator.finish("b", 1, "of b", {})
        first.cancel()

    asyncio.run(story())
    (found,) = told
    assert found == ("finished", "", 0, "of a") if mixed else found[1:] == (1, "different_weights")


def test_an_end_that_cannot_be_read_beside_is_told_all_the_same(tmp_path):
    """A mounted folder that has gone: what the last command began is asked for, and an OSError comes."""

    def gone(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    coordinator = object.__new__(Coordinator)
    coordinator._journal, coordinator._outcome, coordinator._failing = SimpleNamespace(end=gone), "", False
    coordinator._written, coordinator._members = asyncio.Event(), SimpleNamespace(abandon=lambda: None)
    coordinator._end("stopped", "on request", 130)
    assert (coordinator._outcome, coordinator._exit_status) == ("failed", 1)
    assert coordinator._written.is_set()
    assert "Stale file handle" in coordinator._message


@pytest.mark.parametrize("lost", [False, True])
def test_what_a_server_writes_waits_for_the_logs_of_its_steps(monkeypatch, lost):
    """On object storage they come later: a checkpoint that is whole before them would leave a hole for good."""
    asked = []

    def get(call):
        asked.append(call)
        if lost:
            raise ray.exceptions.RayActorError

    monkeypatch.setattr(ray, "get", get)
    _keep_logs(SimpleNamespace(report=SimpleNamespace(remote=lambda *given: given)), 7)
    assert asked == [([], [], True)]


def test_logbooks_are_kept_apart_also_where_the_home_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    refused = pytest.raises(UserError, match="/runs/a: another process is writing it to loggers")
    with clerk.alone("track", "/runs/a", "no"), clerk.alone("track", "/runs/b", "no"):
        with refused, clerk.alone("track", "/runs/a", TRACKED):
            pass
        with clerk.alone("prepare", "/runs/a", "no"):
            pass
