"""The simulation of large clusters (tests/bench): its books balance, and small cases come out as by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # at the end: names of this folder come first

from cluster_model import Cluster, Costs, Outage, Restarting, measured, optimum_interval_s, outages
from elastic_model import Elastic

COSTS = Costs(detect_s=0.2, regroup_s=0.1, restore_s=0.0, recompute_s=0.0, join_s=0.5, drain_s=0.2, restart_s=16.0)
WAYS = ("ours", "restart with fewer", "restart with all")


def simulated(way: str, cluster: Cluster, absences=None):
    absences = outages(cluster) if absences is None else absences
    if way == "ours":
        return Elastic(cluster, COSTS, absences).run()
    return Restarting(cluster, COSTS.restart_s, absences, fewer=way == "restart with fewer").run()


@pytest.mark.parametrize("way", WAYS)
def test_without_failures_nothing_is_lost(way):
    ledger = simulated(way, Cluster(50, rate=0.0))
    assert ledger.goodput == 1.0
    assert sum(ledger.seconds.values()) == ledger.seconds["useful"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "kind",
    [{}, {"notice_s": 120.0}, {"provision_s": float("inf"), "rate": 20.0}, {"rate": 5.0, "flapping": 1, "days": 0.5}],
    ids=["failures", "notice", "none replaced", "flapping"],
)
def test_useful_and_lost_seconds_add_up(way, kind):
    cluster = Cluster(40, **{"rate": 300.0, "days": 8.0, **kind})
    ledger = simulated(way, cluster)
    assert sum(ledger.seconds.values()) == pytest.approx(cluster.end_s, rel=1e-9)
    assert all(seconds > -1e-6 for seconds in ledger.seconds.values())
    assert 0 < ledger.goodput < 1
    saving = ledger.with_checkpoints(3600, 30)
    assert sum(saving.seconds.values()) == pytest.approx(cluster.end_s, rel=1e-9)
    assert saving.seconds["useful"] == pytest.approx(ledger.seconds["useful"] * 3600 / 3630)


@pytest.mark.parametrize("way", WAYS)
def test_more_failures_leave_less(way):
    goodput = [simulated(way, Cluster(50, rate=rate, days=10.0)).goodput for rate in (10.0, 100.0, 1000.0)]
    assert goodput == sorted(goodput, reverse=True)
    assert len(set(goodput)) == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_decides_everything(way):
    once, again, other = (simulated(way, Cluster(30, 200.0, days=5.0, seed=seed)).seconds for seed in (1, 1, 2))
    assert once == again != other


@pytest.mark.parametrize("rate", [2.34, 6.50])
def test_ours_wins_at_published_rates(rate):
    ours, *others = (simulated(way, Cluster(100, rate)).goodput for way in WAYS)
    assert ours >= max(others)


def test_a_loss_by_hand():
    """Of 4 nodes, one fails in the middle of the third step and comes back after 300 s."""
    cluster = Cluster(4, rate=0.0, days=0.01)
    seconds = simulated("ours", cluster, [Outage(0, 25.0, 25.0, 325.0)]).seconds
    assert seconds["recompute"] == pytest.approx(5.0)
    assert seconds["detect"] == pytest.approx(0.2 * 3 / 4)
    assert seconds["regroup"] == pytest.approx(0.1 * 3 / 4)
    assert seconds["join"] == pytest.approx(0.5)
    seated_s = 25.3 + 23 * 40 / 3  # the first step boundary after it came: three workers need 40 / 3 s for a step
    assert seconds["missing"] == pytest.approx((seated_s - 25.0) / 4)


def test_a_restart_by_hand():
    """The same: all work is lost, for the first checkpoint was not due."""
    cluster = Cluster(4, rate=0.0, days=0.01)
    seconds = simulated("restart with all", cluster, [Outage(0, 25.0, 25.0, 325.0)]).seconds
    assert seconds["recompute"] == pytest.approx(25.0)
    assert seconds["waiting"] == pytest.approx(300.0 * 3 / 4)
    assert seconds["restart"] == pytest.approx(16.0)


def test_with_notice_no_step_is_lost():
    seconds = simulated("ours", Cluster(40, rate=300.0, days=5.0, notice_s=120.0)).seconds
    assert seconds["recompute"] == seconds["detect"] == 0.0
    assert seconds["drain"] > 0


def test_fewer_than_the_minimum_wait():
    seconds = simulated("ours", Cluster(4, rate=0.0, days=0.01, minimum=1.0), [Outage(0, 25.0, 25.0, 325.0)]).seconds
    assert seconds["waiting"] == pytest.approx((300.0 - 0.2) * 3 / 4)


def test_the_roster_leaves_a_flapping_machine_out():
    cluster = Cluster(40, rate=0.0, days=0.2, flapping=1)
    absences = outages(cluster)
    ours = Elastic(cluster, COSTS, absences)
    ours.run()
    assert set(ours.roster.left_out) == {"host 0"}
    assert ours.roster.generation < 1.9 * len(absences)  # a loss and a join each, if it were always seated


def test_the_checkpoint_interval_is_the_published_one():
    # Daly 2006, captions of figures 3 to 5: minutes.
    assert [round(optimum_interval_s(5, mtbf), 1) for mtbf in (24 * 60, 6 * 60, 15)] == [116.7, 56.7, 9.1]


def test_costs_are_medians_of_reports(tmp_path):
    loss = {"detect_s": 0.2, "regroup_s": 0.1, "restore_s": 0.0, "recompute_s": 2.5, "step_s_after": 2.0}
    faults = [{**loss, "join_stall_s": stall_s} for stall_s in (0.4, 0.5, 0.9)]
    named = {"comparison": "toy, node-loss", "faults": faults, "baseline": {"faults": [{"stall_s": 16.0}]}}
    drain = {"comparison": "toy, drain", "faults": [{"stall_s": 0.2}]}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"comparisons": [named, drain]}))
    assert measured([report], "toy") == Costs(0.2, 0.1, 0.0, 0.5, 0.5, 0.2, 16.0)
    assert measured([report], "another") is None
