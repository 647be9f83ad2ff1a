"""What a server that is away for a moment is asked again, by who reads a mounted folder or object storage."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import one_line

T = TypeVar("T")
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
AWAY = {errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EAGAIN}
log = logging.getLogger("orchestrator.patience")


def mount_is_away(error: OSError) -> bool:
    """Whether the server of a mounted folder does not answer, which may pass."""
    return error.errno in AWAY


def patiently(do: Callable[[], T], is_away: Callable[[OSError], bool], patience_s: float, name: str) -> T:
    """What `do` returns, which is done again while the server that it asks is away.

    Raises:
        OSError: of `do`, for another reason, or `patience_s` seconds after it has failed for the first time.
    """
    until_s, pauses_s = 0.0, iter(PAUSES_S)
    while True:
        try:
            return do()
        except OSError as error:
            until_s = until_s or time.monotonic() + patience_s
            if not is_away(error) or time.monotonic() >= until_s:
                raise
            log.warning("%s does not answer; asking again: %s", name, one_line(error))
        time.sleep(next(pauses_s, PAUSES_S[-1]))
