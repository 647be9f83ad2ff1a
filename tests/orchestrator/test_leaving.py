"""How a command begins and ends in odd surroundings: streams, working directory, Ray's own signal handler."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVE = "from orchestrator.command import leave; import sys; leave(lambda: {})"


def leave(body: str, shell: str = "", folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A process that ends by command.leave; `shell` redirects its streams."""
    code = LEAVE.format(body)
    command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, code]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60, check=False)


@pytest.mark.parametrize(
    ("closed", "said"),
    [("", ("told\n", "more\n")), (">&-", ("", "more\n")), ("2>&-", ("told\n", "")), (">&- 2>&-", ("", ""))],
)
def test_closed_streams_do_not_spoil_an_end(closed, said):
    done = leave("print('told') or print('more', file=sys.stderr) or 3", closed)
    assert done.returncode == 3
    assert (done.stdout, done.stderr) == said


def test_what_a_terminal_cannot_show_is_written_out():
    done = leave("print(chr(0x2581), chr(0xdce9)) or 0")
    assert (done.returncode, done.stdout) == (0, "\\u2581 \\udce9\n")


def test_ray_s_own_handler_of_sigterm_is_a_stop():
    """It ends the process by sys.exit(15) (ray/_private/worker.py), while Ray starts."""
    done = leave("sys.exit(15)")
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert leave("sys.exit(14)").returncode == 14


def test_a_working_directory_that_is_gone(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    code = f"import os, shutil; shutil.rmtree({str(folder)!r}); " + LEAVE.format("print('trained') or 0")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=60, check=False,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the working directory is gone; cd to one that exists\n"
