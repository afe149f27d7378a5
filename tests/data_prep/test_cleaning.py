"""The cleaning stages together, on notes and abstracts planted for each and on real files."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from common.config import ConfigError, load_config
from data_prep import mimic, near_duplicates
from data_prep.config import (
    CopyForward,
    DataPrep,
    Decontaminate,
    EvaluationSet,
    NearDuplicates,
    Sources,
)
from data_prep.document import Document, read_documents
from data_prep.near_duplicates import jaccard, run_sets
from data_prep.pipeline import Pipeline, find_run
from data_prep.split import SPLITS
from data_prep.stages import Counts, Stage

COLUMNS = ["note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "text"]
CANARY = "canary-7Q"
ENDINGS = (".parquet", ".npy", ".npz", ".jsonl", ".keys", ".values", ".records", ".pairs")


def body(name: str, words: int = 150) -> str:
    """Words without digits, each another one."""
    letters = "abcdefghijklmn"
    return " ".join([f"{name}{a}{b}" for a in letters for b in letters][:words])


def write_notes(path: Path, notes: list[tuple[str, str]], first: int = 0) -> None:
    """Notes as (subject, text); their numbers are their order, from `first` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, (subject, text) in enumerate(notes, first):
            writer.writerow([f"{subject}-DS-{number}", subject, "", "DS", number, "", text])


def do(stage: Stage) -> list[Counts]:
    """Do a stage's tasks one after another, in this process."""
    stage.prepare()
    for index in range(len(stage.tasks)):
        stage.run_task(index)
    return stage.finish()


def clean(raw: Path, out: Path, **changes: Any) -> Pipeline:
    values: dict[str, Any] = {"sources": Sources(discharge=["*.csv.gz"]), "validation_share": 0.3}
    config = DataPrep(raw_dir=raw, out_dir=out, **(values | changes))
    pipeline = Pipeline(find_run(config)[0])
    for make in (pipeline.scan, pipeline.fold, pipeline.documents, *pipeline.cleaning.stages()):
        do(make())
    return pipeline


def kept(out: Path) -> dict[str, tuple[str, Document]]:
    found = {}
    for split in SPLITS:
        for path in sorted((out / "kept" / split).rglob("*.parquet")):
            for document in read_documents(path):
                assert document.id not in found
                found[document.id] = split, document
    return found


def counts(out: Path, stage: str, group: str) -> dict[str, int]:
    return json.loads((out / stage / "summary.json").read_text())["counts"][group]


def ids(raw: Path) -> list[str]:
    paths = sorted(raw.glob("*.csv.gz"))
    return [document.id for path in paths for document in mimic.documents(path, "discharge")]


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Two files of notes, each with what one of the steps is for."""
    copied = f"History: {body('past', 40)}"
    write_notes(
        tmp_path / "raw" / "a.csv.gz",
        [
            ("s0", body("original")),
            ("s1", f"Seen. {body('original')}"),  # longer: this one stays
            ("s2", f"{body('valued')} glucose 110"),
            ("s3", f"{body('valued')} glucose 111"),  # other value: both stay, on one side
            ("s4", body("short", 10)),
            ("s5", f"{copied}\n\n{body('first')}\n"),
            ("s6", f"{CANARY} {body('question', 30)}"),
        ],
    )
    write_notes(
        tmp_path / "raw" / "b.csv.gz",
        [
            ("s7", body("ORIGINAL")),  # says what the first one says
            ("s5", f"{body('second')}\n\n  {copied}\n\n{body('third')}\n"),
            *((f"t{n}", f"{body('normal', 30)}") for n in range(12)),
        ],
        first=7,
    )
    (tmp_path / "raw" / "set.txt").write_text(body("question", 14))
    return tmp_path / "raw"


SETTINGS: dict[str, Any] = {
    "decontaminate": Decontaminate(
        sets=[EvaluationSet(name="QA", files=["set.txt"], format="lines")]
    ),
    "near_duplicates": NearDuplicates(template_groups=12, template_copies=3),
}


def test_every_step_leaves_out_what_it_is_for_and_says_so_by_id(
    planted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    clean(planted, out, **SETTINGS)
    names = ids(planted)
    found = kept(out)
    gone = {number for number, name in enumerate(names) if name not in found}
    assert gone == {0, 4, 6, 7, *range(12, 21)}
    assert found[names[2]][0] == found[names[3]][0]
    assert len({found[names[n]][0] for n in (9, 10, 11)}) == 1
    assert found[names[8]][1].text == f"{body('second')}\n\n{body('third')}\n"
    checks = [json.loads(line) for path in out.glob("checks/**/*.jsonl") for line in path.open()]
    assert sorted((entry["id"], entry["left_out_for"], *entry["overlaps"]) for entry in checks) == (
        sorted([(names[4], "short"), (names[6], "evaluation_text", "QA")])
    )
    table = pq.read_table(out / "clusters/discharge/00000.parquet").to_pylist()
    decisions = {entry["id"]: (entry["decision"], entry["duplicate_of"]) for entry in table}
    assert decisions[names[0]] == ("near-duplicate", names[1])
    assert decisions[names[7]] == ("exact duplicate", names[1])
    assert decisions[names[3]] == decisions[names[2]] == ("kept", None)
    assert decisions[names[10]] == ("template copy", names[9])
    assert Counter(decision for decision, _ in decisions.values()) == {
        "kept": 4,
        "template copy": 2,
        "exact duplicate": 10,
        "near-duplicate": 1,
    }
    log = [json.loads(line) for path in out.glob("kept/copied/**/*.jsonl") for line in path.open()]
    assert [(entry["id"], entry["paragraphs"]) for entry in log] == [(names[8], 1)]
    assert counts(out, "checks", "discharge") == {
        "documents": 21,
        "short": 1,
        "evaluation_text": 1,
        "overlap QA": 1,
    }
    assert counts(out, "clusters", "discharge") == {
        "clustered": 17,
        "exact_duplicates": 10,
        "near_duplicates": 1,
        "template_copies": 2,
        "clusters": 3,
        "clusters_with_several_kept": 2,
    }
    totals = counts(out, "kept", "discharge")
    assert totals["train"] + totals["validation"] == len(found) == 8
    assert totals["copied_paragraphs"] == 1


def test_overlaps_are_only_counted_when_they_are_not_to_be_dropped(
    planted: Path, tmp_path: Path
) -> None:
    decontaminate = Decontaminate(sets=SETTINGS["decontaminate"].sets, drop=False)
    clean(planted, tmp_path / "out", **(SETTINGS | {"decontaminate": decontaminate}))
    assert counts(tmp_path / "out", "checks", "discharge")["overlap QA"] == 1
    assert ids(planted)[6] in kept(tmp_path / "out")


def test_links_that_would_tie_too_many_leave_out_of_validation(
    planted: Path, tmp_path: Path
) -> None:
    near = NearDuplicates(template_groups=12, template_copies=12, linked_groups=1)
    clean(planted, tmp_path / "out", near_duplicates=near)
    found, names = kept(tmp_path / "out"), ids(planted)
    template = [found[name][0] for name in names[9:] if name in found]
    assert set(template) == {"train"}
    assert 2 < len(template) < 12
    left_out = counts(tmp_path / "out", "split", "groups")["left_out_of_validation"]
    assert left_out >= 12 - len(template)
    log = [
        json.loads(line)
        for path in tmp_path.glob("out/kept/apart/**/*.jsonl")
        for line in path.open()
    ]
    assert len({entry["id"] for entry in log}) == len(log) == left_out
    assert not {entry["id"] for entry in log} & set(found)


def test_no_text_is_anywhere_but_in_documents(planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clean(planted, out, **(SETTINGS | {"decontaminate": Decontaminate()}))
    holding = set()
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if path.suffix == ".parquet":
            content = str(pq.read_table(path).to_pylist()).encode()
        else:
            content = path.read_bytes()
        if CANARY.encode() in content:
            holding.add(path.relative_to(out).parts[0])
    assert holding == {"documents", "kept"}


def test_each_size_of_a_task_is_in_the_key_of_its_stage(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = Sources(discharge=["*.csv.gz"])
    config = DataPrep(raw_dir=planted, out_dir=tmp_path / "out", sources=sources)
    for place, stage in [("tasks.FOLD_RECORDS", "fold"), *((p, s) for p, _, s in SIZES)]:
        before = find_run(config)[0].keys
        monkeypatch.setattr(f"data_prep.{place}", 1)
        assert find_run(config)[0].keys[stage] != before[stage], place


# Which constant says how much of the work a task gets, what it is here, and a stage it divides.
SIZES = [
    ("dedup.PART_DIGESTS", 5, "unique"),
    ("near_duplicates.PART_PAIRS", 2, "verified"),
    ("components.SHARD_MEMBERS", 2, "clusters"),
    ("copy_forward.PART_RECORDS", 3, "copied"),
]


@pytest.mark.parametrize(("place", "size", "stage"), SIZES)
def test_another_size_of_the_tasks_makes_what_a_fresh_run_makes_and_keeps_the_same(
    planted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    size: int,
    stage: str,
) -> None:
    """The markers of tasks that had another part of the work must not count."""
    clean(planted, tmp_path / "out", **SETTINGS)
    before, documents = counts_of_tasks(tmp_path / "out", stage), kept(tmp_path / "out")
    monkeypatch.setattr(f"data_prep.{place}", size)
    for out in ("out", "fresh"):
        clean(planted, tmp_path / out, **SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert counts_of_tasks(tmp_path / "out", stage) > before
    assert kept(tmp_path / "out") == documents


def counts_of_tasks(out: Path, stage: str) -> int:
    return int(json.loads((out / stage / "summary.json").read_text())["tasks"])


def contents(out: Path) -> dict[str, bytes]:
    """Every file that a stage has made, and its markers."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.name[0] != ".")
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in found.items() if name != "md5.json"}


def test_the_order_of_the_tasks_changes_nothing(planted: Path, tmp_path: Path) -> None:
    """So any number of workers may do them."""
    pipeline = clean(planted, tmp_path / "one", **SETTINGS)
    config = DataPrep(**(vars(pipeline.config) | {"out_dir": tmp_path / "backwards"}))
    other = Pipeline(find_run(config)[0])
    for make in (other.documents, *other.cleaning.stages()):
        stage = make()
        stage.prepare()
        for index in reversed(range(len(stage.tasks))):
            stage.run_task(index)
        stage.finish()
    files = sorted(path for path in (tmp_path / "one").rglob("*") if path.suffix in ENDINGS)
    assert len(files) > 40
    for path in files:
        name = path.relative_to(tmp_path / "one")
        assert path.read_bytes() == (tmp_path / "backwards" / name).read_bytes(), name


def test_the_order_of_the_files_changes_neither_texts_nor_sides(
    planted: Path, tmp_path: Path
) -> None:
    """Only which of equal documents is the first, and stays, depends on it."""
    clean(planted, tmp_path / "one", **SETTINGS)
    for name, other in (("a", "z"), ("b", "a")):
        (planted / f"{name}.csv.gz").rename(planted / f"{other}.csv.gz")
    clean(planted, tmp_path / "two", **SETTINGS)
    found = []
    for out in (tmp_path / "one", tmp_path / "two"):
        documents = kept(out).values()
        texts = Counter(" ".join(document.text.casefold().split()) for _, document in documents)
        found.append((texts, {document.group: side for side, document in documents}))
    (texts, sides), (other_texts, other_sides) = found
    assert texts == other_texts
    assert len(sides.keys() & other_sides.keys()) > 4
    assert all(sides[group] == other_sides[group] for group in sides.keys() & other_sides.keys())


def test_a_changed_key_redoes_what_it_decides(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*arguments: Any) -> Any:
        raise AssertionError("this was done already")

    out = tmp_path / "out"
    clean(planted, out, **SETTINGS)
    monkeypatch.setattr(near_duplicates, "write_pairs", must_not_run)
    assert "copied_paragraphs" in counts(out, "kept", "discharge")
    clean(planted, out, copy_forward=CopyForward(minimum_characters=10**6), **SETTINGS)
    assert "copied_paragraphs" not in counts(out, "kept", "discharge")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["near_duplicates.threshold=1.5"], "near_duplicates.threshold is 1.5; it must be above 0"),
        (["near_duplicates.bands=0"], "near_duplicates.bands is 0; it must be positive"),
        (["decontaminate.words=65"], "decontaminate.words is 65; it must be 64 at most"),
        (
            ["decontaminate.sets=[{name: QA, files: [qa/*.json], format: lines}]"],
            "decontaminate.sets QA: no file below raw_dir =",
        ),
        (
            ["decontaminate.sets=[{name: QA, files: [], format: csv}]"],
            "decontaminate.sets.0.format",
        ),
        (["quality.icd10cm={minimum_words: 3}"], "unknown key 'quality.icd10cm'"),
    ],
)
def test_a_key_that_cannot_be_is_named(
    planted: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data_prep: {{raw_dir: {planted}, sources: {{discharge: ['*.csv.gz']}}}}")
    with pytest.raises(ConfigError) as caught:
        find_run(load_config(DataPrep, "data_prep", path, words))
    assert message in str(caught.value)


@pytest.mark.parametrize("source", mimic.SOURCES)
def test_real_notes_keep_one_of_every_kind_on_one_side(
    shared_data: Path, tmp_path: Path, source: str
) -> None:
    """Nothing kept is a near-duplicate of another; what is but for a value is on its side."""
    out = tmp_path / "out"
    path = f"mimic-iv-note/note/{source}.csv.gz"
    clean(shared_data, out, sources=Sources(**{source: [path]}))
    found = kept(out)
    texts = [document.text for _, document in found.values()]
    sides = [side for side, _ in found.values()]
    sets = list(run_sets(texts, 5))
    # Candidates by a rare run: an independent way to find similar pairs.
    holders: dict[int, list[int]] = {}
    for number, (runs, _) in enumerate(sets):
        for run in runs[:: max(1, len(runs) // 8)].tolist():
            holders.setdefault(run, []).append(number)
    checked = set()
    for numbers in holders.values():
        if 1 < len(numbers) < 20:
            checked |= {(a, b) for a in numbers for b in numbers if a < b}
    assert len(checked) > 100
    apart = missed = 0
    for first, second in checked:
        if jaccard(sets[first][0], sets[second][0]) >= 0.8:
            longer, shorter = sorted((first, second), key=lambda n: -len(texts[n].split()))
            covers = np.isin(sets[shorter][1], sets[longer][1]).all()
            apart += sides[first] != sides[second]
            missed += bool(covers)
    left = Counter(counts(out, "clusters", source))
    # MinHash finds a pair of similarity 0.8 with probability 0.92, and a missed one may be apart.
    assert missed <= 0.1 * left["near_duplicates"] + 1
    assert apart <= missed
    before = counts(out, "documents", source)["documents"]
    left = Counter(counts(out, "clusters", source))
    assert (
        len(found)
        == before
        - left["exact_duplicates"]
        - left["near_duplicates"]
        - (counts(out, "split", "groups")["left_out_of_validation"])
    )
