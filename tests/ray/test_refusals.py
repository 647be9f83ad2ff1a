"""What cannot be run is said in one line, before any worker starts; what fails in training is named."""

import signal
from pathlib import Path

from commands import Done, events, finish, kept_in, result, run, start, wait_for_step
from PIL import Image


def assert_one_line(done: Done, status: int, *words: str) -> None:
    assert done.status == status, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words), line
    assert "Traceback" not in done.err + done.out


def test_more_workers_than_fit(cluster: str, tmp_path: Path) -> None:
    done = run("resnet", "--workers", "8", *kept_in(tmp_path, "run", cluster))
    assert_one_line(done, 2, "--workers 8", "--workers 4 would fit", "CPU=0.5")
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    done = run("resnet", *kept_in(tmp_path), "--address", "127.0.0.1:1")
    assert_one_line(done, 2, "--address 127.0.0.1:1")


def test_a_run_that_is_going_on(cluster: str, tmp_path: Path) -> None:
    command = ["resnet", "--steps", "2000", *kept_in(tmp_path, "run", cluster)]
    process = start([*command, "--workers", "1"])
    wait_for_step(tmp_path / "run", 1)
    assert_one_line(run(*command), 2, "going on already")
    process.send_signal(signal.SIGTERM)
    assert finish(process).status == 130


def test_a_loss_that_is_not_finite(cluster: str, tmp_path: Path) -> None:
    done = run("resnet", "--lr", "1e30", "--warmup", "0", "--workers", "2", *kept_in(tmp_path, "run", cluster))
    assert done.status == 1
    assert "loss is not finite in shard" in done.err
    assert "samples [" in done.err
    assert "Traceback" not in done.err
    folder = tmp_path / "run"
    assert result(folder)["status"] == "failed"
    (saved,) = events(folder, "checkpoint_saved")
    assert (folder / "checkpoints" / f"step-{saved['step']}").exists()
    told = result(folder)["failure"]
    assert (told["kind"], told["step"]) == ("non_finite_loss_error", saved["step"])
    assert told["checkpoint_step"] == saved["step"], "the checkpoint of the end is waited for"
    (generation,) = events(folder, "generation_started")
    assert told["pid"] == generation["pids"][told["worker"]]
    shard = int(told["error"].split("shard ")[1].split()[0])
    first, after = generation["ranges"][told["worker"]]
    assert first <= shard < after, "the worker is the one that computed it"
    words = ("where: worker", f"with the checkpoint of step {saved['step']}", f"resume with: {told['resume']}")
    assert all(word in done.err for word in words), done.err
    assert "Traceback" in (folder / "logs" / "errors.log").read_text()


def test_an_image_that_cannot_be_decoded(cluster: str, tmp_path: Path) -> None:
    data = tmp_path / "images"
    for split in ("train", "val"):
        for index, label in enumerate(("cat", "dog")):
            folder = data / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (40, 40), (60 * index, 20 * i, 99)).save(folder / f"{i}.png")
    broken = data / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    done = run(
        "resnet",
        "--data",
        f"imagefolder:{data}",
        "--image-size",
        "32",
        "--batch-size",
        "16",
        "--workers",
        "2",
        "--epochs",
        "1",
        *kept_in(tmp_path, "run", cluster),
    )
    assert done.status == 1, done.err
    assert str(broken) in done.err
    assert "Traceback" not in done.err
    told = result(tmp_path / "run")["failure"]
    assert told["kind"] == "data_error"
    assert str(broken) in told["error"]
    assert told["node"] == events(tmp_path / "run", "generation_started")[0]["nodes"][told["worker"]]
