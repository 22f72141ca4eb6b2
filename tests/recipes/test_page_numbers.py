"""What the page shows of a step equals what is computed again from the checkpoints before and after it, by plain transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tilt.inspect.book import Book
from tilt.recipes.opening import loading  # the same loader as the recipes
from tilt.runs.checkpoints import path_of

HALF = 1e-3


def said(model, prompt, tokens):
    row = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = model(row).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)


def close(shown, truth):
    return all(abs(a - b) <= max(HALF, HALF * abs(b)) for a, b in zip(shown, truth, strict=True))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_numbers_on_the_page_equal_those_from_the_checkpoints(run_rl, run_sft, algorithm):
    start = str(run_sft().checkpoint)
    reference = AutoModelForCausalLM.from_pretrained(start).eval()
    result = run_rl(model=start, algorithm=algorithm, steps=3, save_every=1, keep_last=9, rollouts_every=1, optimizer={"lr": 1e-2})
    book = Book(result.directory.path)
    folder = result.directory.checkpoints
    before, after = (AutoModelForCausalLM.from_pretrained(path_of(folder, step)).eval() for step in (2, 3))
    tokenizer = loading.load(str(path_of(folder, 3)))[1]
    looked = 0
    for row in range(book.rows(2).count):
        detail = book.rows(2).detail(row)
        channels, ids = detail["channels"], detail["ids"]
        prompt = tokenizer(detail["prompt"], add_special_tokens=False)["input_ids"]
        old = said(before, prompt, ids)
        chosen = old.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        assert close(channels["old_logprobs"], chosen) and close(channels["new_logprobs"], chosen)
        assert close(channels["entropy"], (-(old.exp() * old).sum(-1)).tolist())
        anchor = said(reference, prompt, ids).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        gap = [new - there for new, there in zip(chosen, anchor, strict=True)]
        assert close(channels["reference_logprobs"], anchor) and close(channels["delta_ref"], gap)
        assert close(channels["kl"], [math.exp(-x) - 1 + x for x in gap]) and all(x == 1 for x in channels["ratio"])
        if algorithm == "grpo" and not detail["dropped"]:
            group = torch.tensor([one["reward"] for one in book.rows(2).siblings(row)["rows"]])
            assert close([channels["adv_t"][0]], [((detail["reward"] - group.mean()) / (group.std() + 1e-4)).item()])
            assert len(set(channels["adv_t"])) == 1
        if detail["top"] is None:
            continue
        looked += 1
        new = said(after, prompt, ids).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        assert close(channels["result"], [a - b for a, b in zip(new, chosen, strict=True)])
        for place, alternatives in enumerate(detail["top"]["policy"]):
            assert close([log for _, log in alternatives], old[place].topk(5).values.tolist())
    assert looked >= 4
    assert (
        sum(c in (1, -1) for row in range(book.rows(2).count) for c in book.rows(2).detail(row)["channels"]["clip"])
        == book.metrics()["columns"]["policy/clipped"][2]
    )


def test_a_run_with_a_rule_is_replayed_with_its_reasons(run_rl):
    from tilt.recipes.replaying import replay

    result = run_rl(algorithm="grpo", steps=3, rollouts_every=1, reward={"length": {"high": 3}})
    assert Book(result.directory.path).rows(1).detail(0)["checker"]["length"]["gold"] == "0 to 3"
    assert replay(result.directory.path).differences == ()
