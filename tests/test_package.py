"""Do a wheel and an sdist hold what the checkout holds, do they install, and is the command what the README says?"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import typer
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from typer.testing import CliRunner

import gazeguard
from gazeguard.cli import app
from gazeguard.policy import policy_folder, policy_names

REPO = Path(__file__).resolve().parents[1]
ASK = """
import gazeguard
from gazeguard.policy import load_policy, policy_folder, policy_names
loaded = [load_policy(name).name for name in policy_names()]
print(gazeguard.__file__, gazeguard.__version__, policy_folder(), *loaded, sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network."""
    (made,) = WheelBuilder(str(REPO)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return Path(made)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    (made,) = SdistBuilder(str(REPO)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return Path(made)


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    """The wheel in an empty folder."""
    folder = tmp_path_factory.mktemp("unpacked")
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


def metadata_of(unpacked: Path) -> tuple[Path, Message]:
    (info,) = unpacked.glob("*.dist-info")
    return info, Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))


def test_the_metadata_says_this_version_and_the_command(unpacked):
    info, metadata = metadata_of(unpacked)
    assert (metadata["Name"], metadata["Version"]) == ("gazeguard-vlm", gazeguard.__version__)
    assert "gazeguard = gazeguard.cli:app" in (info / "entry_points.txt").read_text()


def test_the_licence_and_the_notices_travel_along(unpacked):
    """Word for word; the licence is Apache's, and the notices name every library that is installed beside."""
    info, metadata = metadata_of(unpacked)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File")) == {"LICENSE", "NOTICE"}
    for name in ("LICENSE", "NOTICE"):
        assert (info / "licenses" / name).read_bytes() == (REPO / name).read_bytes()
    licence = (REPO / "LICENSE").read_text()
    assert all(part in licence for part in ("Version 2.0, January 2004", "END OF TERMS AND CONDITIONS", "limitations under"))
    notices = (REPO / "NOTICE").read_text()
    names = [re.match(r"[\w-]+", needed)[0] for needed in metadata.get_all("Requires-Dist")]
    assert all(re.search(rf"^  {name} ", notices, re.M) for name in names if name != "gazeguard-vlm")


def test_typing_and_extras_are_declared(unpacked):
    """Checkers find the hints, and ``all`` is every other extra but guardrails, which holds other libraries back."""
    assert (unpacked / "gazeguard" / "py.typed").is_file()
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras.pop("all")
    named = set(re.findall(r"\w+", everything.removeprefix("gazeguard-vlm")))
    assert set(extras) == named | {"guardrails"} == {
        "data", "evals", "guardrails", "ray", "scenes", "serve", "spacy", "vision",
    }  # fmt: skip


def imported(folder: str) -> set[str]:
    """The top-level modules that the sources of a folder import."""
    names = set()
    for path in (REPO / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_every_library_that_is_imported_is_declared():
    """By the package: a dependency or an extra; by evaluations and tests: these, or the group dev."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    metadata = project["project"]
    extras = [needed for extra in metadata["optional-dependencies"].values() for needed in extra]
    declared = {re.match(r"[\w-]+", needed)[0] for needed in (*metadata["dependencies"], *extras)}
    dev = {re.match(r"[\w-]+", needed)[0] for needed in project["dependency-groups"]["dev"]}
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    names |= {"prometheus_client": "prometheus-client", "guardrails": "guardrails-ai"}
    hosts = {"lmms_eval"}  # imports us, not the other way round
    declared |= {"litellm"}  # guardrails-ai brings it along
    local = {path.stem for path in (REPO / "tests").iterdir()} | {"evals", "gazeguard"}
    assert {names.get(name, name) for name in imported("gazeguard")} - hosts - local <= declared
    for folder in ("evals", "tests"):
        assert {names.get(name, name) for name in imported(folder)} - local <= declared | dev


def test_the_changelog_begins_with_this_version_and_the_citation_has_it():
    assert re.search(r"^## (\S+)", (REPO / "CHANGELOG.md").read_text(), re.M)[1] == gazeguard.__version__
    assert re.search(r"^version: (\S+)", (REPO / "CITATION.cff").read_text(), re.M)[1] == gazeguard.__version__


def test_an_sdist_makes_the_same_wheel(sdist, unpacked, tmp_path):
    """And holds what `make` and the tests need."""
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for name in ("pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE", ".ci/constraints.txt"):
        assert (folder / name).read_bytes() == (REPO / name).read_bytes()
    assert (folder / "tests" / "conftest.py").is_file()
    (again,) = WheelBuilder(str(folder)).build(directory=str(tmp_path / "again"), versions=["standard"])
    with zipfile.ZipFile(again) as file:
        held = {name: file.read(name) for name in file.namelist()}
    assert held == {path.relative_to(unpacked).as_posix(): path.read_bytes() for path in unpacked.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_fresh_environment_runs_the_demo(wheel, sdist, tmp_path):
    """Installed with nothing else there, from the wheel and again from the sdist, away from the checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def do(*command: str | Path) -> str:
        made = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
        return made.stdout

    constraints = ("--constraint", REPO / ".ci" / "constraints.txt")
    for file, options in ((wheel, constraints), (sdist, ("--no-deps", "--force-reinstall"))):
        do(python, "-m", "pip", "install", "--quiet", *options, file)
        do(python, "-m", "pip", "check")
        assert do(tmp_path / "venv" / "bin" / "gazeguard", "--version") == f"gazeguard {gazeguard.__version__}\n"
        shown = do(tmp_path / "venv" / "bin" / "gazeguard", "demo", "--images", "2")
        assert "2 images, " in shown
        assert str(tmp_path / "venv") in do(python, "-c", "import gazeguard; print(gazeguard.__file__)")


def test_a_checkout_reads_the_policies_beside_it(tmp_path):
    """Also from another working directory."""
    assert policy_folder() == REPO / "policies"
    folder = run("-c", "from gazeguard.policy import policy_folder; print(policy_folder())", path=REPO, cwd=tmp_path)
    assert Path(folder.strip()) == REPO / "policies"


# ----------------------------------------------------------------------------------- the command and what is said of it

README = (REPO / "README.md").read_text(encoding="utf-8")


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command by its words, those inside others too."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        words = (*path, name)
        yield " ".join(words), command
        if hasattr(command, "commands"):
            yield from commands(command, words)


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_the_command_and_every_option(name):
    """Nothing is without words, and --help prints all of it."""
    command = COMMANDS[name]
    assert command.help
    shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "300"}).output
    assert command.help.split("\n")[0][:60] in " ".join(shown.split())
    for parameter in command.params:
        assert parameter.help, parameter.name
        assert " ".join(parameter.help.split())[:40] in " ".join(shown.split())


def test_the_readme_names_every_command_and_no_other():
    """In its table a row for each, and whatever it shows can be called: every command and option in its text is there."""
    rows = re.findall(r"^\| `gazeguard (\w+)\b", README, re.M)
    top = {name for name in COMMANDS if " " not in name}
    assert {row.split()[0] for row in rows} == top
    for told in re.findall(r"gazeguard ((?:\w+)(?: [^`\n]*)?)`", README):
        words = told.split()
        assert words[0] in top | {"--help", "--version"}, told
        known = {option for parameter in COMMANDS[words[0]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, told


def test_the_version_is_told():
    told = CliRunner().invoke(app, ["--version"])
    assert (told.exit_code, told.output) == (0, f"gazeguard {gazeguard.__version__}\n")
