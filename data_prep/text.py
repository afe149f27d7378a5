"""What is changed in a text before it becomes a document, and nothing else is.

Two rules, because a line break means two things. In XML and in code tables it is layout of the
file; in a clinical note it is layout of the text, and stays.
"""

import html
import unicodedata

# ASCII's white space but the plain space.
_BREAKS = b"\t\n\v\f\r\x1c\x1d\x1e\x1f"


def normalise(text: str) -> str:
    """The text of an XML element or a table cell on one line.

    In this order: HTML entities unescaped once (records hold `&amp;lt;`, escaped twice by their
    publisher), Unicode NFC, then every run of white space, line breaks and no-break and thin spaces
    included, to one plain space, none at the ends. NFC and not NFKC: superscripts and `µ` keep
    their meaning.
    """
    text = unicodedata.normalize("NFC", html.unescape(text))
    return text.strip(" ") if _has_single_spaces(text) else " ".join(text.split())


def normalise_note(text: str) -> str:
    """The text of a clinical note: unchanged, but for CRLF line ends, which become LF."""
    return text.replace("\r\n", "\n")


def _has_single_spaces(text: str) -> bool:
    """Whether plain spaces, never two together, are all its white space.

    Nearly all texts pass, and are not taken apart: that takes four times as long.
    """
    if text.isascii():
        content = text.encode()
        return b"  " not in content and len(content.translate(None, _BREAKS)) == len(content)
    # No white space but the plain space counts as printable.
    return "  " not in text and text.isprintable()
