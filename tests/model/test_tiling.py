"""A larger model tiled from a smaller one: shapes, and where every value comes from."""

import itertools
from dataclasses import replace

import pytest
import torch

from model.config import BASE, LARGE, ModernBertConfig
from model.modernbert import ModernBertForMaskedLM
from model.tiling import source_layer, tile, tiled_index

SMALL = ModernBertConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=4,
    num_attention_heads=2,
    pad_token_id=2,
    cls_token_id=0,
    sep_token_id=1,
)
# As base to large: one and a third times as wide, with two heads more, and more layers.
LARGER = replace(
    SMALL, hidden_size=32, intermediate_size=27, num_hidden_layers=6, num_attention_heads=4
)


def numbered(config: ModernBertConfig) -> ModernBertForMaskedLM:
    """A model every weight of which is another number."""
    model = ModernBertForMaskedLM(config)
    first = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(first, first + parameter.numel()).view(parameter.shape))
            first += parameter.numel()
    return model


def wrapped(old: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """Centre tiling of one axis by hand: the middle, then what is missing on each side."""
    left = (size - old.shape[axis]) // 2
    right = size - old.shape[axis] - left
    pieces = [old.narrow(axis, old.shape[axis] - left, left), old, old.narrow(axis, 0, right)]
    return torch.cat(pieces, axis)


@pytest.mark.parametrize(("old", "new"), [(3, 3), (3, 4), (4, 6), (768, 1024), (2, 7)])
def test_the_old_axis_lies_in_the_middle_and_wraps_around(old: int, new: int) -> None:
    index = tiled_index(old, new).tolist()
    offset = (new - old) // 2
    assert index[offset : offset + old] == list(range(old))
    for left, right in itertools.pairwise(index):
        assert right == (left + 1) % old


def test_layers_are_those_of_gophers_rule() -> None:
    layers = [source_layer(i, BASE.num_hidden_layers, LARGE.num_hidden_layers) for i in range(28)]
    assert layers == [round(i * 22 / 28) for i in range(28)]
    assert set(layers) == set(range(22)), "every layer is used"
    assert [source_layer(i, 1, 3) for i in range(3)] == [0, 0, 0], "never past the last"


def test_every_weight_is_its_origins() -> None:
    small = numbered(SMALL)
    old, new = small.state_dict(), tile(small, LARGER).state_dict()
    assert {name: value.shape for name, value in new.items()} == {
        name: value.shape for name, value in ModernBertForMaskedLM(LARGER).state_dict().items()
    }
    embedding = wrapped(old["decoder.weight"], 32, 1)
    assert torch.equal(new["decoder.weight"], embedding)
    assert torch.equal(new["model.embeddings.tok_embeddings.weight"], embedding)
    assert torch.equal(new["decoder.bias"], old["decoder.bias"])
    dense = wrapped(wrapped(old["head.dense.weight"], 32, 1), 32, 0)
    assert torch.equal(new["head.dense.weight"], dense)
    for layer in range(6):
        ours, theirs = f"model.layers.{layer}", f"model.layers.{round(layer * 4 / 6)}"
        parts = old[f"{theirs}.attn.Wqkv.weight"].chunk(3)
        expected = torch.cat([wrapped(wrapped(part, 32, 1), 32, 0) for part in parts])
        assert torch.equal(new[f"{ours}.attn.Wqkv.weight"], expected)
        expected = wrapped(wrapped(old[f"{theirs}.attn.Wo.weight"], 32, 1), 32, 0)
        assert torch.equal(new[f"{ours}.attn.Wo.weight"], expected)
        assert torch.equal(
            new[f"{ours}.mlp_norm.weight"], wrapped(old[f"{theirs}.mlp_norm.weight"], 32, 0)
        )
        # 12 wraps more than once into 27: by the formula.
        index = (torch.arange(27) - 7) % 12
        parts = old[f"{theirs}.mlp.Wi.weight"].chunk(2)
        expected = torch.cat([wrapped(part[index], 32, 1) for part in parts])
        assert torch.equal(new[f"{ours}.mlp.Wi.weight"], expected)
        expected = wrapped(old[f"{theirs}.mlp.Wo.weight"][:, index], 32, 0)
        assert torch.equal(new[f"{ours}.mlp.Wo.weight"], expected)


def test_large_from_base_has_larges_shapes() -> None:
    """Without values, which 500 million parameters would take gigabytes for."""
    with torch.device("meta"):
        tiled = tile(ModernBertForMaskedLM(BASE), LARGE)
        expected = ModernBertForMaskedLM(LARGE).state_dict()
    found = tiled.state_dict()
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert sum(p.numel() for p in tiled.parameters()) == 395_881_664
    assert tiled.config == LARGE


def test_a_layer_made_from_the_first_has_a_norm_of_ones() -> None:
    """The first layer has none before its attention."""
    new = tile(numbered(SMALL), replace(SMALL, num_hidden_layers=12)).state_dict()
    assert source_layer(1, 4, 12) == 0
    assert bool((new["model.layers.1.attn_norm.weight"] == 1).all())


def test_the_same_geometry_is_a_copy() -> None:
    small = numbered(SMALL)
    old, new = small.state_dict(), tile(small, SMALL).state_dict()
    assert all(torch.equal(new[name], value) for name, value in old.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 8}, "intermediate_size 8 is smaller than the 12"),
        ({"hidden_size": 32}, "head_dim 16 is not the 8"),
        ({"vocab_size": 64}, "vocab_size 64 is not the 32"),
    ],
)
def test_what_cannot_be_tiled_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tile(ModernBertForMaskedLM(SMALL), replace(SMALL, **changes))
