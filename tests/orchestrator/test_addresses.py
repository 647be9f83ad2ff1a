"""Addresses of folders in object storage: what is refused, what is waited for."""

from types import SimpleNamespace

import pytest

from orchestrator.errors import UserError
from orchestrator.storage import Folder
from orchestrator.uris import PASSING


@pytest.mark.parametrize("uri", ["s3://bucket/runs#1?region=r", "gs://bucket#2"])
def test_what_pyarrow_would_cut_off_is_refused(uri):
    with pytest.raises(UserError, match="a # cannot be in an address; give a folder or a URI"):
        Folder(uri)


@pytest.mark.parametrize("patience_s", [None, 60.0])
def test_who_asks_where_a_bucket_is_waits_too(monkeypatch, patience_s):
    """S3 is asked for the region of a bucket when its address is opened."""
    answers = ["AWS Error NETWORK_CONNECTION: curlCode: 6", "AWS Error THROTTLING", "HTTP status 429", ""]

    def opened(uri):
        if said := answers.pop(0):
            raise OSError(said)
        return SimpleNamespace(), "bucket/x"

    monkeypatch.setattr("pyarrow.fs.FileSystem", SimpleNamespace(from_uri=opened))
    monkeypatch.setattr("orchestrator.patience.PAUSES_S", (0.0,))
    if patience_s is None:
        with pytest.raises(UserError, match=r"does not answer .*NETWORK_CONNECTION.*whether the server is up"):
            Folder("s3://bucket/x")
    else:
        assert Folder("s3://bucket/x", patience_s=patience_s).path("y") == "bucket/x/y"
        assert not answers


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("Azure Error: [ServerBusy] 503 The server is busy", True),
        ("Azure Error: [] 429 Too many requests", True),
        ("Azure Error: [AuthenticationFailed] 403 Server failed to authenticate", False),
        ("AWS Error ACCESS_DENIED during PutObject operation: HTTP status 403", False),
    ],
)
def test_what_passes(said, passes):
    assert bool(PASSING.search(said)) == passes


@pytest.mark.parametrize("name", ["my data", "donn\u00e9es", "a[1]", "my%20data", "a+b=c,d@e"])
def test_letters_that_an_address_cannot_have_are_put_into_words_that_it_can(name):
    """pyarrow refuses a space; who writes %20 for it means a space."""
    folder = Folder(f"s3://bucket/{name}?region=us-east-1")
    for part in (folder, folder.child("below"), Folder(folder.uri)):
        assert part.path("x").startswith(f"bucket/{name.replace('%20', ' ')}/")
        assert part.path("x").endswith("/x")
