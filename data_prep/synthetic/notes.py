"""The grammar of the made-up discharge summaries and radiology reports."""

from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.synthetic.dice import Dice, capital, enumerated
from data_prep.synthetic.facts import CONDITIONS, Condition

_PLACES = ("Home", "Home With Service", "Extended Care", "Rehabilitation facility")
_ALLERGIES = ("No Known Allergies / Adverse Drug Reactions", "Penicillins", "Sulfa", "Codeine")
_NEGATIVES = (
    "There is no fracture.",
    "No free fluid is seen.",
    "The remaining structures are unremarkable.",
    "No pneumothorax is seen.",
)


@dataclass(frozen=True)
class Subject:
    """An invented person; `number` makes the identifiers."""

    number: int
    sex: str
    age: int
    conditions: list[Condition]


def subject(seed: int, number: int) -> Subject:
    """The subject with this number: what ails them first, then one to three other conditions."""
    dice = Dice(seed, "subject", number)
    return Subject(
        number=90_000_000 + number,
        sex=dice.pick("FM"),
        age=dice.whole(19, 91),
        conditions=dice.some(CONDITIONS, dice.whole(2, 4)),
    )


def discharge_note(dice: Dice, who: Subject, index: int) -> str:
    """A discharge summary of the subject's admission `index`, with MIMIC's section layout."""
    main = who.conditions[index % len(who.conditions)]
    others = [condition for condition in who.conditions if condition is not main]
    before = [_prescription(dice, dice.pick(condition.drugs)) for condition in others]
    after = before + [_prescription(dice, drug) for drug in dice.some(main.drugs, 2)]
    complaint, *more = dice.some(main.symptoms, 3)
    procedure = main.procedure if dice.chance(55) else None
    value = dice.number(*main.lab[2:5])
    return "\n".join(
        [
            *_heading(dice, who, main),
            *_section("Chief Complaint", [capital(complaint)]),
            *_section("Major Surgical or Invasive Procedure", [capital(procedure or "None")]),
            *_section(
                "History of Present Illness",
                _present_illness(dice, who, main, others, [complaint, *more], value),
            ),
            *_section("Past Medical History", _list(capital(c.name) for c in others)),
            *_section("Social History", ["___"]),
            *_section("Family History", [dice.pick(("Non-contributory.", "___"))]),
            *_section("Physical Exam", _examination(dice, main)),
            *_section("Pertinent Results", _results(dice, main, value)),
            *_section("Brief Hospital Course", _course(dice, main, others, procedure)),
            *_section("Medications on Admission", _list(before)),
            *_section("Discharge Medications", _list(after)),
            *_section("Discharge Disposition", [dice.pick(_PLACES)]),
            *_section(
                "Discharge Diagnosis",
                [f"Primary: {main.name} ({main.icd10})"]
                + [f"Secondary: {c.name} ({c.icd10})" for c in others],
            ),
            *_section(
                "Discharge Instructions",
                [
                    f"Dear {_form_of_address(who)} ___,",
                    f"You were admitted with {complaint} and were found to have {main.name}. "
                    f"Please take {after[-1].split()[0].lower()} as prescribed and call us if "
                    f"{complaint} returns.",
                ],
            ),
            "Followup Instructions:",
            "___",
        ]
    )


def radiology_report(dice: Dice, who: Subject, index: int) -> str:
    """A report on the imaging of one of the subject's conditions, or of a normal chest."""
    condition = who.conditions[index % len(who.conditions)]
    symptom = dice.pick(condition.symptoms)
    comparison = dice.pick(("None.", "___.", f"{capital(condition.study)} dated ___."))
    if dice.chance(15):
        study, findings, impression = (
            "chest radiograph",
            "The lungs are clear. There is no pleural effusion or pneumothorax. The heart is "
            "normal in size.",
            "No acute cardiopulmonary process.",
        )
    else:
        study, impression = condition.study, f"{capital(condition.impression)}."
        findings = f"{capital(condition.finding)}. {dice.pick(_NEGATIVES)}"
        if dice.chance(30):
            findings += f" An incidental cyst measures {dice.number(0.4, 3.8, 1)} cm."
            impression = f"1. {impression}\n2. Incidental cyst; no follow-up is needed."
    return "\n".join(
        [
            f"EXAMINATION:  {study.upper()}",
            " ",
            f"INDICATION:  ___ year old {_person(who)} with {condition.name} and {symptom} // "
            f"evaluate for {condition.impression}",
            " ",
            f"TECHNIQUE:  {capital(study)}, {dice.pick(('single view', 'standard protocol'))}.",
            " ",
            f"COMPARISON:  {comparison}",
            " ",
            "FINDINGS: ",
            " ",
            findings,
            " ",
            "IMPRESSION: ",
            " ",
            impression,
        ]
    )


def _section(name: str, lines: Iterable[str]) -> list[str]:
    return [f"{name}:", *lines, " "]


def _list(items: Iterable[str]) -> list[str]:
    return [f"{number}. {item}" for number, item in enumerate(items, start=1)]


def _heading(dice: Dice, who: Subject, main: Condition) -> list[str]:
    return [
        " ",
        "Name:  ___                     Unit No:   ___",
        " ",
        "Admission Date:  ___              Discharge Date:   ___",
        " ",
        f"Date of Birth:  ___             Sex:   {who.sex}",
        " ",
        f"Service: {main.service}",
        " ",
        "Allergies: ",
        dice.pick(_ALLERGIES),
        " ",
        "Attending: ___.",
        " ",
    ]


def _present_illness(
    dice: Dice,
    who: Subject,
    main: Condition,
    others: list[Condition],
    symptoms: list[str],
    value: str,
) -> list[str]:
    pronoun = "She" if who.sex == "F" else "He"
    complaint, *more = symptoms
    history = enumerated([condition.name for condition in others])
    opening = dice.pick(
        (
            f"{_form_of_address(who)} ___ is a {who.age} year old {_person(who)} with a history of "
            f"{history} who presents with {complaint}.",
            f"{who.age}{who.sex} with {history} presenting with "
            f"{dice.whole(1, 9)} days of {complaint}.",
            f"This is a {who.age} year old {_person(who)} with {history} "
            f"who was brought to the ED for {complaint}.",
        )
    )
    return [
        f"{opening} {pronoun} also reports {enumerated(more)}.",
        "",
        f"In the ED, initial vitals were {_vitals(dice)}. {capital(main.lab[0])} was {value} "
        f"{main.lab[5]} and {main.study} showed that {main.finding}. {pronoun} was given "
        f"{dice.pick(main.drugs)[0]} and admitted to {main.service}.",
    ]


def _vitals(dice: Dice) -> str:
    return (
        f"T {dice.number(97.1, 102.4, 1)} BP {dice.whole(92, 178)}/{dice.whole(48, 90)} "
        f"HR {dice.whole(54, 128)} RR {dice.whole(12, 28)} O2 {dice.whole(88, 100)}% RA"
    )


def _examination(dice: Dice, main: Condition) -> list[str]:
    return [
        "ADMISSION PHYSICAL EXAM:",
        "========================",
        f"VITALS: {_vitals(dice)}",
        f"GENERAL: {dice.pick(('Alert, oriented, in no acute distress', 'Uncomfortable, alert'))}",
        f"PERTINENT: {capital(main.exam)}",
        f"EXTREMITIES: {dice.pick(('Warm, well perfused', 'No clubbing or cyanosis'))}",
        "",
        "DISCHARGE PHYSICAL EXAM:",
        "========================",
        f"VITALS: {_vitals(dice)}",
        "GENERAL: Comfortable",
    ]


def _results(dice: Dice, main: Condition, value: str) -> list[str]:
    _, short_name, lowest, highest, decimals, _ = main.lab
    time = f"{dice.whole(4, 11):02d}:{dice.whole(0, 59):02d}AM"
    return [
        "ADMISSION LABS:",
        f"___ {time} BLOOD WBC-{dice.number(3.8, 15.9, 1)} RBC-{dice.number(2.9, 5.2, 2)} "
        f"Hgb-{dice.number(8.1, 15.4, 1)} Hct-{dice.number(25, 46, 1)} Plt ___",
        f"___ {time} BLOOD Glucose-{dice.whole(71, 260)}* UreaN-{dice.whole(7, 48)} "
        f"Creat-{dice.number(0.5, 2.4, 1)} Na-{dice.whole(128, 146)} K-{dice.number(3.2, 5.4, 1)} "
        f"Cl-{dice.whole(94, 110)} HCO3-{dice.whole(18, 31)}",
        f"___ {time} BLOOD {short_name}-{value}*",
        "",
        "DISCHARGE LABS:",
        f"___ {time} BLOOD {short_name}-{dice.number(lowest, highest, decimals)}*",
        "",
        f"{main.study.upper()}: {capital(main.finding)}.",
        f"IMPRESSION: {capital(main.impression)}.",
    ]


def _course(
    dice: Dice, main: Condition, others: list[Condition], procedure: str | None
) -> list[str]:
    first = dice.pick(main.drugs)
    lines = [
        "ACTIVE ISSUES:",
        f"# {capital(main.name)}: The patient presented with {dice.pick(main.symptoms)} and was "
        f"found to have {main.exam}. {capital(main.study)} showed {main.impression}. "
        f"{capital(first[0])} {dice.pick(first[1])} {first[2]} was started with improvement.",
    ]
    if procedure:
        lines.append(
            f"{capital(procedure)} was performed on hospital day {dice.whole(1, 6)} without "
            "complication."
        )
    lines += ["", "CHRONIC ISSUES:"]
    for condition in others:
        lines.append(
            f"# {capital(condition.name)}: {dice.pick(('Stable.', 'At baseline.', 'Compensated.'))}"
            f" {capital(dice.pick(condition.drugs)[0])} was "
            f"{dice.pick(('continued', 'held at first and resumed', 'continued at home dose'))}."
        )
    return lines


def _prescription(dice: Dice, drug: tuple[str, tuple[str, ...], str, str]) -> str:
    name, doses, unit, frequency = drug
    return f"{capital(name)} {dice.pick(doses)} {unit} {frequency}"


def _form_of_address(who: Subject) -> str:
    return "Ms." if who.sex == "F" else "Mr."


def _person(who: Subject) -> str:
    return "woman" if who.sex == "F" else "man"
