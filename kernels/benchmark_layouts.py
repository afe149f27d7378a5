"""Sizes, layouts and inputs that the benchmark's cases share, and who is there to compare with."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

HEADS, HEAD_DIM, HIDDEN = 12, 64, 768
BF16 = 2
# All input sets of a case together: several times the L2 cache of any GPU of today.
_ROTATED_BYTES = 2**29

Outputs = Tensor | tuple[Tensor, ...] | list[Tensor]


@dataclass
class Case:
    """One operation on one layout.

    inputs: the input sets; what needs a gradient says so itself. who: each contestant, called with
    an input set. bytes, flops: the least, by direction. waits: contestants that wait for the GPU.
    """

    op: str
    layout: str
    inputs: list[list[Tensor]]
    who: dict[str, Callable[..., Outputs]]
    bytes: dict[str, int]
    flops: dict[str, int] = field(default_factory=dict)
    waits: frozenset[str] = frozenset()


def layouts(tokens: int) -> dict[str, list[int]]:
    """Lengths of documents that fill this many tokens, by the name of the layout."""
    longest = tokens // 8
    return {
        "full1024": _equal(tokens, 1024),
        "full8192": _equal(tokens, 8192),
        "abstracts": _lognormal(tokens, 250, 0.7, 1024),
        "notes": _lognormal(tokens, 2200, 0.7, 8192),
        "skewed": [longest] * (2 if longest else 0) + _equal(tokens - 2 * longest, 16),
        "code titles": _lognormal(tokens, 25, 0.4, 64),
    }


def _equal(tokens: int, length: int) -> list[int]:
    """As many of `length` as go into `tokens`, and a document of what is left."""
    return [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)


def bucketed(lengths: list[int]) -> tuple[list[int], int]:
    """Lengths and their bound as training gives them: filled up with empty documents to a multiple
    of 64, and the bound in steps of four. A grid over documents and the longest pays for both."""
    longest = 128
    while longest < max(lengths):
        longest *= 4
    return lengths + [0] * (-len(lengths) % 64), longest


def _lognormal(tokens: int, median: int, spread: float, longest: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    lengths: list[int] = []
    left = tokens
    while left > 0:
        drawn = math.exp(torch.randn((), generator=generator).item() * spread) * median
        lengths.append(max(3, min(round(drawn), longest, left)))
        left -= lengths[-1]
    lengths[-1] += left  # a last one shorter than three
    return lengths


def token_ids(tokens: int, vocabulary: int) -> dict[str, Tensor]:
    """Ids of tokens by the name of their distribution; int64, on the CPU.

    Of `Zipf`, the frequency of the n-th most frequent is proportional to 1 / (n + 1), and which id
    that is, is random: of 65,536 tokens and 50,368 ids the first has 5 %.
    """
    generator = torch.Generator().manual_seed(3)
    frequencies = 1 / torch.arange(2, vocabulary + 2).double()
    places = torch.multinomial(frequencies, tokens, replacement=True, generator=generator)
    return {
        "uniform": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "Zipf": torch.randperm(vocabulary, generator=generator)[places],
        "one token": torch.full((tokens,), vocabulary // 2),
    }


def random_tensor(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16().requires_grad_(grad)


def sets_of(size: int) -> range:
    """As many input sets as exceed the cache, each of `size` bytes."""
    return range(max(2, -(-_ROTATED_BYTES // size)))


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
