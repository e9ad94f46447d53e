"""Subject of an evaluation: the model that is measured, and the world whose test images it is shown.

``--lab tiny|scenes`` measures a laboratory's own model. ``--model`` measures another one on a laboratory's images, which it was
not trained on; its gaze heads and detector are then in its own folder, or in ``--artifacts``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.records import errors_told
from gazeguard import lab
from gazeguard.artifacts import HEADS_FILE
from gazeguard.errors import InputError
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.heads.discovery import find_heads
from gazeguard.lab.worlds import World, world
from gazeguard.loading import find_dtype, load
from gazeguard.policy import Policy


class Chosen(NamedTuple):
    """What the options `evals.common.Lab`, `Model` and `Artifacts` say; other processes open the same subject by it."""

    lab: str = "tiny"
    model: str | None = None
    artifacts: str | None = None
    dtype: str = "auto"

    @property
    def prefix(self) -> str:
        """Of the keys that issues ask for: the lab's name, "model" for a model of one's own."""
        return f"{'model' if self.model else self.lab}_"

    def keyed(self, keys: Iterable[str]) -> dict[str, str]:
        """Key by which an issue asks for a figure -> the figure's own; see `evals.common.with_issue_keys`."""
        return {self.prefix + key: key for key in keys}


@dataclass(frozen=True)
class Subject:
    """A model, its processor, and a world.

    chosen:    how it was chosen
    artifacts: folder or hub id of its gaze heads and detector; None for the model's own folder
    """

    chosen: Chosen
    model: Any
    processor: Any
    world: World
    artifacts: str | None

    @property
    def folder(self) -> Path | None:
        """The model's own folder; None where it came from the hub."""
        path = Path(self.model.name_or_path)
        return path if path.is_dir() else None

    def guard(self, policy: str | Path | Policy = "mark", **options: Any) -> GazeGuard:
        """A guard over the model with its own heads and detector; ``options`` are the constructor's.

        Raises:
            InputError: There are no gaze heads.
        """
        return GazeGuard(self.model, self.processor, policy, artifacts=self.artifacts, **options)

    def full_guard(self) -> GazeGuard:
        """`guard`; raises `InputError` where there is no detector."""
        guard = self.guard()
        if guard.detector is None:
            raise InputError(
                f"No detector for {self.model.name_or_path}. Fit one with `gazeguard fit`, then give --artifacts DIR."
            )
        return guard

    def heads(self) -> GazeHeads:
        """The gaze heads: those of the artifacts, otherwise found anew."""
        source = Path(self.artifacts or self.model.name_or_path)
        if self.artifacts or (source / HEADS_FILE).is_file():
            heads = GazeHeads.from_pretrained(self.artifacts or source / HEADS_FILE)
            heads.check_model(self.model)
            return heads
        return find_heads(self.model, self.processor)

    def options(self) -> str:
        """The options that choose it, as a command line has them."""
        usual = Chosen()
        said = [f" --{key} {value}" for key, value in self.chosen._asdict().items() if value != getattr(usual, key)]
        return "".join(said)

    def meta(self) -> dict[str, Any]:
        """For the result file."""
        return {"lab": self.chosen.lab, "model": self.chosen.model, "artifacts": self.artifacts, "dtype": str(self.model.dtype)}


@functools.cache
def subject(chosen: Chosen = Chosen()) -> Subject:  # noqa: B008 (a value)
    """The subject that was chosen, once per process; an error of the choice ends the program with one line."""
    with errors_told():
        shown = world(chosen.lab)
        own = None if chosen.lab == "tiny" else chosen.lab
        model, processor = lab.load(own) if chosen.model is None else load(chosen.model, dtype=chosen.dtype)
        if chosen.dtype != "auto":
            model = model.to(find_dtype(chosen.dtype))
        return Subject(chosen, model, processor, shown, chosen.artifacts)
