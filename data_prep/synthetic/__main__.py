"""`python -m data_prep.synthetic OUT --seed 17`: write the made-up corpus into the folder OUT."""

import argparse
from pathlib import Path

from data_prep.synthetic.corpus import DOCUMENTS, SEED, write_corpus


def main() -> None:
    """Read the command line and write the corpus."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.synthetic",
        description="Write a made-up corpus in the formats of PubMed, MIMIC-IV-Note and CMS.",
    )
    parser.add_argument("out", type=Path, help="folder; files of an earlier corpus are replaced")
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s")
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, help="abstracts and notes; default: %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.documents < 100:
        parser.error("--documents must be at least 100, so that every special case has a place")
    for path in write_corpus(arguments.out, arguments.seed, arguments.documents):
        print(f"{path.stat().st_size:>10,d} bytes  {path}")


if __name__ == "__main__":
    main()
