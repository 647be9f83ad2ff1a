"""Hosts of hosts.py as whole machines: own processes, files and an SSH server. Needs root and openssh-server."""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import hosts
from commands import Done, begin, call, wait_until
from hosts import Hosts

SSHD = "/usr/sbin/sshd"
NEEDS = ("ip", "unshare", "rsync", "ssh", "ssh-keygen")
MISSING = [*(program for program in NEEDS if not shutil.which(program)), *([] if Path(SSHD).exists() else ["sshd"])]
NOT_HERE = hosts.NOT_HERE or (f"not installed: {', '.join(MISSING)}" if MISSING else "")

# Its own mounts: a home for root, and a /tmp/ray; then the SSH server, whose end is the machine's.
BOOT = """set -e
hostname {name}
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/ray /tmp/ray
mkdir -p /run/sshd
exec {sshd} -D -e -f {folder}/sshd_config
"""
SSHD_CONFIG = """ListenAddress {address}
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {key}.pub
PidFile none
UsePAM no
StrictModes no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
"""


def _key(file: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True, timeout=30)
    return file


def _virtual_environment(folder: Path) -> None:
    """What `python3.11 -m venv` makes, with the packages of this one to be found: 1.8 GB a machine are not copied."""
    python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    found = folder / "lib" / python.name / "site-packages" / "packages-of-the-tests.pth"
    found.write_text(sysconfig.get_path("purelib") + "\n")
    for command, module in (("ray", "ray.scripts.scripts"), ("pip", "pip._internal.cli.main")):
        script = folder / "bin" / command
        script.write_text(f"#!{folder}/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)


class Machines(Hosts):
    """Hosts 0, 1, ... with sshd, that root enters with `key`; the last one is where a user sits, and has none."""

    def __init__(self, count: int, folder: Path) -> None:
        super().__init__(count + 1, folder)
        self.desk = count
        self.key = folder / "key"
        self.shared = folder / "shared"

    def build(self) -> None:
        super().build()
        self.shared.mkdir()
        _key(self.key)
        self._fetch_build_tools()
        Path("/tmp/ray").mkdir(exist_ok=True)
        for number in range(self.desk + 1):
            # Nobody is there: it is the route by which Ray finds its machine's address.
            hosts.ip("-n", self._names[number], *["route", "add", "default", "via", "10.77.0.1", "dev", "v0"])
            self.home(number).mkdir(parents=True)
        self._servers = [self._boot(number) for number in range(self.desk)]
        for number in range(self.desk):
            wait_until(lambda n=number: self.ssh(n, "true").status == 0, 30, f"machine {number} to answer")

    def home(self, number: int) -> Path:
        return self._folder / f"m{number}/home"

    def _fetch_build_tools(self) -> None:
        """The machines reach no package index; pip builds the package with what lies in a folder."""
        self._wheels = self._folder / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(self._wheels)]
        subprocess.run([*command, "setuptools>=77"], check=True, timeout=120)

    def _boot(self, number: int) -> "subprocess.Popen[str]":
        folder, home = self._folder / f"m{number}", self.home(number)
        (folder / "ray").mkdir()
        users = Path("/etc/passwd").read_text().splitlines()
        mine = [f"root:x:0:0:root:{home}:/bin/bash" if user.startswith("root:") else user for user in users]
        (folder / "passwd").write_text("\n".join(mine) + "\n")
        (home / ".bashrc").write_text("# of this machine\n")
        (home / ".profile").write_text(". ~/.bashrc\n")
        (home / ".config/pip").mkdir(parents=True)
        (home / ".config/pip/pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {self._wheels}\n")
        _virtual_environment(home / "venv")
        _key(folder / "host_key")
        own = {"folder": folder, "address": self.address(number), "key": self.key, "name": f"m{number}", "sshd": SSHD}
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(**own))
        (folder / "boot.sh").write_text(BOOT.format(**own))
        apart = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "bash"]
        return begin(self.on(number, [*apart, str(folder / "boot.sh")]))

    def ssh(self, number: int, command: str) -> Done:
        """A command on a machine, from the desk."""
        return self.call(self.login(number, command), 60)

    def login(self, number: int, command: str) -> list[str]:
        """What is typed at the desk to run a command on a machine."""
        quiet = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        where = f"root@{self.address(number)}"
        return ["ssh", "-i", str(self.key), *quiet, "-o", "ConnectTimeout=5", where, command]

    def call(self, command: Sequence[str], timeout_s: float) -> Done:
        """A command at the desk, to its end."""
        return call(self.on(self.desk, command), timeout_s, **self._at_desk())

    def begin(self, command: Sequence[str]) -> "subprocess.Popen[str]":
        """A command at the desk; see commands.finish."""
        return begin(self.on(self.desk, command), **self._at_desk())

    def _at_desk(self) -> dict[str, str]:
        return {"HOME": str(self.home(self.desk)), "RAY_AUTH_MODE": "token", "USER": "root"}

    def take_down(self) -> None:
        super().take_down()
        for server in getattr(self, "_servers", []):
            server.communicate(timeout=30)
