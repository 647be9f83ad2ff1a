"""How many processes prepare samples, and how many microbatches ahead."""

import math

AHEAD = 4  # microbatches a process, as many as bridge a step that takes longer than others


def loaders(make_s: float, use_s: float, most: int) -> int:
    """Processes that keep up with training, from 1 to `most`.

    Args:
        make_s: seconds in which a process makes a microbatch.
        use_s: seconds in which training uses one up.
    """
    return max(1, min(most, math.ceil(make_s / use_s))) if use_s > 0 else most


def ahead(processes: int, microbatch_bytes: int, room_bytes: int) -> int:
    """Microbatches that may be in the works or lie ready: what fits into `room_bytes`, at least one."""
    fitting = room_bytes // microbatch_bytes if microbatch_bytes else processes
    return max(1, min(AHEAD * processes, fitting))
