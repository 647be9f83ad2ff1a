"""Settings are the same after their text: TOML in the run folder, and what the command line takes."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.assembly import LEAST_STALL_S, SYNC_SETTINGS, build
from orchestrator.config import RunConfig, to_toml
from orchestrator.errors import UserError
from orchestrator.settings import settings
from orchestrator.values import Cadence, Pairs, WorkerRange
from workloads.registry import WORKLOADS

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def values(name: str, field, default) -> st.SearchStrategy:
    meta = field.metadata
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    if isinstance(default, bool):
        return st.booleans()
    if name == "stall_limit":
        return st.just(0.0) | st.floats(LEAST_STALL_S, 1e300)
    if isinstance(default, float):
        if meta["below"] is not None:
            return st.floats(meta["low"], meta["below"], exclude_max=True, allow_subnormal=False)
        high = meta["high"] if meta["high"] is not None else 1e300
        return st.floats(meta["low"], high, allow_subnormal=False)
    if isinstance(default, int):
        return st.integers(int(meta["low"]), int(meta["high"] or 10**12))
    return {
        "node_labels": st.sampled_from(["", "zone=a", "zone=!a,spot=yes"]),
        "log": st.sampled_from(["", "wandb", "mlflow,tensorboard"]),
        "checkpoint_every": st.integers(1, 10**9).map(str) | st.floats(0.001, 1e9).map(lambda s: f"{s:f}s"),
    }.get(name, TEXT)


def parallel(draw, workload: str, chosen: dict[str, object], fields: dict[str, object]) -> None:
    """Choose how the model is held, and what goes with it; what is settled by that leaves `fields`."""
    schedule = fields.pop("pipeline_schedule")
    del fields["parallel"]
    kinds = ["ddp", "fsdp", "hsdp=2", "pipeline=2", *(["tensor=2"] if workload == "bert" else [])]
    if chosen["sync"] != "allreduce" or chosen["shards"] == 1 or (kind := draw(st.sampled_from(kinds))) == "ddp":
        return
    chosen["parallel"] = kind
    chosen["workers"] = draw(st.sampled_from(["2", f"2:{chosen['shards']}"]))
    if kind.startswith("pipeline"):
        chosen["pipeline_schedule"] = draw(st.sampled_from(schedule.metadata["choices"]))
    for name in ("reduce", "precision", "compile", "model", "heads", "layers", "intermediate_size", "short_length"):
        fields.pop(name, None)


def accelerate(draw, chosen: dict[str, object], fields: dict[str, object]) -> None:
    """Choose what the run computes on, and what goes with it; what is settled by that leaves `fields`."""
    for name in ("accelerator", "accelerator_type", "topology", "resources_per_worker"):
        del fields[name]
    kinds = ["auto", "cpu", "cuda", *(["tpu"] if chosen["sync"] == "allreduce" and "parallel" not in chosen else [])]
    kind = draw(st.sampled_from(kinds))
    reserved = {"auto": ["", "CPU=0.5", "GPU=1,CPU=8"], "cpu": ["", "GPU=0,CPU=2"], "cuda": ["", "CPU=8", "GPU=1"]}
    chosen |= {"accelerator": kind, "resources_per_worker": draw(st.sampled_from(reserved.get(kind, ["", "TPU=1"])))}
    if kind in ("auto", "tpu"):
        chosen |= {"accelerator_type": draw(TEXT), "topology": draw(TEXT)}
    if kind == "tpu":
        for name in ("reduce", "compile", "precision", "placement", "node_labels"):
            fields.pop(name, None)


@st.composite
def configurations(draw, workload: str) -> RunConfig:
    config_type = WORKLOADS[workload].config_type()
    defaults = config_type()
    shards = 1 << draw(st.integers(0, 8))
    chosen: dict[str, object] = {"shards": shards, "batch_size": shards * draw(st.integers(1, 1000))}
    chosen[draw(st.sampled_from(["steps", "epochs"]))] = draw(st.integers(1, 10**9))
    maximum = draw(st.integers(1, shards))
    chosen["workers"] = f"{draw(st.integers(1, maximum))}:{maximum}"
    fields = {n: f for n, f in settings(config_type).items() if n not in (*chosen, "steps", "epochs")}
    chosen["sync"] = draw(st.sampled_from(fields.pop("sync").metadata["choices"]))
    parallel(draw, workload, chosen, fields)
    accelerate(draw, chosen, fields)
    for name, modes in SYNC_SETTINGS.items():
        field = fields.pop(name)
        if name == "staleness" and chosen["sync"] in modes:
            chosen[name] = draw(st.sampled_from(["0", "3", "inf"]))
        elif chosen["sync"] in modes:
            chosen[name] = draw(values(name, field, getattr(defaults, name)))
    if chosen["sync"] != "allreduce":
        for name in ("reduce", "precision", "loader_processes"):
            del fields[name]
    for name in draw(st.sets(st.sampled_from(sorted(fields)))):
        chosen[name] = draw(values(name, fields[name], getattr(defaults, name)))
    if chosen.get("reduce") == "ddp" or chosen["sync"] == "parameter-server":
        chosen.pop("compile", None)
    return build(config_type, chosen)


@pytest.mark.parametrize("workload", WORKLOADS)
@given(data=st.data())
def test_a_configuration_is_the_same_after_toml(workload, data):
    config = data.draw(configurations(workload))
    content = tomllib.loads(to_toml(config, workload))
    assert content.pop("workload") == workload
    assert build(type(config), content) == config


@given(st.floats(0.001, 1e12) | st.integers(1, 10**12))
def test_a_cadence_is_the_same_after_its_text(number):
    cadence = Cadence(seconds=number) if isinstance(number, float) else Cadence(steps=number)
    assert Cadence.parse(str(cadence)) == cadence


def test_pairs_and_ranges_are_the_same_after_their_text():
    for text in ("", "GPU=1,CPU=8", "zone=!a"):
        assert str(Pairs.parse(text)) == text
    assert str(WorkerRange.parse("1:4")) == "1:4"
    assert str(WorkerRange.parse("4:4")) == "4"


LABELS = ("a", "a-._b", "", "-a", "a_", "a b", "9", "x" * 63, "x" * 64, "spot")
RULES = st.one_of(
    st.sampled_from(LABELS),
    st.lists(st.sampled_from(LABELS), max_size=3).map(lambda words: f"in({', '.join(words)})"),
    st.lists(st.sampled_from(LABELS), max_size=3).map(lambda words: f"in({',  '.join(words)})"),
)
KEYS = st.one_of(st.sampled_from(LABELS), st.sampled_from(["ray.io/zone", "a..b/c", "-a/b", "a/-b", "a/b/c", "/a"]))


@given(KEYS, RULES, st.sampled_from(["", "!", "!!"]))
def test_labels_are_taken_as_ray_takes_them(key, rule, negation):
    from ray._private.label_utils import validate_label_selector

    wanted = validate_label_selector({key: negation + rule}) is None and bool(key and negation + rule)
    try:
        build(RunConfig, {"steps": 9, "node_labels": Pairs(((key, negation + rule),))})
        taken = True
    except UserError:
        taken = False
    assert taken == wanted
