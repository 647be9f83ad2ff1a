"""Model, loss, metrics and saving: what the loop gets, and what transformers loads afterwards."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import as_transformers

from orchestrator.settings import parse_value, settings
from orchestrator.state import weights_sha256
from workloads.bert import data
from workloads.bert.config import SIZES, BertConfig
from workloads.bert.wordpiece import SPECIAL, build_tokenizer
from workloads.bert.workload import BertWorkload

WORDS = ["dog", "cat", "bird", "fish", "horse", "snake", "tiger", "mouse"]
RECIPES = sorted((Path(__file__).parents[2] / "workloads" / "bert").glob("*.toml"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workload(config) -> BertWorkload:
    return BertWorkload(config)


def full_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["masked"]] = batch["labels"]
    return labels


def test_a_microbatch(workload, config):
    batch = workload.samples("train").microbatch(np.array([3, 0, 7]), epoch=1)
    assert batch["input_ids"].shape == (3, 16)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["masked"].shape == batch["labels"].shape
    again = workload.samples("train").microbatch(np.array([0]), epoch=1)
    assert (again["input_ids"][0] == batch["input_ids"][1]).all()


def test_a_microbatch_of_no_samples(workload):
    batch = workload.samples("train").microbatch(np.array([], np.int64), 0)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (0, 16),
        "masked": (0,),
        "labels": (0,),
    }


def test_held_out_masking_does_not_depend_on_the_seed(config):
    batches = [
        BertWorkload(dataclasses.replace(config, seed=seed)).samples("heldout").microbatch(np.arange(4), 0)
        for seed in (0, 9)
    ]
    assert all((batches[0][name] == batches[1][name]).all() for name in batches[0])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_loss_is_that_of_transformers(workload, mode):
    """Our head on masked places alone gives the loss and the gradients of BertForMaskedLM with labels."""
    torch.manual_seed(0)
    model = workload.build_model().train(mode == "train")
    batch = workload.samples("train").microbatch(np.arange(8), 0)
    torch.manual_seed(1)
    sums = workload.sums(model, batch)
    sums.loss.backward()
    mine = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    theirs = as_transformers(model)
    theirs.zero_grad()
    torch.manual_seed(1)
    whole = theirs(input_ids=batch["input_ids"], labels=full_labels(batch))
    (whole.loss * sums.count).backward()
    assert sums.loss.item() == pytest.approx((whole.loss * sums.count).item(), rel=1e-5)
    assert sums.loss.dtype == torch.float32
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == mine.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5)
    right = (whole.logits.argmax(-1) == full_labels(batch)).sum()
    assert sums.others["correct"] == right


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_hidden_states_have_the_bits_of_transformers(workload, mode, precision):
    """Dropout included: it draws in the same order."""
    model = workload.build_model().train(mode == "train")
    theirs = as_transformers(model)
    input_ids = workload.samples("train").microbatch(np.arange(8), 0)["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        torch.manual_seed(1)
        mine = model.bert(input_ids)
        torch.manual_seed(1)
        assert torch.equal(mine, theirs.bert(input_ids=input_ids).last_hidden_state)


def test_first_weights_are_bert_s(workload):
    """Devlin et al. 2019: N(0, 0.02) for matrices, 0 for biases, 1 for norms; nothing for padding."""
    torch.manual_seed(0)
    model = workload.build_model()
    pad = model.bert.embeddings.word_embeddings.padding_idx
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            rows = parameter[torch.arange(len(parameter)) != pad] if "word_embeddings" in name else parameter
            assert rows.std().item() == pytest.approx(0.02, rel=0.3), name
        else:
            assert (parameter == float("LayerNorm.weight" in name)).all(), name
    assert (model.bert.embeddings.word_embeddings.weight[pad] == 0).all()


def test_sums_add_up_and_no_tensor_of_others_needs_a_gradient(workload):
    model = workload.build_model().eval()
    samples = workload.samples("heldout")
    with torch.no_grad():
        whole = workload.sums(model, samples.microbatch(np.arange(8), 0))
        parts = [workload.sums(model, samples.microbatch(np.arange(i, i + 2), 0)) for i in range(0, 8, 2)]
    assert whole.count == sum(part.count for part in parts)
    assert whole.loss.item() == pytest.approx(sum(part.loss.item() for part in parts), rel=1e-5)
    assert not whole.others["correct"].requires_grad


def test_the_nominal_count_is_what_comes_on_average(workload):
    samples = workload.samples("train")
    count = len(samples.microbatch(np.arange(len(samples)), 0)["labels"])
    assert workload.nominal_count(len(samples)) == pytest.approx(count, rel=0.1)
    assert workload.nominal_count(10) == pytest.approx(10 * workload.nominal_count(1))


def test_nothing_masked_is_a_loss_of_zero_with_a_gradient(workload):
    model = workload.build_model()
    nothing = torch.empty(0, dtype=torch.int64)
    batch = {"input_ids": torch.full((1, 16), 1), "masked": nothing, "labels": nothing}
    sums = workload.sums(model, batch)
    sums.loss.backward()
    assert sums.loss.item() == 0
    assert sums.count.item() == 0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_loss_is_fp32_under_autocast(workload, kind):
    torch.manual_seed(0)
    model = workload.build_model().eval()
    batch = workload.samples("train").microbatch(np.arange(4), 0)
    exact = workload.sums(model, batch).loss.item()
    with torch.autocast("cpu", dtype=kind):
        sums = workload.sums(model, batch)
    assert sums.loss.dtype == torch.float32
    assert sums.loss.item() == pytest.approx(exact, rel=0.02)


def test_the_same_seed_gives_the_same_bits(workload):
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        model = workload.build_model().train()
        batch = workload.samples("train").microbatch(np.arange(4), 0)
        torch.manual_seed(6)
        workload.sums(model, batch).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_metrics(workload):
    metrics = workload.metrics({"loss": 20.0, "count": 10.0, "correct": 4.0})
    assert metrics["masked_lm_loss"] == 2.0
    assert metrics["perplexity"] == pytest.approx(math.exp(2))
    assert metrics["masked_accuracy"] == 0.4
    assert 2 < metrics["unigram_entropy"] < math.log(300)


def train(workload: BertWorkload, steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = workload.build_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004)
    samples = workload.samples("train")
    for step in range(steps):
        batch = samples.microbatch(np.arange(32) + 32 * (step % 8), step // 8)
        optimizer.zero_grad()
        sums = workload.sums(model, batch)
        (sums.loss / sums.count).backward()
        optimizer.step()
    return model


def test_a_trained_and_saved_model_fills_a_mask(config, text, tmp_path):
    """Trained on documents that repeat one word, the model that transformers loads repeats the one given."""
    import transformers

    text.write_text("\n\n".join(" ".join([WORDS[n % 8]] * (20 + n)) for n in range(80)))
    workload = BertWorkload(dataclasses.replace(config, hidden_size=32, dropout=0.0))
    workload.save(train(workload, 100), tmp_path / "model")
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.model_max_length == 16
    for word in WORDS:
        inputs = tokenizer(f"{word} {word} {word} {word} [MASK] {word} {word}", return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        (place,) = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
        assert tokenizer.decode([int(logits[0, place].argmax())]) == word


def test_saved_weights_are_the_weights(workload, tmp_path):
    import transformers

    model = workload.build_model()
    workload.save(model, tmp_path / "model")
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "model")
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert weights_sha256(loaded) == weights_sha256(model)
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    } <= names


def test_the_files_are_those_that_transformers_saves(workload, tmp_path):
    model = workload.build_model()
    workload.save(model, tmp_path / "ours")
    as_transformers(model).save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("form", ["vocab.txt", "folder", "tokenizer.json"])
@pytest.mark.parametrize("cased", [False, True])
def test_a_given_vocabulary(config, tmp_path, form, cased):
    import transformers

    trained = data.prepare(config).vocabulary.tokens
    tokens = [*trained[5:], "Sentence", *SPECIAL] if cased else [*trained[5:], *SPECIAL]
    folder = tmp_path / "given"
    folder.mkdir()
    if form == "tokenizer.json":
        (folder / form).write_text(build_tokenizer(tokens, lowercase=not cased).to_str())
    else:
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    path = folder / "vocab.txt" if form == "vocab.txt" else folder
    workload = BertWorkload(dataclasses.replace(config, tokenizer=str(path)))
    assert workload.samples("train").microbatch(np.arange(2), 0)["labels"].max() < len(tokens) - 5
    workload.save(workload.build_model(), tmp_path / "model")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert (loaded.tokenize("Sentence")[0] == "Sentence") == cased
    ids = loaded("the dog")["input_ids"]
    assert [ids[0], ids[-1]] == [tokens.index("[CLS]"), tokens.index("[SEP]")]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_by_name_and_by_number(name):
    size = BertConfig(model=name).architecture()
    assert (size.hidden_size, size.layers, size.heads) == SIZES[name]
    assert size.intermediate_size == 4 * size.hidden_size
    assert size.hidden_size == 64 * size.heads, "64 numbers a head, in both papers"
    other = BertConfig(model=name, layers=5, intermediate_size=7).architecture()
    assert other == dataclasses.replace(size, layers=5, intermediate_size=7)


def test_docs_are_the_default_data_and_the_defaults_fit_each_other():
    config = BertConfig()
    data.check_settings(config)
    assert config.data == "docs"
    assert config.batch_size % config.shards == 0
    assert (config.steps is None) != (config.epochs is None)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_hold_settings_that_exist(recipe):
    given = tomllib.loads(recipe.read_text())
    assert given.pop("workload") == "bert"
    assert set(given) <= set(settings(BertConfig))
    config = BertConfig(**{name: parse_value(BertConfig, name, raw) for name, raw in given.items()})
    data.check_settings(config)
    assert config.batch_size % config.shards == 0
    if recipe.name == "docs.toml":
        assert config == BertConfig(), json.dumps(given)
