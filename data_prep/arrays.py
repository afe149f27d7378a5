"""Arrays in files: written whole or not at all, in one go or bit by bit, and mapped when read."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from common.files import whole_file


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write `array` as a .npy file."""
    with whole_file(path) as file:
        np.save(file, array)


def map_array(path: Path) -> NDArray[Any]:
    """The array of a .npy file, its pages read when they are used."""
    return np.load(path, mmap_mode="r")


class RawWriter:
    """Rows of several arrays, appended bit by bit to one raw file each."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = files

    def append(self, *arrays: NDArray[Any]) -> None:
        """One array for each file, in their order."""
        for file, array in zip(self._files, arrays, strict=True):
            file.write(np.ascontiguousarray(array).tobytes())


@contextmanager
def raw_files(*paths: Path) -> Iterator[RawWriter]:
    """A writer of raw files that appear, complete and on disk, when the block ends."""
    with ExitStack() as stack:
        yield RawWriter([stack.enter_context(whole_file(path)) for path in paths])


def map_raw(path: Path, dtype: DTypeLike, columns: int = 0) -> NDArray[Any]:
    """A raw file's rows: (n,) of `dtype`, or (n, columns)."""
    shape = (-1, columns) if columns else (-1,)
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.zeros(max(columns, 1) * 0, dtype).reshape((0, columns) if columns else (0,))
    return np.memmap(path, dtype, mode="r").reshape(shape)
