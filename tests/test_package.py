"""Does a wheel hold what the checkout holds: policies, page, checkpoint and the right version?"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import gazeguard
from gazeguard.policy import policy_folder, policy_names

REPO = Path(__file__).resolve().parents[1]
ASK = """
import gazeguard
from gazeguard.policy import load_policy, policy_folder, policy_names
loaded = [load_policy(name).name for name in policy_names()]
print(gazeguard.__file__, gazeguard.__version__, policy_folder(), *loaded, sep="\\n")
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network, unpacked into an empty folder."""
    built, folder = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("unpacked")
    (wheel,) = WheelBuilder(str(REPO)).build(directory=str(built), versions=["standard"])
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def run(*arguments: str, path: Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    made = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_the_wheel_works_on_its_own(unpacked, tmp_path):
    """With nothing but the unpacked wheel ahead on the path, away from the checkout, every policy loads from inside it."""
    where, version, folder, *loaded = run("-c", ASK, path=unpacked, cwd=tmp_path).split()
    assert Path(where) == unpacked / "gazeguard" / "__init__.py"
    assert Path(folder) == unpacked / "gazeguard" / "policies"
    assert loaded == policy_names()
    assert version == gazeguard.__version__


def test_the_wheel_holds_every_file_of_the_package(unpacked):
    """Modules, the replay page, the policies: byte for byte those of the checkout, and no tests."""
    package = REPO / "gazeguard"
    for path in package.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".html"):
            assert (unpacked / "gazeguard" / path.relative_to(package)).read_bytes() == path.read_bytes()
    for path in (REPO / "policies").iterdir():
        assert (unpacked / "gazeguard" / "policies" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {"gazeguard"}


def test_the_wheel_holds_the_labs_checkpoint(unpacked):
    checkpoint = REPO / "gazeguard" / "lab" / "checkpoint"
    if not (checkpoint / "config.json").exists():
        pytest.skip("the lab's checkpoint is not trained yet: python -m gazeguard.lab.train")
    kept = unpacked / "gazeguard" / "lab" / "checkpoint"
    files = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    assert sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file()) == files
    assert sum((checkpoint / file).stat().st_size for file in files if file.suffix == ".safetensors") <= 20e6


def test_the_metadata_says_this_version_and_the_command(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text())
    assert (metadata["Name"], metadata["Version"]) == ("gazeguard", gazeguard.__version__)
    assert "gazeguard = gazeguard.cli:app" in (info / "entry_points.txt").read_text()


def test_a_checkout_reads_the_policies_beside_it(tmp_path):
    """Also from another working directory."""
    assert policy_folder() == REPO / "policies"
    folder = run("-c", "from gazeguard.policy import policy_folder; print(policy_folder())", path=REPO, cwd=tmp_path)
    assert Path(folder.strip()) == REPO / "policies"
