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


@pytest.fixture(scope="module")
def patient_ray():
    """Ray that waits for what is slow, and whose workers are no nicer (by default 15) than other work beside them."""
    options = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_worker_register_timeout_seconds": "3600",
        "RAY_health_check_failure_threshold": "1000",
        "RAY_gcs_server_port_wait_time_s": "3600",
        "RAY_gcs_server_request_timeout_seconds": "3600",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name, value)
        yield
