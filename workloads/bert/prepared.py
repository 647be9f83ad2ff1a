"""What the manifest of prepared text says of it, checked; without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from orchestrator.errors import UserError
from orchestrator.tables import Manifest
from workloads.bert.config import SHORTEST
from workloads.bert.wordpiece import SPECIAL, load_tokenizer


@dataclass(frozen=True)
class About:
    """See data.Prepared.

    Attributes:
        sequence_length: tokens of every sequence.
        ordinary_tokens: of the whole training split.
    """

    sequence_length: int
    vocabulary: Sequence[str]
    tokenizer_json: str
    unigram_entropy: float
    ordinary_tokens: int


def about(manifest: Manifest) -> About:
    """Raises UserError where the manifest lacks something, or has something else in its place."""
    try:
        found = About(*(manifest.about[field.name] for field in fields(About)))
        _check(found)
    except (KeyError, TypeError, ValueError):
        raise UserError("--data parquet: its manifest does not describe text; prepare the data again") from None
    return found


def _check(found: About) -> None:
    """Raises TypeError or ValueError."""
    for number, least in ((found.sequence_length, SHORTEST), (found.ordinary_tokens, 1)):
        if type(number) is not int or number < least:
            raise ValueError(number)
    if not 0 <= found.unigram_entropy < math.inf:
        raise ValueError(found.unigram_entropy)
    words = found.vocabulary
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or set(SPECIAL) - set(words):
        raise ValueError("vocabulary")
    if load_tokenizer(found.tokenizer_json).get_vocab_size() > len(words):
        raise ValueError("tokenizer_json")
