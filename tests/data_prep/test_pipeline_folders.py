"""Folders of data preparation: what raw_dir may look like, and runs that share an out_dir."""

import os
from pathlib import Path

import pytest

from common.config import load_config
from common.files import FolderInUse, only_user_of
from data_prep import pipeline
from data_prep.config import DataPrep
from data_prep.inputs import find_inputs
from data_prep.shards import DataSet
from data_prep.synthetic.corpus import write_corpus

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_corpus(folder, documents=150)
    return folder


def configuration(raw: Path, out: Path, *words: str) -> DataPrep:
    """configs/sample.yaml for the little corpus `raw`."""
    small = ["tokenizer.vocab_size=768", "row_tokens=512", "max_lengths=[128]"]
    folders = [f"raw_dir={raw}", f"out_dir={out}"]
    path = ROOT / "configs" / "sample.yaml"
    return load_config(DataPrep, "data_prep", path, [*folders, *small, *words])


def test_another_tokenizer_takes_every_manifest_away_whatever_the_length(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 128 and 512 share the folder's tokenizer with those of 256 that replace it."""
    for length in (128, 512, 256):
        pipeline.run(configuration(raw, tmp_path, f"max_lengths=[{length}]"))
    assert "data_prep: /" not in capsys.readouterr().err
    assert len(list(tmp_path.glob("rows-*/manifest.json"))) == 3
    pipeline.run(configuration(raw, tmp_path, "max_lengths=[256]", "tokenizer.vocab_size=832"))
    assert [path.parent.name for path in tmp_path.glob("rows-*/manifest.json")] == ["rows-256"]
    error = capsys.readouterr().err
    assert error.count("data_prep: /") == 1
    assert (
        f"data_prep: {tmp_path}: other vocab_size than before; made again: tokenizer, tokens, "
        "plan-256, rows-256; no data set any more: rows-128, rows-512\n"
    ) in error


def test_two_runs_in_one_folder_are_refused(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with only_user_of(out):
        with pytest.raises(FolderInUse, match=rf"^{out} is in use by process {os.getpid()} on"):
            pipeline.run(configuration(raw, out))
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["base", "sample"])
def test_the_configurations_find_every_source_in_either_layout(
    raw: Path, shared_data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code tables lie as text in the one, in CMS's zips in the other."""
    for folder, codes in (
        (
            raw,
            {
                "codes/icd10cm_order_demo.txt",
                "codes/CMS32_DESC_LONG_DX.txt",
                "codes/CMS32_DESC_LONG_SG.txt",
            },
        ),
        (shared_data, {"codes/cms_2026_dx.zip", "codes/cms_v32_icd9.zip"}),
    ):
        words = [f"raw_dir={folder}", f"out_dir={tmp_path}"]
        run = load_config(DataPrep, "data_prep", ROOT / "configs" / f"{name}.yaml", words)
        inputs = find_inputs(run)
        kinds = {key.replace("_", "-") for key, found in run.sources.patterns().items() if found}
        assert {found.kind for found in inputs} == kinds
        assert {found.name for found in inputs if found.name.startswith("codes/")} == codes
        assert "nonconforming" not in " ".join(found.name for found in inputs)
        # What lies as text does not lie in a zip, and the other way about.
        warnings = capsys.readouterr().err
        for pattern in run.sources.icd9cm_sg:
            hit = any(found.path.match(pattern) for found in inputs)
            line = f"warning: sources.icd9cm_sg: no file below raw_dir = {folder} matches"
            assert (f"{line} {pattern!r}\n" in warnings) != hit


def test_the_sample_configuration_prepares_the_made_up_corpus(raw: Path, tmp_path: Path) -> None:
    pipeline.run(configuration(raw, tmp_path))
    sources = {"pubmed", "discharge", "radiology", "icd10cm", "icd9cm"}
    assert set(DataSet(tmp_path / "rows-128").sources("train")) == sources
