"""A cluster that declares TPUs, as Ray's own tests do: what is refused, and where the workers of a slice are put."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, call, kept_in, ray_processes, run, wait_until
from test_refusals import assert_one_line

from orchestrator.rehearse import stage


@pytest.fixture(scope="module")
def tpus() -> Iterator[Any]:
    """Slice "whole" has both hosts of a v4 2x2x2, slice "short" only its host 0, whose head is free for the asking."""
    before = ray_processes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        with stage("", nodes=0, cpus=1) as where:
            for name, host in (("short", 0), ("whole", 0), ("whole", 1)):
                chips = {"TPU": 4, "accelerator_type:TPU-V4": 1, **({"TPU-v4-16-head": 1} if host == 0 else {})}
                labels = {"slice-name": name, "worker-id": str(host), "topology": "2x2x2", "pod-type": "v4-16"}
                told = {"TPU_NAME": name, "TPU_WORKER_ID": str(host), "TPU_ACCELERATOR_TYPE": "v4-16"}
                where.cluster.add_node(
                    wait=True,
                    num_cpus=4,
                    include_dashboard=False,
                    resources=chips,
                    labels={f"ray.io/tpu-{key}": value for key, value in labels.items()},
                    env_vars={**told, "TPU_TOPOLOGY": "2x2x2"},
                )
            yield where.cluster
    wait_until(lambda: not ray_processes() - before, 30, "the cluster's processes to end")


def test_tpus_without_torch_xla(tpus: Any, tmp_path: Path) -> None:
    """Nothing is said of TPUs on the command line: the nodes say what they are."""
    shown = run("resnet", "--dry-run", *kept_in(tmp_path, "dry", tpus.address))
    assert shown.status == 0, shown.err
    assert "accelerator   tpu (nodes have TPUs), slices of TPU-V4 2x2x2 (2 host(s), 8 workers)" in shown.out
    assert "workers       8 asked for; 8 to begin with" in shown.out
    assert "each          TPU=1, CPU=1" in shown.out
    assert [line.count("worker ") for line in shown.out.splitlines() if ": worker " in line] == [8], "one address"
    refused = run("resnet", *kept_in(tmp_path, "run", tpus.address))
    words = ("--accelerator tpu: torch_xla is not installed there", "'torch_xla[tpu]==2.9.*'", "--accelerator cpu")
    assert_one_line(refused, 2, *words)
    assert not (tmp_path / "run" / "events.jsonl").exists()
    more = run("resnet", "--workers", "16", "--shards", "16", *kept_in(tmp_path, "more", tpus.address))
    assert_one_line(more, 2, "2 slice(s) of TPU-V4 2x2x2", "3 with TPUs, 1 whole slice(s)", "--workers 8 would fit")
    cuda = run("resnet", "--accelerator", "cuda", *kept_in(tmp_path, "cuda", tpus.address))
    assert_one_line(cuda, 2, "--accelerator cuda: none of the cluster's 4 node(s) has a GPU; use --accelerator cpu")


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_workers_of_a_slice_start_and_end_together(tpus: Any) -> None:
    """On the whole slice, not on the one whose head could be had; a killed worker takes the others of its slice."""
    driver = REPOSITORY / "tests/ray/slices_driver.py"
    path = f"{REPOSITORY}:{REPOSITORY}/tests/ray"
    done = call([sys.executable, str(driver), tpus.address], 350, PYTHONPATH=path, RAY_AUTH_MODE="token")
    assert done.status == 0, done.out + done.err
    *slices, alive = [json.loads(line) for line in done.out.splitlines() if line[:1] in "[tf"]
    assert alive is False, "fit() returns when the run is over"
    first, again = slices
    for workers in slices:
        assert {w["slice"] for w in workers} == {"whole"}
        assert sorted(int(w["CLOUD_TPU_TASK_ID"]) for w in workers) == list(range(8)), "one worker a chip"
        assert len({w["node"] for w in workers}) == 2
        assert len({w["TPU_PROCESS_ADDRESSES"] for w in workers}) == 1
    assert not {w["pid"] for w in first} & {w["pid"] for w in again}
