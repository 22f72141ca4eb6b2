"""Curves as a picture."""

from __future__ import annotations

import pytest
from made_runs import make_run

from tilt.errors import UsageError


def test_curves_of_two_runs_become_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from tilt.cli.plot import plot

    runs = [str(make_run(tmp_path / name, steps=1, count=4)) for name in ("a", "b")]
    place = plot(runs, str(tmp_path / "c.png"), [])
    assert place.read_bytes()[:4] == b"\x89PNG" and place.stat().st_size < 150_000
    one = plot(runs[:1], str(tmp_path / "d.png"), ["extra/metric"])
    assert one.stat().st_size != place.stat().st_size
    with pytest.raises(UsageError, match="no curve nothing: there are reward"):
        plot(runs, str(tmp_path / "e.png"), ["nothing"])
