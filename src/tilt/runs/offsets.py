"""Where each token lies in the text: byte offsets into the UTF-8 completion, exact within characters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """The bytes of every token of a tokenizer, looked up once each."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.tokenizer = tokenizer
        self.added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
        self.special = {token for token, added in self.added.items() if added.special}
        self.byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
        self.known: dict[int, bytes | None] = {}

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that a token stands for, from the vocabulary's own spelling; nothing where the spelling does not tell."""
        if token not in self.known:
            self.known[token] = self._look_up(token)
        return self.known[token]

    def shown(self, token: int) -> str:
        """A token as a person reads it: its text, or its bytes as `<e4 bd>` where they are no whole characters."""
        spelled = self.bytes_of(token)
        if spelled is None:
            return str(self.tokenizer.decode([token]))
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return f"<{spelled.hex(' ')}>"

    def _look_up(self, token: int) -> bytes | None:
        if token in self.added:
            return str(self.added[token].content).encode()
        spelling = self.tokenizer.convert_ids_to_tokens(int(token))
        if spelling is None:
            return None
        if self.byte_level:
            table = byte_alphabet()
            return bytes(table[c] for c in spelling) if all(c in table for c in spelling) else None
        if match := BYTE_TOKEN.fullmatch(spelling):
            return bytes([int(match[1], 16)])
        return str(spelling).replace("\u2581", " ").encode()


def text_offsets(tokens: Sequence[int], text: str, spelling: Spelling) -> list[int]:
    """The byte at which each token starts in `text`.

    `aé` as the tokens `a`, c3, a9 → 0 1 2. Tokens that the text leaves out (special ones) have no width; bytes that are no UTF-8
    stand in the text as �, three bytes wide, and their tokens start where it starts.
    """
    target = text.encode("utf-8", "replace")
    spelled = [spelling.bytes_of(token) for token in tokens]
    if None not in spelled:
        whole = [piece or b"" for piece in spelled]
        bare = [b"" if token in spelling.special else piece for token, piece in zip(tokens, whole, strict=True)]
        for place in (_place, _place_replaced):  # most texts hold nothing that is no UTF-8: all ways are tried for those first
            for pieces in (whole, bare):
                for strip in (0, 1):  # SentencePiece drops the first space of a text
                    starts = place(pieces, target, strip)
                    if starts is not None:
                        return starts
    return _by_decoding(tokens, target, spelling.tokenizer)


def _place(pieces: Sequence[bytes], target: bytes, strip: int) -> list[int] | None:
    """Starts of the pieces in the target where they are its bytes; nothing otherwise."""
    raw = b"".join(pieces)
    if raw[strip:] != target or (strip and not raw.startswith(b" ")):
        return None
    return _starts(pieces, strip)


def _place_replaced(pieces: Sequence[bytes], target: bytes, strip: int) -> list[int] | None:
    """The same where the target has � for what is no UTF-8 in the pieces."""
    raw = b"".join(pieces)
    if strip and not raw.startswith(b" "):
        return None
    shift, shown = _replaced(raw[strip:])
    return [shift[start] for start in _starts(pieces, strip)] if shown == target else None


def _starts(pieces: Sequence[bytes], strip: int) -> list[int]:
    ends = [0, *itertools.accumulate(map(len, pieces))]
    return [max(0, end - strip) for end in ends[:-1]]


def _replaced(raw: bytes) -> tuple[list[int], bytes]:
    """Bytes with what is no UTF-8 replaced by �, and where each of the old positions went: 61 ff 62 → 0 1 4 5."""
    shift: list[int] = []
    shown, position = bytearray(), 0
    while position < len(raw):
        try:
            raw[position:].decode("utf-8")
            good = bad = len(raw)
        except UnicodeDecodeError as error:
            good, bad = position + error.start, position + error.end
        shift += range(len(shown), len(shown) + good - position)
        shown += raw[position:good]
        shift += [len(shown)] * (bad - good)
        shown += "\ufffd".encode() if bad > good else b""
        position = bad
    return [*shift, len(shown)], bytes(shown)


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write for bytes: printable ones for themselves, the others from U+0100 on (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}


def _by_decoding(tokens: Sequence[int], target: bytes, tokenizer: Any) -> list[int]:
    """Starts from decoding growing stretches of tokens, for vocabularies whose spelling does not give bytes; exact to a character, not within one."""
    starts: list[int] = []
    at, anchor = 0, 0
    for i in range(len(tokens)):
        starts.append(min(at, len(target)))
        piece = tokenizer.decode(list(tokens[anchor : i + 1]), skip_special_tokens=False)
        if piece.endswith("\ufffd") and i + 1 - anchor < 8:
            continue
        before = tokenizer.decode(list(tokens[max(0, anchor - 4) : anchor]), skip_special_tokens=False) if anchor else ""
        joined = tokenizer.decode(list(tokens[max(0, anchor - 4) : i + 1]), skip_special_tokens=False)
        at += len(joined.encode("utf-8", "replace")) - len(before.encode("utf-8", "replace"))
        anchor = i + 1
    return starts
