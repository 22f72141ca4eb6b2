"""Keys, clicks and choices at random, on runs of every kind: nothing fails, nothing is asked that is not there, nothing shows `undefined`."""

from __future__ import annotations

import contextlib
import random

import pytest
from made_runs import answers_of, make_run, step_file

from tilt.inspect.book import Book
from tilt.inspect.server import Site

KEYS = [*"jjkknpgsiorcat123456789?/", "Escape", "Enter", "ArrowRight", "ArrowDown", "ArrowUp", "Tab", "Home", "End"]
CLICKED = "button:visible, #tabs a:visible, .row, .token, .u-over, summary"


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_that_a_person_does_breaks_the_page(page, served, tmp_path, seed):
    playwright = pytest.importorskip("playwright.sync_api")
    place, chance = tmp_path / "runs", random.Random(seed)
    runs = [make_run(place / "full", steps=4), make_run(place / "other", steps=2, every=7), make_run(place / "pairs", steps=0)]
    step_file(runs[1] / "rollouts", 30, answers_of(30, 5), channels=False)
    head = "the answer to this question of yours is a number, and it is "
    pairs = [
        {"prompt": f"q{i // 2}", "completion": head + str(i), "reward": float(i), "group": i // 2, "role": ("chosen", "rejected")[i % 2]}
        for i in range(8)
    ]
    step_file(runs[2] / "rollouts", 3, pairs)
    (runs[2] / "rollouts" / "step_000004.parquet").write_bytes(b"PAR1 and no more")
    refused: list[str] = []
    page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 and "/4" not in answer.url else None)
    with served(Site([Book(run) for run in runs])) as url:
        page.goto(url)
        page.wait_for_selector("html[data-drawn]")
        done: list[str] = []
        for _ in range(160):
            kind = chance.random()
            with contextlib.suppress(
                playwright.Error, IndexError
            ):  # what was there a moment ago is gone: the page is drawn anew, or was left
                if kind < 0.4:
                    done.append(chance.choice(KEYS))
                    page.keyboard.press(done[-1])
                elif kind < 0.75:
                    node = chance.choice(page.query_selector_all(CLICKED))
                    done.append(f"click {node.inner_text()[:20]!r}")
                    if "save view" not in done[-1]:
                        node.click(timeout=500, force=True)
                elif kind < 0.93 and (choices := page.query_selector_all("select:visible")):
                    node = chance.choice(choices)
                    done.append(f"choose {chance.choice(node.query_selector_all('option')).get_attribute('value')}")
                    node.select_option(done[-1].removeprefix("choose "), timeout=500)
                elif kind >= 0.93:
                    done.append("back")
                    page.go_back(timeout=1000)
            if not page.url.startswith(url):
                page.goto(url)
                page.wait_for_selector("html[data-drawn]")
            text = page.evaluate("document.body.innerText")
            assert not page.errors and not refused, (page.errors, refused, done[-8:], page.url)
            assert not any(word in text for word in ("undefined", "NaN", "[object", "is not a function")), (done[-8:], page.url)
        page.wait_for_timeout(300)
        assert page.locator("main").inner_text()
