"""Which documents the tokenizer is trained on: those with the smallest random keys.

A key depends on (seed, the document's id) alone. So a file's share of the documents below a bound
can be drawn without knowing the other files; of these the smallest up to the wanted size are taken.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from common.counter_random import derive_key
from data_prep.document import Document, InputError

# Drawn from the files for each byte wanted: how much a random draw falls short of what is expected.
_MARGIN = 2
# Some hundred long documents.
_LEAST_BYTES = 4 << 20


def sample_key(seed: int, document: str) -> int:
    """The 64 random bits of the document of that id."""
    return derive_key("tokenizer sample", seed, document)


def share_to_draw(
    sample_bytes: int, shares: Mapping[str, float] | None, bytes_of: Mapping[str, int]
) -> dict[str, float]:
    """The share of each source's documents (0 … 1) whose texts are enough for `draw_sample`.

    bytes_of: bytes of text by source. A draw of few documents may fall short of what it should
    hold, so it is never meant to hold less than `_LEAST_BYTES`.
    """

    def share(wanted: float, there: int) -> float:
        return min(1.0, max(_MARGIN * wanted, _LEAST_BYTES) / max(there, 1))

    if shares is None:
        return dict.fromkeys(bytes_of, share(sample_bytes, sum(bytes_of.values())))
    return {
        source: share(shares[source] * sample_bytes, there) if source in shares else 0.0
        for source, there in bytes_of.items()
    }


def draw_sample(
    documents: Iterable[Document],
    sample_bytes: int,
    shares: Mapping[str, float],
    seed: int,
    out: Path,
) -> list[str]:
    """The texts with the smallest random keys up to `sample_bytes`, in the order of the keys."""
    if any(share <= 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise InputError(f"{out}: shares must be positive and at most 1 together, not {shares}")
    pools = {source: _Pool(int(share * sample_bytes)) for source, share in shares.items()}
    everything = _Pool(sample_bytes)
    for document in documents:
        pool = pools.get(document.source) if shares else everything
        if pool is not None and document.text:
            pool.offer(sample_key(seed, document.id), document)
    without = [source for source, pool in pools.items() if not pool.entries]
    if without or not (shares or everything.entries):
        raise InputError(
            f"{out}: no document with text to train the tokenizer on"
            + (f" from {', '.join(without)}" if without else "")
            + "; see that raw_dir holds the source's files and that extraction found documents"
        )
    return [text for pool in (pools.values() if shares else [everything]) for text in pool.texts()]


class _Pool:
    """Texts of the smallest keys offered, just enough of them to fill `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        # Largest key on top: (-key, id, UTF-8 text).
        self.entries: list[tuple[int, str, bytes]] = []

    def offer(self, key: int, document: Document) -> None:
        if self.size >= self.capacity and -key < self.entries[0][0]:
            return
        entry = (-key, document.id, document.text.encode())
        heapq.heappush(self.entries, entry)
        self.size += len(entry[2])
        while self.size - len(self.entries[0][2]) >= self.capacity:
            self.size -= len(heapq.heappop(self.entries)[2])

    def texts(self) -> Iterator[str]:
        """In the order of the keys; the last one is cut to fit."""
        left = self.capacity
        for _, _, text in sorted(self.entries, key=lambda entry: (-entry[0], entry[1], entry[2])):
            yield text[:left].decode(errors="ignore")
            left -= len(text)
