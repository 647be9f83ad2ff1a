"""Whatever cannot be used is refused before training, in one line that says what to do."""

import dataclasses
import json
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from workloads.bert import data
from workloads.bert.wordpiece import SPECIAL, build_tokenizer, read_tokenizer

UNREADABLE = Path("/proc/self/mem")  # a regular file whose start not even root can read


def refusal(config, **changes) -> str:
    with pytest.raises(UserError) as caught:
        data.check(dataclasses.replace(config, **changes))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 300
    return line


@pytest.mark.parametrize("given", ["", "wikipedia", "text", "text:", "docs:/some", "imagefolder:/x", "texts:*.txt"])
def test_unknown_data(config, given):
    line = refusal(config, data=given)
    assert line.startswith(f"--data {given}: not known")
    assert "text:GLOB" in line


def test_a_pattern_that_matches_nothing(config, tmp_path):
    assert "no file matches" in refusal(config, data=f"text:{tmp_path}/*.nothing")
    (tmp_path / "folder.nothing").mkdir()
    assert "no file matches" in refusal(config, data=f"text:{tmp_path}/*.nothing")


def test_text_that_is_not_utf8(config, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("caf\xe9\n".encode("latin-1") * 100)
    assert "latin1.txt is not UTF-8" in refusal(config, data=f"text:{tmp_path}/latin1.txt")


@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs a file that nobody can read")
def test_text_that_cannot_be_read(config, tmp_path, monkeypatch):
    (tmp_path / "memory.txt").symlink_to(UNREADABLE)
    assert "memory.txt cannot be read" in refusal(config, data=f"text:{tmp_path}/memory.txt")


@pytest.mark.parametrize("content", ["", "  \n\n \n", "One short document."])
def test_too_little_text(config, text, content):
    text.write_text(content)
    line = refusal(config)
    assert "too little text" in line
    assert "--sequence-length" in line


def test_a_file_without_blank_lines_has_nothing_to_hold_out(config, text):
    text.write_text(text.read_text().replace("\n\n", "\n"))
    assert "blank lines" in refusal(config)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"sequence_length": 7}, "--sequence-length 7"),
        ({"sequence_length": 10**6}, "--sequence-length 1000000"),
        ({"mask_rate": 0.0}, "--mask-rate 0.0"),
        ({"mask_rate": 0.95}, "--mask-rate 0.95"),
        ({"dropout": 1.0}, "--dropout 1.0"),
        ({"vocab_size": 10}, "--vocab-size 10"),
        ({"model": "huge"}, "--model huge"),
        ({"hidden_size": -1}, "--hidden-size -1"),
        ({"heads": 3}, "--heads 3"),
        ({"hidden_size": 100, "heads": 12}, "--heads 12"),
    ],
)
def test_numbers_that_cannot_be(config, changes, flag):
    assert refusal(config, **changes).startswith(f"{flag}: ")


def test_a_tokenizer_that_is_not_there(config, tmp_path):
    assert "no such vocabulary" in refusal(config, tokenizer=str(tmp_path / "none.txt"))
    (tmp_path / "empty").mkdir()
    assert "no such vocabulary" in refusal(config, tokenizer=str(tmp_path / "empty"))


@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs a file that nobody can read")
def test_a_tokenizer_that_cannot_be_read(config, tmp_path):
    (tmp_path / "vocab.txt").symlink_to(UNREADABLE)
    assert "vocab.txt cannot be read" in refusal(config, tokenizer=str(tmp_path))


@pytest.mark.parametrize("token", SPECIAL)
def test_a_vocabulary_without_a_special_token(config, tmp_path, token):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join([t for t in SPECIAL if t != token] + ["the", "dog"]))
    assert f"lacks {token}" in refusal(config, tokenizer=str(file))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "lacks"),
        (b"\xff\xfe\x00", "cannot be used"),
        ("\n".join([*SPECIAL, "dog", "dog"]).encode(), "twice"),
    ],
)
def test_a_vocabulary_that_is_none(config, tmp_path, content, said):
    (tmp_path / "vocab.txt").write_bytes(content)
    assert said in refusal(config, tokenizer=str(tmp_path))


def test_a_tokenizer_json_that_cannot_be_used(config, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    assert "cannot be used" in refusal(config, tokenizer=str(tmp_path))
    file.write_text("[1, 2]")
    assert "cannot be used" in refusal(config, tokenizer=str(tmp_path))
    layout = json.loads(build_tokenizer([*SPECIAL, "dog"]).to_str())
    layout["model"]["type"] = "BPE"
    file.write_text(json.dumps(layout))
    assert "BPE" in refusal(config, tokenizer=str(tmp_path))


def test_a_vocabulary_of_another_language(config, tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join([*SPECIAL, "\u4e2d", "\u6587"]))
    assert "knows no word" in refusal(config, tokenizer=str(file))


def test_a_cache_that_cannot_be_written(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file"))
    assert refusal(config).startswith(f"ORCHESTRATOR_CACHE {tmp_path / 'file'}: cannot be written")


def test_a_vocabulary_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    tokens = [*SPECIAL, "good"]
    (tmp_path / "vocab.txt").write_bytes("\n".join(tokens).encode("utf-8-sig"))
    assert read_tokenizer(tmp_path)[1].tokens == tuple(tokens)


@pytest.mark.parametrize(
    ("said", "text", "tokens"),
    [
        (None, "\xdcber", ["uber"]),
        ('{"strip_accents": false}', "\xdcber", ["\xfcber"]),
        ('{"strip_accents": null, "do_lower_case": true}', "\xdcber", ["uber"]),
        ('{"do_lower_case": false}', "\xdcber", ["[UNK]"]),
        ('{"tokenize_chinese_chars": false}', "\u4e2d\u6587", ["\u4e2d\u6587"]),
        ('["of another kind"]', "\xdcber", ["uber"]),
    ],
)
def test_what_lies_beside_a_vocabulary_says_how_text_is_normalized(config, tmp_path, said, text, tokens):
    vocabulary = [*SPECIAL, "uber", "\xfcber", "\u4e2d\u6587"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    of = dataclasses.replace(config, tokenizer=str(tmp_path))
    before = data._tokenizer_identity(of)
    if said:
        (tmp_path / "tokenizer_config.json").write_text(said)
    assert read_tokenizer(tmp_path)[0].encode(text, add_special_tokens=False).tokens == tokens
    decides = said is not None and not said.startswith("[")
    assert (data._tokenizer_identity(of) != before) == decides, "a prepared text of before is not taken"


def test_what_lies_beside_a_vocabulary_is_json(config, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "good"]))
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json beside vocab.txt is no JSON" in refusal(config, tokenizer=str(tmp_path))
