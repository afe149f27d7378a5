"""A training checkpoint as a Hugging Face folder.

    python -m model.export RUN/checkpoints/step_00000100 RUN/model

Needs no GPU and not the number of ranks that trained: the fp32 weights are put together from
DeepSpeed's files, whatever the ZeRO stage. Of a bf16 run without ZeRO (stage 0) it is the bf16
weights, those the model computed with: DeepSpeed saves the fp32 ones there without their names.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModernBertConfig
from model.huggingface import ModelError, load_weights, save_pretrained
from model.modernbert import ModernBertForMaskedLM

_DEEPSPEED = "deepspeed"
_TAG = "state"
_FORMAT = 1


def export(checkpoint: Path, out: Path) -> None:
    """Write the model of a checkpoint to `out`, whole or not at all.

    checkpoint: a folder with `manifest.json` (which names every file and its sha256), `deepspeed/`
    and `tokenizer/`. Raises ModelError, naming the folder or the file, for anything else.
    """
    manifest = _read_manifest(checkpoint)
    model = ModernBertForMaskedLM(ModernBertConfig(**manifest["model"]))
    load_weights(model, _read_weights(checkpoint / _DEEPSPEED), str(checkpoint))
    save_pretrained(model, tokenizer_folder=checkpoint / "tokenizer", out=out)


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there and whole."""
    path = checkpoint / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, _ = manifest["files"], manifest["model"]
    except OSError:
        raise ModelError(
            f"{checkpoint} is not a checkpoint: it has no readable manifest.json. Give a folder "
            "RUN/checkpoints/step_…; one without a manifest was never completed"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path} is damaged; take another checkpoint of the run") from None
    if manifest.get("format") != _FORMAT:
        raise ModelError(f"{path} has the format {manifest.get('format')}; {_FORMAT} is read here")
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise ModelError(f"{file} is missing; take another checkpoint of the run")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected:
                raise ModelError(
                    f"{file} is damaged: its sha256 is not the manifest's; take another "
                    "checkpoint of the run"
                )
    return manifest


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The parameters that DeepSpeed saved, from any ZeRO stage, by the model's names."""
    state = folder / _TAG
    if list(state.glob("*_optim_states.pt")):
        # Imported here: it is slow, and stage 0 in fp32 does without. It prints to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            tensors = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG)
    else:
        file = state / "mp_rank_00_model_states.pt"
        if not file.is_file():
            raise ModelError(f"{state} holds no weights; take another checkpoint of the run")
        # The run's own file, which DeepSpeed pickled.
        tensors = torch.load(file, map_location="cpu", weights_only=False)["module"]
    return dict(tensors)


def main(words: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a message for what cannot be exported."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_…")
    parser.add_argument("out", type=Path, help="the Hugging Face folder to write")
    arguments = parser.parse_args(words)
    os.umask(0o077)
    try:
        export(arguments.checkpoint, arguments.out)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
