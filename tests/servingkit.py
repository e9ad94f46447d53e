"""Models that the tests of the server have loaded in a process of its own, which imports this module: only what it needs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from gazeguard.errors import InputError
from gazeguard.judge import Judge
from gazeguard.policy import Policy
from gazeguard.serving.tasks import Facts


def load_held(folder: Path) -> Any:
    """At first a worker that comes to no end, and says so through the pipe "begun" of the folder.

    The second time the lab's model, once the pipe "go" is written to.
    """
    if not (folder / "loaded").exists():
        (folder / "loaded").touch()
        return Holding(folder)
    from gazeguard.guard import GazeGuard
    from gazeguard.serving.model import Model

    (folder / "go").read_text()
    return Model(GazeGuard.from_pretrained("lab"))


class Holding:
    """A worker that comes to no end over its first task."""

    facts = Facts(Judge(None, Policy.load("mark"), ""), "white")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *_: Any) -> None:
        (self.folder / "begun").write_text("")
        signal.pause()


class Hanging:
    """A worker that comes to no end."""

    facts = None

    def run(self, *_: Any) -> None:
        signal.pause()


def load_nothing() -> Any:
    """A model that is not there."""
    raise InputError("There is no such model.")


def die_loading() -> Any:
    """A model that is too large for the machine."""
    signal.raise_signal(signal.SIGKILL)
