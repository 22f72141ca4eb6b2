"""When an answer ends: a stop token, a stop string that its text now contains, or no room."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Decoder = Callable[[Sequence[int]], str]
_UNKNOWN, _NEVER, _MAYBE = 0, 1, 2


class Stops:
    """Stop ids and stop strings over a vocabulary. The token that completes a stop string is the answer's last.

    Texts are decoded only for rows whose new token could end a stop string; whether it could is worked out once per token.
    """

    def __init__(self, vocabulary: int, ids: Sequence[int], strings: Sequence[str], decode: Decoder) -> None:
        self.ends = np.zeros(vocabulary, dtype=bool)
        self.ends[list(ids)] = True
        self.strings = tuple(s for s in strings if s)
        self.decode = decode
        self.known = np.full(vocabulary, _UNKNOWN if self.strings else _NEVER, dtype=np.int8)

    def ended(self, tokens: NDArray[np.int64], answer: Callable[[int], list[int]]) -> NDArray[np.bool_]:
        """Which rows stop with their newest token, `tokens` [rows]; `answer(row)` is the row's whole answer so far."""
        ended = self.ends[tokens]
        if self.strings:
            for row in np.flatnonzero(self.known[tokens] != _NEVER):
                if self._may_end(int(tokens[row])) and not ended[row]:
                    text = self.decode(answer(int(row)))
                    ended[row] = any(s in text for s in self.strings)
        return ended

    def _may_end(self, token: int) -> bool:
        """Whether some stop string could end inside this token's text. Pieces of characters, and spaces that decoding drops, count as maybe."""
        if self.known[token] == _UNKNOWN:
            piece = self.decode([token])
            maybe = (
                not piece.strip() or "\ufffd" in piece or any(ends_within(s, text) for s in self.strings for text in (piece, " " + piece))
            )
            self.known[token] = _MAYBE if maybe else _NEVER
        return bool(self.known[token] == _MAYBE)


def ends_within(string: str, piece: str) -> bool:
    """Whether `string`, begun in earlier text or here, can end inside `piece`: "</a>" can end inside "a>b", and not inside "</a"."""
    return any(piece[:end].endswith(string[-end:]) for end in range(1, len(piece) + 1))
