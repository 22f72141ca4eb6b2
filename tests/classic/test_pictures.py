"""Grids and curves: what they show is what was given."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch

from tilt.classic.mdp import uniform
from tilt.classic.pictures import beside, curves_svg, grid_svg, grid_text, policy_text, walk_text
from tilt.classic.planning import evaluate, policy_iteration
from tilt.classic.tables import cliff_walking, frozen_lake, sutton_barto_grid, taxi
from tilt.errors import UsageError

SVG = "{http://www.w3.org/2000/svg}"


def test_the_grid_of_sutton_and_barto_as_text() -> None:
    mdp = sutton_barto_grid()
    text = grid_text(mdp, evaluate(mdp, uniform(mdp)), 1)
    assert text.splitlines()[0].split() == ["3.3", "8.8", "4.4", "5.3", "1.5"] and len(text.splitlines()) == 5
    assert policy_text(mdp, policy_iteration(mdp).policy).splitlines()[0] == "→ ↑ ← ↑ ←"


def test_ends_and_stochastic_policies() -> None:
    mdp = frozen_lake(slippery=False)
    policy = torch.nn.functional.one_hot(policy_iteration(mdp).policy, 4).double()
    assert policy_text(mdp, policy) == policy_text(mdp, policy.argmax(-1)) == "↓ → ↓ ←\n↓ · ↓ ·\n→ ↓ ↓ ·\n· → → ·"


def test_a_walk() -> None:
    mdp = cliff_walking()
    rows = walk_text(mdp, [36, 24, 25, 37, 36]).splitlines()
    assert rows[2].split()[:3] == ["1", "2", "·"] and rows[3].split()[:3] == ["4", "3", "·"]


def test_svg_shows_every_cell_and_every_point() -> None:
    mdp = frozen_lake()
    cells = ElementTree.fromstring(grid_svg(mdp, torch.arange(16.0), torch.zeros(16).long(), title="a < b"))
    texts = [node.text for node in cells.iter(SVG + "text")]
    assert texts[0] == "a < b" and texts.count("←") == 11 and texts.count("·") == 5 and "15.00" in texts
    shades = [float(node.attrib["fill-opacity"]) for node in cells.iter(SVG + "rect") if "fill-opacity" in node.attrib]
    assert shades == sorted(shades) and shades[0] == 0.05 and shades[-1] == 0.55
    hole = grid_svg(mdp, torch.tensor([float("nan"), -1e-9, *[1.0] * 14]))
    assert (
        hole.count("#9ca3af") == 1 and "-0.00" not in hole and "nan" not in hole and "-0.00" not in grid_text(mdp, torch.full((16,), -1e-9))
    )
    drawn = curves_svg({"one": [(0, 1), (1, 10), (2, 100)], "two": [(0, 5), (2, 0)]}, log=True, x="steps", dots=True)
    lines = [node.attrib["points"].split() for node in ElementTree.fromstring(drawn).iter(SVG + "polyline")]
    assert [len(line) for line in lines] == [3, 1], "0 has no logarithm"
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert (
        heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11) and "1.0e+02" in drawn and drawn.count("<circle") == 4
    )
    both = ElementTree.fromstring(beside(drawn, drawn))
    assert len(list(both.iter(SVG + "polyline"))) == 4 and re.search(r'viewBox="0 0 856 \d+"', beside(drawn, drawn))


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a process with a grid"):
        grid_text(taxi(), torch.zeros(500))
    with pytest.raises(UsageError, match="nothing to draw"):
        curves_svg({"empty": []})
