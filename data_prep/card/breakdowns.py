"""Which breakdowns of the kept documents a data card shows, in which order, and how."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.card.statistics import DECADES, OTHER, UNKNOWN
from data_prep.card.terms import TOPICS


@dataclass(frozen=True)
class Breakdown:
    """One breakdown that `data_prep.card.statistics` counts.

    values: its values in their order; by default those that occur, the most frequent first.
    most: how many of them a plot shows; the table has all.
    by_year: values are years.
    """

    name: str
    caption: str
    values: tuple[str, ...] = ()
    most: int = 20
    by_year: bool = False

    def order(self, found: Mapping[str, Mapping[str, int]]) -> list[str]:
        """The values to show, of all that were `found` (source -> value -> documents)."""
        totals: Counter[str] = Counter()
        for counts in found.values():
            totals.update(counts)
        if self.by_year:
            return sorted(totals, key=lambda value: (not value.isdigit(), value))
        if self.values:
            return list(self.values)
        # What has no name of its own comes last.
        return sorted(totals, key=lambda v: (v in (OTHER, UNKNOWN), -totals[v], v))


ALL = (
    Breakdown("publication year", "Articles by year of publication.", by_year=True),
    Breakdown("article type", "Article types, as PubMed names them."),
    Breakdown("language of the text", "Language, told from the text."),
    Breakdown("language of the article", "Language of the article, as PubMed says."),
    Breakdown("content", "Parts of PubMed's records."),
    *(
        Breakdown(topic, f"Documents with terms of {topic}.", values=tuple(groups))
        for topic, groups in TOPICS.items()
    ),
    Breakdown("stated age", "First age stated, in years.", values=DECADES),
    Breakdown("sex in the heading", "Sex in the heading of discharge summaries."),
    Breakdown("note type", "Note types (DS, RR: first versions; AD, AR: addenda)."),
    Breakdown(
        "number of the note",
        "Which note of its kind a subject's note is.",
        values=("1st", "2nd to 5th", "6th to 20th", "21st or later", UNKNOWN),
    ),
    Breakdown("admission", "Notes with and without an admission."),
    Breakdown("service", "Services of discharge summaries, from their heading."),
    Breakdown("modality", "Imaging, from the line on the examination."),
    Breakdown("region", "Parts of the body, from that line."),
    Breakdown("table", "Tables of codes."),
    Breakdown("entry", "Codes and headings."),
)
