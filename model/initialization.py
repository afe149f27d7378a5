"""ModernBERT's starting weights: truncated normals whose width depends on what a layer feeds.

Every matrix is drawn from a normal distribution of standard deviation `std`, cut at
±initializer_cutoff_factor · std (2 by default, which leaves 0.88 · std), with

- attn.Wqkv, mlp.Wi, embedding, head.dense: std = initializer_range;
- attn.Wo, mlp.Wo, which write into the residual stream: initializer_range / sqrt(2 · layers), so
  that the stream's variance does not grow with depth (Megatron-LM's rule, arXiv 1909.08053).

Norm weights start at one, the decoder's bias at zero, the decoder's matrix is the embedding's.

`head.dense` is where the two existing implementations differ: the code ModernBERT was trained with
counts it among the first kind (0.02), transformers among the second (0.003 for 22 layers). Here it
is the first: it writes into no residual stream, so there is no growth to hold back, and this is
what the published models started from.
"""

import math

import torch
from torch import nn

from model.config import ModernBertConfig

# The last parts of the names of the matrices that write into the residual stream.
_OUTPUTS = ("attn.Wo.weight", "mlp.Wo.weight")


@torch.no_grad()
def initialize(
    model: nn.Module, config: ModernBertConfig, generator: torch.Generator | None
) -> None:
    """Draw every parameter of `model` anew, in the order of their names.

    generator: of the parameters' device; the same seed gives the same weights in every process.
    None draws from torch's global generator.
    """
    narrow = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            std = narrow if name.endswith(_OUTPUTS) else config.initializer_range
            cut = config.initializer_cutoff_factor * std
            nn.init.trunc_normal_(parameter, std=std, a=-cut, b=cut, generator=generator)
