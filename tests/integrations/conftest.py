"""These tests need the real libraries: `make test-integrations` sets them up in a virtual environment of their own."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # watched.py is there

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_random_state():
    torch.manual_seed(1234)
