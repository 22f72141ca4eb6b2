"""The page in a browser: every view, filter, sort, channel and key; live growth; reports from a file; hostile texts; speed; accessibility."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from made_runs import HOSTILE, answers_of, make_run, step_file, write_metrics

from tilt.inspect.book import Book, books
from tilt.inspect.report import report, write_report
from tilt.inspect.server import Site

AXE = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "second", steps=2)


def visit(page, url, **state):
    """Open a state of the page and wait until it is drawn."""
    page.goto("about:blank")
    page.goto(url + "#" + "&".join(f"{k}={v}" for k, v in state.items()))
    page.wait_for_selector("html[data-drawn]")


def state_of(page):
    return dict(pair.split("=", 1) for pair in page.evaluate("location.hash.slice(1)").split("&") if "=" in pair)


def settled(page, act):
    """Do something that draws the page anew, and wait for that."""
    before = page.evaluate("document.documentElement.dataset.drawn")
    act()
    page.wait_for_function("(before) => document.documentElement.dataset.drawn !== before", arg=before)


def count(page):
    return int(page.locator(".count").inner_text().split(" of ")[0].replace(",", ""))


# --- overview -------------------------------------------------------------------------------------------------------------------


def test_a_step_without_channels_leads_to_the_nearest_with_them(page, served, tmp_path):
    run = make_run(tmp_path / "made", steps=2)
    step_file(run / "rollouts", 13, answers_of(13, 8), channels=False)
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=13)
        assert "stored without channels" in page.locator(".rollout").inner_text()
        settled(page, lambda: page.get_by_role("button", name="step 10").click())
        assert state_of(page)["step"] == "10" and page.locator(".token").count() > 5


def test_the_threshold_of_the_entropy_is_a_percentile(page, served, run):
    book = Book(run)
    entropies = np.array(book.rows(10).detail(4)["channels"]["entropy"])
    with served(Site([book])) as url:
        visit(page, url, view="rollouts", step=10, step_at=10, row=4, channel="entropy")
        over = page.locator(".token.over").evaluate_all("nodes => nodes.map((n) => Number(n.dataset.t))")
        assert sorted(over) == sorted(np.argsort(entropies, kind="stable")[int(np.ceil(0.8 * len(entropies))) :].tolist())
        assert "the upper 20 %" in page.locator(".rollout").inner_text()
        visit(page, url, view="rollouts", step=10, step_at=10, row=4, channel="entropy", threshold=0.95)
        assert page.locator(".token.over").count() == 1, "the highest one always"
        settled(page, lambda: page.keyboard.press("n"))
        assert int(state_of(page)["token"]) in np.argsort(entropies)[-4:]


def test_the_overview_draws_the_curves_with_alerts_and_a_second_run(page, served, run, second):
    with served(Site([Book(run), Book(second)])) as url:
        visit(page, url)
        assert "null" not in page.locator("#header").inner_text()
        titles = page.locator(".chart figcaption").all_inner_texts()
        assert {"Reward", "KL to the reference, nats", "Entropy, nats", "Length", "Clipped, share", "Gradient norm", "Loss"} <= set(titles)
        assert page.locator(".alerts li").inner_text().startswith("⚑ step 20 entropy")
        stacked = page.locator(".chart.stacked")
        assert "Parts of the reward" in stacked.inner_text() and "0.5 × length" in stacked.inner_text()
        stacked.scroll_into_view_if_needed()
        spot = stacked.locator(".u-over").bounding_box()
        page.mouse.move(spot["x"] + spot["width"] * 20 / 39, spot["y"] + 40)
        assert (
            stacked.locator(".u-legend .u-value").all_inner_texts()[:2] == ["20", "0.25"]
            and "−0.05" in stacked.locator(".u-legend").inner_text()
        )
        settled(page, lambda: page.get_by_label("Compare with").select_option("1"))
        assert "reward · second" in page.locator(".chart").first.inner_text() and state_of(page)["with"] == "1"
        settled(page, lambda: page.get_by_label("Add a metric").select_option("extra/metric"))
        assert "extra/metric" in page.locator(".chart figcaption").all_inner_texts()
        page.reload()
        page.wait_for_selector("html[data-drawn]")
        assert (
            "extra/metric" in page.locator(".chart figcaption").all_inner_texts() and page.get_by_label("Compare with").input_value() == "1"
        )
        box = page.locator(".chart .u-over").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40)
        settled(page, lambda: page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 40))
        assert state_of(page)["view"] == "rollouts" and state_of(page)["step"] == "20"
        settled(page, lambda: page.get_by_label("Run", exact=True).select_option("1"))
        assert state_of(page)["run"] == "1"


# --- the list -------------------------------------------------------------------------------------------------------------------


def shown_rows(page):
    return page.locator(".row").evaluate_all(
        "nodes => nodes.map((n) => [n.style.transform, n.id]).sort((a, b) => parseFloat(a[0].slice(11)) - parseFloat(b[0].slice(11))).map((n) => n[1])"
    )


@pytest.mark.parametrize("sort", ["reward", "advantage", "kl", "delta_max", "push", "length", "entropy", "clipped", "repetition"])
def test_every_sort_orders_the_list_both_ways(page, served, run, sort):
    summary = Book(run).summaries([10])["steps"]["10"]
    with served(Site([Book(run)])) as url:
        for order, sign in ((None, -1), ("up", 1)):
            visit(page, url, view="rollouts", step=10, sort=sort, **({"order": order} if order else {}))
            rows = [int(name.rsplit("-", 1)[1]) for name in shown_rows(page)]
            values = [summary[sort][i] for i in rows]
            assert values == sorted(values, key=lambda v: sign * v), sort


@pytest.mark.parametrize("state, keeps", [
    ({"reward_min": "0.1"}, lambda s, i: s["reward"][i] >= 0.1), ({"reward_max": "0"}, lambda s, i: s["reward"][i] <= 0), ({"advantage_min": "0.2"}, lambda s, i: s["advantage"][i] >= 0.2),
    ({"length_max": "25"}, lambda s, i: s["length"][i] <= 25), ({"clipped_min": "12"}, lambda s, i: s["clipped"][i] >= 12), ({"kl_min": "20"}, lambda s, i: s["kl"][i] >= 20),
    ({"truncated": "1"}, lambda s, i: s["truncated"][i]), ({"truncated": "0"}, lambda s, i: not s["truncated"][i]), ({"dropped": "1"}, lambda s, i: s["dropped"][i]), ({"dropped": "0"}, lambda s, i: not s["dropped"][i]),
    ({"group": "2"}, lambda s, i: s["group"][i] == 2), ({"odd": "1"}, lambda s, i: s["odd"][i]), ({"part": "exact", "part_min": "0.3"}, lambda s, i: s["parts"]["exact"][i] >= 0.3),
    ({"q": "question 5"}, lambda s, i: s["prompts"][s["prompt"][i]] == "question 5"),
])  # fmt: skip
def test_every_filter_keeps_what_it_says(page, served, run, state, keeps):
    summary = Book(run).summaries([10])["steps"]["10"]
    wanted = sum(bool(keeps(summary, i)) for i in range(32))
    assert wanted < 32
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=10, **state)
        assert count(page) == wanted


def test_filters_are_set_by_their_controls_and_cleared(page, served, run):
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=10)
        page.locator("summary", has_text="filters").click()
        field = page.get_by_label("reward, at least")
        settled(page, lambda: (field.fill("0.5"), field.press("Enter")))
        some = count(page)
        assert 0 < some < 32 and state_of(page)["reward_min"] == "0.5"
        settled(page, lambda: page.get_by_label("Truncated").select_option("0"))
        assert count(page) <= some
        settled(page, lambda: page.get_by_role("button", name="clear").click())
        assert count(page) == 32
        settled(page, lambda: page.get_by_label("Step", exact=True).select_option("all"))
        assert count(page) == 128 and "step 0" in page.locator(".row").first.inner_text()


# --- one answer -----------------------------------------------------------------------------------------------------------------


def test_every_channel_colours_the_tokens_and_shows_its_numbers(page, served, run):
    book = Book(run)
    detail = book.rows(10).detail(4)
    channels = list(book.header()["channels"])
    with served(Site([book])) as url:
        visit(page, url, view="rollouts", step=10, step_at=10, row=4)
        assert page.locator("button.on").inner_text().endswith("Δ reference"), "the default"
        for number, name in enumerate(channels):
            if number < 9:
                settled(page, lambda key=str(number + 1): page.keyboard.press(key)) if number else None
            else:
                settled(page, lambda number=number: page.locator(".channels button").nth(number).click())
            assert (state_of(page).get("channel", "delta_ref")) == name
            strengths = page.locator(".rollout > .tokens .token").evaluate_all(
                "nodes => nodes.map((n) => [n.style.getPropertyValue('--strength'), n.className])"
            )
            values = detail["channels"][name]
            assert len(strengths) == len(values)
            if name in ("delta_ref", "push"):
                best = max(range(len(values)), key=lambda t: abs(values[t]))
                assert float(strengths[best][0]) == 1.0
                assert all(("up" in kind) == (v > 0) for (s, kind), v in zip(strengths, values, strict=True) if float(s or 0) > 0.02)
        page.locator(".rollout > .tokens .token").nth(2).hover()
        card = page.locator("#hover").inner_text()
        for name in ("push", "entropy", "advantage", "value"):
            assert name in card
        assert "reference" in card and " d" in card.replace("␣", " ")


def test_keys_walk_rows_tokens_and_views(page, served, run):
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=10)
        assert state_of(page).get("row") in (None, "0")
        settled(page, lambda: page.keyboard.press("j"))
        settled(page, lambda: page.keyboard.press("j"))
        assert state_of(page)["row"] == "2"
        settled(page, lambda: page.keyboard.press("k"))
        assert state_of(page)["row"] == "1"
        settled(page, lambda: page.keyboard.press("n"))
        first = int(state_of(page)["token"])
        values = Book(run).rows(10).detail(1)["channels"]["delta_ref"]
        over = [t for t, v in enumerate(values) if abs(v) >= 0.5 * max(map(abs, values))]
        assert first == over[0] and page.locator(".pinned-card").count() == 1
        if len(over) > 1:
            settled(page, lambda: page.keyboard.press("ArrowRight"))
            assert int(state_of(page)["token"]) == over[1]
            settled(page, lambda: page.keyboard.press("p"))
            assert int(state_of(page)["token"]) == over[0]
        settled(page, lambda: page.keyboard.press("Escape"))
        assert "token" not in state_of(page)
        settled(page, lambda: page.keyboard.press("g"))
        assert page.locator(".siblings article").count() == 4 and page.locator(".parting").count() >= 1
        drawn = "() => { const c = document.querySelector('.strip'); return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0); }"
        assert page.evaluate(drawn), "the strip is drawn"
        settled(page, lambda: page.keyboard.press("s"))
        assert "asked at 4 of the stored steps" in page.locator("main").inner_text()
        page.get_by_label("Step", exact=True).last.evaluate("n => { n.value = '0'; n.dispatchEvent(new Event('input')); }")
        assert "step 0" in page.locator("output").inner_text()
        settled(page, lambda: page.keyboard.press("i"))
        assert page.locator(".tokens sub").count() > 3
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"
        settled(page, lambda: page.keyboard.type("therefore") or page.keyboard.press("Enter"))
        assert 0 < count(page) < 32 and page.evaluate("document.activeElement.className") == "rows", "Enter goes on to the list"
        settled(page, lambda: page.keyboard.press("Escape"))
        assert count(page) == 32
        settled(page, lambda: page.keyboard.press("ArrowDown"))
        assert page.locator(".row.chosen").count() == 1 and page.evaluate("document.activeElement.className") == "rows"
        page.keyboard.press("/")
        page.keyboard.type("half a w")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") != "search" and "q" not in state_of(page), "Esc leaves the field as it was"
        for key, view in (("c", "changed"), ("o", "overview"), ("a", "about"), ("r", "rollouts")):
            settled(page, lambda key=key: page.keyboard.press(key))
            assert state_of(page)["view"] == view
        page.keyboard.press("?")
        assert page.locator("dialog[open] dt").count() > 8
        page.keyboard.press("Escape")
        theme = page.evaluate("document.documentElement.dataset.theme ?? ''")
        settled(page, lambda: page.keyboard.press("t"))
        assert page.evaluate("document.documentElement.dataset.theme") != theme


def test_a_choice_by_keyboard_keeps_the_focus_and_one_by_pointer_leaves_the_keys_free(page, served, run):
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=10)
        page.locator(".channels button").nth(1).focus()
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
        settled(page, lambda: page.keyboard.press("Enter"))
        assert state_of(page)["channel"] == "push" and page.evaluate("document.activeElement.innerText") == "2 push"
        page.get_by_label("Sort by").focus()
        settled(page, lambda: page.keyboard.press("ArrowDown"))
        assert state_of(page)["sort"] == "reward" and page.evaluate("document.activeElement.ariaLabel") == "Sort by"
        settled(page, lambda: page.locator(".channels button").nth(2).click())
        assert page.evaluate("document.activeElement.nodeName") == "BODY"


def test_a_group_has_one_legend_and_the_scale_of_its_largest_value(page, served, run):
    rows = Book(run).rows(10).siblings(4)["rows"]
    largest = [max(abs(v) for v in r["channels"]["push"] if isinstance(v, float)) for r in rows]
    assert len(set(largest)) > 1
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=10, step_at=10, row=4, channel="push", side="group")
        assert page.locator(".legend").count() == 1
        full = [page.locator(".siblings .tokens").nth(k).evaluate("n => [...n.children].some((t) => t.style.getPropertyValue('--strength') === '1.000')") for k in range(len(rows))]  # fmt: skip
        assert full == [value == max(largest) for value in largest]
        mine = page.locator(".rollout > .tokens").evaluate("n => [...n.children].map((t) => t.style.getPropertyValue('--strength'))")
        assert mine == page.locator(".siblings .tokens").first.evaluate("n => [...n.children].map((t) => t.style.getPropertyValue('--strength'))")  # fmt: skip


def test_the_address_holds_the_whole_state(page, served, run):
    with served(Site([Book(run)])) as url:
        state = {
            "view": "rollouts",
            "step": "20",
            "step_at": "20",
            "row": "5",
            "channel": "push",
            "token": "3",
            "side": "group",
            "sort": "reward",
            "threshold": "0.8",
        }
        visit(page, url, **state)
        before = page.locator("main").inner_text()
        page.reload()
        page.wait_for_selector("html[data-drawn]")
        assert page.locator("main").inner_text() == before and {k: state_of(page)[k] for k in state} == state
        assert page.locator(".rollout > .tokens .pinned").get_attribute("data-t") == "3"


def test_what_an_update_changed_is_told_with_its_numbers(page, served, run):
    book = Book(run)
    found = book.changed(10)
    with served(Site([book])) as url:
        visit(page, url, view="changed", step=10)
        text = page.locator("main").inner_text()
        for title in (
            "Tokens gained",
            "Tokens lost",
            "By position in the answer",
            "push × result",
            "Over-confidence",
            "By class of token",
            "Entropy",
            "Collapse",
        ):
            assert title in text, title
        assert f"{found['count']:,} sampled tokens" in text and f"{found['confident']['count']} tokens above 0.9" in text
        settled(page, lambda: page.get_by_role("button", name="push", exact=True).click())
        assert state_of(page)["profile"] == "push"


def test_the_page_names_the_step_and_the_token_where_answers_come_apart(page, served, tmp_path):
    run = make_run(tmp_path / "fallen", steps=2)
    for step in (20, 30):
        answers = [a | {"completion": "the sum is forty-two" + " ha" * 30} if i % 2 else a for i, a in enumerate(answers_of(step, 16, 40))]
        step_file(run / "rollouts", step, answers)
    with served(Site([Book(run)])) as url:
        visit(page, url, view="changed", step=10)
        said = page.locator("p.warn").inner_text()
        assert "Answers come apart from step 20 on" in said and "the sum is forty-two" in said
        settled(page, lambda: page.get_by_role("button", name="show it").click())
        state = state_of(page)
        assert (
            state["step"] == "20"
            and abs(int(state["token"]) - len("the sum is forty-two") // 3) <= 3
            and page.locator(".pinned").count() == 1
        )


def test_a_comparison_shows_what_changed_most(page, served, run):
    text = {
        "prompt": "say", "completion": "a b", "tokens": ["a", " b"], "bytes": [None, None], "ids": [1, 2], "top": {"a": [[["a", -0.1]], [["c", -0.2]]], "b": [[["a", -0.1]], [["b", -0.2]]]},
        "channels": {"delta": [0.0, 2.0], "kl": [0.0, 1.5], "a_logprobs": [-1.0, -3.0], "b_logprobs": [-1.0, -1.0], "a_rank": [0, 3], "b_rank": [0, 0], "argmax_changed": [0, 1]},
    }  # fmt: skip
    comparison = {
        "format": "tilt comparison 1", "a": "sft", "b": "ppo", "reference": None, "texts": [text, text], "ranked": [{"text": 1, "position": 1, "score": 1.5, "reason": "the top choice changed"}],
        "changed": Book(run).changed(10), "generations": [{"prompt": "say", "a": "x", "b": "y"}], "flips": {"gained": [{"prompt": "p"}], "lost": [], "both": 3, "neither": 1, "p": 1.0}, "summary": {"mean_kl": 0.75}, "notes": ["made by hand"],
    }  # fmt: skip
    with served(Site([Book(run)], [comparison])) as url:
        visit(page, url, view="compare")
        body = page.locator("main").inner_text()
        assert (
            "sft → ppo" in body and "the top choice changed" in body and "1 answers became right" in body and "Answers side by side" in body
        )
        settled(page, lambda: page.locator(".ranked button").click())
        assert state_of(page)["token"] == "1" and "likeliest in b" in page.locator("main").inner_text()
        settled(page, lambda: page.keyboard.press("2"))
        assert state_of(page)["channel"] == "kl"


# --- live, from a file, hostile -------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_grows_on_the_page(page, served, tmp_path, monkeypatch):
    run = make_run(tmp_path / "live", steps=2, running=True)
    monkeypatch.setattr(Book, "status", lambda book: "finished" if (book.path / "result.json").exists() else "running")
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=10)
        assert "live · step 19/100" in page.locator("#header").inner_text()
        write_metrics(run, range(20, 30))
        step_file(run / "rollouts", 20, answers_of(20, 8))
        page.wait_for_function("() => document.querySelector('#header').innerText.includes('step 29/100')", timeout=8000)
        page.wait_for_function(
            "() => [...document.querySelector('select[aria-label=Step]').options].some((o) => o.value === '20')", timeout=8000
        )
        (run / "result.json").write_text("{}")
        page.wait_for_function("() => document.querySelector('#header').innerText.includes('finished')", timeout=8000)


def test_runs_that_begin_and_runs_laid_over_are_followed(page, served, tmp_path, monkeypatch):
    """A folder that comes to hold another run offers it; the curve of a second run grows with it."""
    place = tmp_path / "runs"
    first, second = make_run(place / "a", steps=2, running=True), make_run(place / "b", steps=1, running=True)
    monkeypatch.setattr(Book, "status", lambda book: "running")
    with served(Site(books(place), again=lambda: books(place))) as url:
        visit(page, url, view="overview", **{"with": 1})
        last = "() => { const rows = document.querySelector('.chart .u-legend').innerText; return rows; }"
        assert "reward · b" in page.evaluate(last).replace("runs/", "")
        box = page.locator(".chart .u-over").first.bounding_box()
        at = lambda: (page.mouse.move(box["x"] + 5, box["y"] + 30), page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 40))
        at()
        assert page.locator(".chart .u-legend .u-value").nth(2).inner_text() == "–", "the second run ends at step 9"
        write_metrics(second, range(10, 20))
        make_run(place / "c", steps=1, running=True)
        page.wait_for_function(
            "() => [...document.querySelectorAll('select[aria-label=Run] option')].some((o) => o.text.endsWith('c'))", timeout=20000
        )
        page.wait_for_timeout(2500)
        at()
        assert page.locator(".chart .u-legend .u-value").nth(2).inner_text() == "0.19"
        settled(page, lambda: page.get_by_label("Run", exact=True).select_option("2"))
        assert "step 9/100" in page.locator("#header").inner_text()
        assert first.is_dir()


def test_new_steps_are_offered_while_a_field_is_held(page, served, tmp_path, monkeypatch):
    run = make_run(tmp_path / "live", steps=2, running=True)
    monkeypatch.setattr(Book, "status", lambda book: "running")
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=10)
        field = page.get_by_label("Text in prompt or answer")
        field.focus()
        field.type("half a wo")
        step_file(run / "rollouts", 20, answers_of(20, 8))
        page.wait_for_function(
            "() => [...document.querySelector('select[aria-label=Step]').options].some((o) => o.value === '20')", timeout=8000
        )
        assert field.input_value() == "half a wo" and page.evaluate("document.activeElement.id") == "search"
        settled(page, lambda: page.get_by_label("Step", exact=True).select_option("20"))
        assert page.locator(".count").inner_text().endswith("of 8 answers")


def pairs_of(step):
    head = "the answer to this question of yours is a number, and that number is "
    rows = []
    for i in range(4):
        for role, tail in (("chosen", "42, gladly"), ("rejected", "17 and no more of it" if i else "also 42")):
            reward = {"chosen": 0.5 - 0.3 * i, "rejected": 0.1}[role]
            rows.append({"prompt": f"question {i}", "completion": head + tail, "reward": reward, "group": i, "role": role})
    return rows


def test_a_pair_stands_side_by_side_with_its_margin(page, served, tmp_path):
    run = make_run(tmp_path / "pairs", steps=0)
    step_file(run / "rollouts", 10, pairs_of(10))
    book = Book(run)
    assert [round(m, 6) for m in book.summaries([10])["steps"]["10"]["margin"]] == [0.4, 0.4, 0.1, 0.1, -0.2, -0.2, -0.5, -0.5]
    with served(Site([book])) as url:
        visit(page, url, view="rollouts", step=10, step_at=10, row=4)
        assert "margin −0.2, the wrong way round" in page.locator(".facts").last.inner_text()
        panes = page.locator(".siblings .tokens")
        assert panes.count() == 2 and all("tokens the same" in text for text in panes.all_inner_texts())
        shown = [len(p.split()) for p in panes.all_inner_texts()]
        settled(page, lambda: page.get_by_role("button", name="show what both begin with").click())
        assert "tokens the same" not in panes.first.inner_text() and len(panes.first.inner_text()) > shown[0]
        assert panes.nth(1).locator(".parting").count() == 1 and "42" in panes.first.inner_text()
        settled(page, lambda: page.keyboard.press("g"))
        assert page.locator(".siblings").count() == 0
        settled(page, lambda: page.keyboard.press("g"))
        assert page.locator(".siblings").count() == 1
        visit(page, url, view="rollouts", step=10, sort="margin", order="up")
        assert shown_rows(page)[:2] == ["row-10-6", "row-10-7"]
        visit(page, url, view="rollouts", step=10, margin_max="0")
        assert count(page) == 4 and page.get_by_label("margin, at most").input_value() == "0"
        visit(page, url, view="rollouts", step=10, step_at=10, row=0)
        assert "margin 0.4" in page.locator(".facts").last.inner_text()


def test_a_zoom_and_the_charts_stay_while_a_run_grows(page, served, tmp_path, monkeypatch):
    run = make_run(tmp_path / "live", steps=2, running=True)
    monkeypatch.setattr(Book, "status", lambda book: "running")
    with served(Site([Book(run)])) as url:
        visit(page, url, view="overview")
        box = page.locator(".chart .u-over").first.bounding_box()
        page.locator(".chart").first.evaluate("n => { n.first = true; }")
        whole = page.locator(".chart canvas").first.evaluate("n => n.toDataURL()")
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40, steps=4)
        page.mouse.up()
        picture = lambda: page.locator(".chart canvas").first.evaluate("n => n.toDataURL()")
        page.wait_for_timeout(100)
        before = picture()
        assert before != whole
        write_metrics(run, range(20, 40))
        page.wait_for_function("() => document.querySelector('#header').innerText.includes('step 39/100')", timeout=8000)
        page.wait_for_timeout(100)
        assert page.locator(".chart").first.evaluate("n => n.first === true"), "the chart that stood still stands"
        assert picture() == before, "the zoom stays"
        page.mouse.dblclick(box["x"] + box["width"] * 0.3, box["y"] + 40)
        page.wait_for_timeout(100)
        assert picture() not in (before, whole), "what came since is drawn"


def test_a_report_opens_from_a_file_without_network(page, run, tmp_path):
    file = tmp_path / "report.html"
    size = write_report(Book(run), file)
    assert size < 10_000_000
    page.context.set_offline(True)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]")
    assert (
        "Before and after" in page.locator("main").inner_text()
        and "0.1 ± 0.039" in page.locator("main").inner_text()
        and page.locator(".chart").count() > 5
    )
    for view in ("rollouts", "changed", "about"):
        settled(
            page,
            lambda view=view: page.locator(
                "#tabs a", has_text={"rollouts": "Rollouts", "changed": "What changed", "about": "About"}[view]
            ).click(),
        )
        assert page.locator("main").inner_text()
    assert "made by hand" in page.locator("main").inner_text() and "This report holds" in page.locator("main").inner_text()
    settled(page, lambda: page.keyboard.press("r"))
    assert page.locator(".rollout > .tokens .token").count() > 3
    settled(page, lambda: page.keyboard.press("j"))
    settled(page, lambda: page.keyboard.press("g"))
    assert page.locator(".siblings article").count() >= 1
    assert all(address.startswith(("file:", "data:", "blob:")) for address in page.asked), page.asked


@pytest.mark.parametrize("from_file", [False, True])
def test_hostile_texts_are_inert(page, served, tmp_path, from_file):
    run = make_run(tmp_path / "hostile", steps=1, hostile=True)
    (run / "log.txt").write_text("10:00:00  alert      <b>x</b>, step 0: y\n10:00:01  finished\n")
    (run / "config.yaml").write_text(
        "recipe: rl\nalgorithm: '<img src=x onerror=window.hurt=1>'\nmodel: '</script><script>window.hurt=1</script>'\n"
    )
    (run / "objective.txt").write_text("</script><script>window.hurt=1</script>")
    with served(Site([Book(run)])) as url:
        if from_file:
            (tmp_path / "r.html").write_text(report(Book(run)), encoding="utf-8")
            url = (tmp_path / "r.html").as_uri()
        for row in range(len(HOSTILE)):
            visit(page, url, view="rollouts", step=0, step_at=0, row=row)
            assert page.locator(".rollout").count() == 1
        visit(page, url, view="rollouts", step=0, step_at=0, row=2, side="group")
        assert "⟨202E⟩" in page.locator(".rollout > .tokens").inner_text() or from_file
        for view in ("overview", "changed", "about"):
            visit(page, url, view=view)
        assert page.evaluate("window.hurt") is None and page.locator("main img, main script").count() == 0
        origin = "file:" if from_file else url.split("#")[0]
        assert all(address.startswith((origin, "data:", "blob:", "about:")) for address in page.asked), [
            a for a in page.asked if not a.startswith(origin)
        ]


def test_a_saved_view_is_a_page_without_scripts(page, served, run, tmp_path):
    with served(Site([Book(run)])) as url:
        visit(page, url, view="rollouts", step=10)
        with page.expect_download() as found:
            page.get_by_role("button", name="save view").click()
        found.value.save_as(tmp_path / "view.html")
        text = (tmp_path / "view.html").read_text()
        assert "<script" not in text and "data:image/png" in text and 'class="token' in text


# --- speed and accessibility ----------------------------------------------------------------------------------------------------


def test_the_first_paint_of_twenty_steps_takes_less_than_a_second(page, served, tmp_path):
    run = make_run(tmp_path / "big", steps=20, count=32, length=256 * 3)
    book = Book(run)
    with served(Site([book])) as url:
        times = []
        for _ in range(3):
            visit(page, url, view="rollouts")
            times.append(page.evaluate("performance.getEntriesByName('tilt-drawn')[0].startTime"))
        assert sorted(times)[1] < 1000, times


def test_an_answer_of_thirty_thousand_tokens_is_read_without_a_long_task(page, served, tmp_path):
    run = make_run(tmp_path / "long", steps=1, count=4)
    answers = [a | {"completion": a["completion"] * 1500, "most": 40_000} for a in answers_of(0, 2, 80)]
    step_file(run / "rollouts", 0, answers)
    values = Book(run).rows(0).detail(0)["channels"]["push"]
    assert len(values) > 30_000
    largest = max(abs(v) for v in values)
    over = [t for t, v in enumerate(values) if abs(v) >= 0.9 * largest]
    with served(Site([Book(run)])) as url:
        page.add_init_script(
            "window.long = []; new PerformanceObserver((list) => list.getEntries().forEach((e) => window.long.push(e.duration))).observe({ entryTypes: ['longtask'] });"
        )
        visit(page, url, view="rollouts", step=0, row=0, step_at=0, channel="push", threshold=0.9)
        page.wait_for_function("(n) => document.querySelectorAll('.rollout > .tokens .token').length === n", arg=len(values))
        for wanted in over[:2]:
            settled(page, lambda: page.keyboard.press("n"))
            assert int(state_of(page)["token"]) == wanted
            # the token is brought into sight
            page.wait_for_function(
                "() => { const n = document.querySelector('.rollout > .tokens .pinned'), b = n.closest('.tokens').getBoundingClientRect(), r = n.getBoundingClientRect(); return r.top >= b.top - 1 && r.bottom <= b.bottom + 1; }"
            )
        page.wait_for_timeout(300)
        top = page.locator(".rollout > .tokens").evaluate("n => n.scrollTop")
        settled(page, lambda: page.keyboard.press("Escape"))
        assert abs(page.locator(".rollout > .tokens").evaluate("n => n.scrollTop") - top) < 2, "the text stays where it is"
        assert max(page.evaluate("window.long"), default=0) < 400


def test_a_hundred_thousand_answers_scroll_without_a_long_task(page, served, tmp_path, monkeypatch):
    steps, each = 40, 2500
    summary = Book(make_run(tmp_path / "one", steps=1, count=32)).summaries([0])["steps"]["0"]
    wide = {
        name: (values * (each // 32 + 1))[:each] if isinstance(values, list) and name != "prompts" else values
        for name, values in summary.items()
    }
    wide |= {"row": list(range(each)), "parts": {name: (values * (each // 32 + 1))[:each] for name, values in summary["parts"].items()}}
    monkeypatch.setattr(Book, "steps", lambda book: [{"step": s, "rows": each, "channels": True} for s in range(steps)])
    monkeypatch.setattr(Book, "summaries", lambda book, wanted: {"steps": {str(s): wide for s in wanted}})
    detail = Book(tmp_path / "one").rows(0).detail(0)
    monkeypatch.setattr(Book, "rows", lambda book, step: type("R", (), {"detail": lambda self, row: detail | {"row": row, "step": step}})())
    with served(Site([Book(tmp_path / "one")])) as url:
        page.add_init_script(
            "window.long = []; new PerformanceObserver((list) => list.getEntries().forEach((e) => window.long.push(e.duration))).observe({ entryTypes: ['longtask'] });"
        )
        visit(page, url, view="rollouts", step="all", sort="reward")
        assert count(page) == 100_000
        page.evaluate("window.long.length = 0")
        box = page.locator(".rows")
        height = box.evaluate("n => n.scrollHeight")
        for k in range(24):
            box.evaluate("(n, top) => { n.scrollTop = top; }", height * k / 24)
            page.wait_for_timeout(30)
            assert page.locator(".row").count() < 60
        page.wait_for_timeout(100)
        assert max(page.evaluate("window.long"), default=0) < 200
        last = box.evaluate("n => { n.scrollTop = n.scrollHeight; return 0; }")
        page.wait_for_timeout(80)
        assert last == 0 and page.locator(".row").count() > 5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, served, run, theme):
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}: npm install axe-core, or AXE=…/axe.min.js")
    page.emulate_media(color_scheme=theme)
    with served(Site([Book(run)])) as url:
        for state in (
            {"view": "overview"},
            {"view": "rollouts", "step": "10", "token": "2", "side": "group"},
            {"view": "changed", "step": "10"},
            {"view": "about"},
        ):
            visit(page, url, **state)
            page.evaluate(AXE.read_text())
            found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
            serious = [
                (v["id"], v["nodes"][0]["html"][:160], v["nodes"][0]["failureSummary"][:200])
                for v in found["violations"]
                if v["impact"] in ("serious", "critical")
            ]
            assert not serious, (state, json.dumps(serious, indent=1))
