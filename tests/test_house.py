"""The rules of the house: sizes, private names, docstrings and words, over the sources and the documents."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES_OF_A_CLASS, MOST_LINES_OF_A_FUNCTION = 250, 60
NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public members, whatever their names look like
COMPAT = "gazeguard._compat"  # the one module that may use private members of transformers and torch

# Rooms that do not keep a rule yet. Nothing may be added.
TOO_LONG: set[str] = set()
PRIVATE: set[str] = set()
OLD_WORDS: set[str] = set()

# The left column of docs/glossary.md, as far as a pattern can tell it from ordinary English.
OLD = re.compile(
    r"""\b(?:
    taps? | tapped | hears? | heard | listen(?:s|er|ers|ing)? | glance[sd]? | look(?:s|ed|ing)?\b(?![ -](?:up|alike))
    | look_at | look_again | pictures? | cells? | things? | (?<!in\ )(?<!in\ the\ )places?\b(?!\ of) | the\ said
    | readout | rivals? | speaks?\ for | under\ the\ gaze | likeliest | surprise | visited | barred | tuned
    | tak(?:e|es|en|ing)\ back | takes?\ (?:it|them|phrases|a\ phrase)\ back | way\ out | laws? | peers? | blindfolded
    | ways?\ of\ writing
    | false\ alarms? | told\ apart | missed(?!\ object) | the\ price | repaired | left: | decode\ loop\ of\ its\ own
    )(?!\w)""",
    re.VERBOSE | re.IGNORECASE,
)


# What is said to a model, not to a person: other words would be another prompt, with other answers.
SAID_TO_MODELS = re.compile(
    r"Describe the picture\.|in the picture\?|Describe every panel of the picture |The picture has "
    r"|Describe the picture (?:in|and) |a caption for this picture|[Tt]he picture (?:also )?shows|In the picture there"
    r"|^ in the picture$"
)


def old_words(text: str) -> list[str]:
    """The words of the glossary's left column in a text, in lower case."""
    return [match[0].lower() for match in OLD.finditer(SAID_TO_MODELS.sub("", text))]


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree, of the package and the evaluations."""
    paths = sorted(path for folder in ("gazeguard", "evals") for path in (ROOT / folder).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8")) for path in paths
    }


def room(module: str) -> str:
    """The room of a module: gazeguard.attention for gazeguard.attention.recorder; evals for all of them."""
    parts = module.split(".")
    return parts[0] if parts[0] == "evals" else ".".join(parts[:2])


def rooms() -> list[str]:
    return sorted({room(name) for name in modules()})


def of_room(name: str) -> Iterator[tuple[str, ast.Module]]:
    return ((module, tree) for module, tree in modules().items() if room(module) == name)


def pending(names: list[str], rule: set[str]) -> list[object]:
    """The names as parameters of a test, those that do not keep the rule yet as expected failures."""
    marks = pytest.mark.xfail(reason="this room does not keep the rule yet")
    return [pytest.param(name, marks=[marks] if name in rule else []) for name in names]


# ---------------------------------------------------------------------------------------------------------- sizes


def too_long(module: str, tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            most = MOST_LINES_OF_A_CLASS if isinstance(node, ast.ClassDef) else MOST_LINES_OF_A_FUNCTION
            if lines > most:
                found.append(f"{module}.{node.name}: {lines} lines, more than {most}")
    return found


@pytest.mark.parametrize("name", pending(rooms(), TOO_LONG))
def test_no_class_and_no_function_is_too_long(name):
    assert [line for module, tree in of_room(name) for line in too_long(module, tree)] == []


def test_what_is_too_long_is_seen():
    body = "\n".join("    pass" for _ in range(60))
    assert too_long("m", ast.parse(f"def f():\n{body}")) == ["m.f: 61 lines, more than 60"]
    assert too_long("m", ast.parse(f"class C:\n{body}")) == []


# -------------------------------------------------------------------------------------------------- private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in NAMEDTUPLE


def defined(tree: ast.Module) -> set[str]:
    """The private names that a module defines, as functions, classes, variables, arguments or attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {name for name in names if is_private(name)}


def foreign(module: str, tree: ast.Module) -> list[str]:
    """Uses of private names that the module does not define: of another module, of transformers or torch."""
    own, found = defined(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            private = [alias.name for alias in node.names if is_private(alias.name)]
            found += [f"{module}:{node.lineno} imports {name}" for name in private if f"{node.module}.{name}" != COMPAT]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.append(f"{module}:{node.lineno} uses {node.attr}")
    return found


@pytest.mark.parametrize("name", pending(rooms(), PRIVATE))
def test_no_private_name_is_used_from_another_module(name):
    assert [line for module, tree in of_room(name) if module != COMPAT for line in foreign(module, tree)] == []


def test_a_foreign_private_name_is_seen():
    source = "from gazeguard.guard import _hidden\nclass A:\n    def f(self, other):\n        self._x = other._y"
    assert foreign("m", ast.parse(source)) == ["m:1 imports _hidden", "m:4 uses _y"]
    assert foreign("m", ast.parse("from gazeguard import _compat\nrow._replace(a=1)")) == []


# ---------------------------------------------------------------------------------------------------------- words


def literals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every string with a space in it, docstrings included: messages, reasons, help."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


@pytest.mark.parametrize("name", pending([name for name in rooms() if name != "evals"], OLD_WORDS))
def test_strings_and_docstrings_have_the_words_of_the_field(name):
    """Errors, reasons, help and docstrings: none has a word of the glossary's left column."""
    found = [
        f"{module}:{line} {word}" for module, tree in of_room(name) for line, text in literals(tree) for word in old_words(text)
    ]
    assert found == []


def documents() -> dict[str, list[Path]]:
    """README, CHANGELOG, docs and policies. The glossary has the words in its left column."""
    docs = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "glossary.md"]
    policies = sorted((ROOT / "policies").iterdir())
    return {"README.md": [ROOT / "README.md"], "CHANGELOG.md": [ROOT / "CHANGELOG.md"], "docs": docs, "policies": policies}


@pytest.mark.parametrize("name", pending(list(documents()), OLD_WORDS))
def test_documents_have_the_words_of_the_field(name):
    found = [
        f"{path.name}:{number} {word}"
        for path in documents()[name]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for word in old_words(re.sub(r"`[^`]*`|<!--.*?-->", "", line) if name == "docs" else line)  # keys of the evaluations
    ]
    assert found == []


def test_old_words_are_seen_and_ordinary_ones_are_not():
    assert old_words("The tap heard what lies under the gaze of a picture's cells; a look.") == [
        "tap", "heard", "under the gaze", "picture", "cells", "look",
    ]  # fmt: skip
    assert old_words("Nothing in place of a prompt look-up; look-alike objects, picture_sizes=, anything.") == []
