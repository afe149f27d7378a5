"""Which commit of this project runs."""

import functools
import os
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_RESULTS = "benchmarks/results"


@functools.cache
def project_commit() -> str | None:
    """`commit` of this project. Once for the process: what runs is what was read when it began."""
    return commit(_ROOT)


def commit(root: Path) -> str | None:
    """What PROJECT_COMMIT says; without it, the short hash of the commit checked out in `root`,
    "… and changes" where files differ from it, or None without git or a checkout.

    Results do not count as changes: measuring writes them.
    """
    if said := os.environ.get("PROJECT_COMMIT"):
        return said
    words = ("rev-parse", "--short=10", "HEAD")
    changed = ("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{_RESULTS}")
    # A checkout above `root` is another project's.
    if not (root / ".git").exists():
        return None
    number, changes = _git(root, *words), _git(root, *changed)
    if number is None or changes is None:
        return None
    return f"{number} and changes" if changes else number


def _git(root: Path, *words: str) -> str | None:
    """What git says, without the end of the last line; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
