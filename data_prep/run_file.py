"""`run.json`: what the processes and jobs of a run need to know, written when it begins.

They do not look for the inputs themselves: thousands of tasks would each ask the file system for
thousands of files, and a file that has come in the meantime would make it another run.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from common.config import config_to_dict
from common.files import write_json
from data_prep.config import DataPrep
from data_prep.document import InputError
from data_prep.inputs import EvaluationInput, Input

RUN_FILE = "run.json"

_Found = TypeVar("_Found", Input, EvaluationInput)


@dataclass(frozen=True)
class Run:
    """A configuration, the inputs that were found for it, and the keys of its stages by name."""

    config: DataPrep
    inputs: Sequence[Input]
    evaluation_inputs: Sequence[EvaluationInput]
    keys: Mapping[str, str]


def write_run(run: Run) -> str:
    """Write the description of `run` into its `out_dir`; returns a name that no other run has."""
    name = secrets.token_hex(8)
    config = config_to_dict(run.config)
    for folder in ("raw_dir", "out_dir"):
        config[folder] = str(getattr(run.config, folder).absolute())
    content = {
        "name": name,
        "configuration": config,
        "inputs": [_plain(found) for found in run.inputs],
        "evaluation_inputs": [_plain(found) for found in run.evaluation_inputs],
        "keys": dict(run.keys),
    }
    write_json(run.config.out_dir / RUN_FILE, content)
    return name


def read_run(out_dir: Path, name: str) -> Run:
    """The run `name`; InputError when another one has begun in `out_dir` since."""
    content = json.loads((out_dir / RUN_FILE).read_text(encoding="utf-8"))
    if content["name"] != name:
        raise InputError(f"{out_dir / RUN_FILE} is another run's by now; this task is not done")
    return Run(
        DataPrep(**content["configuration"]),
        [_with_path(Input(**found)) for found in content["inputs"]],
        [_with_path(EvaluationInput(**found)) for found in content["evaluation_inputs"]],
        content["keys"],
    )


def _plain(found: Input | EvaluationInput) -> dict[str, Any]:
    return asdict(found) | {"path": str(found.path.absolute())}


def _with_path(found: _Found) -> _Found:
    return replace(found, path=Path(found.path))
