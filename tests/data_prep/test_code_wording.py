"""The words of codes: every template holds code and title, the choice depends on the code alone."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.codes import TEMPLATES, documents
from data_prep.codes.code import Code
from data_prep.codes.wording import wording

FEMUR = Code(
    system="icd10cm",
    kind="diagnosis",
    prefix="icd10cm",
    code="S72001A",
    shown="S72.001A",
    title="Fracture of unspecified part of neck of right femur",
    category="S72",
    group="icd10cm-S72",
    parents=(("S72", "Fracture of femur"), ("S72.0", "Fracture of head and neck of femur")),
    details=(("Short title", "Fx unsp part of nk of r femr"),),
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("paper", "ICD 10 code for S72.001A: {title}"),
        ("title_first", "{title} (ICD-10-CM diagnosis code S72.001A)"),
        ("sentence", "The ICD-10-CM diagnosis code S72.001A stands for: {title}"),
        (
            "record",
            "ICD-10-CM diagnosis code: S72.001A\nTitle: {title}\n"
            "Short title: Fx unsp part of nk of r femr",
        ),
        (
            "hierarchy",
            "ICD-10-CM diagnosis codes\nS72: Fracture of femur\n"
            "S72.0: Fracture of head and neck of femur\nS72.001A: {title}",
        ),
    ],
)
def test_templates(template: str, text: str) -> None:
    """The paper's words, and the others; a definition follows on a line of its own."""
    expected = text.format(title=FEMUR.title)
    assert wording(FEMUR, [template]) == expected
    defined = replace(FEMUR, definition="A break of the bone.")
    assert wording(defined, [template]) == f"{expected}\nA break of the bone."


@given(st.text(st.characters(categories=["Lu", "Nd"]), min_size=1, max_size=7), st.randoms())
def test_the_choice_is_the_codes_own(code: str, random: object) -> None:
    """The order of the names and all else that a table says make no difference."""
    plain = replace(FEMUR, code=code)
    names = list(TEMPLATES)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert wording(plain, names) == wording(plain, TEMPLATES) == wording(plain, [*names, names[0]])
    assert wording(plain, TEMPLATES) in {wording(plain, [name]) for name in TEMPLATES}


def test_real_codes_in_all_templates(shared_data: Path) -> None:
    """Each template has its share, every text holds code and title, and no two are the same."""
    for name, kind in (
        ("cms_2026_dx.zip", "icd10cm"),
        ("cms_v32_icd9.zip", "icd9cm-dx"),
        ("cms_v32_icd9.zip", "icd9cm-sg"),
    ):
        path = shared_data / "codes" / name
        paper = {d.id: d.text for d in documents(path, kind)}
        found = list(documents(path, kind, templates=TEMPLATES))
        assert [d.id for d in found] == list(paper)
        for document in found:
            shown, title = paper[document.id].split(" code for ")[1].split(": ", 1)
            assert shown in document.text
            assert title in document.text
        assert len({d.text for d in found}) == len(found)
        shares = Counter(_template(document.text) for document in found)
        assert set(shares) == set(TEMPLATES)
        assert all(0.18 < share / len(found) < 0.22 for share in shares.values())


def test_real_headings_stand_above_their_codes(shared_data: Path) -> None:
    """The chain from the category down, as the order file has it."""
    path = shared_data / "codes" / "cms_2026_dx.zip"
    trees = {d.id: d.text for d in documents(path, "icd10cm", templates=["hierarchy"])}
    assert [line.partition(":")[0] for line in trees["icd10cm-S72001A"].splitlines()[1:]] == [
        *("S72", "S72.0", "S72.00", "S72.001", "S72.001A"),
    ]
    assert trees["icd10cm-S72001A"].splitlines()[1] == "S72: Fracture of femur"
    titles = {
        line.partition(": ")[0]: line for text in trees.values() for line in [text.split("\n")[-1]]
    }
    assert len(titles) == 98_186
    for text in trees.values():
        _, *above, own = text.splitlines()
        code = own.partition(": ")[0]
        # All the table's codes that it begins with, from the category down, in their own words.
        shorter = [code[:length].rstrip(".") for length in range(3, len(code))]
        expected = [titles[name] for name in dict.fromkeys(shorter) if name in titles]
        assert above == expected
        assert len(code) == 3 or above[0].partition(": ")[0] == code[:3]


def test_real_laboratory_items_stand_in_their_category(tmp_path: Path, shared_data: Path) -> None:
    """The items of MIMIC's published mapping, in the columns of d_labitems."""
    mapping = shared_data / "codes" / "mimic_mapping" / "d_labitems_to_loinc.csv"
    with mapping.open(encoding="utf-8-sig", newline="") as file:
        items = [list(row.values())[:4] for row in csv.DictReader(file)]
    with (tmp_path / "d_labitems.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["itemid", "label", "fluid", "category"], *items])
    trees = list(documents(tmp_path / "d_labitems.csv", "d-labitems", templates=["hierarchy"]))
    # Four have no label, and so no text.
    items = [item for item in items if item[1]]
    assert len(trees) == len(items) == 1_626
    for (item, label, fluid, category), tree in zip(items, trees, strict=True):
        assert tree.id == f"mimic-lab-{item}"
        _, *above, own = tree.text.splitlines()
        expected = (("Category", category), ("Fluid", fluid))
        assert above == [f"{name}: {' '.join(value.split())}" for name, value in expected if value]
        assert " ".join(label.split()) in own


def _template(text: str) -> str:
    first, *more = text.splitlines()
    if first.startswith("The "):
        return "sentence"
    if " code for " in first and first.startswith("ICD "):
        return "paper"
    if more:
        return "record" if more[0].startswith("Title: ") else "hierarchy"
    return "title_first"
