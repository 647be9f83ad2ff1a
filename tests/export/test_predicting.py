"""An input is prepared as a held-out sample was; what cannot be answered is refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from orchestrator.errors import UserError
from orchestrator.predict import main
from workloads.bert.predicting import BertPredicting
from workloads.bert.wordpiece import SPECIAL, build_tokenizer
from workloads.predicting import Guesses, top
from workloads.resnet.config import ResnetConfig
from workloads.resnet.exporting import ResnetExporting
from workloads.resnet.predicting import ResnetPredicting
from workloads.resnet.workload import ResnetWorkload


def predicting(config: ResnetConfig, folder) -> tuple[ResnetPredicting, ResnetWorkload]:
    workload = ResnetWorkload(config)
    workload.save(workload.build_model(), folder)
    return ResnetPredicting(ResnetExporting(config).about(config, folder), {}), workload


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (301, 200), (64, 64), (4000, 1)])
def test_a_photo_is_prepared_as_in_training(tmp_path, monkeypatch, width, height):
    """The same bits as the held-out sample of the same file: resize, middle, normalization.

    A very long one is not resized at its length, which would take gigabytes.
    """
    sizes, resize = [], Image.Image.resize

    def noted(image, size, *more, **named):
        sizes.append(tuple(size))
        return resize(image, size, *more, **named)

    monkeypatch.setattr(Image.Image, "resize", noted)
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / name / "0.png")
    config = ResnetConfig(data=f"imagefolder:{tmp_path}", image_size=48)
    asked, workload = predicting(config, tmp_path / "model")
    found = asked.inputs(str(tmp_path / "val" / "dog" / "0.png"))["images"]
    expected = workload.samples("heldout").microbatch(np.asarray([1]), 0)["images"].numpy()
    assert np.array_equal(found, expected)
    assert len(sizes) == 2
    assert all(min(size) == 55 and max(size) <= 8 * 55 for size in sizes)


def test_a_digit_is_prepared_as_in_training(tmp_path):
    asked, workload = predicting(ResnetConfig(), tmp_path / "model")
    samples = workload.samples("heldout")
    Image.fromarray(samples.images[7, :, :, 0]).save(tmp_path / "digit.png")
    found = asked.inputs(str(tmp_path / "digit.png"))["images"]
    assert np.array_equal(found, samples.microbatch(np.asarray([7]), 0)["images"].numpy())


def test_an_image_of_another_size_and_mode_fits(tmp_path):
    asked, _ = predicting(ResnetConfig(), tmp_path / "model")
    Image.new("RGBA", (31, 17), (200, 10, 10, 128)).save(tmp_path / "any.png")
    assert asked.inputs(str(tmp_path / "any.png"))["images"].shape == (1, 1, 8, 8)


WORDS = (*SPECIAL, "the", "cat", "sat", "##s", ".")


def bert(tokens: int = 8) -> BertPredicting:
    return BertPredicting({"tokens": tokens}, {"tokenizer.json": with_ends().encode()})


def with_ends() -> str:
    from tokenizers import processors

    tokenizer = build_tokenizer(WORDS)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer.to_str()


def test_masks_become_places_and_words():
    asked = bert()
    given = asked.inputs("The [MASK] sat[MASK] .")
    assert given["input_ids"].tolist() == [[2, 5, 4, 7, 4, 9, 3]]
    assert given["masked"].tolist() == [2, 4]
    output = np.full((2, len(WORDS)), -5.0, np.float32)
    output[0, 6], output[1, 8] = 3.0, 3.0
    answers = asked.answers(output)
    assert [guesses.names[0] for guesses in answers] == ["cat", "##s"]
    assert [len(guesses.names) for guesses in answers] == [5, 5]
    assert asked.closing(answers) == "The cat sats ."


def test_shares_are_the_softmax():
    logits = np.asarray([0.0, 2.0, 1.0], np.float32)
    guesses = top("q", logits, ["a", "b", "c"])
    assert guesses.names == ("b", "c", "a")
    assert np.allclose(guesses.shares, np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum())
    assert isinstance(guesses, Guesses)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no place", r"no \[MASK\] in it"),
        ("[MASK] the cat sat the cat sat", "9 tokens .* takes 8"),
        ("[MASK] caf\udce9", "not text in UTF-8"),
    ],
)
def test_texts_that_cannot_be_asked(text, words):
    with pytest.raises(UserError, match=words):
        bert().inputs(text)


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_images_that_cannot_be_read(tmp_path, content):
    asked, _ = predicting(ResnetConfig(), tmp_path / "model")
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"--input .*x\.png cannot be decoded .*give an image file") as refused:
        asked.inputs(str(tmp_path / "x.png"))
    assert str(refused.value).count("; ") == 1, "one thing to do"


@pytest.mark.filterwarnings("error")
def test_pillow_s_warnings_are_not_the_user_s(tmp_path, monkeypatch):
    asked, _ = predicting(ResnetConfig(), tmp_path / "model")
    Image.new("P", (8, 8)).save(tmp_path / "clear.png", transparency=b"\x00\x80")
    assert asked.inputs(str(tmp_path / "clear.png"))["images"].shape == (1, 1, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert asked.inputs(str(tmp_path / "clear.png"))["images"].shape == (1, 1, 8, 8)


def refusal(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.count("\n") == 1
    return shown.err


def test_folders_that_hold_no_exported_model(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    assert "no exported model is there" in refusal(capsys, str(tmp_path), "--input", "x")
    (tmp_path / "export.json").write_text("{")
    assert "cannot be used by this version" in refusal(capsys, str(tmp_path), "--input", "x")
    (tmp_path / "export.json").write_bytes(b'{"format": "\xff"}')
    assert "cannot be used by this version" in refusal(capsys, str(tmp_path), "--input", "x")
    (tmp_path / "export.json").unlink()
    (tmp_path / "export.json").mkdir()
    assert "export.json: cannot be read" in refusal(capsys, str(tmp_path), "--input", "x")
    (tmp_path / "export.json").rmdir()
    record = {"format": 1, "workload": "resnet", "output": "y", "about": {}, "files": [], "external_data": False}
    (tmp_path / "export.json").write_text(json.dumps(record))
    assert "model.onnx: cannot be read" in refusal(capsys, str(tmp_path), "--input", "x")
    (tmp_path / "model.onnx").write_bytes(b"torn")
    assert "model.onnx: cannot be opened" in refusal(capsys, str(tmp_path), "--input", "x")
    assert "--threads 0" in refusal(capsys, str(tmp_path), "--input", "x", "--threads", "0")
    assert "from 1 to 1024" in refusal(capsys, str(tmp_path), "--input", "x", "--threads", "20000")
