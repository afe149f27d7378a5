"""A process ends as under Python itself, but for the interpreter's finalisation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    program = f"from common.process import run_and_exit\n{code}\nrun_and_exit(main)\n"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=buffered, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("pass", 0, ""),
        ("return 2", 2, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('said')", 1, "said\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt\n"),
        ("import sys; sys.stdout.close()", 120, ""),
    ],
)
def test_the_status_is_that_of_python(body: str, status: int, error: str) -> None:
    done = run(f"def main():\n    {body}")
    assert done.returncode == status, done.stderr
    assert done.stderr.endswith(error)
    assert ("Traceback" in done.stderr) == error.endswith(("wrong\n", "Interrupt\n"))


def test_nothing_that_was_written_is_lost() -> None:
    done = run(
        "import atexit, ctypes, sys, threading, time\n"
        "def main():\n"
        "    atexit.register(print, 'at exit')\n"
        "    threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
        "    ctypes.CDLL(None).printf(b'from C\\n')\n"
        "    print('x' * 200_000)\n"
        "    print('to stderr', end='', file=sys.stderr)\n"
        "    return 2"
    )
    assert done.returncode == 2
    assert done.stderr == "to stderr"
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert set(lines) == {"x" * 200_000, "from C", "thread", "at exit"}


@pytest.mark.parametrize(("ending", "status"), [("run_and_exit(main)", 0), ("main()", -6)])
def test_the_interpreter_is_not_finalised(ending: str, status: int) -> None:
    """What aborts a process as Python finalises does not; left to Python the same one dies."""
    program = (
        "import builtins, os\n"
        "from common.process import run_and_exit\n"
        "class AbortsLate:\n"
        "    abort = os.abort\n"
        "    def __del__(self):\n"
        "        self.abort()\n"
        "def main():\n"
        "    builtins.late = AbortsLate()\n"
        f"{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert done.returncode == status
