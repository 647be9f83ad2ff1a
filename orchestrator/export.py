"""`python -m orchestrator.export runs/NAME --quantize none|dynamic|static`: the trained model, to be used elsewhere.

Writes a folder for orchestrator.predict: model.onnx and model.pt2, and with `none` model.safetensors. Evaluates what
it has made on the held-out split and measures it beside fp32. Exit status: 0 exported; 2 refused; 1 failed.
"""

import contextlib
import dataclasses
import errno
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.assembly import assemble
from orchestrator.command import Parser, check_threads, leave, refuse
from orchestrator.config import RunConfig
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.exported import ABOUT, ONNX, PACKAGES, PROGRAM, loading, need
from orchestrator.runfolder import RunFolder
from orchestrator.settings import flag
from orchestrator.storage import PATIENCE_S, Folder, half_written
from workloads.exporting import Exporting
from workloads.registry import WORKLOADS

FULL = (errno.ENOSPC, errno.EDQUOT)
MODES = ("none", "dynamic", "static")
UNFINISHED = "export.unfinished.json"


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: of the run.
        workload: its name.
        config: its settings.
        weights_sha256: of the trained model.
    """

    folder: Folder
    workload: str
    config: RunConfig
    weights_sha256: str


def find_run(uri: str) -> Trained:
    """The run in a folder; raises UserError where there is none, or it has not finished."""
    run = RunFolder(Folder(uri, "RUN"))
    settings = run.settings()
    workload = str(settings.pop("workload", ""))
    if workload not in WORKLOADS:
        raise UserError(f"{uri}: of the workload {workload!r}, which is not one of {', '.join(WORKLOADS)}")
    config = assemble(WORKLOADS[workload].config_type(), settings)
    result = run.result() or {}
    if result.get("status") != "finished":
        command = f"python -m orchestrator.run {workload} --storage {config.storage} --name {config.name}"
        raise UserError(f"{uri}: the run has not finished; let it finish with: {command}")
    return Trained(run.folder, workload, config, str(result.get("weights_sha256")))


def settle_out(trained: Trained, given: str, mode: str) -> Folder:
    """Where the files go; raises UserError where something else is there, or it cannot be written."""
    out = Folder(given, "--out") if given else trained.folder.child("export").child(mode)
    out.check_writable()
    others = [name for name in out.names() if not name.startswith(".probe-") and half_written(name) != UNFINISHED]
    if others and not any(out.read_text(sign) for sign in (ABOUT, UNFINISHED)):
        raise UserError(f"--out {out.uri}: holds other files; give an empty folder, or one that an export has made")
    return out if out.is_local else Folder(out.uri, "--out", PATIENCE_S)  # much has been computed when it is written


def fetch_model(trained: Trained, local: Path) -> None:
    """Copy the run's model/ to a folder of this machine; raises UserError where there is none."""
    source = trained.folder.child("model")
    names = source.names()
    if not names:
        raise UserError(f"{source.uri}: no trained model is there; train again under another --name")
    for name in names:
        try:
            content = source.read(name)
        except OSError as error:
            raise UserError(f"{source.uri}/{name}: cannot be read ({error})") from None
        with room_for_files():
            (local / name).write_bytes(content)


@contextlib.contextmanager
def room_for_files() -> Iterator[None]:
    """Something that writes to this machine's folder for temporary files; raises UserError where that is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        words = f"{tempfile.gettempdir()}: {error.strerror}; make room, or set TMPDIR to another"
        raise UserError(words) from None


def about_of(exporting: Exporting, config: RunConfig, folder: Path, named: str) -> dict[str, Any]:
    """What the workload says of the model in a folder; raises UserError where its files are damaged."""
    with loading(named):
        return exporting.about(config, folder)


def store(local: Path, out: Folder) -> None:
    """Put the files of a folder into storage, what says that they are whole last; drop those of an export before.

    Others' files are left alone. One that is broken off leaves a sign of what it was about to write.
    """
    before, names = _written(out), sorted(file.name for file in local.iterdir() if file.name != ABOUT)
    out.write(UNFINISHED, json.dumps({"written": sorted({*before, *names})}).encode())
    out.delete(ABOUT)
    for name in out.names():
        if name in before - set(names) or half_written(name) in {*before, ABOUT, UNFINISHED}:
            out.delete(name)
    for name in names:
        out.write(name, (local / name).read_bytes())
    about = json.loads((local / ABOUT).read_text()) | {"written": names}
    out.write(ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    out.delete(UNFINISHED)


def _written(out: Folder) -> set[str]:
    """Names of the files of an export before, or of one that was broken off."""
    try:
        about = json.loads(out.read_text(UNFINISHED) or out.read_text(ABOUT) or "{}")
        return {str(name) for name in about.get("written", (ONNX, PROGRAM))}
    except (ValueError, AttributeError, TypeError):
        return set()


def export(settings: Any) -> str:
    """The whole command; returns what to print."""
    _check(settings)
    trained = find_run(settings.run)
    entry = WORKLOADS[trained.workload]
    need(*PACKAGES)
    from orchestrator.exporter import Choices, Exporter  # imports torch

    exporting = entry.export(trained.config)
    if settings.quantize in exporting.refused:
        reason = exporting.refused[settings.quantize]
        raise UserError(f"--quantize {settings.quantize}: not for {trained.workload}; {reason}")
    out = settle_out(trained, settings.out, settings.quantize)
    entry.check_data(trained.config)
    with room_for_files(), tempfile.TemporaryDirectory(prefix="orchestrator-export-") as scratch:
        model, files, aside = (Path(scratch) / name for name in ("trained", "files", "aside"))
        for folder in (model, files, aside):
            folder.mkdir()
        fetch_model(trained, model)
        chosen = Choices(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Choices)})
        # The data may have changed since: with the model's own tokenizer, or its numbers of the classes.
        about = about_of(exporting, trained.config, model, "model/ of the run")
        config = exporting.settings_for(entry.absolute_paths(trained.config).data, about, model)
        entry.check_data(config)
        workload = exporting.workload_for(config, about)
        exporter = Exporter(trained.workload, trained.config, workload, exporting, chosen, model, files, aside)
        shown = exporter.export(trained.folder.uri, trained.weights_sha256)
        store(files, out)
    predict = f"python -m orchestrator.predict {out.uri} --input {exporting.asked}"
    return f"{shown}\nexported: {out.uri}\nnext: {predict}"


def _check(settings: Any) -> None:
    """Raises UserError for a number out of range."""
    check_threads(settings.threads)
    for name, low in (("calibration_samples", 1), ("rounds", 1), ("fine_tune_steps", 0)):
        if getattr(settings, name) < low:
            raise UserError(f"{flag(name)} {getattr(settings, name)}: out of range; give a whole number from {low}")
    for given, fits, allowed in (
        ("fine_tune_lr", 0 < settings.fine_tune_lr < math.inf, "a finite number above 0"),
        ("round_seconds", settings.round_seconds >= 0, "a number from 0"),
        ("accuracy_limit", not math.isnan(settings.accuracy_limit), "a number of points"),
    ):
        if not fits:
            raise UserError(f"{flag(given)} {getattr(settings, given)}: out of range; give {allowed}")


def parser() -> Parser:
    """The command line."""
    made = Parser(
        prog="python -m orchestrator.export",
        description="The model of a finished run as ONNX and torch.export program, fp32 or int8, measured beside fp32.",
        allow_abbrev=False,
    )
    made.add_argument("run", metavar="RUN", help="the run's folder or URI, such as runs/NAME")
    made.add_argument(
        "--quantize", choices=MODES, default="none",
        help="none: fp32; dynamic: int8 weights, activations quantized on the fly (bert); static: int8 with "
        "calibrated ranges (resnet) [none]",
    )  # fmt: skip
    made.add_argument("--out", default="", help="folder or URI that gets the files [RUN/export/QUANTIZE]")
    made.add_argument(
        "--threads", metavar="N", type=int, default=1,
        help="CPU threads, of latencies too; fine-tuning takes all cores [1]",
    )  # fmt: skip
    made.add_argument("--rounds", metavar="N", type=int, default=101, help="latencies are medians of so many [101]")
    made.add_argument(
        "--round-seconds", metavar="S", type=float, default=20.0,
        help="and of fewer, at least 5, where they take longer than this for a batch [20 s]",
    )  # fmt: skip
    made.add_argument(
        "--calibration-samples", metavar="N", type=int, default=512,
        help="static: training samples that set the ranges of activations [512]",
    )  # fmt: skip
    made.add_argument(
        "--accuracy-limit", metavar="POINTS", type=float, default=0.5,
        help="static: fine-tune when int8 loses more than so many percentage points [0.5]",
    )  # fmt: skip
    made.add_argument(
        "--fine-tune-steps", metavar="N", type=int, default=100,
        help="static: steps of quantization-aware fine-tuning, 64 samples each; 0: none [100]",
    )  # fmt: skip
    made.add_argument(
        "--fine-tune-lr", metavar="LR", type=float, default=0.01, help="static: its learning rate, falling to 0 [0.01]"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    try:
        print(export(parser().parse_args(arguments)))
    except OrchestratorError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    leave(main)
