"""Memory is bounded: ten times the input takes hardly more, in every stage."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "measured_stages.py"
# At once 4,000 reports and 2,000 abstracts, some 6 MB; ten times that is 60 MB.
REPORTS, ABSTRACTS, FILE_ABSTRACTS = 4000, 2000, 2000
GROWTH = 1.3
SLACK_KB = 16 << 10

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
  rows_per_shard: 512
  part_characters: 2000000
  plan_documents: 2000
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_ten_times_the_input_takes_hardly_more_memory_in_any_stage(tmp_path: Path) -> None:
    once, ten_times = peaks(tmp_path / "once", 1), peaks(tmp_path / "ten", 10)
    assert once.keys() == ten_times.keys()
    for stage, before in once.items():
        print(f"{stage:12} {before >> 10:6} MB {ten_times[stage] >> 10:6} MB")
    grown = {name: after / once[name] for name, after in ten_times.items()}
    assert {name: factor for name, factor in grown.items() if factor > GROWTH} == {}
    # What Python and its imports take hides a growth; without it a stage that held the 54 MB of
    # text that are added, or a list of their words, would be far above this.
    over = {
        name: peak - ten_times["baseline"] - GROWTH * (once[name] - once["baseline"])
        for name, peak in ten_times.items()
    }
    assert {name: excess for name, excess in over.items() if excess > SLACK_KB} == {}
