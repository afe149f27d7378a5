"""The page of a data card: a plot and its table for each thing that a reader may ask."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import numpy as np

from common.html import Page
from data_prep.card import plots
from data_prep.card.breakdowns import ALL as BREAKDOWNS
from data_prep.card.breakdowns import Breakdown
from data_prep.card.facts import (
    CLUSTER_EDGES,
    LENGTH_EDGES,
    NOTES,
    SMALLEST_CELL,
    Facts,
    bin_names,
    shown,
)
from data_prep.card.mixture import Mixture, mix
from data_prep.cleaning_tasks import OVERLAP
from data_prep.quality import RULES

WITHHELD = "withheld"
# What is left out, in the order of the steps: (name, stage of the summary, counts in it).
_LEFT_OUT: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("replaced or deleted", "documents", ("replaced",)),
    ("retracted", "documents", ("retracted",)),
    ("other language", "documents", ("other_language",)),
    ("no text", "documents", ("without_text",)),
    ("quality", "checks", RULES),
    ("evaluation sets", "checks", (OVERLAP,)),
    ("exact duplicates", "clusters", ("exact_duplicates",)),
    ("near-duplicates", "clusters", ("near_duplicates",)),
)
# What a record of PubMed holds that is no article: (name, count of `documents`).
_PARTS_OF_RECORDS = (
    ("documents of other abstracts", "other_abstracts"),
    ("documents of vernacular titles", "vernacular_titles"),
    ("of either, left out for their language", "other_language_parts"),
    ("books, which are not read", "books"),
)
_PACKAGES = ("numpy", "pyarrow", "lxml", "sentencepiece", "tokenizers", "transformers")


def make_page(facts: Facts, mixture: Mixture) -> Page:
    """The page; `mixture` as in `data_prep.card.mixture`."""
    length = facts.manifest["max_length"]
    page = Page(f"Data card: {facts.folder.resolve().parent.name}, up to {length:,} tokens")
    _overview(page, facts)
    _sources(page, facts)
    _lengths(page, facts)
    _left_out(page, facts)
    _evaluation(page, facts)
    _clusters(page, facts)
    _rows(page, facts)
    _mixture(page, facts, mixture)
    _about(page, facts)
    _provenance(page, facts)
    return page


def _overview(page: Page, facts: Facts) -> None:
    manifest = facts.manifest
    totals = manifest["totals"]
    page.table(
        ["figure", "value"],
        [
            ["documents", totals["documents"]],
            ["tokens", totals["tokens"]],
            ["rows", totals["rows"]],
            ["tokens in a row", manifest["row_tokens"]],
            ["longest document (tokens)", manifest["max_length"]],
            ["share of the rows used", _percent(totals["fill"])],
            ["vocabulary", manifest["tokenizer"]["vocab_size"]],
            ["sha256 of the manifest", facts.manifest_sha256],
        ],
    )
    notes = [source for source in facts.sources if source in NOTES]
    if notes:
        page.paragraph(
            f"Made from MIMIC: {', '.join(notes)}. In breakdowns of these, counts below "
            f"{SMALLEST_CELL} are withheld; where this hides one cell only, so is its next "
            "smallest neighbour. Withheld counts have no bar. Totals, and what steps left out, "
            "are exact."
        )


def _sources(page: Page, facts: Facts) -> None:
    page.heading("Sources")
    names = facts.sources
    for name in ("documents", "tokens"):
        values = [facts.in_source(source, name) for source in names]
        svg = plots.bars(names, {name: values}, name)
        page.figure(
            svg, f"{name.capitalize()} by source.", _alt(f"{name} by source", names, values)
        )
    header = ["source", "split", "documents", "pieces", "tokens", "rows"]
    page.table(
        header,
        [
            [source, split, *(entry[name] for name in header[2:])]
            for split, source, entry in facts.parts()
        ],
    )
    page.table(
        ["source", "characters", "words", "tokens a word", "tokens a document"],
        [
            [
                source,
                facts.totals[source]["characters"],
                facts.totals[source]["words"],
                _content_tokens(facts, source) / max(facts.totals[source]["words"], 1),
                _content_tokens(facts, source) / max(facts.totals[source]["documents"], 1),
            ]
            for source in names
        ],
    )
    page.paragraph("Words are runs of letters or digits; [CLS] and [SEP] count for no word.")


def _lengths(page: Page, facts: Facts) -> None:
    page.heading("Lengths")
    names = bin_names(LENGTH_EDGES)
    cells = {
        source: shown(source, dict(zip(names, facts.lengths[source].tolist(), strict=True)))
        for source in facts.sources
    }
    series = {
        source: _shares(found, names, facts.totals[source]["documents"])
        for source, found in cells.items()
    }
    most = [f"Most of {source}: {names[int(np.argmax(s))]}." for source, s in series.items()]
    page.figure(
        plots.columns(names, series, "share of the documents", share=True, order=facts.sources),
        "Tokens of whole documents, before long ones are cut.",
        f"Columns: share of documents by tokens. {' '.join(most)}",
    )
    _folded(page, "tokens", names, cells)


def _left_out(page: Page, facts: Facts) -> None:
    page.heading("Left out")
    names = facts.sources
    rows = []
    series: dict[str, list[float]] = {name: [] for name, *_ in _LEFT_OUT}
    series["split or copies"] = []
    for source in names:
        steps = facts.steps[source]
        records = steps["documents"]["records"]
        gone = [
            sum(steps.get(stage, Counter())[c] for c in counts) for _, stage, counts in _LEFT_OUT
        ]
        kept = facts.in_source(source, "documents")
        made = steps["documents"]["documents"]
        later = made - sum(gone[4:]) - kept
        rows.append([source, records, *gone, later, kept])
        for name, count in zip(series, [*gone, later], strict=True):
            series[name].append(count / max(records, 1))
    page.figure(
        plots.stacked(names, series, "share of the records"),
        "What steps left out, by source.",
        _alt(
            "share of records left out",
            names,
            [sum(s[i] for s in series.values()) for i in range(len(names))],
            percent=True,
        ),
    )
    page.table(["source", "records", *series, "kept"], rows)
    page.paragraph(
        "A PubMed record may become several documents, a book none. The last step before those "
        "kept: validation documents whose cluster was on both sides, and notes copied whole."
    )
    _parts_of_records(page, facts)
    deletions = sum(steps.get("scan", Counter())["deletions"] for steps in facts.steps.values())
    page.paragraph(f"Deletions listed in PubMed's files: {deletions:,}.")
    _quality(page, facts)
    page.table(
        ["source", "template copies kept", "paragraphs copied", "characters", "notes emptied"],
        [
            [
                source,
                facts.steps[source]["clusters"]["template_copies"],
                *(
                    facts.steps[source]["kept"][f"copied_{name}"]
                    for name in ("paragraphs", "characters", "whole")
                ),
            ]
            for source in names
        ],
    )


def _parts_of_records(page: Page, facts: Facts) -> None:
    """What PubMed's records hold besides an article: made into documents, or left out."""
    if "pubmed" not in facts.steps:
        return
    counts = facts.steps["pubmed"]["documents"]
    rows = [[name, counts[count]] for name, count in _PARTS_OF_RECORDS]
    page.table(["besides PubMed's articles", "number"], rows)
    page.paragraph(
        "Other abstracts and titles in the article's own language are documents where the "
        "configuration asks for them (pubmed.other_abstracts, pubmed.vernacular_titles)."
    )


def _quality(page: Page, facts: Facts) -> None:
    counts = {source: facts.steps[source].get("checks", Counter()) for source in facts.sources}
    rows = [[source, *(found[rule] for rule in RULES)] for source, found in counts.items()]
    header = ["source", *(rule.replace("_", " ") for rule in RULES)]
    page.table(header, rows, folded="Quality, rule by rule")


def _evaluation(page: Page, facts: Facts) -> None:
    page.heading("Evaluation sets")
    settings = facts.manifest["configuration"]["decontaminate"]
    sets = [part["name"] for part in settings["sets"]]
    if not sets:
        page.paragraph("None was named: nothing was compared.")
        return
    page.table(
        ["set", "texts", "PMIDs", "too short", *(f"found in {s}" for s in facts.sources)],
        [
            [
                name,
                *(facts.sets[f"{name} {kind}"] for kind in ("texts", "pmids", "too_short")),
                *(facts.steps[s]["checks"][f"overlap {name}"] for s in facts.sources),
            ]
            for name in sets
        ],
    )
    fate = "left out" if settings["drop"] else "counted and kept"
    page.paragraph(
        f"Documents sharing {settings['words']} words in a row, or their PMID, were {fate}. One "
        "may be found in several sets."
    )


def _clusters(page: Page, facts: Facts) -> None:
    page.heading("Clusters of duplicates")
    names = bin_names(CLUSTER_EDGES)
    cells = {
        source: shown(source, dict(zip(names, sizes.tolist(), strict=True)))
        for source, sizes in facts.clusters.items()
        if sizes.any()
    }
    if not cells:
        page.paragraph("No document resembles another.")
        return
    series = {source: [float(found[n] or 0) for n in names] for source, found in cells.items()}
    page.figure(
        plots.columns(names, series, "clusters", logarithmic=True, order=facts.sources),
        "Clusters by their number of documents, before any was dropped.",
        "Columns: clusters by size. "
        + " ".join(f"{source}: {int(facts.clusters[source].sum()):,}." for source in cells),
    )
    _folded(page, "documents", names, cells)


def _rows(page: Page, facts: Facts) -> None:
    page.heading("Fill")
    parts = list(facts.parts())
    names = [f"{source}, {split}" for split, source, _ in parts]
    fill = [entry["fill"] for *_, entry in parts]
    page.figure(
        plots.bars(names, {"fill": fill}, "share used", share=True),
        "Share of each part's rows that is no padding.",
        _alt("share of rows used", names, fill, percent=True),
    )
    row_tokens = facts.manifest["row_tokens"]
    page.table(
        ["part", "rows", "fewest possible", "used", "most possible"],
        [
            [
                name,
                entry["rows"],
                entry["least_rows"],
                _percent(entry["fill"]),
                _percent(entry["tokens"] / (entry["least_rows"] * row_tokens)),
            ]
            for name, (*_, entry) in zip(names, parts, strict=True)
        ],
    )
    page.paragraph(
        "A part is a source on one side. Its last row is rarely full, so small parts cannot be."
    )


def _mixture(page: Page, facts: Facts, mixture: Mixture) -> None:
    page.heading("Mixture")
    found = mix(facts, mixture)
    names = ["rows there are", "rows read"]
    series = {part.source: [part.share_of_rows, part.share_read] for part in found}
    page.figure(
        plots.stacked(names, series, "share of the rows", order=facts.sources),
        "Training rows, and those read at these weights.",
        _alt("share of rows read", [p.source for p in found], [p.share_read for p in found], True),
    )
    page.table(
        ["source", "rows", "share of rows", "share read", "epochs"],
        [
            [p.source, p.rows, _percent(p.share_of_rows), _percent(p.share_read), p.epochs]
            for p in found
        ],
    )
    given = "as given" if mixture.weights is not None else "rows there are (none were given)"
    length = f"{mixture.tokens:,}" if mixture.tokens is not None else "one pass"
    page.paragraph(f"Weights: {given}. Slots: {length}.")


def _about(page: Page, facts: Facts) -> None:
    page.heading("Who and what it is about")
    page.paragraph(
        "Shares are of a source's kept documents. Terms are lists of words in "
        "data_prep/card/terms.py; a document counts once, whatever its words mean there."
    )
    for breakdown in BREAKDOWNS:
        found = facts.breakdowns.get(breakdown.name)
        if found:
            _breakdown(page, facts, breakdown, found)


def _breakdown(
    page: Page, facts: Facts, breakdown: Breakdown, found: Mapping[str, Mapping[str, int]]
) -> None:
    values = breakdown.order(found)
    cells = {
        source: shown(source, {value: counts.get(value, 0) for value in values})
        for source, counts in sorted(found.items())
    }
    if breakdown.by_year:
        years = sorted(int(value) for value in values if value.isdigit())
        counts = [sum(cells[s][str(year)] or 0 for s in cells) for year in years]
        if years:
            alt = f"Columns: documents by year, {years[0]} to {years[-1]}."
            svg = plots.timeline(years, counts, "documents")
            page.figure(svg, breakdown.caption, alt)
    else:
        top = values[: breakdown.most]
        series = {s: _shares(cells[s], top, facts.totals[s]["documents"]) for s in cells}
        alt = " ".join(
            _alt(
                f"{breakdown.name} in {source}",
                top,
                [
                    None if cells[source][value] is None else share
                    for value, share in zip(top, shares, strict=True)
                ],
                percent=True,
            )
            for source, shares in series.items()
        )
        label = "share of the documents"
        svg = plots.bars(top, series, label, share=True, order=facts.sources)
        page.figure(svg, breakdown.caption, alt)
    _folded(page, breakdown.name, values, cells)


def _provenance(page: Page, facts: Facts) -> None:
    page.heading("Provenance")
    manifest = facts.manifest
    settings = json.dumps(manifest["configuration"], indent=1, sort_keys=True, ensure_ascii=False)
    tokenizer = manifest["tokenizer"]
    page.table(
        ["figure", "value"],
        [
            ["sha256 of the configuration", hashlib.sha256(settings.encode()).hexdigest()],
            ["sha256 of tokenizer.json", tokenizer["file_sha256"]],
            ["format of the data set", manifest["format"]],
            ["Python", platform.python_version()],
            *([name, version(name)] for name in _PACKAGES),
        ],
    )
    page.paragraph("Versions are those this page was made with.")
    inputs = manifest["inputs"]
    size = sum(file["bytes"] for file in inputs)
    page.table(
        ["file", "kind", "bytes", "md5"],
        [[file["path"], file["kind"], file["bytes"], file["md5"]] for file in inputs],
        folded=f"{len(inputs):,} input files, {size:,} bytes",
    )
    page.heading("Configuration")
    page.preformatted(settings)


def _content_tokens(facts: Facts, source: str) -> int:
    """Tokens without [CLS] and [SEP]."""
    return facts.in_source(source, "tokens") - 2 * facts.in_source(source, "pieces")


def _shares(cells: Mapping[str, int | None], names: Sequence[str], whole: int) -> list[float]:
    return [(cells.get(name) or 0) / max(whole, 1) for name in names]


def _folded(
    page: Page, name: str, values: Sequence[str], cells: Mapping[str, Mapping[str, int | None]]
) -> None:
    page.table(
        [name, *cells],
        [[value, *(_cell(found[value]) for found in cells.values())] for value in values],
        folded="The numbers",
    )


def _cell(count: int | None) -> int | str:
    return WITHHELD if count is None else count


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _alt(
    what: str, names: Sequence[str], values: Sequence[float | None], percent: bool = False
) -> str:
    """What a plot of bars shows, in words; None is a withheld value."""
    form = "{:.1%}" if percent else "{:,}"
    said = [WITHHELD if value is None else form.format(value) for value in values]
    pairs = ", ".join(f"{name} {value}" for name, value in zip(names, said, strict=True))
    return f"Bars: {what}: {pairs}."
