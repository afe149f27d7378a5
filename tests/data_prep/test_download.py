"""Downloads from a server that cuts, lies, ignores and refuses: whole files or none."""

import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import download as module
from data_prep.__main__ import main
from data_prep.codes import documents
from data_prep.config import DataPrep, Download, Pubmed, describe
from data_prep.document import InputError
from data_prep.download import download
from data_prep.inputs import find_inputs

ROOT = Path(__file__).parent.parent.parent
# Longer than a server's buffers, and like no other part of itself.
CONTENT = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(20_000))
NAME = "pubmed26n0001.xml.gz"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; does for each request of a path the next of its `plan`, then what is right.

    Steps: a number of bytes (cut the connection after so many), `status:N`, `wrong` (other bytes),
    `whole` (ignore Range), `whole:N` (that, and cut after N), `shifted` (another range), `slow`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.plan: defaultdict[str, list[Any]] = defaultdict(list)
        self.seen: list[tuple[str, str | None]] = []
        self.at_once = self.most_at_once = 0
        self.holds_s = 0.0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add_pubmed(self, part: str, name: str, content: bytes) -> None:
        self.files[f"/{part}/{name}"] = content
        digest = hashlib.md5(content).hexdigest()
        self.files[f"/{part}/{name}.md5"] = f"MD5({name})= {digest}\n".encode()
        names = [path.rpartition("/")[2] for path in self.files if path.startswith(f"/{part}/")]
        links = "".join(f'<a href="{n}">{n}</a>\n' for n in [*names, "../", "README.txt"] if n)
        self.files[f"/{part}/"] = f"<html><pre>{links}</pre></html>".encode()

    def ranges(self, path: str) -> list[str | None]:
        return [wanted for seen, wanted in self.seen if seen == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Range")))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            steps = self.server.plan[self.path]
            step = steps.pop(0) if steps else "right"
        time.sleep(self.server.holds_s)
        # Not after the answer: whoever has all of it may ask again before this thread goes on.
        with self.server.lock:
            self.server.at_once -= 1
        self._answer(step)

    def _answer(self, step: Any) -> None:
        content = self.server.files.get(self.path)
        if content is None or str(step).startswith("status:"):
            self.send_response(404 if content is None else int(step.removeprefix("status:")))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if str(step).startswith("whole"):
            start, wanted = 0, None
            step = int(step.removeprefix("whole:")) if ":" in step else "whole"
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if wanted else 200)
        if wanted:
            shown = start + 1 if step == "shifted" else start
            self.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if step == "wrong":
            body = bytes(255 - byte for byte in body)
        if step == "slow":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(60)
        self.wfile.write(body[:step] if isinstance(step, int) else body)
        self.close_connection = True

    def log_message(self, format: str, *values: Any) -> None:
        """Not into the tests' output."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def _config(server: Server, raw: Path, **changes: Any) -> DataPrep:
    values = {
        "pubmed": server.address,
        "pubmed_parts": ["baseline"],
        "wait_s": 0.001,
        "tries": 3,
        "timeout_s": 5.0,
    }
    return DataPrep(raw_dir=raw, download=Download(**(values | changes)))


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _zip(content: bytes = CONTENT, name: str = "table.txt") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def test_pubmed_is_fetched_with_its_sidecars_and_once(server: Server, tmp_path: Path) -> None:
    """Baseline and updates into the folders that configurations read; nothing else that is listed.

    A second run asks for the checksums and nothing more.
    """
    server.add_pubmed("baseline", NAME, CONTENT)
    server.add_pubmed("baseline", "pubmed26n0002.xml.gz", b"second")
    server.add_pubmed("updatefiles", "pubmed26n1335.xml.gz", b"update")
    config = _config(server, tmp_path, pubmed_parts=["baseline", "updatefiles"])
    assert download("pubmed", config) == 3
    names = ["baseline/pubmed26n0001", "baseline/pubmed26n0002", "updatefiles/pubmed26n1335"]
    ends = (".xml.gz", ".xml.gz.md5")
    assert _files(tmp_path) == [f"pubmed/{name}{end}" for name in names for end in ends]
    assert (tmp_path / "pubmed" / "baseline" / NAME).read_bytes() == CONTENT
    server.seen.clear()
    assert download("pubmed", config) == 0
    assert all(path.endswith((".md5", "/")) for path, _ in server.seen)


def test_a_cut_connection_is_resumed_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    """Each byte is sent once, however often the connection is cut."""
    server.add_pubmed("baseline", NAME, CONTENT)
    server.plan[f"/baseline/{NAME}"] = [100_000, 50_000, 200_000, 0, 1]
    server.plan[f"/baseline/{NAME}.md5"] = [5]
    server.plan["/baseline/"] = ["status:503", 10]
    assert download("pubmed", _config(server, tmp_path)) == 1
    assert (tmp_path / "pubmed" / "baseline" / NAME).read_bytes() == CONTENT
    assert server.ranges(f"/baseline/{NAME}") == [
        None,
        *(f"bytes={n}-" for n in (100_000, 150_000, 350_000, 350_000, 350_001)),
    ]


def test_a_later_run_goes_on_with_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    """Tries are bounded; then nothing is there under the file's name, and the part is kept."""
    server.add_pubmed("baseline", NAME, CONTENT)
    server.plan[f"/baseline/{NAME}"] = [1000, 0, 0, 0]
    with pytest.raises(InputError, match=rf"{NAME}: the connection was cut after 1000 .* 3 times"):
        download("pubmed", _config(server, tmp_path))
    assert _files(tmp_path) == [f"pubmed/baseline/.{NAME}.part"]
    server.plan.clear()
    server.seen.clear()
    assert download("pubmed", _config(server, tmp_path)) == 1
    assert server.ranges(f"/baseline/{NAME}") == ["bytes=1000-"]
    assert (tmp_path / "pubmed" / "baseline" / NAME).read_bytes() == CONTENT


def test_a_whole_part_only_needs_its_name(server: Server, tmp_path: Path) -> None:
    """Killed between the last byte and the renaming: the server says there is no more."""
    server.add_pubmed("baseline", NAME, CONTENT)
    folder = tmp_path / "pubmed" / "baseline"
    folder.mkdir(parents=True)
    (folder / f".{NAME}.part").write_bytes(CONTENT)
    assert download("pubmed", _config(server, tmp_path)) == 1
    assert server.ranges(f"/baseline/{NAME}") == [f"bytes={len(CONTENT)}-"]
    assert (folder / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("step", ["whole", "shifted"])
def test_a_server_that_does_not_resume(server: Server, tmp_path: Path, step: str) -> None:
    """One that ignores Range sends all of it; one that sends another range is not believed."""
    server.add_pubmed("baseline", NAME, CONTENT)
    server.plan[f"/baseline/{NAME}"] = [1000, step]
    assert download("pubmed", _config(server, tmp_path)) == 1
    assert (tmp_path / "pubmed" / "baseline" / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("steps", [[1000, 0, 0], [1000, "whole:1000", "whole:900"]])
def test_a_server_that_brings_nothing_new_is_given_up(
    server: Server, tmp_path: Path, steps: list[Any]
) -> None:
    """After so many tries in a row; the same first bytes once more are nothing new."""
    server.files["/table.zip"] = _zip()
    server.plan["/table.zip"] = [*steps, "status:500"]
    config = _config(server, tmp_path, codes=[f"{server.address}/table.zip"])
    with pytest.raises(InputError, match=r"the connection was cut .* 3 times in a row"):
        download("codes", config)
    assert len(server.ranges("/table.zip")) == 3


def test_wrong_bytes_are_fetched_again_and_never_kept(server: Server, tmp_path: Path) -> None:
    """By the MD5; three times wrong is enough."""
    server.add_pubmed("baseline", NAME, CONTENT)
    server.plan[f"/baseline/{NAME}"] = ["wrong", "wrong"]
    assert download("pubmed", _config(server, tmp_path)) == 1
    assert (tmp_path / "pubmed" / "baseline" / NAME).read_bytes() == CONTENT
    other = tmp_path / "other"
    server.plan[f"/baseline/{NAME}"] = ["wrong"] * 3
    with pytest.raises(InputError, match=rf"{NAME}: what was fetched 3 times has another MD5"):
        download("pubmed", _config(server, other))
    assert _files(other) == []


def test_a_part_of_another_file_is_noticed(server: Server, tmp_path: Path) -> None:
    """Longer or shorter than the file: the checks fail, and it is begun again."""
    server.add_pubmed("baseline", NAME, CONTENT)
    for left in (b"x" * 1000, b"x" * (len(CONTENT) + 5)):
        folder = tmp_path / str(len(left)) / "pubmed" / "baseline"
        folder.mkdir(parents=True)
        (folder / f".{NAME}.part").write_bytes(left)
        assert download("pubmed", _config(server, tmp_path / str(len(left)))) == 1
        assert (folder / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "step", "message", "requests"),
    [
        (f"/baseline/{NAME}", "status:404", f"{NAME}: the server answers 404 .*address", 1),
        (f"/baseline/{NAME}", "status:403", f"{NAME}: the server answers 403", 1),
        (f"/baseline/{NAME}", "status:503", f"{NAME}: the server answers 503 .* 3 times", 3),
        (f"/baseline/{NAME}.md5", "status:404", rf"{NAME}\.md5: the server answers 404", 1),
        ("/baseline/", "status:404", "baseline/: the server answers 404", 1),
    ],
)
def test_refusals(
    server: Server, tmp_path: Path, path: str, step: str, message: str, requests: int
) -> None:
    """What will not change is asked for once; what may change, a bounded number of times."""
    server.add_pubmed("baseline", NAME, CONTENT)
    server.plan[path] = [step] * 10
    with pytest.raises(InputError, match=message):
        download("pubmed", _config(server, tmp_path))
    assert len(server.ranges(path)) == requests
    assert _files(tmp_path) == []


def test_a_file_that_fails_does_not_keep_the_others_away(server: Server, tmp_path: Path) -> None:
    """They are fetched, the error names the one, and a second run fetches only it."""
    for number in range(1, 5):
        server.add_pubmed("baseline", f"pubmed26n000{number}.xml.gz", CONTENT[:number])
    server.plan["/baseline/pubmed26n0002.xml.gz"] = ["status:404"]
    with pytest.raises(InputError, match=r"1 of 4 files .*pubmed26n0002\.xml\.gz.*404"):
        download("pubmed", _config(server, tmp_path))
    assert len(_files(tmp_path)) == 6
    assert download("pubmed", _config(server, tmp_path)) == 1
    assert len(_files(tmp_path)) == 8


def test_when_everything_fails_it_ends_soon(server: Server, tmp_path: Path) -> None:
    """Not a thousand times the patience for one file."""
    for number in range(1, 60):
        server.add_pubmed("baseline", f"pubmed26n{number:04d}.xml.gz", b"x")
        server.plan[f"/baseline/pubmed26n{number:04d}.xml.gz"] = ["status:404"]
    with pytest.raises(InputError, match="5 of 59 files"):
        download("pubmed", _config(server, tmp_path))
    assert sum(path.endswith(".gz") for path, _ in server.seen) < 30


def test_parallel_downloads_are_bounded(server: Server, tmp_path: Path) -> None:
    """Never more connections than `parallel`."""
    for number in range(1, 13):
        server.add_pubmed("baseline", f"pubmed26n{number:04d}.xml.gz", CONTENT)
    server.holds_s = 0.02
    assert download("pubmed", _config(server, tmp_path, parallel=2)) == 12
    assert server.most_at_once == 2


def test_a_changed_checksum_fetches_the_file_again(server: Server, tmp_path: Path) -> None:
    """NLM replaces a file now and then; a file without its sidecar is compared by its content."""
    server.add_pubmed("baseline", NAME, CONTENT)
    config = _config(server, tmp_path)
    download("pubmed", config)
    sidecar = tmp_path / "pubmed" / "baseline" / f"{NAME}.md5"
    sidecar.unlink()
    assert download("pubmed", config) == 0
    assert sidecar.is_file()
    server.add_pubmed("baseline", NAME, CONTENT[::-1])
    assert download("pubmed", config) == 1
    assert (tmp_path / "pubmed" / "baseline" / NAME).read_bytes() == CONTENT[::-1]
    assert hashlib.md5(CONTENT[::-1]).hexdigest() in sidecar.read_text()


def test_codes_are_fetched_as_zips_and_read(server: Server, tmp_path: Path) -> None:
    """Under the last part of their addresses; a zip that is not whole is never kept."""
    order = f"00001 A00     0 {'Cholera':<60} Cholera\r\n".encode()
    where = "/files/zip/2026-code-descriptions.zip?v=1"
    server.files[where] = _zip(order, "icd10cm_order_2026.txt")
    server.plan[where] = ["wrong", 60]
    config = _config(server, tmp_path, codes=[f"{server.address}{where}"])
    assert download("codes", config) == 1
    path = tmp_path / "codes" / "2026-code-descriptions.zip"
    assert [d.id for d in documents(path, "icd10cm")] == ["icd10cm-A00"]
    assert download("codes", config) == 0
    server.files["/page.zip"] = b"<html>Please accept our terms</html>"
    config = _config(server, tmp_path, codes=[f"{server.address}/page.zip"])
    with pytest.raises(InputError, match=r"page\.zip: what was fetched 3 times is not a whole zip"):
        download("codes", config)
    assert _files(tmp_path) == ["codes/2026-code-descriptions.zip"]


def test_what_cannot_be_checked_is_not_resumed(server: Server, tmp_path: Path) -> None:
    """A part of a plain file may be of another edition."""
    server.files["/table.txt"] = CONTENT
    folder = tmp_path / "codes"
    folder.mkdir()
    (folder / ".table.txt.part").write_bytes(b"another edition")
    assert download("codes", _config(server, tmp_path, codes=[f"{server.address}/table.txt"])) == 1
    assert (folder / "table.txt").read_bytes() == CONTENT


def test_a_full_disk_is_an_error_and_leaves_no_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of the network: not tried again."""
    server.add_pubmed("baseline", NAME, CONTENT)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "sync_file", full)
    with pytest.raises(OSError, match="No space left"):
        download("pubmed", _config(server, tmp_path))
    assert len(server.ranges(f"/baseline/{NAME}")) == 1
    assert _files(tmp_path) == [f"pubmed/baseline/.{NAME}.part"]


def test_a_killed_download_goes_on(server: Server, tmp_path: Path) -> None:
    """SIGKILL in the middle of a file, then the same command: the rest is fetched."""
    server.add_pubmed("baseline", NAME, CONTENT)
    server.plan[f"/baseline/{NAME}"] = ["slow"]
    command = [
        *(sys.executable, "-m", "data_prep", "download", "pubmed", "--config"),
        *("configs/base.yaml", f"raw_dir={tmp_path}", f"download.pubmed={server.address}"),
        "download.pubmed_parts=[baseline]",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    part = tmp_path / "pubmed" / "baseline" / f".{NAME}.part"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert _files(tmp_path) == [f"pubmed/baseline/.{NAME}.part"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"1 files fetched into {tmp_path / 'pubmed'}\n"
    assert (part.with_name(NAME)).read_bytes() == CONTENT
    assert (part.with_name(NAME).stat().st_mode & 0o077) == 0
    assert server.ranges(f"/baseline/{NAME}")[-1] is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["download.pubmed=ftp://ftp.ncbi.nlm.nih.gov/pubmed"], "download.pubmed: 'ftp"),
        (["download.pubmed=https://me:secret@example.org/"], "a name or a password"),
        (["download.codes=[/etc/passwd]"], "download.codes: '/etc/passwd' is no http"),
        (["download.codes=['https://example.org/']"], "names no file"),
        (["download.pubmed_parts=[../..]"], "download.pubmed_parts"),
        (["download.tries=0"], "download.tries"),
        (["download.retries=9"], "retries"),
        (["download.pubmed=http://127.0.0.1:9/", "download.tries=2"], "2 times in a row"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """They name the key or the address, and never show a password."""
    options = ["--config", str(ROOT / "configs" / "base.yaml"), f"raw_dir={tmp_path}"]
    settings = ["download.wait_s=0.01", *words]
    assert main(["download", "pubmed", *options, *settings]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "secret" not in line


def test_what_is_being_fetched_is_no_input(tmp_path: Path) -> None:
    """Neither the part of a file nor its sidecar is taken for a file by the patterns."""
    folder = tmp_path / "pubmed"
    folder.mkdir()
    for name in (f".{NAME}.part", f"{NAME}.md5", NAME):
        (folder / name).write_bytes(b"x")
    config = DataPrep(raw_dir=tmp_path, sources={"pubmed": ["pubmed/*"]}, pubmed=Pubmed())  # type: ignore[arg-type]
    assert [found.name for found in find_inputs(config)] == [f"pubmed/{NAME}"]
    assert "download" not in describe(config, 1024)
