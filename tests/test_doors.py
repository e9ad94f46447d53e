"""The doors of the package: the public names, and the path from a model to its reports by the command line."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import gazeguard

PUBLIC = [
    "GazeGuard",
    "GazeHeads",
    "find_heads",
    "Detector",
    "Policy",
    "CaptionFilter",
    "Report",
    "Finding",
    "Verdict",
    "GazeTrace",
    "ImageGrid",
    "GazeGuardError",
]


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_package_is_imported_without_anything_heavy():
    """Neither torch nor any other library that takes its time."""
    heavy = {"torch", "transformers", "numpy", "sklearn", "pydantic", "matplotlib", "typer", "PIL", "yaml"}
    loaded = fresh("import sys, gazeguard; print(*sys.modules)").split()
    assert "gazeguard" in loaded
    assert heavy & set(loaded) == set()


def test_the_public_names_are_those_of_their_modules():
    assert set(gazeguard.__all__) == {*PUBLIC, "__version__"}
    for name in PUBLIC:
        value = getattr(gazeguard, name)
        assert name in dir(gazeguard)
        if isinstance(value, type):
            assert getattr(import_module(value.__module__), name) is value


def test_an_import_in_a_fresh_interpreter_needs_no_order():
    """Whichever public name comes first, its module imports."""
    assert fresh("from gazeguard import GazeGuardError, ImageGrid, Report; print(Report.__name__)") == "Report\n"


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'gazeguard' has no attribute 'GazeGaurd'"):
        gazeguard.GazeGaurd  # noqa: B018
