"""Token files are mapped, not read: a shard takes from each the few documents it holds."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.token_files import TokenFile


@pytest.mark.parametrize("names", [[], [b"pubmed-1", b"pubmed-22"]])
def test_ids_are_mapped_from_the_file(tmp_path: Path, names: list[bytes]) -> None:
    np.save(tmp_path / "ids.npy", np.array(names, "S9"))
    ids = TokenFile(tmp_path, np.dtype("<u2")).ids()
    assert isinstance(ids, np.memmap)
    assert ids.tolist() == names
