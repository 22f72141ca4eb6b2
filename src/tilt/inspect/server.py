"""The page over HTTP on this machine alone: read-only, for names that are this machine's, from files of a fixed list."""

from __future__ import annotations

import gzip
import hmac
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tilt import __version__
from tilt.errors import DataError, TiltError, UsageError
from tilt.inspect.book import Book

PORT = 8077
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
KINDS = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
MODULES = ("main", "data", "colour", "charts", "listing", "rollout", "changes", "compare", "about", "parts")
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: its own files, and the import map inside it."""


def asset(name: str) -> bytes:
    """A file of the page."""
    return resources.files("tilt.inspect").joinpath("page").joinpath(*name.split("/")).read_bytes()


ASSETS = {"/": "index.html", "/page/style.css": "style.css", "/page/uPlot.js": "vendor/uPlot.js", "/page/uPlot.css": "vendor/uPlot.css"} | {
    f"/page/{name}.js": f"{name}.js" for name in MODULES
}


class Site:
    """What is shown: runs, and comparisons of checkpoints. `again` looks for runs once more: a new one joins the end, so that numbers stay."""

    def __init__(
        self, books: Sequence[Book], comparisons: Sequence[Mapping[str, Any]] = (), again: Callable[[], Sequence[Book]] | None = None
    ) -> None:
        self.books, self.comparisons, self.again = list(books), list(comparisons), again
        self._lock = Lock()

    def answer(self, path: str, query: Mapping[str, str]) -> Any:
        """The JSON of an address under /api; a UsageError where there is none."""
        parts = [part for part in path.split("/") if part][1:]
        match parts:
            case ["runs"]:
                return self.listing()
            case ["comparisons", number]:
                return _at(self.comparisons, number, "comparison")
            case ["runs", number, *rest]:
                return self._of(_at(self.books, number, "run"), rest, query)
        raise UsageError(f"nothing at {path}")

    def listing(self) -> dict[str, Any]:
        """The runs and comparisons by name, with the runs that began since."""
        if self.again is not None:
            with self._lock:
                known = {book.path for book in self.books}
                self.books += [book for book in self.again() if book.path not in known]
        return {
            "version": __version__,
            "runs": [{"id": i, "name": book.name, "path": str(book.path)} for i, book in enumerate(self.books)],
            "comparisons": [{"id": i, "name": f"{each.get('a')} | {each.get('b')}"} for i, each in enumerate(self.comparisons)],
        }

    def _of(self, book: Book, rest: Sequence[str], query: Mapping[str, str]) -> Any:
        match list(rest):
            case []:
                return book.header()
            case ["metrics"]:
                return book.metrics(_whole(query.get("after", "0")))
            case ["steps"]:
                return book.steps()
            case ["rows"]:
                return book.summaries(_steps(query.get("steps", "")))
            case ["search"]:
                return book.search(query.get("q", ""), _steps(query.get("steps", "")))
            case ["rollouts", step, row]:
                return book.rows(_whole(step)).detail(_whole(row))
            case ["siblings", step, row]:
                rows = book.rows(_whole(step))
                if not 0 <= _whole(row) < rows.count:
                    raise DataError(f"step {step} has rows 0 to {rows.count - 1}, and no row {row}")
                return rows.siblings(_whole(row))
            case ["same", step, row]:
                return book.same(_whole(step), _whole(row))
            case ["changed", step]:
                return book.changed(_whole(step))
        raise UsageError(f"a run has nothing at {'/'.join(rest)}")


def _at(items: Sequence[Any], number: str, what: str) -> Any:
    place = _whole(number)
    if place >= len(items):
        raise UsageError(f"there is no {what} {place}")
    return items[place]


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text):
        raise UsageError(f"{text[:40]!r} is no number")
    return int(text)


def _steps(text: str) -> list[int]:
    return [_whole(part) for part in text.split(",") if part][:100_000]


class Server(ThreadingHTTPServer):
    """Listens on one address; `names` are the hosts that a request may name, `token` what its address must hold, where that is wanted."""

    daemon_threads = True

    def __init__(
        self, site: Site | None, host: str, port: int, token: str = "", *, handler: type[BaseHTTPRequestHandler] | None = None,
        pages: Mapping[str, str] = ASSETS,
    ) -> None:  # fmt: skip
        super().__init__((host, port), handler or Handler)
        bound = self.server_address[1]
        hosts = LOOPBACK if host in ("127.0.0.1", "localhost") else (*LOOPBACK, host)
        self.site, self.token, self.pages = site, token, pages
        self.names = {f"{name}:{bound}" for name in hosts}
        self.url = f"http://{host}:{bound}/" + (f"?token={token}" if token else "")
        self.open_to_all = host not in ("127.0.0.1", "localhost")


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "tilt"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer(send=True)

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def _answer(self, *, send: bool) -> None:
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        refused = self._refused(query)
        if refused:
            self._send(403, {"error": refused}, send)
            return
        if address.path in self.server.pages:
            name = self.server.pages[address.path]
            self._reply(200, KINDS[name.rpartition(".")[2]], asset(name), send)
            return
        try:
            self._send(200, self.api(address.path, query), send)
        except UsageError as error:
            self._send(404, {"error": str(error)}, send)
        except TiltError as error:
            self._send(422, {"error": str(error)}, send)
        except (BrokenPipeError, ConnectionError):
            return
        except Exception as error:  # a damaged file must not end the server
            self._send(500, {"error": f"{type(error).__name__}: {str(error)[:300]}"}, send)

    def api(self, path: str, query: Mapping[str, str]) -> Any:
        """What an address under /api gives."""
        assert self.server.site is not None
        return self.server.site.answer(path, query)

    def _refused(self, query: Mapping[str, str]) -> str:
        """Why a request is not answered: it names another host, comes from another page, or lacks the token."""
        if self.headers.get("Host", "") not in self.server.names and not (self.server.open_to_all and self.server.token):
            return "this page answers to the names of this machine only"
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] not in self.server.names | {self.headers.get("Host", "")}:
            return "another page may not read this one"
        if self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            return "another page may not read this one"
        if self.server.token:
            cookie = re.search(r"(?:^|;\s*)tilt=([\w-]+)", self.headers.get("Cookie", ""))
            given = query.get("token") or (cookie[1] if cookie else "")
            if not hmac.compare_digest(given.encode(), self.server.token.encode()):
                return "the address lacks its token"
        return ""

    def _send(self, status: int, value: Any, send: bool) -> None:
        body = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
        self._reply(status, "application/json; charset=utf-8", body, send)

    def _reply(self, status: int, kind: str, body: bytes, send: bool) -> None:
        tag = f'"{blake2b(body, digest_size=8).hexdigest()}"'
        if status == 200 and self.headers.get("If-None-Match") == tag:
            status, body = 304, b""
        squeeze = len(body) > 1024 and "gzip" in self.headers.get("Accept-Encoding", "")
        body = gzip.compress(body, 3) if squeeze else body
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("ETag", tag), ("Cache-Control", "no-cache"),
            ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"), ("Cross-Origin-Resource-Policy", "same-origin"), ("Cross-Origin-Opener-Policy", "same-origin"),
        ):  # fmt: skip
            self.send_header(name, value)
        if squeeze:
            self.send_header("Content-Encoding", "gzip")
        if self.server.token:
            self.send_header("Set-Cookie", f"tilt={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
        self.end_headers()
        if send and status != 304:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the terminal."""


def serve(site: Site, *, host: str = "127.0.0.1", port: int | None = None) -> Server:
    """A server that listens: on `port` (0: any free one), by default on 8077 or the next that is free. Other addresses than this machine's get a token."""
    token = "" if host in ("127.0.0.1", "localhost") else secrets.token_urlsafe(16)
    tried: Callable[[int], Server] = lambda number: Server(site, host, number, token)
    if port is not None:
        try:
            return tried(port)
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot listen on {host}:{port}: {error}\n  choose another --port, or leave it out") from None
    for number in range(PORT, PORT + 100):
        try:
            return tried(number)
        except OSError:
            continue
    raise UsageError(f"no free port from {PORT} to {PORT + 99} on {host}\n  choose one: --port N")
