"""Parts of a preparation, made as rows of a Ray Data job on any node: their files, and the record of each."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.errors import DataError, OrchestratorError, UserError
from orchestrator.filecache import TableFile
from orchestrator.outfolder import record_name
from orchestrator.storage import PATIENCE_S, Folder
from workloads.preparation import Part, Preparation

Record = dict[str, Any]


def write_part(out: str, number: int, spec: str, preparation: Preparation, part: Part) -> Record:
    """Make a part, write its files and the record of it, which comes last; runs on any node."""
    import pyarrow as pa
    from pyarrow import parquet

    folder, made, files, schema = Folder(out, "--out", PATIENCE_S), preparation.make(part), {}, {}
    for split, table in made.tables.items():
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, compression=preparation.compression)
        data = sink.getvalue().to_pybytes()
        file = TableFile(f"{split}-{number:05d}.parquet", table.num_rows, len(data), hashlib.sha256(data).hexdigest())
        folder.write(file.name, data)
        files[split] = asdict(file)
        schema = {column.name: str(column.type) for column in table.schema}
    record = {"number": number, "spec": spec, "files": files, "schema": schema}
    record |= {"broken": list(made.broken), "notes": dict(made.notes)}
    folder.write(record_name(number), json.dumps(record).encode())
    return record


def make_parts(out: str, preparation: Preparation, asked: Sequence[tuple[int, str, Part]]) -> Iterator[Record]:
    """Make parts on the connected cluster, each as a row of a Ray Data job; gives their records as they are done.

    Args:
        out: the folder that gets them.
        asked: the number of each part, what decides its files, and the part.
    """
    import ray.data

    logging.getLogger("ray.data").handlers.clear()  # its own go to the terminal; the root's goes to the log file
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    rows = [{"number": number, "spec": spec, "part": json.dumps(part)} for number, spec, part in asked]

    def make(row: Mapping[str, Any]) -> dict[str, str]:
        try:
            record = write_part(out, row["number"], row["spec"], preparation, json.loads(row["part"]))
        except OrchestratorError as error:  # its one line, not a task's traceback
            record = {"error": str(error), "exit_status": error.exit_status}
        return {"record": json.dumps(record)}

    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(make)
    for row in made.iter_rows():
        record = json.loads(row["record"])
        if "error" in record:
            raise (UserError if record["exit_status"] == UserError.exit_status else DataError)(record["error"])
        yield record
