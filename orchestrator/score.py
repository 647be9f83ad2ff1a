"""`python -m orchestrator.score RUN-OR-MODEL --data KIND:PATH`: a trained model's figures on a held-out split.

Spread over the workers of a Ray cluster; the figures are the same for any number of them, and on the data of its
training those of the run's result.json. Exit status: 0 evaluated; 2 refused; 1 failed; 130 stopped.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.assembly import assemble
from orchestrator.command import Parser, leave, refuse
from orchestrator.config import RunConfig
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.export import about_of, fetch_model, find_run
from orchestrator.exported import ONNX, need, read_file, read_record, record_in
from orchestrator.jsonlines import dumps
from orchestrator.progress import LINE_EVERY_S
from orchestrator.storage import Folder
from orchestrator.values import Pairs
from workloads.registry import WORKLOADS


@dataclasses.dataclass(frozen=True)
class Model:
    """What is evaluated.

    Attributes:
        uri: where it is.
        workload: its name.
        config: of the run that trained it.
        files: of the model, by name.
        quantize: how it was exported; "": it is a run's own model/.
        about: of an exported one; {}: not known yet.
        weights_sha256: of a run's.
        threads: with which it was evaluated before.
    """

    uri: str
    workload: str
    config: RunConfig
    files: dict[str, bytes]
    quantize: str
    about: dict[str, Any]
    weights_sha256: str
    threads: int


def find_model(uri: str) -> Model:
    """The model of a finished run, or an exported one; raises UserError where there is neither."""
    folder = Folder(uri, "MODEL")
    if record_in(folder) is not None:
        return _exported(uri)
    trained = find_run(uri)
    with tempfile.TemporaryDirectory(prefix="orchestrator-score-") as scratch:
        fetch_model(trained, Path(scratch))
        files = {file.name: file.read_bytes() for file in Path(scratch).iterdir()}
    config, sha256 = trained.config, trained.weights_sha256
    return Model(trained.folder.uri, trained.workload, config, files, "", {}, sha256, config.threads)


def _exported(uri: str) -> Model:
    need("onnxruntime")
    folder, record = read_record(uri)
    if "config" not in record:
        raise UserError(f"{uri}: was exported before models could be evaluated; export the run again")
    settings = tomllib.loads(record["config"])
    workload = settings.pop("workload")
    if workload not in WORKLOADS:
        raise UserError(f"{uri}: of the workload {workload}, which is not one of {', '.join(WORKLOADS)}")
    config = assemble(WORKLOADS[workload].config_type(), settings)
    names = [ONNX, *([f"{ONNX}.data"] if record["external_data"] else []), *record["files"]]
    files = {name: read_file(folder, name) for name in names}
    threads = int(record["measured_on"]["threads"])
    return Model(folder.uri, workload, config, files, record["quantize"], record["about"], "", threads)


@contextlib.contextmanager
def progress(samples: int) -> Iterator[Callable[[int, int], None]]:
    """Something to tell of (samples done, workers): a bar on a terminal, elsewhere a line every few seconds."""
    told_s, told = -LINE_EVERY_S, 0

    def line(done: int, workers: int) -> None:
        nonlocal told_s, told
        now_s = time.monotonic()
        if (not told and done) or now_s - told_s >= LINE_EVERY_S:
            waiting = "" if workers else ": waiting for Ray to start one"
            print(f"{done:,} of {samples:,} samples, {workers} workers{waiting}", file=sys.stderr, flush=True)
            told_s, told = now_s, done

    if not sys.stderr.isatty():
        yield line
        return
    from tqdm import tqdm

    with tqdm(total=samples, unit="sample", dynamic_ncols=True) as bar:

        def move(done: int, workers: int) -> None:
            bar.set_description(f"{workers} workers", refresh=False)
            bar.update(done - bar.n)

        yield move


def score(settings: Any) -> dict[str, Any]:
    """The whole command; returns what was found, as plain JSON."""
    per_worker = _resources(settings.resources_per_worker)
    model = find_model(settings.model)
    if model.quantize and per_worker.get("GPU"):
        raise UserError("--resources-per-worker GPU: an exported model is run on CPUs; leave it out")
    entry = WORKLOADS[model.workload]
    asked = dataclasses.replace(model.config, data=settings.data or model.config.data)
    data = entry.absolute_paths(asked).data
    from orchestrator.connect import cluster  # from here on torch and ray are imported
    from orchestrator.scorer import Task, put

    exporting = entry.export(model.config)
    with tempfile.TemporaryDirectory(prefix="orchestrator-score-") as scratch:
        folder = put(model.files, Path(scratch))
        about = model.about or about_of(exporting, model.config, folder, f"{model.uri}/model:")
        found = entry.check_data(exporting.settings_for(data, about, folder))
    print(f"{model.uri} on {found.description}", file=sys.stderr, flush=True)
    task = Task(model.workload, model.config, data, about, model.weights_sha256, model.threads, found.fingerprint)
    per_worker = per_worker or {"CPU": float(model.threads)}
    began_s = time.monotonic()
    log_file = Path(tempfile.gettempdir()) / f"orchestrator-score-{time.time_ns()}.log"
    with cluster(settings.address, log_file):
        from orchestrator.scoring import Scoring

        scoring = Scoring(task, model.files, found.heldout_samples, settings.workers, per_worker)
        with progress(found.heldout_samples) as show:
            scored = scoring.run(show)
    log_file.unlink(missing_ok=True)
    return {
        "model": model.uri,
        "workload": model.workload,
        "quantize": model.quantize or None,
        "data": data,
        "fingerprint": found.fingerprint,
        "samples": found.heldout_samples,
        "metrics": scored.metrics,
        "workers": scored.workers,
        "workers_lost": scored.lost,
        "wall_s": round(time.monotonic() - began_s, 3),
    }


def _resources(text: str) -> dict[str, float]:
    """{} where nothing was given."""
    try:
        amounts = Pairs.parse(text).numbers()
    except ValueError as error:
        raise UserError(f"--resources-per-worker {text}: {error}; write such as CPU=2") from None
    if text and not any(amounts.values()):
        raise UserError(f"--resources-per-worker {text}: reserves nothing; write such as CPU=1")
    if parts := Pairs.parse(text).not_whole():
        raise UserError(f"--resources-per-worker {text}: {parts[0]} above 1 must be a whole number")
    return {name: amount for name, amount in amounts.items() if amount}


def parser() -> Parser:
    """The command line."""
    made = Parser(
        prog="python -m orchestrator.score",
        description="The figures of a trained or exported model on a held-out split, with workers all over a cluster.",
        allow_abbrev=False,
    )
    made.add_argument("model", metavar="MODEL", help="a finished run's folder, or one that orchestrator.export made")
    made.add_argument("--data", default="", help="whose held-out split, as --data of orchestrator.run [the run's]")
    made.add_argument(
        "--workers", metavar="N", type=int, default=0, help="at most [as many as the cluster has room for]"
    )
    made.add_argument(
        "--resources-per-worker", metavar="WORKER", default="",
        help="what each reserves, such as CPU=2 or GPU=1,CPU=4 [CPU: the threads with which it was evaluated before]",
    )  # fmt: skip
    made.add_argument("--address", default="", help="Ray cluster to use, as in orchestrator.run")
    made.add_argument("--json", action="store_true", help="print what was found as JSON")
    made.add_argument("--out", default="", metavar="FILE", help="write it to a file, too")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    try:
        settings = parser().parse_args(arguments)
        if settings.workers < 0:
            raise UserError(
                f"--workers {settings.workers}: give a number from 1, or 0 for as many as there is room for"
            )
        out = Path(settings.out) if settings.out else None
        if out and (
            out.is_dir() or not out.absolute().parent.is_dir() or (out.exists() and not os.access(out, os.W_OK))
        ):
            raise UserError(f"--out {out}: no file can be written there; give a file in a folder that exists")
        if out:
            Folder(str(out.absolute().parent), "--out").check_writable()
        found = score(settings)
    except OrchestratorError as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped; nothing was kept", file=sys.stderr)
        return 130
    problem = ""
    try:
        if out:
            out.write_text(dumps(found, indent=1) + "\n")
    except OSError as error:  # the disk has filled meanwhile
        problem = f"--out {out}: cannot be written ({error.strerror}); what was found is above"
    _tell(found, settings.json)
    return refuse(UserError(problem)) if problem else 0


def _tell(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(dumps(found), flush=True)
        return
    lost = f", {found['workers_lost']} lost" if found["workers_lost"] else ""
    print(f"{found['samples']:,} held-out samples, {found['workers']} workers{lost}, {found['wall_s']:.1f} s")
    print("held-out: " + "  ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items()), flush=True)


if __name__ == "__main__":
    leave(main)
