"""Filling a mask, against transformers' own logits."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from evaluation.fill_mask import fill_mask, main
from model.config import ModernBertConfig
from model.huggingface import save_pretrained
from model.modernbert import ModernBertForMaskedLM

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that answers every mask with `aspirin`, then `w8`."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, "aspirin"])}
    vocabulary |= {f"w{i}": i for i in range(6, 64)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {f"{word[1:-1].lower()}_token": word for word in SPECIALS}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "t")
    config = ModernBertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=3,
        cls_token_id=1,
        sep_token_id=2,
    )
    model = ModernBertForMaskedLM(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.decoder.bias[5], model.decoder.bias[8] = 10.0, 8.0
    save_pretrained(model, tokenizer_folder=tmp_path / "t", out=tmp_path / "model")
    return tmp_path / "model"


def test_guesses_and_probabilities(folder: Path) -> None:
    (one, two) = fill_mask(folder, ["w7 [MASK] w9", "[MASK] [MASK]"])
    assert (len(one), len(two)) == (1, 2)
    for guesses in (*one, *two):
        assert len(guesses) == 5
        assert [token for token, _ in guesses[:2]] == ["aspirin", "w8"]
        shares = [share for _, share in guesses]
        assert shares == sorted(shares, reverse=True)
        # 62 other tokens have a bias of 0 and logits near it.
        expected = torch.tensor([10.0, 8.0, *[0.0] * 62]).softmax(0)
        assert shares[:2] == pytest.approx(expected[:2].tolist(), abs=0.03)


def test_command_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder), "w7 [MASK]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "w7 [MASK]"
    assert lines[1].startswith("  'aspirin' 0.8")


@pytest.mark.parametrize(
    ("text", "message"),
    [("w7 w8", r"text 1 has no \[MASK\]"), ("w7 " * 20 + "[MASK]", "has 23 tokens")],
)
def test_what_cannot_be_filled(
    text: str, message: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        fill_mask(folder, [text])
    assert main([str(folder / "absent"), text]) == 1
    assert "it has no config.json" in capsys.readouterr().err
