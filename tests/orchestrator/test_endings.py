"""What a run leaves behind when it ends before its time: its incidents, all its steps, weights that are numbers."""

import asyncio
import contextlib
import math
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import ray
import torch
from members import Run, play
from ray._raylet import RAY_NODE_ID_KEY
from toys import ToyWorkload, toy_plan

from orchestrator.build import build_state
from orchestrator.checkpoint import BackgroundWriter, CheckpointStore
from orchestrator.cluster_fit import Node
from orchestrator.coordinator import Coordinator
from orchestrator.errors import NonFiniteWeightsError, StorageError, UserError
from orchestrator.events import GenerationStarted
from orchestrator.faults import Fault
from orchestrator.injector import FaultSchedule
from orchestrator.journal import Journal
from orchestrator.recorder import Recorder
from orchestrator.recovery import Roster
from orchestrator.runfolder import RunFolder
from orchestrator.scoring import Hired, Scoring
from orchestrator.seats import Order
from orchestrator.split_recorder import SplitRecorder
from orchestrator.storage import Folder
from orchestrator.suspicion import SILENT_DEATHS, Suspicion
from orchestrator.worker import Worker

CPU = torch.device("cpu")


@pytest.mark.parametrize("again", [False, True])
def test_the_incident_that_ends_a_run_is_told(tmp_path, again):
    """It is open still; an earlier generation of the same recovery may have begun, and been lost too."""

    async def story(run: Run) -> None:
        workers = await run.enlist("ab")
        run.steps(1, 2, 3, by=workers)
        workers[1].die()
        assert await workers[0].told() == ("end", 1)
        if again:
            await run.seat(workers[0], why="gone")
            workers[0].die()
            while run.members.roster.seated:
                await asyncio.wait_for(run.members.beats.get(), 20)
        run.journal.end("failed", "enough", "", {})
        (incident,) = run.journal.result["incidents"]
        assert run.events("incident")[0].items() >= incident.items()
        assert (incident["kind"], incident["step"]) == ("worker_killed", 3)
        assert (incident["workers_before"], incident["workers_after"], incident["restore_s"]) == (2, 0, 0.0)
        assert incident["recovery_s"] == incident["regroup_s"] > 0
        assert incident["recompute_s"] == 0.0

    play(story, tmp_path)


def test_a_stop_within_a_pause_is_no_incident(tmp_path):
    async def story(run: Run) -> None:
        workers = await run.enlist("ab")
        run.steps(1, by=workers)
        run.members.pause("rebalanced")
        for worker in workers:
            assert await worker.told() == ("pause", 1)
        waiting = [asyncio.create_task(workers[0].join())]
        await asyncio.wait(waiting, timeout=0)
        assert run.journal.open.kind == "rebalanced"
        run.journal.end("stopped", "on request", "", {})
        assert run.journal.result["incidents"] == []
        waiting[0].cancel()

    play(story, tmp_path)


def test_workers_that_die_at_different_steps_of_a_run_that_is_behind_its_best_are_no_crash():
    """A lone worker goes back to its checkpoint each time; where a sample kills, it dies at the same step."""
    suspicion = Suspicion()
    assert not any(suspicion.died(40, 3, range(8), step) for step in (40, 20, 25, 18, 30, 10))
    suspicion = Suspicion()
    reasons = [suspicion.died(40, 3, range(8), step) for step in (40, 22, 40, 38, 10, 41)]
    assert [bool(reason) for reason in reasons] == [False] * 5 + [True]
    assert f"{SILENT_DEATHS} workers died one after the other at about step 41" in reasons[-1]


class Desk:
    """In the place of the coordinator's handle: writes down what it is told, and answers what is asked."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.stops = journal, []
        calls = (self._take, self._tell, self._stop)
        self.report, self.status, self.stopped = (SimpleNamespace(remote=call) for call in calls)

    def _take(self, records, events, keep=False):
        self.journal.steps(records)
        self.journal.log(*events)

    def _tell(self):
        return SimpleNamespace(step=self.journal.recorded)

    def _stop(self, step, sha256):
        self.stops.append(step)


def test_who_leads_a_stop_tells_of_the_steps_that_rank_0_took_along(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    journal = Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=False)
    journal.generation_begins(GenerationStarted(1, 0, 2, [], [], [], "cpu"), 0.0, 0.0, [])
    desk, plan = Desk(journal), toy_plan()
    recorder = Recorder(plan, str(tmp_path), desk, SimpleNamespace(at=lambda *_: None))
    recorder.reporter.take_over(speaks=False, recorded=0)
    base = {"loss": 1.0, "samples": 8, "step_s": 0.1, "generation": 1, "time_s": 0.0}
    records = [{"step": step, **base} for step in range(1, 8)]
    for record in records:
        recorder.reporter.step(record, hurry=False)
    journal.steps(records[:4])  # what rank 0 told before its node was lost
    worker = object.__new__(Worker)
    worker._coordinator, worker._recorder = desk, recorder
    worker._state = build_state(plan, ToyWorkload(plan.config), CPU)
    worker._state.step = 7
    worker._obey(Order("stop", lead=True))
    recorder.close()
    assert (journal.recorded, journal.saved, desk.stops) == (7, 7, [7])


NAMES = [("bn.running_var", math.inf), ("conv.weight", -math.inf), ("bn.bias", math.nan)]


@pytest.mark.parametrize(("name", "value"), NAMES)
def test_a_state_that_is_no_number_is_not_kept_and_no_result(tmp_path, name, value):
    """The step's loss was finite; the checkpoints from before it are what a run goes on from."""
    plan = toy_plan(keep_checkpoints=1)
    state = build_state(plan, ToyWorkload(plan.config), CPU)
    told, store = [], CheckpointStore(Folder(str(tmp_path)), "me", 1)
    writer = BackgroundWriter(store, told.append)
    writer.submit(3, state.snapshot)
    with torch.no_grad():
        state.model.state_dict()[name].view(-1)[-1] = value
    state.step = 4
    writer.submit(4, state.snapshot)
    words = f"the model's {name} is not finite after step 4: .* lower --lr"
    with pytest.raises(NonFiniteWeightsError, match=words):
        writer.wait()
    writer.wait()
    assert [saved["step"] for saved in told] == store.steps() == [3]
    recorder = Recorder(plan, str(tmp_path), None, None)
    for moment in (recorder.trained, recorder.broke_off, lambda state: recorder.checkpoint_now(state, lead=True)):
        recorder._seat = SimpleNamespace(rank=1)
        with pytest.raises(NonFiniteWeightsError, match=words):
            moment(state)


def test_a_checkpoint_that_could_not_be_written_is_told_once(tmp_path):
    tries = []

    class Away(CheckpointStore):
        def save(self, step, tensors):
            tries.append(step)
            if step == 1:
                raise StorageError("away")
            return 1

    writer = BackgroundWriter(Away(Folder(str(tmp_path)), "me", 1), lambda saved: None)
    writer.submit(1, dict)
    with pytest.raises(StorageError):
        writer.submit(2, dict)
    writer.submit(3, dict)
    writer.wait()
    assert tries == [1, 3]


def test_who_is_left_alone_of_a_group_writes_checkpoints_as_before(tmp_path):
    """Its part of the manifest was under way when the others were lost."""
    plan = toy_plan(checkpoint_every="2")
    recorder = SplitRecorder(plan, str(tmp_path), None, None)
    recorder._seat = SimpleNamespace(rank=0)
    recorder._finishing = Future()
    recorder._finishing.set_result(None)
    written = []
    recorder._writer = SimpleNamespace(submit=lambda step, _: written.append(step), busy=False)
    for step in range(1, 7):
        recorder._checkpoint_if_due(SimpleNamespace(split=False, step=step, snapshot=dict), 1)
    assert written == [2, 4, 6]


def test_a_run_that_is_taken_over_while_it_waits_says_so(tmp_path):
    """No worker has come that could tell; the command asks how it goes."""
    plan, uri = toy_plan(), str(tmp_path)

    async def story() -> None:
        journal = Journal(plan, uri, "token", "", 0.0, again=False)
        assert not journal.check_owner()
        coordinator = object.__new__(Coordinator)
        coordinator._journal, coordinator._outcome, coordinator._failing = journal, "", False
        coordinator._written, coordinator._message, coordinator._exit_status = asyncio.Event(), "", 0
        coordinator._members = SimpleNamespace(roster=Roster(1, 2, 2), begun=False, abandon=lambda: None)
        coordinator._phase, coordinator._noted = "", None
        assert (await coordinator.status()).outcome == ""
        RunFolder(Folder(uri)).take_ownership("of another command")
        journal._check_at_s = 0.0
        told = await coordinator.status()
        assert (told.outcome, told.exit_status) == ("failed", 1)
        assert told.message == "another command has taken this run over"

    asyncio.run(story())
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(("resumed_at", "left"), [(0, [0, 1, 2]), (20, [1, 2]), (50, [2])])
def test_faults_that_a_resumed_run_has_behind_it_do_not_happen_again(resumed_at, left):
    faults = (Fault("kill", rank=0, step=10), Fault("drain", rank=0, step=20), Fault("kill", rank=0, time_s=3.0))
    for successor in (False, True):  # its journal's first step is read back
        journal = SimpleNamespace(fired=set(), first_step=resumed_at, recorded=90 * successor, saved=70 * successor)
        schedule = FaultSchedule(faults, journal, None)
        schedule.begin()
        assert sorted({0, 1, 2} - schedule.fired) == left
    fresh = FaultSchedule(faults, SimpleNamespace(fired=set(), first_step=-1, recorded=0, saved=resumed_at), None)
    assert sorted({0, 1, 2} - fresh.fired) == left, "before anything is loaded, which may be a fault's moment"


def test_an_evaluation_goes_on_without_a_node_that_lacks_its_data(monkeypatch):
    """As long as others have it: a node that joins late without its mount."""
    killed = []
    monkeypatch.setattr(ray, "kill", killed.append)
    scoring = object.__new__(Scoring)
    scoring._left_out, why = set(), UserError("no folder /data")
    for others in (Hired("actor a", "n1", 7), Hired("actor a")):  # one that is ready, or has yet to open its data
        scoring._staff = {"a": others, "b": Hired("actor b")}
        assert scoring._spare("b", "n2", why)
        assert (list(scoring._staff), scoring._left_out, killed) == (["a"], {"n2"}, ["actor b"])
        killed.clear()
    assert not scoring._spare("a", "n3", why), "nobody has it"


def test_an_evaluation_asks_for_room_before_anybody_is_hired(monkeypatch):
    monkeypatch.setattr(ray, "put", lambda files: files)
    monkeypatch.setattr("orchestrator.scoring.offer", lambda: None)
    monkeypatch.setattr("orchestrator.scoring.nodes", lambda: [Node({"CPU": 2.0}, {RAY_NODE_ID_KEY: "n1"})])
    scoring = Scoring(SimpleNamespace(threads=1), {}, 100, 0, {"CPU": 1.0})
    assert scoring._room() == 2
    scoring._left_out.add("n1")
    assert scoring._room() == 0


@pytest.mark.parametrize("earlier", ["none", "stopped", "killed"])
def test_a_coordinator_that_was_lost_before_it_had_begun_has_a_successor_that_begins(tmp_path, earlier):
    """Ray says that it was started anew, and there is nothing of this command's to go on from."""
    if earlier != "none":
        before = Journal(toy_plan(), str(tmp_path), "before", "", 0.0, again=False)
        before.generation_begins(GenerationStarted(1, 0, 1, [], [], [], "cpu"), 0.0, 0.0, [])
        if earlier == "stopped":
            before.end("stopped", "on request", "", {})
    journal = Journal(toy_plan(), str(tmp_path), "token", "", time.time(), again=True)
    assert not journal.again
    assert journal.ended_as() == ("", "", 0)
    assert not journal.check_owner()
    assert RunFolder(Folder(str(tmp_path))).owner() == "token"
    assert [event["event"] for event in journal._folder.every("coordinator_restarted")] == []
    assert Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=True).again


def test_an_object_is_written_where_no_signal_interrupts(monkeypatch):
    """A stream that is left becomes an object, of what it has got by then."""
    wrote = []
    folder = object.__new__(Folder)
    stream = SimpleNamespace(write=lambda piece: wrote.append((piece, threading.current_thread())))
    folder._root, folder._fs = "b", SimpleNamespace(open_output_stream=lambda path: contextlib.nullcontext(stream))
    folder._put("x", [b"1", b"2"])
    assert [piece for piece, _ in wrote] == [b"1", b"2"]
    assert threading.main_thread() not in {thread for _, thread in wrote}


def test_a_coordinator_that_is_started_anew_takes_nothing_back(tmp_path):
    """Another command has taken the run over while it was away."""
    began_s = time.time()
    Journal(toy_plan(), str(tmp_path), "mine", "", began_s, again=False)
    theirs = Journal(toy_plan(), str(tmp_path), "theirs", "", began_s + 1, again=False)
    theirs.end("finished", "", "ab", {})
    again = Journal(toy_plan(), str(tmp_path), "mine", "", began_s, again=True)
    assert again.check_owner()
    assert RunFolder(Folder(str(tmp_path))).owner() == "theirs"
    assert RunFolder(Folder(str(tmp_path))).result()["status"] == "finished"
