"""Exceptions: one tree, whose messages say what was given, what is expected, and what to do next.

GazeGuardError
├── InputError            the image, the caption or the call cannot be used
├── OutputError           results cannot be written
├── UnsupportedError      this model or decoding method is not supported (the message names an alternative)
├── NoAttentionError      the recorder saw no attention weights: never read as "no hallucination"
├── ArtifactError         a heads, detector, trace or policy file cannot be read
│   └── MismatchError     the file belongs to another model or to other heads
└── PolicyError           a policy lacks a key, or has an unknown key or value
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class GazeGuardError(Exception):
    """Base class of everything that GazeGuard raises on purpose."""


class InputError(GazeGuardError, ValueError):
    """The image, the caption or the call cannot be used."""


class OutputError(GazeGuardError, OSError):
    """Results cannot be written."""


class UnsupportedError(GazeGuardError, NotImplementedError):
    """This model or decoding method is not supported."""


class NoAttentionError(GazeGuardError, RuntimeError):
    """The recorder ran but saw no attention weights."""


class ArtifactError(GazeGuardError, ValueError):
    """A file cannot be read as what it should be."""


class MismatchError(ArtifactError):
    """The file belongs to another model or to other heads."""


class PolicyError(GazeGuardError, ValueError):
    """A policy lacks a key, or has an unknown key or value."""


def extra(name: str) -> str:
    """How an extra of the package is installed, for messages."""
    return f"pip install '.[{name}]' in a checkout of GazeGuard"


def given(value: T | None) -> T:
    """A value that is None elsewhere and cannot be None here; a `TypeError` where it is, after all."""
    if value is None:
        raise TypeError("A value is missing that has been checked before. Please report this as a bug.")
    return value
