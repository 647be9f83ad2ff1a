"""A run on s3:// storage, against a mock server: written, stopped, resumed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import finish, result, run, start, wait_until

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
    yield f"s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
    server.terminate()
    server.wait(timeout=30)


def test_a_run_on_object_storage_resumes(bucket: str, tmp_path: Path) -> None:
    from orchestrator.storage import Folder

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
    import json

    found = json.loads(folder.read("result.json"))
    assert found["weights_sha256"] == result(tmp_path / "local")["weights_sha256"]
    lines = folder.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 151))
    assert "model.safetensors" in folder.child("model").names()


def test_keys_in_the_address_are_refused(tmp_path: Path) -> None:
    done = run("resnet", "--storage", "s3://key:secret@bucket/runs", "--name", "run")
    assert done.status == 2
    assert "secret" not in done.err + done.out
