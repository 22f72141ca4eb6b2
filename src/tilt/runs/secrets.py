"""Secrets stay out of what a run writes and says: values of the environment, tokens by their shape, passwords in URLs, and whatever is called a token."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "<hidden>"
LEAST = 8
"""Values of the environment shorter than this may be any word, and are left."""

_KEY = r"(?:[A-Za-z0-9]+[_.-])*(?:(?:api|access|secret|private)[_-]?key|token|passwd|password|passphrase|secret|credential)"
_SHAPES = (
    r"hf_[A-Za-z0-9]{16,}", r"sk-[A-Za-z0-9_-]{16,}", r"gh[pousr]_[A-Za-z0-9]{20,}", r"github_pat_[A-Za-z0-9_]{20,}", r"glpat-[A-Za-z0-9_-]{16,}",
    r"xox[abprs]-[A-Za-z0-9-]{10,}", r"AKIA[0-9A-Z]{16}", r"AIza[A-Za-z0-9_-]{30,}", r"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*",
)  # fmt: skip
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:" + "|".join(_SHAPES) + ")")
_URL = re.compile(r"(?<=://)[^\s/@'\"]+@")
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{8,}")
_NAMED = re.compile(rf"(?i)(?<![A-Za-z0-9])({_KEY})(['\"]?\s*[=:]\s*['\"]?|\s+)([^\s'\",;&<>|\[\]{{}}()]+)")
_OF_A_TOKENIZER = re.compile(r"(?i)(?:^|[_.-])(?:bos|eos|pad|unk|sep|cls|mask|stop|end|start|image|special)[_-]token$")
_ENVIRONMENT = re.compile(r"(?i)token|secret|passw(?:or)?d|api_?key|access_?key|private_?key|credential")


def masked(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with `<hidden>` in place of secrets: `token=abc123` → `token=<hidden>`, `https://me:word@host` → `https://<hidden>@host`, `hf_…`, `sk-…`,
    and the value of every variable of the environment that is called a token, key, secret or password. What is called `eos_token` or `max_tokens` stays."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= LEAST and _ENVIRONMENT.search(name):
            text = text.replace(value, HIDDEN)
    text = _TOKEN.sub(HIDDEN, _URL.sub(f"{HIDDEN}@", text))
    return _NAMED.sub(_named, _BEARER.sub(rf"\1\2{HIDDEN}", text))


def _named(found: re.Match[str]) -> str:
    """`key=value` with the value hidden. A key and a value side by side are hidden after `--` alone: elsewhere they are words of a sentence."""
    key, between, value = found.groups()
    flagged = found.string[max(0, found.start() - 2) : found.start()] == "--"
    if (
        _OF_A_TOKENIZER.search(key)
        or (not between.strip() and (not flagged or value.startswith("-")))
        or value in ("null", "true", "false", "~")
    ):
        return found[0]
    return f"{key}{between}{HIDDEN}"
