"""Several machines, as far as one machine can be several: a host is cut off in the middle of training."""

import sys
from pathlib import Path

import pytest
from commands import events, finish, kept_in, result, wait_until
from hosts import NOT_HERE, Hosts, built

pytestmark = [pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE), pytest.mark.long]  # test_ray_up cuts one off too

CUT = """[[fault]]
kind = "network-cut"
rank = 1
step = 50
"""


@pytest.mark.timeout(400)
def test_a_host_is_cut_off_and_comes_back(tmp_path: Path) -> None:
    """A rehearsal on three hosts: the weights are those of the undisturbed run, with the other two and then all."""
    schedule, run = tmp_path / "faults.toml", tmp_path / "r-disturbed"
    schedule.write_text(CUT)
    with built(Hosts, 3) as net:
        address = net.start_ray(0, cpus=0)
        for number in (1, 2):
            net.start_ray(number, cpus=1)
        settings = ["bert", "--steps", "1300", "--checkpoint-every", "1000000", "--sequence-length", "16"]
        small = ["--hidden-size", "32", "--shards", "4", "--batch-size", "16"]
        flags = [*kept_in(tmp_path, "r", address), "--workers", "1:2", "--faults", str(schedule)]
        process = net.start(0, [sys.executable, "-m", "orchestrator.rehearse", *settings, *small, *flags])
        wait_until(lambda: len(events(run, "generation_started")) > 1, 240, "training without the host")
        (number,) = (n for n in (1, 2) if not net.is_up(n))
        net.plug(number, "up")
        net.end(number)
        net.start_ray(number, cpus=1)
        done = finish(process)
    assert done.status == 0, done.out + done.err
    assert "passed: the same weights" in done.out
    first, *others = result(run)["incidents"]
    assert (first["kind"], first["workers_after"], first["steps_lost"]) == ("node_lost", 1, 0)
    assert [incident["kind"] for incident in others] == ["workers_joined"]
