"""Reading `metrics.jsonl`, also one that a crash has left behind."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path) -> tuple[list[tuple[bytes, Record]], str]:
    """The lines of a `metrics.jsonl` with their records, up to where it can be used; a warning.

    A last line without its end is one that is being written, or was when its process was killed,
    and is left out. A whole line that is no record is more than that: a machine that went down may
    leave NULs in place of what it had not yet written. Nothing from there on is used, and the
    warning, otherwise "", says so. Raises OSError.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    found: list[tuple[bytes, Record]] = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            return found, (
                f"{path}: line {number} of {len(lines)} is no record, as after a crash of the "
                "machine; it and those behind it are left out"
            )
        found.append((line + b"\n", record))
    return found, ""


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    # Of what is no JSON, and of what is no text.
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"kind", "step"} <= record.keys() else None
