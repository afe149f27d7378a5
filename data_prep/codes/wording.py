"""How a code is put into words: several templates, one of them for each code.

Every template holds the code and its title in full, and the definition where there is one, so that
no description is lost and no two codes have one text, however alike their titles are.
"""

from collections.abc import Callable, Sequence

import numpy as np

from common.counter_random import derive_key, random_bits
from data_prep.codes.code import Code

# (system, kind) -> what the paper's template calls it, and its full name.
_NAMES = {
    ("icd10cm", "diagnosis"): ("ICD 10", "ICD-10-CM diagnosis code"),
    ("icd10pcs", "procedure"): ("ICD 10 PCS", "ICD-10-PCS procedure code"),
    ("icd9cm", "diagnosis"): ("ICD 9", "ICD-9-CM diagnosis code"),
    ("icd9cm", "procedure"): ("ICD 9", "ICD-9-CM procedure code"),
    ("hcpcs", "procedure"): ("HCPCS", "HCPCS procedure code"),
    ("hcpcs", "modifier"): ("HCPCS modifier", "HCPCS modifier"),
    ("mimic-lab", "laboratory"): ("MIMIC laboratory item", "MIMIC-IV laboratory item"),
    ("loinc", "observation"): ("LOINC", "LOINC code"),
    ("rxnorm", "drug"): ("RxNorm", "RxNorm concept"),
    ("ndc", "drug"): ("NDC", "National Drug Code"),
}


def _paper(code: Code, short: str, full: str) -> str:
    return f"{short} code for {code.shown}: {code.title}"


def _title_first(code: Code, short: str, full: str) -> str:
    return f"{code.title} ({full} {code.shown})"


def _sentence(code: Code, short: str, full: str) -> str:
    return f"The {full} {code.shown} stands for: {code.title}"


def _record(code: Code, short: str, full: str) -> str:
    return _lines([(full, code.shown), ("Title", code.title), *code.details])


def _hierarchy(code: Code, short: str, full: str) -> str:
    return f"{full}s\n" + _lines([*code.parents, (code.shown, code.title)])


def _lines(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in pairs)


_TEMPLATES: dict[str, Callable[[Code, str, str], str]] = {
    "paper": _paper,
    "title_first": _title_first,
    "sentence": _sentence,
    "record": _record,
    "hierarchy": _hierarchy,
}
TEMPLATES = tuple(_TEMPLATES)


def wording(code: Code, templates: Sequence[str]) -> str:
    """The text of a code, in one of `templates` (of TEMPLATES).

    `paper`       ICD 10 code for S72.001A: Fracture of … (Clinical ModernBERT's)
    `title_first` Fracture of … (ICD-10-CM diagnosis code S72.001A)
    `sentence`    The ICD-10-CM diagnosis code S72.001A stands for: Fracture of …
    `record`      code, title and the table's other columns, each on a line with its name
    `hierarchy`   the headings above the code that the table has, the outermost first, and the code,
                  each on a line with its title; docs/data.md says which tables have which

    Which one is a pure function of the code's system, kind and characters and of the names in
    `templates`: not of their order, of other codes or of the edition, so that a code that stays the
    same from one edition to the next is one text.
    """
    chosen = 0
    names = sorted(set(templates))
    if len(names) > 1:
        key = derive_key("code template", code.system, code.kind)
        counter = np.array([derive_key(code.code)], np.uint64)
        chosen = int(random_bits(key, counter)[0] % np.uint64(len(names)))
    short, full = _NAMES[code.system, code.kind]
    text = _TEMPLATES[names[chosen]](code, short, full)
    return f"{text}\n{code.definition}" if code.definition else text
