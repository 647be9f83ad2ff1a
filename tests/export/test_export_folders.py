"""Where an export goes: others' files stay, an earlier export's go, and one that was broken off can be repeated."""

import json
import multiprocessing

import numpy as np
import pytest
from finished_runs import finish
from PIL import Image

from orchestrator.export import main, store
from orchestrator.exported import PACKAGES
from orchestrator.storage import Folder
from workloads.resnet.config import ResnetConfig

for _name in PACKAGES:
    pytest.importorskip(_name)

PLAIN = {"export.json", "model.onnx", "model.pt2", "model.safetensors", "config.json"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The folder of a finished run on JPEG and PNG files, of which ten are held out."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 5)):
        for number in range(2 * count):
            file = folder / split / ("cat", "dog")[number % 2] / f"{number}.{('jpg', 'png')[number % 3 == 0]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)).save(file)
    run = tmp_path_factory.mktemp("run")
    config = ResnetConfig(data=f"imagefolder:{folder}", image_size=32, batch_size=4, storage="runs", name="photos")
    finish(run, "resnet", config, steps=1)
    return run


def export(run, out) -> int:
    return main([str(run), "--quantize", "none", "--out", str(out), "--rounds", "1"])


def names(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_model_of_image_files_is_exported(photos, tmp_path, capsys):
    """They are decoded by processes, which are gone at the end."""
    others = set(multiprocessing.active_children())
    assert export(photos, tmp_path / "out") == 0, capsys.readouterr().err
    assert not set(multiprocessing.active_children()) - others
    assert names(tmp_path / "out") == PLAIN
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert set(record["written"]) == PLAIN - {"export.json"}
    torchs, onnxs = (row["metrics"] for row in record["table"])
    assert torchs == pytest.approx(onnxs, abs=1e-4)
    assert torchs["accuracy"] * 10 == pytest.approx(round(torchs["accuracy"] * 10))


def test_an_export_that_was_broken_off_is_repeated(photos, tmp_path, capsys, monkeypatch):
    out, write, written = tmp_path / "out", Folder.write, []
    out.mkdir()

    def fails(folder, name, data):
        written.append(name)
        if name == "model.onnx":
            raise OSError("the network is gone")
        write(folder, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", fails)
        with pytest.raises(OSError, match="the network is gone"):
            export(photos, out)
    assert written[-2:] == ["config.json", "model.onnx"]
    assert names(out) == {"config.json", "export.unfinished.json"}
    (out / "mine.txt").write_text("dear")
    assert export(photos, out) == 0, capsys.readouterr().err
    assert names(out) == PLAIN | {"mine.txt"}


def made(folder, **files: str):
    """What an export hands to `store`."""
    folder.mkdir()
    for name, text in {"export.json": "{}", **files}.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def content(folder) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


MINE = {"mine.txt": "dear", "model.txt": "dear", "notes/a.bin": "dear", ".a.txt.1a2b3c4d": "dear"}


@pytest.fixture
def out(tmp_path):
    """A folder of somebody who has exported a.bin and b.bin into it."""
    folder = tmp_path / "out"
    store(made(tmp_path / "first", a_bin="1", b_bin="1"), Folder(str(folder)))
    for name, text in MINE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_others_files_stay_and_an_earlier_exports_go(tmp_path, out):
    store(made(tmp_path / "second", a_bin="2", c_bin="2"), Folder(str(out)))
    found = content(out)
    assert json.loads(found.pop("export.json")) == {"written": ["a.bin", "c.bin"]}
    assert found == {**MINE, "a.bin": "2", "c.bin": "2"}


@pytest.mark.parametrize("failing", range(4))
def test_wherever_it_breaks_off_the_next_export_leaves_nothing_of_it(tmp_path, out, monkeypatch, failing):
    """At the sign that it has begun, at a file, or at the record, which only a whole export has."""
    write, left = Folder.write, [failing]

    def fails(folder, name, data):
        if not left[0]:
            raise OSError(f"at {name}")
        left[0] -= 1
        write(folder, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", fails)
        with pytest.raises(OSError, match=["at export.unfinished", "at b.bin", "at c.bin", "at export.json"][failing]):
            store(made(tmp_path / "second", b_bin="2", c_bin="2"), Folder(str(out)))
    assert (out / "export.json").exists() == (failing == 0)
    assert content(out).items() >= MINE.items()
    store(made(tmp_path / "third", d_bin="3"), Folder(str(out)))
    found = content(out)
    assert json.loads(found.pop("export.json")) == {"written": ["d.bin"]}
    assert found == {**MINE, "d.bin": "3"}


@pytest.mark.parametrize("name", ["a.bin", "b.bin", "export.json", "export.unfinished.json"])
def test_what_was_half_written_when_an_export_was_killed_goes(tmp_path, out, name):
    """See Folder.write, which writes beside the place."""
    (out / f".{name}.1a2b3c4d").write_text("pa")
    store(made(tmp_path / "second", a_bin="2"), Folder(str(out)))
    assert set(content(out)) == {*MINE, "a.bin", "export.json"}


@pytest.mark.parametrize(
    "record", ["", "[]", "{", '{"written": 5}', '{"written": null}', '{"written": [null, "../x"]}']
)
def test_a_record_that_names_nothing_takes_nothing_away(tmp_path, out, record):
    (out / "export.json").write_text(record)
    store(made(tmp_path / "second", a_bin="2"), Folder(str(out)))
    found = content(out)
    assert json.loads(found.pop("export.json")) == {"written": ["a.bin"]}
    assert found == {**MINE, "a.bin": "2", "b.bin": "1"}
