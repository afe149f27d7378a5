"""Encoding word by word gives what the tokenizer gives for the whole text."""

import copy
import gc
import json
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep import encoding
from data_prep.encoding import WordEncoder
from data_prep.tokenizer import encode, load_tokenizer
from data_prep.tokenizer_export import has_separate_parts, is_word_by_word

load_once = cache(load_tokenizer)
ODD = st.lists(
    st.one_of(
        st.sampled_from(" \n\t▁\x10é°_-.[]"),
        st.sampled_from(["patient ", " of", "[MASK]", "   ", " 12.5 ", "[CLS]"]),
        st.sampled_from(["S72.001A:", "µg/5", "<0x41>"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
).map("".join)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(ODD, max_size=4))
def test_ids_are_those_of_the_whole_text(
    trained: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while words are forgotten, some for their length and all for their number."""
    monkeypatch.setattr(encoding, "_MOST_WORDS", 5)
    monkeypatch.setattr(encoding, "_LONGEST_WORD", 4)
    monkeypatch.setattr(encoding, "_JOINED_PARTS", 3)
    tokenizer = load_once(trained)
    backend = tokenizer.backend_tokenizer
    assert is_word_by_word(backend)
    assert has_separate_parts(backend)
    backend.encode_special_tokens = True
    expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    for found in (encode(tokenizer, texts), encode(tokenizer, texts)):
        assert [ids.tolist() for ids in found] == expected
        assert all(ids.dtype == np.uint16 for ids in found)


def test_each_different_part_of_a_word_is_asked_for_once() -> None:
    """A word stands between spaces; its letters, digits and marks are parts, as are words beyond
    ASCII but for their digits."""
    asked: list[str] = []

    def encode_whole(texts: list[str]) -> list[list[int]]:
        found = []
        for text in texts:
            # Joined by zeros, each of which is a token of its own; here the length is the id.
            parts = text.split("0") if text != "0" else ["0"]
            asked.extend(parts)
            ids = [found for part in parts for found in (99, len(part) if part != "0" else 99)]
            found.append(ids[1:])
        return found

    encoder = WordEncoder(encode_whole, np.dtype(np.uint32))
    assert asked == list("0123456789")
    asked.clear()
    found = encoder.encode(["a a  bb\na", "", " a", "(S72.0é", "S70"])
    expected = [[1, 2, 4, 1, 1], [], [2], [2, 1, 1, 1, 99, 1], [1, 1, 99]]
    assert [ids.tolist() for ids in found] == expected
    assert sorted(asked) == sorted(["\n", "  bb", " a", "(S", ".", "S", "a", "é"])
    encoder.encode(["a a", "x" * 65])
    encoder.encode(["x" * 65])
    assert asked[8:] == ["x" * 65] * 2


def test_a_vocabulary_whose_parts_are_not_separate_is_not_cut(trained: Path) -> None:
    """A piece of a digit and another, or of a letter and a mark: the words are cut no further."""
    content = json.loads((trained / "tokenizer.json").read_text())
    for left, right in (("1", "2"), ("a", "."), ("-", "b"), ("▁", "7")):
        changed = copy.deepcopy(content)
        joined = changed["model"]["vocab"]
        for piece in (left, right, left + right):
            joined.setdefault(piece, len(joined))
        changed["model"]["merges"].insert(0, [left, right])
        backend = Tokenizer.from_str(json.dumps(changed))
        assert is_word_by_word(backend)
        assert not has_separate_parts(backend)
    assert has_separate_parts(Tokenizer.from_str(json.dumps(content)))


def test_other_tokenizers_are_not_cut_into_words(trained: Path) -> None:
    """Another way to cut a text, or a token that is matched in the text across words."""
    other = Tokenizer(models.BPE())
    assert not is_word_by_word(other)
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    assert not is_word_by_word(other)
    tokenizer = load_tokenizer(trained)
    tokenizer.add_tokens(["chest pain"])
    assert not is_word_by_word(tokenizer.backend_tokenizer)
    (ids,) = encode(tokenizer, ["no chest pain"])
    assert tokenizer.convert_tokens_to_ids("chest pain") in ids.tolist()


def test_a_tokenizer_that_is_not_used_any_more_is_forgotten(trained: Path) -> None:
    """What its words are remembered with does not keep it."""
    tokenizer = load_tokenizer(trained)
    encode(tokenizer, ["chest pain"])
    there = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert there() is None
