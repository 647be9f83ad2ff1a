"""Text as tables of packed token sequences (column tokens): the tokenizer first, then any part by itself.

Each part packs its own documents by the rule of data.py, so that a part loses at most one incomplete piece a split.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.digest import digest
from orchestrator.errors import UserError
from orchestrator.settings import settings
from orchestrator.tables import SPLITS
from workloads.bert.cache import build_entry
from workloads.bert.config import BertConfig
from workloads.bert.corpus import Corpus, find_corpus, is_heldout, paragraphs
from workloads.bert.data import MORE_TEXT, check_settings, entropy, pack, tokenizer_of
from workloads.bert.wordpiece import CLS, SEP, Vocabulary, build_tokenizer, load_tokenizer, token_ids
from workloads.preparation import Made, Part, changed

Counts = NDArray[np.int64]
TRAINED = "vocabulary.json"
TOLD_EVERY_S = 5.0
RULES = 1  # by which a vocabulary is trained


@dataclass(frozen=True)
class TextPreparation:
    """The Preparation of text.

    Attributes:
        tokenizer_json: as `tokenizers` serializes it.
        vocabulary: the tokens by id.
    """

    config: BertConfig
    tokenizer_json: str
    vocabulary: tuple[str, ...]
    compression: str = "zstd"

    def parts(self, file_bytes: int) -> Sequence[Part]:
        """See Preparation: stretches of files, or all of Python's documentation."""
        corpus = find_corpus(self.config.data)
        if corpus.kind == "docs":
            return [{"files": [], "of": platform.python_version()}]
        parts: list[Part] = [{"files": []}]
        room = file_bytes
        for path, size, changed_ns in corpus.facts():
            start = 0
            while start < size:
                if room <= 0:
                    parts.append({"files": []})
                    room = file_bytes
                stop = min(size, start + room)
                parts[-1]["files"].append([path, changed_ns, size, start, stop])
                room, start = room - (stop - start), stop
        return parts

    def things(self) -> int:
        """Text that cannot be read is a mistake of the user's, not a broken document."""
        return 0

    def more(self) -> str:
        return f"{MORE_TEXT}, or a larger --file-mb"

    def make(self, part: Part) -> Made:
        """See Preparation."""
        import pyarrow as pa

        tokenizer, known = load_tokenizer(self.tokenizer_json), Vocabulary(self.vocabulary)
        length = self.config.sequence_length
        documents, tables, counts = list(self._documents(part)), {}, np.zeros(len(known), np.int64)
        for split in SPLITS:
            texts = (text for text in documents if is_heldout(text) == (split == "heldout"))
            packed = list(pack(token_ids(tokenizer, texts), length, known.id(CLS), known.id(SEP)))
            if not packed:
                continue
            tokens = np.concatenate(packed)
            if split == "train":
                counts += np.bincount(tokens.reshape(-1), minlength=len(known))
            column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), length)
            tables[split] = pa.table({"tokens": column})
        counts[list(known.special_ids)] = 0
        return Made(tables, notes={"counts": {str(i): int(n) for i, n in enumerate(counts) if n}})

    def _documents(self, part: Part) -> Iterator[str]:
        if not part["files"]:
            if part.get("of", platform.python_version()) != platform.python_version():
                raise changed(self.config.data)
            yield from find_corpus(self.config.data).documents()
        for path, _, size, start, stop in part["files"]:
            try:
                same = os.stat(path).st_size == size
            except OSError:
                same = False
            if not same:
                raise changed(self.config.data)
            yield from paragraphs(Path(path), start, stop)

    def folded(self, sofar: Counts | None, notes: Mapping[str, Any]) -> Counts:
        """See Preparation: how often each token is there, int64 [vocabulary]."""
        counts = np.zeros(len(self.vocabulary), np.int64) if sofar is None else sofar
        for token, count in notes["counts"].items():
            counts[int(token)] += count
        return counts

    def about(self, folded: Counts | None) -> dict[str, Any]:
        counts = np.zeros(len(self.vocabulary), np.int64) if folded is None else folded
        if not counts.any():
            raise UserError(f"--source {self.config.data}: the tokenizer knows no word of it; give another")
        return {
            "sequence_length": self.config.sequence_length,
            "vocabulary": list(self.vocabulary),
            "tokenizer_json": self.tokenizer_json,
            "unigram_entropy": entropy(counts),
            "ordinary_tokens": int(counts.sum()),
        }

    def run_flags(self) -> list[str]:
        """See Preparation."""
        length = self.config.sequence_length
        return [] if length == settings(BertConfig)["sequence_length"].default else ["--sequence-length", str(length)]


def preparation(config: BertConfig) -> TextPreparation:
    """Trains the tokenizer, or reads it; raises UserError where settings or text cannot be used."""
    check_settings(config)
    if config.data.startswith("parquet:"):
        raise UserError(f"--source {config.data}: is prepared already; give what it was prepared from")
    corpus = find_corpus(config.data)
    for path in corpus.files:
        if not os.access(path, os.R_OK):
            raise UserError(f"--source {config.data}: {path} cannot be read; give files that can be")
    tokenizer, vocabulary = tokenizer_of(config, corpus) if config.tokenizer else _trained(config, corpus)
    return TextPreparation(config, tokenizer.to_str(), vocabulary.tokens)


def _trained(config: BertConfig, corpus: Corpus) -> tuple[Any, Vocabulary]:
    """A tokenizer trained on the corpus, once: a job that goes on, or finds all done, does not read it all again."""
    facts = corpus.facts()

    def train(folder: Path) -> None:
        size = sum(bytes for _, bytes, _ in facts) / 1e6
        print(f"training a vocabulary of up to {config.vocab_size:,} WordPieces on {size:,.0f} MB", flush=True)
        vocabulary = tokenizer_of(config, corpus, lambda texts: _told(texts, size))[1]
        (folder / TRAINED).write_text(json.dumps(vocabulary.tokens), encoding="utf-8")

    folder = build_entry(digest(["vocabulary", RULES, version("tokenizers"), config.vocab_size, facts]), train)
    vocabulary = Vocabulary(tuple(json.loads((folder / TRAINED).read_text(encoding="utf-8"))))
    return build_tokenizer(vocabulary.tokens), vocabulary


def _told(texts: Iterator[str], size_mb: float) -> Iterator[str]:
    """The texts, with a line every few seconds about how much of them was read."""
    read, said_s = 0, time.monotonic()
    for text in texts:
        yield text
        read += len(text.encode())
        if time.monotonic() - said_s > TOLD_EVERY_S:
            said_s = time.monotonic()
            print(f"read {read / 1e6:,.0f} of {size_mb:,.0f} MB for the vocabulary", flush=True)
