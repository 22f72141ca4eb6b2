"""The facts of the public sets, as their readers must find them. Needs TILT_DATA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tilt.data.formats import Dataset, read
from tilt.data.rendering import renderer
from tilt.data.sources import load
from tilt.data.streams import split
from tilt.data.tokenizers import characters, train_bpe

Find = Callable[[str], Path]
Open = Callable[..., Dataset]
DEMO = "llamafactory-demo/"


@pytest.fixture
def opened(tilt_data: Find) -> Open:
    """`opened("gsm8k/test", "sft")`: a public set, read."""

    def open(name: str, want: Any) -> Dataset:
        tilt_data(name.split("/")[0])
        return read(load(name).rows, want=want, source=name)

    return open


@pytest.mark.parametrize(
    "name, want, rows, kind, counts",
    [
        ("rasbt-instruct", "preference", 1100, "preference", {"identical pairs": 6, "repeated prompts": 25}),
        ("rasbt-instruct", "sft", 1100, "prompt_completion", {"repeated prompts": 25}),
        ("rasbt-instruct/instruction-data", "sft", 1100, "prompt_completion", {"repeated prompts": 25}),
        ("gsm8k", "sft", 7473, "prompt_completion", {}),
        ("gsm8k/test", "prompt", 1319, "prompt", {}),
        ("gsm8k/test_socratic", "sft", 1319, "prompt_completion", {}),
        ("svamp", "prompt", 1000, "prompt", {}),
        ("anthropic-evals", "preference", 1000, "preference", {}),
        ("anthropic-evals/interest-in-math", "preference", 1000, "preference", {}),
        ("names", "text", 32033, "text", {"duplicate rows": 32033 - 29494}),
        ("tinyshakespeare", "text", 1, "text", {}),
        (DEMO + "alpaca_en_demo", "sft", 999, "prompt_completion", {"inputs that say there is none": 8, "duplicate rows": 14, "repeated prompts": 14}),
        (DEMO + "alpaca_zh_demo", "sft", 1000, "prompt_completion", {"duplicate rows": 8, "repeated prompts": 8}),
        (DEMO + "identity", "sft", 91, "prompt_completion", {"repeated prompts": 2, "rows with {{placeholders}}": 85}),
        (DEMO + "dpo_en_demo", "preference", 300, "preference", {"repeated prompts": 5, "duplicate rows": 5}),
        (DEMO + "dpo_zh_demo", "preference", 300, "preference", {"repeated prompts": 11, "duplicate rows": 11}),
        (DEMO + "kto_en_demo", "unpaired", 300, "unpaired", {"labelled good": 150, "labelled bad": 150, "repeated prompts": 3}),
        (
            "hh-rlhf", "preference", 2307, "preference",
            {"rows with turns of one role in a row (merged)": 9, "pairs whose prompts differ (left out)": 5, "empty answers": 4, "repeated prompts": 2},
        ),
    ],
)  # fmt: skip
def test_rows_and_oddities(opened: Open, name: str, want: str, rows: int, kind: str, counts: dict[str, int]) -> None:
    found = opened(name, want)
    assert (len(found.rows), found.kind) == (rows, kind)
    assert found.counts == counts


def test_rasbt_output_is_not_the_preferred_answer(opened: Open) -> None:
    pairs, answers = opened("rasbt-instruct", "preference").rows, opened("rasbt-instruct", "sft").rows
    assert [n for n, row in enumerate(pairs) if row["chosen"] == row["rejected"]] == [122, 226, 400, 566, 628, 676]
    assert sum(a["completion"] == p["chosen"] for a, p in zip(answers, pairs, strict=True)) == 562
    assert sum(a["completion"] == p["rejected"] for a, p in zip(answers, pairs, strict=True)) == 544
    assert sum(row["prompt"] == row["instruction"] for row in pairs) == 775, "an empty input adds nothing"


def test_a_split_of_rasbt_keeps_repeated_prompts_on_one_side(opened: Open) -> None:
    train, held = split(opened("rasbt-instruct", "preference").rows, 0.1)
    assert len(train) + len(held) == 1100 and 80 <= len(held) <= 140
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}


def test_alpaca_inputs(opened: Open) -> None:
    rows = opened(DEMO + "alpaca_en_demo", "sft").rows
    bare = [n for n, row in enumerate(rows) if row["prompt"] == row["instruction"]]
    spelled, decorated = {184, 365, 514, 574, 978}, {36, 577, 821}  # `No Input`; `No input.`, `< noinput >`
    assert len(bare) == 587 + 5 + 3 and spelled | decorated <= set(bare)
    assert sum(row["prompt"] == row["instruction"] for row in opened(DEMO + "alpaca_zh_demo", "sft").rows) == 861


def test_hh_dialogues(opened: Open) -> None:
    rows = opened("hh-rlhf", "preference").rows
    raw = load("hh-rlhf").rows
    left_out = {1254, 1688, 1950, 1952, 2036}
    kept = [n for n in range(len(raw)) if n not in left_out]
    assert [n for n, row in zip(kept, rows, strict=True) if row["chosen"][-1]["content"] == ""] == [86, 516, 925, 1103]
    for n, row in zip(kept, rows, strict=True):
        assert row["prompt"][0]["role"] == "user" and row["prompt"][-1]["role"] == "user"
        roles = [turn["role"] for turn in row["prompt"]]
        assert all(a != b for a, b in pairwise(roles))
        for side in ("chosen", "rejected"):
            assert len(row[side]) == 1 and raw[n][side].endswith(row[side][0]["content"].rpartition("\n\n")[2])
    turns = Counter(text["chosen"].count("\n\nHuman:") for text in raw)
    assert (turns[1], turns[2], turns[3]) == (662, 584, 590)


def test_gsm8k_gold(opened: Open) -> None:
    train, test = opened("gsm8k", "prompt").rows, opened("gsm8k/test", "prompt").rows
    assert (
        [train[n]["gold"] for n in (5715, 5844, 6189)] == ["-7", "-47", "-12"] and test[489]["gold"] == "-10" and test[1113]["gold"] == "-3"
    )
    assert sum("," in row["answer"].rpartition("####")[2] for row in train) == 79
    assert all(row["gold"].lstrip("-").isdigit() for row in train + test)
    assert sum(int(row["gold"]) > 1_000_000 for row in train) == 15


def test_svamp_prompts_and_answers(opened: Open) -> None:
    rows = opened("svamp", "prompt").rows
    assert all(row["gold"].isdigit() for row in rows) and max(int(row["gold"]) for row in rows) == 22_090_603
    assert next(row for row in rows if row["ID"] == "chal-680")["gold"] == "1", "the declared column is followed"
    joined = [row["prompt"].removesuffix(row["Question"].strip()).rstrip() for row in rows]
    assert all(text.endswith((".", "?", "!", ",", ";", ":")) or not text for text in joined)
    assert 340 <= sum(text.endswith(".") and not row["Body"].strip().endswith(".") for text, row in zip(joined, rows, strict=True)) <= 360


def test_persona_answers_keep_their_blank(opened: Open) -> None:
    rows = opened("anthropic-evals", "preference").rows
    assert Counter(row["chosen"] for row in rows) == {" Yes": 500, " No": 500}
    assert all({row["chosen"], row["rejected"]} == {" Yes", " No"} for row in rows)


def test_sharegpt_pairs(opened: Open) -> None:
    english, chinese = (opened(DEMO + f"dpo_{language}_demo", "preference").rows for language in ("en", "zh"))
    assert sum(row["prompt"][0]["role"] == "system" for row in english) == 80
    assert sum(row["prompt"][0]["role"] == "system" for row in chinese) == 64
    assert all(row["prompt"][-1]["role"] == "user" for row in english)
    assert Counter(len(row["prompt"]) for row in english) == {1: 114, 2: 80, 5: 57, 7: 46, 3: 1, 9: 1, 13: 1}
    assert sum(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in english) == 131


def test_the_good_half_of_labelled_answers(opened: Open) -> None:
    good = opened(DEMO + "kto_en_demo", "sft")
    assert len(good.rows) == 150 and good.counts["labelled bad (left out)"] == 150 and good.kind == "messages"


@pytest.mark.parametrize("template", ["tilt", "chatml", "plain"])
def test_tool_observations_are_never_trained(opened: Open, template: str) -> None:
    found = opened(DEMO + "glaive_toolcall_en_demo", "sft")
    roles = Counter(turn["role"] for row in found.rows for turn in row["messages"])
    assert (roles["assistant"], roles["tool"]) == (746 + 211, 211)
    assert sum("tools" not in row for row in found.rows) == 109
    rows = [row for row in found.rows if any(turn["role"] == "tool" for turn in row["messages"])][:25]
    tokenizer = train_bpe(["a"], 300)
    render = renderer(tokenizer, template, train_on="assistant")
    for number, row in enumerate(rows):
        example = render.demonstration(row, number)
        runs = tokenizer.decode([t for t, chosen in zip(example.tokens, example.sampled, strict=True) if chosen]).split("<|end|>")
        assert runs == [*(turn["content"] for turn in row["messages"] if turn["role"] == "assistant"), ""]


@pytest.mark.parametrize("name", ["rasbt-instruct", "hh-rlhf", DEMO + "dpo_zh_demo"])
def test_rendered_pairs_decode_to_their_answers(opened: Open, name: str) -> None:
    rows = opened(name, "preference").rows[:60]
    tokenizer = train_bpe(["a"], 300)
    for row, pair in zip(rows, renderer(tokenizer).pairs(rows), strict=True):
        for side, example in zip(("chosen", "rejected"), pair, strict=True):
            text = row[side] if isinstance(row[side], str) else row[side][0]["content"]
            assert tokenizer.decode(example.tokens) == text + "<|end|>" and all(example.sampled)


def test_shakespeare_is_65_characters(opened: Open) -> None:
    text = opened("tinyshakespeare", "text").rows[0]["text"]
    tokenizer = characters(text)
    assert len(text) == 1_115_394 and len(set(text)) == 65
    assert len(tokenizer.encode(text[:2000])) == 2000 and tokenizer.decode(tokenizer.encode(text[:2000])) == text[:2000]
