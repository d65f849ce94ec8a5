"""These tests need the real libraries: `make test-integrations` sets them up in a virtual environment of their own."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_random_state():
    torch.manual_seed(1234)
