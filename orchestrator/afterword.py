"""Tells how a command ended that cannot: it was killed, or Ray ended its process, the Ray of its machine being lost.

A child of the command waits at a pipe. If the command says farewell, it is silent.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FAREWELL = b"farewell\n"
GONE = "the command's process ended without a word: it was killed, or the Ray of its machine is gone (see logs/ray.log)"


def scratch_prefix(pid: int) -> str:
    """How the name of a command's temporary folder begins."""
    return f"orchestrator-ray-{pid}-"


@contextlib.contextmanager
def afterword(workload: str, storage: str, name: str) -> Iterator[None]:
    """While this lasts, an end without a word is told on stderr: what is kept and the command that goes on."""
    command = [sys.executable, "-m", "orchestrator.afterword", workload, storage, name, str(os.getpid())]
    # A session of its own: Ctrl-C is the command's.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):  # somebody has stopped the child
            child.communicate(FAREWELL)


def main(workload: str, storage: str, name: str, pid: str) -> None:
    """Wait for the end of the command, whose process is `pid`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `ray job stop` sends it to the command and all that it started
    if sys.stdin.buffer.read() == FAREWELL:
        return
    from orchestrator.failure import Failure, resume_command, story
    from orchestrator.lastwords import kept
    from orchestrator.runfolder import RunFolder
    from orchestrator.storage import Folder

    folder = RunFolder(Folder(storage).child(name))
    found = kept(Failure("command_lost", GONE), folder, resume_command(workload, storage, name))
    with contextlib.suppress(OSError):  # its terminal may be gone too
        print("\n".join(["", *story(found, folder.uri)]), file=sys.stderr, flush=True)
    for left in Path(tempfile.gettempdir()).glob(f"{scratch_prefix(int(pid))}*"):
        shutil.rmtree(left, ignore_errors=True)  # Ray's last processes may be in it still


if __name__ == "__main__":
    main(*sys.argv[1:])
