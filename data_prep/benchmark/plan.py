"""Time and disk for the whole corpora, from rates measured on a part of them.

A stage's cost grows with documents or with bytes; which, differs, so the larger of the two factors
counts. Cores are taken to be independent of each other, which those of one machine are not quite.
The hours of a stage are those of its sources one after another, though it works on all at once.
What this leaves out, `caveats` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.benchmark.measure import Measured
from data_prep.benchmark.stages import EVERY_SOURCE, Size
from data_prep.config import DataPrep
from data_prep.dedup import PART_DIGESTS, PROSE, parts_of
from data_prep.mimic import SOURCES as NOTES
from data_prep.tokenizer_sample import share_to_draw

# PubMed's records, and the notes of MIMIC-IV-Note 2.2.
_PUBMED, _DISCHARGE, _RADIOLOGY = 40_000_000, 331_794, 2_321_355
# Assumed, because the notes at hand are shorter than MIMIC's.
_DISCHARGE_BYTES, _RADIOLOGY_BYTES = 10_500, 1_400
# Stages of which one task does all there is, or all of one source.
ONE_TASK = ("candidates", "components", "evaluation", "split", "tokenizer")
# A stage that does not depend on the corpus.
_FIXED = ("evaluation",)
# Stages that read all of their input again for each part of the work on a source.
_READ_BY_EVERY_PART = ("fold", "unique", "pairs", "verified", "clusters", "copied", "plan")


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
    rows: Sequence[Measured],
    sizes: Mapping[str, Mapping[str, Size]],
    full: Mapping[str, Size],
    cores: int,
    here: DataPrep,
    there: DataPrep,
) -> list[Projected]:
    """What each row costs for `full`, given what it cost for `sizes["documents"]`.

    A row that worked on a part of a source (its distinct documents, those that are kept) works on
    the same part of the whole. here, there: the configuration that was measured, and that of the
    whole corpora; they say what a tokenizer is trained on, and how many tasks there are.
    """
    measured, kept = sizes["documents"], sizes["kept"]
    total = {EVERY_SOURCE: sum(measured.values(), Size())}
    whole = {EVERY_SOURCE: sum(full.values(), Size())}
    found = []
    for row in rows:
        name = row.stage.partition("-")[0]
        factor = _factor({**measured, **total}[row.source], {**full, **whole}[row.source])
        written = factor
        if name in _FIXED:
            factor = written = 1.0
        elif name == "tokenizer":
            # An existing one is copied, and a trained one is as large whatever it has read.
            factor, written = _tokenizer_factor(kept, full, here, there), 1.0
        elif name == "sample":
            # 0 here is a source without a share, of which nothing was written.
            drawn = _drawn(kept, here).get(row.source) or 1.0
            written = factor * _drawn(full, there)[row.source] / drawn
        cpu = row.cpu_s * factor / 3600
        tasks = 1 if row.source == EVERY_SOURCE else _tasks(name, row.source, full, there, cores)
        wall = cpu / min(cores, tasks)
        found.append(Projected(row.stage, row.source, cpu, wall, row.written * written / 1e9))
    return found


def trained_on(config: DataPrep, sizes: Mapping[str, Size]) -> int:
    """Bytes of text that a tokenizer is trained on: of each source no more than there are."""
    settings = config.tokenizer
    if settings.shares is None:
        return min(settings.sample_bytes, sum(size.bytes for size in sizes.values()))
    return sum(
        min(int(share * settings.sample_bytes), sizes[source].bytes)
        for source, share in settings.shares.items()
        if source in sizes
    )


def caveats(
    kept: Mapping[str, Size], full: Mapping[str, Size], here: DataPrep, there: DataPrep
) -> list[str]:
    """What the projection does not hold, in sentences."""
    found = [
        f"{', '.join(_READ_BY_EVERY_PART)} are projected linearly, but read all of their input "
        "again for each part of the work, so that they take longer"
    ]
    if "pubmed" in full:
        parts = parts_of(full["pubmed"].documents, PART_DIGESTS)
        found[0] += f"; `unique` of pubmed has {parts} parts"
    if here.tokenizer.existing is None:
        found.append(
            f"the tokenizer was trained on {trained_on(here, kept) / 1e6:.0f} MB to "
            f"{here.tokenizer.vocab_size:,} entries and is projected to "
            f"{trained_on(there, full) / 1e6:.0f} MB, but not to {there.tokenizer.vocab_size:,} "
            "entries, which take longer"
        )
    return found


def _tasks(name: str, source: str, full: Mapping[str, Size], config: DataPrep, cores: int) -> int:
    """How many tasks of a stage work on a source at once; `cores` stands for enough."""
    documents = full[source].documents
    # A table of codes, or of notes, is one file; what is made of the notes comes in parts.
    one_file = source not in PROSE or (name == "documents" and source in NOTES)
    if name in ONE_TASK or one_file:
        return 1
    if name == "pairs":
        return config.near_duplicates.bands
    if name in ("fold", "unique"):
        return parts_of(documents, PART_DIGESTS)
    if name == "plan":
        return -(-documents // config.plan_documents)
    return cores


def _tokenizer_factor(
    kept: Mapping[str, Size], full: Mapping[str, Size], here: DataPrep, there: DataPrep
) -> float:
    if here.tokenizer.existing is not None:
        return 1.0
    return trained_on(there, full) / max(trained_on(here, kept), 1)


def _drawn(sizes: Mapping[str, Size], config: DataPrep) -> dict[str, float]:
    """The share of each source that the stage `sample` writes."""
    bytes_of = {source: size.bytes for source, size in sizes.items()}
    return share_to_draw(config.tokenizer.sample_bytes, config.tokenizer.shares, bytes_of)


def _mean_bytes(size: Size) -> float:
    return size.bytes / max(size.documents, 1)


def _factor(part: Size, whole: Size) -> float:
    return max(whole.documents / max(part.documents, 1), whole.bytes / max(part.bytes, 1))
