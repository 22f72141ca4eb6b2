"""What fuzz targets share: hostile values, mutations of good bytes and good JSON, and the rule that every refusal is a TiltError, soon and within memory."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tilt.errors import TiltError

SECONDS = 10
"""The longest that one example may take."""
HEADROOM = 3 * 2**30
"""Bytes that one example may map beyond what the process has."""


@dataclass(frozen=True)
class Target:
    """A reader to be fuzzed: `check(example, folder)` feeds it one example, in an empty folder; whatever it raises beside a TiltError is a defect."""

    name: str
    examples: st.SearchStrategy[Any]
    check: Callable[[Any, Path], None]
    quick: int = 50
    """Examples in `make test`."""


class TooSlow(BaseException):
    """An example that took longer than SECONDS."""


@contextmanager
def bounded() -> Iterator[None]:
    """A TiltError is a right answer; everything else that comes out is not, and neither is an answer that takes too long or too much memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    alarmed = threading.current_thread() is threading.main_thread()
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, hard))
    if alarmed:
        before, left = signal.signal(signal.SIGALRM, _late), signal.setitimer(signal.ITIMER_REAL, SECONDS)[0]
    try:
        yield
    except TiltError as error:
        assert error.exit_code in (1, 2, 3, 4) and str(error).strip(), f"an error without words: {error!r}"
    finally:
        if alarmed:
            signal.setitimer(signal.ITIMER_REAL, left)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _late(*_: object) -> None:
    raise TooSlow(f"more than {SECONDS} s")


# --- values ---------------------------------------------------------------------------------------------------------------

WORDS = ["", " ", "\x00", "﻿", "\ud800", "a\udfff", "\x1b[2J", "‮", "é" * 50, "../../etc/passwd", "/dev/zero", "NaN", "<|end|>", "{{x}}", "{% for", "~", "null",
         "1e999", "0x" + "f" * 40, "0x" + "f" * 5000, "[" * 900, "%s%n", "a" * 3000, "\n\nHuman: a\n\nAssistant: b"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 255, 2**31, 2**63, 10**18, 10**30, -(2**63), 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan")]


def texts() -> st.SearchStrategy[str]:
    return st.one_of(st.sampled_from(WORDS), st.text(max_size=12), st.text(st.characters(codec=None), max_size=4))


def scalars() -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-5, 300), st.floats(), texts())


def values(names: list[str] | None = None) -> st.SearchStrategy[Any]:
    """Scalars, lists and mappings; keys are mostly `names`."""
    keys = st.one_of(st.sampled_from(names), texts()) if names else texts()
    return st.recursive(
        scalars(), lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)), max_leaves=12
    )


# --- mutations ------------------------------------------------------------------------------------------------------------

PIECES = [b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"\n", b"\r", b"\t", b"\\", b"\\u0000", b"\\ud800", b"&a ", b"*a",
          b"<<: ", b"!!python/object/apply:os.system [x]", b"- ", b"|", b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"true", b"../", b"[" * 20000, b"{'a':" * 3000,
          b"0x" + b"f" * 5000, b"\xf0\x9f\x98\x80", b"{{ 9**9**9 }}", b"\xc0\x80"]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the good texts with up to four cuts, copies, flips and insertions."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        how = draw(st.sampled_from(["insert", "cut", "copy", "flip", "end", "bytes"]))
        if how == "insert":
            data = data[:at] + draw(st.sampled_from(PIECES)) + data[at:]
        elif how == "bytes":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[end:]
        elif how == "cut":
            data = data[:at] + data[end:]
        elif how == "copy":
            data = data[:end] + data[at:]
        elif how == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif how == "end":
            data = data[:at]
    return data


@st.composite
def changed(draw: st.DrawFn, good: Any, new: st.SearchStrategy[Any], most: int = 3) -> Any:
    """A good JSON value of which up to `most` places are left out, renamed or replaced."""
    whole: Any = [good]
    for _ in range(draw(st.integers(1, most))):
        whole = _changed(draw, whole, new)
    return whole[0] if whole else None


def _changed(draw: st.DrawFn, value: Any, new: st.SearchStrategy[Any]) -> Any:
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(list(value)))
        how = draw(st.sampled_from(["within", "within", "within", "drop", "add"]))
        if how == "drop":
            return {k: v for k, v in value.items() if k != key}
        if how == "add":
            return {**value, draw(texts()): draw(new)}
        return {**value, key: _changed(draw, value[key], new)}
    if isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _changed(draw, value[at], new), *value[at + 1 :]]
    return draw(new)


def put(path: Path, content: bytes | str) -> Path:
    """Write a file, lone surrogates as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path
