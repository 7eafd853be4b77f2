"""Fixtures that several test files use."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Torch on one thread: the order of a sum depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
