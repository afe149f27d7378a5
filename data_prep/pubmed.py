"""PubMed: the XML files of baseline, updates and exports, to titles and abstracts.

An article may occur in many files: its record is revised, versioned or deleted by later ones.
So the files are read twice:

    paths = in_order(folder.rglob("*.xml*"))
    winners = fold(scan(path) for path in paths)        # which record of which file counts
    for path, positions in zip(paths, winners):
        for document in documents(path, positions): ...

What the text of an element is says `data_prep.pubmed_text`. `CopyrightInformation` is no part of
it. `OtherAbstract` (other languages, summaries in plain language, abstracts of other services) and
`VernacularTitle` are no part of the article's document either; they can be documents of their own.
"""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lxml import etree
from numpy.typing import NDArray

from common.files import file_hash
from data_prep.document import Document, InputError
from data_prep.language import identify
from data_prep.pubmed_text import section_of, term_of, text_of, without_brackets

_RECORD, _DELETION, _BOOK = "MedlineCitation", "DeleteCitation", "PubmedBookArticle"
# Roots that say "PubMed" by themselves, so that they may hold no record at all.
_SETS = ("PubmedArticleSet", "MedlineCitationSet")
_NLM_NAME = re.compile(r"[a-z]+(\d\d)n(\d{4,})\.xml", re.IGNORECASE)
_SIDECARS = (
    re.compile(r"MD5\s?\(.+\)\s*=\s*([0-9a-fA-F]{32})"),  # OpenSSL, which NLM uses
    re.compile(r"([0-9a-fA-F]{32})\s+\*?\S.*"),  # md5sum
)
# Publication types by MeSH identifier and, for records without identifiers, by name. NLM renamed
# "Retraction of Publication" to "Retraction Notice" and kept the identifier.
_RETRACTED = {"D016441", "Retracted Publication"}
_RETRACTION_NOTICE = {"D016440", "Retraction of Publication", "Retraction Notice"}
_FOUR_DIGITS = re.compile(r"\d{4}")
_ARTICLE = "article"
_IDENTIFIED_DOCUMENTS = 1024


@dataclass(frozen=True)
class Scan:
    """What the fold needs to know of one file.

    pmids (n,) uint32 and versions (n,) uint16: of its n records, in file order;
    deleted_pmids (d,) uint32 and deleted_versions (d,) uint16: of its DeleteCitation lists.
    """

    pmids: NDArray[np.uint32]
    versions: NDArray[np.uint16]
    deleted_pmids: NDArray[np.uint32]
    deleted_versions: NDArray[np.uint16]


def in_order(paths: Iterable[Path]) -> list[Path]:
    """The files in the order in which NLM made them, which is the order they are folded in.

    NLM's names hold year and number (`pubmed26n1334.xml.gz`; the updates of a year continue the
    numbers of its baseline). Files with other names come first, by path: their age is unknown.
    Sidecars (`.md5`) and hidden files are left out.
    """
    files = [p for p in paths if p.suffix != ".md5" and not p.name.startswith(".")]
    return sorted(files, key=_age)


def scan(path: Path) -> Scan:
    """Pass 1 over one file; verifies its `.md5` sidecar where there is one.

    Independent of all other files, so that several can be scanned at once.
    Raises InputError for a file that is not PubMed XML, is cut short or fails its checksum.
    """
    _check_sidecar(path)
    records: list[tuple[int, int]] = []
    deleted: list[tuple[int, int]] = []
    for element in _elements(path):
        if element.tag == _RECORD:
            records.append(_key(path, len(records), _pmid(element)))
        elif element.tag == _DELETION:
            deleted.extend(_key(path, len(records), pmid) for pmid in element.iter("PMID"))
    return Scan(*_arrays(records), *_arrays(deleted))


def fold(scans: Iterable[Scan]) -> list[NDArray[np.int64]]:
    """For each file the positions, ascending int64, of its records that count.

    `scans` come in the order of `in_order`. Of the records of a PMID the last by (Version, file,
    position) counts; a DeleteCitation removes the records of its (PMID, Version) in its own and all
    earlier files. A record that wins but is retracted is dropped by `documents`, not here.
    Memory: some 40 bytes a record.
    """
    scans = list(scans)
    sizes = np.array([len(scan.pmids) for scan in scans], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    if starts[-1] == 0:
        return [np.zeros(0, np.int64) for _ in scans]
    keys = np.concatenate([_sort_key(scan.pmids, scan.versions) for scan in scans])
    order = np.argsort(keys, kind="stable")  # stable: equal keys stay in (file, position) order
    alive = ~_is_deleted(keys, starts, scans)
    order = order[alive[order]]
    pmids = keys[order] >> np.uint64(16)
    is_last = np.append(pmids[1:] != pmids[:-1], True)[: len(order)]
    winners = np.sort(order[is_last])
    bounds = np.searchsorted(winners, starts)
    return [winners[bounds[i] : bounds[i + 1]] - starts[i] for i in range(len(scans))]


def documents(
    path: Path,
    positions: NDArray[np.int64],
    *,
    keep_retracted: bool = False,
    languages: Sequence[str] = (),
    other_abstracts: Sequence[str] = (),
    vernacular_titles: bool = False,
    counts: Counter[str] | None = None,
) -> Iterator[Document]:
    """Pass 2 over one file: the documents of each record at `positions` that has a text.

    Text: the title on a line, then each section of the abstract on a line, `LABEL: text` where it
    is labelled. id and group are `pubmed-<pmid>`.
    meta: `year` (int or None), `languages`, `publication_types` (lists of str), `has_abstract`,
    `truncated`, `retracted`, `retraction_notice` (bool), `version` (int), `file` (its name).

    Each `OtherAbstract` whose Type is in `other_abstracts` (`"*"` is any) is a document as well,
    `pubmed-<pmid>-other-<n>` (n from 1, over all of the record), and with `vernacular_titles` so is
    the title in its own language, `pubmed-<pmid>-vernacular`. Their group and meta are the
    article's; meta also has `part` (`other_abstract` or `vernacular_title`), `type` and
    `declared_language` (the element's attributes; None where there are none).

    `languages` are ISO 639-1 codes: documents in others are left out, as `language.identify` tells
    from the text. Where it cannot tell, an article counts as English, because NLM's titles are; the
    other documents are left out. meta then has `language` (None where it cannot be told). Without
    `languages` all are kept and nothing is identified.

    `counts` gets added: `documents` (of which `other_abstracts` and `vernacular_titles` are no
    articles, and `title_only`); `records` = articles + `replaced` (not in `positions`) +
    `without_text` + `retracted` (article or notice; left out unless `keep_retracted`) +
    `other_language`; `other_language_parts` (documents that are no articles); and `books`
    (`PubmedBookArticle`, no article and not read).
    Raises InputError like `scan`, and when the file has changed since it was scanned.
    """
    counts = Counter() if counts is None else counts
    candidates = _candidates(
        path, positions, keep_retracted, other_abstracts, vernacular_titles, counts
    )
    for kind, document in _in_languages(candidates, languages, counts) if languages else candidates:
        counts["documents"] += 1
        if kind != _ARTICLE:
            counts[kind] += 1
        else:
            counts["title_only"] += not document.meta["has_abstract"]
        yield document


def _candidates(
    path: Path,
    positions: NDArray[np.int64],
    keep_retracted: bool,
    other_abstracts: Sequence[str],
    vernacular_titles: bool,
    counts: Counter[str],
) -> Iterator[tuple[str, Document]]:
    """The documents of all languages, each with the count that it belongs to, or _ARTICLE."""
    wanted = set(positions.tolist())
    position = -1
    for element in _elements(path):
        if element.tag != _RECORD:
            counts["books"] += element.tag == _BOOK
            continue
        position += 1
        counts["records"] += 1
        if position not in wanted:
            counts["replaced"] += 1
            continue
        article = _document(path, position, element)
        is_left_out = _is_about_retraction(article) and not keep_retracted
        if not article.text:
            counts["without_text"] += 1
        elif is_left_out:
            counts["retracted"] += 1
        else:
            yield _ARTICLE, article
        if (other_abstracts or vernacular_titles) and not is_left_out:
            yield from _parts(article, element, other_abstracts, vernacular_titles)
    if wanted and max(wanted) > position:
        raise InputError(f"{path} has lost records since it was scanned; run the stage again")


def _in_languages(
    candidates: Iterator[tuple[str, Document]], languages: Sequence[str], counts: Counter[str]
) -> Iterator[tuple[str, Document]]:
    """The candidates in one of `languages`, which gets into their meta; the others are counted.

    A text that cannot be told counts as English where it is an article's.
    """
    # Many at a time: between other work, the identifier's tables would leave the processor's cache.
    while batch := list(islice(candidates, _IDENTIFIED_DOCUMENTS)):
        found = [identify(document.text) for _, document in batch]
        for (kind, document), language in zip(batch, found, strict=True):
            is_article = kind == _ARTICLE
            if (language or ("en" if is_article else None)) in languages:
                document.meta["language"] = language
                yield kind, document
            else:
                counts["other_language" if is_article else "other_language_parts"] += 1


def _age(path: Path) -> tuple[int, int, str]:
    """Year and number from a name such as pubmed26n1334.xml.gz; (0, 0) for other names."""
    name = _NLM_NAME.match(path.name)
    if name is None:
        return 0, 0, path.as_posix()
    year = int(name[1])
    return (1900 if year >= 60 else 2000) + year, int(name[2]), path.as_posix()


def md5_of_sidecar(text: str) -> str | None:
    """The MD5 that a `.md5` file states, in lower case, or None: NLM's form, or md5sum's."""
    line = text.strip().partition("\n")[0].strip()
    match = next(filter(None, (form.fullmatch(line) for form in _SIDECARS)), None)
    return match[1].lower() if match else None


def _check_sidecar(path: Path) -> None:
    sidecar = path.with_name(path.name + ".md5")
    if not sidecar.is_file():
        return
    md5 = md5_of_sidecar(sidecar.read_text(encoding="utf-8", errors="replace"))
    if md5 is None:
        raise InputError(
            f"{sidecar} holds neither `MD5({path.name})= <hex>` nor `<hex>  {path.name}`; "
            f"fetch it again, or delete it to read {path.name} unchecked"
        )
    if file_hash(path, "md5") != md5:
        raise InputError(
            f"the MD5 of {path} is not the one in {sidecar.name}: the file is damaged or not whole;"
            " fetch both again"
        )


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    """The file's bytes, unpacked where it is gzip by its magic bytes: names cannot be trusted."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if is_gzip else path.open("rb")


def _elements(path: Path) -> Iterator[Any]:
    """Each record, deletion list and book of a file, forgotten once the next one is asked for.

    No DTD is loaded, nothing is fetched and entities that a file defines are not expanded; the
    five predefined ones and character references are.
    """
    found = False
    try:
        with _open(path) as stream:
            events = etree.iterparse(
                stream,
                tag=(_RECORD, _DELETION, _BOOK),
                load_dtd=False,
                no_network=True,
                resolve_entities=False,
                remove_comments=True,
                remove_pis=True,
            )
            for _, element in events:
                found = True
                yield element
                _forget(element)
            found = found or events.root.tag in _SETS
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path} is a damaged or truncated gzip file; fetch it again") from None
    except etree.XMLSyntaxError as error:
        # The parser's own message may quote the file.
        place = "line {}, column {}".format(*error.position)
        what = "is empty" if path.stat().st_size == 0 else f"is not whole PubMed XML ({place})"
        raise InputError(f"{path} {what}; fetch it again or leave it out") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not found:
        raise InputError(
            f"{path} is XML without any MedlineCitation, so not from PubMed; leave it out"
        )


def _forget(node: Any) -> None:
    """Free all that stands before an element; itself goes when the next one is done with."""
    while (parent := node.getparent()) is not None:
        while node.getprevious() is not None:
            del parent[0]
        node = parent


def _key(path: Path, position: int, pmid: Any) -> tuple[int, int]:
    """(PMID, Version) of a PMID element; records of old files have no Version, which means 1."""
    text = (pmid.text or "").strip() if pmid is not None else ""
    version = pmid.get("Version", "1") if pmid is not None else "1"
    if not (_is_number(text, 2**32) and _is_number(version, 2**16)):
        raise InputError(
            f"{path} is not PubMed XML: its record number {position + 1} has no valid PMID; "
            "leave the file out, or fetch it from NLM"
        )
    return int(text), int(version)


def _is_number(text: str, limit: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < limit


def _arrays(keys: list[tuple[int, int]]) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    return (
        np.array([pmid for pmid, _ in keys], dtype=np.uint32),
        np.array([version for _, version in keys], dtype=np.uint16),
    )


def _sort_key(pmids: NDArray[np.uint32], versions: NDArray[np.uint16]) -> NDArray[np.uint64]:
    return (pmids.astype(np.uint64) << np.uint64(16)) | versions.astype(np.uint64)


def _is_deleted(
    keys: NDArray[np.uint64], starts: NDArray[np.int64], scans: Sequence[Scan]
) -> NDArray[np.bool_]:
    """Which records, numbered over all files, a DeleteCitation of their or a later file removes.

    keys (n,) of all records; starts (files + 1,): the number of each file's first record.
    """
    deleted = np.concatenate([_sort_key(s.deleted_pmids, s.deleted_versions) for s in scans])
    if len(deleted) == 0:
        return np.zeros(len(keys), np.bool_)
    # A deletion in file i reaches the records before the end of file i.
    reach = np.repeat(starts[1:], [len(scan.deleted_pmids) for scan in scans])
    unique, group = np.unique(deleted, return_inverse=True)
    furthest = np.zeros(len(unique), np.int64)
    np.maximum.at(furthest, group, reach)
    slot = np.minimum(np.searchsorted(unique, keys), len(unique) - 1)
    return (unique[slot] == keys) & (np.arange(len(keys)) < furthest[slot])


def _pmid(citation: Any) -> Any:
    return next((part for part in citation if part.tag == "PMID"), None)


def _document(path: Path, position: int, citation: Any) -> Document:
    pmid, version = _key(path, position, _pmid(citation))
    # To go over all children is faster than to ask for one by its name.
    record = {part.tag: part for part in citation}
    parts = list(record.get("Article", ()))
    article = {part.tag: part for part in parts}
    title = without_brackets(text_of(article.get("ArticleTitle")))
    abstract = article.get("Abstract", ())
    sections = [section_of(part) for part in abstract if part.tag == "AbstractText"]
    body = [line for line, _ in sections if line]
    kinds = [(kind.get("UI"), term_of(kind)) for kind in article.get("PublicationTypeList", ())]
    marks = {mark for kind in kinds for mark in kind}
    links = {link.get("RefType") for link in record.get("CommentsCorrectionsList", ())}
    identifier = f"pubmed-{pmid}"
    return Document(
        id=identifier,
        source="pubmed",
        group=identifier,
        text="\n".join([title, *body] if title else body),
        meta={
            "year": _year(article.get("Journal")),
            "languages": [term_of(part).lower() for part in parts if part.tag == "Language"],
            "publication_types": [name for _, name in kinds],
            "has_abstract": bool(body),
            "truncated": any(was_truncated for _, was_truncated in sections),
            "retracted": "RetractionIn" in links or not _RETRACTED.isdisjoint(marks),
            "retraction_notice": not _RETRACTION_NOTICE.isdisjoint(marks),
            "version": version,
            "file": path.name,
        },
    )


def _parts(
    article: Document, citation: Any, other_abstracts: Sequence[str], vernacular_titles: bool
) -> Iterator[tuple[str, Document]]:
    """What of a record is a document beside its article's, each with the count it belongs to."""
    for number, abstract in enumerate(citation.iterfind("OtherAbstract"), start=1):
        kind = abstract.get("Type")
        if "*" not in other_abstracts and kind not in other_abstracts:
            continue
        sections = [section_of(child) for child in abstract if child.tag == "AbstractText"]
        text = "\n".join(line for line, _ in sections if line)
        meta = {
            "part": "other_abstract",
            "type": kind,
            "declared_language": abstract.get("Language"),
            "has_abstract": True,
            "truncated": any(was_truncated for _, was_truncated in sections),
        }
        if text:
            yield "other_abstracts", _part(article, f"other-{number}", text, meta)
    title = text_of(citation.find("Article/VernacularTitle")) if vernacular_titles else ""
    if title:
        meta = {
            "part": "vernacular_title",
            "type": None,
            "declared_language": None,
            "has_abstract": False,
            "truncated": False,
        }
        yield "vernacular_titles", _part(article, "vernacular", without_brackets(title), meta)


def _part(article: Document, name: str, text: str, meta: dict[str, Any]) -> Document:
    return replace(article, id=f"{article.id}-{name}", text=text, meta=article.meta | meta)


def _year(journal: Any) -> int | None:
    """The year of publication: `Year`, or the first one in a `MedlineDate` such as 1998 Dec-1999.

    PubDate is the journal issue's; `ArticleDate`, which may be a year earlier, is not always there.
    """
    for date in () if journal is None else journal.iter("Year", "MedlineDate"):
        match = _FOUR_DIGITS.search(date.text or "")
        if match:
            return int(match[0])
    return None


def _is_about_retraction(document: Document) -> bool:
    return bool(document.meta["retracted"] or document.meta["retraction_notice"])
