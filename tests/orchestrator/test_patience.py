"""Servers that are away for a while, and who waits for them: a transfer may be long, and is given its time again."""

import io
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from toys import toy_plan

from orchestrator import patience, samefolder
from orchestrator.errors import DataError, MachineError, StorageError, UserError
from orchestrator.group import Group
from orchestrator.latelogs import LateLogs
from orchestrator.patience import patiently
from orchestrator.runfolder import RunFolder
from orchestrator.samefolder import check_same_storage
from orchestrator.stepbook import step_record
from orchestrator.storage import Folder
from orchestrator.worker import Worker


def test_the_time_that_a_transfer_took_is_no_waiting(monkeypatch):
    """A checkpoint of gigabytes that fails near its end is sent once more."""
    now, tries = [100.0], []
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: None))

    def send() -> str:
        now[0] += 200.0
        tries.append(now[0])
        if len(tries) == 1:
            raise OSError("cut off")
        return "whole"

    assert patiently(send, lambda error: True, 300.0, "s3://bucket/x") == "whole"
    tries.clear()

    def fail() -> str:
        now[0] += 200.0
        tries.append(now[0])
        raise OSError("cut off")

    with pytest.raises(OSError, match="cut off"):
        patiently(fail, lambda error: True, 300.0, "s3://bucket/x")
    assert len(tries) == 3, "300 s after the first one failed"
    with pytest.raises(OSError, match="cut off"):
        patiently(fail, lambda error: False, 300.0, "s3://bucket/x")
    assert len(tries) == 4


@pytest.mark.parametrize("pieces", [[b"a" * 10], [b"a" * 3, memoryview(b"b" * 9), b"", b"c"], [b"x"] * 11])
def test_a_large_object_is_sent_piece_by_piece(monkeypatch, pieces):
    """Its client copies what it has not sent yet: all of a checkpoint, where the way is slow."""
    monkeypatch.setattr("orchestrator.storage.PUT_BYTES", 4)
    unsent, most = [0], [0]

    class Stream(io.BytesIO):
        def write(self, data) -> int:
            unsent[0] += len(data)
            most[0] = max(most[0], unsent[0])
            return super().write(data)

        def flush(self) -> None:
            unsent[0] = 0

        def close(self) -> None:
            made.append(self.getvalue())
            super().close()

    made: list[bytes] = []
    folder = Folder("s3://bucket/x?region=us-east-1")
    for kind, limit in (("s3", 8), ("abfs", 99)):
        unsent[0] = most[0] = 0
        folder._fs = SimpleNamespace(open_output_stream=lambda path: Stream(), type_name=kind)
        folder.write("y", pieces)
        assert made.pop() == b"".join(pieces)
        assert most[0] < limit
    assert most[0] == len(b"".join(pieces)), "Azure shows what it has at each flush"


class Bucket:
    """An object storage that lets a machine read and write, or not."""

    is_local, uri = False, "s3://bucket/run"

    def __init__(self, owner: str, refusal: str = "", is_away: bool = False) -> None:
        self.owner, self.error = owner, StorageError(refusal) if refusal else None
        if self.error:
            self.error.is_away = is_away

    def check_writable(self) -> None:
        if self.error:
            raise self.error

    def read_text(self, name: str) -> str:
        return self.owner


def test_a_machine_that_may_not_write_to_the_run_s_folder_does_not_join(monkeypatch):
    """It would end the run on the day when it is to write a checkpoint."""
    monkeypatch.setattr(samefolder, "Folder", lambda uri, patience_s: Bucket("mine"))
    check_same_storage("s3://bucket/run", "mine", "h7")
    monkeypatch.setattr(samefolder, "Folder", lambda uri, patience_s: Bucket("mine", "refuses (ACCESS_DENIED)"))
    with pytest.raises(UserError, match=r"^h7 cannot use the run's folder \(refuses \(ACCESS_DENIED\)\); give its"):
        check_same_storage("s3://bucket/run", "mine", "h7")
    monkeypatch.setattr(samefolder, "Folder", lambda uri, patience_s: Bucket("mine", "does not answer", True))
    with pytest.raises(MachineError, match=r"^h7: does not answer$"):  # others may reach it
        check_same_storage("s3://bucket/run", "mine", "h7")
    monkeypatch.setattr(samefolder, "THERE_WITHIN_S", 0.0)
    monkeypatch.setattr(samefolder, "Folder", lambda uri, patience_s: Bucket("another's", "is never asked"))
    with pytest.raises(UserError, match=r"h7 does not see this run's folder.*; its machine reaches another storage"):
        check_same_storage("s3://bucket/run", "mine", "h7")


def test_a_machine_that_mounts_the_run_s_folder_read_only_does_not_join(tmp_path, monkeypatch):
    RunFolder(Folder(str(tmp_path))).take_ownership("mine")
    check_same_storage(str(tmp_path), "mine", "h7")
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))
    with pytest.raises(UserError, match=rf"^h7 cannot use the run's folder \(--storage {tmp_path}: may not be written"):
        check_same_storage(str(tmp_path), "mine", "h7")


def test_who_writes_a_last_checkpoint_does_not_stand_still(monkeypatch):
    """Or it would be killed for that before it has told why the run cannot go on."""
    group, seen = Group(0, 1, torch.device("cpu")), []
    worker = object.__new__(Worker)
    worker._plan, worker._state = toy_plan(), None
    worker._recorder = SimpleNamespace(broke_off=lambda state: seen.append((group.waiting, group.clock.reading)))

    def broken(*_: object) -> bool:
        raise DataError("no such file")

    monkeypatch.setattr("orchestrator.rounds.train", broken)
    with pytest.raises(DataError):
        worker._train(None, group, SimpleNamespace(placement=None))
    assert seen == [(True, True)]
    assert (group.waiting, group.clock.reading) == (False, False)


def test_a_log_that_takes_long_to_write_is_written_all_the_same(tmp_path, monkeypatch):
    """Who says nothing for a minute is taken to be gone."""
    for name, value in (("EVERY_S", 0.001), ("MOST_S", 0.01), ("REST", 1e6)):
        monkeypatch.setattr(f"orchestrator.latelogs.{name}", value)
    folder, seen, write = Folder(str(tmp_path)), threading.Event(), Folder.write

    def slow(*given: object) -> None:
        time.sleep(0.002)
        write(*given)
        seen.set()

    monkeypatch.setattr(Folder, "write", slow)
    logs = LateLogs(folder, ("log",), "owner")
    for number in range(3):
        seen.clear()
        logs.append("log", f"{number}\n")
        assert seen.wait(20)
    logs.problem = "over"
    assert folder.read_text("log") == "0\n1\n2\n"


def test_a_line_of_metrics_has_shares_of_its_step():
    plan = toy_plan()
    record = step_record(plan, 1, 0.5, 0.1, 8, "0badcafe", 2.0, [0.25, 0.5, 1.5])
    assert (record["step"], record["epoch"], record["samples_per_s"], record["step_s"]) == (1, 0, 4.0, 2.0)
    assert (record["data_share"], record["compute_share"], record["reduce_share"]) == (0.25, 0.5, 1.0)
