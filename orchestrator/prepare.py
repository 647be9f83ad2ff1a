"""`python -m orchestrator.prepare WORKLOAD --source ... --out URI`: data as Parquet files, for --data parquet:URI.

A distributed job (Ray Data): the source is cut into parts, each part becomes files by itself, on any node. What a part
became is noted in OUT/parts/; a job that was broken off goes on with the parts that are missing, and one that is done
changes nothing. The same source and settings give the same files. Exit status: 0 prepared, 2 refused, 1 failed.
"""

import argparse
import hashlib
import logging
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.assembly import assemble
from orchestrator.clerk import alone
from orchestrator.command import Parser, check_text, leave, refuse
from orchestrator.digest import digest
from orchestrator.errors import DataError, OrchestratorError, UserError, one_line
from orchestrator.filecache import TableFile
from orchestrator.outfolder import check, claim, clear, read_record, record_name, wait_until_seen
from orchestrator.partmaker import Record, make_parts
from orchestrator.resume import check_absolute
from orchestrator.settings import flag
from orchestrator.storage import PATIENCE_S, Folder
from orchestrator.tables import MANIFEST, SPLITS, Manifest
from workloads.preparation import Preparation
from workloads.registry import WORKLOADS

MB = 10**6
NAMED = 100  # broken samples that the manifest names
LINE_EVERY_S, WAIT_S = 5.0, 14.0
GO_ON = "the same command goes on with what is missing"
log = logging.getLogger("orchestrator.prepare")
OWN_FLAGS = {"bert": ("tokenizer", "vocab_size", "sequence_length")}


class Job:
    """One preparation: what there is to do, what is done, and the manifest at the end."""

    def __init__(self, workload: str, preparation: Preparation, given: argparse.Namespace) -> None:
        self.workload, self.preparation, self.given = workload, preparation, given
        self.folder = Folder(given.out, "--out", PATIENCE_S)
        self.parts = preparation.parts(max(1, int(given.file_mb * MB)))
        identity = [type(preparation).__name__, str(preparation)]  # beside a part, all that decides its files
        self.specs = [digest([identity, part]) for part in self.parts]
        self.records: dict[int, Record] = {}
        self._folded: Any = None  # notes of all of them, which may be large

    def find_done(self) -> None:
        """Take what an earlier job has written, as far as it is what this one would write."""
        there = set(self.folder.child("parts").names())
        for number, spec in enumerate(self.specs):
            record = read_record(self.folder, number) if Path(record_name(number)).name in there else None
            # What could not be read may have been out of reach.
            if record is None or (record["broken"] and self.given.verify):
                continue
            if record["spec"] == spec and all(map(self._whole, record["files"].values())):
                self._keep(record)

    def _whole(self, file: Mapping[str, Any]) -> bool:
        """Whether a file is there; with --verify, byte by byte."""
        try:
            if not self.given.verify:
                return bool(self.folder.size(file["name"]) == file["bytes"])
            return bool(hashlib.sha256(self.folder.read(file["name"])).hexdigest() == file["sha256"])
        except FileNotFoundError:
            return False
        except OSError:
            if not self.folder.is_local:
                raise
            log.warning("%s cannot be read; it is made again", file["name"], exc_info=True)
            return False

    def missing(self) -> list[int]:
        return [number for number in range(len(self.parts)) if number not in self.records]

    def take(self, record: Record) -> None:
        """A part is done; raises as check_broken."""
        self._keep(record)
        self.check_broken()

    def _keep(self, record: Record) -> None:
        self._folded = self.preparation.folded(self._folded, record.pop("notes"))
        self.records[record["number"]] = record

    def check_broken(self) -> None:
        """Raises DataError when too much of the source is broken."""
        broken, things = self.broken(), self.preparation.things()
        if len(broken) > self.given.max_broken * things:
            share = f"more than --max-broken {self.given.max_broken:g} of {things}"
            raise DataError(
                f"{len(broken)} cannot be read, {share}; the first: {broken[0]}; or give a larger --max-broken"
            )

    def broken(self) -> list[str]:
        return [name for number in sorted(self.records) for name in self.records[number]["broken"]]

    def manifest(self) -> Manifest:
        done = [self.records[number] for number in sorted(self.records)]
        files = {
            split: tuple(TableFile(**record["files"][split]) for record in done if split in record["files"])
            for split in SPLITS
        }
        for split in SPLITS:
            if not files[split]:
                raise UserError(f"--source {self.given.source}: gives no {split} samples; {self.preparation.more()}")
        about, broken = self.preparation.about(self._folded), self.broken()
        sums = [file.sha256 for split in SPLITS for file in files[split]]
        schema = next(record["schema"] for record in done if record["schema"])
        return Manifest(
            self.workload, self.given.source, self.given.licence, files, about, tuple(broken[:NAMED]), len(broken),
            digest([sums, about]), schema, self.given.origin,
        )  # fmt: skip

    def finish(self) -> Manifest:
        """Write the manifest, which makes the data usable, and delete what an earlier job left over."""
        self.check_broken()  # an earlier job may have allowed more
        found = self.manifest()
        wait_until_seen(self.folder, [file for split in SPLITS for file in found.files[split]])
        if self.folder.read_text(MANIFEST) != found.to_json():
            self.folder.write(MANIFEST, found.to_json().encode())
        files = {file.name for files in found.files.values() for file in files}
        clear(self.folder, files, set(map(record_name, self.records)))
        return found


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Set when somebody asks to stop: what is raised in the middle of Ray's code may be lost there."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(job: Job, address: str) -> None:
    """Make what is missing, with progress."""
    from orchestrator.connect import cluster

    asked = [(number, job.specs[number], job.parts[number]) for number in job.missing()]
    log_file = Path(tempfile.gettempdir()) / f"orchestrator-prepare-{os.getpid()}.log"
    with cluster(address, log_file), interrupts() as stopped, lines(job):
        try:
            for record in make_parts(job.folder.uri, job.preparation, asked):
                job.take(record)
                if stopped.is_set():
                    raise KeyboardInterrupt
        except OrchestratorError:
            raise
        except Exception as error:  # Ray's own, such as a node that was lost too often
            if stopped.is_set():
                raise KeyboardInterrupt from error
            log.exception("the job broke off")
            reason = one_line(error)
            raise DataError(f"the job broke off ({reason}); more is in {log_file}; {GO_ON}") from error
    log_file.unlink(missing_ok=True)


@contextmanager
def lines(job: Job) -> Iterator[None]:
    """A line about the job every few seconds while something is done, and less often while nothing is."""
    import ray

    done = threading.Event()

    def tell() -> None:
        before, since_s = len(job.records), time.monotonic()
        while not done.wait(LINE_EVERY_S):
            said, waited_s = f"{len(job.records)} of {len(job.parts)} parts", time.monotonic() - since_s
            if len(job.records) > before:
                before, since_s = len(job.records), time.monotonic()
                print(f"{said}, {len(job.broken())} broken", flush=True)
            elif waited_s > WAIT_S:
                since_s = time.monotonic()
                try:
                    free, there = (
                        all_of.get("CPU", 0.0) for all_of in (ray.available_resources(), ray.cluster_resources())
                    )
                except Exception:  # Ray's head is away, or the command ends
                    log.warning("Ray's resources cannot be read", exc_info=True)
                    continue
                print(f"{said}; none for {waited_s:.0f} s; {free:g} of {there:g} CPUs are free", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def parser(workload: str) -> argparse.ArgumentParser:
    made = Parser(prog=f"python -m orchestrator.prepare {workload}", allow_abbrev=False)
    made.add_argument("--source", required=True, help="as --data of the run: imagefolder:DIR, text:GLOB, docs, ...")
    made.add_argument("--out", required=True, help="folder or URI (s3://...) that gets the files")
    made.add_argument("--origin", default="", help="where the source is from, such as its address, for the manifest")
    made.add_argument("--licence", default="", help="terms of the source, for the manifest")
    made.add_argument("--file-mb", type=float, default=64.0, help="size of a file, about [64 MB]")
    made.add_argument("--max-broken", type=float, default=0.001, help="share of samples that may be unreadable [0.001]")
    made.add_argument(
        "--verify", action="store_true", help="read all files, make damaged ones again, and try what was broken"
    )
    made.add_argument("--address", default="", help="Ray cluster to use, as in orchestrator.run")
    for name in OWN_FLAGS.get(workload, ()):
        made.add_argument(flag(name), help="as in orchestrator.run")
    return made


def prepare(workload: str, arguments: Sequence[str]) -> None:
    """The whole command."""
    given = parser(workload).parse_args(arguments)
    for name, value in vars(given).items():
        if isinstance(value, str):
            check_text(flag(name), value)
    entry = WORKLOADS[workload]
    own = {name: value for name in OWN_FLAGS.get(workload, ()) if (value := getattr(given, name)) is not None}
    if not 0 < given.file_mb * MB < math.inf or not 0 <= given.max_broken <= 1:
        raise UserError("--file-mb has to be above 0, and --max-broken from 0 to 1")
    if not given.out.strip():
        raise UserError("--out: is empty; give a folder or a URI such as s3://bucket/data")
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        check_absolute("--out", given.out, "s3://bucket/data")
    out = Folder(given.out, "--out")
    check(out, workload)
    if not out.is_local:  # a bucket may be missing; a local folder is made when the source is known to be usable
        out.check_writable()
    config = entry.absolute_paths(assemble(entry.config_type(), {"data": given.source, **own}))
    job = Job(workload, entry.prepare(config), given)
    out.check_writable()
    with alone("prepare", job.folder.uri, "another job is writing to it; let it end, or give another --out"):
        job.find_done()
        todo = job.missing()
        more = f"{len(todo)} of {len(job.parts)} parts to do, to {job.folder.uri}"
        print(f"{workload} from {given.source}: {more}", flush=True)
        if todo:
            claim(job.folder, workload)
            run(job, given.address)
        found = job.finish()
    counts = " + ".join(f"{found.samples(split):,}" for split in SPLITS)
    print(f"{'prepared' if todo else 'prepared already'}: {counts} samples, {found.broken_count} broken")
    for name in found.broken:
        print(f"broken: {name}")
    flags = ["--data", f"parquet:{job.folder.uri}", *job.preparation.run_flags()]
    print(f"next: python -m orchestrator.run {workload} {shlex.join(flags)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: one line and status 2 for a user's mistake, a traceback for ours."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in WORKLOADS:
        print(
            f"usage: python -m orchestrator.prepare {{{','.join(WORKLOADS)}}} --source ... --out ...", file=sys.stderr
        )
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        prepare(arguments[0], arguments[1:])
    except OrchestratorError as error:  # who reads the source calls it --data
        error.args = (str(error).replace("--data:", "--source:").replace("--data ", "--source "),)
        return refuse(error)
    except KeyboardInterrupt:
        print(f"stopped; {GO_ON}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    leave(main)
