"""What a checkpoint of training says of itself: `train` writes it, the export reads it too.

RUN/checkpoints/step_00000100/
    deepspeed/state/…   what DeepSpeed saves of weights and optimizer
    tokenizer/          the data set's
    manifest.json       counters, model, configuration, and the sha256 of every other file
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.files import file_hash

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
DEEPSPEED_FOLDER = "deepspeed"
DEEPSPEED_TAG = "state"
TOKENIZER_FOLDER = "tokenizer"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it."""


def read_manifest(checkpoint: Path, keys: Iterable[str]) -> dict[str, Any]:
    """The manifest of a checkpoint, which has `files` and all of `keys`; the files are not read.

    Raises CheckpointError, naming the manifest, if it is absent, damaged or of another format.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint: its {MANIFEST_NAME} cannot be read "
            f"({error.strerror}); one without it was never completed"
        ) from None
    except ValueError:
        raise CheckpointError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{path} is damaged: it is no manifest of a checkpoint")
    if manifest["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has the format {manifest['format']}, this program reads {FORMAT_VERSION}"
        )
    absent = {"files", *keys} - set(manifest)
    if absent:
        raise CheckpointError(f"{path} is damaged: it lacks {min(absent)!r}")
    return manifest


def verify(checkpoint: Path, keys: Iterable[str]) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there and have their hashes.

    Raises CheckpointError naming the first file that is missing or damaged.
    """
    manifest = read_manifest(checkpoint, keys)
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        try:
            found = file_hash(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
        if found != expected:
            raise CheckpointError(f"{path} is damaged: its sha256 is not the manifest's")
    return manifest
