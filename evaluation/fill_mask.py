"""What a trained model puts in the place of [MASK], through transformers alone.

python -m evaluation.fill_mask RUN/model "The patient was given [MASK] for pain."
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer


class FillMaskError(ValueError):
    """A folder or a text that no mask can be filled in; the message says what to do."""


@torch.no_grad()
def fill_mask(folder: Path, texts: list[str], top: int = 5) -> list[list[list[tuple[str, float]]]]:
    """For each text and each [MASK] in it, the `top` likeliest tokens and their probabilities.

    folder: any Hugging Face masked-language model. Texts longer than the model are not cut but
    refused. Raises FillMaskError for those, and for a text without a mask.
    """
    if not (folder / "config.json").is_file():
        raise FillMaskError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForMaskedLM.from_pretrained(str(folder)).eval()
    results = []
    for number, text in enumerate(texts, 1):
        batch = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        length = batch["input_ids"].shape[1]
        if length > model.config.max_position_embeddings:
            raise FillMaskError(
                f"text {number} has {length} tokens; the model takes "
                f"{model.config.max_position_embeddings}"
            )
        masked = batch["input_ids"][0] == tokenizer.mask_token_id
        if not masked.any():
            raise FillMaskError(
                f"text {number} has no {tokenizer.mask_token}: put one where a token is to be "
                "guessed"
            )
        best = model(**batch).logits[0, masked].float().softmax(-1).topk(top)
        results.append(
            [
                [
                    (tokenizer.decode([token]), probability)
                    for token, probability in zip(tokens, probabilities, strict=True)
                ]
                for tokens, probabilities in zip(
                    best.indices.tolist(), best.values.tolist(), strict=True
                )
            ]
        )
    return results


def main(words: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a message for what cannot be filled."""
    # transformers imports torchao where it can, which warns of libraries that nothing here needs.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("texts", nargs="+", metavar="text", help='text with "[MASK]" in it')
    arguments = parser.parse_args(words)
    try:
        results = fill_mask(arguments.model, arguments.texts)
    except FillMaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for text, masks in zip(arguments.texts, results, strict=True):
        print(text)
        for guesses in masks:
            print("  " + "  ".join(f"{token.strip()!r} {share:.3f}" for token, share in guesses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
