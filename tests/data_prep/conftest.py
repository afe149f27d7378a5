"""Fixtures that several tests of the data preparation share."""

import random
from pathlib import Path

import pytest

from data_prep.document import Document
from data_prep.tokenizer import train_tokenizer

WORDS = [
    *("patient", "denies", "chest", "pain", "dyspnea", "fever"),
    *("chills", "history", "of", "hypertension", "diabetes", "mellitus"),
    *("metformin", "lisinopril", "allergies", "medications", "discharge", "follow"),
    *("up", "left", "ventricular", "ejection"),
]


@pytest.fixture(scope="session")
def notes() -> list[str]:
    """700 texts with the layout of notes: headings, runs of spaces, numbers, rules of dashes."""
    draw = random.Random(0)
    texts = []
    for _ in range(700):
        lines = [
            f"{draw.choice(WORDS).title()}:{' ' * draw.randrange(1, 9)}"
            + " ".join(draw.choices(WORDS, k=draw.randrange(1, 12)))
            + f" {draw.randrange(1000)}.{draw.randrange(10)}\t[{draw.choice(WORDS)}]"
            for _ in range(draw.randrange(2, 8))
        ]
        texts.append("\n".join([*lines, "-" * draw.randrange(2, 40)]) + "\n\n")
    return texts


@pytest.fixture(scope="session")
def trained(notes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with 640 entries, trained on `notes`."""
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    found = [Document(f"discharge-{i}", "discharge", str(i), text) for i, text in enumerate(notes)]
    train_tokenizer(found, folder, 640)
    return folder
