"""The files of cluster/: valid by Ray's own schema and by KubeRay's definitions, and with what the README promises."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
RAY_UP = ("aws", "gcp", "onprem")


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return found


def definitions() -> Path | None:
    """KubeRay's, which lie beside the repository; CI tests a clone of it."""
    origin = subprocess.run(
        ["git", "config", "--get", "remote.origin.url"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    for place in (os.environ.get("KUBERAY_CRDS", ""), REPOSITORY / "../shared/kuberay-crds"):
        if place and Path(place).is_dir():
            return Path(place)
    beside = Path(origin).parent / "shared/kuberay-crds"
    return beside if origin and beside.is_dir() else None


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON schema, in which unknown keys are mistakes."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and not open_ended:
        made["additionalProperties"] = False
    return made


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_accepts_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize(("kind", "name"), [("rayclusters", "raycluster"), ("rayjobs", "rayjob")])
def test_kuberay_accepts_it(kind: str, name: str) -> None:
    folder = definitions()
    if folder is None:
        pytest.skip("KubeRay's definitions are not here; set KUBERAY_CRDS to a folder with its CRD files")
    versions = yaml.safe_load((folder / f"ray.io_{kind}.yaml").read_text())["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    for known in ("metadata",):
        schema["properties"][known] = {"type": "object"}
    jsonschema.Draft202012Validator(strict(schema)).validate(load(f"kuberay/{name}"))
    broken = load(f"kuberay/{name}")
    broken["spec"]["workers"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(strict(schema)).validate(broken)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_clouds_have_a_quiet_head_and_two_pools(name: str) -> None:
    config = load(name)
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"]["CPU"] == 0
    pools = {kind["labels"]["ray.io/market-type"] for kind in kinds.values() if "labels" in kind}
    assert pools == {"on-demand", "spot"}


@pytest.mark.parametrize("name", RAY_UP)
def test_a_token_is_demanded_and_nothing_is_open(name: str) -> None:
    config = load(name)
    starts = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in config[key]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert not any("0.0.0.0" in command for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"]


def cluster_of(name: str) -> dict[str, Any]:
    spec = load(f"kuberay/{name}")["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


def test_both_manifests_are_of_one_cluster() -> None:
    assert cluster_of("raycluster") == cluster_of("rayjob")
    spec = cluster_of("raycluster")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {g["labels"]["ray.io/market-type"] for g in spec["workerGroupSpecs"]} == {"on-demand", "spot"}
    assert load("kuberay/rayjob")["spec"]["entrypoint"].startswith("python -m orchestrator.run ")


def test_the_versions_are_those_of_the_project() -> None:
    import ray

    assert cluster_of("raycluster")["rayVersion"] == ray.__version__


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_spot_machine_listens_for_its_notice(name: str) -> None:
    """After Ray has started, and without holding up `ray up`; of an earlier start one is not left beside it."""
    stop, start, listen = load(name)["worker_start_ray_commands"]
    assert "ray start" in start
    assert listen.endswith("&")
    assert f"-m cluster.notice {name}" in listen
    assert ">" in listen
    pattern = stop.split("'")[1]
    assert re.search(pattern, listen)
    assert not re.search(pattern, stop), "it would end its own shell"
