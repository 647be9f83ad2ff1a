"""What a folder's address means: a path, or a file system of pyarrow's and a path in it."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orchestrator.errors import UserError, one_line
from orchestrator.redact import uri_has_keys

ALLOWED = "give a folder or a URI such as s3://bucket/runs"
IN_ADDRESSES = "/:@%!$&'()*+,;=~"  # what pyarrow reads as it is; of white space and others it wants %20
# Google Cloud's client asks again for 15 minutes, and cannot be interrupted; whoever can wait asks again himself.
GCS_RETRY = "retry_limit_seconds=8"
# What pyarrow says of a server that is down, overloaded or cut off (S3's words, then Google Cloud's and Azure's); not
# of keys, buckets and files that are wrong.
PASSING = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|NO_SUCH_UPLOAD|INTERNAL_FAILURE|REQUEST_TIMEOUT|curlCode|"
    r"HTTP status (?:429|5\d\d)|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|CURL error|TransportException|"
    r"Azure Error: \[\w*\] (?:429|5\d\d)"
)


def local_path(uri: str, flag: str) -> str:
    """The absolute path of a local folder, given as it is or as file://; "": the URI is of another kind."""
    if "\0" in uri:
        raise UserError(f"{flag} {uri!a}: holds a character that no name has; {ALLOWED}")
    if not uri.startswith("file://") and "://" in uri:
        return ""
    if uri.startswith("file://") and uri[7:8] not in ("/", "~"):
        wrong = "names a host, not a folder such as file:///data" if uri[7:] else "names no folder"
        raise UserError(f"{flag} {uri}: {wrong}; {ALLOWED}")
    try:
        return str(Path(uri.removeprefix("file://")).expanduser().absolute())
    except RuntimeError as error:  # ~somebody unknown
        raise UserError(f"{flag} {uri}: {one_line(error)}; {ALLOWED}") from None


def open_uri(uri: str, flag: str) -> tuple[Any, str]:
    """(pyarrow's file system, the path in it) of an address that is no local folder.

    Raises UserError, and OSError where a server is away.
    """
    from pyarrow import ArrowException, fs

    address, _, query = uri.partition("?")
    scheme, _, rest = address.partition("://")
    if uri_has_keys(uri):
        # The URI is written to the run folder and to logs.
        raise UserError(f"{flag} {scheme}://...: keys do not belong in a URI; use the cloud's own variables")
    if not rest.strip("/"):  # pyarrow takes what is left of it, s3:, for a local folder
        raise UserError(f"{flag} {uri}: names no bucket; {ALLOWED}")
    if "#" in uri:  # pyarrow takes it for the beginning of a fragment, and would use what stands before it
        raise UserError(f"{flag} {uri}: a # cannot be in an address; {ALLOWED}")
    options = [query.rstrip("/")] if query else []
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        options.append(GCS_RETRY)
    try:
        asked = quote(address.rstrip("/"), safe=IN_ADDRESSES)
        found, root = fs.FileSystem.from_uri("?".join([asked, "&".join(options)] if options else [asked]))
    except (ValueError, OSError, NotImplementedError, ArrowException) as error:
        if PASSING.search(str(error)):  # S3 is asked where a bucket is
            raise OSError(one_line(error)) from None
        raise UserError(f"{flag} {uri}: {one_line(error)}; {ALLOWED}") from None
    return found, root.rstrip("/")


_tried = set[str]()


def try_azure(uri: str, file_system: Any, root: str) -> None:
    """Without credentials pyarrow ends the process where a file is opened; a question raises an error."""
    scheme, _, rest = uri.partition("://")
    account = re.split("[/?]", rest)[0]
    if scheme in ("abfs", "abfss") and account not in _tried:
        file_system.get_file_info(root)
        _tried.add(account)
