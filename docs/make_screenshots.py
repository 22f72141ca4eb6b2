"""Pictures of the page from a quickstart's run: `python docs/make_screenshots.py runs/QUICKSTART`; needs Chromium, playwright and Pillow."""

from __future__ import annotations

import io
import shutil
import sys
import threading
from pathlib import Path

from tilt.inspect.book import books
from tilt.inspect.server import Site, serve

PLACE = Path(__file__).parent / "view"
SHOTS = {
    "overview": "view=overview", "rollout": "view=rollouts&step=20&step_at=20&row=4&token=0&side=group", "changed": "view=changed&step=20", "dark": "view=rollouts&step=40&sort=kl&channel=push",
}  # fmt: skip


def main(run: str) -> None:
    """Serve the PPO stage and take a picture of each view."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    server = serve(Site([book for book in books(Path(run)) if book.name.endswith("ppo")]), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    PLACE.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        for name, state in SHOTS.items():
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark" if name == "dark" else "light")
            page.goto(f"{server.url}#{state}")
            page.wait_for_selector("html[data-drawn]")
            page.wait_for_timeout(400)
            Image.open(io.BytesIO(page.screenshot())).quantize(48).save(PLACE / f"{name}.png", optimize=True)
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
