"""Whether a machine sees the folder of the run that it works for."""

import threading

import pytest

from orchestrator import samefolder
from orchestrator.errors import UserError
from orchestrator.runfolder import RunFolder
from orchestrator.samefolder import check_same_storage, on_own_disk
from orchestrator.storage import Folder


def test_who_sees_the_owner_goes_on(tmp_path):
    RunFolder(Folder(str(tmp_path))).take_ownership("mine")
    check_same_storage(str(tmp_path), "mine", "here")


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an earlier run's"])
def test_another_folder_of_that_name_is_refused_at_once(tmp_path, there):
    if there:
        RunFolder(Folder(str(tmp_path / "run"))).take_ownership("another")
    assert on_own_disk(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"h7 does not see this run's folder in it.*all nodes share") as refused:
        check_same_storage(str(tmp_path / "run"), "mine", "h7")
    assert str(refused.value).startswith(f"--storage {tmp_path}: ")
    assert refused.value.exit_status == 2


def test_what_a_server_shows_late_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(samefolder, "on_own_disk", lambda path: False)
    monkeypatch.setattr(samefolder, "SEEN_WITHIN_S", 30.0)
    monkeypatch.setattr(samefolder, "LOOK_EVERY_S", 0.01)
    waiting = threading.Thread(target=check_same_storage, args=(str(tmp_path), "mine", "here"))
    waiting.start()
    while "waiting until this machine sees" not in caplog.text:
        assert waiting.is_alive()
    RunFolder(Folder(str(tmp_path))).take_ownership("mine")
    waiting.join(30)
    assert not waiting.is_alive()
    monkeypatch.setattr(samefolder, "SEEN_WITHIN_S", 0.05)
    with pytest.raises(UserError, match="does not see"):
        check_same_storage(str(tmp_path), "other", "here")


def test_a_mounted_folder_is_no_own_disk(monkeypatch, tmp_path):
    from types import SimpleNamespace

    mounts = [("/", "ext4"), (str(tmp_path), "nfs4"), (str(tmp_path / "disk"), "xfs"), (str(tmp_path), "nfs4")]
    found = [SimpleNamespace(mountpoint=at, fstype=kind) for at, kind in mounts]
    fake = SimpleNamespace(disk_partitions=lambda all: found)
    monkeypatch.setattr(samefolder, "psutil_of_ray", lambda: fake)
    kinds = {
        name: on_own_disk(str(tmp_path / name)) for name in ("", "runs/x", "disk", "disk/x", "diskette", "../beside")
    }
    assert kinds == {"": False, "runs/x": False, "disk": True, "disk/x": True, "diskette": False, "../beside": True}
