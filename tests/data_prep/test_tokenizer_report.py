"""The tokenizer report: its numbers are those of the texts, and its errors name what lacks."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.document import Document, write_documents
from data_prep.tokenizer import encode, load_tokenizer
from data_prep.tokenizer_report import main, report


@pytest.fixture
def out_dir(notes: list[str], trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "tokenizer")
    for source in ("discharge", "icd9cm"):
        (tmp_path / "kept" / "validation" / source).mkdir(parents=True)
    folder = tmp_path / "kept" / "validation" / "discharge"
    found = [Document(f"discharge-{n}", "discharge", "", text) for n, text in enumerate(notes)]
    write_documents(folder / "00000.parquet", found[:300])
    write_documents(folder / "00001.parquet", found[300:])
    write_documents(tmp_path / "kept" / "validation" / "icd9cm" / "00000.parquet", [])
    return tmp_path


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A tokenizer that knows the word "patient" only."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "patient": 5}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=plain, **names).save_pretrained(tmp_path / "letters")
    return tmp_path / "letters"


def test_numbers_are_those_of_the_texts(out_dir: Path, letters: Path, notes: list[str]) -> None:
    own, other = report(out_dir, [str(letters)], documents=10_000)
    words = [word for text in notes for word in text.split()]
    tokens = sum(map(len, encode(load_tokenizer(out_dir / "tokenizer"), notes)))
    assert (own.source, own.documents, own.words, own.tokens) == (
        "discharge",
        len(notes),
        len(words),
        tokens,
    )
    assert own.unknown == 0
    assert own.tokens_per_word == tokens / len(words)
    assert own.bytes_per_token == sum(len(text.encode()) for text in notes) / tokens
    assert (other.tokens, other.unknown) == (len(words), len(words) - words.count("patient"))


def test_the_sample_is_the_same_for_the_same_documents(out_dir: Path) -> None:
    first = report(out_dir, [], documents=20)
    assert [row.documents for row in first] == [20]
    assert report(out_dir, [], documents=20) == first


def test_the_command_line_prints_a_line_a_source_and_tokenizer(
    out_dir: Path, letters: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([str(out_dir), str(letters), "--documents", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "tokens/word" in lines[0]
    assert "1.000" in lines[2]
    assert main([str(tmp_path / "absent")]) == 2
    assert "make them with python -m data_prep first" in capsys.readouterr().err
    shutil.rmtree(out_dir / "kept" / "validation" / "discharge")
    assert main([str(out_dir)]) == 2
    assert "holds no documents; prepare with validation_share" in capsys.readouterr().err
