"""A run on s3:// storage, against a mock server: written, stopped, resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import call, finish, result, run, start, wait_until
from proxy import Proxy

from orchestrator.storage import Folder

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "not-to-be-seen", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an empty bucket on a moto server."""
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", "0"], stdout=out, stderr=out
        )
    wait_until(lambda: "Running on http://" in log.read_text(), 60, "the mock S3 server")
    port = log.read_text().split("Running on http://127.0.0.1:")[1].split()[0]
    from pyarrow import fs

    s3 = fs.S3FileSystem(
        access_key="key",
        secret_key="not-to-be-seen",
        endpoint_override=f"127.0.0.1:{port}",
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    s3.create_dir("bucket")
    yield address(int(port))
    server.terminate()
    server.wait(timeout=30)


def address(port: int) -> str:
    return f"s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"


@pytest.fixture
def proxy(bucket: str) -> Iterator[Proxy]:
    """In front of the server."""
    made = Proxy(int(bucket.split("127.0.0.1:")[1].split("&")[0]))
    yield made
    made.cut()


DIGITS = ["--steps", "250", "--checkpoint-every", "50", "--workers", "1"]


def test_a_run_outlives_ten_seconds_without_its_storage(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    """Everything is on S3, the data too; the run goes on, and what it could not say in between is said later."""
    os.environ.update(KEYS)
    data = bucket.replace("/runs", "/digits")
    made = call(
        [sys.executable, "-m", "orchestrator.prepare", "resnet", "--source", "digits", "--out", data], 120, **KEYS
    )
    assert made.status == 0, made.out + made.err
    source = ["--data", f"parquet:{address(proxy.port).replace('/runs', '/digits')}"]
    local = ["--data", f"parquet:{data}", "--storage", str(tmp_path), "--name", "again"]
    again = start(["resnet", *DIGITS, *local], **KEYS)  # beside the other: each has a Ray of its own
    process = start(["resnet", *DIGITS, *source, "--storage", address(proxy.port), "--name", "cut"], **KEYS)
    folder = Folder(bucket).child("cut")
    wait_until(lambda: bool(folder.child("checkpoints").names()), 120, "a checkpoint on S3")
    proxy.cut()
    time.sleep(10)  # what is tested is ten seconds
    assert process.poll() is None
    proxy.mend()
    done = finish(process)
    assert done.status == 0, done.err
    lines = folder.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 251))
    assert json.loads(folder.read("result.json"))["incidents"] == []
    assert "model.safetensors" in folder.child("model").names()
    undisturbed = finish(again)
    assert undisturbed.status == 0, undisturbed.err
    assert json.loads(folder.read("result.json"))["weights_sha256"] == result(tmp_path / "again")["weights_sha256"]


@pytest.mark.long  # CI has 40 minutes; ten seconds without storage are in CI
def test_storage_that_is_gone_for_good_ends_the_run_and_loses_nothing(bucket: str, proxy: Proxy) -> None:
    steps = ["--steps", "1000000", "--checkpoint-every", "50", "--workers", "1", "--storage-patience", "8"]
    process = start(["resnet", *steps, "--storage", address(proxy.port), "--name", "gone"], **KEYS)
    folder = Folder(bucket).child("gone")
    wait_until(lambda: "manifest.json" in folder.child("checkpoints/step-50").names(), 120, "a checkpoint on S3")
    proxy.cut()
    done = finish(process)
    assert done.status == 1
    assert "does not answer for 8 s" in done.err
    assert "resume with" in done.err
    proxy.mend()
    stopped = start(["resnet", *steps, "--storage", address(proxy.port), "--name", "gone"], **KEYS)
    loaded = lambda: [json.loads(line) for line in folder.read("events.jsonl").decode().splitlines()]  # noqa: E731
    wait_until(lambda: any(e["event"] == "checkpoint_loaded" for e in loaded()), 90, "the resumed run")
    stopped.send_signal(signal.SIGTERM)
    assert finish(stopped).status == 130
    assert next(e["step"] for e in loaded() if e["event"] == "checkpoint_loaded") >= 50


def test_wrong_keys_are_one_line(bucket: str) -> None:
    """A real server would say 403; the mock takes any keys, so a bucket that is not there stands for them."""
    done = run("resnet", "--storage", bucket.replace("bucket/", "nobucket/"), "--name", "run", **KEYS)
    assert done.status == 2
    assert done.err.startswith("error: --storage s3://nobucket")
    assert "not-to-be-seen" not in done.err + done.out


@pytest.mark.long
def test_a_run_on_object_storage_resumes(bucket: str, tmp_path: Path) -> None:
    os.environ.update(KEYS)
    steps = ["--steps", "150", "--checkpoint-every", "30", "--workers", "1"]
    assert run("resnet", *steps, "--storage", str(tmp_path), "--name", "local").status == 0
    process = start(["resnet", *steps, "--storage", bucket, "--name", "run"], **KEYS)
    folder = Folder(bucket).child("run")
    wait_until(lambda: bool(folder.child("checkpoints").names()), 90, "a checkpoint on S3")
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.status == 130, stopped.err
    done = run("resnet", *steps, "--storage", bucket, "--name", "run", **KEYS)
    assert done.status == 0, done.err
    found = json.loads(folder.read("result.json"))
    assert found["weights_sha256"] == result(tmp_path / "local")["weights_sha256"]
    lines = folder.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 151))
    assert "model.safetensors" in folder.child("model").names()


def test_keys_in_the_address_are_refused(tmp_path: Path) -> None:
    done = run("resnet", "--storage", "s3://key:secret@bucket/runs", "--name", "run")
    assert done.status == 2
    assert "secret" not in done.err + done.out
