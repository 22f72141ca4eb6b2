"""Metrics are means over everything that was added, not means of means."""

from __future__ import annotations

import torch

from tilt.learning.meter import Meter


def test_pairs_add_before_they_divide():
    meter = Meter()
    meter.add({"a": (torch.tensor(1.0), torch.tensor(2.0)), "b": (torch.tensor(0.0), torch.tensor(0.0))})
    meter.add({"a": (torch.tensor(5.0), torch.tensor(1.0))})
    assert meter.read() == {"a": 2.0}
    assert Meter().read() == {}


def test_a_metric_keeps_no_graph():
    x = torch.ones((), requires_grad=True)
    meter = Meter()
    meter.add({"a": (x * 2, torch.ones(()))})
    assert not meter._pairs["a"][0].requires_grad
