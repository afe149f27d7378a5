"""From a SentencePiece BPE model to a fast tokenizer that gives the same ids.

How text survives unchanged. SentencePiece writes a space as `▁` (U+2581), so a `▁` that is really
in the text would come back as a space. Both tokenizers therefore apply one reversible mapping
before anything else, with U+0010 (data link escape, which no text needs) as the escape character:

    U+0010 -> U+0010 "."        `▁` -> U+0010 "_"        then, as ever: space -> `▁`

In SentencePiece it is a normalisation rule inside the model (its denormalisation rule undoes it);
in the fast tokenizer three `Replace` normalisers and decoders. Every other character is itself: no
prefix is added, nothing is squeezed or trimmed, and a character that is not in the vocabulary
becomes its UTF-8 bytes (`<0x00>` … `<0xFF>`), NUL and tab among them. Lone surrogates are not
Unicode text and are refused by both.

Why the ids are the same. SentencePiece repeatedly joins the adjacent pair that forms the piece with
the best score, leftmost first. The last join that forms a piece is the same wherever the piece
occurs: joins inside its span compare only with each other, so they follow the order they have when
the piece is encoded alone. One merge rule a piece, in the order of the scores, is therefore all
that can ever be applied; a second rule (`aa`+`a` beside `a`+`aa`) would only give ties another
order. And no piece holds a `▁` after another character, so that cutting the text before each run
of `▁` (which makes a cache of words possible, hence speed) prevents no merge.

Nor does a piece hold a digit beside anything (`split_digits`), or a letter of ASCII beside another
character of ASCII but the spaces before it (SentencePiece makes no piece of two scripts, and
punctuation is of none of the letters' scripts). So cutting a word there prevents no merge either.
"""

import re
from itertools import pairwise
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

SPACE = "\u2581"
_ESCAPE = "\u0010"
# In this order; the escape character itself first, so that no escape is escaped again.
ESCAPES = ((_ESCAPE, f"{_ESCAPE}."), (SPACE, f"{_ESCAPE}_"))
# A byte's piece is what an unknown character becomes: nothing is merged into one.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# A digit with a neighbour, or a letter of ASCII next to another character of ASCII.
_MARKS = r"[\x00-@\[-`{-\x7f]"
_JOINED_PARTS = re.compile(rf"(?s).[0-9]|[0-9].|[A-Za-z]{_MARKS}|{_MARKS}[A-Za-z]")
# Their ids are their positions.
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def fast_tokenizer(model: bytes) -> Tokenizer:
    """The `tokenizers` twin of a SentencePiece BPE `model` that `train_tokenizer` made.

    It matches the special tokens in text, adds `[CLS] … [SEP]`, and its [MASK] takes the space
    before it along, because words carry theirs.
    """
    processor = SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    learned = [
        piece
        for i, piece in enumerate(pieces)
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    tokenizer = Tokenizer(
        BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merge_rules(learned),
            unk_token=SPECIAL_TOKENS["unk"],
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *(decoders.Replace(mark, plain) for plain, mark in reversed(ESCAPES)),
        ]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, lstrip=name == "mask")
            for name, token in SPECIAL_TOKENS.items()
        ]
    )
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return tokenizer


def is_word_by_word(tokenizer: Tokenizer) -> bool:
    """Whether `tokenizer` is one of `fast_tokenizer`'s, so that a text's ids are its words' ids.

    That is so as long as special tokens are not matched in the text.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        _state(tokenizer.normalizer) == _state(_normalizer())
        and _state(tokenizer.pre_tokenizer) == _state(_pre_tokenizer())
        and isinstance(tokenizer.model, BPE)
        and tokenizer.model.dropout is None
        and all(token.special for token in added)
    )


def has_separate_parts(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary of one of `fast_tokenizer`'s is as this module's text says.

    Then the ids of a word are those of its parts (`data_prep.encoding`) put together.
    """
    names = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    pieces = tokenizer.get_vocab(with_added_tokens=False).keys() - names
    return not any(_JOINED_PARTS.search(piece) and not _BYTE.fullmatch(piece) for piece in pieces)


def _normalizer() -> normalizers.Normalizer:
    pairs = (*ESCAPES, (" ", SPACE))
    return normalizers.Sequence([normalizers.Replace(*pair) for pair in pairs])


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*"), "isolated")


def _state(part: Any) -> bytes | None:
    return None if part is None else part.__getstate__()


def merge_rules(pieces: list[str]) -> list[tuple[str, str]]:
    """One merge rule for each piece of two characters or more, best first.

    pieces: the learned pieces in the order of their scores. The rule is the last join made when
    SentencePiece's algorithm encodes the piece alone. A piece that the algorithm never reaches
    (better joins pull it apart) gets none.
    """
    rank = {piece: i for i, piece in enumerate(pieces)}
    worst = len(pieces)
    rules = []
    for piece in pieces:
        if SPACE in piece.lstrip(SPACE):
            raise ValueError(f"piece {rank[piece]} holds a space after another character")
        symbols = list(piece)
        rule: tuple[str, str] | None = None
        while len(symbols) > 1:
            ranks = [rank.get(a + b, worst) for a, b in pairwise(symbols)]
            best = min(ranks)
            if best == worst:
                rule = None
                break
            i = ranks.index(best)
            rule = (symbols[i], symbols[i + 1])
            symbols[i : i + 2] = ["".join(rule)]
        if rule:
            rules.append(rule)
    return rules
