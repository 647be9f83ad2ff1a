"""Text to sequences: packing, splitting, the cache, and what importing it costs."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.bert import corpus, data, wordpiece
from workloads.bert.wordpiece import SPECIAL, build_tokenizer, train_vocabulary

ROOT = Path(__file__).parents[2]
CLS, SEP = 2, 3


def run(code: str, **environment: str) -> str:
    """The output of another Python process."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(5, 99), max_size=40), max_size=60),
    length=st.integers(8, 20),
    at_once=st.integers(1, 7),
)
def test_packing_loses_and_doubles_nothing(documents, length, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DOCUMENTS_AT_ONCE", at_once)
        parts = list(data.pack(documents, length, CLS, SEP))
    packed = np.concatenate([np.empty((0, length), np.int32), *parts])
    stream = [token for document in documents for token in [*document, SEP]]
    kept = packed[:, 1:-1].reshape(-1).tolist()
    assert kept == stream[: len(kept)]
    assert len(stream) - len(kept) < length - 2
    assert (packed[:, 0] == CLS).all()
    assert (packed[:, -1] == SEP).all()
    assert packed.dtype == np.int32


class Letters:
    """A tokenizer whose tokens are letters; notes how much text it is given at once."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[SimpleNamespace]:
        assert not add_special_tokens
        self.given.append(texts)
        return [SimpleNamespace(ids=[ord(letter) for letter in text]) for text in texts]


@given(st.lists(st.text(max_size=30), max_size=40))
def test_no_more_text_is_cut_into_tokens_at_once_than_memory_is_for(texts):
    tokenizer = Letters()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wordpiece, "DOCUMENTS_AT_ONCE", 7)
        patch.setattr(wordpiece, "LETTERS_AT_ONCE", 50)
        found = list(wordpiece.token_ids(tokenizer, texts))
    assert found == [[ord(letter) for letter in text] for text in texts]
    for batch in tokenizer.given:
        assert 0 < len(batch) <= 7
        assert sum(map(len, batch)) <= 50


def test_held_out_documents_are_not_trained_on(text):
    documents = list(corpus.find_corpus(f"text:{text}").documents())
    held = {document for document in documents if corpus.is_heldout(document)}
    assert len(documents) == 300
    assert 300 / 32 < len(held) < 300 / 8
    assert corpus.is_heldout(f"  {next(iter(held))}\n"), "white space does not move a document across"


def test_documents_are_separated_by_blank_lines_and_files(tmp_path):
    (tmp_path / "b.txt").write_text("third\n")
    (tmp_path / "a.txt").write_bytes("\ufefffirst line\r\nits second\r\n \r\n\r\nsecond".encode())
    found = corpus.find_corpus(f"text:{tmp_path}/*.txt")
    assert list(found.documents()) == ["first line\nits second", "second", "third"]


def test_docs_are_prose_and_never_twice():
    documents = list(corpus.find_corpus("docs").documents())
    assert sum(len(document.split()) for document in documents) > 200_000
    assert len(set(documents)) == len(documents)
    assert any(document.startswith('The "assert" statement') for document in documents), "pydoc's topics"
    assert any(document.startswith("Heap queue algorithm") for document in documents), "docstrings"


def test_prepared_text(config):
    prepared = data.prepare(config)
    assert prepared.train.shape == (prepared.summary.train_samples, 16)
    assert prepared.heldout.shape == (prepared.summary.heldout_samples, 16)
    assert prepared.train.dtype == np.int32
    assert prepared.vocabulary.tokens[:5] == SPECIAL
    assert len(prepared.vocabulary) <= config.vocab_size
    ordinary = prepared.train[prepared.train > 4]
    assert prepared.maskable == pytest.approx(len(ordinary) / len(prepared.train))
    shares = np.unique(ordinary, return_counts=True)[1] / len(ordinary)
    assert prepared.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    words = " ".join(prepared.vocabulary.tokens[token] for token in prepared.train[0])
    assert words.startswith("[CLS] sentence")


def test_every_split_holds_its_own_documents(config):
    """Decoding the sequences gives the words of the split's documents, in order."""
    prepared = data.prepare(config)
    documents = list(corpus.find_corpus(config.data).documents())
    for split in data.SPLITS:
        wanted = "".join(d for d in documents if corpus.is_heldout(d) == (split == "heldout"))
        tokens = [prepared.vocabulary.tokens[i] for i in getattr(prepared, split).reshape(-1) if i > 4]
        got = "".join(tokens).replace("##", "")
        assert got
        assert "".join(wanted.lower().split()).startswith(got)


def test_the_vocabulary_is_the_same_in_every_process(text):
    code = (
        "from workloads.bert import corpus, wordpiece, cache\n"
        f"documents = corpus.find_corpus('text:{ROOT}/workloads/bert/*.py').documents()\n"
        "print(cache.digest(wordpiece.train_vocabulary(documents, 900)))"
    )
    found = {run(code, PYTHONHASHSEED=str(n), RAYON_NUM_THREADS=str(n)) for n in (1, 2, 3)}
    assert len(found) == 1


def test_the_vocabulary_keeps_to_its_size_and_order():
    documents = [
        "a rose is a rose is a rose",
        "roses are red, is it so?",
        "\u4e2d\u6587 and \u00e9t\u00e9",
    ] * 3
    tokens = train_vocabulary(documents, 256)
    assert tokens == train_vocabulary(reversed(documents), 256)
    assert {"rose", "##e", "r", "\u4e2d"} <= set(tokens)
    assert build_tokenizer(tokens).encode("Rose", add_special_tokens=False).tokens == ["rose"]
    assert len(train_vocabulary(["".join(map(chr, range(0x4E00, 0x5200)))], 256)) <= 256


def test_a_second_look_is_read_from_the_cache(config, monkeypatch):
    first = data.check(config)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_write", None)
        patch.setattr(data, "fingerprint", None)
        start = time.perf_counter()
        assert data.check(config) == first
        assert data.prepare(config).summary == first
        assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("name", ["train.int32", "about.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_made_anew(config, cache, name, damage):
    first = data.prepare(config)
    tokens = np.array(first.train)
    (file,) = cache.glob(f"entries/*/{name}")
    raw = file.read_bytes()
    file.unlink()
    if damage != "remove":
        file.write_bytes(
            raw[: len(raw) // 2] + (bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]) * (damage == "flip")
        )
    assert data.check(config) == first.summary, "the driver does not stumble over it either"
    again = data.prepare(config)
    assert (again.train == tokens).all()
    assert again.summary == first.summary
    assert file.read_bytes() == raw
    assert len(list(cache.glob("entries/*"))) == 1, "nothing else is left behind"


def test_what_a_killed_process_left_is_swept_away(config, cache):
    (cache / "entries" / ".building-old").mkdir(parents=True)
    (cache / "entries" / ".building-new").mkdir()
    os.utime(cache / "entries" / ".building-old", (1, 1))
    data.check(config)
    assert {folder.name for folder in (cache / "entries").glob(".*")} == {".building-new"}


def test_changed_text_and_settings_get_entries_of_their_own(config, text, cache):
    first = data.check(config)
    assert data.check(dataclasses.replace(config, seed=5, lr=0.1, mask_rate=0.4)) == first
    assert len(list(cache.glob("entries/*"))) == 1
    os.utime(text, ns=(1, 1))
    assert data.check(config) == first, "the time of a file is no part of the data"
    assert len(list(cache.glob("entries/*"))) == 1
    assert data.check(dataclasses.replace(config, sequence_length=12)).fingerprint != first.fingerprint
    text.write_text(text.read_text() + "\n\nOne more document.")
    assert data.check(config).fingerprint != first.fingerprint
    assert len(list(cache.glob("entries/*"))) == 3


def test_of_processes_that_prepare_at_once_one_does_the_work(config, cache, tmp_path):
    code = (
        "from workloads.bert import data; from workloads.bert.config import BertConfig\n"
        f"write, log = data._write, open({str(tmp_path / 'log')!r}, 'a')\n"
        "data._write = lambda *given: (write(*given), print('made', file=log))\n"
        f"config = BertConfig(data={config.data!r}, vocab_size=300, sequence_length=16)\n"
        "print(data.check(config).fingerprint)"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert found == {data.check(config).fingerprint}
    assert len(list(cache.glob("entries/*"))) == 1
    assert (tmp_path / "log").read_text().split() == ["made"]


def test_paths_are_made_absolute(config, monkeypatch, text):
    monkeypatch.chdir(text.parent)
    relative = dataclasses.replace(config, data="text:*.txt", tokenizer="some/vocab.txt")
    absolute = data.absolute_paths(relative)
    assert absolute.data == f"text:{text.parent}/*.txt"
    assert absolute.tokenizer == f"{text.parent}/some/vocab.txt"
    for other in ("docs", "unknown:kind", "text:"):
        untouched = dataclasses.replace(config, data=other)
        assert data.absolute_paths(untouched) == untouched


def test_brackets_of_a_folder_are_no_pattern(config, monkeypatch, tmp_path):
    folder = tmp_path / "corpus[2024]"
    folder.mkdir()
    for name in ("a.txt", "b[1].txt"):
        (folder / name).write_text("some text")
    monkeypatch.chdir(folder)
    for pattern, found in (("*.txt", ["a.txt", "b[1].txt"]), ("b[1].txt", ["b[1].txt"]), ("[a].txt", ["a.txt"])):
        absolute = data.absolute_paths(dataclasses.replace(config, data=f"text:{pattern}")).data
        monkeypatch.chdir(tmp_path)
        assert [file.name for file in corpus.find_corpus(absolute).files] == found
        monkeypatch.chdir(folder)


def test_the_driver_needs_neither_torch_nor_transformers(config):
    code = (
        "import sys\n"
        "import workloads.bert.config, workloads.bert.data\n"
        "light = {'torch', 'transformers', 'tokenizers', 'ray'} & set(sys.modules)\n"
        "config = workloads.bert.config.BertConfig("
        f"data={config.data!r}, vocab_size=300, sequence_length=16)\n"
        "workloads.bert.data.check(config)\n"
        "import json; print(json.dumps([sorted(light), list({'torch', 'transformers'} & set(sys.modules))]))"
    )
    assert json.loads(run(code)) == [[], []]
