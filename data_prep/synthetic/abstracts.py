"""The grammar of the made-up abstracts."""

from dataclasses import dataclass

from data_prep.synthetic.dice import Dice, capital, percent
from data_prep.synthetic.facts import CONDITIONS, Condition


@dataclass(frozen=True)
class Abstract:
    """A title and sections (label or None, text), both as XML: escaped, with inline markup."""

    title: str
    sections: list[tuple[str | None, str]]


def abstract(dice: Dice) -> Abstract:
    """An abstract about one condition: a trial, a cohort, a test's accuracy or an association."""
    condition = dice.pick(CONDITIONS)
    title, background, methods, results, conclusion = dice.pick(
        (_trial, _trial, _cohort, _accuracy, _association)
    )(dice, condition)
    if dice.chance(65):
        labels = dice.pick(
            (
                ("BACKGROUND", "METHODS", "RESULTS", "CONCLUSIONS"),
                ("OBJECTIVE", "METHODS", "RESULTS", "CONCLUSION"),
                ("AIMS", "MATERIALS AND METHODS", "RESULTS", "CONCLUSIONS"),
            )
        )
        parts = (background, methods, results, conclusion)
        return Abstract(title, list(zip(labels, parts, strict=True)))
    return Abstract(title, [(None, " ".join((background, methods, results, conclusion)))])


def _about(dice: Dice, condition: Condition) -> str:
    first, second = dice.some(condition.symptoms, 2)
    share = dice.whole(3, 28)
    return dice.pick(
        (
            f"{capital(condition.name)} commonly presents with {first} and {second}.",
            f"Patients with {condition.name} often report {first}, and {second} is frequent.",
            f"{capital(condition.name)} accounts for {share}% of admissions to {_ward(condition)} "
            f"services, and {first} is the leading complaint.",
            f"In {condition.name}, {first} and {second} impair quality of life.",
        )
    )


def _ward(condition: Condition) -> str:
    return "intensive care" if condition.service == "MICU" else condition.service.lower()


def _p_value(dice: Dice) -> str:
    return dice.pick(
        (
            "p&lt;0.001",
            f"p=0.0{dice.whole(10, 49)}",
            f"<i>P</i> = 0.00{dice.pick('12346')}",
        )
    )


def _ratio(dice: Dice, name: str) -> str:
    middle = dice.whole(118, 310)
    low, high = middle - dice.whole(8, 17), middle + dice.whole(9, 80)
    return f"{name} {middle / 100:.2f}, 95% CI {low / 100:.2f}-{high / 100:.2f}"


def _trial(dice: Dice, condition: Condition) -> tuple[str, str, str, str, str]:
    drug, other = dice.some(condition.drugs, 2)
    dose = dice.pick(drug[1])
    long_name, _, lowest, highest, decimals, unit = condition.lab
    arm = dice.whole(24, 480)
    improved, control = dice.whole(arm // 2, arm * 9 // 10), dice.whole(arm // 5, arm // 2)
    weeks = dice.pick((6, 8, 12, 24, 52))
    symptom = dice.pick(condition.symptoms)
    title = dice.pick(
        (
            f"{capital(drug[0])} versus {other[0]} in {condition.name}: a randomized trial.",
            f"Effect of {drug[0]} on {symptom} in patients with {condition.name}.",
            f"Randomized comparison of {drug[0]} and {other[0]} for {condition.name}.",
        )
    )
    background = (
        f"{_about(dice, condition)} We compared {drug[0]} with {other[0]} as treatment of "
        f"{condition.name}."
    )
    methods = (
        f"In this {dice.pick(('double-blind', 'open-label', 'multicenter'))} trial, {2 * arm} "
        f"adults with {condition.name} received {drug[0]} ({dose} {drug[2]}, n = {arm}) or "
        f"{other[0]} (n = {arm}) for {weeks} weeks. The primary outcome was relief of {symptom}; "
        f"{long_name} was measured at baseline and at week {weeks}."
    )
    results = (
        f"Relief of {symptom} was reached by {improved} of {arm} patients "
        f"({percent(improved, arm)}) with {drug[0]} and by {control} of {arm} "
        f"({percent(control, arm)}) with {other[0]} ({_p_value(dice)}). "
        f"Mean {long_name} changed from {dice.number(lowest, highest, decimals)} "
        f"to {dice.number(lowest / 2, lowest, decimals)} {unit}. "
        f"{capital(dice.pick(('nausea', 'headache', 'rash', 'dizziness')))} was the most common "
        f"adverse event ({dice.whole(2, 14)}%)."
    )
    conclusion = dice.pick(
        (
            f"{capital(drug[0])} relieved {symptom} more often than {other[0]} in "
            f"{condition.name}.",
            f"In patients with {condition.name}, {drug[0]} was superior to {other[0]}.",
        )
    )
    return title, background, methods, results, conclusion


def _cohort(dice: Dice, condition: Condition) -> tuple[str, str, str, str, str]:
    other = dice.pick([c for c in CONDITIONS if c is not condition])
    patients = dice.whole(210, 9800)
    died = dice.whole(patients // 50, patients // 6)
    years = dice.whole(1998, 2012), dice.whole(2013, 2024)
    title = dice.pick(
        (
            f"Outcomes of {condition.name} in patients with {other.name}: a cohort study.",
            f"Mortality after {condition.procedure} for {condition.name}.",
            f"{capital(condition.name)} and the risk of {other.name}.",
        )
    )
    background = f"{_about(dice, condition)} Its relation to {other.name} is not well described."
    methods = (
        f"We reviewed {patients} patients with {condition.name} seen from {years[0]} to "
        f"{years[1]}, of whom {percent(dice.whole(patients // 9, patients // 2), patients)} "
        f"underwent {condition.procedure}. "
        f"Hazard ratios were adjusted for age, sex and {other.name}."
    )
    results = (
        f"Mean age was {dice.number(38, 79, 1)} years. During follow-up {died} patients "
        f"({percent(died, patients)}) died. {capital(other.name)} was associated with death "
        f"({_ratio(dice, 'HR')}; {_p_value(dice)}). On {condition.study}, {condition.finding} in "
        f"{dice.whole(41, 93)}%."
    )
    conclusion = (
        f"Among patients with {condition.name}, coexisting {other.name} was associated with higher "
        f"mortality."
    )
    return title, background, methods, results, conclusion


def _accuracy(dice: Dice, condition: Condition) -> tuple[str, str, str, str, str]:
    long_name, _, lowest, highest, decimals, unit = condition.lab
    cutoff = dice.number(lowest, (lowest + highest) / 2, decimals)
    patients = dice.whole(60, 1400)
    title = dice.pick(
        (
            f"Diagnostic accuracy of {long_name} for {condition.name}.",
            f"{capital(long_name)} in the diagnosis of {condition.name}: a prospective study.",
        )
    )
    background = f"{_about(dice, condition)} The value of {long_name} in its diagnosis is debated."
    methods = (
        f"{capital(long_name)} was measured in {patients} consecutive patients with "
        f"{dice.pick(condition.symptoms)}. {capital(condition.study)} was the reference standard."
    )
    results = (
        f"At a cutoff of {cutoff} {unit}, sensitivity was {dice.number(61, 98, 1)}% and "
        f"specificity {dice.number(55, 97, 1)}% (area under the curve "
        f"{dice.number(0.71, 0.97, 2)}). In affected patients, {condition.finding}. "
        f"Samples were kept at 4 °C with 5% CO<sub>2</sub> and 10<sup>{dice.whole(3, 9)}</sup> "
        f"cells per well."
    )
    conclusion = (
        f"{capital(long_name)} above {cutoff} {unit} supports the diagnosis of {condition.name}."
    )
    return title, background, methods, results, conclusion


def _association(dice: Dice, condition: Condition) -> tuple[str, str, str, str, str]:
    cases, controls = dice.whole(90, 2400), dice.whole(100, 3000)
    gene = f"<i>{condition.marker}</i>"
    drug = dice.pick(condition.drugs)
    title = dice.pick(
        (
            f"Association of {gene} variants with {condition.name}.",
            f"{gene} expression predicts response to {drug[0]} in {condition.name}.",
        )
    )
    background = (
        f"{_about(dice, condition)} The gene {gene} has been implicated in {condition.name}."
    )
    methods = (
        f"We genotyped {gene} in {cases} patients with {condition.name} and {controls} controls. "
        f"Response to {drug[0]} was assessed after {dice.pick((4, 12, 26))} weeks."
    )
    results = (
        f"Carriers of the {gene} risk allele had higher odds of {condition.name} "
        f"({_ratio(dice, 'OR')}; {_p_value(dice)}) and reported {dice.pick(condition.symptoms)} "
        f"more often. Response to {drug[0]} was seen in {dice.whole(22, 81)}% of carriers."
    )
    conclusion = (
        f"Variation in {gene} is associated with {condition.name} and response to {drug[0]}."
    )
    return title, background, methods, results, conclusion
