"""Small models, rows of documents, and the transformers model to compare with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.config import BASE, ModernBertConfig
from model.modernbert import ModernBertForMaskedLM

SMALL = replace(
    BASE,
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=1024,
    pad_token_id=0,
    cls_token_id=1,
    sep_token_id=2,
)


@dataclass
class PackedRow:
    """Documents laid end to end, with what the model asks for."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.input_ids_T, self.position_ids_T, self.cu_seqlens, self.max_seqlen

    def to(self, device: str) -> "PackedRow":
        return PackedRow(
            self.input_ids_T.to(device),
            self.position_ids_T.to(device),
            self.cu_seqlens.to(device),
            self.max_seqlen,
        )


def make_packed_row(lengths: list[int], vocab_size: int = 320, seed: int = 0) -> PackedRow:
    generator = torch.Generator().manual_seed(seed)
    return PackedRow(
        torch.randint(3, vocab_size, (sum(lengths),), generator=generator),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        max(lengths),
    )


def make_lively_model(config: ModernBertConfig, seed: int = 0) -> ModernBertForMaskedLM:
    """A model whose attention is far from uniform and whose norms and bias are not at their start.

    With the starting weights all logits are near zero, and a wrong window would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    model = ModernBertForMaskedLM(config, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif "Wqkv" in name:
                parameter *= 4
            else:
                parameter *= 2
    return model


@pytest.fixture
def small() -> ModernBertConfig:
    return SMALL


@pytest.fixture
def packed_row() -> Callable[..., PackedRow]:
    return make_packed_row


@pytest.fixture
def lively_model() -> Callable[..., ModernBertForMaskedLM]:
    return make_lively_model


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


def make_tokenizer(folder: Path, words: int) -> Path:
    """A word-level tokenizer of `words` entries whose special ids differ from the defaults."""
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(specials)}
    vocabulary |= {f"w{i}": i for i in range(len(specials), words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {f"{word[1:-1].lower()}_token": word for word in specials}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A tokenizer of 300 words, for models with a vocabulary of 320."""
    return make_tokenizer(tmp_path / "tokenizer", 300)


@pytest.fixture
def tokenizer_of() -> Callable[[Path, int], Path]:
    return make_tokenizer
