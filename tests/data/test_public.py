"""Named sets are fetched whole or not at all: checked against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tilt.data import public
from tilt.data.public import SETS, File, PublicSet, get
from tilt.data.sources import load
from tilt.errors import DataError

CONTENT = b'{"text": "hello"}\n' * 5000
LICENCE = b"MIT, as shown"


def file(name: str, upstream: str, content: bytes) -> File:
    return File(name, upstream, len(content), hashlib.sha256(content).hexdigest())


TOY = PublicSet(
    "toy", "org/repo", "c0ffee", "MIT", "a test", (file("rows.jsonl", "data/rows.jsonl", CONTENT),), (file("LICENSE", "LICENSE", LICENCE),)
)


class Server:
    """Serves `pages` by path and remembers what was asked."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {"/org/repo/c0ffee/data/rows.jsonl": CONTENT, "/org/repo/c0ffee/LICENSE": LICENCE}
        self.asked: list[str] = []
        self.promise = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                page = outer.pages.get(self.path)
                self.send_response(200 if page is not None else 404)
                self.send_header("Content-Length", str(len(page or b"") + outer.promise))
                self.end_headers()
                self.wfile.write(page or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setitem(SETS, "toy", TOY)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_set_is_fetched_checked_and_readable(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILT_DATA", raising=False)
    monkeypatch.setenv("TILT_CACHE", str(tmp_path))
    said: list[str] = []
    folder = get("toy", base_url=server.url, say=said.append)
    assert folder == tmp_path / "toy"
    assert sorted(p.name for p in folder.iterdir()) == ["LICENSE", "rows.jsonl"]
    assert "licence: MIT" in "\n".join(said)
    assert len(load("toy").rows) == 5000
    before = len(server.asked)
    get("toy", base_url=server.url, say=said.append)
    assert len(server.asked) == before, "files that are right are not fetched again"
    (folder / "rows.jsonl").write_bytes(b"spoilt")
    get("toy", base_url=server.url, say=said.append)
    assert (folder / "rows.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"x", CONTENT + b"more", CONTENT[:100], b""])
def test_a_wrong_checksum_is_refused_and_nothing_is_kept(server: Server, tmp_path: Path, wrong: bytes) -> None:
    server.pages["/org/repo/c0ffee/data/rows.jsonl"] = wrong
    with pytest.raises(DataError, match=r"rows\.jsonl .*not the expected file; nothing was kept"):
        get("toy", base_url=server.url, cache=tmp_path, say=lambda _: None)
    assert list((tmp_path / "toy").iterdir()) == []


def test_a_wrong_file_does_not_replace_what_was_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "rows.jsonl").write_text("mine")
    server.pages["/org/repo/c0ffee/data/rows.jsonl"] = b"theirs"
    with pytest.raises(DataError):
        get("toy", base_url=server.url, cache=tmp_path, say=lambda _: None)
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["rows.jsonl"]
    assert (tmp_path / "toy" / "rows.jsonl").read_text() == "mine"


@pytest.mark.parametrize("fault", ["missing", "torn", "refused", "no such scheme"])
def test_a_failed_transfer_is_a_plain_error(server: Server, tmp_path: Path, fault: str) -> None:
    url = {"refused": "http://127.0.0.1:9", "no such scheme": "nowhere"}.get(fault, server.url)
    if fault == "missing":
        server.pages.clear()
    server.promise = 10 if fault == "torn" else 0
    server.pages = {path: page[:50] for path, page in server.pages.items()} if fault == "torn" else server.pages
    with pytest.raises(DataError, match=r"rows\.jsonl") as caught:
        get("toy", base_url=url, cache=tmp_path, say=lambda _: None)
    assert len(str(caught.value).splitlines()) <= 4
    assert list((tmp_path / "toy").iterdir()) == []


def test_an_unknown_set_is_an_error() -> None:
    with pytest.raises(DataError, match="did you mean 'svamp'"):
        get("svam")


def test_the_registry_is_whole() -> None:
    for name, known in SETS.items():
        assert known.name == name and known.licence and known.purpose and known.files
        assert len(known.commit) == 40 and int(known.commit, 16)
        for each in known.everything:
            assert each.bytes > 0 and len(each.sha256) == 64 and int(each.sha256, 16)
        assert known.papers, "every set brings its licence, or the readme that states it"
    assert public.cache_directory().is_absolute() or "TILT_CACHE" in __import__("os").environ


@pytest.mark.parametrize("name", SETS)
def test_the_registry_agrees_with_the_record_of_the_data(name: str, tilt_data) -> None:
    folder = tilt_data(name)
    record = json.loads((folder / "SOURCE.json").read_text())
    known = {each["file"]: (each["from"], each["bytes"], each["sha256"]) for each in record["files"]}
    assert record["repository"] == f"github.com/{SETS[name].repository}"
    assert record["commit"].split()[0] == SETS[name].commit
    for each in SETS[name].everything:
        assert known[each.name] == (each.upstream, each.bytes, each.sha256)
        assert hashlib.sha256((folder / each.name).read_bytes()).hexdigest() == each.sha256
