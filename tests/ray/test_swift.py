"""Runs on a real object store: everything on it, wrong keys, gone for ten seconds, gone for good. See swift.py."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import swift
from commands import call, finish, result, run, start, wait_until
from swift import ENVIRONMENT, SECRET, Swift

from orchestrator.storage import Folder

pytestmark = [
    pytest.mark.long,  # test_object_storage.py has a mock in CI; this server takes seconds to start, and root
    pytest.mark.skipif(bool(swift.missing()), reason=f"needs {swift.missing()}: tests/ray/swift.py says how"),
]
PREPARE = [sys.executable, "-m", "orchestrator.prepare", "resnet", "--source", "digits", "--out"]
TRAIN = ["resnet", "--model", "resnet8", "--checkpoint-every", "20", "--workers", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    with swift.running(tmp_path_factory.mktemp("swift")) as running:
        yield running


@pytest.fixture(scope="module")
def data(server: Swift) -> list[str]:
    """Digits, prepared onto the server."""
    done = call([*PREPARE, server.address("digits"), "--file-mb", "0.05"], 240, **ENVIRONMENT)
    assert done.status == 0, done.out + done.err
    return ["--data", f"parquet:{server.address('digits')}"]


@pytest.fixture(scope="module")
def undisturbed(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of 200 steps from that data, kept on this machine's disk."""
    folder = tmp_path_factory.mktemp("runs")
    done = run(*TRAIN, *data, "--steps", "200", "--storage", str(folder), "--name", "run", **ENVIRONMENT)
    assert done.status == 0, done.err
    return str(result(folder / "run")["weights_sha256"])


@pytest.fixture
def folder(server: Swift, monkeypatch: pytest.MonkeyPatch) -> Folder:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return Folder(server.address("runs"), patience_s=60)


def lines(folder: Folder, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.read_text(name) or "").splitlines()]


def whole(folder: Folder, step: int) -> bool:
    """Whether the checkpoint of a step is there."""
    return "manifest.json" in folder.child(f"checkpoints/step-{step}").names()


@pytest.mark.timeout(900)
def test_a_run_outlives_ten_seconds_without_its_server(
    server: Swift, data: list[str], undisturbed: str, folder: Folder
) -> None:
    """All its processes are killed, and started again; a second command reads what the run has written."""
    given = [*TRAIN, *data, "--steps", "200", "--storage", server.address("runs"), "--name", "cut"]
    process, here = start(given, **ENVIRONMENT), folder.child("cut")
    wait_until(lambda: whole(here, 40), 240, "a checkpoint on Swift")
    server.stop()
    time.sleep(10)  # what is tested is ten seconds
    assert process.poll() is None
    server.start()
    done = finish(process)
    assert done.status == 0, done.err
    found = json.loads(here.read("result.json"))
    assert found["weights_sha256"] == undisturbed
    assert found["incidents"] == []
    assert [line["step"] for line in lines(here, "metrics.jsonl")] == list(range(1, 201))
    assert "model.safetensors" in here.child("model").names()
    again = run(*given, **ENVIRONMENT)
    assert again.status == 0, again.err
    assert "finished" in again.out
    assert SECRET not in done.out + done.err + again.out + again.err


@pytest.mark.timeout(900)
def test_a_server_that_is_gone_for_good_ends_the_run_and_loses_nothing(
    server: Swift, data: list[str], undisturbed: str, folder: Folder
) -> None:
    given = [*TRAIN, *data, "--steps", "200", "--storage", server.address("runs"), "--name", "gone"]
    process, here = start([*given, "--storage-patience", "8"], **ENVIRONMENT), folder.child("gone")
    wait_until(lambda: whole(here, 20), 240, "a checkpoint on Swift")
    server.stop()
    done = finish(process)
    server.start()
    assert done.status == 1, done.out + done.err
    assert "does not answer for 8 s" in done.err
    assert "resume with" in done.err
    assert SECRET not in done.out + done.err
    again = run(*given, **ENVIRONMENT)
    assert again.status == 0, again.err
    loaded = [event for event in lines(here, "events.jsonl") if event["event"] == "checkpoint_loaded"]
    assert loaded[0]["step"] >= 20
    assert json.loads(here.read("result.json"))["weights_sha256"] == undisturbed
    assert [line["step"] for line in lines(here, "metrics.jsonl")] == list(range(1, 201))


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
@pytest.mark.parametrize("what", ["storage", "data", "out"])
def test_wrong_keys_are_one_line(server: Swift, data: list[str], tmp_path: Path, what: str, wrong: str) -> None:
    """Before a worker starts, and the key is in nothing that is written."""
    environment = {**ENVIRONMENT, wrong: "not-the-one-and-secret"}
    here = ["--storage", str(tmp_path), "--name", "run"]
    command = {
        "storage": ["-m", "orchestrator.run", *TRAIN, "--storage", server.address("runs"), "--name", "wrong"],
        "data": ["-m", "orchestrator.run", *TRAIN, *data, *here],
        "out": [*PREPARE[1:], server.address("other")],
    }[what]
    done = call([sys.executable, *command], 120, **environment)
    assert done.status == 2, done.out + done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith(f"error: --{what} ")
    assert "ACCESS_DENIED" in done.err or "403" in done.err or "SIGNATURE" in done.err.upper()
    assert SECRET not in done.out + done.err
    assert not any("not-the-one-and-secret" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.timeout(900)
def test_a_stopped_run_goes_on(server: Swift, data: list[str], undisturbed: str, folder: Folder) -> None:
    given = [*TRAIN, *data, "--steps", "200", "--storage", server.address("runs"), "--name", "stopped"]
    process, here = start(given, **ENVIRONMENT), folder.child("stopped")
    wait_until(lambda: whole(here, 20), 240, "a checkpoint on Swift")
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.status == 130, stopped.err
    done = run(*given, **ENVIRONMENT)
    assert done.status == 0, done.err
    assert json.loads(here.read("result.json"))["weights_sha256"] == undisturbed
