"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real input files, `$SHARED_DATA` or ../shared/data; skips without it."""
    folder = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (folder / "pubmed").is_dir():
        pytest.skip(f"the real input files are not at {folder}; set SHARED_DATA to their folder")
    return folder
