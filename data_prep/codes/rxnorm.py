"""RxNorm: concepts from RXNCONSO.RRF, and National Drug Codes from RXNSAT.RRF beside it.

RXNCONSO has a line for each name ("atom") of a concept, from many vocabularies; read are those of
RxNorm itself (SAB = RXNORM), which are free to use. A concept's title is its own name (a term type
such as IN, SCD or BN), its synonyms (SY, PSN, TMSY, ET) are details. SUPPRESS: names that editors
have suppressed (E, Y) are left out; a concept all of whose names are obsolete (O) stays, with
`obsolete` in meta, because old records hold it. Columns: RxNorm Technical Documentation, 12.

An NDC is a code of its own, with the name of the drug it packages as title and that concept's
group, so that a split cannot part them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.codes.code import Code, Table
from data_prep.codes.files import fields
from data_prep.document import InputError
from data_prep.text import normalise

_CONCEPTS = re.compile(r"RXNCONSO\.RRF", re.IGNORECASE)
_ATTRIBUTES = re.compile(r"RXNSAT\.RRF", re.IGNORECASE)
_VERSION = re.compile(r"RxNorm_\w*?(\d{8})", re.IGNORECASE)
# Columns of RXNCONSO: RXCUI 0, SAB 11, TTY 12, STR 14, SUPPRESS 16.
_CONCEPT_FIELDS = 18
# Columns of RXNSAT: RXCUI 0, ATN 8, SAB 9, ATV 10, SUPPRESS 11.
_ATTRIBUTE_FIELDS = 13
_SYNONYMS = ("PSN", "SY", "TMSY", "ET")
_RANK_OF_SUPPRESS = {"N": 0, "O": 1}

# (is obsolete, is a synonym, term type, name): the least is a concept's title.
_Name = tuple[int, bool, str, str]


@dataclass(frozen=True)
class _Concept:
    line: int
    names: list[_Name]


def companion(path: Path) -> Path:
    """The file that an RXNSAT.RRF takes the names of drugs from: RXNCONSO.RRF, or the same zip."""
    if path.suffix.lower() == ".zip":
        return path
    return path.with_name(re.sub("RXNSAT", "RXNCONSO", path.name, flags=re.IGNORECASE))


def _concepts(path: Path) -> dict[str, _Concept]:
    """The concepts with their names, the best first, in the order of the file."""
    concepts: dict[str, _Concept] = {}
    for number, line in fields(path, _CONCEPTS, _CONCEPT_FIELDS):
        rxcui, vocabulary, kind, name, suppress = (line[i] for i in (0, 11, 12, 14, 16))
        rank = _RANK_OF_SUPPRESS.get(suppress)
        if vocabulary == "RXNORM" and rank is not None:
            found = (rank, kind in _SYNONYMS, kind, normalise(name))
            concepts.setdefault(rxcui, _Concept(number, [])).names.append(found)
    for concept in concepts.values():
        concept.names.sort()
    return concepts


def _read_concepts(path: Path) -> Iterator[tuple[int, Code]]:
    for rxcui, concept in _concepts(path).items():
        is_obsolete, _, kind, title = concept.names[0]
        others = dict.fromkeys(name for *_, name in concept.names[1:] if name != title)
        yield (
            concept.line,
            Code(
                system="rxnorm",
                kind="drug",
                prefix="rxnorm",
                code=rxcui,
                shown=rxcui,
                title=title,
                category=kind,
                group=f"rxnorm-{rxcui}",
                details=tuple(("Synonym", name) for name in others),
                meta={"term_type": kind, "obsolete": bool(is_obsolete)},
            ),
        )


def _read_ndc(path: Path) -> Iterator[tuple[int, Code]]:
    names = companion(path)
    if not names.is_file():
        raise InputError(
            f"{path} needs {names.name} beside it for the names of the drugs; "
            "unpack both from the RxNorm release, or give the zip"
        )
    concepts = _concepts(names)
    seen: set[str] = set()
    for number, line in fields(path, _ATTRIBUTES, _ATTRIBUTE_FIELDS):
        rxcui, attribute, vocabulary, ndc, suppress = (line[i] for i in (0, 8, 9, 10, 11))
        is_wanted = (attribute, vocabulary) == ("NDC", "RXNORM") and suppress in _RANK_OF_SUPPRESS
        # An NDC that has moved to another concept is listed with both; the first has it.
        if not is_wanted or ndc in seen:
            continue
        seen.add(ndc)
        is_long = re.fullmatch(r"\d{11}", ndc) is not None
        yield (
            number,
            Code(
                system="ndc",
                kind="drug",
                prefix="ndc",
                code=ndc,
                shown=f"{ndc[:5]}-{ndc[5:9]}-{ndc[9:]}" if is_long else ndc,
                title=concepts[rxcui].names[0][3] if rxcui in concepts else "",
                category=rxcui,
                group=f"rxnorm-{rxcui}",
                meta={"rxcui": rxcui},
            ),
        )


TABLES = {
    "rxnorm": Table("rxnorm", _CONCEPTS, _VERSION, _read_concepts),
    "ndc": Table("rxnorm", _ATTRIBUTES, _VERSION, _read_ndc),
}
