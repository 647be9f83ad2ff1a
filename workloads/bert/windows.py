"""Short sequences for the first part of a run: a window of each packed sequence, another one in the next epoch.

Devlin et al. 2019 (arXiv:1810.04805), A.2: 90 % of the steps with 128 tokens, the rest with 512, in batches of as many
sequences. A sample stays what it is, a packed sequence, and comes once an epoch, so that the order of samples and an
epoch's length do not depend on this; a short step trains on one window of each. The windows of a sequence cover it.
"""

import numpy as np
from numpy.typing import NDArray


def starts(length: int, short: int) -> NDArray[np.int64]:
    """Where the windows begin in a sequence of `length` tokens, without the special ones at the ends of both.

    As few windows as cover it, evenly spread: the first begins after [CLS], the last ends before [SEP].
    """
    inside, piece = length - 2, short - 2
    count = -(-inside // piece)
    begins: NDArray[np.int64] = 1 + np.arange(count) * (inside - piece) // max(1, count - 1)
    return begins


def window(tokens_BT: NDArray[np.int32], short: int, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int32]:
    """The windows of this epoch, [B, short], each between its sequence's own special tokens.

    Args:
        indices: the sequences' numbers [B]; neighbours have different windows, so that a step has all of them.
    """
    begins = starts(tokens_BT.shape[1], short)
    first_B = begins[(indices + epoch) % len(begins)]
    columns = first_B[:, None] + np.arange(short - 2)
    inside = np.take_along_axis(tokens_BT, columns, axis=1)
    return np.concatenate([tokens_BT[:, :1], inside, tokens_BT[:, -1:]], axis=1)
