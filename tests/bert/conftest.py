"""A cache of its own for every test, and a small text that is quick to prepare."""

from pathlib import Path

import pytest

import orchestrator.vision_ops  # noqa: F401  before transformers' models, which import torchvision
from workloads.bert.config import BertConfig

NOUNS = ["dog", "cat", "bird", "fish", "horse", "snake", "tiger", "mouse"]
VERBS = ["sees", "hears", "likes", "feeds", "follows", "finds"]
PLACES = ["garden", "river", "forest", "house", "market"]


def sentence(number: int) -> str:
    """A sentence that is like no other: documents of equal content land in the same split."""
    noun, other = NOUNS[number % 8], NOUNS[(number // 8) % 8]
    verb, place = VERBS[(number // 64) % 6], PLACES[(number * 3) % 5]
    # Of changing length: with one length, packing puts each word at the same few positions.
    old = "very " * (number * 5 % 7) + "old"
    return f"Sentence {number}: the {old} {noun} {verb} the {other} in the {place}, then it goes home to sleep."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """One file of 300 documents."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(sentence(n) for n in range(300)), encoding="utf-8")
    return file


@pytest.fixture
def config(text: Path) -> BertConfig:
    return BertConfig(
        data=f"text:{text}",
        hidden_size=16,
        layers=2,
        heads=2,
        vocab_size=300,
        sequence_length=16,
        batch_size=16,
    )
