"""Memory is bounded: ten times the input takes hardly more, in every stage."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "measured_stages.py"
# At once 2,000 reports and 1,000 abstracts, some 3 MB; ten times that is 30 MB.
REPORTS, ABSTRACTS, FILE_ABSTRACTS = 2000, 1000, 500
# What a stage may take more for ten times as much.
MORE_KB = 8 << 10
# The C library and Arrow, whose allocator is then that of the C library, give back what is freed:
# what they keep for later grows with the number of tasks, and is nothing that a stage holds.
GIVE_BACK = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 10),
}

RUN = """
data_prep:
  raw_dir: {folder}
  out_dir: {folder}/out
  sources:
    pubmed: [pubmed/*.xml]
    radiology: [radiology.csv]
  tokenizer: {{vocab_size: 2048, sample_bytes: 1000000}}
  max_lengths: [1024]
  row_tokens: 1024
  rows_per_shard: 256
  part_characters: 500000
  plan_documents: 500
  validation_share: 0.1
"""


def texts(number: int, draw: random.Random) -> list[str]:
    """Reports of some 1,000 characters; of three one is nearly another, of ten one a copy."""
    words = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randrange(3, 10)))
        for _ in range(20_000)
    ]
    found: list[str] = []
    for _ in range(number):
        kind = draw.random() if found else 1.0
        if kind < 0.1:
            found.append(draw.choice(found[-1000:]))
        elif kind < 0.4:
            found.append(f"{draw.choice(found[-1000:])} {draw.choice(words)} {draw.choice(words)}")
        else:
            lines = [" ".join(draw.choices(words, k=12)) for _ in range(12)]
            found.append(".\n".join(lines))
    return found


def write_corpus(folder: Path, times: int) -> None:
    draw = random.Random(0)
    (folder / "pubmed").mkdir(parents=True)
    with (folder / "radiology.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ["note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "text"]
        writer.writerow(names)
        for number, text in enumerate(texts(REPORTS * times, draw)):
            writer.writerow([f"{number}-RR-1", number // 4, "", "RR", number % 4, "", text])
    articles = texts(ABSTRACTS * times, draw)
    for begin in range(0, len(articles), FILE_ABSTRACTS):
        with (folder / f"pubmed/pubmed26n{begin:08d}.xml").open("w") as file:
            file.write("<PubmedArticleSet>")
            for number, text in enumerate(articles[begin : begin + FILE_ABSTRACTS], begin):
                file.write(
                    f"<PubmedArticle><MedlineCitation><PMID Version='1'>{number + 1}</PMID>"
                    f"<Article><ArticleTitle>The title.</ArticleTitle><Abstract><AbstractText>"
                    f"{text}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>"
                )
            file.write("</PubmedArticleSet>")


def peaks(folder: Path, times: int) -> dict[str, int]:
    write_corpus(folder, times)
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    command = [sys.executable, str(SCRIPT), str(folder / "run.yaml")]
    environment = os.environ | GIVE_BACK
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_ten_times_the_input_takes_hardly_more_memory_in_any_stage(tmp_path: Path) -> None:
    """Less than a third of the 27 MB of text that are added, beyond what doing nothing takes.

    All that is bounded by the size of a part is at its bound in both runs (measured_stages.py), so
    that 3 MB and 30 MB show what larger inputs would.
    """
    once, ten_times = peaks(tmp_path / "once", 1), peaks(tmp_path / "ten", 10)
    assert once.keys() == ten_times.keys()
    idle = ten_times["baseline"] - once["baseline"]
    grown = {name: after - once[name] - idle for name, after in ten_times.items()}
    for name, more in grown.items():
        print(f"{name:12} {once[name] / 1024:6.1f} MB and {more / 1024:4.1f} MB more")
    assert {name: more for name, more in grown.items() if more > MORE_KB} == {}
