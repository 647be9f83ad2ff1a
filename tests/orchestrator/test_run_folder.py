"""A run's folder: whole files are never half written, and records go on cleanly after a crash."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.errors import StorageError, UserError
from orchestrator.events import Evaluated, RunEnded
from orchestrator.runfolder import EVENTS, METRICS, RunFolder
from orchestrator.storage import Folder
from orchestrator.uris import PASSING


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(Folder(str(tmp_path)))


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.folder.read_text(METRICS).splitlines()]


def lines(*numbers: int) -> str:
    return "".join(json.dumps({"step": n, "loss": 0.5}) + "\n" for n in numbers)


@pytest.mark.parametrize(
    ("text", "step", "left"),
    [
        (lines(1, 2, 3, 4), 2, [1, 2]),
        (lines(1, 2, 3), 3, [1, 2, 3]),
        (lines(1, 2, 3), 0, []),
        (lines(1, 2) + '{"step": 3, "lo', 3, [1, 2]),
        (lines(1, 2) + '{"step": 3, "lo', 1, [1]),
        (lines(1, 2, 3)[:-1], 3, [1, 2, 3]),
        (lines(1, 2) + "\n", 2, [1, 2]),
        (lines(1) + "\n" + lines(2)[:-1], 2, [1, 2]),
        (lines(1, 2) + "[3]\n" + lines(3), 3, [1, 2, 3]),
        ("", 5, []),
    ],
)
def test_metrics_are_cut_and_go_on(folder, text, step, left):
    """Whatever the crash left, after the cut and one more record every line is a record."""
    folder.folder.write(METRICS, text.encode())
    folder.cut_metrics(step)
    folder.metrics([{"step": 99}])
    assert steps(folder) == [*left, 99]


def test_a_cut_without_metrics_makes_no_file(folder, tmp_path):
    folder.cut_metrics(3)
    assert not list(tmp_path.iterdir())


def test_events_go_on_after_a_torn_line(folder):
    """A killed coordinator may leave half a record; the next record must not be lost with it."""
    folder.folder.write(EVENTS, b'{"time_s": 1.0, "event": "run_st')
    folder.take_ownership("the next command")
    folder.events([RunEnded("finished", 3, "")])
    records = []
    for line in folder.folder.read_text(EVENTS).splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    assert [r["event"] for r in records] == ["run_ended"]


def test_events_are_stamped_lines(folder):
    folder.events([RunEnded("stopped", 1, "asked to"), RunEnded("finished", 3, "")])
    folder.events([])
    records = [json.loads(line) for line in folder.folder.read_text(EVENTS).splitlines()]
    assert [r["step"] for r in records] == [1, 3]
    assert records[0]["time_s"] == records[1]["time_s"] > 1.7e9


def test_results_errors_and_models(folder, tmp_path):
    assert folder.result() is None
    assert folder.config() is None
    folder.write_result({"status": "finished", "steps": 3})
    assert folder.result() == {"status": "finished", "steps": 3}
    folder.error("first\n\n")
    folder.error("second")
    assert (tmp_path / "logs" / "errors.log").read_text() == "first\nsecond\n"
    (tmp_path / "local" / "deep").mkdir(parents=True)
    (tmp_path / "local" / "deep" / "model.safetensors").write_bytes(b"\x00weights")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".w.bin.0a1b2c3d").write_bytes(b"half")
    folder.save_model(tmp_path / "local")
    assert not list((tmp_path / "model").glob(".*"))
    assert (tmp_path / "model" / "deep" / "model.safetensors").read_bytes() == b"\x00weights"


def test_figures_that_are_not_finite_are_null_in_json(folder, tmp_path):
    folder.write_result({"status": "finished", "metrics": {"loss": math.inf, "accuracy": 0.5}, "loss": math.nan})
    folder.events([Evaluated(3, {"loss": math.nan})])
    text = (tmp_path / "result.json").read_text() + (tmp_path / EVENTS).read_text()
    assert text.count("null") == 3
    assert "NaN" not in text
    assert "Infinity" not in text
    assert math.isnan(folder.result()["metrics"]["loss"])
    assert math.isnan(folder.newest("evaluated")["metrics"]["loss"])


def test_a_full_disk_is_a_problem_that_ends_the_run(tmp_path, monkeypatch):
    """Logs tell the coordinator, which looks at it; a whole file tells who writes it."""
    folder = RunFolder(Folder(str(tmp_path), patience_s=60.0), late=True)
    monkeypatch.setattr(Folder, "_add", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert not folder.problem
    folder.error("kept")
    folder.metrics([{"step": 1}])
    assert "No space left on device" in folder.problem
    with pytest.raises(StorageError, match="No space left on device"):
        folder.write_result({})
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    folder.metrics([{"step": 2}])
    assert not folder.problem
    assert steps(folder) == [1, 2]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left on device"):
        folder.write_result({})


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_a_mounted_folder_that_goes_away_is_a_problem_too(tmp_path, monkeypatch, patience_s):
    folder = RunFolder(Folder(str(tmp_path), patience_s=patience_s), late=True)
    monkeypatch.setattr(Folder, "_add", lambda *_: (_ for _ in ()).throw(OSError(107, "not connected")))
    for step in (1, 2):
        folder.metrics([{"step": step}])
    assert "not connected" in folder.problem
    monkeypatch.undo()
    folder.metrics([{"step": 3}])
    assert steps(folder) == [1, 2, 3]


def test_names_that_are_not_utf8_can_be_written_down(folder, tmp_path):
    folder.error(f"{os.fsdecode(bytes([99, 233]))} cannot be decoded")
    assert (tmp_path / "logs" / "errors.log").read_text() == "c\\udce9 cannot be decoded\n"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"5"])
def test_a_damaged_result_is_one_line(folder, tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result.json: not valid JSON; delete it or use another --name"):
        folder.result()


def test_what_storage_says_is_no_template():
    """Google Cloud's errors have braces in them."""
    error = OSError("google::cloud::Status(UNAVAILABLE: x error_info={metadata={a=b}})")
    told = Folder("s3://bucket/x?region=r", patience_s=0.0)._given_up(error, is_away=True)
    assert isinstance(told, StorageError)
    assert "metadata={a=b}" in str(told)
    assert PASSING.search(str(error))


def test_google_cloud_is_asked_for_seconds_and_not_for_minutes(monkeypatch):
    asked = []

    def opened(uri):
        asked.append(uri)
        return SimpleNamespace(), "bucket/x"

    monkeypatch.setattr("pyarrow.fs.FileSystem", SimpleNamespace(from_uri=opened))
    for query in ("", "?retry_limit_seconds=99", "?scheme=http"):
        assert Folder(f"gs://bucket/x{query}").uri == f"gs://bucket/x{query}"
    assert [uri.removeprefix("gs://bucket/x") for uri in asked] == [
        "?retry_limit_seconds=8", "?retry_limit_seconds=99", "?scheme=http&retry_limit_seconds=8"
    ]  # fmt: skip


def test_azure_without_credentials_is_one_line(tmp_path):
    """Where a file is opened, pyarrow ends the process."""
    script = "from orchestrator.storage import Folder\nFolder('abfs://c@account.dfs.core.windows.net/r').read_text('x')"
    own = {name: value for name, value in os.environ.items() if not name.startswith("AZURE_")} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=own)
    assert done.returncode == 1
    assert "orchestrator.errors.UserError: --storage abfs://c@account" in done.stderr


def test_a_config_that_is_not_utf8_is_the_users(folder, tmp_path):
    (tmp_path / "config.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(UserError, match="not valid TOML"):
        folder.config()


class Full(io.RawIOBase):
    """A file whose disk takes three bytes more."""

    def __init__(self, file: io.FileIO) -> None:
        self.file = file

    def __getattribute__(self, name: str) -> object:
        return object.__getattribute__(self, name) if name in ("file", "write") else getattr(self.file, name)

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        if self.file.tell() >= 10:
            raise OSError(28, "No space left on device")
        return self.file.write(data[:3])


def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path, monkeypatch):
    store = Folder(str(tmp_path))
    store.append("log", "1234567\n")
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *given, **more: Full(plain(self, *given, **more)))
    with pytest.raises(OSError, match="No space"):
        store.append("log", "a longer line\n")
    monkeypatch.undo()
    assert (tmp_path / "log").read_text() == "1234567\n"
    store.append("log", "next\n")
    assert (tmp_path / "log").read_text() == "1234567\nnext\n"


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, before):
    store = Folder(str(tmp_path))
    if before is not None:
        store.write("deep/file", before)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        store.write("deep/file", b"new and longer")
    monkeypatch.undo()
    assert [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()] == ([before] if before else [])
    store.write("deep/file", b"new")
    assert store.read("deep/file") == b"new"


def test_a_folder(tmp_path):
    store = Folder(f"file://{tmp_path}/runs/")
    assert store.is_local
    assert store.names() == []
    assert store.read_text("x") is None
    with pytest.raises(FileNotFoundError):
        store.read("x")
    store.child("a").write("b/c", b"1")
    store.write("z", b"2")
    store.append("log", "one\n")
    store.append("log", "two\n")
    assert store.names() == ["a", "log", "z"]
    assert store.read_text("a/b/c") == "1"
    assert store.read_text("log") == "one\ntwo\n"
    for name in ("a", "z", "never"):
        store.delete(name)
    assert store.names() == ["log"]
    assert store.uri == store.child("a").uri.removesuffix("/a") == f"{tmp_path}/runs"


def test_writability_is_checked_without_a_trace(tmp_path):
    Folder(str(tmp_path)).check_writable()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^--storage .*/file/runs: cannot be written") as refusal:
        Folder(f"{tmp_path}/file/runs").check_writable()
    assert "\n" not in str(refusal.value)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match=r"^--storage gopher://x: "):
        Folder("gopher://x")


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "s3://?region=us-east-1", "file://"])
def test_a_uri_that_names_no_place_is_refused(uri):
    with pytest.raises(UserError, match=rf"^--storage {re.escape(uri)}: names no (bucket|folder); give "):
        Folder(uri)
