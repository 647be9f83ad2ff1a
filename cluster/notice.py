"""Spot machines: asks the cloud whether this one is about to be taken away, and tells Ray.

    python -m cluster.notice aws
    python -m cluster.notice gcp

The run then moves its shards from here and writes a checkpoint before the machine goes. AWS says so two minutes before
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html), Google Cloud 30 seconds
(https://cloud.google.com/compute/docs/instances/spot#preemption-process). Where there is no metadata server it waits
for one. Started beside Ray by cluster/aws.yaml and cluster/gcp.yaml; ends when it has told Ray.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from orchestrator.nodewatch import drain_node

EVERY_S = 2.0
ANSWER_S = 5.0
AWS, AWS_TOKEN_S = "http://169.254.169.254", "21600"
GCP, GCP_NOTICE_S = "http://metadata.google.internal", 30.0
AGAIN = 30  # times Ray is asked; its head may be away


def ask(url: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> str | None:
    """The metadata server's answer; None: it has no such page. Raises OSError where it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy: it is this machine's
    try:
        with opener.open(
            urllib.request.Request(url, method=method, headers=dict(headers or {})), timeout=ANSWER_S
        ) as got:
            return str(got.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def aws(base: str, now_s: float) -> float | None:
    """Seconds until AWS takes the machine; None: it has not said so. With a session's token, as IMDSv2 asks for."""
    token = ask(f"{base}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": AWS_TOKEN_S})
    told = ask(f"{base}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token or ""})
    if told is None:
        return None
    return max(0.0, datetime.fromisoformat(json.loads(told)["time"]).timestamp() - now_s)


def gcp(base: str, now_s: float) -> float | None:
    """Seconds until Google Cloud takes the machine; None: it has not said so."""
    told = ask(f"{base}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if told is not None and told.strip() == "TRUE" else None


CLOUDS: dict[str, tuple[Callable[[str, float], float | None], str]] = {"aws": (aws, AWS), "gcp": (gcp, GCP)}


def wait_for_notice(cloud: str, base: str) -> float:
    """Until the machine is about to go; returns the seconds that are left."""
    silent = False
    while True:
        try:
            left_s = CLOUDS[cloud][0](base, time.time())
            silent = False
        except Exception as error:  # whatever an answer that is none leads to
            if not silent:
                print(f"{base}: no answer ({error}); asking on", file=sys.stderr, flush=True)
            left_s, silent = None, True
        if left_s is not None:
            return left_s
        time.sleep(EVERY_S)


def drain(seconds: float, reason: str) -> list[str]:
    """Tell Ray that this machine's nodes are gone in `seconds`; returns their ids.

    Raises:
        RuntimeError: there are none, or Ray refuses.
    """
    from ray._private import services

    nodes = sorted(services.find_node_ids())  # of the Ray processes here
    if not nodes:
        raise RuntimeError("no Ray runs on this machine")
    address = services.canonicalize_bootstrap_address_or_die(None)
    for node in nodes:
        if why := drain_node(address, node, seconds, reason):
            raise RuntimeError(f"Ray does not drain node {node}: {why}")
    return nodes


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m cluster.notice", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--metadata", metavar="URL", help="the metadata server [the cloud's own]")
    settings = parser.parse_args(arguments)
    left_s = wait_for_notice(settings.cloud, settings.metadata or CLOUDS[settings.cloud][1])
    gone_s = time.time() + left_s
    for attempt in range(AGAIN):
        try:
            nodes = drain(max(0.0, gone_s - time.time()), f"{settings.cloud}: this spot machine is taken away")
        except Exception as error:  # whatever Ray raises while its head is away
            print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr, flush=True)
            if attempt + 1 < AGAIN:
                time.sleep(1.0)
            continue
        print(f"gone in {left_s:.0f} s: told Ray of {', '.join(nodes)}", flush=True)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
