"""Files and folders that exist whole or not at all, for their owner alone, and their hashes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_OWNER_ONLY_UMASK = 0o077
_LOCK_NAME = ".lock"
_SHARED_LOCK_NAME = ".lock-tasks"
_TEMPORARY = ".tmp"


def make_private() -> None:
    """From here on this process creates files and folders that only their owner can read."""
    os.umask(_OWNER_ONLY_UMASK)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write `path` under a temporary name; it appears, complete and on disk, when the block ends.

    On an error nothing is left behind, and an OSError without a file's name, as a full disk gives
    it, gets this one's. The temporary name is fixed, so a killed writer's leftover is overwritten
    by the next try; `remove_leftovers` removes those that are not tried again.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        with _naming(path):
            temporary.touch(mode=0o600)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes `path`, complete and on disk, at the end.

    A folder already at `path` is replaced. Errors are those of `whole_file`.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True, mode=0o700)
    try:
        with _naming(path):
            yield temporary
            for path_in_it in sorted(temporary.rglob("*")):
                if path_in_it.is_dir():
                    sync_folder(path_in_it)
                else:
                    path_in_it.chmod(0o600)
                    sync_file(path_in_it)
            sync_folder(temporary)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers of whole files and folders left in `folder` and below.

    Nobody may be writing there.
    """
    for found in sorted(folder.rglob(f".*{_TEMPORARY}")):
        if found.is_dir():
            shutil.rmtree(found)
        else:
            # It may have been in a folder that is gone by now.
            found.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file the name of the one that is being written."""
    problem = None
    try:
        yield
    except OSError as error:
        if error.filename is not None or type(error) is not OSError:
            raise
        # NumPy tells of a short write without the system's error number.
        reason = error.strerror or f"{error}; is the disk full?"
        problem = OSError(error.errno or errno.EIO, reason, str(path))
    if problem is not None:
        raise problem


class FolderInUse(OSError):
    """Another process works in the folder; the message names both."""


@contextlib.contextmanager
def only_user_of(folder: Path) -> Iterator[None]:
    """Make `folder` and keep it for this process until the block ends.

    Raises FolderInUse while another process, also one of another machine where the file system
    shares its locks, does the same. A process that dies lets go; the file `.lock` stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            # A lock of the open file, not of the process: it also holds between two threads.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8").strip() or "another process"
            raise FolderInUse(
                f"{folder} is in use by {holder}; wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            raise OSError(error.errno, f"cannot lock ({error.strerror})", str(path)) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Let `wait_for_workers` of any process wait for the end of the block, or of this process."""
    with _locked(folder / _SHARED_LOCK_NAME, fcntl.LOCK_SH):
        yield


def wait_for_workers(folder: Path, notice: Callable[[], None]) -> None:
    """Return once no process is in a block of `working_in`; call `notice` before having to wait."""
    path = folder / _SHARED_LOCK_NAME
    try:
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return
    except BlockingIOError:
        notice()
    with _locked(path, fcntl.LOCK_EX):
        return


@contextlib.contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            raise
        except OSError as error:
            raise OSError(error.errno, f"cannot lock ({error.strerror})", str(path)) from None
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, whole or not at all, in a form that is the same for equal values."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """The hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def sync_file(path: Path) -> None:
    """Return once the file's content is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return once the folder's list of names is on disk (a rename is durable only then)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
