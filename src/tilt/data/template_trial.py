"""The program that tries a chat template out: started by path, it renders a few conversations under limits of time and memory that it cannot lift.

Standard library and jinja2 only. The template comes on standard input; the exit code is 0 unless the text is too long or a limit ended the process. What a
template merely refuses is no matter here: the same sandbox says so when it renders the real rows.
"""

import json
import resource
import sys

from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY, TEXT = 2, 2**30, 1_000_000
TURNS = [{"role": role, "content": "What is 2 + 2?\n" * 4} for role in ("user", "assistant")]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]
CONVERSATIONS = [TURNS[:1], [{"role": "system", "content": "s"}, *TURNS], TURNS * 8, []]


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}` shows what stands within."""

    tags = {"generation"}

    def parse(self, parser):  # type: ignore[no-untyped-def]
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message: str) -> None:
    raise ValueError(message)


def main() -> int:
    for kind, amount in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (amount, amount))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "1 January 2026"}
    try:
        template = environment.from_string(sys.stdin.buffer.read().decode("utf-8", "replace"))
    except MemoryError:
        raise
    except Exception:
        return 0
    for turns in CONVERSATIONS:
        for tools in (None, TOOLS):
            for opening in (False, True):
                try:
                    made = template.render(
                        messages=turns, tools=tools, add_generation_prompt=opening, documents=None, bos_token="<s>", eos_token="</s>"
                    )
                except MemoryError:
                    raise
                except Exception:
                    continue
                if len(made) > TEXT:
                    return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
