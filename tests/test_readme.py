"""The README and the documents: their Python runs as it stands, and prints what they show; their links and commands exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import gazeguard
from gazeguard.cli.app import EXIT_CODES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:```text\n(?P<shown>.*?)```\n)?", re.S)
BLOCKS = [
    pytest.param(path, match["code"], match["shown"], id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, match in enumerate(BLOCK.finditer(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("path", "code", "shown"), BLOCKS)
def test_a_block_of_python_runs_and_prints_what_is_shown(path, code, shown, tmp_path, monkeypatch):
    """Numbers may differ in their last digits between machines."""
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"{path.name}", "exec"), {"__name__": path.stem})
    if shown is not None:
        assert masked(printed.getvalue()) == masked(shown)


def masked(text: str) -> list[str]:
    return [re.sub(r"\d\.\d+", "#", line) for line in text.split()]


def test_the_readme_has_a_block_with_its_output():
    assert any(parameter.values[0].name == "README.md" and parameter.values[2] for parameter in BLOCKS)


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "policies" / "README.md"], ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_api_reference_has_every_public_name():
    """The errors stand there by their module."""
    shown = re.findall(r"^::: gazeguard\.(\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    named = [getattr(gazeguard, name) for name in gazeguard.__all__ if name not in ("__version__", "GazeGuardError")]
    assert sorted(shown) == sorted(
        ["errors", *(f"{each.__module__}.{each.__qualname__}"[len("gazeguard.") :] for each in named)]
    )


def test_exit_codes_are_those_of_the_help():
    """The table of the README and the help of the command say the same."""
    table = re.findall(r"^\| (\d[\d, ]*) \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert table
    assert [f"{codes}: {meaning.replace('`', '')}" for codes, meaning in table] == re.findall(r"^\* (.*)$", EXIT_CODES, re.M)
