"""What `kernels.benchmark` measures: inputs, contestants, and the least that must be done."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw

from kernels.benchmark_attention import make_global, make_local
from kernels.benchmark_layouts import (
    BF16,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    Case,
    Outputs,
    layouts,
    random_tensor,
    sets_of,
    token_ids,
    version_of,
)
from kernels.embedding import embedding, embedding_reference
from kernels.geglu import _geglu_backward, geglu, geglu_reference
from kernels.layer_norm import add_layer_norm, add_layer_norm_reference
from kernels.linear_cross_entropy import (
    IGNORED,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from kernels.rope import rope, rope_in_place, rope_reference, rope_tables
from kernels.stable_adamw import (
    Pieces,
    apply_update,
    apply_update_reference,
    update_moments,
    update_moments_reference,
)
from kernels.unpad import Packing, pad, pad_reference, unpad, unpad_reference

OPERATIONS = (
    "rope",
    "rope_in_place",
    "unpad",
    "embedding",
    "layer_norm",
    "geglu",
    "linear_cross_entropy",
    "stable_adamw",
    "local_attention",
    "global_attention",
)
INTERMEDIATE, VOCABULARY, LAYERS = 1152, 50_368, 22
PADDING = 50_283
MASKED_SHARE = 0.3


def make(name: str, tokens: int) -> Iterator[Case]:
    """The cases of one of OPERATIONS."""
    return {
        "rope": _rope,
        "rope_in_place": _rope_in_place,
        "unpad": _unpad,
        "embedding": _embedding,
        "layer_norm": _layer_norm,
        "geglu": _geglu,
        "linear_cross_entropy": _linear_cross_entropy,
        "stable_adamw": _stable_adamw,
        "local_attention": make_local,
        "global_attention": make_global,
    }[name](tokens)


def _compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _rope_turned_reference(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    return rope_reference(qkv[:, :2], cos, sin, positions)


def _rope_inputs(tokens: int, grad: bool) -> Iterator[tuple[str, list[int], list[list[Tensor]]]]:
    cos, sin = (table.cuda() for table in rope_tables(8192, HEAD_DIM, 10_000.0))
    size = tokens * 3 * HIDDEN * BF16
    packed = [random_tensor(tokens, 3, HEADS, HEAD_DIM, grad=grad) for _ in sets_of(size)]
    for layout, lengths in layouts(tokens).items():
        positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).cuda()
        yield layout, lengths, [[qkv, cos, sin, positions] for qkv in packed]


def _rope(tokens: int) -> Iterator[Case]:
    """A new tensor, of which the values are a copy."""
    moved = 6 * tokens * HIDDEN * BF16
    least = {"forward": moved, "backward": moved, "both": 2 * moved}
    compiled = _compiled(rope_reference)
    who = {"ours": rope, "reference": rope_reference, "torch.compile": compiled}
    for layout, _, inputs in _rope_inputs(tokens, grad=True):
        yield Case("rope", layout, inputs, who, least)


def _rope_in_place(tokens: int) -> Iterator[Case]:
    """Queries and keys alone, read and written once; the compiler's are new, which takes less."""
    compiled = _compiled(_rope_turned_reference)
    for layout, lengths, inputs in _rope_inputs(tokens, grad=False):
        who: dict[str, Callable[..., Outputs]] = {
            "ours": rope_in_place,
            "reference": _rope_turned_reference,
            "torch.compile": compiled,
        }
        if version_of("flash-attn"):
            _, cos, sin, _ = inputs[0]
            who["flash-attn"] = _flash_rotary(lengths, cos, sin)
        moved = {"forward": 4 * tokens * HIDDEN * BF16}
        yield Case("rope_in_place", layout, inputs, who, moved)


def _flash_rotary(lengths: list[int], cos: Tensor, sin: Tensor) -> Callable[..., Outputs]:
    """Its own tables are in the dtype of what it turns."""
    from flash_attn.ops.triton.rotary import apply_rotary

    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).cuda()
    tables = (cos.bfloat16(), sin.bfloat16())

    def rotate(qkv: Tensor, *_: Tensor) -> Outputs:
        both = qkv[:, :2].flatten(1, 2)
        return apply_rotary(both, *tables, cu_seqlens=ends, max_seqlen=max(lengths), inplace=True)

    return rotate


def _unpad(tokens: int) -> Iterator[Case]:
    """Hidden states and ids of a padded batch, the maps between the two forms included.

    Lengths are even between none and `most` of a row, cut at its end: of 65,536 tokens some 51 %
    of the first batch are real and 25 % of the second.
    """
    for rows, columns, most in (
        (max(1, tokens // 1024), 1024, 1.2),
        (max(1, tokens // 2048), 8192, 0.6),
    ):
        generator = torch.Generator().manual_seed(3)
        lengths = (torch.rand(rows, generator=generator) * most * columns).clamp(1, columns)
        mask = (torch.arange(columns) < lengths.int()[:, None]).long().cuda()
        real = int(mask.sum())
        each = HIDDEN * BF16 + 8
        sets = sets_of(rows * columns * each)
        ids = torch.randint(0, VOCABULARY, mask.shape, device="cuda")
        padded = [[mask, ids, random_tensor(rows, columns, HIDDEN)] for _ in sets]
        packing, _ = unpad(mask, [], real)
        back: dict[str, Callable[..., Outputs]] = {
            "ours": partial(_pad_all, pad, packing),
            "reference": partial(_pad_all, pad_reference, packing),
            "torch.compile": _compiled(partial(_pad_all, pad_reference, packing)),
        }
        packed = [[ids.new_zeros(real), random_tensor(real, HIDDEN)] for _ in sets]
        places, row = mask.numel(), HIDDEN * BF16
        # Of the maps the mask is read once, though it takes two passes; one number is written a
        # place of the batch, one a token. Each backward reads one of them.
        moved = {"forward": 2 * real * each + places * (8 + 4) + real * 4}
        moved["backward"] = (real + places) * row + places * 4
        moved_back = {"forward": (real + places) * each + places * 4}
        moved_back["backward"] = 2 * real * row + real * 4
        for least in (moved, moved_back):
            least["both"] = least["forward"] + least["backward"]
        layout = f"{rows}x{columns} {real / places:.0%}"
        yield Case(
            "unpad",
            layout,
            padded,
            _unpad_contestants(real),
            moved,
            waits=frozenset({"flash-attn"}),
        )
        yield Case("pad", layout, packed, back, moved_back)


def _pad_all(function: Callable[..., Outputs], packing: Packing, *values: Tensor) -> Outputs:
    return function(packing, values)


def _unpad_contestants(capacity: int) -> dict[str, Callable[..., Outputs]]:
    def with_maps(function: Callable, mask: Tensor, *values: Tensor) -> Outputs:
        return function(mask, values, capacity)[1]

    who: dict[str, Callable[..., Outputs]] = {
        "ours": partial(with_maps, unpad),
        "reference": partial(with_maps, unpad_reference),
        "torch.compile": _compiled(partial(with_maps, unpad_reference)),
    }
    if version_of("flash-attn"):
        from flash_attn.bert_padding import unpad_input

        who["flash-attn"] = lambda mask, *values: [unpad_input(v, mask)[0] for v in values]
    return who


def _embedding(tokens: int) -> Iterator[Case]:
    """Only the backward is ours. From many rows with a token or two each to one row with all."""
    table = VOCABULARY * HIDDEN * BF16
    weights = [random_tensor(VOCABULARY, HIDDEN) for _ in sets_of(table)]
    who: dict[str, Callable[..., Outputs]] = {
        name: partial(_with_padding, function)
        for name, function in (("ours", embedding), ("reference", embedding_reference))
    }
    who["torch.compile"] = _compiled(who["reference"])
    for layout, ids in token_ids(tokens, VOCABULARY).items():
        read, written = ids.unique().numel() * HIDDEN * BF16, tokens * HIDDEN * BF16
        forward, backward = 8 * tokens + read + written, 8 * tokens + written + table
        moved = {"forward": forward, "backward": backward, "both": forward + backward}
        yield Case("embedding", layout, [[ids.cuda(), weight] for weight in weights], who, moved)


def _with_padding(function: Callable[..., Outputs], ids: Tensor, weight: Tensor) -> Outputs:
    return function(ids, weight, PADDING)


def _layer_norm(tokens: int) -> Iterator[Case]:
    unit = tokens * HIDDEN * BF16
    weight = torch.ones(HIDDEN, device="cuda").bfloat16().requires_grad_()
    inputs = [
        [random_tensor(tokens, HIDDEN), random_tensor(tokens, HIDDEN), weight]
        for _ in sets_of(2 * unit)
    ]
    ours, reference = (
        partial(_with_eps, function) for function in (add_layer_norm, add_layer_norm_reference)
    )
    who: dict[str, Callable[..., Outputs]] = {
        "ours": ours,
        "reference": reference,
        "torch.compile": _compiled(reference),
    }
    if version_of("liger-kernel"):
        who["liger, add by PyTorch"] = _liger_layer_norm(HIDDEN)
    least = {"forward": 4 * unit, "backward": 4 * unit, "both": 8 * unit}
    yield Case("layer_norm", "residual add", inputs, who, least)


def _with_eps(function: Callable[..., Outputs], x: Tensor, y: Tensor, weight: Tensor) -> Outputs:
    return function(x, y, weight, 1e-5)


def _liger_layer_norm(width: int) -> Callable[..., Outputs]:
    from liger_kernel.transformers.functional import liger_layer_norm

    bias = torch.zeros(width, device="cuda").bfloat16()

    def add_and_norm(x: Tensor, y: Tensor, weight: Tensor) -> Outputs:
        total = x + y
        return liger_layer_norm(total, weight, bias, 1e-5), total

    return add_and_norm


def _geglu(tokens: int) -> Iterator[Case]:
    unit = tokens * INTERMEDIATE * BF16
    inputs = [[random_tensor(tokens, 2 * INTERMEDIATE)] for _ in sets_of(2 * unit)]
    who = {"ours": geglu, "reference": geglu_reference, "torch.compile": _compiled(geglu_reference)}
    least = {"forward": 3 * unit, "backward": 5 * unit, "both": 8 * unit}
    yield Case("geglu", "exact erf", inputs, who, least)
    # What the model's backward launches: beside the gradient it writes the result again.
    with_grads = [[x.detach(), random_tensor(tokens, INTERMEDIATE, grad=False)] for (x,) in inputs]
    who = {
        "ours": partial(_geglu_backward, again=True),
        "reference": _geglu_backward_reference,
        "torch.compile": _compiled(_geglu_backward_reference),
    }
    yield Case("geglu", "backward and result", with_grads, who, {"forward": 6 * unit})


def _geglu_backward_reference(x: Tensor, grad: Tensor) -> Outputs:
    a, b = x.chunk(2, dim=-1)
    gelu = functional.gelu(a)
    grad_a = torch.ops.aten.gelu_backward(grad * b, a)
    return torch.cat([grad_a, grad * gelu], dim=-1), gelu * b


def _linear_cross_entropy(tokens: int) -> Iterator[Case]:
    masked = int(MASKED_SHARE * tokens)
    scaled = 0.02 * torch.randn(VOCABULARY, HIDDEN, device="cuda")
    leaves = [
        random_tensor(masked, HIDDEN),
        scaled.bfloat16().requires_grad_(),
        torch.zeros(VOCABULARY, device="cuda").bfloat16().requires_grad_(),
    ]
    labels = torch.randint(0, VOCABULARY, (masked,), device="cuda")
    product = 2 * masked * VOCABULARY * HIDDEN
    least = 2 * sum(leaf.numel() for leaf in leaves) * BF16
    who: dict[str, Callable[..., Outputs]] = {
        "ours": linear_cross_entropy,
        "reference": linear_cross_entropy_reference,
        "torch.compile": _compiled(linear_cross_entropy_reference),
    }
    if version_of("liger-kernel"):
        who["liger"] = _liger_loss
    half = labels.clone()
    half[masked // 2 :] = IGNORED
    yield Case(
        "linear_cross_entropy",
        f"{masked}x{VOCABULARY} half filler",
        [[*leaves, half]],
        {"ours": partial(linear_cross_entropy, counted=masked // 2)},
        {"forward": least // 2, "both": least},
        {"forward": product // 2, "both": 3 * product // 2},
    )
    yield Case(
        "linear_cross_entropy",
        f"{masked}x{VOCABULARY}",
        [[*leaves, labels]],
        who,
        {"forward": least // 2, "both": least},
        {"forward": product, "both": 3 * product},
        waits=frozenset({"liger"}),
    )


def _liger_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Outputs:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, bias, reduction="sum")


def _stable_adamw(tokens: int) -> Iterator[Case]:
    """A step of the whole base model on one GPU, whatever the tokens; AdamW's, which needs neither
    sums nor a second pass, for comparison."""
    sizes = base_parameters()
    ends = [0, *itertools.accumulate(sizes)]
    pieces = tuple(itertools.pairwise(ends))
    state = [torch.randn(4, ends[-1], device="cuda").abs_().unbind() for _ in range(2)]
    shares = torch.full((2,), 0.02, device="cuda")
    rates = torch.full((len(sizes),), 1e-4, device="cuda")
    scale, skip = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    steps = torch.full((len(sizes),), 10.0, device="cuda").unbind()
    who: dict[str, Callable[..., Outputs]] = {
        "ours": partial(_both_passes, update_moments, apply_update, pieces),
        "reference": partial(
            _both_passes, update_moments_reference, apply_update_reference, pieces
        ),
    }
    layout = f"{ends[-1]} parameters"
    inputs = [[*flat, shares, rates, scale, skip] for flat in state]
    # fp32: gradient, moments in, moments out; weights and moments in, weights out.
    yield Case("stable_adamw", layout, inputs, who, {"forward": 9 * 4 * ends[-1]})
    theirs: dict[str, Callable[..., Outputs]] = {
        "torch AdamW, fused": partial(_adamw, True),
        "torch AdamW, foreach": partial(_adamw, False),
    }
    apart = [[*(part for one in flat for part in one.split(sizes)), *steps] for flat in state]
    yield Case("stable_adamw", f"{layout}, AdamW", apart, theirs, {"forward": 7 * 4 * ends[-1]})


def base_parameters() -> list[int]:
    """Elements of the base model's parameters, layer by layer."""
    layer = [HIDDEN, 3 * HIDDEN**2, HIDDEN**2, HIDDEN, 2 * HIDDEN * INTERMEDIATE]
    layer.append(HIDDEN * INTERMEDIATE)
    # The first layer has no norm before its attention.
    layers = (LAYERS * layer)[1:]
    head = [HIDDEN, HIDDEN**2, HIDDEN, VOCABULARY]
    return [VOCABULARY * HIDDEN, HIDDEN, *layers, *head]


def _both_passes(
    moments: Callable[..., Tensor], update: Callable[..., None], pieces: Pieces, *values: Tensor
) -> Outputs:
    gradient, mean, square, weights, shares, rates, scale, skip = values
    sums = moments(gradient, mean, square, shares, scale, skip, 1e-6, pieces)
    update(weights, mean, square, rates, 1e-5, 1e-6, pieces)
    return sums


def _adamw(fused: bool, *values: Tensor) -> Outputs:
    count = len(values) // 5
    gradients, means, squares, weights, steps = (
        list(values[start : start + count]) for start in range(0, len(values), count)
    )
    adamw(
        weights,
        gradients,
        means,
        squares,
        [],
        steps,
        fused=fused,
        foreach=not fused,
        capturable=steps[0].is_cuda,
        amsgrad=False,
        beta1=0.9,
        beta2=0.98,
        lr=1e-4,
        weight_decay=1e-5,
        eps=1e-6,
        maximize=False,
    )
    return ()
