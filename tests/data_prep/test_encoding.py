"""Encoding word by word gives what the tokenizer gives for the whole text."""

import gc
import re
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep import encoding
from data_prep.encoding import Encoded, WordEncoder
from data_prep.tokenizer import encode, load_tokenizer
from data_prep.tokenizer_export import is_word_by_word

load_once = cache(load_tokenizer)
ODD = st.lists(
    st.one_of(
        st.sampled_from(" \n\t▁\x10é°_-.[]"),
        st.sampled_from(["patient ", " of", "[MASK]", "   ", " 12.5 ", "[CLS]"]),
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
    monkeypatch.setattr(encoding, "_JOINED_WORDS", 3)
    tokenizer = load_once(trained)
    backend = tokenizer.backend_tokenizer
    assert is_word_by_word(backend)
    backend.encode_special_tokens = True
    expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    for found in (encode(tokenizer, texts), encode(tokenizer, texts)):
        assert [ids.tolist() for ids in found] == expected
        assert all(ids.dtype == np.uint16 for ids in found)


def test_each_different_word_is_asked_for_once() -> None:
    """A word is what stands between spaces, with the spaces before it."""
    asked: list[str] = []

    def encode_joined(texts: list[str]) -> list[Encoded]:
        found = []
        for text in texts:
            words = re.findall(" *[^ ]+", text)
            asked.extend(words)
            found.append(([len(word) for word in words], np.arange(len(words))))
        return found

    encoder = WordEncoder(encode_joined, np.dtype(np.uint32))
    found = encoder.encode(["a a  bb\na", "", " a"])
    assert [ids.tolist() for ids in found] == [[1, 2, 6], [], [2]]
    assert sorted(asked) == ["  bb\na", " a", "a"]
    encoder.encode(["a a", "x" * 65])
    encoder.encode(["x" * 65])
    assert asked[3:] == ["x" * 65] * 2


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
