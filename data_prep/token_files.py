"""Token ids of documents, stored so that any document can be read by its number.

A folder for each file of documents: `tokens.bin` (the ids of all documents one after another),
`starts.npy` (where each begins, and the end), `ids.npy` (the documents' ids), `counts.npy` (how
often each token of the vocabulary occurs). Several row lengths are packed from them without
tokenising twice.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.files import whole_folder
from data_prep.document import Document

if TYPE_CHECKING:
    # transformers takes seconds to import, and most of the work with token files needs none of it.
    from transformers import PreTrainedTokenizerFast

FILES = ("tokens.bin", "starts.npy", "ids.npy", "counts.npy")
_BATCH_CHARACTERS = 1 << 22
_BATCH_DOCUMENTS = 4096


def write_tokens(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerFast",
    vocab_size: int,
    dtype: np.dtype[Any],
) -> dict[str, int]:
    """Tokenise `documents` into `folder`, whole or not at all; returns documents and tokens.

    Special tokens are not written; rows add them.
    """
    from data_prep.tokenizer import encode

    counts = np.zeros(vocab_size, np.int64)
    names: list[bytes] = []
    lengths: list[int] = []
    with whole_folder(folder) as temporary:
        with (temporary / "tokens.bin").open("wb") as file:
            for batch in _batches(documents):
                names += [document.id.encode() for document in batch]
                encoded = encode(tokenizer, [document.text for document in batch])
                lengths += map(len, encoded)
                ids = np.concatenate(encoded)
                counts += np.bincount(ids, minlength=vocab_size)
                file.write(ids.astype(dtype).tobytes())
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        np.save(temporary / "starts.npy", starts)
        np.save(temporary / "ids.npy", np.array(names, dtype="S") if names else np.zeros(0, "S1"))
        np.save(temporary / "counts.npy", counts)
    return {"documents": len(names), "tokens": int(starts[-1])}


@dataclass(frozen=True)
class TokenFile:
    """A folder that `write_tokens` made, its tokens of `dtype`; nothing is read until asked for."""

    folder: Path
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts()) - 1

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, (documents,) int64."""
        return np.diff(self.starts())

    def starts(self) -> NDArray[np.int64]:
        """Where every document's tokens begin, and the end of the last, (documents + 1,) int64."""
        return np.load(self.folder / "starts.npy", mmap_mode="r")

    def ids(self) -> NDArray[np.bytes_]:
        """The ids of the documents, (documents,) bytes, mapped from the file."""
        return np.load(self.folder / "ids.npy", mmap_mode="r")

    def tokens(self) -> NDArray[Any]:
        """The tokens of all documents, (tokens,), mapped from the file."""
        path = self.folder / "tokens.bin"
        # An empty file cannot be mapped.
        if path.stat().st_size == 0:
            return np.zeros(0, self.dtype)
        # A plain array over the same pages: slices of a memmap object are slow to make.
        return np.asarray(np.memmap(path, self.dtype, mode="r"))

    def counts(self) -> NDArray[np.int64]:
        """How often every token occurs, (vocabulary,) int64."""
        return np.load(self.folder / "counts.npy")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
