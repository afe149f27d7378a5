"""Time and disk for the whole corpora, from rates measured on a part of them.

A stage's cost grows with documents or with bytes; which, differs, so the larger of the two factors
counts. Cores are taken to be independent of each other, which those of one machine are not quite.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.benchmark.measure import Measured
from data_prep.benchmark.stages import EVERY_SOURCE, Size
from data_prep.mimic import SOURCES as NOTES

# PubMed's records, and the notes of MIMIC-IV-Note 2.2.
_PUBMED, _DISCHARGE, _RADIOLOGY = 40_000_000, 331_794, 2_321_355
# Assumed, because the notes at hand are shorter than MIMIC's.
_DISCHARGE_BYTES, _RADIOLOGY_BYTES = 10_500, 1_400
# What a tokenizer is trained on by default.
_TOKENIZER_BYTES = 256 * 2**20
# Stages of which one task does all there is, or all of one source.
ONE_TASK = ("candidates", "components", "split", "tokenizer")
# A stage that does not depend on the corpus.
_FIXED = ("evaluation",)


@dataclass(frozen=True)
class Projected:
    """A stage of a source on the whole corpus."""

    stage: str
    source: str
    cpu_hours: float
    wall_hours: float
    gigabytes: float


def whole_corpora(measured: Mapping[str, Size]) -> dict[str, Size]:
    """Documents and bytes of each source in full; `measured` are those at hand.

    The mean length of PubMed's documents is the measured one. Sources of codes are whole already.
    """
    full = dict(measured)
    if "pubmed" in measured:
        full["pubmed"] = Size(_PUBMED, round(_PUBMED * _mean_bytes(measured["pubmed"])))
    for source, documents, size in (
        ("discharge", _DISCHARGE, _DISCHARGE_BYTES),
        ("radiology", _RADIOLOGY, _RADIOLOGY_BYTES),
    ):
        if source in measured:
            full[source] = Size(documents, documents * size)
    return full


def project(
    rows: Sequence[Measured], measured: Mapping[str, Size], full: Mapping[str, Size], cores: int
) -> list[Projected]:
    """What each row costs for `full`, given what it cost for `measured`.

    A row that worked on a part of a source (its distinct documents, those that are kept) works on
    the same part of the whole.
    """
    total = {EVERY_SOURCE: sum(measured.values(), Size())}
    whole = {EVERY_SOURCE: sum(full.values(), Size())}
    found = []
    for row in rows:
        name = row.stage.partition("-")[0]
        factor = _factor({**measured, **total}[row.source], {**full, **whole}[row.source])
        if name in _FIXED:
            factor = 1.0
        elif name == "tokenizer":
            factor = _TOKENIZER_BYTES / max(row.bytes, 1)
        cpu = row.cpu_s * factor / 3600
        # A table of notes is one gzip file, read by one core; what is made of it comes in parts.
        alone = name in ONE_TASK or (name == "documents" and row.source in NOTES)
        wall = cpu if alone else cpu / cores
        found.append(Projected(row.stage, row.source, cpu, wall, row.written * factor / 1e9))
    return found


def _mean_bytes(size: Size) -> float:
    return size.bytes / max(size.documents, 1)


def _factor(part: Size, whole: Size) -> float:
    return max(whole.documents / max(part.documents, 1), whole.bytes / max(part.bytes, 1))
