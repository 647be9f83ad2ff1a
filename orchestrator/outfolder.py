"""The folder that gets prepared data: whether it may be written to, and what earlier jobs have left in it.

OUT/prepare.json       whose folder it is; written before the first part, so that a job that was broken off is known
OUT/parts/00000.json   what a part has become
"""

import json
import logging
import re
import time
from collections.abc import Container, Sequence
from typing import Any

from orchestrator.errors import DataError, UserError, one_line
from orchestrator.filecache import TableFile
from orchestrator.storage import Folder, half_written
from orchestrator.tables import MANIFEST, SPLITS, parse_manifest, table_file

log = logging.getLogger("orchestrator.outfolder")
SEEN_WITHIN_S = 90.0  # NFS may answer from what it knew of a folder for a minute (man nfs, acdirmax)
LOOK_EVERY_S = 5.0
PARTS, JOB = "parts", "prepare.json"
OWN_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.parquet")
OWN_RECORD = re.compile(r"\d{5,}\.json")


def record_name(number: int) -> str:
    return f"{PARTS}/{number:05d}.json"


def read_record(folder: Folder, number: int) -> dict[str, Any] | None:
    """The record of a part; None where there is none, or one that was damaged."""
    try:
        record: dict[str, Any] = json.loads(folder.read(record_name(number)))
        for file in record["files"].values():
            table_file(file)
        types = {"spec": str, "broken": list, "schema": dict, "notes": dict}
        good = record["number"] == number and all(isinstance(record[name], kind) for name, kind in types.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except OSError:
        if not folder.is_local:
            raise
        log.warning("%s cannot be read; the part is made again", record_name(number), exc_info=True)
        return None
    return record if good and set(record["files"]) <= set(SPLITS) else None


def check(folder: Folder, workload: str) -> None:
    """Raises UserError where a job would replace files that no job for this workload has made; writes nothing."""
    advice = "give another folder, or empty this one"
    try:
        names, parts = folder.names(), folder.child(PARTS).names()
        manifest = folder.read(MANIFEST) if MANIFEST in names else None
        job = folder.read(JOB) if JOB in names else None
    except OSError as error:
        raise UserError(f"--out {folder.uri}: cannot be read ({one_line(error)}); {advice}") from None
    if manifest is not None:
        try:
            parse_manifest(manifest, workload)
        except ValueError as error:
            raise UserError(f"--out {folder.uri}: {error}; {advice}") from None
    elif job != _job(workload):
        like_ours = [name for name in names if OWN_FILE.fullmatch(name) or name == JOB]
        like_ours += [f"{PARTS}/{name}" for name in parts if OWN_RECORD.fullmatch(name)]
        if like_ours:
            raise UserError(f"--out {folder.uri}: {like_ours[0]} was not made for {workload} by this command; {advice}")


def claim(folder: Folder, workload: str) -> None:
    """Leave the sign by which `check` knows a job that was broken off."""
    job = _job(workload)
    if folder.read_text(JOB) != job.decode():
        folder.write(JOB, job)


def _job(workload: str) -> bytes:
    return json.dumps({"orchestrator.prepare": workload}).encode()


def clear(folder: Folder, files: Container[str], records: Container[str]) -> None:
    """Delete what earlier jobs have left over: all of our names but these files, and these records in parts/.

    Also what was half written when its worker was killed.
    """
    for name in folder.names():
        if (OWN_FILE.fullmatch(name) and name not in files) or _is_unfinished(name):
            folder.delete(name)
    for name in folder.child(PARTS).names():
        if (OWN_RECORD.fullmatch(name) and f"{PARTS}/{name}" not in records) or _is_unfinished(name):
            folder.delete(f"{PARTS}/{name}")


def wait_until_seen(folder: Folder, files: Sequence[TableFile]) -> None:
    """Until this machine sees what others have written; raises DataError where nodes write to disks of their own."""
    until_s = time.monotonic() + (SEEN_WITHIN_S if folder.is_local else 0.0)
    while missing := [file.name for file, size in _sizes(folder, files) if size != file.bytes]:
        if time.monotonic() >= until_s:
            raise DataError(
                f"--out {folder.uri}: {len(missing)} of {len(files)} files are not in it as this machine sees it "
                f"({missing[0]}); give a folder that all nodes share, or s3://..."
            )
        print(f"waiting until this machine sees {len(missing)} files, the first is {missing[0]}", flush=True)
        time.sleep(min(LOOK_EVERY_S, SEEN_WITHIN_S))


def _sizes(folder: Folder, files: Sequence[TableFile]) -> list[tuple[TableFile, int | None]]:
    there = folder.sizes()
    return [(file, there.get(file.name)) for file in files]


def _is_unfinished(name: str) -> bool:
    own = half_written(name)
    return bool(OWN_FILE.fullmatch(own) or OWN_RECORD.fullmatch(own)) or own in (MANIFEST, JOB)
