"""Fixtures that several tests of the data preparation share."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from lxml.html import HtmlElement

from data_prep.document import Document, read_documents
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


@pytest.fixture(scope="session")
def shared_runs() -> Callable[[HtmlElement, Path], set[tuple[str, ...]]]:
    """The runs of five words that a page and the documents below a folder have both."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[^\W_]+", text.lower())
        return set(zip(*(words[start:] for start in range(5)), strict=False))

    def find(page: HtmlElement, documents: Path) -> set[tuple[str, ...]]:
        blocks = [
            element.text_content() for element in page.iter("td", "th", "p", "pre", "h1", "h2")
        ]
        blocks += [*page.xpath("//@aria-label"), *page.xpath("//figcaption/text()")]
        blocks += page.xpath("//summary/text()")
        wanted = set().union(*map(runs, blocks))
        assert wanted
        found = set()
        for path in sorted(documents.rglob("*.parquet")):
            for document in read_documents(path):
                found |= wanted & runs(document.text)
        return found

    return find
