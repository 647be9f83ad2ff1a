"""The live view: what it shows of a run that is going on, waiting, silent or over."""

import errno
import io
import json
import time

import pytest
from report.histories import write_run
from rich.console import Console

from orchestrator import watch
from orchestrator.errors import UserError
from orchestrator.events import PhaseBegan, record
from orchestrator.history import read_history
from orchestrator.liveview import BARS, draw, sparkline
from orchestrator.runfolder import RunFolder
from orchestrator.storage import Folder


def shown(folder) -> str:
    console = Console(file=io.StringIO(), width=110, force_terminal=False)
    console.print(draw(watch.View(RunFolder(Folder(str(folder)))).look()))
    return console.file.getvalue()


def note(folder, phase: PhaseBegan) -> None:
    RunFolder(Folder(str(folder))).folder.append("events.jsonl", json.dumps(record(phase, time.time())) + "\n")


def test_a_run_that_is_going_on(tmp_path):
    write_run(tmp_path / "run", status="", began_s=time.time() - 100)
    note(tmp_path / "run", PhaseBegan("training", 4, 0))
    text = shown(tmp_path / "run")
    for words in ("run  training", "step 200 of 200", "rank", "0 to 1 (2)", "incidents: 3", "node_drained", "loss 0."):
        assert words in text
    assert BARS[0] in text


def test_what_is_waited_for(tmp_path):
    write_run(tmp_path / "run", steps=0, incidents=0, status="", began_s=time.time())
    note(tmp_path / "run", PhaseBegan("waiting for workers", 1, 2))
    assert "waiting for workers: 2 more needed, 1 there" in shown(tmp_path / "run")


def test_a_run_that_says_nothing(tmp_path):
    write_run(tmp_path / "run", status="", began_s=time.time() - 1000)
    assert "nothing written for" in shown(tmp_path / "run")


def test_a_long_run_is_not_read_whole(tmp_path, monkeypatch):
    write_run(tmp_path / "run", 20_000, status="")
    monkeypatch.setattr(watch, "NEWEST_BYTES", 10_000)
    sight = watch.View(RunFolder(Folder(str(tmp_path / "run")))).look()
    assert 20 < len(sight.steps) < 100
    assert sight.steps[-1]["step"] == 20_000


def test_the_view_ends_with_the_run(tmp_path, capsys):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", began_s=1.0)
    assert watch.main([str(tmp_path / "one")]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.timeout(60)
def test_the_view_stays_while_storage_is_away(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", status="")
    write_run(tmp_path / "done")
    view = watch.View
    answers = ["run", OSError(errno.ESTALE, "Stale file handle"), UserError("does not answer"), "done"]

    class Away:
        def __init__(self, folder):
            pass

        def look(self):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return view(RunFolder(Folder(str(tmp_path / answer)))).look()

    monkeypatch.setattr(watch, "View", Away)
    assert watch.main([str(tmp_path / "run"), "--every", "0.01"]) == 0
    assert "finished" in capsys.readouterr().out
    assert not answers
    answers += ["run", UserError("does not answer")]
    monkeypatch.setattr(watch, "GIVE_UP_S", 0.0)
    assert watch.main([str(tmp_path / "run"), "--every", "0.01"]) == 2


def test_lines_that_are_none_are_left_out(tmp_path):
    """Another machine may see zeros where a file is being appended to."""
    write_run(tmp_path / "run", status="")
    before = read_history(str(tmp_path / "run"))
    for name in ("events.jsonl", "metrics.jsonl"):
        file = tmp_path / "run" / name
        first, *others = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([first, b"\0\0\0\xff\n", *others, b'{"half": ']))
    after = read_history(str(tmp_path / "run"))
    assert after.events == before.events
    assert {name: column.tolist() for name, column in after.steps.items()} == {
        name: column.tolist() for name, column in before.steps.items()
    }
    assert "step 200 of 200" in shown(tmp_path / "run")


def test_the_newest_run_is_shown_without_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "old")
    write_run(tmp_path / "runs" / "new")
    assert watch.main(["--once"]) == 0
    assert "new  finished" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nowhere"], [], ["nowhere", "--every", "0"], ["--evry", "1"]])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert watch.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([1.0], BARS[0]), ([0.0, 1.0], BARS[0] + BARS[-1]), ([2.0] * 3, BARS[0] * 3)]
)
def test_sparklines(values, expected):
    assert sparkline(values) == expected


def test_a_long_sparkline_is_thinned():
    assert len(sparkline(list(range(1000)), 20)) == 20


def test_of_the_events_the_new_ones_are_read(tmp_path, monkeypatch):
    """A run of hundreds of workers writes megabytes of them, and is looked at every second."""
    write_run(tmp_path / "run", status="")
    file = tmp_path / "run" / "events.jsonl"
    view, read = watch.View(RunFolder(Folder(str(tmp_path / "run")))), []
    first = view.look().events
    since = Folder.since
    monkeypatch.setattr(Folder, "since", lambda *given: read.append(since(*given)) or read[-1])
    with file.open("a") as log:
        log.write('{"time_s": 9.0, "event": "evaluated", "step": 7, "metrics": {}}\n')
    assert [event["event"] for event in view.look().events] == [*(event["event"] for event in first), "evaluated"]
    assert sum(map(len, read)) < file.stat().st_size / 2
    file.write_text('{"time_s": 10.0, "event": "run_started"}\n')
    assert [event["event"] for event in view.look().events] == ["run_started"]
