"""Every shape of rows becomes its canonical kind, with its oddities counted and its faults named."""

from __future__ import annotations

from typing import Any

import pytest

from tilt.data.conversations import is_hh, merge_turns, split_hh
from tilt.data.formats import prompt_text, read, readings
from tilt.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


Q, A, B = [user("Q")], [bot("A")], [bot("B")]
HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why"
CASES: dict[str, tuple[dict[str, Any], str, str, bool, dict[str, Any]]] = {
    # name: row, want, kind, conversational, canonical columns
    "text": ({"text": "t"}, "text", "text", False, {"text": "t"}),
    "text as sft": ({"text": "t"}, "sft", "text", False, {"text": "t"}),
    "prompt": ({"prompt": "p", "answer": 3}, "prompt", "prompt", False, {"prompt": "p", "answer": 3}),
    "prompt messages": ({"prompt": Q}, "prompt", "prompt", True, {"prompt": Q}),
    "completion": ({"prompt": "p", "completion": "c"}, "sft", "prompt_completion", False, {"prompt": "p", "completion": "c"}),
    "completion number": ({"prompt": "p", "completion": 51.0}, "sft", "prompt_completion", False, {"completion": "51"}),
    "completion messages": ({"prompt": Q, "completion": A}, "sft", "prompt_completion", True, {"prompt": Q, "completion": A}),
    "messages": ({"messages": [*Q, *A]}, "sft", "messages", True, {"messages": [*Q, *A]}),
    "messages beside a prompt": ({"prompt": "x", "messages": [*Q, *A]}, "sft", "messages", True, {"messages": [*Q, *A]}),
    "messages cut after the answer": ({"messages": [*Q, *A, *Q]}, "sft", "messages", True, {"messages": [*Q, *A]}),
    "messages from a csv cell": ({"messages": '[{"role": "user", "content": "Q"}, {"role": "bot", "content": "A"}]'}, "sft", "messages", True, {"messages": [*Q, *A]}),
    "messages as prompt": ({"messages": [*Q, *A]}, "prompt", "prompt", True, {"prompt": Q, "completion": A}),
    "open messages as prompt": ({"messages": Q}, "prompt", "prompt", True, {"prompt": Q}),
    "content parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, *A]}, "sft", "messages", True, {"messages": [*Q, *A]}),
    "tool call": (
        {"messages": [*Q, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]},
        "sft", "messages", True, {"messages": [*Q, bot('{"name": "f"}')]},
    ),
    "explicit pair": ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference", "preference", False, {"prompt": "p", "chosen": "c", "rejected": "r"}),
    "explicit pair of whole conversations": (
        {"prompt": "Q", "chosen": [*Q, *A], "rejected": [*Q, *B]}, "preference", "preference", True, {"prompt": Q, "chosen": A, "rejected": B},
    ),
    "implicit pair": (
        {"chosen": [*Q, *A, user("2"), bot("c")], "rejected": [*Q, *A, user("2"), bot("r")]},
        "preference", "preference", True, {"prompt": [*Q, *A, user("2")], "chosen": [bot("c")], "rejected": [bot("r")]},
    ),
    "implicit pair that parts early": (
        {"chosen": [*Q, *A, user("2"), bot("c")], "rejected": [*Q, *B]},
        "preference", "preference", True, {"prompt": Q, "chosen": [*A, user("2"), bot("c")], "rejected": B},
    ),
    "implicit pair of equal sides": (
        {"chosen": [*Q, *A], "rejected": [*Q, *A]}, "preference", "preference", True, {"prompt": Q, "chosen": A, "rejected": A},
    ),
    "hh pair": (
        {"chosen": HH + "\n\nAssistant: c: d", "rejected": HH + "\n\nAssistant:"},
        "preference", "preference", True, {"prompt": [user("Hi"), bot("Yes?"), user("Why")], "chosen": [bot("c: d")], "rejected": [bot("")]},
    ),
    "hh answers that begin alike": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: I am", "rejected": "\n\nHuman: Q\n\nAssistant: I am not"},
        "preference", "preference", True, {"prompt": Q, "chosen": [bot("I am")], "rejected": [bot("I am not")]},
    ),
    "hh twice the assistant": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: x\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: x\n\nAssistant: B"},
        "preference", "preference", True, {"prompt": Q, "chosen": [bot("x\n\nA")], "rejected": [bot("x\n\nB")]},
    ),
    "chosen half": ({"prompt": "p", "chosen": "c", "rejected": "r"}, "sft", "prompt_completion", False, {"prompt": "p", "completion": "c"}),
    "prompts of pairs": ({"chosen": [*Q, *A], "rejected": [*Q, *B]}, "prompt", "prompt", True, {"prompt": Q}),
    "unpaired": ({"prompt": "p", "completion": "c", "label": 0}, "unpaired", "unpaired", False, {"prompt": "p", "completion": "c", "label": False}),
    "unpaired messages": ({"messages": [*Q, *A], "label": True}, "unpaired", "unpaired", True, {"prompt": Q, "completion": A, "label": True}),
    "good half": ({"messages": [*Q, *A], "label": "true"}, "sft", "messages", True, {"messages": [*Q, *A]}),
    "alpaca": ({"instruction": "i", "input": "x", "output": "o"}, "sft", "prompt_completion", False, {"prompt": "i\n\nx", "completion": "o"}),
    "alpaca no input": ({"instruction": "i", "input": " ", "output": "o"}, "sft", "prompt_completion", False, {"prompt": "i"}),
    "alpaca noinput": ({"instruction": "i", "input": "<No input>", "output": "o"}, "sft", "prompt_completion", False, {"prompt": "i"}),
    "alpaca marks are input": ({"instruction": "i", "input": "?!", "output": "o"}, "sft", "prompt_completion", False, {"prompt": "i\n\n?!"}),
    "alpaca without input": ({"instruction": "i", "output": "o"}, "prompt", "prompt", False, {"prompt": "i"}),
    "alpaca system and history": (
        {"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["Q", "A"]]},
        "sft", "prompt_completion", True, {"prompt": [system("s"), *Q, *A, user("i")], "completion": "o"},
    ),
    "alpaca both, as sft": ({"instruction": "i", "output": "o", "chosen": "c", "rejected": "r"}, "sft", "prompt_completion", False, {"prompt": "i", "completion": "o"}),
    "alpaca both, as pair": ({"instruction": "i", "output": "o", "chosen": "c", "rejected": "r"}, "preference", "preference", False, {"prompt": "i", "chosen": "c", "rejected": "r"}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "f"}, {"from": "observation", "value": "7"}, {"from": "gpt", "value": "A"}], "tools": "[]"},
        "sft", "messages", True, {"messages": [*Q, bot("f"), {"role": "tool", "content": "7"}, *A]},
    ),
    "sharegpt pair of dicts": (
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}, "system": "s"},
        "preference", "preference", True, {"prompt": [system("s"), *Q], "chosen": A, "rejected": B},
    ),
    "persona": (
        {"question": "Q?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No", "label_confidence": 0.9},
        "preference", "preference", False, {"prompt": "Q?", "chosen": " Yes", "rejected": " No", "label_confidence": 0.9},
    ),
    "ranking": (
        {"prompt": "p", "answers": ["a", "b", "c"]}, "preference", "preference", False,
        {"prompt": "p", "chosen": "a", "rejected": "c", "ranked_answers": ["a", "b", "c"]},
    ),
    "ranking of turns": (
        {"prompt": Q, "answers": [A, B]}, "judged", "preference", True, {"prompt": Q, "chosen": A, "rejected": B, "ranked_answers": [A, B]},
    ),
    "ranking as sft": ({"prompt": "p", "answers": ["a", "b"]}, "sft", "prompt_completion", False, {"prompt": "p", "completion": "a"}),
    "judged pair": ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}, "judged", "preference", False, {"chosen": "c", "margin": 2}),
    "judged label": ({"prompt": "p", "completion": "c", "label": 0}, "judged", "unpaired", False, {"completion": "c", "label": False}),
    "llmbar": ({"input": "i", "output_1": "a", "output_2": "b", "label": 2}, "preference", "preference", False, {"prompt": "i", "chosen": "b", "rejected": "a"}),
    "gsm8k": ({"question": "q", "answer": "so\n#### 2,125"}, "sft", "prompt_completion", False, {"prompt": "q", "completion": "so\n#### 2,125", "gold": "2125"}),
    "gsm8k prompts": ({"question": "q", "answer": "so\n#### -7"}, "prompt", "prompt", False, {"prompt": "q", "gold": "-7", "answer": "so\n#### -7"}),
    "svamp": ({"Body": "He has 2", "Question": "How many?", "Answer": 2.0}, "prompt", "prompt", False, {"prompt": "He has 2. How many?", "gold": "2"}),
    "svamp with a stop": ({"Body": "He has 2.", "Question": "How many?", "Answer": 2.0}, "sft", "prompt_completion", False, {"prompt": "He has 2. How many?", "completion": "2"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_shape_becomes_its_canonical_kind(name: str) -> None:
    row, want, kind, conversational, canonical = CASES[name]
    found = read([row], want=want)  # type: ignore[arg-type]
    assert (found.kind, found.conversational) == (kind, conversational)
    assert {key: found.rows[0][key] for key in canonical} == canonical
    assert "messages" not in found.rows[0] or kind == "messages"
    assert found.note.startswith("read as ")


def test_the_message_says_how_the_rows_were_read() -> None:
    row = {"chosen": [*Q, *A], "rejected": [*Q, *B]}
    assert read([row], want="preference").note == "read as preference, conversational; prompt implicit (longest common prefix)"


def test_a_columns_mapping_overrides_recognition() -> None:
    row = {"question": "q", "answer": "a", "better": "b", "worse": "w"}
    found = read([row], want="preference", columns={"prompt": "question", "chosen": "better", "rejected": "worse"})
    assert found.rows == [{"prompt": "q", "chosen": "b", "rejected": "w", "answer": "a"}]
    assert read([row], want="prompt", columns={"prompt": "answer"}).rows[0]["prompt"] == "a"


def test_oddities_are_counted() -> None:
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"prompt": "p", "chosen": "", "rejected": "{{name}}"},
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"prompt": " ", "chosen": "c", "rejected": "d"},
    ]
    assert read(rows, want="preference").counts == {
        "empty prompts": 1, "empty answers": 1, "identical pairs": 2, "duplicate rows": 1, "repeated prompts": 2, "rows with {{placeholders}}": 1,
    }  # fmt: skip
    labels = [{"prompt": str(n), "completion": "c", "label": n == 0} for n in range(3)]
    assert read(labels, want="unpaired").counts == {"labelled good": 1, "labelled bad": 2}
    half = read(labels, want="sft")
    assert len(half.rows) == 1 and half.counts == {"labelled bad (left out)": 2}


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        ("\n\nHuman: Q\n\nAssistant: A", "\n\nHuman: other\n\nAssistant: B"),
        ("\n\nHuman: Q\n\nAssistant: x\n\nHuman: y\n\nAssistant: A", "\n\nHuman: Q\n\nAssistant: B"),
        ([*Q, *A], [user("other"), *B]),
        ([*Q, *A, user("1"), *A], [*Q, *A, user("2"), *A]),
    ],
)
def test_pairs_whose_prompts_differ_are_left_out_and_counted(chosen: Any, rejected: Any) -> None:
    good = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    found = read([good, {"chosen": chosen, "rejected": rejected}], want="preference")
    assert len(found.rows) == 1
    assert found.counts == {"pairs whose prompts differ (left out)": 1}


FAULTS: dict[str, tuple[list[dict[str, Any]], str, list[str]]] = {
    "wrong columns": (
        [{"question": "q", "better": "b"}], "preference",
        ["missing prompt, chosen, rejected", "columns found: question, better", "columns: {prompt: question, chosen: better, rejected: …}"],
    ),
    "pairs for text": ([{"chosen": "a", "rejected": "b"}], "text", ["cannot be read as text"]),
    "unknown role": ([{"messages": [*Q, *A]}, {"messages": [{"role": "oracle", "content": "x"}, *A]}], "sft", ["row 1", "unknown role 'oracle'", "roles: {oracle: assistant}"]),
    "turn without role": ([{"messages": [{"content": "x"}]}], "sft", ["row 0", "needs role and content"]),
    "turn that is text": ([{"messages": ["x"]}], "sft", ["row 0", "a turn is str"]),
    "no turns": ([{"messages": []}], "sft", ["row 0", "expected a list of turns"]),
    "image": ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "sft", ["part of type 'image'"]),
    "null content": ([{"messages": [{"role": "user", "content": None}]}], "sft", ["content of a user turn is NoneType"]),
    "a hole": ([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}], "sft", ["row 1 has no 'completion'"]),
    "a column some rows lack": ([{"prompt": "p", "completion": "c"}, {"prompt": "p"}], "sft", ["row 1 has no 'completion'"]),
    "not text": ([{"prompt": True}], "prompt", ["column 'prompt' is bool"]),
    "ranking of one": ([{"prompt": "p", "answers": ["a"]}], "preference", ["answers must be a list of at least two, from the best to the worst"]),
    "ranking of no list": ([{"prompt": "p", "answers": "a"}], "preference", ["answers must be a list", "got a"]),
    "plain implicit": ([{"chosen": "ab", "rejected": "ac"}], "preference", ["plain text without turns", "prompt column"]),
    "bad label": ([{"prompt": "p", "completion": "c", "label": "perhaps"}], "unpaired", ["label must be true or false, got 'perhaps'"]),
    "bad tools": ([{"messages": [*Q, *A], "tools": "[{"}], "sft", ["broken JSON in tools"]),
    "nothing left": ([{"messages": Q}], "sft", ["none of 1 rows can be used", "without an answer"]),
    "no rows": ([], "sft", ["no rows"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_row_and_mend(name: str) -> None:
    rows, want, said = FAULTS[name]
    with pytest.raises(DataError) as caught:
        read(rows, want=want, source="my.jsonl")  # type: ignore[arg-type]
    assert "my.jsonl" in str(caught.value)
    for words in said:
        assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6


def test_the_table_of_roles_can_be_extended() -> None:
    row = {"messages": [*Q, {"role": "oracle", "content": "A"}]}
    assert read([row], want="sft", roles={"oracle": "assistant"}).rows[0]["messages"] == [*Q, *A]


def test_tools_are_a_list_and_an_empty_one_means_none() -> None:
    rows = [{"messages": [*Q, *A], "tools": tools} for tools in ('[{"name": "f"}]', [{"name": "f"}], "[]", [], "", None)]
    assert [row.get("tools") for row in read(rows, want="sft").rows] == [[{"name": "f"}]] * 2 + [None] * 4


def test_everything_rows_can_be_read_as() -> None:
    assert readings([{"instruction": "i", "output": "o", "chosen": "c", "rejected": "r"}]) == ["preference", "sft", "prompt"]
    assert readings([{"text": "t"}]) == ["sft", "text"]
    assert readings([{"number": 3}]) == []


def test_dialogue_strings() -> None:
    assert split_hh("\n\nHuman: a\n\nb: c\n\nAssistant: d") == [user("a\n\nb: c"), bot("d")]
    assert split_hh("Human: a\n\nAssistant:  d ") == [user("a"), bot(" d ")]
    assert not is_hh("A Human: yes") and not is_hh(None) and is_hh("\n\nAssistant: hello")
    assert merge_turns([user("a"), user("b"), bot("c")]) == [user("a\n\nb"), bot("c")]


def test_prompt_text_tells_prompts_apart() -> None:
    rows = [{"prompt": "Q"}, {"prompt": Q}, {"messages": [*Q, *A]}, {"prompt": [system("Q"), *Q]}]
    assert [prompt_text(row) for row in rows] == ["Q", "Q", "Q", "system: Q\nuser: Q"]
