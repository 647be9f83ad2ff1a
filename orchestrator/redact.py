"""What is written down for people to read and to send on has no keys in it: known ones, and what looks like one."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

GONE = "[redacted]"
SHORTEST = 8  # characters; anything shorter is a word that other lines have too
NAMES = r"(?:secret|token|passw(?:or)?d|passphrase|credentials?|(?:api|account|access|private)[_-]?key|signature)"
NAMED = rf"{NAMES}(?:[_-]?(?:access[_-]?)?(?:key|value))?[\"']?"
PUBLIC = re.compile(r"(?i)_(path|file|dir|mode|uri|url|parallelism)$")
KEYS = re.compile(r"(?i)(?:^|[?&])(?:sig|[^=&]*(?:secret|signature|token|passw|key)[^=&]*)=")  # of a query
VARIABLE = re.compile(rf"(?i){NAMES}")
SHAPES = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), GONE),
    # AWS's keys may have a slash in them; digits and a slash are a port.
    (re.compile(r"(\w://)[^\s/@:\"',]{1,200}:(?!\d+(?:[/\"',\s]|$))[^\s@\"]{1,500}@"), rf"\1{GONE}@"),
    (re.compile(r"(https?://)[^\s/@:\"',]{1,500}@"), rf"\1{GONE}@"),
    (re.compile(r"(?i)\b(bearer|basic|authorization[\"']?\s*[=:]\s*[\"']?\w+)\s+[\w.~+/=-]{8,}"), rf"\1 {GONE}"),
    (re.compile(r"([?&]sig=)[^\s&\"']+"), rf"\1{GONE}"),  # Azure's
    (re.compile(rf"(?i)((?<![\w-])--(?:[\w-]{{1,40}}-)?{NAMES}\s+)(?!-)\S{{6,}}"), rf"\1{GONE}"),
    # name = value, also as JSON and in a query; a bare number is a count (tokens: 4096), token_ids are no secret.
    (re.compile(rf"(?i)({NAMED}\s*[=:]\s*)([\"'])(?!\d+\2)(?:\\.|(?!\2)[^\\\n]){{6,}}"), rf"\1\2{GONE}"),
    (re.compile(rf"(?i)({NAMED}\s*[=:]\s*[\"']?)(?!\d+\b|\[redacted)[^\s\"',&}}\]]{{6,}}"), rf"\1{GONE}"),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"), GONE),
    (re.compile(r"\b(ghp_|github_pat_|hf_|sk-|glpat-|xox[bp]-)[\w-]{16,}"), GONE),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), GONE),
)


def redact(text: str) -> str:
    """`text` without this process's own secrets and without what looks like one."""
    for value in sorted(set(known_secrets()), key=len, reverse=True):
        text = text.replace(value, GONE)
    for shape, instead in SHAPES:
        text = shape.sub(instead, text)
    return text


def uri_has_keys(uri: str) -> bool:
    """Whether there are keys in a URI: before its host, or in its query."""
    address, _, query = uri.partition("?")
    scheme, _, rest = address.partition("://")
    user, at, _ = rest.split("/")[0].rpartition("@")
    if not at and re.match(r"[^/@:]+:(?!\d+/)[^@]*@", rest):  # AWS's keys may have a slash in them; a port is digits
        return True
    # Azure has a container there, and Google Cloud a word that there is no key.
    named = (scheme in ("abfs", "abfss") and ":" not in user) or (scheme in ("gs", "gcs") and user == "anonymous")
    return bool(at and not named) or "@" in query or KEYS.search(query) is not None


def known_secrets() -> Iterator[str]:
    """Values of environment variables that are called a secret, and the token of Ray's clusters."""
    for name, value in os.environ.items():
        if VARIABLE.search(name) and not PUBLIC.search(name) and len(value) >= SHORTEST:
            yield value
    with contextlib.suppress(OSError, RuntimeError):  # what cannot be read, or has no home, is in no text
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        token = file.read_text(errors="replace").strip()
        if len(token) >= SHORTEST:
            yield token
