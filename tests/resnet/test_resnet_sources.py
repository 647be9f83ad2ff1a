"""What a source of images may be and do while it is prepared: odd names, files that change or go, two jobs at once."""

import pytest
from PIL import Image
from preparing import do, job
from pyarrow import parquet

from orchestrator import prepare
from orchestrator.errors import UserError
from workloads.resnet import preparing


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


def test_names_are_those_of_the_files(tmp_path, image_folder):
    """Also with letters that a terminal does not show: a wide space, one that does not break a line."""
    folder = image_folder("png")
    odd = ["a\u3000b.png", "3\u202fPM.png", "\u732b.png"]
    for name, number in zip(odd, range(3), strict=True):
        (folder / "train" / "cat" / f"{number}.png").rename(folder / "train" / "cat" / name)
    do(job("resnet", f"imagefolder:{folder}", tmp_path / "out"))
    names = parquet.read_table(tmp_path / "out" / "train-00000.parquet").column("name").to_pylist()
    assert {f"train/cat/{name}" for name in odd} < set(names)


def test_an_image_that_is_replaced_costs_its_own_part(tmp_path, image_folder):
    folder, out = image_folder("png"), tmp_path / "out"
    do(job("resnet", f"imagefolder:{folder}", out, "--file-mb", "0.000001"))
    assert len(job("resnet", f"imagefolder:{folder}", out, "--file-mb", "0.000001").parts) == 10
    Image.new("RGB", (9, 9)).save(folder / "train" / "cat" / "0.png")
    again = job("resnet", f"imagefolder:{folder}", out, "--file-mb", "0.000001")
    assert len(again.missing()) == 1
    assert do(again) is not None


def test_an_image_that_goes_while_the_source_is_looked_at(tmp_path, image_folder, monkeypatch):
    folder = image_folder("png")

    def looked(images):
        (folder / "train" / "dog" / "1.png").unlink(missing_ok=True)
        return 1.0

    monkeypatch.setattr(preparing, "_bytes_each", looked)
    with pytest.raises(UserError, match="changed while it was prepared"):
        job("resnet", f"imagefolder:{folder}", tmp_path / "out")


def test_a_folder_that_another_job_writes_to_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    do(job("resnet", "digits", out))
    with prepare.alone("prepare", str(out), ""):
        assert prepare.main(["resnet", "--source", "digits", "--out", str(out)]) == 2
    assert "another job is writing to it" in capsys.readouterr().err
    assert prepare.main(["resnet", "--source", "digits", "--out", str(out)]) == 0
    assert "prepared already" in capsys.readouterr().out
