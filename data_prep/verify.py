"""Whether a finished data set is whole: `python -m data_prep verify FOLDER`.

Opening a data set for training checks its manifest, its indexes and the shards' sizes; this reads
every byte, which is worth its time after a copy to another machine.
"""

import argparse
import sys
from pathlib import Path

from data_prep.shards import DataError, DataSet


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a data set that is not whole."""
    parser = argparse.ArgumentParser(prog="python -m data_prep verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder that holds manifest.json")
    options = parser.parse_args(arguments)
    try:
        data = DataSet(options.folder)
        data.verify()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in checked(data):
        print(line)
    return 0


def checked(data: DataSet) -> list[str]:
    """A line for every source of every split: what of it was read."""
    lines = []
    for split, parts in data.manifest["splits"].items():
        for source, entry in parts["sources"].items():
            shards = entry["shards"]
            rows, size = (sum(shard[name] for shard in shards) for name in ("rows", "bytes"))
            lines.append(f"{split} {source}: {len(shards):,} shards, {rows:,} rows, {size:,} bytes")
    lines.append(
        f"{data.folder} is whole: every shard and index has the sha256 in the manifest, whose own "
        f"is {data.manifest_sha256}"
    )
    return lines
