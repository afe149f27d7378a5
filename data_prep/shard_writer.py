"""Writing shards: WebDataset tars that are the same bytes for the same rows, with their indexes.

`write_shard` makes one shard and its index, whole or not at all, and returns the entry that the
manifest keeps; `data_prep.shards` reads them back.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from common.files import whole_file
from data_prep.shards import INDEX_DTYPE, MEMBERS, Row, checksum, index_path_of

PIECE_MARK = "#"
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a shard.

    `tokens` counts [CLS] and [SEP] but no padding; `documents` counts a document that was cut into
    pieces once, in the shard with its first piece; `pieces` counts documents and pieces alike.
    """

    name: str
    sha256: str
    index_sha256: str
    bytes: int
    rows: int
    tokens: int
    documents: int
    pieces: int

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain values."""
        return asdict(self)


def shard_name(source: str, split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{source}-{split}-{number:06d}.tar"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type in which token ids are stored: two bytes where the vocabulary fits, else four."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_shard(path: Path, rows: Iterable[Row]) -> ShardEntry:
    """Write `rows` to the tar `path` and their offsets to its index; nothing stays on an error.

    Rows are taken one at a time. The index appears only once the shard is on disk, so that it never
    describes a shard that is not there.
    """
    records: list[tuple[list[int], list[int], int, int, int]] = []
    documents = 0
    with whole_file(path) as file:
        tar = _HashingTar(file)
        for row in rows:
            offsets, sizes = [], []
            members = _encode(row)
            for member, content in zip(MEMBERS, members, strict=True):
                offsets.append(tar.add(f"{row.key}.{member}", content))
                sizes.append(len(content))
            count = len(row.documents)
            tokens = int(row.cu_seqlens[count])
            records.append((offsets, sizes, tokens, count, checksum(members)))
            documents += sum(_begins_document(name) for name in row.documents)
        tar.finish()
    index = np.array(records, dtype=INDEX_DTYPE)
    index_content = _npy(index)
    with whole_file(index_path_of(path)) as file:
        file.write(index_content)
    return ShardEntry(
        name=path.name,
        sha256=tar.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index_content).hexdigest(),
        bytes=tar.position,
        rows=len(index),
        tokens=int(index["tokens"].sum()),
        documents=documents,
        pieces=int(index["documents"].sum()),
    )


class _HashingTar:
    """A plain ustar archive written front to back, its hash and position known as it grows."""

    def __init__(self, file: IO[bytes]) -> None:
        self.sha256 = hashlib.sha256()
        self.position = 0
        self._file = file

    def add(self, name: str, content: bytes) -> int:
        """Append a member; returns the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.mode = 0o600
        info.mtime = 0
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.position
        self._write(content)
        self._write(bytes(-len(content) % _BLOCK))
        return offset

    def finish(self) -> None:
        """Write the two empty blocks that end an archive."""
        self._write(bytes(2 * _BLOCK))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self.sha256.update(content)
        self.position += len(content)


def _encode(row: Row) -> tuple[bytes, bytes, bytes]:
    names = json.dumps(row.documents, ensure_ascii=False, separators=(",", ":"))
    return _npy(row.input_ids), _npy(row.cu_seqlens), names.encode()


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _begins_document(name: str) -> bool:
    return PIECE_MARK not in name or name.endswith(f"{PIECE_MARK}0")
