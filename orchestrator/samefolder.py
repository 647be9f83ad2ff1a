"""Whether all machines have one and the same run folder: a checkpoint is read by others than have written it."""

import logging
import os
import time

from orchestrator.errors import MachineError, StorageError, UserError, one_line
from orchestrator.nodewatch import psutil_of_ray
from orchestrator.runfolder import OWNER
from orchestrator.storage import PATIENCE_S, Folder

SEEN_WITHIN_S, LOOK_EVERY_S = 90.0, 1.0  # NFS may answer from what it knew of a folder for a minute (man nfs, acdirmax)
THERE_WITHIN_S = 10.0  # an object that was replaced may be the old one for a while
OWN_DISKS = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
log = logging.getLogger("orchestrator.samefolder")


def check_same_storage(uri: str, token: str, host: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until this machine sees whose run the folder at `uri` is, and see whether it may write there.

    It may be its turn to write a checkpoint at any time.

    Args:
        token: what the run's coordinator has put into it (RunFolder.take_ownership).
        host: this machine, for people.
        patience_s: see Folder.

    Raises:
        UserError: it has another folder, or may not use it.
        MachineError: storage is away, as this machine sees it.
    """
    try:
        folder = Folder(uri, patience_s=patience_s)
        _wait_for_owner(folder, token, host)
        if not folder.is_local:
            folder.check_writable()
        elif not os.access(folder.uri, os.W_OK | os.X_OK):
            raise StorageError(f"--storage {folder.uri}: may not be written to")
    except StorageError as error:
        if error.is_away:
            raise MachineError(f"{host}: {error}") from None
        same = "give its machine the rights, and the way to it, that the command's has"
        raise UserError(f"{host} cannot use the run's folder ({one_line(error)}); {same}") from None


def _wait_for_owner(folder: Folder, token: str, host: str) -> None:
    late_s = THERE_WITHIN_S if not folder.is_local else 0.0 if on_own_disk(folder.uri) else SEEN_WITHIN_S
    until_s = time.monotonic() + late_s
    while _owner(folder) != token:
        if time.monotonic() >= until_s:
            named = f"--storage {os.path.dirname(folder.uri) if folder.is_local else folder.uri}"
            other = "give a folder that all nodes share, or s3://bucket/runs"
            if not folder.is_local:
                other = "its machine reaches another storage by this address"
            raise UserError(
                f"{named}: {host} does not see this run's folder in it, which the machine of the command has; {other}"
            )
        log.warning("waiting until this machine sees the run's folder %s", folder.uri)
        time.sleep(LOOK_EVERY_S)


def _owner(folder: Folder) -> str | None:
    try:
        return folder.read_text(OWNER)
    except OSError:
        log.warning("%s cannot be read", folder.uri, exc_info=True)
        return None


def on_own_disk(path: str) -> bool:
    """Whether `path`, or the folder that it would be in, is on this machine's own disk, which shows all at once."""
    found, kind = -1, ""
    for mount in psutil_of_ray().disk_partitions(all=True):
        at = mount.mountpoint.rstrip("/") + "/"
        if (os.path.realpath(path) + "/").startswith(at) and len(at) >= found:  # of two at one place the later counts
            found, kind = len(at), mount.fstype
    return kind in OWN_DISKS
