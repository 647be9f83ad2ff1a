"""When a rehearsal fails: what speaks against a disturbed run is read from two run folders."""

import contextlib
import json
from pathlib import Path

import pytest

from orchestrator.assembly import build
from orchestrator.config import RunConfig
from orchestrator.faults import Fault
from orchestrator.injector import HOLD_S, HOLD_STEPS, Saboteur, target
from orchestrator.plan import Plan
from orchestrator.recovery import Member
from orchestrator.rehearse import Stage, main, problems, table
from orchestrator.run import idle_faults
from orchestrator.runfolder import METRICS, RunFolder
from orchestrator.storage import Folder
from orchestrator.values import WorkerRange

KILL = Fault("kill", rank=0, step=2)


def run(
    folder: Path, weights: str = "aa", status: str = "finished", ledgers: str = "wxyz", loss: float = 1.0, **fired: str
) -> RunFolder:
    """The folder of a run of as many steps as `ledgers`; `fired`: fault number after an f -> problem."""
    made = RunFolder(Folder(str(folder)))
    records = [{"step": n, "samples": 8, "ledger": letter, "loss": loss} for n, letter in enumerate(ledgers, 1)]
    made.metrics(records)
    lines = [{"event": "fault_fired", "fault": int(f[1:]), "problem": text, "step": 2} for f, text in fired.items()]
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    made.write_result({"status": status, "weights_sha256": weights, "incidents": []})
    assert (folder / METRICS).exists()
    return made


def test_the_same_run_passes(tmp_path):
    assert problems([KILL], run(tmp_path / "a"), run(tmp_path / "b", f0="")) == []
    assert "kill" in table([KILL], run(tmp_path / "c", f0=""))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "fault 1 (kill) did not fire"),
        ({"f0": "no such node"}, "fault 1 (kill) did not take effect: no such node"),
        ({"f0": "", "status": "failed"}, "the disturbed run did not finish: failed"),
        ({"f0": "", "weights": "bb"}, "the final weights differ"),
        ({"f0": "", "ledgers": "wxy"}, "not every step was committed exactly once"),
        ({"f0": "", "ledgers": "wxQz"}, "step 3 used other samples, or has another loss"),
    ],
)
def test_what_differs_is_said(tmp_path, given, line):
    assert line in problems([KILL], run(tmp_path / "a"), run(tmp_path / "b", **given))


def test_a_node_is_found_by_its_number_among_those_that_ever_trained():
    faults = (Fault("drain", node=1, step=1), Fault("drain", rank=0, step=1), Fault("drain", node=3, step=1))
    nodes = ["a", "b", "a", "c"]  # of two generations
    members = [Member(name, name, 1, "cpu", 5, rank, ("", 0)) for rank, name in enumerate("cb")]
    found = [target(fault, members, nodes) for fault in faults]
    assert [m.node if m else None for m in found] == ["b", "c", None]


def test_steps_are_held_up_until_a_fault_has_its_workers(monkeypatch):
    held = []
    monkeypatch.setattr("time.sleep", held.append)
    faults = (Fault("drain", rank=0, step=5, workers=3), Fault("kill", rank=1, time_s=1.0, workers=3))
    saboteur = Saboteur(faults, lambda _: True)
    for workers, step, fired in [(2, 4, ()), (3, 5, ()), (2, 6, (0,))]:
        saboteur.hold(workers, step, frozenset(fired))
    assert not held, "not before its step, not with its workers, not after it has happened, not by time"
    for step in range(5, 500):
        saboteur.hold(2, step, frozenset())
    assert held == [HOLD_S] * HOLD_STEPS, "and not for ever: a lost worker may not be replaced"


def test_faults_that_cannot_happen_are_told_of_by_number():
    plan = Plan("toy", build(RunConfig, {"steps": 50, "workers": WorkerRange(1, 3)}), 100, 10, "data")
    faults = [
        Fault("kill", rank=2, step=50, workers=3),
        Fault("kill", rank=3, step=1),
        Fault("add-node", step=51),
        Fault("drain", node=0, step=1, workers=4),
    ]
    assert [line.partition(":")[0] for line in idle_faults(plan, faults)] == ["fault 2", "fault 3", "fault 4"]
    assert "workers = 4: there are at most 3" in idle_faults(plan, faults)[-1]


def test_within_a_tolerance_only_samples_must_be_the_same(tmp_path):
    undisturbed = run(tmp_path / "a")
    near = run(tmp_path / "near", weights="bb", loss=1.0005, f0="")
    far = run(tmp_path / "far", weights="bb", loss=1.002, f0="")
    other = run(tmp_path / "other", ledgers="wxQz", f0="")
    assert problems([KILL], undisturbed, near, 1e-3) == []
    assert len(problems([KILL], undisturbed, near)) == 2
    for bad in (far, other):
        (line,) = problems([KILL], undisturbed, bad, 1e-3)
        assert "used other samples, or has another loss" in line


@pytest.mark.parametrize("cpus", ["0.5", "0", "1.5"])
def test_a_node_has_whole_cpus(tmp_path, capsys, cpus):
    faults = tmp_path / "faults.toml"
    faults.write_text('[[fault]]\nkind = "kill"\nrank = 0\nstep = 20\n')
    given = ["resnet", "--faults", str(faults), "--storage", str(tmp_path), "--cpus-per-node", cpus]
    assert main(given) == 2
    assert f"--cpus-per-node {cpus}: Ray's nodes have whole ones" in capsys.readouterr().err


def test_sums_that_depend_on_the_workers_are_refused_before_anything_is_trained(tmp_path, capsys):
    faults = tmp_path / "faults.toml"
    faults.write_text('[[fault]]\nkind = "kill"\nrank = 0\nstep = 20\n')
    assert main(["resnet", "--faults", str(faults), "--storage", str(tmp_path), "--reduce", "ddp"]) == 2
    assert "--reduce ddp: its sums depend on the workers" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["faults.toml"]


def test_a_node_for_somebody_elses_cluster_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "faults.toml").write_text('[[fault]]\nkind = "add-node"\nstep = 20\n')
    given = [
        "resnet",
        "--faults",
        str(tmp_path / "faults.toml"),
        "--storage",
        str(tmp_path),
        "--address",
        "127.0.0.1:1",
    ]
    assert main(given) == 2
    assert "add-node is only for a cluster of the rehearsal's own; leave --address out" in capsys.readouterr().err


def test_without_an_undisturbed_run_nothing_is_disturbed(tmp_path, capsys, monkeypatch):
    (tmp_path / "faults.toml").write_text('[[fault]]\nkind = "kill"\nrank = 0\nstep = 20\n')
    trained = []

    def train(workload, arguments, where, folder):
        trained.append(folder.uri)
        folder.write_result({"status": "failed"})

    monkeypatch.setattr("orchestrator.rehearse.train", train)
    monkeypatch.setattr("orchestrator.rehearse.stage", lambda *_: contextlib.nullcontext(Stage("", 1)))
    given = ["resnet", "--faults", str(tmp_path / "faults.toml"), "--storage", str(tmp_path), "--name", "r"]
    assert main(given) == 1
    assert [uri.rsplit("/", 1)[1] for uri in trained] == ["r-undisturbed"]
    assert "the undisturbed run did not finish" in capsys.readouterr().err
