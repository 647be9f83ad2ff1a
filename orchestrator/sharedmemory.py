"""Memory that the workers of one machine see, which vanishes with them: no name, no file, nothing to clean up."""

import contextlib
import mmap
import os
import secrets

import torch
from torch import Tensor

from orchestrator.group import Group

HEADER_BYTES = 64  # a secret that tells one worker's memory from that of another machine under the same numbers
FLOAT_BYTES = 4
Offer = tuple[int, int, int, bytes]  # network namespace, process, its descriptor, the secret


def share(group: Group, floats: list[int]) -> tuple[list[list[int]], dict[int, Tensor]]:
    """One fp32 vector of every worker, which all workers of its team read and write; every worker calls it.

    A team are those that can open each other's memory: not workers of several machines, nor of containers that do not
    see each other's processes, nor on systems other than Linux; nor where their networks are different ones, for then
    they can be lost one by one. Pages take memory when they are first written. A vector lives as long as some worker
    holds it.

    Args:
        group: the workers.
        floats: how long each rank's vector is.

    Returns:
        The ranks of every team, and the vectors of this worker's team by rank.
    """
    own = _create(floats[group.rank])
    try:
        offers = group.gather_objects(own)
        opened = [_open(offer, length) for offer, length in zip(offers, floats, strict=True)]
        seen = group.gather_objects([rank for rank, vector in enumerate(opened) if vector is not None])
    finally:
        if own is not None:
            os.close(own[2])
    teams = _teams(seen)
    team = next(team for team in teams if group.rank in team)
    found = {rank: vector for rank, vector in enumerate(opened) if vector is not None and rank in team}
    if len(team) == 1:  # ordinary memory comes in larger pages
        found = {group.rank: torch.empty(floats[group.rank])}
    return teams, found


def _teams(seen: list[list[int]]) -> list[list[int]]:
    """Workers who all see each other, from whom each of them sees."""
    teams: list[list[int]] = []
    for rank, ranks in enumerate(seen):
        for team in teams:
            if all(other in ranks and rank in seen[other] for other in team):
                team.append(rank)
                break
        else:
            teams.append([rank])
    return teams


def _create(floats: int) -> Offer | None:
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("gradients", os.MFD_CLOEXEC)
    os.truncate(descriptor, HEADER_BYTES + floats * FLOAT_BYTES)
    secret = secrets.token_bytes(HEADER_BYTES)
    os.pwrite(descriptor, secret, 0)
    return _network(), os.getpid(), descriptor, secret


def _network() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def _open(offer: Offer | None, floats: int) -> Tensor | None:
    if offer is None or offer[0] != _network():
        return None
    _, process, number, secret = offer
    size = HEADER_BYTES + floats * FLOAT_BYTES
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            if os.fstat(descriptor).st_size != size or os.pread(descriptor, HEADER_BYTES, 0) != secret:
                return None
            memory = mmap.mmap(descriptor, size)
        except OSError:  # no such process here, or not ours to look into
            return None
    return torch.frombuffer(memory, dtype=torch.float32, offset=HEADER_BYTES, count=floats)
