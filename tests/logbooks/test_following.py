"""How a run is followed while it is going on: beside a command, over cuts and torn lines, on object storage."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from logbooks.test_logbooks import STEPS, agrees, losses, records, tensorboard
from report.histories import write_run

from orchestrator import clerk, jsonlines, track
from orchestrator.runfolder import METRICS, RunFolder
from orchestrator.storage import Folder

pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")


def lines(first: int, last: int, time_s: float = 0.0) -> str:
    return "".join(json.dumps({"step": step, "time_s": time_s}) + "\n" for step in range(first, last + 1))


def test_a_log_that_grows_is_cut_and_grows_again(tmp_path):
    file = tmp_path / METRICS
    growing = jsonlines.Growing(Folder(str(tmp_path)), METRICS)
    new = lambda: [record["step"] for record in growing.new()]  # noqa: E731
    assert new() == []
    file.write_text(lines(1, 3) + '{"step": 4')
    assert new() == [1, 2, 3]
    assert new() == []
    file.write_text(lines(1, 4))
    assert new() == [4]
    file.write_text(lines(1, 2))
    assert new() == [1, 2], "it was cut: from the beginning"
    file.write_text(lines(1, 2) + lines(3, 9, 5.0))
    assert new() == list(range(3, 10))
    file.write_text(lines(1, 2) + lines(3, 20, 6.0))
    assert new() == list(range(1, 21)), "cut and regrown between two looks"
    assert growing.count == 20


def test_a_log_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "BLOCK_BYTES", 100)
    (tmp_path / METRICS).write_text(lines(1, 40))
    growing = jsonlines.Growing(Folder(str(tmp_path)), METRICS)
    found: list[int] = []
    while new := growing.new():
        found += [record["step"] for record in new]
    assert found == list(range(1, 41))


def owned(folder: Path) -> RunFolder:
    """The run, as a command with the token "mine" has it."""
    (folder / "logs").mkdir()
    (folder / "logs" / "owner").write_text("mine")
    return RunFolder(Folder(str(folder)))


def test_beside_a_command(tmp_path, capfd):
    """The whole run is written by the time that the command has ended; nothing is said, and no process is left."""
    folder = write_run(tmp_path / "run", steps=STEPS).folder
    with clerk.clerk("tensorboard", owned(folder), "mine"):
        pass
    agrees(folder, "tensorboard")
    assert capfd.readouterr().err == ""


def test_beside_a_command_that_lost_its_run(tmp_path):
    folder = write_run(tmp_path / "run", steps=20).folder
    with clerk.clerk("tensorboard", owned(folder), "an earlier command's"):
        pass
    assert not (folder / "tensorboard").exists()


def test_a_follower_that_is_lost_costs_a_line(tmp_path, capfd, monkeypatch):
    folder = write_run(tmp_path / "run", steps=20).folder
    begun: list[subprocess.Popen[str]] = []
    really = subprocess.Popen

    def popen(*arguments, **settings):
        begun.append(really(*arguments, **settings))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with clerk.clerk("tensorboard", owned(folder), "mine"):
        os.kill(begun[0].pid, signal.SIGKILL)
        begun[0].wait(30)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("--log tensorboard: its process was lost (-9); see logs/errors.log; the rest: python -m")


def test_a_follower_with_a_bug_costs_a_line_too(tmp_path, capfd):
    """Here it meets a record that it does not know."""
    folder = write_run(tmp_path / "run", steps=20).folder
    with (folder / METRICS).open("a") as file:
        file.write("{}\n")
    with clerk.clerk("tensorboard", owned(folder), "mine"):
        pass
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("--log tensorboard: its process was lost (1); see logs/errors.log")
    assert "Traceback" in (folder / "logs" / "errors.log").read_text()


def test_a_follower_ends_with_a_command_that_is_killed(tmp_path):
    """Its stdin closes, whoever closes it; the run has no result then."""
    folder = write_run(tmp_path / "run", steps=20, status="").folder
    owned(folder)
    command = [sys.executable, "-m", "orchestrator.track", str(folder), "--log", "tensorboard", "--owner", "mine"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert len(losses(folder, "tensorboard")) == 20
    assert "weights_sha256" not in tensorboard(folder).Tags()["tensors"]


@pytest.mark.parametrize("logger", ["tensorboard", pytest.param("mlflow", marks=pytest.mark.long)])
def test_on_object_storage(tmp_path, monkeypatch, logger):
    """Twice, as a resumed run: files are there at the end, each step once, from whatever machine."""
    if logger == "mlflow":
        pytest.importorskip("sqlalchemy", reason="pip install -e '.[mlflow]'")
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "not-to-be-seen")):
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        query = f"?scheme=http&endpoint_override=127.0.0.1:{server.get_host_and_port()[1]}&region=us-east-1"
        uri = f"s3://bucket-{logger}/runs/run{query}"
        fs.FileSystem.from_uri(f"s3://bucket-{logger}{query}&allow_bucket_creation=true")[0].create_dir(
            f"bucket-{logger}"
        )
        local, far = write_run(tmp_path / "run", steps=STEPS).folder, Folder(uri)
        whole = (local / METRICS).read_bytes().splitlines(keepends=True)
        for count, names in ((90, ("config.toml", "events.jsonl")), (STEPS, ("result.json",))):
            for name in names:
                far.write(name, (local / name).read_bytes())
            far.write(METRICS, b"".join(whole[:count]))
            assert track.main([uri, "--log", logger]) == 0
        for name in far.child(logger).names():
            (local / logger).mkdir(exist_ok=True)
            (local / logger / name).write_bytes(far.read(f"{logger}/{name}"))
        agrees(local, logger)
        assert len(records(local)) == STEPS
    finally:
        server.stop()
