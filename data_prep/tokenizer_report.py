"""Tokens per word by source: `python -m data_prep.tokenizer_report OUT_DIR [TOKENIZER …]`.

OUT_DIR is the `out_dir` of a finished `python -m data_prep`; its own tokenizer is reported first,
then every TOKENIZER given, a folder or a name on the Hugging Face hub, on the same documents:
those held out for validation, the first ones by a random order of their ids. A word is what stands
between white space. Fewer tokens a word mean more text in a row; an unknown token is text lost.
"""

import argparse
import heapq
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from common.counter_random import derive_key
from common.files import make_private
from data_prep.document import Document, InputError, read_documents
from data_prep.split import VALIDATION
from data_prep.tokenizer import describe, encode, load_tokenizer

_BATCH = 256


@dataclass(frozen=True)
class Measured:
    """What a tokenizer makes of the documents of a source."""

    tokenizer: str
    vocab_size: int
    source: str
    documents: int
    words: int
    bytes: int
    tokens: int
    unknown: int

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(self.words, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)


def report(out_dir: Path, others: Sequence[str], documents: int = 2000) -> list[Measured]:
    """Measure the tokenizer of `out_dir` and `others` on `documents` of every source.

    Memory holds the documents of one source. Raises InputError when there are none.
    """
    folder = out_dir / "kept" / VALIDATION
    sources = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not sources:
        raise InputError(f"{folder} holds no documents; make them with python -m data_prep first")
    tokenizers = {"this data set's": load_tokenizer(out_dir / "tokenizer")}
    tokenizers |= {name: load_tokenizer(name) for name in others}
    found = []
    for source in sources:
        texts = _sample(sorted((folder / source).glob("*.parquet")), documents)
        if texts:
            found += [_measure(name, one, source, texts) for name, one in tokenizers.items()]
    if not found:
        raise InputError(f"{folder} holds no documents; prepare with validation_share above 0")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.tokenizer_report", description=__doc__
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("tokenizers", nargs="*")
    parser.add_argument("--documents", type=int, default=2000, help="of every source")
    options = parser.parse_args(arguments)
    make_private()
    try:
        found = report(options.out_dir, options.tokenizers, options.documents)
    except (InputError, OSError) as error:
        print("error: " + "; ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    print(
        f"{'source':12}{'tokenizer':32}{'vocabulary':>11}{'documents':>11}{'words':>12}"
        f"{'tokens/word':>13}{'bytes/token':>13}{'unknown':>9}"
    )
    for row in found:
        print(
            f"{row.source:12}{row.tokenizer[-30:]:32}{row.vocab_size:>11,}{row.documents:>11,}"
            f"{row.words:>12,}{row.tokens_per_word:>13.3f}{row.bytes_per_token:>13.3f}"
            f"{row.unknown:>9,}"
        )
    return 0


def _sample(paths: Sequence[Path], number: int) -> list[str]:
    """The texts of the `number` documents with the smallest random keys, in their order."""

    def keyed() -> Iterator[tuple[int, str, Document]]:
        for path in paths:
            for document in read_documents(path):
                yield derive_key("tokenizer report", document.id), document.id, document

    chosen = heapq.nsmallest(number, keyed(), key=lambda entry: entry[:2])
    return [document.text for _, _, document in chosen]


def _measure(
    name: str, tokenizer: PreTrainedTokenizerFast, source: str, texts: Sequence[str]
) -> Measured:
    tokens = unknown = 0
    for begin in range(0, len(texts), _BATCH):
        for ids in encode(tokenizer, texts[begin : begin + _BATCH]):
            tokens += len(ids)
            unknown += int((ids == tokenizer.unk_token_id).sum())
    return Measured(
        tokenizer=name,
        vocab_size=describe(tokenizer)["vocab_size"],
        source=source,
        documents=len(texts),
        words=sum(len(text.split()) for text in texts),
        bytes=sum(len(text.encode()) for text in texts),
        tokens=tokens,
        unknown=unknown,
    )


if __name__ == "__main__":
    sys.exit(main())
