"""Sums of gradients by collectives alone, as NCCL wants them: every worker calls them in the same order.

Each worker receives its chunk of every block (all-to-all), adds up the chunks, and the sums are gathered. On a GPU all
this is queued on a stream beside that of the backward pass.
"""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.group import Group
from orchestrator.shards import Block, Placement
from orchestrator.tree import Bucket, fold


class HalvesSum:
    """Two workers, one half of the tree each: a plain all-reduce has the same bits, for a + b = b + a."""

    common = False

    def __init__(self, group: Group, buckets: list[Bucket]) -> None:
        self._group, self._buckets = group, buckets
        self._works: list[dist.Work] = []
        for bucket in buckets:
            bucket.total = torch.zeros(bucket.numel, device=group.device)
            bucket.blocks = bucket.total.view(1, -1)

    def start(self) -> None:
        self._works.clear()

    def launch(self, number: int, place: int) -> None:
        self._works.append(self._group.start_sum(self._buckets[number].total))

    def finish(self) -> None:
        for work in self._works:
            self._group.wait(work)

    def close(self) -> None:
        pass


class Exchange:
    """Any placement."""

    common = False

    def __init__(self, group: Group, placement: Placement, buckets: list[Bucket]) -> None:
        self._group, world = group, group.world
        everyone = [placement.blocks_of(rank) for rank in range(world)]
        self._order: list[Block] = [block for blocks in everyone for block in blocks]
        self._counts = [len(blocks) for blocks in everyone]
        self._stream = torch.cuda.Stream(group.device) if group.device.type == "cuda" else None
        self._works: list[dist.Work] = []
        self._rooms: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # by bucket: blocks, sent, received, total
        for bucket in buckets:
            chunk, own = -(-bucket.numel // world), self._counts[group.rank]
            blocks = torch.zeros(own, world * chunk, device=group.device)
            total = torch.empty(world * chunk, device=group.device)
            bucket.blocks, bucket.total = blocks[:, : bucket.numel], total[: bucket.numel]
            sent = torch.empty(world, own, chunk, device=group.device)
            received = torch.empty(len(self._order), chunk, device=group.device)
            self._rooms.append((blocks, sent, received, total))

    def start(self) -> None:
        self._works.clear()

    def launch(self, number: int, place: int) -> None:
        world, rank = self._group.world, self._group.rank
        if place < self._counts[rank] - 1:
            return  # the others do not exchange anything yet
        blocks, sent, received, total = self._rooms[number]
        chunk = received.shape[1]
        with self._beside():
            sent.copy_(blocks.view(-1, world, chunk).transpose(0, 1))
            counts = [count * chunk for count in self._counts]
            own = [self._counts[rank] * chunk] * world
            self._group.wait(self._group.start_exchange(received.view(-1), sent.view(-1), counts, own))
            fold(self._order, list(received), received[0])
            self._works.append(self._group.start_gather(total, received[0]))

    def _beside(self) -> contextlib.AbstractContextManager[object]:
        """What is queued within runs after what has been queued so far, and beside what will be."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._group.device))
        return torch.cuda.stream(self._stream)

    def finish(self) -> None:
        for work in self._works:
            self._group.wait(work)

    def close(self) -> None:
        pass
