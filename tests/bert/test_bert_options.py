"""Short sequences first, and rows beyond the vocabulary: what they change, and what they must not."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.assembly import build
from orchestrator.errors import UserError
from workloads.bert import data
from workloads.bert.config import BertConfig
from workloads.bert.model import NEVER
from workloads.bert.windows import starts, window
from workloads.bert.workload import BertWorkload

CLS, SEP = 2, 3


@given(length=st.integers(9, 600), data=st.data())
def test_the_windows_of_a_sequence_cover_it(length, data):
    short = data.draw(st.integers(8, length - 1))
    begins = starts(length, short)
    covered = {int(begin) + n for begin in begins for n in range(short - 2)}
    assert covered == set(range(1, length - 1))
    assert len(begins) == -(-(length - 2) // (short - 2)), "no more than it takes"


@given(epoch=st.integers(0, 50), order=st.permutations(range(6)))
def test_a_window_is_that_of_the_sample_and_the_epoch(epoch, order):
    tokens = np.arange(6 * 30, dtype=np.int32).reshape(6, 30) + 10
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    cut = window(tokens[list(order)], 12, np.array(order), epoch)
    assert cut.shape == (6, 12)
    assert (cut[:, 0] == CLS).all()
    assert (cut[:, -1] == SEP).all()
    for row, sample in enumerate(order):
        assert (window(tokens[[sample]], 12, np.array([sample]), epoch) == cut[row]).all()
        assert (np.diff(cut[row, 1:-1]) == 1).all()
    seen = {int(t) for e in range(len(starts(30, 12))) for t in window(tokens[:1], 12, np.array([0]), e)[0, 1:-1]}
    assert seen == set(tokens[0, 1:-1].tolist()), "an epoch for each window"


def test_short_steps_are_short_and_the_others_as_without(config):
    plain = BertWorkload(config).samples("train")
    workload = BertWorkload(dataclasses.replace(config, short_length=9, short_share=0.9))
    samples, indices = workload.samples("train"), np.array([5, 0, 9])
    for progress, length in ((0.0, 9), (899 / 1000, 9), (900 / 1000, 16), (1.0, 16)):
        batch = samples.microbatch(indices, 3, progress)
        assert batch["input_ids"].shape == (3, length)
        assert len(batch["labels"])
    assert all(torch.equal(a, b) for a, b in zip(plain.microbatch(indices, 3).values(), batch.values(), strict=True))
    assert workload.samples("heldout").microbatch(indices, 0)["input_ids"].shape == (3, 16)
    assert workload.turning_points == (0.9,)
    assert BertWorkload(config).turning_points == ()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"short_length": 16}, "--short-length 16: out of range; give a number from 8 to 15"),
        ({"short_length": 7}, "--short-length 7: out of range"),
        ({"short_share": 0.5}, "--short-share 0.5: does nothing without --short-length"),
        ({"vocab_multiple": 0}, "--vocab-multiple 0: out of range"),
    ],
)
def test_what_is_refused(config, given, words):
    with pytest.raises(UserError) as refusal:
        data.check(dataclasses.replace(config, **given))
    assert str(refusal.value).startswith(words)


def test_a_pipeline_is_refused():
    with pytest.raises(UserError, match="--short-length 16: stages hand on sequences of one length"):
        build(BertConfig, {"short_length": 16, "parallel": "pipeline=2", "workers": "2"})


@pytest.fixture
def models(config):
    """The same model without and with rows beyond the vocabulary, each with its workload."""
    found = []
    for multiple in (1, 64):
        workload = BertWorkload(dataclasses.replace(config, vocab_multiple=multiple))
        torch.manual_seed(1)
        found.append((workload, workload.build_model().train()))
    return found


def test_rows_beyond_the_vocabulary_change_nothing(models):
    """Neither the weights that a model begins with, nor what it learns; and nothing is learnt by them."""
    (workload, plain), (_, padded) = models
    words = plain.bert.embeddings.word_embeddings.weight
    size, rows = len(words), padded.bert.embeddings.word_embeddings.num_embeddings
    assert size % 64
    assert rows == size + 64 - size % 64
    own = {name: p[:size] if p.shape[0] == rows else p for name, p in padded.named_parameters()}
    assert all(torch.equal(own[name], parameter) for name, parameter in plain.named_parameters())
    batch = workload.samples("train").microbatch(np.arange(8), 0)
    losses = []
    for model in (plain, padded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            sums = workload.sums(model, batch)
            sums.loss.backward()
            optimizer.step()
        losses.append(float(sums.loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    beyond = padded.bert.embeddings.word_embeddings.weight[size:]
    assert torch.equal(beyond, torch.zeros_like(beyond))
    assert not padded.bert.embeddings.word_embeddings.weight.grad[size:].any()
    assert not padded.cls["predictions"].bias.grad[size:].any()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_beyond_the_vocabulary_are_never_predicted(models, kind, tmp_path):
    """By what transformers loads either, whose configuration has all rows."""
    import transformers

    (_, plain), (workload, padded) = models
    size = len(plain.bert.embeddings.word_embeddings.weight)
    workload.save(padded, tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=kind).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = padded.bert.embeddings.word_embeddings.num_embeddings
    assert (loaded.config.vocab_size, len(tokenizer)) == (rows, size)
    assert len((tmp_path / "vocab.txt").read_text().splitlines()) == size
    with torch.no_grad():
        logits = loaded(**tokenizer("the [MASK] sees the dog", return_tensors="pt")).logits
    assert logits.shape[-1] == rows
    assert not logits.float().softmax(-1)[..., size:].any()
    assert float(padded.cls["predictions"].bias[-1]) == NEVER
