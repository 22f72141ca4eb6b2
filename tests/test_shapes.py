"""Shapes in types are checked while the tests run: an axis has one length within a call."""

from __future__ import annotations

import pytest
import torch

from tilt.objectives.policy import Clip, TokenAverage
from tilt.segments import Layout


def test_axes_that_disagree_are_refused() -> None:
    three, four = torch.ones(3), torch.ones(4)
    Clip()(three, three, three)
    with pytest.raises(Exception, match="advantages"):
        Clip()(three, three, four)


def test_dtypes_that_disagree_are_refused() -> None:
    layout = Layout.of([2, 1])
    TokenAverage()(layout, torch.ones(2, dtype=torch.bool))
    with pytest.raises(Exception, match="counted"):
        TokenAverage()(layout, torch.ones(2))
