"""The figures' numbers: slopes of the six clip cases, where a smoothed loss is least, what fidelity does at its ends, and the files that the pages show."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load

from tilt.objectives import Fidelity, Logistic

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return load(DOCS / "make_figures.py")


def test_six_cases_of_the_clip(figures: ModuleType) -> None:
    assert [figures.gain_and_slope(*case)[1] for case in figures.CASES] == [1, 1, 0, 0, -1, -1]
    assert [figures.gain_and_slope(*case)[0] for case in figures.CASES] == pytest.approx([0.6, 1, 1.2, -0.8, -1, -1.5])


def test_a_smoothed_loss_is_least_at_the_odds_of_its_labels(figures: ModuleType) -> None:
    least = math.log(0.9 / 0.1)
    loss, slope = figures.loss_and_slope(Logistic(0.1), [least - 0.1, least, least + 0.1])
    assert slope[0] < 0 < slope[2] and slope[1] == pytest.approx(0, abs=1e-12) and loss[1] == pytest.approx(0.325083, abs=1e-6)


def test_fidelity_is_bounded_and_flat_at_both_ends(figures: ModuleType) -> None:
    loss, slope = figures.loss_and_slope(Fidelity(), [-40.0, 0.0, 40.0])
    assert loss[0] == pytest.approx(1) and loss[2] == pytest.approx(0, abs=1e-8) and max(map(abs, (slope[0], slope[2]))) < 1e-8 < -slope[1]


def test_k3_is_x_less_its_logarithm_less_one(figures: ModuleType) -> None:
    x = [0.2, 1.0, 3.0]
    found = figures.estimates(x)
    assert found["k3 = x - ln x - 1"] == pytest.approx([v - math.log(v) - 1 for v in x], abs=1e-12)
    assert found["k1 = -ln x"][2] < 0 <= min(found["k2 = (ln x)² / 2"])


def test_every_figure_is_there(figures: ModuleType) -> None:
    names = {f"{draw.__name__}.svg" for draw in figures.FIGURES}
    assert names == {path.name for path in (DOCS / "figures").glob("*.svg")} & names
    assert all("<svg" in (DOCS / "figures" / name).read_text(encoding="utf-8") for name in names)
