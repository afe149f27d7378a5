"""From raw files to data sets: `python -m data_prep --config FILE [key=value …]`.

The keys are those of the section `data_prep:` (data_prep/config.py says what they mean). What is
done is not done again, so a run that was interrupted is continued by the same command. An error is
one line, and the exit status is 2 for what the user can mend and 1 for a defect.
`python -m data_prep download pubmed|codes` fetches raw files (data_prep/download.py),
`python -m data_prep verify FOLDER` checks a finished data set (data_prep/verify.py), `python -m
data_prep report FOLDER` shows what is in it (data_prep/card/report.py).
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from common.config import ConfigError, load_config
from common.files import make_private
from data_prep.config import DataPrep


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["download"]:
        from data_prep import download

        return download.main(words[1:])
    if words[:1] == ["verify"]:
        from data_prep import verify

        return verify.main(words[1:])
    if words[:1] == ["report"]:
        from data_prep.card import report

        return report.main(words[1:])
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/base.yaml"), metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(words)
    make_private()
    # A batch system ends a job by it; without an exception its workers would be left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Not before the arguments are known to be right: it takes seconds.
    from data_prep.document import InputError
    from data_prep.executors import TaskFailed
    from data_prep.pipeline import run

    try:
        manifests = run(load_config(DataPrep, "data_prep", options.config, options.overrides))
    except (ConfigError, InputError, OSError, TaskFailed) as error:
        print("error: " + "; ".join(str(error).splitlines()), file=sys.stderr)
        return 1 if isinstance(error, TaskFailed) else 2
    for folder, manifest in manifests.items():
        print(summary(folder, manifest))
    return 0


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """A few lines on a data set: documents, tokens, rows and how full they are, by source."""
    lines = [f"{'':24}{'documents':>12}{'tokens':>16}{'rows':>10}{'fill':>9}"]
    for split, content in manifest["splits"].items():
        parts = {f"{split} {source}": part for source, part in content["sources"].items()}
        for name, part in (parts | {f"{split} in all": content}).items():
            lines.append(
                f"{name:24}{part['documents']:>12,}{part['tokens']:>16,}{part['rows']:>10,}"
                f"{part['fill']:>9.2%}"
            )
    length, row_tokens = manifest["max_length"], manifest["row_tokens"]
    lines.append(f"rows of {row_tokens} tokens, documents of at most {length}")
    lines.append(f"data set: {folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
