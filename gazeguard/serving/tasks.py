"""Tasks of the model's worker: the rows of a batch, what comes back for them, and what a worker is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gazeguard.serving.batching import Job

if TYPE_CHECKING:  # a process that only passes tasks on starts without torch
    from PIL import Image

    from gazeguard.judge import Judge
    from gazeguard.policy import Policy
    from gazeguard.report import Report

Deltas = Callable[[str], None]
Stopped = Callable[[int], bool]  # whether nobody waits for the row of this number any more
Options = tuple[tuple[str, Any], ...]


class Row(NamedTuple):
    """An image, what is asked about it, and the caption to check; None for one that is to be generated."""

    image: Image.Image
    prompt: str
    caption: str | None = None


class Written(NamedTuple):
    """A generated caption: its report, the tokens of its prompt and its own, and whether it ended by itself."""

    report: Report
    prompt_tokens: int
    tokens: int
    finished: bool


class Task(NamedTuple):
    """A batch for the model.

    Attributes:
        rows: Captions to check, or images to caption.
        options: Of ``generate``, by name; None where captions are checked.
        streamed: Whether the only caption is wanted piece by piece, as it is generated.
    """

    rows: tuple[Row, ...]
    options: Options | None = None
    streamed: bool = False


class Facts(NamedTuple):
    """What the server says of a model without asking it.

    Attributes:
        judge: The guard's, without its detector: it reports what cannot be checked, and has the policy.
        background: The colour on which transparent images are composed.
    """

    judge: Judge
    background: str

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self.judge.policy


class Worker(Protocol):
    """Works tasks off, `LANES` at a time at most: the model in this process, or in a process of its own."""

    @property
    def facts(self) -> Facts:
        """What is known of the model."""

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""

    @property
    def restarts(self) -> int:
        """How often the model has been lost and loaded again."""

    def run(self, task: Task, stopped: Stopped, deltas: Deltas | None = None) -> Sequence[Any]:
        """One `Report` per caption to check, one `Written` per image to caption.

        Args:
            task: The batch.
            stopped: Asked now and then; rows that nobody waits for are given up.
            deltas: Gets what can no longer be taken out of the only caption, as it is generated.
        """

    def close(self) -> None:
        """End it, once no task is under way."""


@dataclass(frozen=True)
class Work:
    """What jobs of a `Row` each are run by; those of equal work share batches.

    Attributes:
        worker: Does it.
        options: Of ``generate``, by name; None where captions are checked.
        deltas: Gets the pieces of the only caption; None where nobody waits for them.
    """

    worker: Worker
    options: Options | None = None
    deltas: Deltas | None = None

    def __call__(self, jobs: Sequence[Job]) -> Sequence[Any]:
        """Have a batch worked off."""
        task = Task(tuple(job.payload for job in jobs), self.options, self.deltas is not None)
        return self.worker.run(task, lambda row: jobs[row].stopped.is_set(), self.deltas)
