"""The fast tokenizer and SentencePiece give the same ids, and the text back, on whatever text."""

import csv
import gzip
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from data_prep.document import Document
from data_prep.tokenizer import SENTENCEPIECE_FILE, encode, load_tokenizer, train_tokenizer
from data_prep.tokenizer_export import merge_rules

HARD_FRAGMENTS = [
    *("\u2581", "\u2581\u2581", "\u0010", "\u0010_", "\u0010.", "_", ".", "\u2585", "\0", "\t\t"),
    *("[MASK]", "[SEP]", " [CLS]", "[PAD]", "[UNK]", "<0x0A>", "<0x00>", "<unk>", "<s>", "▁[MASK]"),
    *(" ", "  ", "     ", "\n", "\r\n", "\r", "\u00a0", "\u2009", "\ufeff", "\u200d", "\ufffd"),
    *(
        "é",
        "e\u0301",
        "ﬁ",
        "Å",
        "²",
        "β-blocker",
        "µg",
        "😀",
        "👩‍⚕️",
        "漢字",
        "\U0010ffff",
        "\ue000",
    ),
    *("\U0010ffff", "\ue000", "patient", " denies", "Chest", "12.5", "----", "====", "x" * 300),
]


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"discharge-{i}", "discharge", str(i), text) for i, text in enumerate(texts)]


def load_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))


@pytest.fixture(scope="module")
def periodic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of pieces such as `aab`, `aaba`, `----`, whose joins tie and overlap."""
    draw = random.Random(1)
    texts = ["".join(draw.choices("aab- ", k=400)) for _ in range(200)]
    folder = tmp_path_factory.mktemp("periodic") / "tokenizer"
    train_tokenizer(documents(texts), folder, 1024)
    return folder


def assert_same_and_lossless(folder: Path, texts: list[str]) -> None:
    """Both forms give the same ids and the text back; a failure names positions, never text."""
    fast = load_tokenizer(folder)
    piece = load_sentencepiece(folder)
    ids = encode(fast, texts)
    expected = piece.encode(texts)
    different = [i for i, row in enumerate(ids) if row.tolist() != expected[i]]
    assert not different, f"other ids than SentencePiece's: texts {different[:10]}"
    back = fast.backend_tokenizer.decode_batch([row.tolist() for row in ids])
    changed = [i for i, text in enumerate(texts) if back[i] != text]
    assert not changed, f"changed by the fast tokenizer: texts {changed[:10]}"
    changed = [i for i, text in enumerate(piece.decode(expected)) if text != texts[i]]
    assert not changed, f"changed by SentencePiece: texts {changed[:10]}"


# --- text survives and both forms agree --------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.text(max_size=200), min_size=1, max_size=20))
def test_any_unicode_text_survives(trained: Path, texts: list[str]) -> None:
    assert_same_and_lossless(trained, texts)


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(HARD_FRAGMENTS) | st.text(max_size=5)).map("".join), min_size=1
    )
)
def test_hard_fragments_in_any_order_survive(trained: Path, texts: list[str]) -> None:
    assert_same_and_lossless(trained, texts)


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.text(alphabet="ab- ", max_size=300), min_size=1, max_size=20))
def test_overlapping_joins_are_made_in_the_same_order(periodic: Path, texts: list[str]) -> None:
    assert_same_and_lossless(periodic, texts)


def test_long_words_and_long_runs_survive(trained: Path) -> None:
    assert_same_and_lossless(
        trained,
        ["patient" * 20_000, "x" * 150_000, " " * 10_000, "\n" * 10_000, "▁" * 5_000, "😀" * 5_000],
    )


def test_one_rule_a_piece_and_none_for_a_piece_that_is_never_reached() -> None:
    assert merge_rules(["aa", "aaa", "ba", "a", "b"]) == [("a", "a"), ("aa", "a"), ("b", "a")]
    # b+c is joined first wherever abc stands, so ab+c is never seen and abc never formed.
    assert merge_rules(["bc", "ab", "abcd", "a", "b", "c", "d"]) == [("b", "c"), ("a", "b")]


def real_texts(folder: Path) -> Iterator[str]:
    """Title and abstract of every citation, every note, every line of the code files.

    `icd10cm_codes` is left out: its titles are the order file's.
    """
    for path in sorted((folder / "pubmed").rglob("*.xml*")):
        if path.suffix == ".md5" or path.parent.name == "nonconforming":
            continue
        data = path.read_bytes()
        root = etree.fromstring(
            gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data,
            etree.XMLParser(load_dtd=False, no_network=True, resolve_entities=False),
        )
        for article in root.iter("Article"):
            parts = article.findall("ArticleTitle") + article.findall("Abstract/AbstractText")
            yield "\n".join("".join(part.itertext()) for part in parts)
    csv.field_size_limit(2**30)
    for path in sorted((folder / "mimic-iv-note" / "note").glob("*.csv.gz")):
        with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            yield from (row["text"] for row in csv.DictReader(file))
    for path in sorted((folder / "codes").glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".txt") and "icd10cm_codes" not in name:
                    yield from archive.read(name).decode("latin-1").split("\n")


def test_every_real_document_survives_with_the_ids_of_sentencepiece(
    shared_data: Path, tmp_path: Path
) -> None:
    texts = list(dict.fromkeys(real_texts(shared_data)))
    assert len(texts) > 140_000
    train_tokenizer(documents(texts), tmp_path / "tokenizer", 8192, sample_bytes=4 * 2**20)
    assert_same_and_lossless(tmp_path / "tokenizer", texts)


def test_corpus_full_of_special_tokens_teaches_no_special_piece(
    notes: list[str], tmp_path: Path
) -> None:
    texts = [f"{text}[MASK] [SEP] <0x0A>[CLS]" * 3 for text in notes[:100]]
    train_tokenizer(documents(texts), tmp_path / "tokenizer", 512)
    assert_same_and_lossless(tmp_path / "tokenizer", [*texts, *HARD_FRAGMENTS])
