"""The end of a process that runs libraries whose threads may outlive it.

The process groups of `torch.distributed` have threads of their own in C++, which end with the last
reference to their group: where a library keeps one, `destroy_process_group` does not end them. A
complete run was once seen to die of SIGABRT as it ended (`terminate called without an active
exception`). The likely cause: such a thread lets go of a tensor that Python knows, and must take
the interpreter's lock inside a function that may not throw; once the interpreter has begun to
finalise, Python 3.11 answers by unwinding the thread, and C++ ends the process. So a process with
process groups ends without finalising the interpreter, nor running C++'s static destructors.
"""

import atexit
import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_FAILED = 1
_INTERRUPTED = 130
_OUTPUT_LOST = 120


def run_and_exit(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process with what it returns, None being 0.

    What it raises ends the process as it would under Python itself: SystemExit with its own status,
    a KeyboardInterrupt with 130 and anything else with 1, their tracebacks printed. Threads that
    are no daemons are waited for, `atexit` functions run, and all output is flushed; where it
    cannot be, the status is 120 unless it is another failure's already.
    """
    status = _status_of(main)
    # All that Python does before it finalises; of this one no public name exists.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    logging.shutdown()
    if not _flush_output():
        status = status or _OUTPUT_LOST
    os._exit(status)


def _status_of(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return _FAILED
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _FAILED


def _flush_output() -> bool:
    """Write out what Python and the libraries in C still hold; whether all of it went out."""
    whole = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads the pipe any more; a closed stream
            whole = False
    return ctypes.CDLL(None).fflush(None) == 0 and whole
