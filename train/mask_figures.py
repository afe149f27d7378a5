"""What the ways of masking do to a run's rows, and what they cost, without training.

    python -m train.mask_figures --config configs/sample.yaml [key=value …]

Masks some training rows of every source with each `masking.kind`, and prints as a Markdown table
which share is masked of the tokens of each band of frequency and of medical terms
(`train.token_weights`), how many words of several tokens are masked whole, and the CPU time.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config import ConfigError, load_config
from data_prep.shards import DataError, Row
from train.config import Train
from train.loader import RowCounts
from train.mask_order import KINDS, make_order, token_statistics
from train.masking import Masker
from train.phase_config import MaskingKind
from train.resolve import RunPhase, resolve
from train.start import tokenizer_folder
from train.token_weights import BANDS, frequency_bands
from train.word_pieces import WordPieces, token_texts

ROWS = 32
"""rows of each source"""
REPEATS = 5
"""the CPU time is the least of so many"""


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of the masks of one kind: shares of tokens and words, and CPU seconds a token."""

    kind: str
    bands: list[float]
    """share that is masked of the tokens of each band"""
    terms: float
    """share of medical terms that is masked"""
    whole: float
    """share of words of several tokens that is masked whole"""
    cut: float
    """share of these that is masked in part"""
    seconds: float


def figures(phase: RunPhase) -> list[Figures]:
    """The figures of every kind on the first rows of each source of `phase`."""
    counts = RowCounts(phase.data, "train")
    rows, maskable = [], []
    for source, number in phase.data.sources("train").items():
        for row in range(min(ROWS, number)):
            rows.append(phase.data.read("train", source, row))
            maskable.append(counts.maskable(source, row))
    return [_figures(phase, kind, rows, maskable) for kind in KINDS]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(
        prog="python -m train.mask_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(Train, "train", asked.config, asked.overrides)
        found = figures(resolve(config, 1, on_gpu=False).last_phase)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = [*BANDS, "medical terms", "words masked whole", "in part", "µs of CPU / 1,000 tokens"]
    print(f"| masking | {' | '.join(names)} |")
    print("|" + "---|" * (1 + len(names)))
    for one in found:
        shares = [f"{share:.1%}" for share in (*one.bands, one.terms, one.whole, one.cut)]
        print(f"| {' | '.join([one.kind, *shares, f'{one.seconds * 1e9:.0f}'])} |")
    return 0


def _figures(
    phase: RunPhase, kind: MaskingKind, rows: Sequence[Row], maskable: Sequence[int]
) -> Figures:
    special, data = phase.masker.vocabulary.special, phase.data
    masking = dataclasses.replace(phase.config.masking, kind=kind)
    order = make_order(masking, data, tokenizer_folder(data), special)
    masker = dataclasses.replace(phase.masker, order=order)
    texts = token_texts(tokenizer_folder(data))
    pieces = WordPieces.from_texts(texts, special)
    total, masked = np.zeros((2, len(special)), np.int64)
    several = whole = cut = 0
    for number, (row, count) in enumerate(zip(rows, maskable, strict=True)):
        positions = masker.mask(row.input_ids, count, masking.rate, "train", number).positions
        total += np.bincount(row.input_ids, minlength=len(special))
        masked += np.bincount(row.input_ids[positions], minlength=len(special))
        first = np.flatnonzero(pieces.begins(row.input_ids))
        lengths = np.diff(first, append=len(row.input_ids))
        hidden = np.bincount(positions, minlength=len(row.input_ids))
        inside = np.add.reduceat(hidden, first)[lengths > 1]
        several += len(inside)
        whole += int((inside == lengths[lengths > 1]).sum())
        cut += int(((inside > 0) & (inside < lengths[lengths > 1])).sum())
    counts, terms = token_statistics(masking, data, texts, special)
    bands = frequency_bands(counts)
    seconds = min(_seconds(masker, rows, maskable, masking.rate) for _ in range(REPEATS))

    def share(chosen: NDArray[np.bool_]) -> float:
        return float(masked[chosen].sum() / max(total[chosen].sum(), 1))

    return Figures(
        kind=kind,
        bands=[share((bands == number) & ~special) for number in range(len(BANDS))],
        terms=share(terms),
        whole=whole / max(several, 1),
        cut=cut / max(several, 1),
        seconds=seconds / sum(len(row.input_ids) for row in rows),
    )


def _seconds(masker: Masker, rows: Sequence[Row], maskable: Sequence[int], rate: float) -> float:
    """CPU seconds that masking all rows takes."""
    begin = time.process_time()
    for number, (row, count) in enumerate(zip(rows, maskable, strict=True)):
        masker.mask(row.input_ids, count, rate, "train", number)
    return time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main())
