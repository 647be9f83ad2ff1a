"""The commands of the README, as typed."""

import json
import os
import re
from pathlib import Path

import pytest
from commands import (
    RAY,
    call,
    events,
    finish,
    kept_in,
    ray_processes,
    records,
    result,
    run,
    start,
    wait_for_step,
    wait_until,
)

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def first_run(storage: Path) -> tuple[Path, str]:
    """The default run's folder and what it printed; .ci/run has typed it already."""
    if "ORCHESTRATOR_FIRST_RUN" in os.environ:
        return Path(os.environ["ORCHESTRATOR_FIRST_RUN"]), Path(os.environ["ORCHESTRATOR_FIRST_OUT"]).read_text()
    before = ray_processes()
    done = run("resnet", *kept_in(storage))
    assert done.status == 0, done.err
    wait_until(lambda: ray_processes() <= before, 30, "Ray's processes to end")
    return storage / "run", done.out + done.err


@pytest.mark.busy
def test_resnet_on_digits_reaches_98_percent(tmp_path: Path) -> None:
    folder, printed = first_run(tmp_path)
    found = result(folder)
    assert found["status"] == "finished"
    assert found["metrics"]["accuracy"] >= 0.98
    assert found["steps"] == len(records(folder)) == 360
    assert found["samples"] == sum(r["samples"] for r in records(folder)) == 30 * 1437
    (measured,) = events(folder, "precision_chosen")
    assert measured["seconds"].keys() == {"fp32", "bf16"}
    assert f'\nprecision = "{measured["precision"]}"\n' in (folder / "config.toml").read_text()
    assert str(folder) in printed
    assert "next:" in printed
    assert not CONTROL.search(printed)
    assert (folder / "model" / "model.safetensors").exists()


@pytest.mark.busy
@pytest.mark.timeout(600)
def test_bert_on_pythons_own_documentation(tmp_path: Path) -> None:
    done = run("bert", *kept_in(tmp_path), timeout_s=540)
    assert done.status == 0, done.err
    metrics = result(tmp_path / "run")["metrics"]
    assert metrics["masked_lm_loss"] <= metrics["unigram_entropy"] - 0.5
    fill_a_mask(tmp_path / "run" / "model")


def fill_a_mask(folder: Path) -> None:
    """As a user of transformers would."""
    import orchestrator.vision_ops  # noqa: F401  (before what imports torchvision)

    # isort: split
    from transformers import AutoTokenizer, BertForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForMaskedLM.from_pretrained(folder)
    inputs = tokenizer("the value of the [MASK] is a string.", return_tensors="pt")
    place = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    token = tokenizer.convert_ids_to_tokens(int(model(**inputs).logits[0, place].argmax()))
    assert token in tokenizer.get_vocab()
    assert token not in tokenizer.all_special_tokens


def test_ray_job_submit(tmp_path: Path) -> None:
    """`ray start --head`, then `ray job submit`, with the token that Ray demands."""
    before = ray_processes()
    started = call([RAY, "start", "--head", "--num-cpus=2"], 120)
    assert started.status == 0, started.err
    try:
        here = run("resnet", "--steps", "4", *kept_in(tmp_path, "here"))
        assert here.status == 0, here.err
        job = ["python", "-m", "orchestrator.run", "resnet", "--steps", "4"]
        submit = [RAY, "job", "submit", "--working-dir", ".", "--", *job, *kept_in(tmp_path, "job")]
        submitted = call(submit, 240, RAY_AUTH_MODE="token")
        assert submitted.status == 0, submitted.out + submitted.err
        (scraped,) = json.loads(Path("/tmp/ray/prom_metrics_service_discovery.json").read_text())
        assert scraped["targets"], "where cluster/monitoring/prometheus.yaml looks for nodes"
    finally:
        call([RAY, "stop", "--force"], 60)
    assert result(tmp_path / "job")["weights_sha256"] == result(tmp_path / "here")["weights_sha256"]
    (generation,) = events(tmp_path / "here", "generation_started")
    assert generation["workers"] == 2
    log = submitted.out.split("Running entrypoint")[1].split("next:")[0]
    assert "held-out:" in log
    assert not CONTROL.search(log)
    wait_until(lambda: ray_processes() <= before, 30, "Ray's processes to end")


@pytest.mark.long
def test_two_commands_at_once_have_a_ray_each(tmp_path: Path) -> None:
    """The second must not join the private cluster of the first, which ends with the first."""
    long = start(["resnet", "--steps", "20000", "--workers", "1", *kept_in(tmp_path, "long")])
    wait_for_step(tmp_path / "long", 1)
    other = start(["resnet", "--steps", "200", "--workers", "1", *kept_in(tmp_path, "other")])
    wait_for_step(tmp_path / "other", 1)
    long.terminate()
    assert finish(long).status == 130
    done = finish(other)
    assert done.status == 0, done.err
    assert result(tmp_path / "other")["steps"] == 200


def test_the_keys_are_there_and_secrets_are_not(cluster: str, tmp_path: Path) -> None:
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    command = ["resnet", "--workers", "1", "--steps", "2", *kept_in(tmp_path, "run", cluster)]
    done = run(*command, AWS_SECRET_ACCESS_KEY="not-to-be-seen")
    assert done.status == 0, done.err
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    written = done.out + done.err + "".join(p.read_text(errors="replace") for p in files)
    assert token not in written
    assert "not-to-be-seen" not in written
    keys = {"step", "epoch", "loss", "lr", "samples_per_s", "workers", "generation", "data_share"}
    assert all(keys <= set(record) for record in records(tmp_path / "run"))
    assert result(tmp_path / "run").keys() >= {
        "status", "workload", "steps", "samples", "loss", "metrics", "weights_sha256", "wall_s", "samples_per_s",
        "generations", "incidents",
    }  # fmt: skip
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = run(*command)
    assert again.status == 0
    assert "finished already" in again.out
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
