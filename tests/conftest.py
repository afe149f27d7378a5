"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. A kernel is bound to it or not when
# its module is imported, so this comes before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real input files, `$SHARED_DATA` or ../shared/data; skips without it."""
    folder = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (folder / "pubmed").is_dir():
        pytest.skip(f"the real input files are not at {folder}; set SHARED_DATA to their folder")
    return folder
