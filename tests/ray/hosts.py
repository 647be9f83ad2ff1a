"""Several hosts on this machine: network namespaces on a bridge that has one of its own. Needs root and iproute2."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from commands import RAY, begin, call, wait_until

NOT_HERE = "" if os.geteuid() == 0 and shutil.which("ip") else "network namespaces need root and iproute2"


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


class Hosts:
    """Hosts 0, 1, ... at 10.77.0.11, 10.77.0.12, ...; each with a Ray of its own, if any."""

    def __init__(self, count: int, folder: Path) -> None:
        self._folder = folder
        self._switch = f"sw{os.getpid()}"
        self._names = [f"h{os.getpid()}-{number}" for number in range(count)]

    def build(self) -> None:
        """Namespaces, a bridge, and a cable to each host."""
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self._switch, "link", "set", "br0", "up")
        for number, name in enumerate(self._names):
            ip("netns", "add", name)
            cable = f"link add v0 netns {name} type veth peer name p{number} netns {self._switch}"
            ip("-n", self._switch, *cable.split())
            ip("-n", self._switch, *f"link set p{number} master br0".split())
            ip("-n", self._switch, "link", "set", f"p{number}", "up")
            ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "v0")
            for device in ("v0", "lo"):
                ip("-n", name, "link", "set", device, "up")

    def address(self, number: int) -> str:
        return f"10.77.0.{11 + number}"

    def on(self, number: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host."""
        return ["ip", "netns", "exec", self._names[number], *command]

    def plug(self, number: int, state: str) -> None:
        """Cut a host off ("down") at the switch, or at its own end too if it did so itself; or back ("up")."""
        ip("-n", self._switch, "link", "set", f"p{number}", state)
        if state == "up":
            ip("-n", self._names[number], "link", "set", "v0", "up")

    def is_up(self, number: int) -> bool:
        """Whether a host's own end of its cable is up."""
        return "LOWER_UP" in ip("-n", self._names[number], "-o", "link", "show", "v0")

    def start_ray(self, number: int, cpus: int) -> str:
        """`ray start` on a host: the head on host 0; returns the cluster's address."""
        temp = self._folder / f"ray{number}"
        temp.mkdir(exist_ok=True)
        port, head = 6379, number == 0
        address = f"{self.address(0)}:{port}"
        joins = ["--head", f"--port={port}", "--include-dashboard=false"] if head else [f"--address={address}"]
        own = [f"--node-ip-address={self.address(number)}", f"--num-cpus={cpus}", f"--temp-dir={temp}"]
        limits = ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        done = call(self.on(number, [RAY, "start", *joins, *own, *limits]), 120, RAY_AUTH_MODE="token")
        assert done.status == 0, done.out + done.err
        return address

    def start(self, number: int, command: Sequence[str]) -> "subprocess.Popen[str]":
        """A command on a host; see commands.finish."""
        return begin(self.on(number, command), RAY_AUTH_MODE="token")

    def processes(self, number: int) -> list[int]:
        """Ids of what runs on a host."""
        return [int(word) for word in ip("netns", "pids", self._names[number]).split()]

    def end(self, number: int) -> None:
        """SIGKILL to all that runs on a host."""

        def none_left() -> bool:
            for pid in self.processes(number):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self.processes(number)

        wait_until(none_left, 30, f"the processes of host {number} to end")

    def take_down(self) -> None:
        known = ip("netns", "list").split()
        for number, name in enumerate(self._names):
            if name in known:
                self.end(number)
                ip("netns", "delete", name)
        if self._switch in known:
            ip("netns", "delete", self._switch)


H = TypeVar("H", bound=Hosts)


@contextlib.contextmanager
def built(kind: type[H], count: int) -> Iterator[H]:
    """`count` hosts that can reach each other and nothing else; gone at the end, with all that runs on them."""
    folder = Path(f"/tmp/h-{os.getpid()}")  # short: sockets live in it
    folder.mkdir()
    made = kind(count, folder)
    try:
        made.build()
        yield made
    finally:
        made.take_down()
        shutil.rmtree(folder, ignore_errors=True)
