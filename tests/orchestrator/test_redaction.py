"""What is written down for people has no keys in it, and other words stay."""

import logging
import sys
from pathlib import Path

import pytest

from orchestrator.connect import Redacted
from orchestrator.redact import GONE, redact, uri_has_keys
from orchestrator.runfolder import RunFolder
from orchestrator.storage import Folder


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("GET https://me:hunter2hunter2@host/x", "hunter2"),
        ("Authorization: Bearer abcdefgh12345678", "abcdefgh"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7", "wJalr"),
        ('{"api_key": "0123456789abcdef"}', "0123456789abcdef"),
        ("https://s3/x?X-Amz-Signature=0a1b2c3d4e5f&Expires=5", "0a1b2c"),
        ("id AKIAIOSFODNN7EXAMPLE used", "AKIAIOSF"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----", "MIIEow"),
        ("cloned with ghp_0123456789abcdefghij", "ghp_0123"),
        ("client_secret_key: s3cr3t-s3cr3t", "s3cr3t"),
        ("credentials='0a1b2c3d'", "0a1b2c"),
        ("abfs://c@a.dfs.core.windows.net/r?sv=2024&sig=x%2Fyz12&se=1", "x%2Fyz12"),
        ("'s3://AK1A:wJalrXUtnFEMI/K7MDENG/bPx@bucket/runs': cannot be parsed", "MDENG"),
        ("cloning https://0123abcdef@git.example.com/x", "0123abcdef"),
        ("postgres://me:pa,ss'word1@host/db", "word1"),
        ('password="correct horse battery staple"', "battery"),
        ("password=abc);defghijkl", "defghi"),
        ("Authorization: Token abcdefgh12345678", "abcdefgh"),
        ("AccountName=me;AccountKey=0a1b2c3d==;", "0a1b2c"),
        ("x.py --db-password hunter2hunter2", "hunter2"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc", "eyJhbGci"),
    ],
)
def test_what_looks_like_a_key_is_gone(text, secret):
    assert secret not in redact(text)
    assert GONE in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "tokens: 4096 in 12 s",
        "step 7: loss is not finite in shard 3 (loss nan): samples [1, 2]",
        "weights 5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f",
        'File "/a/token.py", line 3',
        "tokenizer: bert-base-uncased",
        "    model(token_type_ids=segments_BT)",
        'tokenizer = "bert-base-uncased"',
        "--tokenizer docs/vocabulary.txt",
        "hdfs://namenode:8020/runs/a:b@c",
        '["http://10.0.0.1:8080","user@example.com"]',
        "tcp://10.0.0.1:6379,foo@bar",
    ],
)
def test_other_words_stay(text):
    assert redact(text) == text


@pytest.mark.parametrize("line", ["-" * 10**6, "a://b:" * 10**5, "password=" * 10**5, "--a-" * 10**5, "x" * 10**6])
@pytest.mark.timeout(20)
def test_long_lines_hold_nobody_up(line):
    """The coordinator redacts where it hears hearts beat."""
    redact(line)


@pytest.mark.parametrize(
    ("uri", "has"),
    [
        ("s3://bucket/runs?region=eu-west-1&scheme=http&endpoint_override=host%3A9000", False),
        ("abfss://container@account.dfs.core.windows.net/runs", False),
        ("abfs://account.blob.core.windows.net/c/runs?credential_kind=cli&tenant_id=t", False),
        ("gs://anonymous@bucket/runs?retry_limit_seconds=9", False),
        ("hdfs://namenode:8020/runs/a@b", False),
        ("s3://key:secret@bucket/runs", True),
        ("s3://key@bucket/runs", True),
        ("s3://key:se/cr/et@bucket/runs", True),
        ("abfs://container:key@account.dfs.core.windows.net/runs", True),
        ("gs://me@bucket/runs", True),
        ("abfs://account.blob.core.windows.net/c/runs?sv=2024&sig=xyz", True),
        ("s3://bucket/runs?endpoint_override=u:p@host", True),
        ("s3://bucket/runs?access_key=a&secret_key=b", True),
        ("s3://bucket/runs?Session_Token=a", True),
    ],
)
def test_a_uri_with_keys_is_known(uri, has):
    assert uri_has_keys(uri) is has


def test_keys_of_this_process_are_gone(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("4d5e6f7a8b9c\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    monkeypatch.setenv("OTHER_TOKEN", "short")
    assert redact("a not-to-be-seen b 4d5e6f7a8b9c c short") == f"a {GONE} b {GONE} c short"
    folder = RunFolder(Folder(str(tmp_path / "run")))
    folder.error("ValueError: not-to-be-seen\n")
    assert (tmp_path / "run" / "logs" / "errors.log").read_text() == f"ValueError: {GONE}\n"


@pytest.mark.parametrize("odd", ["closed", "no home"])
def test_a_token_that_cannot_be_read_is_no_error(monkeypatch, tmp_path, odd):
    def refuse(*_, **__):
        raise PermissionError if odd == "closed" else RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(Path, "read_text" if odd == "closed" else "home", refuse)
    assert redact("password=abcdefgh") == f"password={GONE}"


def test_the_log_of_the_command_has_no_keys(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    try:
        raise ValueError("not-to-be-seen")
    except ValueError:
        record = logging.LogRecord("ray", 40, "x.py", 1, "used %s", ("not-to-be-seen",), sys.exc_info())
    text = Redacted("%(message)s").format(record)
    assert text.startswith(f"used {GONE}\nTraceback")
    assert "not-to-be-seen" not in text
