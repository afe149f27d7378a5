"""Quality: what a text must be like to be worth training on, by rules for each source.

The rules find what is no text: too short, hardly a letter, the same lines or runs of words again
and again, a word without end, unreadable characters. Code descriptions have no rules: they are
short and stay, all of them.
"""

from collections.abc import Sequence

import numpy as np

from data_prep.config import QualityRules
from data_prep.words import Words, hash_runs

# In the order in which they are asked; a document that breaks several counts for the first.
RULES = ("short", "few_letters", "repeated_lines", "repeated_words", "long_word", "unreadable")
# Shorter texts are not looked at for repetition: some say little twice with good reason.
_REPETITION_WORDS = 50
_RUN_WORDS = 5

_LETTERS = bytes([*range(65, 91), *range(97, 123), *range(128, 256)])
_SPACES = b" \t\r\n\v\f"
_CONTROL = bytes(set(range(32)) - set(_SPACES)) + b"\x7f"
_REPLACEMENT = "\ufffd"


def broken_rules(texts: Sequence[str], words: Words, rules: QualityRules) -> list[str | None]:
    """For each text the first of RULES that it breaks, or None. `words` are those of `texts`."""
    runs, starts = hash_runs(words, _RUN_WORDS)
    numbers = np.diff(words.starts)
    found = []
    for text, number, begin, end in zip(texts, numbers, starts, starts[1:], strict=False):
        repeated = 0.0
        if number >= _REPETITION_WORDS:
            repeated = 1 - len(np.unique(runs[begin:end])) / (end - begin)
        found.append(_broken_rule(text, int(number), repeated, rules))
    return found


def _broken_rule(text: str, words: int, repeated: float, rules: QualityRules) -> str | None:
    if words < rules.minimum_words:
        return "short"
    content = text.encode("utf-8", "replace")
    visible = len(content.translate(None, _SPACES))
    letters = len(content) - len(content.translate(None, _LETTERS))
    if letters < rules.minimum_letters * visible:
        return "few_letters"
    if words >= _REPETITION_WORDS:
        lines = [line.strip() for line in text.split("\n")]
        once = sum(map(len, set(lines)))
        if once < (1 - rules.maximum_repeated_lines) * sum(map(len, lines)):
            return "repeated_lines"
    if repeated > rules.maximum_repeated_words:
        return "repeated_words"
    if len(text) > rules.longest_word and max(map(len, text.split())) > rules.longest_word:
        return "long_word"
    unreadable = len(content) - len(content.translate(None, _CONTROL)) + text.count(_REPLACEMENT)
    return "unreadable" if unreadable > rules.maximum_unreadable * len(text) else None
