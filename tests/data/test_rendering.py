"""What is asked, what is answered and what is trained, token by token; tokenizers and templates of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from tilt.data.packing import pack
from tilt.data.rendering import Renderer, renderer, show
from tilt.data.rollouts import Rollout
from tilt.data.templates import NAMES, chat_template
from tilt.data.tokenizers import characters, train_bpe, words
from tilt.errors import DataError, UsageError

CORPUS = ["### Instruction:\nWhat is two and two?\n\n### Response:\nFour, of course.", "user assistant system <think>\n\n</think>"] * 20
THINKING = (
    "{%- for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}\n{{ m.content | trim }}<|tool|>\n{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALK = {"messages": [{"role": "system", "content": "Be brief."}, user("one"), bot("two"), user("three"), bot("four")]}


@pytest.fixture
def bpe() -> Any:
    return train_bpe(CORPUS, 320)


@pytest.fixture
def base(bpe: Any) -> Any:
    """A tokenizer without a chat template."""
    bpe.chat_template = None
    return bpe


def with_start(tokenizer: Any) -> Any:
    """The tokenizer puts its start token before plain text, as Llama's does."""
    start = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    assert tokenizer("a")["input_ids"][0] == start[1]
    return tokenizer


def whole(example: Rollout) -> list[int]:
    return [*example.prompt.tokens, *example.tokens]


def trained(example: Rollout, tokenizer: Any) -> list[str]:
    """Each run of trained tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, chosen in zip(example.tokens, example.sampled, strict=True):
        if chosen:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_a_plain_answer_ends_with_the_end_token_which_is_trained(base: Any) -> None:
    example = renderer(base).demonstration({"prompt": "two and ", "completion": "two"}, 4)
    assert base.decode(example.prompt.tokens) == "two and " and example.prompt.id == 4
    assert base.decode(example.tokens) == "two<|end|>" and all(example.sampled)


def test_a_chat_answer_is_trained_and_its_prompt_is_not(bpe: Any) -> None:
    example = renderer(bpe).demonstration({"prompt": "two", "completion": "four", "more": 1}, 0)
    assert bpe.decode(example.prompt.tokens) == "<|user|>two<|end|><|assistant|>"
    assert trained(example, bpe) == ["four<|end|>"] and example.tokens[-1] == bpe.eos_token_id
    assert example.prompt.columns == {"prompt": "two", "completion": "four", "more": 1}


def test_the_prompt_is_what_generation_will_see(bpe: Any) -> None:
    for template in NAMES:
        render = renderer(bpe, template)
        seen = bpe.apply_chat_template([user("two")], add_generation_prompt=True, return_dict=False)
        assert list(render.prompt({"prompt": "two"}, 0).tokens) == seen
        assert list(render.demonstration({"prompt": "two", "completion": "x"}, 0).prompt.tokens) == seen


@pytest.mark.parametrize("template", [*NAMES, THINKING, TRIMMING])
def test_a_whole_conversation_is_what_the_template_writes(bpe: Any, template: str) -> None:
    turns = TALK["messages"][1:] if template == TRIMMING else TALK["messages"]
    render = renderer(bpe, template, train_on="assistant")
    example = render.demonstration({"messages": turns}, 0)
    written = bpe.apply_chat_template(turns, tokenize=False)
    assert written.startswith(bpe.decode(whole(example)))
    assert not written[len(bpe.decode(whole(example))) :].strip(), "only blanks after the last stop token are left off"
    stop = bpe.decode([render.stop_ids[-1]])
    assert trained(example, bpe) == [f"two{stop}", f"four{stop}"]


def test_the_plain_template_trains_the_end_token_that_it_lacks(bpe: Any) -> None:
    example = renderer(bpe, "plain").demonstration({"prompt": "two", "completion": "four"}, 0)
    assert bpe.decode(whole(example)) == "### Instruction:\ntwo\n\n### Response:\nfour<|end|>"
    assert trained(example, bpe) == ["four<|end|>"]


@pytest.mark.parametrize("template", NAMES)
def test_train_on_chooses_what_is_trained(bpe: Any, template: str) -> None:
    last = renderer(bpe, template).demonstration(TALK, 0)
    turns = renderer(bpe, template, train_on="assistant").demonstration(TALK, 0)
    every = renderer(bpe, template, train_on="all").demonstration(TALK, 0)
    assert trained(last, bpe) == ["four<|end|>"] and trained(turns, bpe) == ["two<|end|>", "four<|end|>"]
    assert len(every.prompt.tokens) == 1 and all(every.sampled)
    assert bpe.decode(whole(last)) == bpe.decode(whole(turns)) == bpe.decode(whole(every)).rstrip()


def test_tool_output_is_not_trained(bpe: Any) -> None:
    row = {
        "messages": [user("now?"), bot("clock()"), {"role": "tool", "content": "noon"}, bot("It is noon.")],
        "tools": [{"name": "clock"}],
    }
    example = renderer(bpe, "tilt", train_on="assistant").demonstration(row, 0)
    assert trained(example, bpe) == ["clock()<|end|>", "It is noon.<|end|>"]
    assert '"clock"' in bpe.decode(example.prompt.tokens) and "<|tool|>noon<|end|>" in bpe.decode(example.tokens)


def test_tools_that_a_template_does_not_show_are_counted(bpe: Any) -> None:
    render = renderer(bpe, THINKING)
    render.prompt({"prompt": "two", "tools": [{"name": "clock"}]}, 0)
    assert render.report["rows whose tools the template does not show"] == 1


def test_a_stop_token_that_is_not_the_end_token_is_trained_and_stops(bpe: Any) -> None:
    render = renderer(bpe, TRIMMING)
    assert trained(render.demonstration({"prompt": "two", "completion": "four"}, 0), bpe) == ["four<|tool|>"]
    assert render.stop_ids == (bpe.eos_token_id, bpe.convert_tokens_to_ids("<|tool|>"))
    assert renderer(bpe, "tilt").stop_ids == renderer(bpe, "text").stop_ids == (bpe.eos_token_id,)


def test_text_that_the_template_alters_is_counted(bpe: Any) -> None:
    render = renderer(bpe, TRIMMING, train_on="assistant")
    example = render.demonstration({"messages": [user(" two "), bot(" four")]}, 0)
    assert trained(example, bpe) == [" four<|tool|>"]
    assert render.report["conversations whose text the template would alter (kept as given)"] == 1


@pytest.mark.parametrize("template", [*NAMES, "text", TRIMMING])
@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_there_is_one_start_token(bpe: Any, template: str, train_on: Any) -> None:
    tokenizer = with_start(bpe)
    render = renderer(tokenizer, template, train_on=train_on)
    ids = whole(render.demonstration({"prompt": "two", "completion": "four"}, 0))
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert list(render.prompt({"prompt": "two"}, 0).tokens).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", ["tilt", "text"])
@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_the_end_token_is_trained_where_padding_is_the_same_token(bpe: Any, template: str, train_on: Any) -> None:
    bpe.pad_token = bpe.eos_token
    example = renderer(bpe, template, train_on=train_on).demonstration({"prompt": "two", "completion": "four"}, 0)
    assert example.tokens[-1] == bpe.pad_token_id and example.sampled[-1]
    assert pack([example]).actions[-1] == bpe.eos_token_id


def test_a_pair_shares_its_prompt(bpe: Any) -> None:
    render = renderer(bpe)
    chosen, rejected = render.pair({"prompt": [user("two")], "chosen": [bot("four")], "rejected": "five"}, 9)
    assert chosen.prompt is rejected.prompt and chosen.prompt.id == 9
    assert [trained(side, bpe) for side in (chosen, rejected)] == [["four<|end|>"], ["five<|end|>"]]
    assert pack([chosen, rejected]).layout.prompt.tolist() == [0, 0]


def test_judged_rows(bpe: Any) -> None:
    """A pair, all answers of a ranking from the best, or the one that bears a label; the columns travel with the prompt."""
    render = renderer(bpe)
    pair = render.judged({"prompt": "two", "chosen": "four", "rejected": "five", "margin": 2.0}, 3)
    ranking = render.judged({"prompt": "two", "chosen": "four", "rejected": "six", "ranked_answers": ["four", "five", "six"]}, 4)
    labelled = render.judged({"prompt": "two", "completion": "four", "label": False}, 5)
    assert [len(group) for group in (pair, ranking, labelled)] == [2, 3, 1]
    assert [trained(side, bpe) for side in ranking] == [["four<|end|>"], ["five<|end|>"], ["six<|end|>"]]
    assert all(side.prompt is group[0].prompt for group in (pair, ranking) for side in group)
    assert pair[0].prompt.columns["margin"] == 2.0 and labelled[0].prompt.columns["label"] is False
    short = renderer(bpe, max_tokens=1)
    with pytest.raises(DataError, match="none of 1 rows fits"):
        short.judgements([{"prompt": "two", "chosen": "four", "rejected": "five six seven"}])


def test_an_answer_of_several_turns_trains_the_assistant_alone(bpe: Any) -> None:
    row = {"prompt": [user("one")], "chosen": [bot("two"), user("three"), bot("four")], "rejected": [bot("none")]}
    chosen, rejected = renderer(bpe).pair(row, 0)
    assert trained(chosen, bpe) == ["two<|end|>", "four<|end|>"]
    assert bpe.decode(whole(chosen)) == bpe.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=False)
    assert chosen.prompt == rejected.prompt


@pytest.mark.parametrize("template", ["tilt", "text"])
def test_empty_answers_and_prompts_still_have_an_action(bpe: Any, template: str) -> None:
    render = renderer(bpe, template)
    for row in ({"prompt": "two", "completion": ""}, {"prompt": "", "completion": ""}):
        example = render.demonstration(row, 0)
        assert example.tokens == (bpe.eos_token_id,) and example.prompt.tokens
        assert pack([example]).actions.tolist() == [bpe.eos_token_id]


def test_a_text_is_trained_from_its_first_token(base: Any) -> None:
    example = renderer(base).demonstration({"text": "two"}, 0)
    assert base.decode(whole(example)) == "<|start|>two<|end|>" and all(example.sampled)
    assert renderer(base).text("two") == base.encode("two")


ROWS = [{"prompt": "1", "completion": "2"}, {"prompt": "12345", "completion": "2"}, {"prompt": "1", "completion": "67890"}]


@pytest.fixture
def digits() -> Any:
    return characters("0123456789")


def test_longer_rows_are_left_out_and_counted(digits: Any) -> None:
    render = renderer(digits, "text", max_prompt_tokens=3, max_tokens=3)
    assert [example.prompt.id for example in render.demonstrations(ROWS)] == [0]
    assert render.summary() == "1 prompts longer than 3 tokens (left out), 2 rows left out, 1 answers longer than 3 tokens (left out)"
    assert renderer(digits, "text").summary() == "every row fits"


def test_longer_rows_are_cut_and_counted(digits: Any) -> None:
    render = renderer(digits, "text", max_prompt_tokens=3, max_tokens=3, over_length="truncate")
    _, long_prompt, long_answer = render.demonstrations(ROWS)
    assert digits.decode(long_prompt.prompt.tokens) == "345" and long_prompt.stop == "stop"
    assert digits.decode(long_answer.tokens) == "678" and long_answer.stop == "length", "a cut answer does not end"
    assert render.report["prompts longer than 3 tokens (cut)"] == render.report["answers longer than 3 tokens (cut)"] == 1


def test_a_row_that_just_fits_is_kept(digits: Any) -> None:
    render = renderer(digits, "text", max_prompt_tokens=5, max_tokens=6)
    assert len(render.demonstrations(ROWS)) == 3 and not render.report


def test_when_nothing_fits_the_error_says_what_to_raise(digits: Any) -> None:
    with pytest.raises(DataError, match=r"none of 3 rows fits(.|\n)*max_prompt_tokens \(0\)(.|\n)*over_length: truncate"):
        renderer(digits, "text", max_tokens=1).demonstrations(ROWS)


def test_a_cut_that_leaves_nothing_to_train_leaves_the_row_out(bpe: Any) -> None:
    row = {"prompt": [user("1")], "chosen": [bot("2")], "rejected": [bot("2")]}
    render = renderer(bpe, "tilt", max_tokens=3, over_length="truncate", train_on="assistant")
    late = {"messages": [user("one"), bot("two"), user("a long question after it"), bot("four")]}
    assert trained(render.demonstration(late, 0), bpe)[0].startswith("t")
    assert render.pairs([row])[0][0].stop == "stop"


def test_control_tokens_in_the_data_are_counted(bpe: Any) -> None:
    render = renderer(bpe)
    render.demonstration({"prompt": "two <|end|> three", "completion": "four"}, 0)
    render.demonstration({"prompt": "two", "completion": "four"}, 0)
    assert render.report["texts that spell a control token"] == 1


def test_conversations_without_a_template_offer_the_choices(base: Any) -> None:
    for attempt in (
        lambda: renderer(base, conversational=True),
        lambda: renderer(base).demonstration(TALK, 0),
        lambda: renderer(base).prompt(TALK, 0),
        lambda: Renderer(base, chat=True),
        lambda: renderer(base, "text", conversational=True),
    ):
        with pytest.raises(UsageError) as caught:
            attempt()
        for name in NAMES:
            assert name in str(caught.value)


def test_an_unknown_template_and_a_missing_end_token_are_errors(base: Any) -> None:
    with pytest.raises(UsageError, match="no template 'alpaca'; choose tilt, chatml, plain"):
        renderer(base, "alpaca")
    base.eos_token = None
    with pytest.raises(UsageError, match="no end token"):
        renderer(base)


def test_a_template_that_refuses_is_a_plain_error(bpe: Any) -> None:
    with pytest.raises(DataError, match=r"refuses a conversation with the turns system, user.*System role not supported"):
        renderer(bpe, TRIMMING).prompt({"prompt": [{"role": "system", "content": "s"}, user("u")]}, 0)
    with pytest.raises(DataError, match="refuses"):
        renderer(bpe, "{% for m in messages %}{{ m.content").prompt({"prompt": "two"}, 0)
    with pytest.raises(DataError, match=r"does not show turn 0 \(system\)"):
        renderer(
            bpe, "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}<|end|>{% endif %}{% endfor %}", train_on="assistant"
        ).demonstration(TALK, 0)


def test_a_named_template_is_saved_with_the_tokenizer(base: Any, tmp_path: Path) -> None:
    renderer(with_start(base), "chatml")
    base.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template([user("two")], tokenize=False, add_generation_prompt=True) == (
        "<|start|><|im_start|>user\ntwo<|end|>\n<|im_start|>assistant\n"
    )


def test_a_mark_in_the_vocabulary_ends_the_turn(base: Any) -> None:
    base.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]}, replace_extra_special_tokens=False)
    assert "<|im_end|>" in chat_template("chatml", base)
    render = renderer(base, "chatml")
    assert trained(render.demonstration({"prompt": "a", "completion": "b"}, 0), base) == ["b<|im_end|>"]
    assert render.stop_ids == (base.eos_token_id, base.convert_tokens_to_ids("<|im_end|>"))


def test_show_marks_each_trained_token(digits: Any) -> None:
    shown = show(renderer(digits, "text").demonstration({"prompt": "12", "completion": "34"}, 0), digits)
    assert shown == "5 tokens, 3 trained (in brackets)\n12⟦3⟧⟦4⟧⟦<|end|>⟧"


# --- tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: train_bpe(CORPUS, 300), lambda: characters("".join(CORPUS) + "ab"), lambda: words(["two", "and"])]
)
def test_a_trained_tokenizer_reopens_plainly(make: Any, tmp_path: Path) -> None:
    made = make()
    made.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (made, again):
        special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
        roles = tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"])
        assert len({*special, *roles}) == 7 and None not in special and tokenizer.unk_token_id not in roles
        assert tokenizer.eos_token == "<|end|>"
        assert tokenizer.decode(tokenizer.encode("two and two")) == "two and two"
        assert tokenizer.encode("<|user|>two<|end|>")[0] == roles[1] and tokenizer.encode("two<|end|>")[-1] == special[2]
    assert made.get_vocab() == again.get_vocab() and made.chat_template == again.chat_template
    assert again.encode("two and") == made.encode("two and")


@pytest.mark.parametrize("text", ["plain", " leading and  double ", "línea\nnueva\t", "数学 🙂 ½", "", "don't , stop ."])
def test_bytes_round_trip_any_text(bpe: Any, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


def test_the_vocabulary_has_the_size_asked_for_and_too_small_is_refused() -> None:
    assert len(train_bpe(CORPUS, 300)) == 300
    with pytest.raises(UsageError, match="at least 263"):
        train_bpe(CORPUS, 262)


def test_training_is_deterministic() -> None:
    assert train_bpe(CORPUS, 300).get_vocab() == train_bpe(CORPUS, 300).get_vocab()


def test_characters_are_one_token_each_and_others_unknown() -> None:
    made = characters(["12", "\n"])
    assert len(made.encode("2\n1")) == 3 and made.decode(made.encode("2\n1")) == "2\n1"
    assert made.encode("x") == [made.unk_token_id]
    with pytest.raises(DataError, match="at least one entry"):
        characters("")
