"""The TCP connections of this process, and a way to end those of a gloo process group.

gloo cannot abort a collective: it waits for its timeout when a peer is frozen or cut off. A connection that is shut
down makes every collective on it fail at once, here and at the other end.
"""

import contextlib
import os
import socket
from dataclasses import dataclass

Address = tuple[str, int]


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
