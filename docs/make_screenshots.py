"""Pictures of the page: `python docs/make_screenshots.py runs/QUICKSTART comparison.json runs/TOO_FAR` (docs/view.md has the command of the last); needs Chromium, playwright and Pillow."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from tilt.inspect.annotation import Item, Labels, write_items
from tilt.inspect.annotation_server import Desk, LabelServer
from tilt.inspect.book import books
from tilt.inspect.server import Site, serve
from tilt.tasks import manners

PLACE = Path(__file__).parent / "view"
SHOTS = {
    "overview": "view=overview", "rollout": "view=rollouts&step=20&step_at=20&row=4&token=0&side=group", "changed": "view=changed&step=20", "dark": "view=rollouts&step=40&sort=kl&channel=push", "compare": "view=compare", "about": "view=about", "too_far": "run=1&view=changed&step=60",
}  # fmt: skip


def main(run: str, comparison: str, too_far: str) -> None:
    """Serve the PPO stage, a comparison and a run trained too far, and take a picture of each view; then of the desk of `tilt label`."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    server = serve(
        Site(
            [*(book for book in books(Path(run)) if book.name.endswith("ppo")), *books(Path(too_far))],
            [json.loads(Path(comparison).read_text())],
        ),
        port=0,
    )
    folder = Path(tempfile.mkdtemp())
    pairs = list(manners.Manners().pairs(held_out=True))[:9]
    write_items(folder, [Item(row["prompt"], (row["chosen"], row["rejected"])) for row in pairs], {"task": "pair"})
    desk = LabelServer(Desk(Labels.open(folder, "ann", "pair"), "Choose the kinder answer."), 0)
    threading.Thread(target=desk.serve_forever, daemon=True).start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    PLACE.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        for name, state in {**SHOTS, "label": ""}.items():
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark" if name == "dark" else "light")
            page.goto(f"{server.url}#{state}" if state else desk.url)
            page.wait_for_selector("html[data-drawn]" if state else "html[data-item]")
            page.wait_for_timeout(400)
            Image.open(io.BytesIO(page.screenshot())).quantize(48).save(PLACE / f"{name}.png", optimize=True)
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:4])
