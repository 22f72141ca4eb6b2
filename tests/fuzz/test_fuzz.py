"""Every fuzz target for a moment, on the same examples each time; `make fuzz` goes on for minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import examine, targets

TARGETS = targets()


@pytest.mark.parametrize("name", TARGETS)
def test_refusals_are_sentences(name: str) -> None:
    assert examine(TARGETS[name], TARGETS[name].quick, seed=None) >= 3


def test_a_reader_that_fails_is_found(tmp_path: Path) -> None:
    """A target whose reader raises anything but a TiltError fails, with the smallest example."""
    from dataclasses import replace

    from hostile import bounded

    def careless(example: object, folder: Path) -> None:
        with bounded():
            if str(example).count("0") > 1:
                raise KeyError("gold")

    with pytest.raises(KeyError, match="gold"):
        examine(replace(next(iter(TARGETS.values())), check=careless), 200, seed=None)
