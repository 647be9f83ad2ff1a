"""A spot machine's notice as AWS gives it, from its metadata server to the run, which leaves that machine in time."""

from pathlib import Path

import pytest
from commands import REPOSITORY, events, finish, kept_in, records, result, wait_for_step, wait_until
from hosts import built
from machines import NOT_HERE, Machines

pytestmark = pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)

STEPS = ["resnet", "--steps", "600", "--checkpoint-every", "1000000"]
EVERYWHERE = f"RAY_AUTH_MODE=disabled PYTHONPATH={REPOSITORY} PATH=~/venv/bin:$PATH"
LIMITS = "--min-worker-port=0 --max-worker-port=0 --object-store-memory=100000000"
PORT = 8169

# Version 2 of EC2's metadata service, as far as notices go: sys.argv: a file that is there from the notice on; a port.
SERVICE = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Service(BaseHTTPRequestHandler):
    def do_PUT(self):
        self.tell(200 if self.path == "/latest/api/token" else 404, "a-token")

    def do_GET(self):
        if self.headers.get("X-aws-ec2-metadata-token") != "a-token":
            return self.tell(401, "")
        if self.path != "/latest/meta-data/spot/instance-action" or not os.path.exists(sys.argv[1]):
            return self.tell(404, "")
        goes = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(os.path.getmtime(sys.argv[1]) + 120))
        self.tell(200, json.dumps({"action": "terminate", "time": goes}))

    def tell(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

HTTPServer(("127.0.0.1", int(sys.argv[2])), Service).serve_forever()
"""


@pytest.mark.timeout(300)
def test_a_machine_that_aws_takes_away_is_left_in_time(tmp_path: Path) -> None:
    with built(Machines, 3) as net:
        for number, joins in enumerate(
            ("--head --port=6379 --num-cpus=0 --include-dashboard=false", *[f"--address={net.address(0)}:6379"] * 2)
        ):
            cpus = "--num-cpus=1" if number else ""
            done = net.ssh(number, f"{EVERYWHERE} ~/venv/bin/ray start {joins} {cpus} {LIMITS}")
            assert done.status == 0, done.out + done.err
        (net.shared / "service.py").write_text(SERVICE)
        told = net.shared / "told"
        service = net.begin(net.login(2, f"~/venv/bin/python {net.shared}/service.py {told} {PORT}"))
        listens = f"cd {REPOSITORY} && {EVERYWHERE} python -m cluster.notice aws --metadata http://127.0.0.1:{PORT}"
        notice = net.begin(net.login(2, listens))
        kept = [*kept_in(net.shared, "run", f"{net.address(0)}:6379"), "--workers", "1:2"]
        job = net.begin(
            net.login(0, f"cd {REPOSITORY} && {EVERYWHERE} python -m orchestrator.run {' '.join([*STEPS, *kept])}")
        )
        wait_until(lambda: bool(records(net.shared / "run")) or job.poll() is not None, 120, "the first step")
        assert job.poll() is None, finish(job)
        wait_until(lambda: records(net.shared / "run")[-1]["workers"] == 2, 60, "two workers")
        wait_for_step(net.shared / "run", 50)
        assert notice.poll() is None
        told.touch()
        listened, done = finish(notice), finish(job)
        service.kill()
        service.communicate(timeout=30)
        assert done.status == 0, done.out + done.err
        assert listened.status == 0, listened.out + listened.err
        (draining,) = events(net.shared / "run", "node_draining")
        assert draining["node"] in listened.out
        drained = [i for i in result(net.shared / "run")["incidents"] if i["kind"] == "node_drained"]
        assert [(i["steps_lost"], i["workers_before"], i["workers_after"]) for i in drained] == [(0, 2, 1)]
        assert records(net.shared / "run")[-1]["step"] == 600
