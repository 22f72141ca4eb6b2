"""Chat templates in Jinja: mutated good ones, and pieces that loop, multiply, reach for what they must not, or are no template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzz_data import TURNS, tokenizers
from hostile import Target, bounded, mutated
from hypothesis import strategies as st

from tilt.data.rendering import renderer
from tilt.data.templates import NAMES, chat_template
from tilt.data.wording import Wording

PIECES = [
    "{{ messages }}", "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ bos_token }}",
    "{{ eos_token }}", "{% if add_generation_prompt %}", "{% endif %}", "{% generation %}", "{% endgeneration %}", "{{ raise_exception('no') }}",
    "{% for i in range(10**9) %}", "{% for i in range(99999) %}", "{{ 'a' * 10**9 }}", "{{ 2 ** 2 ** 40 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}", "{{ messages.append(1) }}", "{{ lipsum(n=10**6) }}", "{% set x = namespace(a='a') %}", "{% for i in range(60) %}{% set x.a = x.a ~ x.a %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}", "{{ f(0) }}", "{{ '%99999999999d' % 1 }}", "{{ '{:>9999999999}'.format(1) }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ tools | tojson }}", "{{ tools[0].function }}", "{% break %}", "{{ 1 / 0 }}", "{{ strftime_now('%Y' * 10**6) }}", "{#", "{%", "}}", "{{",
    "{{ messages | map(attribute='__class__') | list }}", "{{ 'a' | center(10**10) }}", "{% set messages = 3 %}", "{{ (messages | length) ** (10 ** 10) }}", "<|end|>", "<|user|>", "é", "\u241fturn0\u241f",
]  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b"},
    {"messages": [*TURNS, *TURNS], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"prompt": [{"role": "system", "content": ""}, *TURNS[:1]], "completion": "<|end|>", "chosen": "a", "rejected": TURNS[1:]},
]


def template(example: tuple[str, str], folder: Path) -> None:
    text, trained = example
    words, before = tokenizers()[0], tokenizers()[0].chat_template
    try:
        with bounded():
            render: Any = renderer(words, text if "{" in text else text + "{{ messages }}", train_on=trained)
            for row in ROWS:
                with bounded():
                    render.demonstration(row, 0)
                with bounded():
                    render.prompt(row, 0)
            with bounded():
                assert render.stop_ids
        with bounded():
            Wording(words, "is {answer} right?", True)(answer="yes")
    finally:
        words.chat_template = before


GOOD = [chat_template(name, tokenizers()[0]).encode() for name in NAMES]
TARGETS = (
    Target(
        "templates: Jinja of strangers",
        st.tuples(
            st.one_of(st.lists(st.sampled_from(PIECES), max_size=7).map("".join), mutated(GOOD).map(lambda data: data.decode("utf-8", "replace"))),
            st.sampled_from(["completion", "assistant", "all"]),
        ),
        template, 15,
    ),
)  # fmt: skip
