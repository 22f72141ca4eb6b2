"""One headless Chromium for all browser tests; without it, or without Playwright, they are skipped."""

from __future__ import annotations

import os
import shutil
import threading
from contextlib import contextmanager

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright: pip install playwright")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("browser tests need a Chromium: none on the PATH, and CHROMIUM names none")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A page of 1280 × 800 whose errors fail the test, and whose requests are kept."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    opened.errors, opened.asked = [], []
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on(
        "console",
        lambda message: (
            opened.errors.append(message.text)
            if message.type == "error" and "404" not in message.text and "422" not in message.text
            else None
        ),
    )
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("dialog", lambda dialog: (opened.errors.append("a dialog: " + dialog.message), dialog.dismiss()))
    yield opened
    errors = opened.errors
    context.close()
    assert not errors, errors


@pytest.fixture
def served():
    """A context in which a site is served; it gives the address."""
    from tilt.inspect.server import serve

    @contextmanager
    def of(site):
        server = serve(site, port=0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            server.server_close()

    return of
