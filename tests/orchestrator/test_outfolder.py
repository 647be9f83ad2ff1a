"""The folder for prepared data: files of somebody else are not touched, what a job has left is known and cleared."""

from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.filecache import TableFile
from orchestrator.outfolder import check, claim, clear
from orchestrator.prepare import main
from orchestrator.storage import Folder
from orchestrator.tables import MANIFEST, Manifest


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not ours")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [MANIFEST, "train-00099.parquet", "parts/00099.json", "prepare.json", "parts"])
def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path, capsys, name):
    write(tmp_path, name, "readme.txt")
    before = contents(tmp_path)
    assert main(["resnet", "--source", "digits", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out {tmp_path}")
    assert "give another folder" in said
    assert said.count("\n") == 1
    assert contents(tmp_path) == before


def test_other_names_are_no_hindrance(tmp_path):
    write(tmp_path, "readme.txt", "train.parquet", "parts/notes.json")
    check(Folder(str(tmp_path)), "resnet")
    check(Folder(str(tmp_path / "new")), "resnet")


def test_a_job_that_was_broken_off_is_known_by_its_workload(tmp_path):
    """Also when it was stopped before the first record."""
    folder = Folder(str(tmp_path))
    claim(folder, "resnet")
    write(tmp_path, "train-00000.parquet")
    check(folder, "resnet")
    with pytest.raises(UserError, match=r"was not made for bert by this command"):
        check(folder, "bert")


def test_data_of_another_workload_is_not_replaced(tmp_path):
    file = (TableFile("some.parquet", 1, 1, "0" * 64),)
    files = {"train": file, "heldout": file}
    found = Manifest("resnet", "there", "", files, {}, (), 0, "f")
    (tmp_path / MANIFEST).write_text(found.to_json())
    with pytest.raises(UserError, match="prepared for resnet, not for bert"):
        check(Folder(str(tmp_path)), "bert")


def test_what_killed_workers_were_writing_does_not_stay(tmp_path):
    mine = [".train-00002.parquet.affa9832", ".manifest.json.0123abcd", "parts/.00002.json.affa9832"]
    left = ["train-00002.parquet", "parts/00002.json"]
    kept = ["train-00001.parquet", "parts/00001.json", "prepare.json", ".train-00002.parquet.old", ".x.affa9832"]
    write(tmp_path, *mine, *left, *kept)
    clear(Folder(str(tmp_path)), {"train-00001.parquet"}, {"parts/00001.json"})
    assert set(contents(tmp_path)) == set(kept)


@pytest.mark.parametrize("name", ["--source", "--out", "--origin", "--licence", "--address"])
def test_what_is_not_utf8_is_refused(tmp_path, capsys, name):
    given = {"--source": "digits", "--out": str(tmp_path / "out")} | {name: "imagefolder:by\udcffte"}
    assert main(["resnet", *(word for pair in given.items() for word in pair)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {name} ")
    assert "not text in UTF-8" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["", " "])
def test_an_empty_out_is_refused(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    assert main(["resnet", "--source", "digits", "--out", out]) == 2
    assert "--out: is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
