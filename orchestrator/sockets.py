"""The TCP connections of this process, and a way to end those of a gloo process group.

gloo cannot abort a collective: it waits for its timeout when a peer is frozen or cut off. A connection that is shut
down makes every collective on it fail at once, here and at the other end.
"""

import contextlib
import os
import socket
from dataclasses import dataclass

import torch.distributed as dist

Address = tuple[str, int]


def family_of(host: str) -> socket.AddressFamily:
    """Of an address, as Ray tells it."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@dataclass(frozen=True)
class Connection:
    """A TCP socket: `peer` is None for a listening one."""

    descriptor: int
    local: Address
    peer: Address | None


def connections() -> dict[str, Connection]:
    """This process's TCP sockets by their inode (Linux; empty elsewhere)."""
    found: dict[str, Connection] = {}
    if not os.path.isdir("/proc/self/fd"):
        return found
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed while we look
            inode = os.readlink(f"/proc/self/fd/{name}")
            if inode.startswith("socket:"):
                connection = _look(int(name))
                if connection:
                    found[inode] = connection
    return found


def _look(descriptor: int) -> Connection | None:
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.type != socket.SOCK_STREAM:
            return None
        local = _plain(copy.getsockname())
        if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return Connection(descriptor, local, None)
        return Connection(descriptor, local, _plain(copy.getpeername()))


def _plain(address: tuple[str, int]) -> Address:
    return address[0].removeprefix("::ffff:"), address[1]


def shut_down(inode: str, connection: Connection) -> None:
    """End a connection both ways; whoever waits on it gets an error. `inode`: its key in `connections`."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.descriptor)) as copy:
        # The descriptor may have been closed since, and stand for another socket now.
        if os.readlink(f"/proc/self/fd/{copy.fileno()}") == inode:
            copy.shutdown(socket.SHUT_RDWR)


class Lines:
    """The connections of a process group of gloo and of its store; what is not known cannot be cut."""

    def __init__(self) -> None:
        self._foreign: frozenset[str] = frozenset()
        self._servers: set[Address] = set()

    def begin(self, store: Address) -> None:
        """Before the process group is built: what is connected by now is not its own."""
        self._foreign = frozenset(connections())
        self._servers.add(store)

    def learn(self, store: dist.Store, groups: str, rank: int, world: int) -> None:
        """Where gloo's connections between these workers are answered; every worker calls it alike."""
        mine = [c.local for inode, c in connections().items() if c.peer is None and inode not in self._foreign]
        store.set(f"answers-{groups}-{rank}", ",".join(f"{host} {port}" for host, port in mine))
        for text in store.multi_get([f"answers-{groups}-{other}" for other in range(world)]):
            for item in filter(None, text.decode().split(",")):
                host, port = item.split(" ")
                self._servers.add((host, int(port)))

    def cut(self) -> None:
        """End those between workers."""
        for inode, connection in connections().items():
            ours = connection.local in self._servers or connection.peer in self._servers
            if inode not in self._foreign and connection.peer is not None and ours:
                shut_down(inode, connection)

    def cut_store(self) -> None:
        """End that to the store, which was connected before."""
        for inode, connection in connections().items():
            if inode in self._foreign and connection.peer in self._servers:
                shut_down(inode, connection)
