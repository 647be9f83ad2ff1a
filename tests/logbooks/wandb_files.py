"""What an offline run of Weights & Biases holds: its file is a LevelDB log of protobuf records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER_BYTES, BLOCK_BYTES = 7, 32768  # ":W&B", magic, version; github.com/google/leveldb, doc/log_format.md
FULL, LAST = 1, 4


def raw_records(file: Path) -> Iterator[bytes]:
    """The records, put together from their parts."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, record = HEADER_BYTES, b""
    while at + 7 <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield record
            record = b""


def read(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(rows of the history, configuration, summary)."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for raw in raw_records(file):
        record = Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            rows.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        for kept, items in ((config, record.run.config.update), (summary, record.summary.update)):
            kept.update({_key(item): json.loads(item.value_json) for item in items})
    return rows, config, summary


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
