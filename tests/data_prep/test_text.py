"""Normalisation: what may change in a text, stated as properties."""

import html
import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from data_prep.text import normalise, normalise_note

SPACES = " \t\n\r\u00a0\u2009\u202f\u2007\u200a\u3000"
ODD_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from(f"{SPACES}&<>é{chr(0x301)}")
    )
)


def test_white_space_of_every_kind_becomes_one_space() -> None:
    """Layout of the file, no-break and thin spaces leave one plain space behind."""
    assert normalise(" 5\u2009mg\u00a0per\n      day\u202f(oral) ") == "5 mg per day (oral)"


def test_entities_are_unescaped_exactly_once() -> None:
    """`&amp;lt;` was escaped twice by its publisher and once more by XML."""
    assert normalise("p &lt; 0.05 &amp;lt; &#945; R&D") == "p < 0.05 &lt; α R&D"


def test_composition_is_canonical_and_not_compatible() -> None:
    """NFC joins accents; superscripts, the micro sign and ligatures keep their meaning."""
    assert normalise("Me\u0301nie\u0300re 10⁹ µg ﬁ") == "Ménière 10⁹ µg ﬁ"


@given(ODD_TEXT)
def test_only_white_space_entities_and_composition_change(text: str) -> None:
    """Without white space and entities, the text before and after is the same up to NFC."""
    text = text.replace("&", "+")
    before = re.sub(r"\s", "", unicodedata.normalize("NFC", text))
    assert re.sub(r"\s", "", normalise(text)) == before


@given(ODD_TEXT)
def test_what_is_normal_stays(text: str) -> None:
    """A second pass changes nothing, unless the first uncovered another entity."""
    once = normalise(text.replace("&", "+"))
    assert normalise(once) == once
    assert not re.search(r"\s\s|[^\S ]|^\s|\s$", once)


@given(st.one_of(ODD_TEXT, st.text(st.characters(max_codepoint=127))))
def test_the_short_way_gives_what_the_rule_says(text: str) -> None:
    """Most texts are not taken apart and put together again; the result is the same."""
    plain = " ".join(unicodedata.normalize("NFC", html.unescape(text)).split())
    assert normalise(text) == plain


@given(ODD_TEXT)
def test_note_text_changes_in_line_ends_only(text: str) -> None:
    """CRLF becomes LF; going back with the same rule gives the text again."""
    unix = text.replace("\r", "")
    assert normalise_note(unix) == unix
    assert normalise_note(unix.replace("\n", "\r\n")) == unix
    assert normalise_note("A \r\n\r\n  B\rC ") == "A \n\n  B\rC "
