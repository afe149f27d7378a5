"""Where the documents of a packed row lie, token by token, without waiting for the device.

`cu_seqlens` (N + 1,) int32 says that document n is tokens cu_seqlens[n] to cu_seqlens[n + 1];
documents may be empty. For every token one binary search finds its document's first token and the
one behind its last. Tokens behind cu_seqlens[-1] belong to no document: both ends are
cu_seqlens[-1], so that a range of keys cut at them is empty.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_TOKENS_A_PROGRAM = 256
# Elements that a program clears at once, its warps, and the most programs: little of a row lies
# behind all documents, and programs that find nothing to do take their time as well.
_CLEARED = (4096, 4, 264)


def document_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """First token of each token's document and the one behind its last: (2, T) int32.

    cu_seqlens: (N + 1,) int32, first 0; what it has beyond T is as if it ended there. Raises
    TypeError or ValueError for other dtypes and shapes.
    """
    _check(cu_seqlens)
    return _document_bounds(cu_seqlens.contiguous(), tokens)


def document_bounds_reference(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """What `document_bounds` computes, in plain PyTorch."""
    _check(cu_seqlens)
    token_T = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    document_T = torch.bucketize(token_T, cu_seqlens[1:].contiguous(), right=True)
    ends = torch.stack([cu_seqlens, torch.cat([cu_seqlens[1:], cu_seqlens[-1:]])])
    return ends[:, document_T].clamp(max=tokens)


def _check(cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, not {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be (N + 1,), not {tuple(cu_seqlens.shape)}")


def positions_from(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The place of each of T tokens in its document, (T,) int32; 0 behind the last document."""
    return _places(document_bounds(cu_seqlens, tokens))


def positions_from_reference(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """What `positions_from` computes, in plain PyTorch."""
    return _places(document_bounds_reference(cu_seqlens, tokens))


def _places(bounds_2T: Tensor) -> Tensor:
    first_T, end_T = bounds_2T
    token_T = torch.arange(first_T.shape[0], dtype=torch.int32, device=first_T.device)
    return torch.where(first_T < end_T, token_T - first_T, 0)


def clear_behind_documents(rows: Tensor, cu_seqlens: Tensor) -> None:
    """Write zeros over the rows of a contiguous (T, …) tensor that lie behind cu_seqlens[-1].

    For use inside operations that are opaque to a compiler: vendors' attention leaves these rows
    as it found them, in fresh memory perhaps NaN, which a weight's gradient would spread.
    """
    _check(cu_seqlens)
    if rows.numel() == 0:
        return
    if not rows.is_contiguous():
        raise ValueError("clear_behind_documents needs a contiguous tensor")
    width = rows.numel() // rows.shape[0]
    block, warps, most = _CLEARED
    programs = min(triton.cdiv(rows.numel(), block), most)
    with torch.cuda.device_of(rows):
        _clear_kernel[(programs,)](
            rows,
            cu_seqlens,
            cu_seqlens.shape[0] - 1,
            rows.numel(),
            width,
            BLOCK=block,
            num_warps=warps,
        )


@triton.jit
def _bounds_kernel(cu_seqlens, bounds, documents, tokens, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Binary search for the last document that starts at or before the token. Once found it stays,
    # so that the number of steps need not follow the number of documents.
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + documents
    for _ in range(0, 31):
        middle = (low + high + 1) // 2
        starts_before = tl.load(cu_seqlens + middle) <= token
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle - 1)
    behind = tl.minimum(low + 1, documents)
    tl.store(bounds + token, tl.load(cu_seqlens + low), mask=token < tokens)
    end = tl.minimum(tl.load(cu_seqlens + behind), tokens)
    tl.store(bounds + tokens + token, end, mask=token < tokens)


@triton.jit
def _clear_kernel(  # type: ignore[no-untyped-def]
    rows, cu_seqlens, documents, elements, width, BLOCK: tl.constexpr
):
    covered = tl.load(cu_seqlens + documents).to(tl.int64) * width
    zeros = tl.zeros((BLOCK,), rows.dtype.element_ty)
    # Whole blocks from the first that is not covered, for wide stores.
    first = covered // BLOCK + tl.program_id(0)
    for block in range(first, tl.cdiv(elements, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(rows + at, zeros, mask=(at >= covered) & (at < elements))


@triton_op("clinical_modernbert::document_bounds", mutates_args={})
def _document_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    bounds = torch.empty((2, tokens), dtype=torch.int32, device=cu_seqlens.device)
    if tokens > 0:
        with torch.cuda.device_of(cu_seqlens):
            wrap_triton(_bounds_kernel)[(triton.cdiv(tokens, _TOKENS_A_PROGRAM),)](
                cu_seqlens, bounds, cu_seqlens.shape[0] - 1, tokens, BLOCK=_TOKENS_A_PROGRAM
            )
    return bounds


@_document_bounds.register_fake
def _document_bounds_fake(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return torch.empty((2, tokens), dtype=torch.int32, device=cu_seqlens.device)
