"""A run that is trained too far on purpose: GRPO against a rule with a hole, without a KL, until the answers come apart. What the page says of it is true."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tilt.inspect.book import Book
from tilt.inspect.collapse import repeats_from
from tilt.recipes import rl, sft
from tilt.recipes.opening import loading
from tilt.recipes.quickstart import MANNERS_SFT, _write
from tilt.runs.checkpoints import path_of
from tilt.tasks import manners

pytestmark = pytest.mark.slow
STEPS = 40
INTACT = re.compile(r"^ ?(\w+ )?i will \w+ the \w+ \w+")


def thanks(completions: list[str]) -> list[float]:
    """A rule with a hole: a whole sentence counts, and so does every thank you after it."""
    return [float(text.count("thank you") + 1) if INTACT.match(text) else 0.0 for text in completions]


@pytest.fixture(scope="module")
def over(tmp_path_factory):
    """The quickstart's manners, rewarded by that rule without a KL, with a large learning rate and room for 40 tokens."""
    place, task = tmp_path_factory.mktemp("over"), manners.Manners()
    shared = {"root": place, "quiet": True, "threads": 1}
    model = {"width": 64, "layers": 2, "heads": 4, "context": 64, "vocabulary": 640}
    shown = _write(place / "shown", train=task.demonstrations(held_out=False), held_out=task.demonstrations(held_out=True))
    first = sft.run(sft.Config.model_validate(shared | MANNERS_SFT | {"name": "sft", "model": model, "data": shown}))
    asked = _write(place / "asked", **{n: [{"prompt": p} for p in task.prompts(held_out=n == "held_out")] for n in ("train", "held_out")})
    settings = {
        "name": "over", "model": str(first.checkpoint), "data": asked, "reward": thanks, "algorithm": "grpo", "steps": STEPS, "prompts": 16, "samples": 8,
        "objective": {"penalty": {"none": {}}}, "sampling": {"max_tokens": 40}, "optimizer": {"lr": 2e-3, "warmup": 3}, "eval": {"every": 0}, "rollouts_every": 1,
        "save_every": 1, "keep_last": 0,
    }  # fmt: skip
    return rl.run(rl.Config.model_validate(shared | settings))


def squeezed(texts):
    """How far the texts of a step can be compressed one by one: a measure of repetition that knows nothing of tokens."""
    return float(np.median([len(zlib.compress(t.encode())) / max(1, len(t)) for t in texts]))


def test_the_step_the_token_and_the_intact_head_are_named(over):
    book = Book(over.directory.path)
    begins = book.collapse()
    step, steps = begins["step"], [s["step"] for s in book.steps()]
    assert 5 <= step < STEPS - 5 and begins["share"] >= 0.25
    before, after = [s for s in steps if s < step - 2], [s for s in steps if s > step + 2]
    assert np.mean([squeezed(book.rows(s).completions) for s in after]) < 0.6 * np.mean(
        [squeezed(book.rows(s).completions) for s in before]
    )
    assert all(sum(f["name"] != "missing stop" for f in book.changed(s)["collapse"]) / book.rows(s).count < 0.25 for s in before), (
        "no quarter of the answers came apart before"
    )
    one = book.rows(step).detail(begins["row"])
    head, tail = one["tokens"][: begins["position"]], one["tokens"][begins["position"] :]
    assert "".join(t or "" for t in head)[:40].strip() in begins["text"]
    grams = [tuple(one["tokens"][i : i + 3]) for i in range(len(one["tokens"]) - 2)]
    echoes = [g in grams[:i] for i, g in enumerate(grams)]
    assert np.mean(echoes[len(head) :]) >= 0.75 > np.mean(echoes[: max(1, len(head) - 2)]) and len(tail) >= 4
    # in the middle of the collapse the heads are whole sentences still, and the page shows them
    flags = [f for s in after[:4] for f in book.changed(s)["collapse"] if f["name"] == "repetition"]
    heads = [re.search(r"before it: ['\"](.*)['\"]$", f["text"])[1] for f in flags]
    assert len(flags) > 20 and sum(bool(INTACT.match(h)) for h in heads) > 10
    assert book.changed(step)["begins"] == begins and any(a["name"] in ("kl", "length", "truncation", "entropy") for a in book.alerts())


def test_counts_of_confident_tokens_equal_those_from_the_checkpoints(over):
    book, folder = Book(over.directory.path), over.directory.checkpoints
    seen = 0
    for step in (book.collapse()["step"] + 4, STEPS - 2):
        old, new = (AutoModelForCausalLM.from_pretrained(path_of(folder, s)).eval() for s in (step, step + 1))
        tokenizer = loading.load(str(path_of(folder, step)))[1]
        p, after, up, down = [], [], [], []
        for row in range(book.rows(step).count):
            one = book.rows(step).detail(row)
            if one["dropped"]:
                continue  # no part of the update, and not counted
            prompt = tokenizer(one["prompt"], add_special_tokens=False)["input_ids"]
            logs = [said(model, prompt, one["ids"]) for model in (old, new)]
            p += logs[0].exp().tolist()
            known = "result" in one["channels"]
            after += logs[1].exp().tolist() if known else [np.nan] * len(one["ids"])
            up += [a > 0 for a in one["channels"]["adv_t"]]  # a single pass: the ratio is 1, so the push has the sign of the advantage
            down += [a < 0 for a in one["channels"]["adv_t"]]
        p, after, up, down = np.array(p), np.array(after), np.array(up), np.array(down)
        for band in book.changed(step)["confident"]["bands"][:3]:
            low, high = band["from"], band["to"]
            here, looked = (p >= low) & (p < high), ~np.isnan(after)
            # a log-probability in half precision is good to 5e-4 of itself: what lies so close to an edge may be counted on either side of it
            edge = sum(int((np.abs(np.log(p) - np.log(e)) <= 1e-3 * abs(np.log(e)) + 1e-6).sum()) for e in (low, high))
            edge_after = int((looked & (np.abs(np.log(np.maximum(after, 1e-30)) - np.log(high)) <= 2e-3 * abs(np.log(high)) + 2e-5)).sum())
            assert abs(band["count"] - here.sum()) <= edge
            assert abs(band["pushed_up"] - (here & up).sum()) <= edge and abs(band["pushed_down"] - (here & down).sum()) <= edge
            assert abs(band["looked"] - (here & looked).sum()) <= edge
            assert abs(band["crossed"] - (here & looked & (after >= high)).sum()) <= edge + edge_after
            assert edge <= max(3, 0.02 * band["count"])
            seen += band["count"]
            if (here & looked).sum() > 20:
                assert band["mean_after"] == pytest.approx(after[here & looked].mean(), abs=2e-3)
    assert seen > 500


def said(model, prompt, tokens):
    row = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = model(row).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].double()


def test_heads_end_where_blocks_begin_to_follow_one_another(over):
    """Of the answers that end in one block over and over the place is counted by hand."""
    book, looked = Book(over.directory.path), 0
    for step in range(STEPS - 6, STEPS):
        for row in range(book.rows(step).count):
            tokens = book.rows(step).detail(row)["tokens"]
            tail = tokens[-2:]
            if len(tokens) < 20 or None in tokens:
                continue
            k = 0
            while tokens[len(tokens) - 2 * k - 2 : len(tokens) - 2 * k] == tail and 2 * k + 2 <= len(tokens):
                k += 1
            if k < 6:
                continue
            looked += 1
            start = repeats_from(tokens)
            assert start is not None and start <= len(tokens) - 2 * (k - 1), "the first block is not counted"
    assert looked > 20
