"""Short documents, computed as windows where a backend's grid would go over documents.

A window of SHORT_DOCUMENTS − 1 tokens is the whole of each. The kernels are those of
`kernels.local_attention_tiles`, whose grid goes over tokens, on views of the last rows of a
backend's tensors: what they write is all that they are given. Both functions are for operations
that are opaque to a compiler (`model.attention_backends`), with the tensors' GPU as the current
one, and for a first_token below T, where a document begins. bounds: `document_bounds` of all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import local_attention_tiles

SHORT_DOCUMENTS = 128
"""tokens; the smallest bucket of `max_seqlen` in `train.batch`"""


class ShortDocuments(NamedTuple):
    """Documents that are windows: those from number `first_document` on, whose tokens begin at
    place `first_token`, none of them longer than SHORT_DOCUMENTS. bounds_2T: `document_bounds` of
    all documents; None only where there are no short ones, and first_token is T."""

    bounds_2T: Tensor | None
    first_document: int
    first_token: int


# One window for all short documents, because a kernel is compiled for it. Wider than a document it
# costs nothing: a token's walk over keys ends where its document does.
_WINDOW = SHORT_DOCUMENTS - 1


def room_for_sums(qkv: Tensor, bounds: Tensor | None) -> Tensor:
    """For what `forward_short` keeps, were all documents short."""
    size = 0 if bounds is None else qkv.shape[2] * qkv.shape[0]
    return qkv.new_empty(size, dtype=torch.float32)


def forward_short(
    qkv: Tensor, bounds: Tensor, first_token: int, out: Tensor, short_sums: Tensor
) -> None:
    """Write into (T, H, D) `out` what the tokens from first_token on see, if any document, and
    into `short_sums` what the backward needs of it: log2 of the sums of so many tokens."""
    tokens, _, heads, _ = qkv.shape
    behind = tokens - first_token
    local_attention_tiles.forward(
        qkv[first_token:],
        bounds[:, first_token:] - first_token,
        out[first_token:],
        short_sums[: heads * behind].view(heads, behind),
        _WINDOW,
    )


def backward_short(
    grad: Tensor,
    qkv: Tensor,
    bounds: Tensor,
    first_token: int,
    out: Tensor,
    short_sums: Tensor,
    grad_qkv: Tensor,
) -> None:
    """Write into (T, 3, H, D) `grad_qkv` the gradients of the tokens from first_token on."""
    tokens, _, heads, head_dim = qkv.shape
    behind = tokens - first_token
    # The kernels turn ∂q and ∂k back, which for these rows, as for the others, `rope`'s backward
    # does: tables of one entry, which all positions have, and which turns by nothing.
    cos, sin = (qkv.new_full((1, head_dim // 2), by, dtype=torch.float32) for by in (1, 0))
    local_attention_tiles.backward(
        grad[first_token:],
        qkv[first_token:],
        cos,
        sin,
        bounds.new_zeros(behind),
        bounds[:, first_token:] - first_token,
        out[first_token:],
        short_sums[: heads * behind].view(heads, behind),
        grad_qkv[first_token:],
        _WINDOW,
    )
