"""The geometry of a ModernBERT, and its form in a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# What `model.attention` may be asked for: everywhere, and in layers with a window.
Backend = Literal["auto", "fa4", "fa2", "varlen", "reference"]
Local = Literal["auto", "kernel", "backend"]
Recompute = Literal["none", "mlp", "layer"]

FULL, SLIDING = "full_attention", "sliding_attention"

# What the code here computes and a `config.json` may only repeat. A key that is absent has this
# value in transformers as well.
_FIXED = {
    "model_type": "modernbert",
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
}

# Our fields that bear the same name and meaning in a `config.json`.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "norm_eps",
    "local_attention",
    "initializer_range",
    "initializer_cutoff_factor",
    "pad_token_id",
    "cls_token_id",
    "sep_token_id",
)


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """Sizes and constants of a ModernBERT; the defaults are those of ModernBERT-base.

    `intermediate_size` is the width after the gate (`mlp.Wi` has twice as many rows).
    `local_attention` is the whole window: local layers see `local_attention // 2` tokens to either
    side, both ends included, and the token itself (129 keys for 128).
    Layer i attends globally when `i % global_attn_every_n_layers == 0`. There is no dropout.
    Raises ValueError, naming the field, for a geometry that cannot be built.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    pad_token_id: int = 50283
    cls_token_id: int = 50281
    sep_token_id: int = 50282

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "global_attn_every_n_layers",
            "global_rope_theta",
            "local_rope_theta",
            "norm_eps",
            "initializer_range",
            "initializer_cutoff_factor",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of "
                f"num_attention_heads {self.num_attention_heads}: rotary positions pair dimensions"
            )
        if self.local_attention < 0 or self.local_attention % 2:
            raise ValueError(f"local_attention must be even, not {self.local_attention}")
        for name in ("pad_token_id", "cls_token_id", "sep_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not an id of a vocabulary of "
                    f"{self.vocab_size}; take the ids from the tokenizer"
                )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def is_global(self, layer: int) -> bool:
        """Whether layer number `layer` attends to its whole document."""
        return layer % self.global_attn_every_n_layers == 0

    def window(self, layer: int) -> int | None:
        """How many tokens to either side layer number `layer` sees; None is the whole document."""
        return None if self.is_global(layer) else self.local_attention // 2

    def rope_theta(self, layer: int) -> float:
        """Base of the rotary frequencies in layer number `layer`."""
        return self.global_rope_theta if self.is_global(layer) else self.local_rope_theta


BASE = ModernBertConfig()
LARGE = ModernBertConfig(
    hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16
)
GEOMETRIES = {"base": BASE, "large": LARGE}


def to_hugging_face(config: ModernBertConfig) -> dict[str, Any]:
    """The content of a `config.json` that transformers 4.48 and later read.

    Version 5 reads `layer_types` and `rope_parameters`, version 4 the three older keys; both say
    the same thing.
    """
    values = {name: getattr(config, name) for name in _SHARED}
    kinds = [
        FULL if config.is_global(layer) else SLIDING for layer in range(config.num_hidden_layers)
    ]
    return {
        **_FIXED,
        **values,
        "architectures": ["ModernBertForMaskedLM"],
        "bos_token_id": config.cls_token_id,
        "eos_token_id": config.sep_token_id,
        "layer_types": kinds,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": config.global_rope_theta},
            SLIDING: {"rope_type": "default", "rope_theta": config.local_rope_theta},
        },
        "global_attn_every_n_layers": config.global_attn_every_n_layers,
        "global_rope_theta": config.global_rope_theta,
        "local_rope_theta": config.local_rope_theta,
    }


def from_hugging_face(values: Mapping[str, Any]) -> ModernBertConfig:
    """The geometry that a `config.json` of transformers 4.x or 5.x describes.

    Raises ValueError, naming the key, for anything that the model here does not compute.
    """
    if values.get("model_type") != "modernbert":
        raise ValueError(f"model_type is {values.get('model_type')!r}; only 'modernbert' is read")
    for key, expected in _FIXED.items():
        if values.get(key, expected) != expected:
            raise ValueError(f"{key} is {values[key]!r}; only {expected!r} is implemented")
    fields = {name: values[name] for name in _SHARED if values.get(name) is not None}
    if values.get("bos_token_id") is not None:
        fields.setdefault("cls_token_id", values["bos_token_id"])
    if isinstance(values.get("eos_token_id"), int):
        fields.setdefault("sep_token_id", values["eos_token_id"])
    layers = fields.get("num_hidden_layers", BASE.num_hidden_layers)
    return ModernBertConfig(
        **fields,
        global_attn_every_n_layers=_read_period(values, layers),
        global_rope_theta=_read_theta(values, FULL, "global_rope_theta", BASE.global_rope_theta),
        local_rope_theta=_read_theta(values, SLIDING, "local_rope_theta", BASE.local_rope_theta),
    )


def _read_period(values: Mapping[str, Any], layers: int) -> int:
    """Every how many layers attention is global, from `layer_types` where there are any."""
    kinds = values.get("layer_types")
    if kinds is None:
        return int(values.get("global_attn_every_n_layers", BASE.global_attn_every_n_layers))
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {layers} layers")
    period = next((i for i in range(1, layers) if kinds[i] == FULL), layers)
    if kinds != [SLIDING if i % period else FULL for i in range(layers)]:
        raise ValueError(
            f"layer_types is {kinds}; only a {FULL!r} layer first and then at every n-th place, "
            f"{SLIDING!r} elsewhere, is implemented"
        )
    if period == layers:  # one global layer: any period that long; keep the file's if it is given
        period = max(layers, int(values.get("global_attn_every_n_layers", layers)))
    return period


def _read_theta(values: Mapping[str, Any], kind: str, old_key: str, default: float) -> float:
    """The rotary base of one kind of layer, from `rope_parameters` or the key of 4.x."""
    if values.get("rope_scaling") is not None:
        raise ValueError(
            f"rope_scaling is {values['rope_scaling']!r}; scaled rotary positions are not "
            "implemented"
        )
    parameters = (values.get("rope_parameters") or {}).get(kind) or {}
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_parameters[{kind!r}] has rope_type {parameters['rope_type']!r}; "
            "only 'default' is implemented"
        )
    theta = parameters.get("rope_theta", values.get(old_key, default))
    if theta <= 0:
        raise ValueError(f"{old_key} is {theta}; write the base itself, not a sentinel")
    return float(theta)
