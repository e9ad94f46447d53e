"""Do imports run only downward? The order is DESIGN section 2's; each module may use only what stands before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gazeguard

ROOT = Path(gazeguard.__file__).parent
# The rooms, from the ground up: a room is a package, or a module of its own.
ORDER = (
    "errors", "progress", "prompts", "_compat", "claims", "vision", "policy", "artifacts", "loading", "trace", "attention",
    "report", "heads", "decoding", "replay", "detection", "judge", "tracing", "guard", "filtering", "integrations",
    "serving", "lab", "fitting", "evaluation", "audit", "cli",
)  # fmt: skip
EXEMPT = {"__init__", "__main__"}


def sources() -> dict[str, str]:
    """Module name below ``gazeguard`` -> source."""
    paths = sorted(ROOT.rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}


def imports(source: str, modules: set[str]) -> set[str]:
    """The modules of the package that a source imports, anywhere in it, also in functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "gazeguard":
                continue
            inner = parts[1:]
            while inner and ".".join(inner) not in modules and ".".join((*inner, "__init__")) not in modules:
                inner = inner[:-1]
            if inner:
                found.add(".".join(inner) if ".".join(inner) in modules else ".".join((*inner, "__init__")))
    return found


def violations(package: Mapping[str, str]) -> list[str]:
    """What breaks the order, in words: upward imports between rooms, and cycles inside one."""
    modules, broken, inside = set(package), [], {}
    for name in sorted(modules - EXEMPT):
        room = name.split(".")[0]
        if room not in ORDER:
            broken.append(f"{name} has no place in the order")
            continue
        for other in sorted(imports(package[name], modules)):
            above = other.split(".")[0]
            if above == room:
                inside.setdefault(name, set()).add(other)
            elif above not in ORDER or ORDER.index(above) >= ORDER.index(room):
                broken.append(f"{name} imports {other}")
    try:
        tuple(TopologicalSorter(inside).static_order())
    except CycleError as error:
        broken.append(f"import cycle: {' <- '.join(error.args[1])}")
    return broken


def test_imports_run_downward():
    assert violations(sources()) == []


def test_the_order_names_every_module_and_the_package_is_read():
    """The check sees what is there: every module has a place, and known imports are found."""
    read = sources()
    assert {"errors", "trace", "lab.world", "cli.app"} <= set(read)
    assert imports(read["trace"], set(read)) == {"errors", "vision.grid", "vision.images"}
    assert imports(read["detection.detector"], set(read)) >= {"detection.features", "heads.artifact"}
    assert imports(read["lab.training.tiny_fit"], set(read)) >= {"guard", "lab.training.detectors", "lab.__init__"}


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("errors", "from gazeguard.trace import GazeTrace", "errors imports trace"),
        ("errors", "import gazeguard.cli", "errors imports cli"),
        ("trace", "def f():\n    from gazeguard.detection import features", "trace imports detection.features"),
        ("guard", "if True:\n    from gazeguard.lab.world import samples", "guard imports lab.world"),
        ("guard", "from gazeguard import lab", "guard imports lab.__init__"),
        ("lab.world", "from gazeguard.lab.truth import mentions", "import cycle: lab."),
        ("lab.truth", "from gazeguard.cli import app", "lab.truth imports cli"),
        ("cupboard", "", "cupboard has no place in the order"),
    ],
)
def test_an_upward_import_is_found(module, line, said):
    """The test can fail: each made-up import is reported, and nothing else."""
    read = sources()
    found = violations(read | {module: f"{read.get(module, '')}\n{line}\n"})
    assert len(found) == 1
    assert found[0].startswith(said)


def test_the_architecture_shows_this_order():
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)` \|", page, re.M)) == ORDER
