"""Reading a data set: any row of any shard by its number, with NumPy and the standard library only.

    data = DataSet(Path("data/sample/rows-1024"))
    data.sources("train")                    # {"discharge": 412, "pubmed": 3018, …} in rows
    row = data.read("train", "pubmed", 17)   # ids, document bounds, document ids

A data set is a folder: WebDataset tars of rows, an index of byte offsets beside each, and
`manifest.json`, which was written last. `data_prep.shard_writer` is the other side.
"""

import hashlib
import io
import json
import os
import weakref
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
TOKEN_COUNTS_NAME = "token_counts.npy"
TOKENIZER_FILE = "tokenizer.json"

# The parts of a sample, in the order in which they lie in the tar.
MEMBERS = ("input_ids.npy", "cu_seqlens.npy", "documents.json")

# One record a row: where each member's data begins in the tar and how many bytes it has, then how
# many tokens of the row are not padding, how many documents (or pieces of one) it holds, and the
# checksum of its members.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8", (len(MEMBERS),)),
        ("size", "<u4", (len(MEMBERS),)),
        ("tokens", "<u4"),
        ("documents", "<u4"),
        ("crc32", "<u4"),
    ]
)


class DataError(ValueError):
    """A data set that cannot be trusted; the message names the file and says what to do."""


@dataclass(frozen=True)
class Row:
    """One row of packed documents, all of one source.

    `input_ids` is (row_tokens,) uint16 or uint32: the documents' tokens, each document with its
    [CLS] and [SEP], then [PAD]. `cu_seqlens` is (segments + 1,) int32, from 0 to row_tokens:
    document i covers `input_ids[cu_seqlens[i]:cu_seqlens[i + 1]]`, and padding, where there is
    any, is one more segment after the last document. `documents` are the documents' ids; the k-th
    piece of a document that was cut is `<id>#<k>`.
    """

    input_ids: NDArray[np.unsignedinteger[Any]]
    cu_seqlens: NDArray[np.int32]
    documents: list[str]
    source: str
    key: str


def checksum(members: Iterable[bytes]) -> int:
    """The crc32 of a row's members one after another."""
    crc = 0
    for member in members:
        crc = zlib.crc32(member, crc)
    return crc


def row_key(source: str, split: str, row: int) -> str:
    """The WebDataset key of a row; it has no dot, at which webdataset would cut it."""
    return f"{source}-{split}-{row:09d}"


@dataclass(frozen=True)
class _Shard:
    path: Path
    index: NDArray[np.void]


@dataclass(frozen=True)
class _Source:
    """The shards of one source and split; shard i holds rows first_rows[i] … first_rows[i+1]-1."""

    shards: list[_Shard]
    first_rows: NDArray[np.int64]


class DataSet:
    """A folder of shards, opened; rows are read by offset, from any thread or forked process.

    Attributes:
        row_tokens: tokens of a row, padding included.
        max_length: tokens of the longest document, [CLS] and [SEP] included.
        max_documents: most documents in a row.
        tokenizer: the manifest's description of the tokenizer.
        manifest: the whole manifest.
        manifest_sha256: its hash, which identifies the data set.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`; every shard's presence and size and every index's hash is checked.

        Raises DataError, naming the file and the remedy, for whatever is missing or differs.
        """
        self.folder = Path(folder)
        content = _read_manifest(self.folder)
        self.manifest_sha256 = hashlib.sha256(content).hexdigest()
        self.manifest: dict[str, Any] = _parse_manifest(self.folder, content)
        try:
            self.row_tokens: int = self.manifest["row_tokens"]
            self.max_length: int = self.manifest["max_length"]
            self.max_documents: int = self.manifest["max_documents"]
            self.tokenizer: dict[str, Any] = self.manifest["tokenizer"]
            _check_sizes(self.folder, self.manifest)
            self._splits = {
                split: {
                    source: _open_source(self.folder, entry["shards"])
                    for source, entry in parts["sources"].items()
                }
                for split, parts in self.manifest["splits"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.folder / MANIFEST_NAME} is not a manifest of this program "
                f"({type(error).__name__}: {error}); {_REMEDY}"
            ) from None
        # Descriptors are opened when first needed. They are read with pread alone, which has no
        # file position that threads or forked processes could share.
        self._descriptors: dict[Path, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)
        for split, sources in self._splits.items():
            for source in sources:
                self.read(split, source, 0)

    def __reduce__(self) -> tuple[type["DataSet"], tuple[Path]]:
        return DataSet, (self.folder,)

    def sources(self, split: str) -> dict[str, int]:
        """The sources of `split` ("train" or "validation"), each with its number of rows."""
        if split not in self._splits:
            raise DataError(f"{self.folder} has no split {split!r}; it has {sorted(self._splits)}")
        return {name: int(part.first_rows[-1]) for name, part in self._splits[split].items()}

    def read(self, split: str, source: str, row: int) -> Row:
        """Row number `row` (0 … rows - 1) of `source` in `split`.

        Raises DataError when the shard's content is not what its index and the manifest say, and
        IndexError for a row that the data set does not have.
        """
        rows = self.sources(split)
        if source not in rows:
            raise DataError(f"{self.folder} has no source {source!r} in {split}: {sorted(rows)}")
        if not 0 <= row < rows[source]:
            raise IndexError(f"{source}/{split} has rows 0 … {rows[source] - 1}, not {row}")
        part = self._splits[split][source]
        number = int(np.searchsorted(part.first_rows, row, side="right")) - 1
        shard = part.shards[number]
        record = shard.index[row - int(part.first_rows[number])]
        key = row_key(source, split, row)
        try:
            input_ids, cu_seqlens, documents = self._members(shard.path, record)
            self._check(input_ids, cu_seqlens, documents, record)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(
                f"{shard.path}: row {key} cannot be read ({error}); the shard, its index and "
                f"{MANIFEST_NAME} do not belong together; {_REMEDY}"
            ) from None
        return Row(input_ids, cu_seqlens, documents, source, key)

    def counts(self, split: str, source: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Real tokens and documents of every row of `source`, two (rows,) arrays, from the index.

        So many tokens of a row can be masked: its tokens but two a document, [CLS] and [SEP].
        """
        indexes = [shard.index for shard in self._splits[split][source].shards]
        tokens, documents = (
            np.concatenate([index[name] for index in indexes]).astype(np.int64)
            for name in ("tokens", "documents")
        )
        return tokens, documents

    def token_counts(self) -> dict[str, NDArray[np.int64]]:
        """How often each token occurs in each source's training documents, (vocab_size,) each.

        The [CLS] and [SEP] that rows add are not counted. Raises DataError when the file is not the
        manifest's, or the manifest, an older one, has none.
        """
        entry = self.manifest.get("token_counts")
        if entry is None:
            raise DataError(
                f"{self.folder / MANIFEST_NAME} names no counts of tokens, for it was made before "
                "there were any; the same python -m data_prep adds them"
            )
        path = self.folder / TOKEN_COUNTS_NAME
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from None
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise DataError(f"{path} is not what {MANIFEST_NAME} says; {_REMEDY}")
        return dict(zip(entry["sources"], _load_array(content), strict=True))

    def verify(self) -> None:
        """Read every shard whole and compare its sha256 with the manifest's; DataError if not.

        The counts of tokens, too, where the manifest names them.
        """
        if "token_counts" in self.manifest:
            self.token_counts()
        for parts in self.manifest["splits"].values():
            for entry in parts["sources"].values():
                for shard in entry["shards"]:
                    path = self.folder / shard["name"]
                    with path.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != shard["sha256"]:
                        raise DataError(
                            f"{path} is damaged: its sha256 is {found}, the manifest says "
                            f"{shard['sha256']}; {_REMEDY}"
                        )

    def check_tokenizer(self, folder: Path) -> None:
        """Raise DataError unless `folder` holds the tokenizer.json that the rows were made with."""
        path = folder / TOKENIZER_FILE
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}): checkpoints hold the data set's "
                "tokenizer; copy it from where the data set was made"
            ) from None
        if found != self.tokenizer["file_sha256"]:
            raise DataError(
                f"{path} is not the tokenizer that the rows of {self.folder} were made with; copy "
                "that one from where the data set was made, or make the data set again"
            )

    def _members(
        self, path: Path, record: np.void
    ) -> tuple[NDArray[Any], NDArray[np.int32], list[str]]:
        """The three members of a row, from one read that spans them (they lie side by side)."""
        offsets, sizes = record["offset"].tolist(), record["size"].tolist()
        begin, end = offsets[0], offsets[-1] + sizes[-1]
        content = os.pread(self._descriptor(path), end - begin, begin)
        if len(content) != end - begin:
            raise ValueError("the file ends within the row")
        parts = [
            content[offset - begin : offset - begin + size]
            for offset, size in zip(offsets, sizes, strict=True)
        ]
        if checksum(parts) != record["crc32"]:
            raise ValueError("its bytes are not those that were written, by their checksum")
        return _load_array(parts[0]), _load_array(parts[1]), json.loads(parts[2])

    def _check(
        self,
        input_ids: NDArray[Any],
        cu_seqlens: NDArray[np.int32],
        documents: list[str],
        record: np.void,
    ) -> None:
        if input_ids.shape != (self.row_tokens,) or input_ids.dtype.kind != "u":
            raise ValueError(
                f"input_ids is {input_ids.shape} {input_ids.dtype}, row_tokens is {self.row_tokens}"
            )
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != np.int32 or cu_seqlens.size < 2:
            raise ValueError(f"cu_seqlens is {cu_seqlens.shape} {cu_seqlens.dtype}")
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != self.row_tokens:
            raise ValueError(f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}")
        lengths = np.diff(cu_seqlens)
        if (lengths <= 0).any():
            raise ValueError("cu_seqlens does not increase")
        if input_ids.max() >= self.tokenizer["vocab_size"]:
            raise ValueError(
                f"it has the token {input_ids.max()}, vocab_size is {self.tokenizer['vocab_size']}"
            )
        tokens, count = int(record["tokens"]), int(record["documents"])
        segments = count + (tokens < self.row_tokens)
        if (
            len(documents) != count
            or len(cu_seqlens) != segments + 1
            or cu_seqlens[count] != tokens
        ):
            raise ValueError(
                f"{len(documents)} documents in {len(cu_seqlens) - 1} segments, its index says "
                f"{count} documents of {tokens} tokens"
            )
        # What follows the documents is padding, which may be longer.
        if (lengths[:count] > self.max_length).any():
            raise ValueError(
                f"it has a document of {lengths[:count].max()} tokens, max_length is "
                f"{self.max_length}"
            )

    def _descriptor(self, path: Path) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # Without a lock, which a fork could copy while it is held: the first thread wins.
            descriptor = self._descriptors.setdefault(path, opened)
            if descriptor != opened:
                os.close(opened)
        return descriptor


_REMEDY = (
    "make the data set again with `python -m data_prep --config FILE` "
    "(delete this folder first), or copy it again from where it is whole"
)


def _read_manifest(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except OSError as error:
        # What `out_dir` of the preparation names holds one for each length of documents.
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
        if inside:
            raise DataError(
                f"{folder} is not a data set but holds some: {', '.join(inside)}; name one of them"
            ) from None
        raise DataError(
            f"{folder} is not a finished data set: {MANIFEST_NAME} cannot be read "
            f"({error.strerror}); make it with `python -m data_prep --config FILE`, or try "
            "`make demo`, which makes a small one"
        ) from None


def _parse_manifest(folder: Path, content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder / MANIFEST_NAME} is not a manifest of this program; {_REMEDY}"
        ) from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{folder / MANIFEST_NAME} has the format {version!r}, this program reads "
            f"{FORMAT_VERSION}; make the data set again with this version of the program"
        )
    assert isinstance(manifest, dict)
    return manifest


def _check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise DataError for numbers that would fail, or silently go wrong, in training only."""
    tokenizer = manifest["tokenizer"]
    vocab_size, special = tokenizer["vocab_size"], tokenizer["special_ids"]
    sizes = {name: manifest[name] for name in ("row_tokens", "max_length", "max_documents")}
    sizes |= {name: tokenizer[name] for name in ("vocab_size", "real_vocab_size")}
    ids = {f"special_ids.{name}": special[name] for name in ("cls", "sep", "pad", "mask", "unk")}
    ids |= {"real_vocab_size - 1": tokenizer["real_vocab_size"] - 1}
    wrong = [name for name, size in sizes.items() if type(size) is not int or size < 1]
    wrong += [n for n, i in ids.items() if type(i) is not int or not 0 <= i < vocab_size]
    if not all(type(i) is int and 0 <= i < vocab_size for i in tokenizer["excluded_ids"]):
        wrong.append("excluded_ids")
    if not isinstance(tokenizer["file_sha256"], str):
        wrong.append("file_sha256")
    if not wrong and sizes["max_length"] > sizes["row_tokens"]:
        wrong.append("max_length")
    if wrong:
        raise DataError(
            f"{folder / MANIFEST_NAME}: {', '.join(wrong)} cannot be right (vocab_size is "
            f"{vocab_size}, row_tokens {sizes['row_tokens']}); {_REMEDY}"
        )


def _open_source(folder: Path, entries: list[dict[str, Any]]) -> _Source:
    shards = [_open_shard(folder, entry) for entry in entries]
    first_rows = np.cumsum([0] + [len(shard.index) for shard in shards], dtype=np.int64)
    return _Source(shards, first_rows)


def _open_shard(folder: Path, entry: dict[str, Any]) -> _Shard:
    path = folder / entry["name"]
    index_path = index_path_of(path)
    try:
        size = path.stat().st_size
        content = index_path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{error.filename} belongs to the data set and cannot be read ({error.strerror}); "
            f"{_REMEDY}"
        ) from None
    if size != entry["bytes"]:
        raise DataError(
            f"{path} has {size} bytes, the manifest says {entry['bytes']}: it was cut short or "
            f"replaced; {_REMEDY}"
        )
    if hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
        raise DataError(f"{index_path} is not the index that the manifest describes; {_REMEDY}")
    index = _load_array(content)
    if index.dtype != INDEX_DTYPE or index.shape != (entry["rows"],):
        raise DataError(
            f"{index_path} holds {index.shape} {index.dtype}, the manifest says {entry['rows']} "
            f"rows; {_REMEDY}"
        )
    return _Shard(path, index)


def index_path_of(shard: Path) -> Path:
    """Where the index of `<name>.tar` lies: `<name>.index.npy` beside it."""
    return shard.with_suffix(".index.npy")


def _load_array(content: bytes) -> NDArray[Any]:
    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def _close_all(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
