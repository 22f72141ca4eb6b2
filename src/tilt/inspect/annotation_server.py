"""The page on which people label: reads the next item, takes one label at a time, on this machine alone."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from typing import Any

from tilt.errors import TiltError, UsageError
from tilt.inspect.annotation import SCORES, Labels, write_preferences
from tilt.inspect.server import Handler, Server

LARGEST = 1 << 16
PAGES = {"/": "label.html", "/page/style.css": "style.css", "/page/label.js": "label.js", "/page/parts.js": "parts.js"}


class Desk:
    """What one annotator sees: items in the order in which they are shown to them, nothing of where an answer comes from."""

    def __init__(self, labels: Labels, guide: str) -> None:
        self.labels, self.guide, self.secret, self.lock = labels, guide, secrets.token_urlsafe(16), threading.Lock()

    def state(self) -> dict[str, Any]:
        """The next item, and how far it is."""
        labels = self.labels
        item = labels.next
        shown = (
            None
            if item is None
            else {"item": item, "prompt": labels.items[item].prompt, "answers": [labels.items[item].answers[k] for k in labels.shown(item)]}
        )
        return {
            "task": labels.task, "annotator": labels.annotator, "done": len(labels.done), "all": len(labels.items), "scores": list(SCORES), "guide": self.guide, "secret": self.secret,
            "show": shown, "can_undo": bool(labels.trail),
        }  # fmt: skip

    def take(self, given: Any) -> dict[str, Any]:
        """One label, or one taken back."""
        if not isinstance(given, dict):
            raise UsageError("a label is an object")
        with self.lock:
            if given.get("undo"):
                self.labels.undo()
            else:
                seconds = given.get("seconds")
                item = given.get("item")
                if type(item) is not int:
                    raise UsageError("a label names its item")
                self.labels.say(
                    item, given.get("value"), round(float(seconds), 2) if isinstance(seconds, (int, float)) and 0 <= seconds < 1e6 else None
                )
            if self.labels.next is None:
                write_preferences(self.labels.folder, self.labels.task)
            return self.state()


class LabelServer(Server):
    """Serves one desk."""

    def __init__(self, desk: Desk, port: int) -> None:
        super().__init__(None, "127.0.0.1", port, handler=LabelHandler, pages=PAGES)
        self.desk = desk


class LabelHandler(Handler):
    """GET of the page and its state; POST of labels with the secret that only the page was told."""

    server: LabelServer

    def api(self, path: str, query: Any) -> Any:
        if path == "/api/state":
            return self.server.desk.state()
        raise UsageError(f"nothing at {path}")

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", "0"))
        except ValueError:
            length = -1
        refused = self._refused({})
        if not refused and not hmac.compare_digest(
            self.headers.get("X-Tilt", "").encode("utf-8", "replace"), self.server.desk.secret.encode()
        ):
            refused = "only the page itself may label"
        if refused or not 0 <= length <= LARGEST:
            self.close_connection = True
            self._send(403 if refused else 413, {"error": refused or "a label is short"}, True)
            return
        body = self.rfile.read(length)
        if self.path != "/api/label":
            self._send(404, {"error": f"nothing at {self.path[:80]}"}, True)
            return
        try:
            self._send(200, self.server.desk.take(json.loads(body)), True)
        except (ValueError, RecursionError):
            self._send(422, {"error": "a label is JSON"}, True)
        except TiltError as error:
            self._send(422, {"error": str(error)}, True)
