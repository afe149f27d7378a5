"""The chapters and blocks of ICD-10-CM, from CMS's tabular list (`icd10cm_tabular_2026.xml`).

    <ICD10CM.tabular><chapter><name>19</name><desc>Injury, … (S00-T88)</desc>
      <section id="S70-S79"><desc>Injuries to the hip and thigh (S70-S79)</desc>
        <diag><name>S72</name><desc>Fracture of femur</desc><diag><name>S72.0</name> …

The order file has every code and all headings from the category down, and no chapter and no block;
this file has both above each category. Only they are read of it.
"""

import re
from pathlib import Path
from typing import Any

from lxml import etree

from data_prep.codes.files import open_table, problem
from data_prep.document import InputError
from data_prep.text import normalise

# As CMS and NCHS have called it over the years: icd10cm_tabular_2026.xml,
# icd10cm-tabular-April-1-2026.xml, Tabular.xml.
_NAME = re.compile(r"(?:icd10cm?[-_])?tabular(?![-\w]*addenda)[-\w]*\.xml", re.IGNORECASE)
_ROOT = "ICD10CM.tabular"
_CATEGORY = re.compile(r"[A-Z][0-9A-Z]{2}")

# (shown, title) of what stands above a category, the outermost first.
Headings = tuple[tuple[str, str], ...]


def read_headings(path: Path) -> dict[str, Headings]:
    """The chapter and the block of each three-character category of ICD-10-CM.

    path: the XML file, plain, gzip or in CMS's zip of tables and index. `S72` has
    `(("Chapter 19", "Injury, … (S00-T88)"), ("S70-S79", "Injuries to the hip and thigh"))`.
    Raises InputError for a file of another form, and a category that stands in two blocks.
    """
    found: dict[str, Headings] = {}
    root = _parse(path)
    for chapter in root.iter("chapter"):
        above = (f"Chapter {_text(path, chapter, 'name')}", _text(path, chapter, "desc"))
        for diagnosis in chapter.iterfind(".//section/diag"):
            section = diagnosis.getparent()
            category, block = _text(path, diagnosis, "name"), section.get("id", "")
            if not _CATEGORY.fullmatch(category) or not block:
                raise problem(path, diagnosis.sourceline, "no category of a block")
            if category in found:
                raise problem(path, diagnosis.sourceline, f"{category} for the 2nd time")
            title = _text(path, section, "desc").removesuffix(f"({block})").rstrip()
            found[category] = (above, (block, title))
    if not found:
        raise InputError(f"{path} holds no category of ICD-10-CM; fetch it again from CMS")
    return found


def _parse(path: Path) -> Any:
    """The root; no DTD is loaded and nothing is fetched."""
    parser = etree.XMLParser(
        load_dtd=False, no_network=True, resolve_entities=False, remove_comments=True
    )
    with open_table(path, _NAME) as stream:
        try:
            root = etree.parse(stream, parser).getroot()
        except etree.XMLSyntaxError as error:
            raise problem(path, error.position[0], "no whole XML") from None
    if root.tag != _ROOT:
        raise InputError(
            f"{path} is not the tabular list of ICD-10-CM: its root is not {_ROOT}; give "
            "icd10cm_tabular_….xml, or CMS's zip of tables and index"
        )
    return root


def _text(path: Path, element: Any, part: str) -> str:
    text = normalise(element.findtext(part, ""))
    if not text:
        raise problem(path, element.sourceline, f"a {element.tag} without <{part}>")
    return text
