"""Canonical rows as tokens: what is asked, what is answered, and which tokens are trained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

from tilt.data import trial
from tilt.data.conversations import Message, plain_text
from tilt.data.rollouts import Prompt, Rollout
from tilt.data.shapes import RANKED, TURNS
from tilt.data.sources import Row
from tilt.data.templates import NAMES, chat_template, is_bundled, opens_with_bos
from tilt.errors import DataError, UsageError, is_foreign

TrainOn = Literal["completion", "assistant", "all"]
OverLength = Literal["drop", "truncate"]
Made = TypeVar("Made")
_MARK = "\u241fturn{}\u241f"


class TooLong(DataError):
    """A row does not fit the limits, and the policy is to leave such rows out."""


@dataclass(frozen=True)
class Span:
    """A stretch of rendered text and whether it is trained."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Renderer:
    """Turns rows into prompts, demonstrations and pairs with one tokenizer and one template.

    `chat` renders through the tokenizer's template (a plain prompt becomes one user turn); otherwise prompt and answer are
    tokenised as they stand. Prompt and answer are tokenised apart and joined, as in generation, and an answer ends with a stop token, which is
    trained. `max_prompt_tokens` and `max_tokens` limit the prompt and the answer (0: no limit); `drop` leaves longer rows out,
    `truncate` keeps the end of a prompt and the start of an answer, without its stop token. `report` counts both.
    """

    tokenizer: Any
    chat: bool
    max_prompt_tokens: int = 0
    max_tokens: int = 0
    train_on: TrainOn = "completion"
    over_length: OverLength = "drop"
    report: Counter[str] = field(default_factory=Counter, compare=False)

    def __post_init__(self) -> None:
        _ends(self.tokenizer)
        if self.chat and not self.tokenizer.chat_template:
            raise UsageError(NO_TEMPLATE)

    # --- one row ----------------------------------------------------------------------------------------------------------

    def prompt(self, row: Row, id: int) -> Prompt:
        """The question of a row, up to where the answer begins. The other columns travel along, with `prompt` as readable text and `prompt_turns` where it has turns."""
        return self._ask(row["prompt"] if "prompt" in row else row["messages"][:-1], row, id)

    def demonstration(self, row: Row, id: int) -> Rollout:
        """A given answer. Trained are the answer (`completion`), every assistant turn (`assistant`), or every token that has a predecessor (`all`)."""
        if "text" in row and "completion" not in row and "messages" not in row:
            return self._document(row, id)
        if self.train_on == "completion":
            turns = row.get("messages")
            asked, said = (row["prompt"], row["completion"]) if turns is None else (turns[:-1], turns[-1:])
            return self._answered(self._ask(asked, row, id), said, row)
        return self._whole(row, id)

    def pair(self, row: Row, id: int) -> tuple[Rollout, Rollout]:
        """The chosen and the rejected answer to one prompt."""
        prompt = self._ask(row["prompt"], row, id)
        return self._answered(prompt, row["chosen"], row), self._answered(prompt, row["rejected"], row)

    def judged(self, row: Row, id: int) -> tuple[Rollout, ...]:
        """The answers that were judged: the chosen and the rejected one, all of a ranking from the best, or the one that bears a label."""
        if "label" in row and "chosen" not in row:
            return (self._answered(self._ask(row["prompt"], row, id), row["completion"], row),)
        prompt = self._ask(row["prompt"], row, id)
        return tuple(self._answered(prompt, said, row) for said in row.get(RANKED) or (row["chosen"], row["rejected"]))

    def text(self, text: str) -> list[int]:
        """The tokens of a plain text, without start or end token."""
        return self._encode(text)

    def literal(self, text: str) -> list[int]:
        """The same for a text that nobody vouches for: a control token spelled in it stays text."""
        return encoded(self.tokenizer, text, split_special_tokens=True)

    # --- many rows --------------------------------------------------------------------------------------------------------

    def prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        """The prompts of rows, numbered by row; those left out for their length are counted."""
        return self.each(self.prompt, rows)

    def demonstrations(self, rows: Sequence[Row]) -> list[Rollout]:
        return self.each(self.demonstration, rows)

    def pairs(self, rows: Sequence[Row]) -> list[tuple[Rollout, Rollout]]:
        return self.each(self.pair, rows)

    def judgements(self, rows: Sequence[Row]) -> list[tuple[Rollout, ...]]:
        """The judged answers of rows; a row of which one answer is too long is left out whole."""
        return self.each(self.judged, rows)

    def each(self, render: Callable[[Row, int], Made], rows: Sequence[Row]) -> list[Made]:
        """What `render` makes of each row and its number; rows that are too long are left out and counted."""
        made = []
        for number, row in enumerate(rows):
            try:
                made.append(render(row, number))
            except TooLong:
                self.report["rows left out"] += 1
        if rows and not made:
            raise DataError(
                f"none of {len(rows)} rows fits: {self.summary()}\n"
                f"  raise max_prompt_tokens ({self.max_prompt_tokens}) or max_tokens ({self.max_tokens}), or set over_length: truncate"
            )
        return made

    def summary(self) -> str:
        """`2 prompts longer than 64 tokens (left out)`: what the limits did, or that everything fitted."""
        return ", ".join(f"{n:,} {what}" for what, n in self.report.items() if n) or "every row fits"

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the end token, and the mark that closes an assistant turn."""
        closing = self._encode(self._closing) if self.chat else []
        return tuple(dict.fromkeys([int(self.tokenizer.eos_token_id), *closing[-1:]]))

    # --- text to tokens ---------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return encoded(self.tokenizer, text)

    def _render(self, turns: Sequence[Message], tools: Any = None, answer_next: bool = False) -> str:
        """A conversation as text under the template."""
        return render_chat(self.tokenizer, turns, tools, answer_next)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Any special token of the tokenizer, as text."""
        return re.compile("|".join(re.escape(mark) for mark in self.tokenizer.all_special_tokens))

    def _watch(self, said: str | Sequence[Message]) -> None:
        """Count texts that spell a control token: it acts as one."""
        texts = [said] if isinstance(said, str) else [turn["content"] for turn in said]
        for _ in filter(self._control.search, texts):
            self.report["texts that spell a control token"] += 1

    @cached_property
    def _start(self) -> tuple[int, ...]:
        """What stands before plain text: the start token, where the tokenizer puts one."""
        return (int(self.tokenizer.bos_token_id),) if opens_with_bos(self.tokenizer) else ()

    @cached_property
    def _first(self) -> tuple[int, ...]:
        """The token that stands for an empty prompt, so that the first token of the answer has a predecessor."""
        start = self.tokenizer.bos_token_id
        return (int(self.tokenizer.eos_token_id if start is None else start),)

    @cached_property
    def _closing(self) -> str:
        """What ends an assistant turn: the template's text after it up to its first special token, or else the end token."""
        mark = _MARK.format(0)
        rendered = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}])
        after = rendered.partition(mark)[2]
        return self._close(after)[0]

    def _close(self, after: str) -> tuple[str, str]:
        """The text after an answer, cut behind the token that stops generation: `<|im_end|>\\n<|im_start|>…` → `<|im_end|>`, rest."""
        marks = [(after.find(mark), mark) for mark in self.tokenizer.all_special_tokens if mark in after]
        if not marks or after[: min(marks)[0]].strip():
            return self.tokenizer.eos_token, after
        place = min(at for at, _ in marks)
        longest = max((mark for at, mark in marks if at == place), key=len)
        return after[: place + len(longest)], after[place + len(longest) :]

    def _question(self, asked: str | list[Message], row: Row) -> list[int]:
        self._watch(asked)
        if self.chat:
            turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            return self._encode(self._render(turns, self._tools(row), answer_next=True))
        if not isinstance(asked, str):
            raise UsageError(NO_TEMPLATE)
        return [*self._start, *self._encode(asked)]

    def _tools(self, row: Row) -> Any:
        tools = row.get("tools")
        if tools and "tools" not in str(self.tokenizer.chat_template):
            self.report["rows whose tools the template does not show"] += 1
        return tools

    def _ask(self, asked: str | list[Message], row: Row, id: int) -> Prompt:
        turns = {} if isinstance(asked, str) else {TURNS: asked}
        return Prompt(self._fit_prompt(self._question(asked, row), id), id, {**row, "prompt": plain_text(asked), **turns})

    def _answered(self, prompt: Prompt, said: str | list[Message], row: Row) -> Rollout:
        """The answer, its stop token included. Of several turns only the assistant's are trained."""
        self._watch(said)
        if isinstance(said, str) or len(said) == 1:
            text = said if isinstance(said, str) else said[0]["content"]
            closing = self._closing if self.chat else self.tokenizer.eos_token
            ids = [*self._encode(text), *self._encode(closing)]
            return self._fit(Rollout.demonstration(prompt, tuple(ids)))
        if not self.chat:
            raise UsageError(NO_TEMPLATE)
        asked = row["prompt"] if not isinstance(row["prompt"], str) else [{"role": "user", "content": row["prompt"]}]
        return self._fit(self._spans_rollout(self._spans([*asked, *said], self._tools(row), first=len(asked)), prompt))

    # --- whole conversations ----------------------------------------------------------------------------------------------

    def _whole(self, row: Row, id: int) -> Rollout:
        """Every assistant turn trained, or with `all` every token; the prompt is what stands before the first trained token."""
        turns = row.get("messages") or [*_turns(row["prompt"], "user"), *_turns(row["completion"], "assistant")]
        self._watch(turns)
        if self.chat:
            spans = self._spans(turns, self._tools(row))
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            start = self.tokenizer.bos_token if self._start else ""
            spans = [Span(start + row["prompt"], False), Span(row["completion"] + self.tokenizer.eos_token, True)]
        else:
            raise UsageError(NO_TEMPLATE)
        columns = {**row, "prompt": plain_text(row["prompt"] if "prompt" in row else turns[:-1])}
        if self.train_on == "all":
            tokens = [i for span in spans for i in self._encode(span.text)]
            return self._fit(Rollout.demonstration(Prompt(tuple(tokens[:1]), id, columns), tuple(tokens[1:])))
        lead = self._fit_prompt(self._encode(spans[0].text), id)
        return self._fit(self._spans_rollout(spans[1:], Prompt(lead, id, columns)))

    def _spans_rollout(self, spans: Sequence[Span], prompt: Prompt) -> Rollout:
        """Spans tokenised one by one. What follows the last trained token is left off."""
        tokens: list[int] = []
        trained: list[bool] = []
        for span in spans:
            ids = self._encode(span.text)
            tokens += ids
            trained += [span.trained] * len(ids)
        end = len(trained) - trained[::-1].index(True)
        return Rollout.demonstration(prompt, tuple(tokens[:end]), tuple(trained[:end]))

    def _spans(self, turns: Sequence[Message], tools: Any, first: int = 0) -> list[Span]:
        """The conversation as text, alternating what is given and what the assistant says with its stop token.

        user Hi, assistant Hello → given `<|user|>Hi<|end|><|assistant|>`, trained `Hello<|end|>`. The turns before number `first` are the prompt
        and are left out. Contents are told from the template's own text by rendering marks in their place.
        """
        marked = [{**turn, "content": _MARK.format(n)} for n, turn in enumerate(turns)]
        frame = self._render(marked, tools)
        pieces: list[str] = []
        for n in range(len(turns)):
            before, found, frame = frame.partition(_MARK.format(n))
            if not found:
                raise DataError(
                    f"the chat template does not show turn {n} ({turns[n]['role']}), so it cannot be trained\n  choose template: {' | '.join(NAMES)}"
                )
            pieces.append(before)
        pieces.append(frame)
        spans: list[Span] = []
        given = pieces[0]
        for n, turn in enumerate(turns):
            if turn["role"] != "assistant":
                given += turn["content"] + pieces[n + 1]
                continue
            closing, rest = self._close(pieces[n + 1])
            if n < first:
                given += turn["content"] + pieces[n + 1]
                continue
            spans += [Span(given, False), Span(turn["content"] + closing, True)]
            given = rest
        if self._render(turns, tools) != "".join(piece + said["content"] for piece, said in zip(pieces, turns, strict=False)) + pieces[-1]:
            self.report["conversations whose text the template would alter (kept as given)"] += 1
        if first:
            lead = self._render(turns[:first], tools, answer_next=True)
            spans[0] = Span(spans[0].text[len(lead) :] if spans[0].text.startswith(lead) else "", False)
        return spans

    def _document(self, row: Row, id: int) -> Rollout:
        """A plain text, from its first token to the end token."""
        tokens = (*self._encode(row["text"]), int(self.tokenizer.eos_token_id))
        return self._fit(Rollout.demonstration(Prompt(self._start or self._first, id, {**row, "prompt": ""}), tokens))

    # --- limits -----------------------------------------------------------------------------------------------------------

    def _fit_prompt(self, tokens: Sequence[int], id: int) -> tuple[int, ...]:
        """The prompt within its limit: its end is kept, or the row is left out. An empty one becomes the start token."""
        limit = self.max_prompt_tokens
        if not limit or len(tokens) <= limit:
            return tuple(tokens) or self._first
        self._over("prompts", limit, f"row {id}: a prompt of {len(tokens)} tokens")
        return tuple(tokens[-limit:])

    def _fit(self, rollout: Rollout) -> Rollout:
        """The answer within its limit: its start is kept, or the row is left out."""
        limit = self.max_tokens
        if not limit or len(rollout.tokens) <= limit:
            return rollout
        self._over("answers", limit, f"row {rollout.prompt.id}: an answer of {len(rollout.tokens)} tokens")
        if not any(rollout.sampled[:limit]):
            raise TooLong(f"row {rollout.prompt.id}: nothing to train within {limit} tokens")
        cut = {name: getattr(rollout, name)[:limit] for name in ("tokens", "sampled", "logprobs")}
        return replace(rollout, stop="length", **cut)

    def _over(self, what: str, limit: int, where: str) -> None:
        self.report[f"{what} longer than {limit} tokens ({'left out' if self.over_length == 'drop' else 'cut'})"] += 1
        if self.over_length == "drop":
            raise TooLong(f"{where} is longer than {limit}")


NO_TEMPLATE = (
    "the data are conversations, but the tokenizer has no chat template (a base model?)\n"
    "  choose one:  template: tilt    short role tokens <|user|> … <|end|>, for models from scratch\n"
    "               template: chatml  <|im_start|>user … <|im_end|>\n"
    "               template: plain   ### Instruction: … ### Response: …, ordinary text for base models"
)


def _turns(side: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": side}] if isinstance(side, str) else side


def render_chat(tokenizer: Any, turns: Sequence[Mapping[str, Any]], tools: Any, answer_next: bool) -> str:
    """A conversation as text; the one place that calls the tokenizer's template, in transformers' sandbox and in bounded time."""
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, Mapping) else [template]:
        if not isinstance(text, str):
            raise UsageError(f"the tokenizer's chat template is {type(text).__name__}, not text")
        if text not in trial.PASSED and is_bundled(text, tokenizer):
            trial.PASSED.add(text)
        trial.check(text)
    try:
        with trial.in_time():
            made = str(
                tokenizer.apply_chat_template(
                    list(turns), tools=tools, tokenize=False, add_generation_prompt=answer_next, return_dict=False
                )
            )
    except trial.Endless:
        raise DataError(f"the chat template does not come to its end within {trial.SECONDS:g} s") from None
    except Exception as error:  # Jinja raises its own kinds, templates raise through raise_exception
        roles = ", ".join(turn["role"] for turn in turns)
        said = str(error)[:300] or type(error).__name__
        raise DataError(
            f"the chat template refuses a conversation with the turns {roles}: {said}\n  choose template: {' | '.join(NAMES)}"
        ) from None
    if len(made) > trial.MOST_TEXT + trial.MOST_GROWTH * sum(len(str(turn)) for turn in turns):
        raise DataError(f"the chat template makes {len(made):,} characters of a conversation")
    return made


def encoded(tokenizer: Any, text: str, **how: bool) -> list[int]:
    """The tokens of a text, no special ones added; a text that the tokenizer cannot take is an error that shows it."""
    try:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False, **how)]
    except BaseException as error:  # tokenizers raise their own kinds, for half characters and for words without an <unk>
        if not is_foreign(error):
            raise
        raise DataError(
            f"the tokenizer cannot read a text: {(str(error).splitlines() or [type(error).__name__])[0][:200]}\n  the text: {text[:100]!a}"
        ) from None


def _ends(tokenizer: Any) -> None:
    """Refuse a tokenizer without an end token."""
    if tokenizer.eos_token_id is None or not tokenizer.eos_token:
        raise UsageError("the tokenizer has no end token (eos_token), so an answer could never end; set one")


def renderer(
    tokenizer: Any,
    template: str = "auto",
    *,
    conversational: bool = False,
    max_prompt_tokens: int = 0,
    max_tokens: int = 0,
    train_on: TrainOn = "completion",
    over_length: OverLength = "drop",
) -> Renderer:
    """A renderer for a template's name, its Jinja text, `text` (no template), or `auto`: the tokenizer's own, else plain text.

    A named template is set on the tokenizer, so that what a run saves carries it.
    """
    _ends(tokenizer)
    if template == "auto":
        if conversational and not tokenizer.chat_template:
            raise UsageError(NO_TEMPLATE)
    elif template == "text":
        if conversational:
            raise UsageError(
                f"template: text joins prompt and answer as they stand, but the data are conversations\n  choose {' | '.join(NAMES)}"
            )
    else:
        tokenizer.chat_template = template if "{" in template else chat_template(template, tokenizer)
    chat = template != "text" and bool(tokenizer.chat_template)
    return Renderer(tokenizer, chat, max_prompt_tokens, max_tokens, train_on, over_length)


def show(example: Rollout, tokenizer: Any) -> str:
    """An example token by token: context as it stands, each trained token in brackets: `Hi⟦Hello⟧⟦<|end|>⟧`."""
    words = [(i, False) for i in example.prompt.tokens] + list(zip(example.tokens, example.sampled, strict=True))
    cells = []
    for i, trained in words:
        text = tokenizer.decode([i]).replace("\n", "⏎")
        cells.append(f"⟦{text}⟧" if trained else text)
    count = sum(example.sampled)
    return f"{len(words)} tokens, {count} trained (in brackets)\n" + "".join(cells)
