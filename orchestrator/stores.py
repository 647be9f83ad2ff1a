"""Where the members of a generation meet: each worker serves a TCPStore, for any may be rank 0 of the next one."""

import datetime
import socket
from typing import Any

import torch.distributed as dist

from orchestrator.sockets import Address, family_of

REACH_S = 5.0  # it listens before anyone is sent to it
CONNECT_TIMEOUT_S = 20.0


class PeerLostError(RuntimeError):
    """The generation is over: another worker is lost, or the coordinator ended it. Nothing was updated."""


def reach_store(address: Address) -> dist.TCPStore:
    """A client of another worker's TCPStore; raises PeerLostError if nobody serves it."""
    try:
        store = dist.TCPStore(*address, is_master=False, timeout=datetime.timedelta(seconds=REACH_S))
    except RuntimeError as error:
        raise PeerLostError(f"the store of rank 0 cannot be reached: {error}") from error
    store.set_timeout(datetime.timedelta(seconds=CONNECT_TIMEOUT_S))
    return store


class OwnStore:
    """The TCPStore that a worker serves: any may be rank 0 of the next generation.

    Attributes:
        address: where others reach it.
    """

    def __init__(self, host: str) -> None:
        listener = socket.create_server((host, 0), family=family_of(host))
        self.address: Address = (host, listener.getsockname()[1])
        listening: Any = listener.detach()
        self.store = dist.TCPStore(*self.address, is_master=True, wait_for_workers=False, master_listen_fd=listening)
