"""What the doctor finds, and what it advises; on a real cluster, and on nodes that say what real ones would."""

import importlib.metadata
import tempfile
from pathlib import Path

import pytest
from commands import call

from orchestrator import checkup, doctor
from orchestrator.checkup import Finding, judge_link, judge_node, packages, shared_memory, space, storage, token
from orchestrator.storage import Folder

MINE = {"ray": "2.60.0", "torch": "2.13.0"}
NODE = {"now_s": 1000.0, "free_gb": 50.0, "versions": MINE, "sees_storage": True}


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def test_a_cluster_that_is_well(cluster: str, tmp_path) -> None:
    done = call(["python", "-m", "orchestrator.doctor", "--address", cluster, "--storage", str(tmp_path)], 120)
    assert done.status == 0, done.out + done.err
    assert "PROBLEM" not in done.out
    assert "cluster: 1 nodes, 4 CPUs, 0 GPUs" in done.out
    assert "same versions, its clock agrees, sees the storage" in done.out
    assert done.out.splitlines()[-1] == "no problem"
    assert not list(tmp_path.iterdir()), "the probes are gone"


def test_without_a_cluster(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "is_here", lambda: False)
    assert doctor.main(["--storage", str(tmp_path)]) == 0
    assert "no cluster was looked at" in capsys.readouterr().out


def test_storage_that_cannot_be_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "is_here", lambda: False)
    (tmp_path / "file").write_text("")
    assert doctor.main(["--storage", str(tmp_path / "file")]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM" in out
    assert "do: check its address" in out


def test_mistakes_are_one_line(capsys) -> None:
    assert doctor.main(["--adress", "x"]) == 2
    assert "did you mean --address?" in capsys.readouterr().err


def test_packages() -> None:
    assert levels(packages()) == ["ok"]
    found = list(packages(lambda name: "0.1" if name == "torch" else importlib.metadata.version(name)))
    assert [f.level for f in found] == ["problem"]
    assert found[0].what.startswith("torch 0.1; torch==2.13")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert "ray is missing" in next(iter(packages(missing))).what


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o640, "problem"), (0o604, "problem")])
def test_a_token_is_for_its_owner(mode, level) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        file = Path(folder) / "auth_token"
        assert token(file).level == "ok"
        file.write_text("secret")
        file.chmod(mode)
        found = token(file)
        Path(folder).chmod(0o700)
        assert token(file).level == "ok", "nobody else gets there"
    assert found.level == level
    assert "secret" not in str(found)


@pytest.mark.parametrize(("free", "level"), [(1e9, "warning"), (1e12, "ok")])
def test_space(tmp_path, monkeypatch, free, level) -> None:
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: _usage(free))
    assert space(tmp_path / "not" / "yet", "runs").level == level
    assert shared_memory(tmp_path).level == ("ok" if free >= 1e9 else "warning")


def _usage(free: float):
    return checkup.shutil._ntuple_diskusage(free, 0, free)


def test_storage_that_gives_back_other_bytes(tmp_path, monkeypatch) -> None:
    assert storage(Folder(str(tmp_path))).level == "ok"
    monkeypatch.setattr(Folder, "read", lambda self, name: b"other")
    assert "other bytes" in storage(Folder(str(tmp_path))).what


@pytest.mark.parametrize(
    ("change", "level", "word"),
    [
        ({}, "ok", "clock agrees"),
        ({"versions": MINE | {"torch": "2.12.0"}}, "problem", "torch 2.12.0 (here 2.13.0)"),
        ({"now_s": 1030.0}, "warning", "28.0 s off"),
        ({"now_s": 990.0}, "warning", "10.0 s off"),
        ({"free_gb": 0.5}, "warning", "0.5 GB"),
        ({"sees_storage": False}, "problem", "not there"),
        ({"gpus": 0, "nccl": ""}, "problem", "torch cannot use"),
        ({"gpus": 2, "nccl": "2.27"}, "ok", "2 GPUs, NCCL 2.27"),
    ],
)
def test_what_a_node_says(change, level, word) -> None:
    found = list(judge_node("10.0.0.1", NODE | change, (1000.0, 1002.0), MINE))
    assert level in levels(found)
    assert any(word in finding.what for finding in found)
    assert all(finding.advice for finding in found if finding.level != "ok")


def test_links() -> None:
    assert judge_link("a", "b", 0.1).level == "ok"
    assert judge_link("a", "b", 3.0).level == "warning"


def test_findings_are_told_with_advice(capsys) -> None:
    assert doctor.tell([Finding("ok", "fine"), Finding("problem", "bad", "mend it")]) == 1
    assert capsys.readouterr().out == "ok       fine\nPROBLEM  bad\n         do: mend it\n"
