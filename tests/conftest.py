"""The lab's own model, loaded once, on one thread: real, small, and the same in every test."""

import families
import pytest
import torch
from hypothesis import settings

from gazeguard import lab
from gazeguard.guard import GazeGuard

torch.set_num_threads(1)
settings.register_profile("gazeguard", deadline=None)  # a busy machine is no failure
settings.load_profile("gazeguard")


@pytest.fixture(scope="module")
def quietly():
    """For a whole module: one thread and no gradients."""
    with families.quietly():
        yield


@pytest.fixture(scope="session")
def lab_vlm():
    """The lab's model and processor."""
    return lab.load()


@pytest.fixture
def guard(lab_vlm):
    """A guard with policy mark over the lab's model."""
    return GazeGuard(*lab_vlm)
