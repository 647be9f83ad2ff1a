"""How a failure is told: short, with where and what is kept, and without keys."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import pytest
from toys import toy_plan

from orchestrator import run as command
from orchestrator.errors import DataError, NonFiniteLossError
from orchestrator.failure import Failure, Place, kind_of, resume_command, short, story
from orchestrator.journal import Journal
from orchestrator.lastwords import at_fault, command_failed, last_words, what_is_kept, write_end
from orchestrator.recovery import Member, Roster
from orchestrator.redact import GONE
from orchestrator.runfolder import RunFolder
from orchestrator.seats import Assignment
from orchestrator.shards import Placement
from orchestrator.storage import Folder

LOG = """:job_id:01000000
\x1b[32mreading\x1b[0m part 7
Traceback (most recent call last):
  File "feed.py", line 3, in feed
    raise KeyError(7)
KeyError: 7

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "feed.py", line 5, in feed
    raise DataError("part 7")
orchestrator.errors.DataError: part 7
Fatal Python error: Segmentation fault
""".splitlines()


def test_of_a_traceback_the_error_is_left():
    told = ["reading part 7", "KeyError: 7", "orchestrator.errors.DataError: part 7"]
    assert short(LOG) == [*told, "Fatal Python error: Segmentation fault"]
    assert short(LOG, 1) == ["Fatal Python error: Segmentation fault"]
    assert len(short(["x" * 5000])[0]) == 300


def test_the_whole_story():
    found = Failure("data_error", "part 7", 1, "ab" * 28, "10.0.0.3", 4711, 20, ["reading"], 16, "python -m x")
    assert story(found, "/runs/a") == [
        "failed: part 7",
        "where: worker 1 (process 4711) on 10.0.0.3 (node abababababab), after step 20",
        "its last lines:",
        "  | reading",
        "kept: /runs/a, with the checkpoint of step 16; tracebacks are in its logs/errors.log",
        "resume with: python -m x",
    ]
    nobody = story(Failure("ray_train", "no room", resume="python -m x"), "/runs/a")
    assert nobody[1:3] == [
        "where: after step 0",
        "kept: /runs/a, with no checkpoint yet, a resumed run begins anew; tracebacks are in its logs/errors.log",
    ]


def test_a_command_that_can_be_pasted():
    assert resume_command("bert", "/my runs", "a").endswith("bert --storage '/my runs' --name a")


def test_kinds():
    assert kind_of(DataError("x")) == "data_error"
    assert kind_of(NonFiniteLossError("x")) == "non_finite_loss_error"


def test_an_error_that_all_have_found_belongs_to_who_holds_the_shard():
    roster = Roster(1, 2, 2)
    for rank in range(2):
        roster.seated[str(rank)] = Member(str(rank), f"n{rank}", 70 + rank, "cpu", 5, rank, ("", 0))
    found = Place(0, "n0", 70, 5, shards=(6,))
    assert at_fault(found, roster, Placement((0, 4, 8))) == Place(1, "n1", 71, 5)
    assert at_fault(Place(0, "n0", 70, 5), roster, Placement((0, 4, 8))) == Place(0, "n0", 70, 5)


def test_what_is_kept_is_read_from_the_run_folder(tmp_path):
    folder = RunFolder(Folder(str(tmp_path)))
    told = what_is_kept(Failure("x", "y"), folder, toy_plan(shards=8))
    assert (told.step, told.checkpoint_step) == (0, -1)
    events = [{"event": "checkpoint_saved", "step": 8}, {"event": "evaluated", "step": 9}]
    folder.folder.append("events.jsonl", "".join(json.dumps(e) + "\n" for e in events) + '{"event": "checkpoint_s')
    folder.folder.append("metrics.jsonl", '{"step": 8}\n{"step": 9}\n{"st')
    told = what_is_kept(Failure("x", "with password=hunter2hunter2\nand more\n"), folder, toy_plan(shards=8))
    assert (told.step, told.checkpoint_step) == (9, 8)
    assert told.error == f"with password={GONE} and more"


def test_storage_that_has_failed_does_not_hide_the_failure(tmp_path, caplog):
    """What cannot be opened as a file here cannot be read or written."""
    for name in ("events.jsonl", "logs/errors.log"):
        (tmp_path / name).mkdir(parents=True)
    told = command_failed(DataError("part 7"), RunFolder(Folder(str(tmp_path))), toy_plan(shards=8))
    assert (told.kind, told.error) == ("data_error", "part 7")
    assert "storage could not be asked" in told.kept
    assert told.resume
    assert "DataError: part 7" in caplog.text


def test_an_error_that_crosses_processes_keeps_its_shards():
    error = pickle.loads(pickle.dumps(NonFiniteLossError("step 3", shards=(6, 7))))
    assert (str(error), error.shards) == ("step 3", (6, 7))


def test_the_last_words_of_a_real_process(monkeypatch, tmp_path):
    """Files named as Ray names them, written by a process that dies of a segmentation fault."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    text = "import faulthandler, os; faulthandler.enable(); print('key', os.environ['AWS_SECRET_ACCESS_KEY'], flush=1)"
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        child = subprocess.Popen([sys.executable, "-c", text + "; os.kill(os.getpid(), 11)"], stdout=out, stderr=err)
        assert child.wait(60) == -11
    for name in ("out", "err"):
        (tmp_path / name).rename(tmp_path / f"worker-ab-01000000-{child.pid}.{name}")
    lines = last_words(child.pid, str(tmp_path))
    assert lines[0] == f"key {GONE}"
    assert "Fatal Python error: Segmentation fault" in lines
    assert last_words(os.getpid(), str(tmp_path)) == []


def test_a_mistake_of_ours_is_a_short_story(monkeypatch, tmp_path, capsys):
    """Also where nobody could be asked how the run failed."""

    def broken(address: str, log_file: object, environment: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("orchestrator.connect.cluster", broken)
    assert command.main(["resnet", "--steps", "2", "--storage", str(tmp_path), "--name", "a"]) == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.err + told.out
    assert told.err.splitlines()[0] == "failed: ZeroDivisionError: ours"
    assert told.err.splitlines()[-1].startswith("resume with: python -m orchestrator.run resnet --storage ")
    assert "Traceback" in (tmp_path / "a" / "logs" / "errors.log").read_text()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "Ray cannot start on this machine (AF_UNIX path too long); set RAY_TMPDIR to a short folder"),
        ("127.0.0.1:{}", "--address 127.0.0.1:{}: no Ray cluster answers (AF_UNIX path too long); start one with"),
    ],
)
def test_a_machine_on_which_ray_cannot_start_is_one_line(monkeypatch, tmp_path, capsys, address, said):
    """A temporary folder with a long name, a home that cannot be written; the name stays free."""

    def init(**_: object) -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("orchestrator.connect._quiet_ray", lambda file: None)
    monkeypatch.setattr("orchestrator.connect._known_here", lambda: "")
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        given = ["--steps", "2", "--storage", str(tmp_path), "--name", "a", "--address", address.format(port)]
        assert command.main(["resnet", *given]) == 2
    signal.signal(signal.SIGTERM, before)
    assert f"error: {said.format(port)}" in capsys.readouterr().err
    assert not (tmp_path / "a" / "config.toml").exists()


def test_the_end_of_a_run_whose_coordinator_is_lost_for_good_is_written_down(tmp_path):
    step = {"loss": 2.0, "samples": 32, "step_s": 0.1, "generation": 1}
    plan, token, began_s = toy_plan(shards=8), "token", time.time()
    lost = Journal(plan, str(tmp_path), token, "", began_s, again=False)
    lost.steps([{"step": number, "time_s": time.time(), **step} for number in (1, 2, 3)])
    assignment = Assignment(plan, str(tmp_path), token, "", began_s, 1, 1, True)
    folder, failure = RunFolder(Folder(str(tmp_path))), Failure("coordinator_lost", "gone")
    told = write_end(assignment, folder, failure)
    assert told == folder.result()
    assert (told["status"], told["steps"], told["loss"]) == ("failed", 3, 2.0)
    assert told["failure"]["error"] == "gone"
    kinds = [json.loads(line)["event"] for line in folder.text("events.jsonl").splitlines()]
    assert kinds == ["run_started", "incident", "run_ended"]
    assert [incident["kind"] for incident in told["incidents"]] == ["coordinator_lost"]
    assert write_end(assignment, folder, Failure("coordinator_lost", "later")) == told, "the first end stays"
    folder.take_ownership("of another command")
    assert write_end(assignment, folder, failure) is None
    assert folder.result() is None


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(1)", "sys.exit(1)", "pass"])
def test_an_end_without_a_word_is_told(end, tmp_path):
    folder = RunFolder(Folder(str(tmp_path)).child("n"))
    folder.metrics([{"step": 7}])
    script = (
        "import os, sys, tempfile\nfrom orchestrator.afterword import afterword, scratch_prefix\n"
        f"with afterword('resnet', {str(tmp_path)!r}, 'n'):\n"
        f"    for pid in (os.getpid(), 1): tempfile.mkdtemp(prefix=scratch_prefix(pid))\n    {end}"
    )
    own = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=own)
    left = [path.name for path in tmp_path.glob("orchestrator-ray-*")]
    if end.startswith("os"):
        assert len(left) == 1
        assert left[0].startswith("orchestrator-ray-1-"), "another command's"
        assert "failed: the command's process ended without a word" in done.stderr
        assert "after step 7" in done.stderr
        assert f"resume with: python -m orchestrator.run resnet --storage {tmp_path} --name n" in done.stderr
    else:
        assert done.stderr == ""
        assert len(left) == 2, "the command's own to delete"


@pytest.mark.parametrize(
    ("ways", "deterministic"),
    [
        (["ddp"], True),
        (["pipeline=2", "ddp"], True),
        (["tensor=2"], False),
        (["ddp", "fsdp", "ddp"], False),
        (["ddp", "fsdp", "ddp", "ddp"], False),
    ],
)
def test_one_command_in_rounding_parts_makes_a_run_depend_on_its_workers(tmp_path, ways, deterministic):
    for number, parallel in enumerate(ways):
        journal = Journal(toy_plan(parallel=parallel), str(tmp_path), f"token{number}", "", 0.0, again=False)
        journal.end("finished", "", "", {})
    assert RunFolder(Folder(str(tmp_path))).result()["deterministic"] == deterministic
