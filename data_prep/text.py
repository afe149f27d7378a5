"""What is changed in a text before it becomes a document, and nothing else is.

Two rules, because a line break means two things. In XML and in code tables it is layout of the
file; in a clinical note it is layout of the text, and stays.
"""

import html
import unicodedata


def normalise(text: str) -> str:
    """The text of an XML element or a table cell on one line.

    In this order: HTML entities unescaped once (records hold `&amp;lt;`, escaped twice by their
    publisher), Unicode NFC, then every run of white space, line breaks and no-break and thin spaces
    included, to one plain space, none at the ends. NFC and not NFKC: superscripts and `µ` keep
    their meaning.
    """
    return " ".join(unicodedata.normalize("NFC", html.unescape(text)).split())


def normalise_note(text: str) -> str:
    """The text of a clinical note: unchanged, but for CRLF line ends, which become LF."""
    return text.replace("\r\n", "\n")
