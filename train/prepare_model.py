"""A model made ready for training as the run's keys say: 8-bit products, recomputation, compiled.

The model stays the same object with the same parameters under the same names; the engine is given
it afterwards.

Layers are compiled each by itself, and the head; layers that are alike share what was compiled. One
graph of the whole model would hand over its gradients when all of backward is over, so that ZeRO
could reduce none of them meanwhile, and would be compiled layer by layer anyhow: nothing fuses
across the borders, where our norms read and write. What is around them runs as it is: the loss and
the embedding with its gradient are operations of ours, which a compiler would leave alone.

All shapes are compiled in as constants but the number of documents (`train.batch` marks it) and
`max_seqlen` (`model.attention.Documents`). So there is one compilation for each kind of layer (the
first; global; local; the last) and for the head, for each T. A break in a graph is an error.
"""

import math
import os

import torch
from torch import Tensor

from common.config import ConfigError
from kernels.determinism import use_deterministic_algorithms
from kernels.geglu import geglu, geglu_reference
from model.modernbert import Mlp, ModernBertForMaskedLM
from model.rotary import runs_in_triton
from train.config import Train

MOST_COMPILATIONS = 64
"""of layers, in a run; four for each length of micro-batch"""
BACKEND = "inductor"

# What cuBLAS works in so that it adds up in one order; it reads the variable at its first product.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# What 8-bit products take: multiples of this along every axis, on a GPU that has them.
_FP8_MULTIPLE = 16
_FP8_CAPABILITY = (8, 9)


def compiles(config: Train, on_gpu: bool) -> bool:
    """Whether layers are compiled; auto: on a GPU, but under ZeRO 3."""
    if config.compile == "auto":
        return on_gpu and config.zero_stage < 3
    return config.compile == "layers"


def check_preparation(config: Train, precision: str, on_gpu: bool) -> None:
    """Raise ConfigError for keys that do not fit together, before anything is built."""
    if config.compile == "layers" and config.zero_stage == 3:
        raise ConfigError(
            "compile is layers, but zero_stage 3 fetches a layer's weights from other ranks as "
            "it runs, which cannot be part of a graph; set compile=none, or zero_stage=2"
        )
    if config.fp8 == "none":
        return
    if not on_gpu:
        raise ConfigError(f"fp8 is {config.fp8}, which needs a GPU; set fp8=none")
    if precision != "bf16":
        raise ConfigError(
            f"fp8 is {config.fp8}, but weights are {precision}; set precision=bf16, or fp8=none"
        )
    if not compiles(config, on_gpu):
        raise ConfigError(
            f"fp8 is {config.fp8}, but layers are not compiled: uncompiled, casts to 8 bits take "
            "longer than the products gain; set compile=layers and zero_stage below 3, or fp8=none"
        )


def check_tokens(fp8: str, phase: str, micro_rows: int, row_tokens: int) -> None:
    """Raise ConfigError for a micro-batch whose tokens 8-bit products cannot be summed over.

    That is what the gradient of a weight does. The last layer multiplies masked tokens, which
    `train.batch` fills up to a multiple that these products take; the head is in bf16.
    """
    in_8_bits = fp8 not in ("none", "rowwise_with_gw_hp")
    if in_8_bits and micro_rows * row_tokens % _FP8_MULTIPLE:
        fitting = _FP8_MULTIPLE // math.gcd(_FP8_MULTIPLE, row_tokens)
        raise ConfigError(
            f"phases.{phase}.batch.micro_rows = {micro_rows} makes micro-batches of "
            f"{micro_rows * row_tokens:,} tokens, which fp8={fp8} needs to be a multiple of "
            f"{_FP8_MULTIPLE}; set it to a multiple of {fitting}, or fp8=rowwise_with_gw_hp"
        )


def set_deterministic(asked: bool) -> None:
    """Have this process compute the same bits each time, as `deterministic` asks, or not care.

    For the whole process, and before its first product on a GPU: torch ends a run whose cuBLAS has
    started without a fixed workspace. One that the environment gives is left as it is.
    """
    if asked:
        os.environ.setdefault(*_WORKSPACE)
    use_deterministic_algorithms(asked)


def prepare_model(model: ModernBertForMaskedLM, config: Train, device: torch.device) -> None:
    """Change `model`, in place, as `compile`, `recompute` and `fp8` say.

    Raises ConfigError where fp8 is asked for and the GPU or the model's sizes cannot have it.
    """
    if config.fp8 != "none":
        _check_fp8(model, device)
        use_fp8(model, config.fp8)
    model.set_recompute(config.recompute)
    if compiles(config, device.type == "cuda"):
        compile_layers(model)


def compile_layers(model: ModernBertForMaskedLM) -> None:
    """Compile every layer and the head in place; they are compiled when they are first called."""
    torch._dynamo.config.recompile_limit = MOST_COMPILATIONS
    for module in (*model.model.layers, model.head):
        module.compile(fullgraph=True, dynamic=False, backend=BACKEND)


def use_fp8(model: ModernBertForMaskedLM, recipe: str, emulate: bool = False) -> None:
    """Let the layers' linear maps multiply in 8 bits, forward and backward, by torchao's recipe.

    Weights stay what they are; they, activations and gradients are scaled and rounded before each
    product. Torchao's map keeps what it multiplies, so the result of GeGLU is kept beside what it
    is made of. emulate: the same rounding with products in fp32, for tests without such a GPU.
    """
    # Only here: it takes seconds to import, and few runs need it.
    import dataclasses

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    class Float8GeGluLinear(Float8Linear):
        def forward(self, product_TI2: Tensor) -> Tensor:
            activate = geglu if runs_in_triton(product_TI2) else geglu_reference
            return super().forward(activate(product_TI2))

    settings = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    for mlp in model.modules():
        if isinstance(mlp, Mlp):
            mlp.Wo = Float8GeGluLinear.from_float(mlp.Wo, settings)
    convert_to_float8_training(
        model.model.layers,
        config=settings,
        module_filter_fn=lambda module, _: not isinstance(module, Float8Linear),
    )


def _check_fp8(model: ModernBertForMaskedLM, device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"fp8 needs a GPU of compute capability 8.9 or later, this one has "
            f"{capability[0]}.{capability[1]}; set fp8=none"
        )
    sizes = {size for p in model.model.layers.parameters() if p.ndim == 2 for size in p.shape}
    odd = sorted(size for size in sizes if size % _FP8_MULTIPLE)
    if odd:
        raise ConfigError(
            f"fp8 needs sizes that {_FP8_MULTIPLE} divides, the model has {odd}; set fp8=none"
        )
