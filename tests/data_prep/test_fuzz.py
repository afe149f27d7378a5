"""Damaged files: what is documented comes out of the readers, or documents, and nothing else.

Real files are damaged the way transfers, disks and editors do it, and a few ways an attacker would.
"""

import gzip
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep import mimic, pubmed
from data_prep.document import InputError

Damage = Callable[[bytes, random.Random], bytes]
CANARY = "Zyxwvut Qanary Vharf"
# A hang is what takes a thousand times as long as such a small file does.
_LONGEST_CPU_S = 20.0


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _flip_bits(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 50])):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _lose_a_part(content: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(content))
    return content[:begin] + content[begin + draw.randrange(1, 3000) :]


def _repeat_a_part(content: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(content))
    end = begin + draw.randrange(1, 3000)
    return content[:end] + content[begin:]


def _insert(*pieces: bytes) -> Damage:
    def insert(content: bytes, draw: random.Random) -> bytes:
        place = draw.randrange(len(content))
        return content[:place] + draw.choice(pieces) + content[place:]

    return insert


def _replace(pattern: bytes, *others: bytes) -> Damage:
    def replace(content: bytes, draw: random.Random) -> bytes:
        places = [match.span() for match in re.finditer(pattern, content)]
        if not places:
            return content
        begin, end = draw.choice(places)
        return content[:begin] + draw.choice(others) + content[end:]

    return replace


def _of_packed(damage: Damage) -> Damage:
    return lambda content, draw: damage(gzip.compress(content, 1, mtime=0), draw)


def _bomb(content: bytes, draw: random.Random) -> bytes:
    levels = draw.randrange(2, 12)
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, levels))
    dtd = f'<!DOCTYPE PubmedArticleSet [<!ENTITY l0 "ha">{laughs}]>'.encode()
    root = content.index(b"<PubmedArticleSet") if b"<PubmedArticleSet" in content else 0
    body = content[root:].replace(b"<ArticleTitle>", f"<ArticleTitle>&l{levels - 1};".encode(), 1)
    return dtd + body


def _declare(content: bytes, draw: random.Random) -> bytes:
    name = draw.choice(["utf-16", "latin-1", "martian", "utf-7", "ascii", "shift_jis", "UCS-4", ""])
    body = re.sub(rb"^\s*<\?xml.*?\?>", b"", content)
    return f'<?xml version="1.0" encoding="{name}"?>'.encode() + body


def _nest(content: bytes, draw: random.Random) -> bytes:
    tag = draw.choice([b"i", b"MedlineCitation", b"PubmedArticle", b"mml:mrow", b"AbstractText"])
    depth = draw.choice([2, 100, 300, 5000])
    place = content.find(b">", draw.randrange(len(content))) + 1
    closing = (b"</" + tag + b">") * draw.choice([depth, depth - 1])
    return content[:place] + (b"<" + tag + b">") * depth + closing + content[place:]


_ANYTHING: list[Damage] = [_cut, _flip_bits, _lose_a_part, _repeat_a_part]
_XML: list[Damage] = [
    *_ANYTHING,
    *map(_of_packed, _ANYTHING),
    _bomb,
    _declare,
    _nest,
    _insert(
        b"\0", b"\x0b", b"\xff\xfe", b"<", b"&", b"&nbsp;", b"]]>", b"<!--", b"<![CDATA[", b">"
    ),
    _insert(b' a="' + b"x" * 11_000_000 + b'"', b"<i " + b'a="1" ' * 20_000 + b"/>"),
    _replace(rb"</[A-Za-z]+>", b"", b"</i>", b"</PubmedArticle>"),
    _replace(
        rb"<PMID[^>]*>\d+", b"<PMID>", b"<PMID>-1", b"<PMID>9999999999", b"<PMID Version='x'>1"
    ),
    _replace(rb"Label=", b"Label='a' Label=", b"xml:lang=", b"mml:Label="),
]
_CSV: list[Damage] = [
    *_ANYTHING,
    *map(_of_packed, _ANYTHING),
    _insert(
        b"\0", b'"', b'""', b'"""', b",", b"\r", b"\n", b"\r\n", b"\xff", b"\xed\xa0\x80", b"\\"
    ),
    _insert(b"x" * 2_000_000, b'"' * 4001, b"," * 9000, b"\n" * 5000),
    _replace(rb'"', b"", b"'", b'" '),
    _replace(rb"\n", b"", b"\r", b"\x1a\n"),
    _replace(rb"\A[^\n]*", b"", b"note_id,text", b"text," * 8, b"\xef\xbb\xbf" * 2),
    _replace(rb",", b"", b";", b",,", b"\t"),
]


def _read_pubmed(path: Path) -> int:
    (positions,) = pubmed.fold([pubmed.scan(path)])
    options = {"other_abstracts": ["*"], "vernacular_titles": True, "languages": ["en"]}
    return sum(bool(d.text) for d in pubmed.documents(path, positions, **options))


def _read_notes(path: Path) -> int:
    return sum(bool(document.text) for document in mimic.documents(path, "discharge"))


def _outcomes(
    folder: Path,
    contents: list[bytes],
    kinds: list[Damage],
    tries: int,
    read: Callable[[Path], int],
) -> Iterator[Exception | None]:
    """What came of reading every content, damaged `tries` times in each way."""
    draw = random.Random(0)
    path = folder / "damaged.gz"
    for content in contents:
        for damage in kinds:
            for _ in range(tries):
                path.write_bytes(damage(content, draw))
                began = time.process_time()
                try:
                    read(path)
                    raised = None
                except InputError as error:
                    raised = error
                assert time.process_time() - began < _LONGEST_CPU_S
                yield raised


def _plain(path: Path, limit: int) -> bytes:
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    return content if len(content) <= limit else b""


def _xml_files(shared_data: Path, limit: int) -> list[bytes]:
    paths = sorted((shared_data / "pubmed").rglob("*.xml*"))
    names = [p for p in paths if p.suffix != ".md5" and "nonconforming" not in p.parts]
    return [content for path in names if (content := _plain(path, limit))]


def _check(outcomes: Iterator[Exception | None]) -> Counter[bool]:
    found: Counter[bool] = Counter()
    for raised in outcomes:
        found[raised is not None] += 1
        if raised is not None:
            message = str(raised)
            assert "damaged.gz" in message
            assert len(message) < 1000
            assert raised.__cause__ is None
            assert not any(word in message for word in CANARY.split())
    return found


def _notes(rows: int) -> bytes:
    header = "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
    text = f'{CANARY}\n\nHis ""Hgb"", 7.2; _é_\n{CANARY}'
    lines = (f'1{i}-DS-1,1{i},,DS,1,2150-01-01 00:00:00,,"{text}"\n' for i in range(rows))
    return (header + "".join(lines)).encode()


def test_damaged_xml(shared_data: Path, tmp_path: Path) -> None:
    """The smallest real files, in every way; some damage is not noticed, and most is."""
    contents = sorted(_xml_files(shared_data, 12_000), key=len)[:6]
    found = _check(_outcomes(tmp_path, contents, _XML, 6, _read_pubmed))
    assert found[True] > 200
    assert found[False] > 50


def test_damaged_csv(tmp_path: Path) -> None:
    """No word of a note is in an error."""
    found = _check(_outcomes(tmp_path, [_notes(30)], _CSV, 25, _read_notes))
    assert found[True] > 100
    assert found[False] > 50


@pytest.mark.slow
def test_damaged_xml_at_length(shared_data: Path, tmp_path: Path) -> None:
    """All real files up to 300 kB."""
    found = _check(_outcomes(tmp_path, _xml_files(shared_data, 300_000), _XML, 4, _read_pubmed))
    assert found[True] > 500
    assert found[False] > 200


@pytest.mark.slow
def test_damaged_csv_at_length(shared_data: Path, tmp_path: Path) -> None:
    """The first notes of the real file, and made-up ones."""
    path = shared_data / "mimic-iv-note" / "note" / "discharge.csv.gz"
    with gzip.open(path) as file:
        contents = [file.read(200_000), _notes(500)]
    found = _check(_outcomes(tmp_path, contents, _CSV, 60, _read_notes))
    assert found[True] > 500
    assert found[False] > 100
