"""Three chat templates as Jinja text, for tokenizers that bring none: tilt, chatml and plain."""

from __future__ import annotations

from typing import Any

from tilt.errors import UsageError

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
END = "<|end|>"

_TILT = (
    "{%- if tools %}<|system|>{{ tools | tojson }}END{% endif %}"
    "{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + 'END' }}{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CHATML = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}END{{ '\\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + 'END\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PLAIN = (
    "{%- if tools %}{{ '### Tools:\\n' }}{{ tools | tojson }}{{ '\\n\\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + 'END\\n\\n' }}"
    "{%- elif message['role'] == 'tool' %}{{ '### Result:\\n' + message['content'] + '\\n\\n' }}"
    "{%- else %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
_TEMPLATES = {"tilt": (_TILT, END), "chatml": (_CHATML, "<|im_end|>"), "plain": (_PLAIN, "")}
NAMES = tuple(_TEMPLATES)


def chat_template(name: str, tokenizer: Any) -> str:
    """The Jinja text of a named template for this tokenizer, whole in itself.

    A turn ends with the template's own mark where that is one token, else with the tokenizer's end token; the text opens with
    the start token where the tokenizer puts one before plain text.
    """
    if name not in _TEMPLATES:
        raise UsageError(f"template: there is no template {name!r}; choose {', '.join(NAMES)}, or give the Jinja text itself")
    text, end = _TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    if not end or end not in vocabulary:
        end = tokenizer.eos_token
    opening = "{{ bos_token }}" if opens_with_bos(tokenizer) else ""
    return opening + text.replace("END", end)


def is_bundled(template: str, tokenizer: Any) -> bool:
    """Whether this text is one of the three, for this tokenizer."""
    return bool(tokenizer.eos_token) and any(template == chat_template(name, tokenizer) for name in NAMES)


def opens_with_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts its start token before plain text."""
    start = tokenizer.bos_token_id
    return start is not None and list(tokenizer("a")["input_ids"][:1]) == [start]
