"""A larger ModernBERT from the weights of a smaller one, by tiling, as ModernBERT-large began.

Each axis of a matrix of length n becomes one of length m ≥ n whose middle is the old one and which
repeats it to either side: new[i] = old[(i - ⌊(m - n) / 2⌋) mod n]. Layer i of M is made from layer
round(i · N / M) of N. Nothing is scaled.

Source: Warner et al., "Smarter, Better, Faster, Longer" (ModernBERT), arXiv 2412.13663, appendix
A.3: centre tiling with wrap-around, after Phi (Javaheripi et al., "Phi-2", 2023), and the layers
of Gopher (Rae et al., arXiv 2112.11446). Fused matrices are tiled part by part. Heads stay whole:
where the numbers of heads differ by an even number, as from base to large, this is the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ModernBertConfig
from model.modernbert import ModernBertForMaskedLM

_LAYER = "model.layers."
# Sizes that a larger model may have more of.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@torch.no_grad()
def tile(small: ModernBertForMaskedLM, config: ModernBertConfig) -> ModernBertForMaskedLM:
    """The model of geometry `config` whose weights are those of `small`, tiled.

    Raises ValueError, naming the size, unless every size of `config` is at least that of `small`,
    with the same width of a head and the same vocabulary.
    """
    for name in _SIZES:
        ours, theirs = getattr(config, name), getattr(small.config, name)
        if ours < theirs:
            raise ValueError(f"{name} {ours} is smaller than the {theirs} it would be tiled from")
    for name in ("head_dim", "vocab_size"):
        ours, theirs = getattr(config, name), getattr(small.config, name)
        if ours != theirs:
            raise ValueError(f"{name} {ours} is not the {theirs} it would be tiled from")
    large = ModernBertForMaskedLM(config, torch.Generator().manual_seed(0))
    old = small.state_dict()
    new = {
        name: _tiled(_origin(name, small.config, config), value, old, small.config, config)
        for name, value in large.state_dict().items()
    }
    large.load_state_dict(new)
    return large


def source_layer(layer: int, old_layers: int, new_layers: int) -> int:
    """The layer of the smaller model that layer number `layer` of the larger one is made from."""
    return min(round(layer * old_layers / new_layers), old_layers - 1)


def tiled_index(old: int, new: int) -> Tensor:
    """(new,) int64: the place on the old axis that each place of the new one takes its value from.

    The old axis lies in the middle.
    """
    return (torch.arange(new) - (new - old) // 2) % old


def _origin(name: str, old: ModernBertConfig, new: ModernBertConfig) -> str:
    """The name in the smaller model of the weight that `name` is made from."""
    if not name.startswith(_LAYER):
        return name
    number, rest = name.removeprefix(_LAYER).split(".", 1)
    layer = source_layer(int(number), old.num_hidden_layers, new.num_hidden_layers)
    return f"{_LAYER}{layer}.{rest}"


def _tiled(
    name: str,
    value: Tensor,
    weights: Mapping[str, Tensor],
    old: ModernBertConfig,
    new: ModernBertConfig,
) -> Tensor:
    """`weights[name]` tiled to the shape of `value`."""
    if name not in weights:
        # The first layer has no norm before its attention; one made from it keeps its ones.
        return value
    hidden = tiled_index(old.hidden_size, new.hidden_size)
    inner = tiled_index(old.intermediate_size, new.intermediate_size)
    heads = tiled_index(old.num_attention_heads, new.num_attention_heads)
    attention = (heads[:, None] * old.head_dim + torch.arange(old.head_dim)).flatten()
    tensor = weights[name]
    if tensor.dim() == 1:
        return tensor if name == "decoder.bias" else tensor[hidden]
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind == "Wqkv":
        return _fused(tensor, 3, attention)[:, hidden]
    if kind == "Wi":
        return _fused(tensor, 2, inner)[:, hidden]
    if kind == "Wo":
        return tensor[hidden][:, attention if ".attn." in name else inner]
    if kind == "dense":
        return tensor[hidden][:, hidden]
    return tensor[:, hidden]


def _fused(tensor: Tensor, parts: int, index: Tensor) -> Tensor:
    """Rows of `parts` matrices laid one below the other, those of each taken by `index`."""
    return torch.cat([part[index] for part in tensor.chunk(parts)])
