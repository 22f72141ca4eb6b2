"""The human step in a browser: two annotators label by keys, their agreement is the formula's, and a reward model learns from what they wrote."""

from __future__ import annotations

import http.client
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tilt.inspect.annotation import Item, Labels, agreement, cohen, write_items, write_preferences
from tilt.inspect.annotation_server import Desk, LabelServer
from tilt.tasks import manners

AXE = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))


@contextmanager
def desk(folder, annotator, task="pair", guide=""):
    server = LabelServer(Desk(Labels.open(folder, annotator, task), guide), 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def waited(page, item):
    page.wait_for_selector(f"html[data-item='{item}']")


@pytest.fixture
def pairs(tmp_path):
    """Pairs of the task on manners, of which a program knows the kinder answer."""
    rows = list(manners.Manners().pairs(held_out=False))[:60]
    folder = tmp_path / "labels"
    write_items(folder, [Item(row["prompt"], (row["rejected"], row["chosen"])) for row in rows], {"task": "pair"})
    return folder


def test_two_annotators_label_and_a_reward_model_learns(page, pairs, tmp_path):
    items = Labels.open(pairs, "x", "pair").items
    for name, slips in (("ann", ()), ("bob", (3, 7, 11))):
        with desk(pairs, name, guide="Choose the kinder answer.\n<script>window.hurt=1</script>") as server:
            page.goto(server.url)
            waited(page, 0)
            assert "Choose the kinder answer." in page.locator("main").inner_text()
            for i, item in enumerate(items):
                waited(page, i)
                texts = page.locator(".answers pre").all_inner_texts()
                kind = texts.index(item.answers[1]) if i not in slips else texts.index(item.answers[0])
                page.keyboard.press("0" if i == 20 else "s" if i == 21 else str(kind + 1))
                if i == 5:
                    waited(page, 6)
                    page.keyboard.press("u")
                    waited(page, 5)
                    page.keyboard.press(["ArrowLeft", "ArrowRight"][kind])
            waited(page, "end")
            assert "All labelled" in page.locator("main").inner_text() and page.evaluate("window.hurt") is None
    labels = {name: Labels.open(pairs, name, "pair").done for name in ("ann", "bob")}
    shared = [i for i in range(60) if i != 21]
    a, b = [labels["ann"][i] for i in shared], [labels["bob"][i] for i in shared]
    (found,) = agreement(pairs, "pair")["pairs"]
    assert found["shared"] == 59 and found["percent"] == pytest.approx(100 * 56 / 59) and found["kappa"] == pytest.approx(cohen(a, b))
    place, count, left = write_preferences(pairs, "pair")
    assert count == 55 and sum(left.values()) == 5
    from tilt.recipes import reward_model

    config = {
        "model": {"width": 32, "layers": 2, "heads": 2, "context": 64, "vocabulary": 300}, "data": {"source": str(place), "template": "text", "held_out": 0.2}, "root": str(tmp_path), "name": "rm", "batch": 16, "steps": 40,
        "quiet": True, "optimizer": {"lr": 1e-2},
    }  # fmt: skip
    result = reward_model.run(reward_model.Config.model_validate(config))
    assert result.after["accuracy"] > 0.7, result.after


@pytest.mark.parametrize(
    "task, keys, kept", [("rank", ["1", "3", "Backspace", "2", "2", "Enter"], [1, 2, 2]), ("score", ["5", "1", "4", "Enter"], [5, 1, 4])]
)
def test_rankings_and_scores_are_given_by_keys(page, tmp_path, task, keys, kept):
    write_items(tmp_path / "l", [Item("p", ("x", "y", "z")), Item("q", ("u", "v", "w"))], {"task": task})
    with desk(tmp_path / "l", "me", task) as server:
        page.goto(server.url)
        waited(page, 0)
        for key in keys:
            page.keyboard.press(key)
        waited(page, 1)
        labels = Labels.open(tmp_path / "l", "me", task)
        assert [labels.done[0][own] for own in labels.shown(0)] == kept
        for k, value in enumerate(kept):
            page.locator(".answers .panel").nth(k).get_by_role("button", name=str(value), exact=True).click()
        page.get_by_role("button", name="store (Enter)").click()
        waited(page, "end")


def test_differences_are_marked_and_hostile_answers_inert(page, tmp_path):
    texts = ("the red </script><script>window.hurt=1</script> door", "the blue <img src=x onerror=window.hurt=1> door")
    write_items(tmp_path / "l", [Item("a\u202eb <b>x</b>", texts)], {"task": "pair"})
    with desk(tmp_path / "l", "me") as server:
        page.goto(server.url)
        waited(page, 0)
        page.keyboard.press("d")
        marks = page.locator("mark").all_inner_texts()
        assert {"red", "blue"} <= set(marks) and "door" not in marks and "the" not in marks
        assert (
            "⟨202E⟩" in page.locator("main").inner_text()
            and page.evaluate("window.hurt") is None
            and page.locator("main img, main script").count() == 0
        )
        assert all(address.startswith((server.url, "data:")) for address in page.asked)


def test_only_the_page_may_label(tmp_path):
    write_items(tmp_path / "l", [Item("p", ("x", "y"))], {"task": "pair"})
    with desk(tmp_path / "l", "me") as server:

        def post(body, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
            connection.request("POST", "/api/label", body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

        secret = server.desk.secret
        good = json.dumps({"item": 0, "value": "left"})
        assert post(good)[0] == 403 and post(good, **{"X-Tilt": "wrong"})[0] == 403
        assert (
            post(good, **{"X-Tilt": secret, "Origin": "http://evil.example"})[0] == 403
            and post(good, **{"X-Tilt": secret, "Host": "evil.example"})[0] == 403
        )
        for bad in ("[", "[]", "{}", '{"item": 9, "value": "left"}', '{"item": true, "value": "left"}', '{"item": 0, "value": "up"}'):
            assert post(bad, **{"X-Tilt": secret})[0] == 422, bad
        assert post("x" * 100_000, **{"X-Tilt": secret})[0] == 413
        status, state = post(good, **{"X-Tilt": secret})
        assert status == 200 and state["show"] is None and Labels.open(tmp_path / "l", "me", "pair").done


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, tmp_path, theme):
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}: npm install axe-core, or AXE=…/axe.min.js")
    page.emulate_media(color_scheme=theme)
    for task in ("pair", "score"):
        write_items(tmp_path / task, [Item("p " * 200, ("x " * 900, "y"))], {"task": task})
        with desk(tmp_path / task, "me", task, "a guide") as server:
            page.goto(server.url)
            waited(page, 0)
            page.evaluate(AXE.read_text())
            found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
            serious = [
                (v["id"], v["nodes"][0]["html"][:160], v["nodes"][0]["failureSummary"][:200])
                for v in found["violations"]
                if v["impact"] in ("serious", "critical")
            ]
            assert not serious, json.dumps(serious, indent=1)
