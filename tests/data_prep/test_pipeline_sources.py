"""The keys of the sources, through the whole of data preparation, on the made-up corpus."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from data_prep.codes import TEMPLATES
from data_prep.config import DataPrep, Pubmed, Sources, Tokenizer, check
from data_prep.document import Document, InputError, read_documents
from data_prep.pipeline import Pipeline, find_run, run
from data_prep.stages import Counts, Stage
from data_prep.synthetic.corpus import write_corpus

CONSO = "36567|ENG||||||1||36567||RXNORM|IN|36567|simvastatin||N|4096|\n"
SAT = "36567|||1|AUI|36567|||NDC|RXNORM|00006074031|N|4096|\n"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_corpus(folder, documents=60)
    return folder


def _config(raw: Path, out: Path, sources: dict[str, list[str]], **changes: Any) -> DataPrep:
    values: dict[str, Any] = {
        "tokenizer": Tokenizer(vocab_size=512),
        "row_tokens": 256,
        "max_lengths": [128],
        "max_documents": 24,
        "rows_per_shard": 40,
    }
    return DataPrep(raw_dir=raw, out_dir=out, sources=Sources(**sources), **(values | changes))


def do(stage: Stage) -> list[Counts]:
    """Do a stage's tasks one after another, in this process."""
    stage.prepare()
    for index in range(len(stage.tasks)):
        stage.run_task(index)
    return stage.finish()


def _documents(config: DataPrep) -> list[Document]:
    pipeline = Pipeline(find_run(config)[0])
    for make in (pipeline.scan, pipeline.fold, pipeline.documents):
        do(make())
    paths = sorted((config.out_dir / "documents").rglob("*.parquet"))
    return [document for path in paths for document in read_documents(path)]


def test_every_template_is_used_and_one_can_be_chosen(raw: Path, tmp_path: Path) -> None:
    """By default codes are worded in all ways; with the paper's alone in one."""
    codes = {"icd10cm": ["codes/icd10cm_order_*.txt"]}
    paper = _documents(_config(raw, tmp_path / "paper", codes, code_templates=["paper"]))
    mixed = _documents(_config(raw, tmp_path / "all", codes))
    assert all(d.text.startswith("ICD 10 code for ") for d in paper)
    assert [d.id for d in paper] == [d.id for d in mixed]
    same = sum(a.text == b.text for a, b in zip(paper, mixed, strict=True))
    assert 0.1 < same / len(paper) < 1 / len(TEMPLATES) + 0.1


def test_two_editions_have_ids_of_their_own(raw: Path, tmp_path: Path) -> None:
    """The same codes in two order files: other ids, and texts that are equal are kept once."""
    corpus = tmp_path / "raw"
    shutil.copytree(raw, corpus)
    (table,) = (corpus / "codes").glob("icd10cm_order_*.txt")
    second = table.with_name("icd10cm_order_2031.txt")
    lines = table.read_text().splitlines()
    lines[-1] += " of another edition"
    second.write_text("\n".join(lines) + "\n")
    config = _config(corpus, tmp_path / "out", {"icd10cm": ["codes/icd10cm_order_*.txt"]})
    found = _documents(config)
    assert len({d.id for d in found}) == len(found) == 2 * len(lines)
    pipeline = Pipeline(find_run(config)[0])
    cleaning = pipeline.cleaning
    for stage in (cleaning.evaluation, cleaning.checks, cleaning.digests, cleaning.unique):
        do(stage())
    summary = json.loads((tmp_path / "out" / "unique" / "summary.json").read_text())
    assert summary["counts"]["icd10cm"]["unique"] == len(lines) + 1


def test_national_drug_codes_need_their_names_among_the_inputs(tmp_path: Path) -> None:
    """Beside RXNSAT.RRF lies RXNCONSO.RRF, and it is an input of its own."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "RXNCONSO.RRF").write_text(CONSO)
        (tmp_path / folder / "RXNSAT.RRF").write_text(SAT)
    names, attributes = ["a/RXNCONSO.RRF"], ["a/RXNSAT.RRF"]
    config = _config(tmp_path, tmp_path / "out", {"rxnorm": names, "ndc": attributes})
    found = _documents(config)
    assert Counter(d.source for d in found) == {"rxnorm": 2}
    assert {d.group for d in found} == {"rxnorm-36567"}
    with pytest.raises(ConfigError, match=r"sources\.ndc has b/RXNSAT\.RRF, .*RXNCONSO\.RRF"):
        Pipeline(
            find_run(
                _config(tmp_path, tmp_path / "out", {"rxnorm": names, "ndc": ["b/RXNSAT.RRF"]})
            )[0]
        )
    with pytest.raises(ConfigError, match=r"sources\.ndc needs sources\.rxnorm"):
        find_run(_config(tmp_path, tmp_path / "out", {"ndc": attributes}))


def test_odd_numbers_of_notes_are_said_at_every_run(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With both counts, and also when the documents were there already."""
    sources = {"radiology": ["mimic-iv-note/note/radiology.csv.gz"]}
    config = _config(raw, tmp_path / "out", sources)
    notes = len(_documents(config))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "data_prep.pipeline"):
            pipeline = Pipeline(find_run(config)[0])
            pipeline.warn_of_note_counts(do(pipeline.documents()))
        (message,) = caplog.messages
        assert f"{notes:,} notes" in message
        assert "2,321,355" in message


def test_redactions_are_one_token(raw: Path, tmp_path: Path) -> None:
    """The mark is in the notes and one token; one that is several is refused, and named."""
    sources = {"discharge": ["mimic-iv-note/note/discharge.csv.gz"]}
    original = _documents(_config(raw, tmp_path / "kept", sources))
    assert any("___" in d.text for d in original)
    run(_config(raw, tmp_path / "mapped", sources, redaction="█"))
    paths = sorted((tmp_path / "mapped" / "documents").rglob("*.parquet"))
    mapped = [document for path in paths for document in read_documents(path)]
    assert [d.text for d in mapped] == [d.text.replace("___", "█") for d in original]
    with pytest.raises(InputError, match=r"redaction = '\[GONE\]' is \d tokens of the tokenizer"):
        run(_config(raw, tmp_path / "several", sources, redaction="[GONE]"))
    existing = Tokenizer(existing=str(tmp_path / "mapped" / "tokenizer"))
    with pytest.raises(InputError, match=r"redaction = '\[GONE\]' is .*mapped/tokenizer"):
        Pipeline(
            find_run(_config(raw, tmp_path, sources, redaction="[GONE]", tokenizer=existing))[0]
        )


def test_pubmed_languages_are_a_key(raw: Path, tmp_path: Path) -> None:
    """All of the made-up corpus is English, by the text."""
    sources = {"pubmed": ["pubmed/baseline/*.xml.gz"]}
    everything = _documents(_config(raw, tmp_path / "all", sources, pubmed=Pubmed(languages=[])))
    english = _documents(_config(raw, tmp_path / "en", sources))
    assert [d.id for d in english] == [d.id for d in everything]
    german = _config(raw, tmp_path / "de", sources, pubmed=Pubmed(languages=["de"]))
    assert _documents(german) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code_templates": ["papier"]}, "code_templates has 'papier'; .*title_first"),
        ({"code_templates": []}, "code_templates is empty"),
        ({"pubmed": Pubmed(languages=["English"])}, "pubmed.languages has 'English'; .*en, de"),
        ({"redaction": " x"}, "redaction must be"),
        ({"redaction": ""}, "redaction must be"),
    ],
)
def test_keys_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    """The message names the key and says what fits."""
    with pytest.raises(ConfigError, match=message):
        check(_config(Path("raw"), Path("out"), {"pubmed": ["*"]}, **changes))
