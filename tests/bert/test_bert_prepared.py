"""Text as Parquet files of token sequences: parts, one vocabulary for all, and the settings that have to fit."""

import dataclasses
import math
import os
import re

import numpy as np
import pytest
from preparing import do, job

from orchestrator.errors import UserError
from orchestrator.prepare import main
from orchestrator.tables import Manifest
from workloads.bert import data, prepared
from workloads.bert import preparing as bert_preparing
from workloads.bert.config import BertConfig
from workloads.bert.preparing import TextPreparation
from workloads.bert.wordpiece import SPECIAL, build_tokenizer
from workloads.bert.workload import BertWorkload


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    words = [f"The cat number {n} sees the dog number {n + 1} run to house {n * 7 % 13}." for n in range(600)]
    for part in range(3):
        (tmp_path / f"part{part}.txt").write_text("\n\n".join(words[part * 200 : part * 200 + 200]) + "\n")
    return f"text:{tmp_path}/*.txt"


def test_one_part_is_what_a_run_would_prepare_itself(text, tmp_path):
    settings = {"data": text, "vocab_size": 300, "sequence_length": 16}
    do(job("bert", text, tmp_path / "out", vocab_size=300, sequence_length=16))
    plain = data.prepare(BertConfig(**settings))
    prepared = data.prepare(BertConfig(data=f"parquet:{tmp_path / 'out'}", sequence_length=16))
    assert prepared.vocabulary == plain.vocabulary
    assert prepared.tokenizer_json == plain.tokenizer_json
    assert prepared.unigram_entropy == plain.unigram_entropy
    assert prepared.maskable == plain.maskable
    for split in ("train", "heldout"):
        there = np.asarray(getattr(plain, split))
        table = getattr(prepared, split)
        rows = table.rows(np.arange(len(table)), ["tokens"])["tokens"].combine_chunks()
        assert np.array_equal(rows.flatten().to_numpy().reshape(-1, 16), there)


def test_many_parts_have_nearly_all_of_it(text, tmp_path):
    one = do(job("bert", text, tmp_path / "one", vocab_size=300, sequence_length=16))
    many = do(job("bert", text, tmp_path / "many", "--file-mb", "0.01", vocab_size=300, sequence_length=16))
    parts = len(many.files["train"])
    assert parts > 3
    assert one.samples("train") - parts <= many.samples("train") <= one.samples("train")


def test_a_job_that_was_broken_off_comes_to_the_same(text, tmp_path):
    """Also the counts of tokens, which are added up and not kept part by part."""
    flags, settings = ("--file-mb", "0.01"), {"vocab_size": 300, "sequence_length": 16}
    whole = do(job("bert", text, tmp_path / "whole", *flags, **settings))
    todo = job("bert", text, tmp_path / "out", *flags, **settings)
    first = todo.missing()[1::2]
    assert do(todo, first) is None
    again = job("bert", text, tmp_path / "out", *flags, **settings)
    assert sorted(again.records) == first
    assert do(again) == whole
    assert sorted(again.records) == list(range(len(again.parts)))
    assert not [record for record in (*again.records.values(), *todo.records.values()) if "notes" in record]


def test_the_vocabulary_is_trained_once(text, tmp_path, capsys):
    def made(out: str, vocab_size: int) -> tuple[int, dict[str, bytes]]:
        todo = job("bert", text, tmp_path / out, vocab_size=vocab_size, sequence_length=16)
        do(todo)
        lines = capsys.readouterr().out.splitlines()
        trained = [line for line in lines if line.startswith("training a vocabulary of up to")]
        assert lines == trained
        return len(trained), {file.name: file.read_bytes() for file in (tmp_path / out).glob("*.parquet")}

    first = made("first", 300)
    assert (first[0], len(first[1])) == (1, 2)
    assert made("second", 300) == (0, first[1])
    times, others = made("larger", 320)
    assert times == 1
    assert others != first[1]
    assert made("second", 300) == (0, first[1])
    with (tmp_path / "part2.txt").open("a") as file:
        file.write("\n\nOne more document.")
    assert made("longer", 300)[0] == 1


def test_reading_a_large_text_for_its_vocabulary_is_told(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bert_preparing, "TOLD_EVERY_S", 0.0)
    job("bert", text, tmp_path / "out", vocab_size=300, sequence_length=16)
    first, *told = capsys.readouterr().out.splitlines()
    assert first.startswith("training a vocabulary of up to")
    assert len(told) > 1
    assert all(re.fullmatch(r"read [\d,]+ of [\d,]+ MB for the vocabulary", line) for line in told)


def test_all_done_says_so_without_a_cluster(text, tmp_path, capsys):
    flags = ["--source", text, "--out", str(tmp_path / "out"), "--vocab-size", "300", "--sequence-length", "16"]
    found = do(job("bert", text, tmp_path / "out", vocab_size=300, sequence_length=16))
    capsys.readouterr()
    assert main(["bert", *flags]) == 0
    counts = f"{found.samples('train'):,} + {found.samples('heldout'):,}"
    assert capsys.readouterr().out.splitlines() == [
        f"bert from {text}: 0 of 1 parts to do, to {tmp_path / 'out'}",
        f"prepared already: {counts} samples, 0 broken",
        f"next: python -m orchestrator.run bert --data parquet:{tmp_path / 'out'} --sequence-length 16",
    ]


@pytest.mark.parametrize(
    ("workload", "source", "words"),
    [
        ("bert", "wikipedia", "--source wikipedia: not known; write docs or text:GLOB, such as --source 'text:"),
        ("bert", "text:{}/none*.txt", "--source text:{}/none*.txt: no file matches"),
        ("bert", "text:{}/latin.bin", "--source: {}/latin.bin is not UTF-8 text"),
        ("bert", "parquet:{}", "--source parquet:{}: is prepared already"),
        ("resnet", "mnist", "--source mnist: no such kind of data"),
        ("resnet", "digits:{}", "--source digits:{}: digits takes no folder; write --source digits"),
        ("resnet", "imagefolder:{}/gone", "--source imagefolder:{}/gone: no folder"),
        ("resnet", "parquet:{}", "--source parquet:{}: is prepared already"),
    ],
)
def test_mistakes_name_the_flag_that_was_given(text, tmp_path, capsys, workload, source, words):
    (tmp_path / "latin.bin").write_bytes(b"caf\xe9\n\n" * 9)
    assert main([workload, "--source", source.format(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words.format(tmp_path)}")
    assert "--data" not in error
    assert error.count("\n") == 1


def test_a_folder_that_goes_with_the_job_is_refused(text, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["bert", "--source", text, "--out", "here"]) == 2
    line = "--out here: a submitted job's folder is deleted after it; give an absolute path or s3://bucket/data"
    assert line in capsys.readouterr().err


def test_too_little_text_says_what_to_give(tmp_path):
    (tmp_path / "small.txt").write_text("hello world\n" * 20)
    words = r"gives no heldout samples; give more documents \(blank lines .*--sequence-length, or a larger --file-mb$"
    with pytest.raises(UserError, match=words):
        do(job("bert", f"text:{tmp_path}/small.txt", tmp_path / "out", vocab_size=300, sequence_length=8))


def test_text_that_changes_while_it_is_prepared_is_refused(text, tmp_path):
    todo = job("bert", text, tmp_path / "out", vocab_size=300, sequence_length=16)
    file = tmp_path / "part1.txt"
    os.utime(file, (1, 1))
    assert todo.preparation.make(todo.parts[0]).tables, "times differ from node to node"
    with file.open("a") as stream:
        stream.write("more")
    with pytest.raises(UserError, match="changed while it was prepared"):
        todo.preparation.make(todo.parts[0])
    file.unlink()
    with pytest.raises(UserError, match="changed while it was prepared"):
        todo.preparation.make(todo.parts[0])
    docs = TextPreparation(BertConfig(), "", ())
    with pytest.raises(UserError, match="changed while it was prepared"):
        list(docs._documents({"files": [], "of": "2.7"}))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("sequence_length", (None, "16", 16.0, 0)),
        ("vocabulary", (None, ["a"], "[PAD]", [1], list(SPECIAL))),
        ("tokenizer_json", (None, 5, "{}", "x")),
        ("unigram_entropy", (None, "x", math.inf, -1)),
        ("ordinary_tokens", (None, "5", 0)),
    ],
)
def test_a_manifest_that_does_not_describe_text_is_refused(name, wrong):
    tokens = [*SPECIAL, "a"]
    good = {
        "sequence_length": 16,
        "vocabulary": tokens,
        "tokenizer_json": build_tokenizer(tokens).to_str(),
        "unigram_entropy": 1.5,
        "ordinary_tokens": 5,
    }
    assert prepared.about(manifest(good)).vocabulary == tokens
    lacking = {key: value for key, value in good.items() if key != name}
    for bad in [lacking, *({**good, name: value} for value in wrong)]:
        with pytest.raises(UserError, match="its manifest does not describe text; prepare the data again"):
            prepared.about(manifest(bad))


def manifest(about):
    return Manifest("bert", "there", "", {}, about, (), 0, "f")


def test_a_missing_file_is_found_before_a_run(text, tmp_path):
    do(job("bert", text, tmp_path / "out", vocab_size=300, sequence_length=16))
    config = BertConfig(data=f"parquet:{tmp_path / 'out'}", sequence_length=16)
    data.check(config)
    (tmp_path / "out" / "heldout-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"heldout-00000.parquet is missing"):
        data.check(config)


def test_a_cache_is_told_that_is_too_small_for_text_as_it_lies_there(text, tmp_path, capsys):
    """Not packed: three times as large as in its files."""
    do(job("bert", text, tmp_path / "out", "--file-mb", "0.01", vocab_size=300, sequence_length=16))
    config = BertConfig(data=f"parquet:{tmp_path / 'out'}", sequence_length=16, shuffle_window=2)
    table = data.prepare(config).train
    table.rows(np.arange(len(table)), ["tokens"])
    there = sorted(file.stat().st_size for file in (tmp_path / "cache" / "tables").glob("*.arrow"))
    capsys.readouterr()
    for share, told in ((0.75, 1), (1.5, 0)):
        data.check(dataclasses.replace(config, data_cache=share * sum(there[-4:]) / 1e9))
        assert capsys.readouterr().err.count("note: --data-cache") == told


def test_microbatches_are_masked_as_ever(text, tmp_path):
    do(job("bert", text, tmp_path / "out", "--file-mb", "0.01", vocab_size=300, sequence_length=16))
    samples = BertWorkload(BertConfig(data=f"parquet:{tmp_path / 'out'}", sequence_length=16)).samples("train")
    indices = np.array([len(samples) - 1, 0, 5])
    batch = samples.microbatch(indices, 1)
    assert batch["input_ids"].shape == (3, 16)
    alone = samples.microbatch(indices[1:2], 1)
    assert np.array_equal(batch["input_ids"][1], alone["input_ids"][0]), "depends on its neighbours"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sequence_length": 32}, "write --sequence-length 16"),
        ({"sequence_length": 16, "tokenizer": "vocab.txt"}, "leave it out"),
        (
            {"sequence_length": 16, "vocab_size": 999},
            r"--vocab-size 999: .* has a vocabulary of \d+ already; leave it out",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(text, tmp_path, settings, words):
    do(job("bert", text, tmp_path / "out", vocab_size=300, sequence_length=16))
    with pytest.raises(UserError, match=words) as refusal:
        data.check(BertConfig(data=f"parquet:{tmp_path / 'out'}", **settings))
    assert "\n" not in str(refusal.value)
