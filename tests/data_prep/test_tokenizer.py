"""The tokenizer: text survives, both forms give the same ids, training uses the text it says."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.document import Document, InputError, write_documents
from data_prep.tokenizer import (
    SENTENCEPIECE_FILE,
    _lines,
    describe,
    encode,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from data_prep.tokenizer_sample import draw_sample


def documents(texts: list[str], source: str = "discharge") -> list[Document]:
    return [Document(f"{source}-{i}", source, str(i), text) for i, text in enumerate(texts)]


def load_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(trained)


@pytest.fixture(scope="module")
def existing(notes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An existing tokenizer in ModernBERT's style: byte-level, [unusedN] and space-run tokens."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(notes[:50], trainer)
    backend.add_tokens([AddedToken("   ", normalized=True)])
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    backend.add_tokens(["[unused0]", "[unused1]"])
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    folder = tmp_path_factory.mktemp("existing") / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=8192,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")},
    ).save_pretrained(folder)
    return folder


def test_decode_of_the_loaded_tokenizer_gives_the_text_back(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = " patient ,  denies .\n\n\tit 's  ▁ 12 . 5 n't \r\n "
    (ids,) = encode(tokenizer, [text])
    assert tokenizer.decode(ids) == text


# --- special tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trained", "existing"])
def test_a_literal_special_token_is_text_to_encode_and_special_to_a_direct_call(
    kind: str, request: pytest.FixtureRequest
) -> None:
    fast = load_tokenizer(request.getfixturevalue(kind))
    special = set(describe(fast)["special_ids"].values())
    text = "denies [MASK] pain[SEP][CLS] [PAD] [UNK]"
    direct = fast(text)["input_ids"]
    (ids,) = encode(fast, [text])
    assert special.isdisjoint(ids.tolist())
    assert fast.decode(ids) == text
    assert fast.mask_token_id in direct
    assert fast(text)["input_ids"] == direct, "encode must leave the tokenizer as it was"


def test_encode_never_cuts_or_pads_and_leaves_those_settings_alone(trained: Path) -> None:
    fast = load_tokenizer(trained)
    short = fast(["pain", "chest pain"], truncation=True, max_length=4, padding="max_length")
    assert [len(row) for row in short["input_ids"]] == [4, 4]
    settings_before = fast.backend_tokenizer.truncation, fast.backend_tokenizer.padding
    ids = encode(fast, ["", "chest pain fever " * 3000])
    assert len(ids[0]) == 0
    assert len(ids[1]) > 9000
    assert (fast.backend_tokenizer.truncation, fast.backend_tokenizer.padding) == settings_before


# --- the folder --------------------------------------------------------------------------------


def test_auto_tokenizer_loads_the_folder_without_network(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    fast = AutoTokenizer.from_pretrained(str(trained))
    assert fast.is_fast
    assert fast.model_max_length == 8192
    assert fast.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (fast.pad_token_id, fast.unk_token_id, fast.cls_token_id) == (0, 1, 2)
    assert (fast.sep_token_id, fast.mask_token_id) == (3, 4)
    assert len(fast) == 640 == load_sentencepiece(trained).get_piece_size()
    inner = fast("chest pain", add_special_tokens=False)["input_ids"]
    row = fast("chest pain")
    assert row["input_ids"] == [2, *inner, 3]
    assert set(row) == {"input_ids", "attention_mask"}
    assert fast("chest", "pain")["input_ids"].count(3) == 2


def test_loads_the_same_beside_a_model_configuration(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "modernbert"}))
    assert describe(load_tokenizer(folder)) == describe(load_tokenizer(trained))


def test_the_mask_token_stands_for_a_word_with_its_space(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer("patient denies [MASK] pain", add_special_tokens=False)["input_ids"]
    before = encode(tokenizer, ["patient denies"])[0].tolist()
    after = encode(tokenizer, [" pain"])[0].tolist()
    assert ids == [*before, 4, *after]


def test_layout_is_compact_and_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(encode(tokenizer, [text])[0])

    assert pieces("denies chest pain")[1:] == ["▁chest", "▁pain"]
    assert pieces("2024") == ["2", "0", "2", "4"]
    assert len(pieces("\n")) == len(pieces("\t")) == 1
    assert len(pieces("      ")) <= 2
    assert len(pieces("-" * 32)) <= 4


def test_no_learned_piece_has_a_digit_with_anything_else(trained: Path) -> None:
    piece = load_sentencepiece(trained)
    learned = [piece.id_to_piece(i) for i in range(261, piece.get_piece_size())]
    assert [p for p in learned if len(p) > 1 and any(c.isdigit() for c in p)] == []
    assert [p for p in learned if p.isdigit()] != []


# --- training ----------------------------------------------------------------------------------


def test_the_end_of_a_long_document_is_trained_on(notes: list[str], tmp_path: Path) -> None:
    text = "\n".join(notes)[:100_000] + " zygomaticotemporal" * 400
    train_tokenizer(documents([text]), tmp_path / "tokenizer", 640)
    assert "▁zygomaticotemporal" in load_tokenizer(tmp_path / "tokenizer").get_vocab()


@pytest.mark.parametrize("special", ["\u2585", "\t", "\0", "\u2581", "\u0010"])
def test_text_around_special_characters_is_trained_on(
    notes: list[str], special: str, tmp_path: Path
) -> None:
    text = f"zygomatico{special} bone " * 500 + "".join(notes[:50])
    train_tokenizer(documents([text]), tmp_path / "tokenizer", 448)
    assert "zygomatico" in load_tokenizer(tmp_path / "tokenizer").get_vocab()


def test_training_lines_fit_sentencepiece_and_lose_nothing(notes: list[str]) -> None:
    texts = ["x" * 5000, " " * 5000, "😀" * 3000, "", "\n\n", *notes[:20], "ab cd\n" * 900]
    for text in texts:
        lines = list(_lines([text]))
        assert "".join(lines) == text
        assert all(len(line.encode()) <= 4192 for line in lines)
    # A cut falls where a run of spaces begins, which is where SentencePiece cuts into words.
    assert all(line.startswith(" ") for line in list(_lines(["ab cd\n" * 900]))[1:])


TRAIN = """
import os, sys
from pathlib import Path
from data_prep.document import read_documents
from data_prep.tokenizer import train_tokenizer
if sys.argv[3] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
found = list(read_documents(Path(sys.argv[1])))
train_tokenizer(found if sys.argv[3] == "one" else found[::-1], Path(sys.argv[2]), 640)
"""


def test_the_same_documents_give_the_same_bytes_on_any_machine_in_any_order(
    notes: list[str],
    tmp_path: Path,
) -> None:
    write_documents(tmp_path / "documents.parquet", documents(notes[:600]))
    for kind, seed in (("one", "1"), ("all", "2")):
        arguments = [str(tmp_path / "documents.parquet"), str(tmp_path / kind), kind]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", TRAIN, *arguments], check=True, env=environment)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["sentencepiece.model", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
        assert str(tmp_path).encode() not in (tmp_path / "one" / name).read_bytes()


def test_the_sample_is_bounded_and_depends_on_ids_alone(notes: list[str]) -> None:
    found = documents(notes[:300])
    everything = sum(len(document.text.encode()) for document in found)
    sample = draw_sample(found, 10_000, {}, 0, Path("out"))
    assert sum(len(text.encode()) for text in sample) == 10_000
    assert draw_sample(found[::-1], 10_000, {}, 0, Path("out")) == sample
    assert draw_sample(found, 10_000, {}, 1, Path("out")) != sample
    assert sum(map(len, draw_sample(found, 10 * everything, {}, 0, Path("out")))) == everything
    # One document larger than the whole sample is cut, not dropped.
    assert draw_sample(documents(["é" * 100]), 51, {}, 0, Path("out")) == ["é" * 25]


def test_shares_divide_the_sample_between_sources() -> None:
    found = [
        *documents(["p" * 1000] * 100, "pubmed"),
        *documents(["d" * 1000] * 100, "discharge"),
        *documents(["r" * 1000] * 100, "radiology"),
    ]
    sample = "".join(draw_sample(found, 10_000, {"pubmed": 0.3, "discharge": 0.7}, 0, Path("out")))
    assert (sample.count("p"), sample.count("d"), sample.count("r")) == (3000, 7000, 0)


# --- an existing tokenizer ---------------------------------------------------------------------


def test_an_existing_tokenizer_is_described_with_what_masking_must_not_draw(existing: Path) -> None:
    fast = load_tokenizer(existing)
    vocab = fast.get_vocab()
    description = describe(fast)
    assert description["real_vocab_size"] == len(fast) == 408
    assert description["vocab_size"] == 448
    assert description["special_ids"]["mask"] == vocab["[MASK]"]
    names = ["   ", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]", "[unused1]"]
    assert description["excluded_ids"] == sorted(vocab[name] for name in names)
    json.dumps(description)


def test_a_trained_tokenizer_is_described(trained: Path) -> None:
    description = describe(load_tokenizer(trained))
    assert description["vocab_size"] == description["real_vocab_size"] == 640
    assert description["special_ids"] == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert description["excluded_ids"] == [0, 1, 2, 3, 4]
    assert len(description["sha256"]) == 64


@pytest.mark.parametrize("kind", ["trained", "existing"])
def test_saving_keeps_the_tokenizer_whatever_was_asked_of_it_before(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    fast = load_tokenizer(folder)
    before = describe(fast)
    fast(["pain"], truncation=True, max_length=8, padding="max_length")
    assert describe(fast) == before
    save_tokenizer(fast, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert describe(again) == before
    assert again.backend_tokenizer.truncation is None
    assert again.model_max_length == 8192
    text = "chest pain   \n[MASK]"
    assert encode(again, [text])[0].tolist() == encode(fast, [text])[0].tolist()
    assert (tmp_path / "saved" / SENTENCEPIECE_FILE).exists() == (kind == "trained")
    # The class name that transformers 4 also knows.
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert str(tmp_path) not in json.dumps(config)


def test_ids_are_uint16_where_the_vocabulary_fits(
    tokenizer: PreTrainedTokenizerFast, existing: Path
) -> None:
    assert encode(tokenizer, ["pain"])[0].dtype == np.uint16
    large = load_tokenizer(existing)
    large.add_tokens([f"<{i}>" for i in range(2**16)])
    assert encode(large, ["pain <65000>"])[0].dtype == np.uint32
    assert encode(large, ["<65535>"])[0].tolist() == [408 + 65535]


# --- errors ------------------------------------------------------------------------------------


def test_no_text_is_an_error(notes: list[str], tmp_path: Path) -> None:
    for found in ([], documents(["", ""])):
        with pytest.raises(InputError, match=r"tokenizer: no document with text"):
            train_tokenizer(found, tmp_path / "tokenizer", 512)
    with pytest.raises(InputError, match="from radiology"):
        train_tokenizer(
            documents(notes[:5]),
            tmp_path / "tokenizer",
            512,
            shares={"discharge": 0.5, "radiology": 0.5},
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (8192, r"supports a vocabulary of only \d+, not 8192; set vocab_size to \d+ or less"),
        (256, r"cannot train a vocabulary of 256.*raise vocab_size"),
        (500, "500, which is not a multiple of 64; set it to 512"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text_is_an_error(
    vocab_size: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train_tokenizer(documents(["secretword pain"]), tmp_path / "tokenizer", vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_vocabulary_that_the_error_names_works(
    notes: list[str], tmp_path: Path
) -> None:
    found = documents(notes[:10])
    with pytest.raises(InputError) as caught:
        train_tokenizer(found, tmp_path / "tokenizer", 8192)
    fits = int(str(caught.value).split("set vocab_size to ")[1].split()[0])
    train_tokenizer(found, tmp_path / "tokenizer", fits)
    assert len(load_tokenizer(tmp_path / "tokenizer")) == fits


def test_training_says_nothing_of_the_text(
    notes: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as caught:
        train_tokenizer(documents(["secretword\u2585 secretword"]), tmp_path / "tokenizer", 4096)
    out, err = capfd.readouterr()
    assert "secretword" not in out + err + str(caught.value)
    train_tokenizer(documents(notes[:50]), tmp_path / "tokenizer", 512)
    assert capfd.readouterr() == ("", "")


def break_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def remove_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def remove_mask_and_pad(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["mask_token"], config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, "holds no tokenizer that loads"),
        (remove_json, "has no tokenizer.json"),
        (remove_mask_and_pad, "has no mask_token, pad_token"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_what_is_no_usable_tokenizer_is_an_error_that_names_it(
    damage: Callable[[Path], None],
    message: str,
    trained: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(trained, folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
