"""The md5 of input files, remembered between runs: the whole corpora take long to read."""

import hashlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from common.files import write_json
from data_prep.document import InputError

_CHUNK_BYTES = 1 << 20
# A file that was changed so shortly before may change again without another time stamp.
_UNSETTLED_NS = 2_000_000_000


def md5s(paths: Iterable[Path], memory: Path) -> list[str]:
    """The md5 of each of `paths`; those of equal size and time as in `memory` are not read again.

    memory: a JSON file, written anew in a folder that is made where it is missing. A bar on stderr
    counts bytes. Raises InputError for a file that cannot be read.
    """
    files = [path.resolve() for path in paths]
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {}
    began = time.time_ns()
    states = {path: _state(path) for path in dict.fromkeys(files)}
    unread = [p for p in states if known.get(str(p), [])[:2] != states[p]]
    total = sum(states[path][0] for path in unread)
    with tqdm(desc="md5", total=total, unit="B", unit_scale=True, disable=not unread) as progress:
        with ThreadPoolExecutor() as pool:
            lock = Lock()
            found = pool.map(lambda path: _md5(path, progress, lock), unread)
            hashes = dict(zip(unread, found, strict=True))
    for path in unread:
        known[str(path)] = [*states[path], hashes[path]]
    if unread:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {p: s for p, s in known.items() if s[1] < began - _UNSETTLED_NS})
    return [known[str(path)][2] for path in files]


def _state(path: Path) -> list[int]:
    """Bytes and time of the last change, in ns."""
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return [found.st_size, found.st_mtime_ns]


def _md5(path: Path, progress: tqdm, lock: Lock) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                with lock:
                    progress.update(len(chunk))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()
