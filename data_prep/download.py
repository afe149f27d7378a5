"""Fetch what is public: `python -m data_prep download pubmed|codes [--config FILE] [key=value …]`.

    pubmed   PubMed's baseline and update files with their .md5, into raw_dir/pubmed/<part>/
    codes    CMS's zips of ICD-10-CM, ICD-10-PCS, ICD-9-CM and HCPCS, into raw_dir/codes/

The keys are `raw_dir` and those of `download:` in data_prep/config.py. The default addresses are
the published ones: NLM's public server over HTTPS, and the files that CMS's pages link to. CMS
publishes a new file each year or quarter under a new name: correct `download.codes` when one is
gone. LOINC, RxNorm and MIMIC need an account with their publishers and are not fetched here
(docs/data.md says how); no name or password is ever asked for, and an address may hold none.

A file appears under its name only when it is whole and checked: PubMed's by its .md5, a zip by the
checksums inside it. Until then its bytes are in `.<name>.part`, and an interrupted transfer goes on
where it stopped, in this run or the next. What is there is not fetched again, unless PubMed's .md5
has changed. A file without any check is not resumed but begun again.
"""

import argparse
import http.client
import re
import sys
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import cast
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from common.config import ConfigError, load_config
from common.files import file_hash, make_private, sync_file, sync_folder, whole_file
from data_prep.config import DataPrep, Download
from data_prep.document import InputError
from data_prep.pubmed import md5_of_sidecar

_LISTED = re.compile(r'href="(pubmed\d\dn\d{4,}\.xml\.gz)"')
_SPAN = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_CHUNK = 2**20
_LONGEST_WAIT_S = 60.0
_LARGEST_TEXT = 16 * 2**20
# Wrong bytes, or a file that fails for good, are not worth more patience than this.
_WRONG_CONTENTS = 3
_FAILED_FILES = 5
_AGAIN_LATER = {408, 425, 429, 500, 502, 503, 504}
_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class _InterruptedError(Exception):
    """A transfer that may be tried again. wait_s: as the server asks for, or 0."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Remote:
    """A file to fetch. has_md5: whether `<address>.md5` says what its MD5 is."""

    address: str
    path: Path
    has_md5: bool


class Downloader:
    """Fetches files, a bounded number at a time. `fetch_all` is the last that one does."""

    def __init__(self, settings: Download) -> None:
        self.settings = settings
        self._stop = threading.Event()

    def listed(self, address: str, folder: Path) -> list[Remote]:
        """The PubMed files that the page at `address` lists, in NLM's order."""
        address = address.rstrip("/") + "/"
        names = sorted(set(_LISTED.findall(self.text(address))))
        if not names:
            raise InputError(
                f"{address} lists no file such as pubmed26n0001.xml.gz; correct download.pubmed or "
                "download.pubmed_parts"
            )
        return [Remote(urljoin(address, name), folder / name, True) for name in names]

    def fetch_all(self, files: list[Remote]) -> int:
        """Fetch what is not there yet; returns how many files were.

        Goes on with the others when one fails, up to a few; then raises InputError.
        """
        fetched, problems = 0, []
        with (
            ThreadPoolExecutor(self.settings.parallel) as pool,
            tqdm(total=len(files), desc="download", unit="file", mininterval=0.5) as progress,
        ):
            pending = [pool.submit(self.fetch, file) for file in files]
            try:
                for future in as_completed(pending):
                    try:
                        fetched += future.result()
                    except InputError as error:
                        problems.append(str(error))
                        if len(problems) == _FAILED_FILES:
                            break
                    progress.update()
            finally:
                # Threads that wait or read would keep the process from ending.
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if problems:
            raise InputError(
                f"{len(problems)} of {len(files)} files could not be fetched; run the command again"
                f" to go on, what is there is kept: {'; '.join(problems)}"
            )
        return fetched

    def fetch(self, file: Remote) -> bool:
        """Fetch one file, unless it is there; returns whether it was fetched.

        Raises InputError when it is not on the server, or after too many tries.
        """
        sidecar = file.path.with_name(f"{file.path.name}.md5")
        content = self.text(f"{file.address}.md5") if file.has_md5 else ""
        md5 = md5_of_sidecar(content) if file.has_md5 else None
        if file.has_md5 and md5 is None:
            raise InputError(
                f"{file.address}.md5 holds no MD5; correct the address, or try again later"
            )
        file.path.parent.mkdir(parents=True, exist_ok=True)
        if file.path.is_file() and self._is_current(file.path, sidecar, md5):
            _write_sidecar(sidecar, content)
            return False
        part = file.path.with_name(f".{file.path.name}.part")
        self._fetch_part(file.address, part, md5)
        sync_file(part)
        # Without its old sidecar a new file is never taken for a damaged one.
        sidecar.unlink(missing_ok=True)
        part.replace(file.path)
        sync_folder(file.path.parent)
        _write_sidecar(sidecar, content)
        return True

    def text(self, address: str) -> str:
        """A small text file or page."""
        texts: list[bytes] = []

        def read() -> None:
            with self._open(address, 0) as answer:
                content = answer.read(_LARGEST_TEXT)
            length = answer.headers.get("Content-Length")
            if length is not None and len(content) < min(int(length), _LARGEST_TEXT):
                raise _InterruptedError(f"the connection was cut after {len(content)} bytes")
            texts.append(content)

        self._insist(address, read)
        return texts[0].decode("utf-8", errors="replace")

    @staticmethod
    def _is_current(path: Path, sidecar: Path, md5: str | None) -> bool:
        if md5 is None:
            return True
        if sidecar.is_file():
            known = md5_of_sidecar(sidecar.read_text(encoding="utf-8", errors="replace"))
            return known == md5
        return file_hash(path, "md5") == md5

    def _fetch_part(self, address: str, part: Path, md5: str | None) -> None:
        """Fill `part` until it holds what it should."""
        is_zip = part.name.endswith(".zip.part")
        if md5 is None and not is_zip:
            part.unlink(missing_ok=True)
        for _ in range(_WRONG_CONTENTS):
            self._insist(address, partial(self._append, address, part), partial(_size, part))
            if md5 is None:
                is_right = not is_zip or _is_whole_zip(part)
            else:
                is_right = file_hash(part, "md5") == md5
            if is_right:
                return
            part.unlink()
        what = "is not a whole zip" if md5 is None else f"has another MD5 than {md5}"
        raise InputError(
            f"{address}: what was fetched {_WRONG_CONTENTS} times {what}; try again later, or "
            "correct the address"
        )

    def _insist(
        self, address: str, attempt: Callable[[], None], reached: Callable[[], int] = lambda: 0
    ) -> None:
        """Try until it succeeds, at most `tries` times in a row without getting further.

        reached: how many bytes are there after an attempt.
        """
        failures, furthest = 0, reached()
        while not self._stop.is_set():
            try:
                attempt()
                return
            except (_InterruptedError, *_NETWORK) as error:
                failures = 1 if reached() > furthest else failures + 1
                furthest = max(furthest, reached())
                if failures >= self.settings.tries:
                    raise InputError(
                        f"{address}: {_describe(error)}, {failures} times in a row; try again "
                        "later, or correct the address"
                    ) from None
                wait_s = self.settings.wait_s * 2.0 ** (failures - 1)
                wait_s = max(wait_s, getattr(error, "wait_s", 0.0))
            self._stop.wait(min(wait_s, _LONGEST_WAIT_S))
        raise InputError(f"{address}: stopped, because others failed")

    def _append(self, address: str, part: Path) -> None:
        """Add to `part` what it lacks, from its end on where the server can."""
        start = _size(part)
        with self._open(address, start) as answer:
            if answer.status == http.client.PARTIAL_CONTENT:
                span = _SPAN.fullmatch(answer.headers.get("Content-Range", ""))
                if span is None or int(span[1]) != start:
                    part.unlink(missing_ok=True)
                    raise _InterruptedError("the server answered with another range")
                total = None if span[2] == "*" else int(span[2])
            elif answer.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                # All of it is there already, or it belongs to another file.
                if answer.headers.get("Content-Range", "") == f"bytes */{start}":
                    return
                part.unlink(missing_ok=True)
                raise _InterruptedError("the server has less than is here")
            else:
                start = 0
                length = answer.headers.get("Content-Length")
                total = None if length is None else int(length)
            with part.open("ab" if start else "wb") as file:
                while chunk := answer.read1(_CHUNK):
                    file.write(chunk)
                    if self._stop.is_set():
                        raise _InterruptedError("stopped")
        if total is not None and _size(part) != total:
            raise _InterruptedError(f"the connection was cut after {_size(part)} of {total} bytes")

    def _open(self, address: str, start: int) -> http.client.HTTPResponse:
        """The server's answer to a request for the file from byte `start` on."""
        headers = {"User-Agent": "clinical-modernbert", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(address, headers=headers)
        try:
            answer = urllib.request.urlopen(request, timeout=self.settings.timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
                return cast(http.client.HTTPResponse, error)
            with error:
                if error.code not in _AGAIN_LATER:
                    raise InputError(
                        f"{address}: the server answers {error.code} {error.reason}; correct the "
                        "address, its publisher may have moved the file"
                    ) from None
                wait = error.headers.get("Retry-After", "")
                raise _InterruptedError(
                    f"the server answers {error.code} {error.reason}",
                    wait_s=float(wait) if wait.isdecimal() else 0.0,
                ) from None
        return cast(http.client.HTTPResponse, answer)


def download(what: str, config: DataPrep) -> int:
    """Fetch `pubmed` or `codes`; returns how many files were fetched.

    Raises ConfigError for a key, InputError for what cannot be fetched.
    """
    settings = config.download
    _check(settings)
    downloader = Downloader(settings)
    if what == "pubmed":
        files = [
            file
            for part in settings.pubmed_parts
            for file in downloader.listed(
                urljoin(settings.pubmed.rstrip("/") + "/", part), config.raw_dir / what / part
            )
        ]
    else:
        folder = config.raw_dir / what
        files = [
            Remote(address, folder / PurePosixPath(urlsplit(address).path).name, False)
            for address in settings.codes
        ]
    return downloader.fetch_all(files)


def _check(settings: Download) -> None:
    for key, address in [
        ("pubmed", settings.pubmed),
        *(("codes", address) for address in settings.codes),
    ]:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"download.{key}: {address!r} is no http or https address")
        if parts.username or parts.password:
            raise ConfigError(
                f"download.{key}: the address at {parts.hostname} holds a name or a password; take "
                "it out, everything that is fetched here is public"
            )
        if key == "codes" and not PurePosixPath(parts.path).name:
            raise ConfigError(f"download.codes: {address!r} names no file")
    for part in settings.pubmed_parts:
        if not re.fullmatch(r"[\w-]+", part):
            raise ConfigError(f"download.pubmed_parts: {part!r} is no folder of the server")
    for key, value in {
        "parallel": settings.parallel,
        "tries": settings.tries,
        "timeout_s": settings.timeout_s,
    }.items():
        if value <= 0:
            raise ConfigError(f"download.{key} is {value}; it must be positive")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_whole_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        return False


def _write_sidecar(path: Path, content: str) -> None:
    if content and not (path.is_file() and path.read_text(encoding="utf-8") == content):
        with whole_file(path) as file:
            file.write(content.encode())


def _describe(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("pubmed", "codes"))
    parser.add_argument("--config", type=Path, default=Path("configs/base.yaml"), metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    # `parse_args` takes no words after an option once it has had the first.
    options = parser.parse_intermixed_args(arguments)
    make_private()
    try:
        config = load_config(DataPrep, "data_prep", options.config, options.overrides)
        fetched = download(options.what, config)
    except (ConfigError, InputError, OSError) as error:
        print("error: " + "; ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the command again to go on", file=sys.stderr)
        return 130
    print(f"{fetched} files fetched into {config.raw_dir / options.what}")
    return 0
