"""OpenStack Swift with its S3 interface on this machine: a real, persistent object store, with keys that are checked.

Its programs are those on the PATH, or in the folder that SWIFT_BIN names:

    python -m venv /tmp/swift && /tmp/swift/bin/pip install swift && apt-get install memcached
    SWIFT_BIN=/tmp/swift/bin pytest -m long tests/ray/test_swift.py
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from commands import wait_until

KEY, SECRET = "test:tester", "not-to-be-seen"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
BUILDERS = {"account": 6202, "container": 6201, "object": 6200}
PROXY = """
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true

[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats s3api tempauth copy slo dlo proxy-logging proxy-server

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
"""
FILTERS = {"s3api": "s3api", "proxy-logging": "proxy_logging"}
PLAIN = ("catch_errors", "gatekeeper", "listing_formats", "copy", "slo", "dlo", "s3api", "proxy-logging")


def program(name: str) -> str | None:
    """Where a program of Swift is."""
    folder = os.environ.get("SWIFT_BIN")
    return shutil.which(name, path=f"{folder}{os.pathsep}{os.environ['PATH']}" if folder else None)


def missing() -> str:
    """What is not installed; empty if all is."""
    names = ("swift-proxy-server", "swift-ring-builder", "memcached")
    return ", ".join(name for name in names if program(name) is None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Swift:
    """One server of each kind, one device, one copy of everything."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "devices" / "d1").mkdir(parents=True)
        self.ports = {name: free_port() for name in ("proxy", "memcached", *BUILDERS)}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._configure()

    def _configure(self) -> None:
        (self._folder / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = orchestrator\n[storage-policy:0]\nname = one\ndefault = yes\n"
        )
        for kind in BUILDERS:
            builder = str(self._folder / f"{kind}.builder")
            device = f"r1z1-127.0.0.1:{self.ports[kind]}/d1"
            for words in (["create", "4", "1", "1"], ["add", device, "1"], ["rebalance"]):
                subprocess.run([str(program("swift-ring-builder")), builder, *words], check=True, capture_output=True)
            pipeline = f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
            self._write(kind, pipeline)
        filters = "".join(f"\n[filter:{name}]\nuse = egg:swift#{FILTERS.get(name, name)}\n" for name in PLAIN)
        self._write("proxy", PROXY.format(secret=SECRET, memcached=self.ports["memcached"]) + filters)

    def _write(self, kind: str, text: str) -> None:
        default = {
            "bind_ip": "127.0.0.1", "bind_port": self.ports[kind], "workers": 0, "swift_dir": self._folder,
            "devices": self._folder / "devices", "mount_check": "false", "user": "root",
            "recon_cache_path": self._folder, "fallocate_reserve": 0,
        }  # fmt: skip
        lines = "".join(f"{key} = {value}\n" for key, value in default.items())
        (self._folder / f"{kind}.conf").write_text(f"[DEFAULT]\n{lines}\n{text}")

    def start(self) -> None:
        """All servers; waits until they answer."""
        memcached = ["memcached", "-l", "127.0.0.1", "-p", str(self.ports["memcached"]), "-u", "root"]
        self._begin([str(program(memcached[0])), *memcached[1:]], "memcached")
        for kind in (*BUILDERS, "proxy"):
            self._begin([str(program(f"swift-{kind}-server")), str(self._folder / f"{kind}.conf")], kind)
        for name, port in self.ports.items():
            wait_until(lambda port=port: answers(port), 60, f"{name}: {self._said(name)}")  # type: ignore[misc]

    def _begin(self, command: list[str], name: str) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def _said(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()[-1000:]

    def stop(self) -> None:
        """All servers, at once; what they keep stays."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def address(self, folder: str) -> str:
        """The URI of a folder in the bucket, as a user writes it."""
        return f"s3://bucket/{folder}?scheme=http&endpoint_override=127.0.0.1:{self.ports['proxy']}&region=us-east-1"

    def make_bucket(self) -> None:
        from pyarrow import fs

        s3 = fs.S3FileSystem(
            access_key=KEY, secret_key=SECRET, endpoint_override=f"127.0.0.1:{self.ports['proxy']}", scheme="http",
            region="us-east-1", allow_bucket_creation=True,
        )  # fmt: skip
        s3.create_dir("bucket")


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Swift]:
    """A Swift with an empty bucket."""
    made = Swift(folder)
    try:
        made.start()
        made.make_bucket()
        yield made
    finally:
        made.stop()
