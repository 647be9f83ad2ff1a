"""Checkpoints: whole or passed over with a reason, whatever happened to the bytes or to the writer."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import ToyWorkload, toy_plan, toy_state

from orchestrator.checkpoint import MANIFEST, STATE, BackgroundWriter, CheckpointStore
from orchestrator.errors import CheckpointError
from orchestrator.group import Group
from orchestrator.loop import train
from orchestrator.shards import even_placement
from orchestrator.state import TrainingState, weights_sha256
from orchestrator.storage import Folder

ALONE = Group(0, 1, torch.device("cpu"))


def store(folder: Path, identity: str = "me", keep: int = 3) -> CheckpointStore:
    return CheckpointStore(Folder(str(folder)), identity, keep)


def numbers(step: int) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((4, 3), float(step)), "optimizer.0.step": torch.tensor(float(step))}


class Silent:
    """An observer that does nothing."""

    def stop_wanted(self) -> bool:
        return False

    def committed(self, *_: object) -> None: ...

    def evaluated(self, *_: object) -> None: ...


def trained(steps: int, **given: object) -> TrainingState:
    plan = toy_plan(steps=steps, **given)
    state = toy_state(plan)
    train(plan, ToyWorkload(plan.config), state, ALONE, even_placement(8, 1), Silent())
    return state


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_everything_comes_back_bit_by_bit(tmp_path, optimizer, precision):
    given = {"optimizer": optimizer, "lr": 0.01, "precision": precision}
    state = trained(3, **given)
    saved = state.snapshot()
    assert any(name.startswith("optimizer.") for name in saved)
    assert any(name.startswith("scaler.") for name in saved) == (precision == "fp16")
    assert not any("worker" in name or "rank" in name for name in saved)
    assert store(tmp_path).save(3, saved) == (tmp_path / "step-3" / STATE).stat().st_size
    loaded = store(tmp_path).load_newest(pytest.fail)
    fresh = toy_state(toy_plan(**given))
    assert weights_sha256(fresh.model) != weights_sha256(state.model)
    fresh.load(loaded.tensors, loaded.step)
    assert fresh.step == 3
    assert weights_sha256(fresh.model) == weights_sha256(state.model)
    once_more = fresh.snapshot()
    assert once_more.keys() == saved.keys()
    for name, tensor in saved.items():
        assert once_more[name].dtype == tensor.dtype
        assert once_more[name].equal(tensor), name


def test_the_state_before_the_first_step_comes_back_too(tmp_path):
    state = trained(2, optimizer="adam")
    first = toy_state(toy_plan(optimizer="adam"))
    store(tmp_path).save(0, first.snapshot())
    state.load(store(tmp_path).load(0).tensors, 0)
    assert weights_sha256(state.model) == weights_sha256(first.model)
    assert state.snapshot().keys() == first.snapshot().keys()


def test_a_snapshot_is_not_touched_by_later_steps():
    plan = toy_plan(optimizer="adam", precision="fp16")
    state = toy_state(plan)
    kept: dict[int, tuple[dict, dict]] = {}

    class Keeper(Silent):
        def committed(self, *_: object) -> None:
            snapshot = state.snapshot()
            kept[state.step] = snapshot, {name: t.clone() for name, t in snapshot.items()}

    train(plan, ToyWorkload(plan.config), state, ALONE, even_placement(8, 1), Keeper())
    assert sorted(kept) == [1, 2, 3, 4, 5, 6]
    for snapshot, copy in kept.values():
        assert all(snapshot[name].equal(copy[name]) for name in copy)
    assert not kept[1][0]["model.conv.weight"].equal(kept[6][0]["model.conv.weight"])


def test_an_old_one_that_cannot_be_deleted_stops_nobody(tmp_path, monkeypatch):
    """NFS keeps a name for what somebody has open, and the folder with it; the next one tries again."""
    store, delete = CheckpointStore(Folder(str(tmp_path)), "id", keep=1), Folder.delete
    store.save(1, {"x": torch.ones(2)})

    def busy(folder, name):
        if name == "step-1":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        delete(folder, name)

    monkeypatch.setattr(Folder, "delete", busy)
    assert store.save(2, {"x": torch.ones(2)}) > 0
    assert store.load(2).step == 2
    assert store.steps() == [1, 2]
    monkeypatch.undo()
    store.save(3, {"x": torch.ones(2)})
    assert store.steps() == [3]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path, keep):
    for step in (10, 9, 100, 101, 102, 103):
        store(tmp_path, keep=keep).save(step, numbers(step))
    assert store(tmp_path).steps() == [9, 10, 100, 101, 102, 103][-keep:]
    assert {f.name for f in tmp_path.iterdir()} == {f"step-{s}" for s in store(tmp_path).steps()}


def damage(folder: Path, how: str) -> None:
    state, manifest = folder / STATE, folder / MANIFEST
    if how == "no manifest":
        manifest.unlink()
    elif how == "no state":
        state.unlink()
    elif how == "truncated state":
        state.write_bytes(state.read_bytes()[:-1])
    elif how == "flipped byte":
        raw = bytearray(state.read_bytes())
        raw[-3] ^= 1
        state.write_bytes(raw)
    elif how == "truncated manifest":
        manifest.write_bytes(manifest.read_bytes()[:-5])
    elif how == "empty manifest":
        manifest.write_bytes(b"")
    elif how == "other json":
        manifest.write_text("[1, 2]")
    elif how == "not utf-8":
        manifest.write_bytes(b"\xff" + manifest.read_bytes())
    elif how == "no size":
        manifest.write_text(manifest.read_text().replace('"bytes"', '"bites"'))


REASONS = {
    "no manifest": "unfinished",
    "no state": "unreadable",
    "truncated state": "does not match its checksum",
    "flipped byte": "does not match its checksum",
    "truncated manifest": "unreadable",
    "empty manifest": "unreadable",
    "other json": "unreadable",
    "not utf-8": "",
    "no size": "",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path, how):
    for step in (1, 2):
        store(tmp_path).save(step, numbers(step))
    damage(tmp_path / "step-2", how)
    reasons: list[str] = []
    loaded = store(tmp_path).load_newest(reasons.append)
    assert loaded.step == 1
    assert loaded.tensors["model.w"].equal(numbers(1)["model.w"])
    (reason,) = reasons
    assert "step-2" in reason
    assert REASONS[how] in reason
    assert "\n" not in reason


def test_no_flipped_byte_goes_unnoticed_or_escapes(tmp_path):
    """Every byte of both files: the checkpoint is refused as CheckpointError, or what it holds is unharmed."""
    store(tmp_path).save(1, numbers(1))
    escaped: set[str] = set()
    refused = 0
    for name in (STATE, MANIFEST):
        file = tmp_path / "step-1" / name
        raw = file.read_bytes()
        for place in range(len(raw)):
            for bit in (0x01, 0x80):
                file.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
                try:
                    assert store(tmp_path).load(1).tensors["model.w"].equal(numbers(1)["model.w"])
                    assert name == MANIFEST, f"byte {place} of {name}"
                except CheckpointError:
                    refused += 1
                except (ValueError, KeyError, TypeError) as error:
                    escaped.add(f"{name}: {error!r:.60}")
        file.write_bytes(raw)
    assert not escaped
    assert refused >= 2 * (tmp_path / "step-1" / STATE).stat().st_size


def test_a_renamed_checkpoint_is_refused(tmp_path):
    kept = store(tmp_path)
    kept.save(3, {"weight": torch.ones(2)})
    (tmp_path / "step-3").rename(tmp_path / "step-30")
    with pytest.raises(CheckpointError, match="is that of step 3, renamed"):
        kept.load(30)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    store(tmp_path, "another").save(1, numbers(1))
    with pytest.raises(CheckpointError, match="of another configuration"):
        store(tmp_path).load(1)
    assert store(tmp_path).load_newest(lambda reason: None) is None
    assert store(tmp_path / "nowhere").load_newest(pytest.fail) is None


@pytest.mark.parametrize("failing", ["state", "manifest"])
def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch, failing):
    store(tmp_path).save(1, numbers(1))
    calls, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2].startswith(f".{failing}"):
            calls.append(descriptor)
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        store(tmp_path).save(2, numbers(2))
    assert calls
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and f.name.startswith(".")]
    assert store(tmp_path).load_newest(lambda reason: None).step == 1


def test_writing_a_step_again_never_loses_it(tmp_path, monkeypatch):
    """After a resumption from step 5 an immediate stop saves step 5 once more; the disk may be full then."""
    store(tmp_path).save(5, numbers(5))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        store(tmp_path).save(5, numbers(5))
    assert store(tmp_path).load_newest(lambda reason: None) is not None


SAVER = """
import sys, torch
from orchestrator.checkpoint import CheckpointStore
from orchestrator.storage import Folder
store = CheckpointStore(Folder(sys.argv[1]), "me", 2)
for step in range(1, 100000):
    store.save(step, {"model.w": torch.full((50000,), float(step))})
    print(step, flush=True)
"""


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, after):
    with subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as saver:
        told = [int(saver.stdout.readline()) for _ in range(after)][-1]
        saver.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) for line in saver.stdout)])
    loaded = store(tmp_path).load_newest(lambda reason: None)
    assert loaded.step in (told, told + 1)
    assert set(loaded.tensors["model.w"].tolist()) == {float(loaded.step)}
    store(tmp_path, keep=2).save(told + 2, numbers(told + 2))
    assert store(tmp_path).load_newest(pytest.fail).step == told + 2


def test_the_background_writer_tells_what_it_wrote(tmp_path):
    saved: list[dict] = []
    writer = BackgroundWriter(store(tmp_path), saved.append)
    for step in (1, 2):
        writer.submit(step, lambda step=step: numbers(step))
    writer.wait()
    assert not writer.busy
    assert [s["step"] for s in saved] == [1, 2]
    assert saved[0]["bytes"] == (tmp_path / "step-1" / STATE).stat().st_size
    assert all(s["stall_s"] >= 0 and s["write_s"] > 0 for s in saved)
    assert store(tmp_path).load_newest(pytest.fail).step == 2
    writer.wait()


@pytest.mark.parametrize("through", ["wait", "submit"])
def test_errors_of_the_background_writer_surface(tmp_path, monkeypatch, through):
    writer = BackgroundWriter(store(tmp_path), pytest.fail)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    writer.submit(1, lambda: numbers(1))
    with pytest.raises(OSError, match="No space left"):
        writer.wait() if through == "wait" else writer.submit(2, lambda: numbers(2))
