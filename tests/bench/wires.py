"""Hosts on this machine for benchmarks: network namespaces on a bridge of their own, cables of a given rate. Root."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h
CAN = os.geteuid() == 0 and Path("/usr/sbin/tc").exists()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def enter(namespace: str) -> None:
    """This thread and those it starts are on that host from now on."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")


def address(number: int) -> str:
    return f"10.78.0.{11 + number}"


@contextlib.contextmanager
def hosts(count: int, rate: str = "") -> Iterator[list[str]]:
    """Names of namespaces whose host `number` is at `address(number)`, on interface v0; gone at the end.

    Args:
        rate: of each cable, either way, as tc writes it (1gbit); empty: as fast as the kernel copies.
    """
    switch, names = f"bw{os.getpid()}", [f"b{os.getpid()}-{number}" for number in range(count)]
    made: list[str] = []
    try:
        for name in (switch, *names):
            ip("netns", "add", name)
            made.append(name)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names):
            cable = f"link add v0 netns {name} type veth peer name p{number} netns {switch}"
            ip("-n", switch, *cable.split())
            ip("-n", switch, *f"link set p{number} master br0".split())
            ip("-n", switch, "link", "set", f"p{number}", "up")
            ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", "v0")
            for device in ("v0", "lo"):
                ip("-n", name, "link", "set", device, "up")
            if rate:
                for where, device in ((name, "v0"), (switch, f"p{number}")):
                    limit = f"-n {where} qdisc add dev {device} root tbf rate {rate} burst 512kb latency 100ms"
                    subprocess.run(["tc", *limit.split()], check=True, capture_output=True, text=True, timeout=30)
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)
