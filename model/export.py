"""A training checkpoint as a Hugging Face folder.

    python -m model.export RUN/checkpoints/step_00000100 RUN/model

Needs no GPU and not the number of ranks that trained: the fp32 weights are put together from
DeepSpeed's files, whatever the ZeRO stage. Of a bf16 run without ZeRO (stage 0) it is the bf16
weights, those the model computed with: DeepSpeed saves the fp32 ones there without their names.
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint_manifest import (
    DEEPSPEED_FOLDER,
    DEEPSPEED_TAG,
    TOKENIZER_FOLDER,
    CheckpointError,
    verify,
)
from common.files import make_private
from model.config import ModernBertConfig
from model.huggingface import ModelError, load_weights, save_pretrained
from model.modernbert import ModernBertForMaskedLM


def export(checkpoint: Path, out: Path) -> None:
    """Write the model of a checkpoint to `out`, whole or not at all.

    checkpoint: a folder as `common.checkpoint_manifest` describes it. Raises ModelError, naming the
    folder or the file, for anything else.
    """
    model = load_checkpoint(checkpoint)
    save_pretrained(model, tokenizer_folder=checkpoint / TOKENIZER_FOLDER, out=out)


def load_checkpoint(checkpoint: Path) -> ModernBertForMaskedLM:
    """The model of a training checkpoint, on the CPU; raises ModelError like `export`."""
    try:
        manifest = verify(checkpoint, ["model"])
    except CheckpointError as error:
        raise ModelError(
            f"{error}; give another checkpoint of the run, a folder RUN/checkpoints/step_…"
        ) from None
    model = ModernBertForMaskedLM(ModernBertConfig(**manifest["model"]))
    # DeepSpeed, which unpickling its files imports, prints to stdout.
    with contextlib.redirect_stdout(sys.stderr):
        weights = _read_weights(checkpoint / DEEPSPEED_FOLDER)
    load_weights(model, weights, str(checkpoint))
    return model


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The parameters that DeepSpeed saved, from any ZeRO stage, by the model's names."""
    state = folder / DEEPSPEED_TAG
    module_file = state / "mp_rank_00_model_states.pt"
    optimizer_files = sorted(state.glob("*_optim_states.pt"), key=_rank_of)
    if optimizer_files:
        partitions = [_unpickle(file)["optimizer_state_dict"] for file in optimizer_files]
        if "param_slice_mappings" in partitions[0]:
            return _join_partitions(partitions, _unpickle(module_file)["param_shapes"], state)
        return _gather_zero_3(folder)
    if not module_file.is_file():
        raise ModelError(f"{state} holds no weights; take another checkpoint of the run")
    return dict(_unpickle(module_file)["module"])


def _join_partitions(
    partitions: list[dict[str, Any]], shapes: list[dict[str, torch.Size]], state: Path
) -> dict[str, Tensor]:
    """The fp32 weights of ZeRO 1 and 2, whose ranks each hold a part of flat groups.

    DeepSpeed's own `zero_to_fp32` cannot read what bf16 ZeRO-1 with fp32 accumulation saves; where
    a parameter lies in the flat groups, every one of its optimizers saves alike.
    """
    weights = {}
    for number, group in enumerate(shapes):
        for name, shape in group.items():
            parts = []
            for partition in partitions:
                place = partition["param_slice_mappings"][number].get(name)
                if place is not None:
                    flat = partition["single_partition_of_fp32_groups"][number]
                    parts.append(flat.narrow(0, place.start, place.numel))
            if sum(len(part) for part in parts) != shape.numel():
                raise ModelError(
                    f"{state} does not hold all of {name}: the files of some ranks are missing; "
                    "take another checkpoint of the run"
                )
            weights[name] = torch.cat(parts).view(shape)
    return weights


def _gather_zero_3(folder: Path) -> dict[str, Tensor]:
    # Imported here, because it is slow.
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=DEEPSPEED_TAG))


def _rank_of(file: Path) -> int:
    """The rank in a name such as bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt."""
    match = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(match[1]) if match else 0


def _unpickle(file: Path) -> dict[str, Any]:
    """A file of the run's own, which DeepSpeed pickled; its tensors stay on disk until used."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return content


def main(words: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a message for what cannot be exported."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_…")
    parser.add_argument("out", type=Path, help="the Hugging Face folder to write")
    arguments = parser.parse_args(words)
    make_private()
    try:
        export(arguments.checkpoint, arguments.out)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
