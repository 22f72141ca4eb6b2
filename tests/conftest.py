"""What every test stands on: no network, one thread, shapes checked while the tests run (TILT_SHAPES=0 leaves that out), and the shared data where TILT_DATA names it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if os.environ.get("TILT_SHAPES", "1") != "0":
    spec = importlib.util.spec_from_file_location("tilt_shape_checker", Path(__file__).with_name("shape_checker.py"))
    assert spec is not None and spec.loader is not None
    sys.modules["tilt_shape_checker"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tilt_shape_checker"])
    sys.modules["tilt_shape_checker"].install(["tilt.objectives", "tilt.segments", "tilt.distributions"])


@pytest.fixture(scope="session")
def tilt_data() -> Callable[[str], Path]:
    """`tilt_data("gsm8k/test.jsonl")` is that file of the shared data; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        root = os.environ.get("TILT_DATA")
        if not root:
            pytest.skip(f"TILT_DATA is not set, so {name} cannot be found")
        path = Path(root) / name
        if not path.exists():
            pytest.skip(f"TILT_DATA holds no {name}")
        return path

    return find
