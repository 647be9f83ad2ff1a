"""A run that several commands worked on, one of them killed: what its page and its live view say of its time."""

import json
import time
from pathlib import Path

import pytest
from report.histories import write_run
from rich.console import Console

from orchestrator import track, watch
from orchestrator.charts import spans
from orchestrator.history import ALIVE_S, read_history
from orchestrator.liveview import draw
from orchestrator.report import facts

DAY_S = 86_400.0
STEPS, STEP_S = 40, 0.5


def killed_and_resumed(folder: Path, status: str = "finished") -> Path:
    """A command that is killed in the middle, and one that ends the run a day later."""
    began_s = 1_790_000_000.0
    written = write_run(folder, STEPS, 0, step_s=STEP_S, status=status, began_s=began_s)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    half_s = began_s + 1 + STEPS / 2 * STEP_S
    again = [event | {"time_s": half_s + 0.1} for event in events[:2]]
    events = sorted([*events, *again], key=lambda event: event["time_s"])
    for record in [*events, *steps]:
        if record["time_s"] > half_s:
            record["time_s"] += DAY_S
    for name, records in (("events", events), ("metrics", steps)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return written.folder


def test_a_day_in_which_nobody_trained_is_no_wall_time(tmp_path):
    history = read_history(str(killed_and_resumed(tmp_path / "run")))
    (began, ended), (again, end) = history.commands()
    assert ended - began == pytest.approx(1 + STEPS / 2 * STEP_S)
    assert again - ended == pytest.approx(DAY_S + 0.1)
    assert end - again < STEPS * STEP_S
    assert history.worked_s == pytest.approx(ended - began + history.result["wall_s"])
    told = dict(facts(history))
    assert told["wall time"] == "33.0 s"
    assert "goodput of the last command" in told
    assert "samples per second of the last command" in told


def test_a_run_of_one_command_has_its_wall_time(tmp_path):
    history = read_history(str(write_run(tmp_path / "run", STEPS, 2, step_s=STEP_S).folder))
    assert history.worked_s == history.result["wall_s"]
    assert "goodput" in dict(facts(history))


def test_workers_are_not_shown_through_a_day_without_them(tmp_path):
    history = read_history(str(killed_and_resumed(tmp_path / "run", status="")))
    (_, first, _), (second, last, _) = spans(history)
    assert second - first == pytest.approx(DAY_S + 0.1)
    assert last == history.last_s


def test_slow_steps_are_no_silence(tmp_path):
    """Steps of ten minutes: the last one is two minutes ago."""
    began_s = time.time() - 3 * 600 - 121
    write_run(tmp_path / "run", 3, 0, step_s=600.0, status="", began_s=began_s)
    assert read_history(str(tmp_path / "run")).outcome == "going on"


def test_who_waits_for_workers_may_be_waiting_still(tmp_path):
    folder = write_run(tmp_path / "run", 0, 0, status="", began_s=time.time() - 10 * ALIVE_S).folder
    with (folder / "events.jsonl").open("a") as file:
        waits = {"event": "phase_began", "phase": "waiting for workers", "joined": 1, "missing": 2}
        file.write(json.dumps(waits | {"time_s": time.time() - 5 * ALIVE_S}) + "\n")
    assert read_history(str(folder)).outcome == "waiting for workers, or broke off"


def test_before_the_first_record(tmp_path, capsys):
    """A folder whose command has not come so far: no silence since 1970."""
    folder = write_run(tmp_path / "run", 0, 0, status="", began_s=time.time()).folder
    (folder / "events.jsonl").unlink()
    (folder / "metrics.jsonl").unlink()
    history = read_history(str(folder))
    assert history.outcome == "nothing written yet"
    assert history.worked_s == 0
    console = Console(width=120)
    with console.capture() as shown:
        console.print(draw(watch.View(track.RunFolder(track.Folder(str(folder)))).look()))
    assert "nothing written for" not in shown.get()


@pytest.mark.parametrize("every", ["inf", "nan", "1e11", "0", "-1"])
def test_an_interval_nobody_can_wait_for(every, tmp_path, capsys):
    folder = write_run(tmp_path / "run", 4, 0).folder
    assert watch.main([str(folder), "--every", every]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert every.lstrip("-") in told.replace("+", "")


def test_a_home_of_nobody(capsys):
    assert watch.main(["~nosuchuser-at-all/runs/x", "--once"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "~nosuchuser-at-all/runs/x" in told
