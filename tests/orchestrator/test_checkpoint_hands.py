"""Checkpoints that several write, one after the other, on storage that may be away."""

import errno
import os
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import MANIFEST, STATE, CheckpointStore
from orchestrator.errors import StorageError
from orchestrator.storage import Folder


def store(folder: Path, keep: int) -> CheckpointStore:
    return CheckpointStore(Folder(str(folder)), "me", keep)


def numbers(step: int) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((4, 3), float(step))}


def test_one_that_another_worker_still_writes_stays(tmp_path):
    """A machine that is drained leads no more, and still writes; the next leader's checkpoint is whole before."""
    slow, quick = store(tmp_path, keep=1), store(tmp_path, keep=1)
    entries = slow.write(1, {STATE: b"slow"})
    quick.save(2, numbers(2))
    assert store(tmp_path, keep=3).steps() == [1, 2]
    slow.finish(1, entries)
    assert store(tmp_path, keep=3).load(2).step == 2
    slow.write(3, {STATE: b"never finished"})
    quick.save(4, numbers(4))
    assert store(tmp_path, keep=3).steps() == [3, 4]
    quick.save(5, numbers(5))
    quick.save(6, numbers(6))
    assert store(tmp_path, keep=3).steps() == [6]


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_what_cannot_be_read_is_asked_for_again_and_is_no_reason_to_begin_anew(tmp_path, monkeypatch, name):
    folder, reasons, times = Folder(str(tmp_path), patience_s=0.3), [], []
    kept = CheckpointStore(folder, "me", 3)
    kept.save(1, numbers(1))
    kept.save(2, numbers(2))
    paths, away = Folder.path, {f"step-1/{name}", f"step-2/{name}"}

    def path(folder, asked):
        if asked in away:
            times.append(asked)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return paths(folder, asked)

    monkeypatch.setattr("orchestrator.patience.PAUSES_S", (0.01,))
    monkeypatch.setattr(Folder, "path", path)
    with pytest.raises(StorageError, match=f"step-2: {name} unreadable .*Stale file handle"):
        kept.load_newest(reasons.append)
    assert [reason.split(":")[0][-6:] for reason in reasons] == ["step-2", "step-1"]
    assert min(map(times.count, away)) > 2
    away.remove(f"step-1/{name}")
    assert kept.load_newest(reasons.append).step == 1
    before = len(times)
    monkeypatch.setattr(
        Folder, "path", lambda folder, asked: path(folder, asked) if len(times) == before else paths(folder, asked)
    )
    assert kept.load_newest(reasons.append).step == 2
