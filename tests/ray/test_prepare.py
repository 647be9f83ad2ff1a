"""`python -m orchestrator.prepare` as a user types it: a job on the cluster, broken off, taken up, trained from."""

import re
import signal
import sys
from pathlib import Path

from commands import begin, finish, kept_in, result, start, wait_until

SMALL = ["--hidden-size", "32", "--steps", "40", "--shards", "4", "--batch-size", "32"]


def write_text(folder: Path) -> None:
    folder.mkdir()
    for part in range(12):
        lines = [f"The cat number {n} sees dog {n * part % 97} run to house {n % 13}." for n in range(3000)]
        (folder / f"{part}.txt").write_text("\n\n".join(lines))


def test_a_job_that_was_broken_off_goes_on_and_is_trained_from(cluster: str, tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    out, here = tmp_path / "out", [sys.executable, "-m", "orchestrator.prepare", "bert", "--address", cluster]
    source = ["--source", f"text:{tmp_path}/text/*.txt", "--vocab-size", "300", "--sequence-length", "16"]
    command = [*here, *source, "--out", str(out), "--file-mb", "0.02"]
    process = begin(command)
    wait_until(lambda: len(list(out.glob("parts/*.json"))) >= 3, 120, "three parts")
    process.send_signal(signal.SIGINT)
    broken_off = finish(process)
    assert broken_off.status == 130, broken_off.out + broken_off.err
    assert not (out / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    done = finish(begin(command))
    assert done.status == 0, done.out + done.err
    todo, parts = map(int, re.search(r"(\d+) of (\d+) parts to do", done.out).groups())
    assert 0 < todo <= parts - 3
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in before} == before
    again = finish(begin(command))
    assert again.out.splitlines()[1].startswith("prepared already")
    told = re.search(r"next: python -m orchestrator.run (.*)", again.out)[1].split()
    trained = [*told, *SMALL, "--shuffle-window", "3"]
    runs = {n: start([*trained, "--workers", str(n), *kept_in(tmp_path, f"run{n}", cluster)]) for n in (1, 3)}
    for process in runs.values():
        ended = finish(process)
        assert ended.status == 0, ended.out + ended.err
    assert result(tmp_path / "run1")["weights_sha256"] == result(tmp_path / "run3")["weights_sha256"]


def test_mistakes_are_one_line(cluster: str, tmp_path: Path) -> None:
    """Also those that a node of the cluster finds."""
    (tmp_path / "bad.txt").write_bytes(b"good\n\n\xff\xfe")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good"]))
    here = [sys.executable, "-m", "orchestrator.prepare", "bert", "--address", cluster, "--out", str(tmp_path / "out")]
    for given, words in (
        (["--source", "text:/nowhere/*"], "no file matches"),
        (["--source", f"text:{tmp_path}/bad.txt", "--tokenizer", f"{tmp_path}/vocab.txt"], "is not UTF-8 text"),
    ):
        done = finish(begin([*here, *given]))
        assert done.status == 2, done.out + done.err
        assert done.err.startswith("error: ")
        assert words in done.err
        assert done.err.count("\n") == 1
