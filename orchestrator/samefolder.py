"""Whether all machines have one and the same run folder: a checkpoint is read by others than have written it."""

import logging
import os
import time

from orchestrator.errors import OrchestratorError, UserError, one_line
from orchestrator.nodewatch import psutil_of_ray
from orchestrator.runfolder import OWNER
from orchestrator.storage import PATIENCE_S, Folder

SEEN_WITHIN_S, LOOK_EVERY_S = 90.0, 1.0  # NFS may answer from what it knew of a folder for a minute (man nfs, acdirmax)
OWN_DISKS = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
log = logging.getLogger("orchestrator.samefolder")


def check_same_storage(uri: str, token: str, host: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until this machine sees whose run the folder at `uri` is; raises UserError where it has another folder.

    Also where it may not write to object storage: it may be its turn to write a checkpoint at any time.

    Args:
        token: what the run's coordinator has put into it (RunFolder.take_ownership).
        host: this machine, for people.
        patience_s: see Folder.
    """
    try:
        folder = Folder(uri, patience_s=patience_s)
        if not folder.is_local:
            folder.check_writable()
        if _owner(folder) == token:
            return
    except OrchestratorError as error:
        same = "give its machine the keys and the way to it that the command's has"
        raise UserError(f"{host} cannot use the run's folder ({one_line(error)}); {same}") from None
    until_s = time.monotonic() + (0.0 if folder.is_local and on_own_disk(folder.uri) else SEEN_WITHIN_S)
    while _owner(folder) != token:
        if time.monotonic() >= until_s:
            raise UserError(
                f"--storage {os.path.dirname(folder.uri)}: {host} does not see this run's folder in it, which the "
                "machine of the command has; give a folder that all nodes share, or s3://bucket/runs"
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
