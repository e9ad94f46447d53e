"""Models that the tests of the server have loaded in a process of its own, which imports this module: only what it needs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from gazeguard.errors import InputError

HELD = "This caption is never answered."


def load_held(folder: Path) -> Any:
    """The lab's model, which comes to no end over the caption `HELD`, and says so through the pipe "begun" of the folder.

    The second time it is loaded once the pipe "go" is written to.
    """
    from gazeguard.guard import GazeGuard
    from gazeguard.serving.model import Model
    from gazeguard.tracing import Prepared

    class HeldGuard(GazeGuard):
        def check_prepared(self, prepared: Prepared) -> list[Any]:
            if any(HELD in part.captions for part in prepared.parts):
                (folder / "begun").write_text("")
                signal.pause()
            return super().check_prepared(prepared)

    if (folder / "loaded").exists():
        (folder / "go").read_text()
    (folder / "loaded").touch()
    return Model(HeldGuard.from_pretrained("lab"))


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
