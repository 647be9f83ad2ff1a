"""Notices that a spot machine is about to be taken away, from servers that answer as the clouds' do."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import notice

TOKEN = "a-session's-token"


class Cloud:
    """Answers of a metadata server: (method, path) -> (headers that it asks for, status, text)."""

    def __init__(self) -> None:
        self.pages: dict[tuple[str, str], tuple[dict[str, str], int, str]] = {}
        self.asked = 0
        cloud = self

        class Answers(BaseHTTPRequestHandler):
            def answer(self) -> None:
                cloud.asked += 1
                needed, status, text = cloud.pages.get((self.command, self.path), ({}, 404, ""))
                if any(self.headers.get(name) != value for name, value in needed.items()):
                    status, text = 401, ""
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_PUT = answer

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setattr(notice, "EVERY_S", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no machine's metadata come from a proxy
    found = Cloud()
    yield found
    found.server.shutdown()
    found.server.server_close()


def on_aws(cloud: Cloud, action: str | None = None) -> None:
    life = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
    cloud.pages["PUT", "/latest/api/token"] = (life, 200, TOKEN)
    if action is not None:
        shown = ({"X-aws-ec2-metadata-token": TOKEN}, 200, action)
        cloud.pages["GET", "/latest/meta-data/spot/instance-action"] = shown


def on_gcp(cloud: Cloud, preempted: str) -> None:
    path = "/computeMetadata/v1/instance/preempted"
    cloud.pages["GET", path] = ({"Metadata-Flavor": "Google"}, 200, preempted)


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_aws_says_when(cloud: Cloud) -> None:
    on_aws(cloud, json.dumps({"action": "terminate", "time": in_seconds(120)}))
    assert 110 < notice.wait_for_notice("aws", cloud.url) <= 120


def test_a_time_that_has_passed_is_now(cloud: Cloud) -> None:
    on_aws(cloud, json.dumps({"action": "stop", "time": in_seconds(-5)}))
    assert notice.wait_for_notice("aws", cloud.url) == 0.0


def test_google_cloud_gives_half_a_minute(cloud: Cloud) -> None:
    on_gcp(cloud, "TRUE")
    assert notice.wait_for_notice("gcp", cloud.url) == 30.0


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_machine_that_stays_is_waited_with(cloud: Cloud, name: str) -> None:
    on_aws(cloud)
    on_gcp(cloud, "FALSE")
    found: list[float] = []
    waits = threading.Thread(target=lambda: found.append(notice.wait_for_notice(name, cloud.url)), daemon=True)
    waits.start()
    until(lambda: cloud.asked > 20)
    assert not found
    on_aws(cloud, json.dumps({"action": "terminate", "time": in_seconds(60)}))
    on_gcp(cloud, "TRUE")
    waits.join(20)
    assert found


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_server_that_fails_is_asked_again(cloud: Cloud, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With no answer, an error, or rubbish; said once."""
    for path in ("/latest/api/token", "/latest/meta-data/spot/instance-action"):
        cloud.pages["PUT" if path.endswith("token") else "GET", path] = ({}, 500, "")
    cloud.pages["GET", "/computeMetadata/v1/instance/preempted"] = ({}, 503, "")
    found: list[float] = []
    waits = threading.Thread(target=lambda: found.append(notice.wait_for_notice(name, cloud.url)), daemon=True)
    waits.start()
    until(lambda: cloud.asked > 10)
    for rubbish in ("<html>not JSON</html>", "null", "[]", '{"time": 7}'):
        on_aws(cloud, rubbish)
        asked = cloud.asked
        until(lambda before=asked: cloud.asked > before + 10)
    on_aws(cloud, json.dumps({"action": "terminate", "time": in_seconds(60)}))
    on_gcp(cloud, "TRUE\n")
    waits.join(20)
    assert found
    assert capsys.readouterr().err.count("\n") == 1


def test_ray_is_told_again_until_it_hears(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gcp(cloud, "TRUE")
    told: list[float] = []

    def drain(seconds: float, reason: str) -> list[str]:
        told.append(seconds)
        assert "gcp" in reason
        if len(told) < 3:
            raise RuntimeError("the head is away\nfor now")
        return ["a-node"]

    monkeypatch.setattr(notice, "drain", drain)
    monkeypatch.setattr(notice.time, "sleep", lambda _: None)
    assert notice.main(["gcp", "--metadata", cloud.url]) == 0
    assert len(told) == 3
    assert 30.0 >= told[0] >= told[1] >= told[2] > 0
    shown = capsys.readouterr()
    assert shown.err == "RuntimeError: the head is away\n" * 2
    assert "a-node" in shown.out


def test_nobody_hears(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gcp(cloud, "TRUE")

    def drain(seconds: float, reason: str) -> list[str]:
        raise ConnectionError("no head")

    monkeypatch.setattr(notice, "drain", drain)
    monkeypatch.setattr(notice.time, "sleep", lambda _: None)
    assert notice.main(["gcp", "--metadata", cloud.url]) == 1
