"""The packed model: equal to transformers', document by document, and blind to its neighbours."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ModernBertConfig as TheirConfig
from transformers import ModernBertForMaskedLM as TheirModel

from model.attention import BACKENDS, Choice, LongDocuments, Queries, reference_attention
from model.config import BASE, LARGE, ModernBertConfig, to_hugging_face
from model.modernbert import ModernBertForMaskedLM

# Longer than two windows, than one, than none; a single token.
LENGTHS = [400, 130, 40, 1]


def make_theirs(config: ModernBertConfig, implementation: str) -> TheirModel:
    theirs = TheirConfig(**to_hugging_face(config))
    theirs._attn_implementation = implementation
    return TheirModel(theirs).eval()


def pad_row(input_ids_T: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(list(input_ids_T.split(lengths)), batch_first=True)
    place = torch.arange(padded.shape[1], device=padded.device)
    return padded, (place < torch.tensor(lengths, device=padded.device)[:, None]).long()


@pytest.mark.parametrize("geometry", [BASE, LARGE], ids=["base", "large"])
@torch.no_grad()
def test_logits_equal_those_of_transformers(
    geometry: ModernBertConfig, lively_model: Callable, packed_row: Callable
) -> None:
    # Four layers: each kind of layer occurs twice.
    small_ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    config = replace(geometry, vocab_size=512, num_hidden_layers=4, **small_ids)
    ours, theirs = lively_model(config), make_theirs(config, "sdpa")
    row = packed_row(LENGTHS, config.vocab_size)
    input_ids_BS, mask_BS = pad_row(row.input_ids_T, LENGTHS)
    real = mask_BS.bool()
    for source, target, implementation in ((ours, theirs, "sdpa"), (theirs, ours, "eager")):
        for parameter in source.parameters():
            parameter *= 1.05
        loaded = target.load_state_dict(source.state_dict())
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
        theirs.set_attn_implementation(implementation)
        expected = theirs(input_ids=input_ids_BS, attention_mask=mask_BS).logits[real]
        packed = ours.logits(ours.encode(*row.arguments()))
        padded = ours.forward_padded(input_ids_BS, mask_BS)[real]
        print(
            f"{implementation}: logits up to {expected.abs().max():.1f}, difference packed "
            f"{(packed - expected).abs().max():.1e}, padded {(padded - expected).abs().max():.1e}"
        )
        assert expected.std() > 0.5
        assert (packed - expected).abs().max() < 1e-4
        assert (padded - expected).abs().max() < 1e-4


@torch.no_grad()
def test_far_positions_equal_those_of_transformers(
    small: ModernBertConfig, lively_model: Callable, packed_row: Callable
) -> None:
    config = replace(small, max_position_embeddings=8192, num_hidden_layers=2)
    ours, theirs = lively_model(config), make_theirs(config, "sdpa")
    theirs.load_state_dict(ours.state_dict())
    row = packed_row([1024])
    row.position_ids_T += 7168
    expected = theirs(row.input_ids_T[None], position_ids=row.position_ids_T[None]).logits[0]
    assert (ours.logits(ours.encode(*row.arguments())) - expected).abs().max() < 1e-4


def test_published_sizes() -> None:
    for config, count, keys in ((BASE, 149_655_232, 138), (LARGE, 395_881_664, 174)):
        with torch.device("meta"):
            model = ModernBertForMaskedLM(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert len(model.state_dict()) == keys


@torch.no_grad()
def test_a_document_does_not_see_its_neighbours(
    small: ModernBertConfig, lively_model: Callable, packed_row: Callable
) -> None:
    model, row = lively_model(small), packed_row([3, 0, 450, 1, 70, 70, 130, 0])
    for changed in (2, 3, 5, 6):
        start, end = row.cu_seqlens[changed : changed + 2].tolist()
        others = torch.ones(row.input_ids_T.shape, dtype=torch.bool)
        others[start:end] = False
        before = model.encode(*row.arguments())
        input_ids_T = row.input_ids_T.clone()
        input_ids_T[start:end] = 3 + (input_ids_T[start:end] + 100) % 300
        after = model.encode(input_ids_T, *row.arguments()[1:])
        assert not torch.equal(before[start:end], after[start:end])
        assert torch.equal(before[others], after[others])
        assert torch.equal(model.logits(before)[others], model.logits(after)[others])


@pytest.mark.parametrize("labels", [[], [-100, -100]])
@pytest.mark.parametrize("said", [False, True], ids=["", "in which documents"])
def test_nothing_to_predict_gives_zero_loss_and_gradients(
    labels: list[int],
    said: bool,
    small: ModernBertConfig,
    lively_model: Callable,
    packed_row: Callable,
) -> None:
    model, row = lively_model(small), packed_row([5, 4])
    places = torch.zeros(len(labels), dtype=torch.int64)
    of_each = torch.zeros(3, dtype=torch.int32) if said else None
    loss = model(
        *row.arguments(),
        places,
        torch.tensor(labels, dtype=torch.int64),
        masked_cu_seqlens=of_each,
    )
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not bool(parameter.grad.any()), name


@pytest.mark.parametrize(
    ("layers", "apart"),
    [(1, False), (2, False), (4, False), (1, True), (2, True)],
    ids=["1 layer", "2 layers", "4 layers", "1 layer, short ones apart", "2, short ones apart"],
)
@pytest.mark.parametrize("said", [False, True], ids=["", "in which documents"])
def test_loss_and_gradients_are_those_of_transformers(
    layers: int,
    said: bool,
    apart: bool,
    small: ModernBertConfig,
    lively_model: Callable,
    packed_row: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which computes all of the last layer, of 2 layers with a window. One document has no mask."""
    asked: list[int] = []

    def counted(*values: Any) -> Tensor:
        qkv, places, *_, short = values
        asked.append(len(qkv if places is None else places))
        if apart:
            assert short[1:] == (1, 200)
        return reference_attention(*values)

    monkeypatch.setitem(BACKENDS, "reference", counted)
    config = replace(small, num_hidden_layers=layers)
    ours, theirs = lively_model(config), make_theirs(config, "eager")
    theirs.load_state_dict(ours.state_dict())
    lengths = [200, 30, 60, 12]
    row = packed_row(lengths)
    places = torch.tensor([0, 5, 199, 200, 250, 301, 0])
    labels = torch.tensor([7, 8, 9, 10, 11, 12, -100])
    of_each = torch.tensor([0, 3, 4, 5, 6], dtype=torch.int32)
    if not said:
        of_each = None
    else:
        # 200 is the first token of the second document; none of the third's.
        places[4], of_each[2], of_each[3] = 228, 5, 5
    long = None
    if apart:
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels are compiled")
        ours.attention, long = Choice("reference", "kernel"), LongDocuments(1, 200)
    loss = ours(*row.arguments(), places, labels, masked_cu_seqlens=of_each, long=long)
    loss.backward()
    # Those that the backend is asked for: with the kernel, none with a window.
    narrow = said and config.window(layers - 1) is None
    expected_rows = [302] * (layers - 1) + [7 if narrow else 302]
    windows = [config.window(i) for i in range(layers)]
    assert asked == [
        n for n, w in zip(expected_rows, windows, strict=True) if not apart or w is None
    ]

    input_ids_BS, mask_BS = pad_row(row.input_ids_T, lengths)
    target_T = torch.full_like(row.input_ids_T, -100).index_put((places[:6],), labels[:6])
    target_BS, _ = pad_row(target_T + 100, lengths)
    their_loss = theirs(input_ids=input_ids_BS, attention_mask=mask_BS, labels=target_BS - 100).loss
    (6 * their_loss).backward()
    assert loss.item() == pytest.approx(6 * their_loss.item(), rel=1e-5)
    their_gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = their_gradients[name].grad
        assert expected is not None
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm() + 1e-7, name


def test_pad_row_gets_no_gradient_from_the_lookup(
    small: ModernBertConfig, lively_model: Callable, packed_row: Callable
) -> None:
    model, row = lively_model(small), packed_row([6, 3])
    row.input_ids_T[6:] = small.pad_token_id
    model.encode(*row.arguments()).sum().backward()
    gradient = model.model.embeddings.tok_embeddings.weight.grad
    assert gradient is not None
    assert not bool(gradient[small.pad_token_id].any())
    assert bool(gradient[row.input_ids_T[0]].any())


def test_rotary_tables_stay_fp32(small: ModernBertConfig) -> None:
    model = ModernBertForMaskedLM(small)
    before = model.model.global_rotary.cos_PR.clone()
    model.bfloat16()
    assert model.decoder.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.global_rotary.cos_PR, before)
    assert not [name for name in model.state_dict() if "rotary" in name]


@torch.no_grad()
def test_another_base_is_the_model_that_was_made_with_it(
    small: ModernBertConfig, lively_model: Callable, packed_row: Callable
) -> None:
    """In global layers alone, in place, and in the configuration that is exported."""
    row = packed_row([3, 450, 70])
    made = lively_model(replace(small, global_rope_theta=500.0))
    turned = ModernBertForMaskedLM(small)
    turned.load_state_dict(made.state_dict())
    table, before = turned.model.global_rotary.cos_PR, turned.encode(*row.arguments())
    turned.set_global_rope_theta(500.0)
    expected = made.encode(*row.arguments())
    assert torch.equal(turned.encode(*row.arguments()), expected)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert turned.config == turned.model.config == made.config
    assert turned.model.global_rotary.cos_PR is table
    turned.bfloat16()
    assert torch.equal(turned.model.global_rotary.cos_PR, made.model.global_rotary.cos_PR)


@torch.no_grad()
def test_some_queries_and_a_capacity(
    small: ModernBertConfig, lively_model: Callable, packed_row: Callable
) -> None:
    """Hidden states of some tokens alone, and logits of a padded batch without counting them."""
    model, row = lively_model(small), packed_row([30, 10])
    every = model.encode(*row.arguments())
    places = torch.tensor([39, 0, 7])
    some = model.encode(*row.arguments(), Queries(places, None))
    assert torch.allclose(some, every[places], atol=1e-5)
    input_ids_BS, mask_BS = pad_row(row.input_ids_T, [30, 10])
    exact = model.forward_padded(input_ids_BS, mask_BS)
    assert torch.allclose(model.forward_padded(input_ids_BS, mask_BS, 77), exact, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_logits_equal_those_of_transformers(
    cuda: str, lively_model: Callable, packed_row: Callable
) -> None:
    small_ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    config = replace(BASE, vocab_size=512, num_hidden_layers=6, **small_ids)
    model, theirs = lively_model(config), make_theirs(config, "eager")
    theirs.load_state_dict(model.state_dict())
    model.to(cuda), theirs.to(cuda)
    row = packed_row(LENGTHS, config.vocab_size).to(cuda)
    input_ids_BS, mask_BS = pad_row(row.input_ids_T, LENGTHS)
    real = mask_BS.bool()
    expected = theirs(input_ids=input_ids_BS, attention_mask=mask_BS).logits[real]
    ours = model.logits(model.encode(*row.arguments()))
    padded = model.forward_padded(input_ids_BS, mask_BS, 1000)[real]
    print(f"fp32: {(ours - expected).abs().max():.1e}, {(padded - expected).abs().max():.1e}")
    assert (ours - expected).abs().max() < 1e-3
    assert (padded - expected).abs().max() < 1e-3
    # bf16 through the fast backend: no further from the truth than transformers in bf16.
    theirs_bf16 = theirs.bfloat16()(input_ids=input_ids_BS, attention_mask=mask_BS).logits[real]
    ours_bf16 = model.bfloat16().logits(model.encode(*row.arguments()))
    scale = expected.norm()
    ours_error, their_error = (
        float((logits.float() - expected).norm() / scale) for logits in (ours_bf16, theirs_bf16)
    )
    print(f"bf16: relative error {ours_error:.1e}, of transformers {their_error:.1e}")
    assert ours_error < 1.5 * their_error


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_document_does_not_see_its_neighbours(
    cuda: str, small: ModernBertConfig, lively_model: Callable, packed_row: Callable
) -> None:
    model = lively_model(replace(small, num_attention_heads=2)).to(cuda, torch.bfloat16)
    row = packed_row([3, 0, 450, 1, 70, 70, 130, 0]).to(cuda)
    for changed in (2, 3, 5, 6):
        start, end = row.cu_seqlens[changed : changed + 2].tolist()
        others = torch.ones(row.input_ids_T.shape, dtype=torch.bool, device=cuda)
        others[start:end] = False
        before = model.encode(*row.arguments())
        input_ids_T = row.input_ids_T.clone()
        input_ids_T[start:end] = 3 + (input_ids_T[start:end] + 100) % 300
        after = model.encode(input_ids_T, *row.arguments()[1:])
        assert not torch.equal(before[start:end], after[start:end])
        assert torch.equal(before[others], after[others])
