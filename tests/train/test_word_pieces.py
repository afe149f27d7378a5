"""Words by a vocabulary alone, against the pre-tokenisers of the tokenizers library."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import BPE, Unigram

from data_prep.document import Document
from data_prep.shards import DataError
from data_prep.tokenizer import train_tokenizer
from train.word_pieces import WordPieces, token_texts

WORDS = [
    *("patient", "denies", "chest", "pain", "electroencephalography", "naïve", "Ménière", "β"),
    *("106", "7.25", "2026", "mg", "(left)", "up,", "--", "T2", "α1-antitrypsin", "___", "x;y"),
]


def make_texts(number: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=40)) for _ in range(number)]


def pieces_of(tokenizer: Tokenizer, folder: Path) -> WordPieces:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return WordPieces.from_texts(
        token_texts(folder), np.zeros(tokenizer.get_vocab_size(), np.bool_)
    )


def begins_of_words(word_ids: list[int | None]) -> list[bool]:
    return [i == 0 or word_ids[i] != word_ids[i - 1] for i in range(len(word_ids))]


def test_byte_level_words_are_those_of_its_pre_tokeniser(tmp_path: Path) -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(50, seed=0), trainer)
    pieces = pieces_of(tokenizer, tmp_path)
    cut = 0
    for text in make_texts(50, seed=1):
        encoding = tokenizer.encode(text)
        found = pieces.begins(np.array(encoding.ids)).tolist()
        assert found == begins_of_words(encoding.word_ids)
        cut += found.count(False)
    assert cut > 1000, "most words are cut into pieces"


def test_wordpiece_words_are_those_of_its_pre_tokeniser(tmp_path: Path) -> None:
    tokenizer = BertWordPieceTokenizer(lowercase=False)
    tokenizer.train_from_iterator(make_texts(50, seed=0), vocab_size=120, show_progress=False)
    pieces = pieces_of(tokenizer._tokenizer, tmp_path)
    cut = 0
    for text in make_texts(50, seed=1):
        # BERT takes T2 for one word; here letters and digits are two.
        encoding = tokenizer.encode(re.sub("T2|α1-", "", text), add_special_tokens=False)
        found = pieces.begins(np.array(encoding.ids)).tolist()
        assert found == begins_of_words(encoding.word_ids)
        cut += found.count(False)
    assert cut > 1000


def test_words_of_a_tokenizer_trained_here(tmp_path: Path) -> None:
    """Against runs of characters in the text, by the tokens' offsets."""
    texts = [f"{text}\n  {text}." for text in make_texts(60, seed=0)]
    documents = [Document(f"notes-{i}", "notes", str(i), text) for i, text in enumerate(texts)]
    train_tokenizer(documents, tmp_path / "tokenizer", 448)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    pieces = pieces_of(tokenizer, tmp_path / "tokenizer")
    run = re.compile(r"[^\W\d_]+|\d+|[^\w\s]+|_+")
    several = 0
    for text in make_texts(40, seed=1):
        text = text.replace("___", "_")
        encoding = tokenizer.encode(text, add_special_tokens=False)
        begins = pieces.begins(np.array(encoding.ids)).tolist()
        words = [match.span() for match in run.finditer(text)]
        for (begin, end), starts in zip(encoding.offsets, begins, strict=True):
            if text[begin:end] == " ":
                assert starts
                continue
            # The lone space before a word is its first token; a token's own space is not the run's.
            at = begin + (text[begin] == " ")
            first = next(i for i, (left, right) in enumerate(words) if left <= at < right)
            alone = words[first][0] != at or (at > 0 and begin == at and text[at - 1] == " ")
            assert starts == (not alone), (text[begin:end], text[max(0, begin - 9) : end + 9])
            several += alone
        # Every word of the tokenizer's own pre-tokeniser is made of whole words.
        assert all(
            mine or not its
            for mine, its in zip(begins, begins_of_words(encoding.word_ids), strict=True)
        )
    assert several > 500


def test_numbers_are_words_though_each_digit_is_a_token() -> None:
    texts = [" ", "1", "0", "6", " mg", ".", " 2", "\n", "  ", "\udcc3", "\udca9", "x"]
    pieces = WordPieces.from_texts(texts, np.zeros(len(texts), np.bool_))

    def words(*ids: int) -> list[list[int]]:
        cuts = np.flatnonzero(pieces.begins(np.array(ids)))[1:]
        return [part.tolist() for part in np.split(np.array(ids), cuts)]

    assert words(0, 1, 2, 3, 4) == [[0, 1, 2, 3], [4]], "a lone space belongs to the number"
    assert words(1, 2, 5, 3, 6, 1) == [[1, 2], [5], [3], [6, 1]], "a decimal number is three"
    assert words(5, 7, 7, 8, 11) == [[5], [7, 7], [8], [11]]
    assert words(1, 0, 11, 9, 10, 11, 5) == [[1], [0, 11, 9, 10, 11], [5]], "the bytes of a letter"


def test_unigram_and_added_tokens_are_understood(tmp_path: Path) -> None:
    tokenizer = Tokenizer(Unigram([("<unk>", 0.0), ("▁do", -1.0), ("se", -2.0)], 0, False))
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.add_tokens(["   "])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_texts(tmp_path) == ["<unk>", " do", "se", "[MASK]", "   "]


@pytest.mark.parametrize("content", ["{}", "[", '{"model": {"type": "BPE", "vocab": {"a": 0}}}'])
def test_a_tokenizer_that_tells_no_words_apart_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json tells no words apart"):
        token_texts(tmp_path)
