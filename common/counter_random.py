"""Randomness from counters: a value depends on what it is for, never on what was drawn before.

The mixing function is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014). It is written out here, in NumPy, because a run must be resumable
under another NumPy version, and NumPy promises no stable streams for its generators' higher
functions (NEP 19).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: int | str) -> int:
    """A 64-bit key for the purpose that `parts` name, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 random bits for each counter, (n,) uint64; for a fixed key a bijection of the counters."""
    with np.errstate(over="ignore"):
        state = np.uint64(key) + (counters + np.uint64(1)) * _GAMMA
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def permutation(key: int, size: int) -> NDArray[np.int64]:
    """A random order of 0 … size-1, (size,) int64: a pure function of (key, size)."""
    return np.argsort(random_bits(key, np.arange(size, dtype=np.uint64)), kind="stable")
