"""The prepared text: checked, tokenized, packed and cached; without torch and without transformers.

The packing rule (FULL-SENTENCES of RoBERTa, Liu et al. 2019, arXiv:1907.11692, 4.2): a split's documents in
order, [SEP] after each, make one stream of tokens; sequence i is [CLS], the stream's i-th piece of
sequence_length - 2 tokens, [SEP]. Sequences therefore run across documents and are always full. The one
incomplete piece at the end of a split is dropped.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.digest import digest
from orchestrator.errors import UserError
from orchestrator.settings import parse_value, settings
from orchestrator.tables import SPLITS, Table, check_whole, read_manifest
from workloads.bert import cache, prepared
from workloads.bert.config import BertConfig
from workloads.bert.corpus import Corpus, absolute_pattern, find_corpus, fingerprint, is_heldout
from workloads.bert.wordpiece import (
    CLS,
    DOCUMENTS_AT_ONCE,
    SEP,
    Vocabulary,
    build_tokenizer,
    read_tokenizer,
    rules_beside,
    token_ids,
    tokenizer_file,
    train_vocabulary,
)
from workloads.summary import DataSummary

FORMAT = 1  # of the cached files and of every rule that decides their contents
PREFIX = "parquet:"
MORE_TEXT = "give more documents (blank lines separate them) or a smaller --sequence-length"


@dataclass(frozen=True)
class Prepared:
    """Text that is ready for training.

    Attributes:
        train, heldout: token ids, int32 [sequences, sequence_length], maps of files; or tables of them.
        vocabulary: the tokens by id.
        tokenizer_json: the tokenizer, as `tokenizers` serializes it.
        unigram_entropy: of the ordinary tokens of the training split, in nats.
        maskable: ordinary tokens of a training sequence, on average.
        summary: what the driver is told.
    """

    train: NDArray[np.int32] | Table
    heldout: NDArray[np.int32] | Table
    vocabulary: Vocabulary
    tokenizer_json: str
    unigram_entropy: float
    maskable: float
    summary: DataSummary


def check(config: BertConfig) -> DataSummary:
    """Whether the run can be trained on its data; prepares it where that was not done yet.

    Raises UserError with one line where settings or data cannot be used.
    """
    check_settings(config)
    if config.data.startswith(PREFIX):
        check_whole(config.data.removeprefix(PREFIX), "bert", config)
        return prepared_data(config).summary
    folder = _find(config, verify=False)
    return _summary(config, json.loads((folder / "about.json").read_text()))


def prepare(config: BertConfig) -> Prepared:
    """The run's data, from the cache after comparing checksums, or made now. Raises as `check` does."""
    check_settings(config)
    if config.data.startswith(PREFIX):
        return prepared_data(config)
    folder = _find(config, verify=True)
    about = json.loads((folder / "about.json").read_text())
    shape = config.sequence_length
    train, heldout = (
        np.memmap(folder / f"{split}.int32", dtype="<i4", mode="r").reshape(-1, shape) for split in SPLITS
    )
    return Prepared(
        train=train,
        heldout=heldout,
        vocabulary=Vocabulary(tuple(json.loads((folder / "vocabulary.json").read_text()))),
        tokenizer_json=(folder / "tokenizer.json").read_text(encoding="utf-8"),
        unigram_entropy=about["unigram_entropy"],
        maskable=about["maskable"],
        summary=_summary(config, about),
    )


def prepared_data(config: BertConfig) -> Prepared:
    """What orchestrator.prepare has made; raises UserError where it does not fit the settings."""
    uri = config.data.removeprefix(PREFIX)
    manifest = read_manifest(uri, "bert", config.storage_patience)  # by then `check` has found it there
    about = prepared.about(manifest)
    length = about.sequence_length
    if config.sequence_length != length:
        raise UserError(
            f"--sequence-length {config.sequence_length}: --data {config.data} has sequences of {length} tokens; "
            f"write --sequence-length {length}"
        )
    if config.tokenizer:
        raise UserError(f"--tokenizer {config.tokenizer}: --data {config.data} is tokenized already; leave it out")
    if config.vocab_size not in (settings(BertConfig)["vocab_size"].default, len(about.vocabulary)):
        words = f"has a vocabulary of {len(about.vocabulary)} already"
        raise UserError(f"--vocab-size {config.vocab_size}: --data {config.data} {words}; leave it out")
    train, heldout = (Table(uri, manifest, split, config) for split in SPLITS)
    vocabulary, nats = Vocabulary(tuple(about.vocabulary)), about.unigram_entropy
    words = (
        f"{config.data}: {len(train):,} + {len(heldout):,} sequences of {length} tokens, {len(vocabulary):,} "
        f"WordPieces, unigram entropy {nats:.2f} nats"
    )
    return Prepared(
        train=train,
        heldout=heldout,
        vocabulary=vocabulary,
        tokenizer_json=about.tokenizer_json,
        unigram_entropy=nats,
        maskable=about.ordinary_tokens / len(train),
        summary=DataSummary(len(train), len(heldout), words, manifest.fingerprint, manifest.blocks()),
    )


def absolute_paths(config: BertConfig) -> BertConfig:
    """The configuration with the paths in `data` and `tokenizer` absolute: workers run in other folders."""
    kind, _, pattern = config.data.partition(":")
    here = pattern and (kind == "text" or (kind == "parquet" and "://" not in pattern))
    data = f"{kind}:{absolute_pattern(pattern, kind == 'text')}" if here else config.data
    tokenizer = os.path.abspath(os.path.expanduser(config.tokenizer)) if config.tokenizer else ""
    return replace(config, data=data, tokenizer=tokenizer)


def check_settings(config: BertConfig) -> None:
    """Raises UserError where numbers are out of range or do not fit together."""
    for name in (
        "model", "hidden_size", "layers", "heads", "intermediate_size", "vocab_size", "sequence_length",
        "mask_rate", "dropout", "vocab_multiple", "short_length", "short_share",
    ):  # fmt: skip
        parse_value(BertConfig, name, getattr(config, name))
    config.check_lengths()
    size = config.architecture()
    if size.hidden_size % size.heads:
        raise UserError(
            f"--heads {size.heads}: does not divide the hidden size {size.hidden_size}; "
            "give --heads and --hidden-size that fit"
        )


def pack(documents: Iterable[Sequence[int]], length: int, cls_id: int, sep_id: int) -> Iterator[NDArray[np.int32]]:
    """Full sequences, int32 [some, length], by the rule at the top of this file."""
    piece = length - 2
    rest = np.empty(0, np.int32)
    documents = iter(documents)
    while batch := list(islice(documents, DOCUMENTS_AT_ONCE)):
        parts = [rest] + [np.asarray([*ids, sep_id], np.int32) for ids in batch]
        stream = np.concatenate(parts)
        full = len(stream) // piece
        rest = stream[full * piece :]
        if full:
            sequences = np.full((full, length), sep_id, np.int32)
            sequences[:, 0] = cls_id
            sequences[:, 1:-1] = stream[: full * piece].reshape(full, piece)
            yield sequences


def _find(config: BertConfig, verify: bool) -> Path:
    """The cache entry of this configuration's data, made where it is missing or not whole."""
    corpus = find_corpus(config.data)
    # Everything beside the text that decides the contents of an entry.
    recipe = {
        "format": FORMAT,
        "kind": corpus.kind,
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "sequence_length": config.sequence_length,
        "tokenizer": _tokenizer_identity(config),
    }
    facts = {"recipe": recipe, "files": corpus.facts()}
    key = cache.recall(facts)
    folder = cache.open_entry(key, verify) if key else None
    if folder is None:
        key = digest({"recipe": recipe, "text": fingerprint(corpus)})
        folder = cache.open_entry(key, verify=True)
        folder = folder or cache.build_entry(key, lambda building: _write(config, corpus, building))
        cache.remember(facts, key)
    return folder


def _tokenizer_identity(config: BertConfig) -> list[Any]:
    """What decides the tokenizer: a file's contents, or the size of the vocabulary to train."""
    if not config.tokenizer:
        return [config.vocab_size]
    file = tokenizer_file(Path(config.tokenizer).expanduser())
    try:
        return [file.suffix, cache.file_sha256(file), *sorted(rules_beside(file).items())]
    except ValueError:
        raise UserError(
            f"--tokenizer {config.tokenizer}: tokenizer_config.json beside {file.name} is no JSON; mend or remove it"
        ) from None
    except OSError as error:
        raise UserError(
            f"--tokenizer {config.tokenizer}: {file.name} cannot be read ({error.strerror}); give another"
        ) from None


def tokenizer_of(
    config: BertConfig, corpus: Corpus, watched: Callable[[Iterator[str]], Iterator[str]] = iter
) -> tuple[Any, Vocabulary]:
    """The tokenizer of --tokenizer, or one trained on the training documents; and its vocabulary.

    Args:
        watched: is handed the documents that are trained on, and hands them on.
    """
    if config.tokenizer:
        return read_tokenizer(Path(config.tokenizer).expanduser())
    training_text = (text for text in watched(corpus.documents()) if not is_heldout(text))
    vocabulary = Vocabulary(train_vocabulary(training_text, config.vocab_size))
    return build_tokenizer(vocabulary.tokens), vocabulary


def _write(config: BertConfig, corpus: Corpus, folder: Path) -> None:
    """Tokenize the text and write the files of its cache entry."""
    tokenizer, vocabulary = tokenizer_of(config, corpus)
    sequences = {}
    counts = np.zeros(len(vocabulary), np.int64)
    for split in SPLITS:
        texts = (text for text in corpus.documents() if is_heldout(text) == (split == "heldout"))
        sequences[split] = 0
        with (folder / f"{split}.int32").open("wb") as file:
            for packed in pack(
                token_ids(tokenizer, texts), config.sequence_length, vocabulary.id(CLS), vocabulary.id(SEP)
            ):
                file.write(packed.astype("<i4").tobytes())
                sequences[split] += len(packed)
                if split == "train":
                    counts += np.bincount(packed.reshape(-1), minlength=len(vocabulary))
    counts[list(vocabulary.special_ids)] = 0
    _check_enough(config, sequences, int(counts.sum()))
    about = {
        "sequences": sequences,
        "vocab_size": len(vocabulary),
        "unigram_entropy": entropy(counts),
        "maskable": int(counts.sum()) / sequences["train"],
        "fingerprint": folder_fingerprint(folder, vocabulary),
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1))
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary.tokens))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def entropy(counts: NDArray[np.int64]) -> float:
    """-sum p ln p of the distribution that `counts` give, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def folder_fingerprint(folder: Path, vocabulary: Vocabulary) -> str:
    """What the run trains on, hashed: the sequences and the vocabulary, not where they came from."""
    return digest([vocabulary.tokens, *(cache.file_sha256(folder / f"{split}.int32") for split in SPLITS)])


def _check_enough(config: BertConfig, sequences: dict[str, int], ordinary: int) -> None:
    train, heldout = (sequences[split] for split in SPLITS)
    if not train or not heldout:
        raise UserError(
            f"--data {config.data}: too little text, {train} training and {heldout} "
            f"held-out sequences of {config.sequence_length} tokens; {MORE_TEXT}"
        )
    if not ordinary:
        raise UserError(
            f"--tokenizer {config.tokenizer}: knows no word of --data {config.data}; "
            "give a vocabulary of the text's language"
        )


def _summary(config: BertConfig, about: dict[str, Any]) -> DataSummary:
    train, heldout = (about["sequences"][split] for split in SPLITS)
    return DataSummary(
        train_samples=train,
        heldout_samples=heldout,
        description=f"{config.data}: {train:,} + {heldout:,} sequences of {config.sequence_length} tokens, "
        f"{about['vocab_size']:,} WordPieces, unigram entropy {about['unigram_entropy']:.2f} nats",
        fingerprint=about["fingerprint"],
    )
