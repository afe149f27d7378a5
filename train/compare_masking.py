"""Compare the ways of masking at equal tokens: train a model with each, and score all alike.

    python -m train.compare_masking --config configs/sample.yaml --out runs/masking
    python -m train.compare_masking --config FILE --out DIR --seeds 1,2,3 [key=value …]

Each run is that of the configuration but for `masking.kind` in all phases, `seed` and `run_dir`
(DIR/KIND-SEED), on one GPU or on CPU. Runs of a seed start from the same weights and read the same
rows; each masks the same number of tokens of each row. A run that is done is not done again. The
models are scored on the validation rows of the last phase, in two ways, the same for all:

    plain   `validation.rate` of the tokens masked one by one, as in training's own validation; by
            how frequent a token is in training, and for medical terms (`train.token_weights`)
    words   a tenth of the words that hold a medical term, all their tokens [MASK]; a word counts as
            right when every token of it is

DIR/masking.json has a record a run, DIR/masking.md the table: means over seeds, ± their standard
deviation.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.checkpoint_manifest import read_manifest
from common.config import ConfigError, load_config
from common.counter_random import derive_key, random_bits
from common.files import make_private, whole_file, write_json
from data_prep.shards import DataError, Row
from model.export import load_checkpoint
from model.huggingface import ModelError
from model.modernbert import ModernBertForMaskedLM
from train.batch import pack
from train.checkpoint import checkpoints, folder_of
from train.config import Train
from train.loader import RowCounts
from train.mask_order import KINDS, TokenOrder, token_statistics
from train.masking import MaskedRow
from train.ranks import choose_device, find_ranks
from train.resolve import Run, RunPhase, resolve
from train.schedule import Progress
from train.start import tokenizer_folder
from train.token_weights import BANDS, frequency_bands
from train.validation import predict
from train.word_pieces import WordPieces, token_texts

MAIN = Path(__file__).parent / "main.py"
WORD_SHARE = 0.1

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, 2 for what the user can put right, or what a run ended with."""
    parser = argparse.ArgumentParser(
        prog="python -m train.compare_masking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and figures")
    parser.add_argument("--seeds", type=_numbers, default=[17, 18, 19], help="17,18,19 by default")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args(arguments)
    make_private()
    records = []
    try:
        device = choose_device(find_ranks())
        # All of them before the first is trained, for what does not fit to show at once.
        runs = [
            _run(asked, kind, seed, device.type == "cuda") for seed in asked.seeds for kind in KINDS
        ]
        for words, run in runs:
            command = [sys.executable, str(MAIN), "--config", str(asked.config), *words]
            subprocess.run(command, check=True)
            figures = score_run(run, device)
            records.append(
                {"kind": run.last_phase.config.masking.kind, "seed": run.config.seed, **figures}
            )
            write_json(asked.out / "masking.json", records)
    except (ConfigError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    text = table(records)
    with whole_file(asked.out / "masking.md") as file:
        file.write(text.encode())
    print(text, end="")
    return 0


def score_run(run: Run, device: torch.device) -> Record:
    """The figures of the newest checkpoint of `run`."""
    checkpoint = checkpoints(folder_of(run.config.run_dir))[0]
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    model = load_checkpoint(checkpoint).to(device, dtype).eval()
    manifest = read_manifest(checkpoint, ["step", "tokens"])
    progress = Progress(manifest["step"], tokens=manifest["tokens"])
    return {"step": progress.step, "tokens": progress.all_tokens, **score(run, model, device)}


def score(run: Run, model: ModernBertForMaskedLM, device: torch.device) -> Record:
    """The figures of a model on the validation rows of the last phase; see the top of this file.

    Raises ConfigError where the configuration names no sources of medical terms.
    """
    phase = run.last_phase
    special = phase.masker.vocabulary.special
    texts = token_texts(tokenizer_folder(phase.data))
    counts, terms = token_statistics(phase.config.masking, phase.data, texts, special)
    if not terms.any():
        raise ConfigError("masking.term_sources names no source that makes a token a medical term")
    plain = _predict(phase, model, device, _plain_masks(phase, run.config.validation.rate))
    bands = frequency_bands(counts)
    masks, starts = _word_masks(phase, WordPieces.from_texts(texts, special), terms)
    words = _predict(phase, model, device, masks)
    right = np.minimum.reduceat(words.correct, starts)
    return {
        "loss": float(plain.loss.mean()),
        "accuracy": float(plain.correct.mean()),
        "masked_tokens": len(plain.labels),
        "by_frequency": {
            name: plain.of(bands[plain.labels] == number) for number, name in enumerate(BANDS)
        },
        "terms": plain.of(terms[plain.labels]),
        "words": {
            "loss": float(words.loss.sum() / len(right)),
            "accuracy": float(right.mean()),
            "words": len(right),
        },
    }


@dataclass(frozen=True)
class Predictions:
    """Of every masked token: its id, cross-entropy in nats, whether it was guessed, all (n,)."""

    labels: NDArray[np.int64]
    loss: NDArray[np.float64]
    correct: NDArray[np.bool_]

    def of(self, chosen: NDArray[np.bool_]) -> Record:
        """The figures of some of them."""
        number = int(chosen.sum())
        return {
            "loss": float(self.loss[chosen].sum() / max(number, 1)),
            "accuracy": float(self.correct[chosen].sum() / max(number, 1)),
            "masked_tokens": number,
        }


def table(records: Sequence[Record]) -> str:
    """The figures as a Markdown table: a line a way of masking, means over its seeds."""
    rarest = list(BANDS)[-1]
    columns: dict[str, Callable[[Record], float]] = {
        "loss": lambda r: r["loss"],
        "accuracy": lambda r: r["accuracy"],
        f"loss, {rarest}": lambda r: r["by_frequency"][rarest]["loss"],
        f"accuracy, {rarest}": lambda r: r["by_frequency"][rarest]["accuracy"],
        "loss, terms": lambda r: r["terms"]["loss"],
        "accuracy, terms": lambda r: r["terms"]["accuracy"],
        "whole medical words": lambda r: r["words"]["accuracy"],
    }
    lines = [
        f"| masking | seeds | training tokens | {' | '.join(columns)} |",
        "|" + "---|" * (3 + len(columns)),
    ]
    for kind in dict.fromkeys(record["kind"] for record in records):
        runs = [record for record in records if record["kind"] == kind]
        cells = [kind, str(len(runs)), f"{statistics.mean(r['tokens'] for r in runs):,.0f}"]
        for value in columns.values():
            values = [value(run) for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _run(asked: argparse.Namespace, kind: str, seed: int, on_gpu: bool) -> tuple[list[str], Run]:
    """The `key=value` words of one of the runs, and what they resolve to."""
    phases = load_config(Train, "train", asked.config, asked.overrides).phases
    words = [
        *asked.overrides,
        *(f"phases.{name}.masking.kind={kind}" for name in phases),
        f"seed={seed}",
        f"run_dir={asked.out / f'{kind}-{seed}'}",
    ]
    return words, resolve(load_config(Train, "train", asked.config, words), 1, on_gpu)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _rows(phase: RunPhase) -> Iterator[Row]:
    """The validation rows, in one order."""
    for source in sorted(phase.validation_rows):
        for number in range(phase.validation_rows[source]):
            yield phase.data.read("validation", source, number)


def _plain_masks(phase: RunPhase, rate: float) -> Iterator[MaskedRow]:
    """The masks of training's own validation."""
    masker = replace(phase.masker, order=TokenOrder())
    counts = RowCounts(phase.data, "validation")
    for source in sorted(phase.validation_rows):
        for number in range(phase.validation_rows[source]):
            ids = phase.data.read("validation", source, number).input_ids
            maskable = counts.maskable(source, number)
            yield masker.mask(ids, maskable, rate, "validation", source, number)


def _word_masks(
    phase: RunPhase, pieces: WordPieces, terms: NDArray[np.bool_]
) -> tuple[list[MaskedRow], NDArray[np.int64]]:
    """Masks of whole words that hold a medical term.

    Also where each word begins among the masked tokens of all rows, (words,).
    """
    masks, lengths = [], []
    for row in _rows(phase):
        ids = row.input_ids
        begins = pieces.begins(ids)
        bounds = np.append(np.flatnonzero(begins), len(ids))
        words = np.unique((np.cumsum(begins) - 1)[terms[ids]])
        key = derive_key("masked medical words", row.key)
        uniform = random_bits(key, bounds[words].astype(np.uint64)).astype(np.float64) * 2.0**-64
        words = words[uniform < WORD_SHARE]
        spans = [np.arange(bounds[word], bounds[word + 1]) for word in words]
        positions = np.concatenate([np.zeros(0, np.int64), *spans])
        mask_id = phase.masker.vocabulary.mask_id
        labels = ids[positions].astype(np.int64)
        masks.append(MaskedRow(positions, np.full(len(positions), mask_id), labels))
        lengths += [len(span) for span in spans]
    return masks, np.cumsum([0, *lengths[:-1]])


@torch.no_grad()
def _predict(
    phase: RunPhase, model: ModernBertForMaskedLM, device: torch.device, masks: Iterable[MaskedRow]
) -> Predictions:
    """What `model` makes of every masked token of the validation rows, row after row."""
    # Room for all tokens of a row: how many of them are in medical words is not known before.
    shape = replace(phase.shape, rows=1, highest_rate=1.0)
    parts = []
    for row, mask in zip(_rows(phase), masks, strict=True):
        batch = pack([row], [mask], shape)
        loss_M, correct_M = predict(model, batch.to(device))
        filled = slice(batch.masked_tokens)
        loss, correct = loss_M[filled].double().cpu().numpy(), correct_M[filled].cpu().numpy()
        parts.append((mask.labels, loss, correct))
    return Predictions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
