"""The lab's own model, loaded once, on one thread: real, small, and the same in every test."""

import shutil

import families
import pytest
import torch
from hypothesis import settings

from gazeguard import lab
from gazeguard.artifacts import DETECTOR_FILE
from gazeguard.detection.detector import Detector
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
def lab_folder(tmp_path_factory):
    """The lab's checkpoint, with a detector that judges captions in any wording: many tests say what no model would say so.

    `tests/test_wording.py` has the detector that ships.
    """
    folder = tmp_path_factory.mktemp("lab") / lab.checkpoint_path().name
    shutil.copytree(lab.checkpoint_path(), folder)
    detector = Detector.from_pretrained(folder)
    domain = detector.domain.model_copy(update={"wording": None})
    (folder / DETECTOR_FILE).write_text(detector.model_copy(update={"domain": domain}).model_dump_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def lab_vlm(lab_folder):
    """The model and processor of `lab_folder`."""
    return lab.load(lab_folder)


@pytest.fixture
def guard(lab_vlm):
    """A guard with policy mark over the lab's model."""
    return GazeGuard(*lab_vlm)
