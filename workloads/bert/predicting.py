"""A text with [MASK] made ready for an exported BERT, and its answer; tokenizers and numpy, no torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import UserError
from workloads.bert.wordpiece import MASK, PREFIX, load_tokenizer
from workloads.predicting import Arrays, Guesses, top

TOKENIZER = "tokenizer.json"


class BertPredicting:
    """See workloads.predicting.Predicting; the input is a text with [MASK] in it."""

    def __init__(self, about: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        self._tokens = int(about["tokens"])
        self._asks_documents = bool(about.get("documents"))
        self._tokenizer = load_tokenizer(files[TOKENIZER].decode())
        self._text = ""

    def inputs(self, given: str) -> Arrays:
        """{"input_ids": int64 [1, tokens], "masked": int64 [places]}, and where asked "documents", all of one."""
        try:
            given.encode()
        except UnicodeEncodeError:
            raise UserError(f"--input {given[:60]!a}: not text in UTF-8; give one that is") from None
        if MASK not in given:
            raise UserError(f"--input {given[:60]!r}: no {MASK} in it; write {MASK} where a word is to be filled in")
        ids = np.asarray(self._tokenizer.encode(given).ids, np.int64)
        if len(ids) > self._tokens:
            raise UserError(
                f"--input: {len(ids)} tokens with the two special ones at its ends; the model takes {self._tokens}: "
                "give a shorter text"
            )
        self._text = given
        places = np.flatnonzero(ids == self._tokenizer.token_to_id(MASK))
        documents = {"documents": np.zeros_like(ids[None])} if self._asks_documents else {}
        return {"input_ids": ids[None], "masked": places, **documents}

    def answers(self, output: NDArray[np.float32]) -> list[Guesses]:
        """The five most probable tokens of each place."""
        names = [self._tokenizer.id_to_token(number) or "" for number in range(output.shape[1])]
        return [top(f"{MASK} {place}", logits, names) for place, logits in enumerate(output, 1)]

    def closing(self, answers: list[Guesses]) -> str:
        """The text, filled in with the most probable tokens."""
        text = self._text
        for guesses in answers:
            word = guesses.names[0]
            before, _, after = text.partition(MASK)
            # A piece that continues a word joins the one before it.
            text = before.rstrip() + word[len(PREFIX) :] + after if word.startswith(PREFIX) else before + word + after
        return text
