"""Words and runs of words: what counts as the same, against plain Python."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.words import hash_runs, hash_words


def words_of(text: str, *, whole_values: bool) -> list[int]:
    return hash_words([text], whole_values=whole_values).hashes.tolist()


def numbers_of(texts: list[str]) -> list[bool]:
    return hash_words(texts, whole_values=True).numbers.tolist()


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("No acute disease.", "NO  acute\ndisease", True),
        ("P < 0.01", "(p<0.01)", True),
        ("glucose 110", "glucose 111", False),
        ("1.2 cm", "12 cm", False),
        ("1.2 cm", "1 2 cm", False),
        ("1.2 cm", "1-2 cm", False),
        ("120/80", "120 80", False),
        ("<5 ng", ">5 ng", False),
        ("<5 ng", "5 ng", False),
        ("sphere -3.00", "sphere 3.00", False),
        ("2+ oedema", "2 oedema", False),
        ("taken at 5. No pain", "taken at 5 no pain", True),
        ("Ménière", "meniere", False),
    ],
)
def test_values_are_kept_whole(first: str, second: str, equal: bool) -> None:
    found = [words_of(text, whole_values=True) for text in (first, second)]
    assert (found[0] == found[1]) is equal


@pytest.mark.parametrize(
    ("text", "tokenised"),
    [
        ("P<0.01 (n = 5-7).", "P < 0 . 01 ( n = 5 - 7 ) ."),
        ("the beta2–adrenoceptor", "The << beta2 - adrenoceptor >>"),
        ("Crohn’s [[disease]]", "Crohn ' s disease"),
    ],
)
def test_a_text_and_its_tokenised_form_have_the_same_words(text: str, tokenised: str) -> None:
    assert words_of(text, whole_values=False) == words_of(tokenised, whole_values=False)


@given(st.lists(st.text(alphabet="aB1 .\né", max_size=30), max_size=6))
def test_words_are_those_of_a_regular_expression_and_of_their_text(texts: list[str]) -> None:
    expected = [re.findall(r"[a-z0-9é]+", text.lower()) for text in texts]
    found = hash_words(texts, whole_values=False)
    assert np.diff(found.starts).tolist() == [len(words) for words in expected]
    flat = [word for words in expected for word in words]
    assert found.numbers.tolist() == ["1" in word for word in flat]
    # One hash for one word, wherever it stands.
    assert len({*zip(flat, found.hashes.tolist(), strict=True)}) == len(set(flat))
    assert len(set(found.hashes.tolist())) == len(set(flat))


@given(
    texts=st.lists(st.lists(st.sampled_from("abcd"), max_size=9), max_size=5),
    length=st.integers(1, 6),
)
def test_runs_are_those_of_each_text_alone(texts: list[list[str]], length: int) -> None:
    found = hash_words([" ".join(words) for words in texts], whole_values=True)
    hashes, starts = hash_runs(found, length)
    names: dict[int, tuple[str, ...]] = {}
    for number, words in enumerate(texts):
        size = min(length, len(words))
        runs = [tuple(words[k : k + size]) for k in range(len(words) - size + 1)] if words else []
        of_text = hashes[starts[number] : starts[number + 1]].tolist()
        assert len(of_text) == len(runs)
        for run, value in zip(runs, of_text, strict=True):
            assert names.setdefault(value, run) == run
    assert len(set(names.values())) == len(names)


def test_hashes_are_the_same_on_every_machine() -> None:
    found = hash_words(["No acute disease 1.2"], whole_values=True)
    assert [f"{value:016x}" for value in found.hashes.tolist()] == [
        "11d0dd39d936c842",
        "8f1c490534f4c1a1",
        "ea6c8adac7ffb95d",
        "572816f6c74281d0",
    ]


def test_a_batch_gives_what_its_texts_give_alone() -> None:
    texts = ["one 2 three", "", "  ", "four", "five six " * 1000]
    together = hash_words(texts, whole_values=True)
    alone = np.concatenate([hash_words([t], whole_values=True).hashes for t in texts])
    np.testing.assert_array_equal(together.hashes, alone)
    assert numbers_of(["a 1", "b2 c"]) == [False, True, True, False]
