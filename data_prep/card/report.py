"""The data card: `python -m data_prep report FOLDER [key=value …]`.

FOLDER is the `out_dir` of a finished `python -m data_prep`, or one data set in it. For every data
set one page, `OUT_DIR/rows-…/report.html`, is written: what the data set holds, where it is from,
what was left out, and what a reader needs to judge its bias. It is made from what the stages left
beside the data set. The words give a mixture, as training takes it: `weights.SOURCE=SHARE` for each
source, and `tokens=N` for the length of the run in slots. The page holds numbers and names of lists
(data_prep/card/terms.py), never text of a document.
"""

import argparse
import sys
from pathlib import Path

from common.config import ConfigError, load_config
from common.files import make_private
from data_prep.card.facts import data_sets, gather
from data_prep.card.mixture import Mixture
from data_prep.card.page import make_page
from data_prep.document import InputError

REPORT_NAME = "report.html"


def write_reports(folder: Path, mixture: Mixture) -> list[Path]:
    """Write the page of every data set that `folder` is or holds; returns their paths.

    Raises InputError for a folder that holds none and a file that is missing, ConfigError for a
    mixture of other sources.
    """
    written = []
    for data_set in data_sets(folder):
        page = make_page(gather(data_set), mixture)
        page.write(data_set / REPORT_NAME)
        written.append(data_set / REPORT_NAME)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_prep report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    make_private()
    try:
        mixture = load_config(Mixture, "mixture", overrides=options.overrides)
        written = write_reports(options.folder, mixture)
    except (ConfigError, InputError, OSError) as error:
        print("error: " + "; ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0
