"""What the server's worker does with the guard: batches of captions to check, and of captions to generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from gazeguard.guard import GazeGuard
from gazeguard.report import Report
from gazeguard.serving.batching import Job
from gazeguard.vision.encoding import encode

Deltas = Callable[[str], None]


class CheckRow(NamedTuple):
    """A caption to check."""

    image: Image.Image
    prompt: str
    caption: str


class CaptionRow(NamedTuple):
    """An image to caption."""

    image: Image.Image
    prompt: str


class Written(NamedTuple):
    """A generated caption: its report, and the number of tokens of its prompt."""

    report: Report
    prompt_tokens: int


@dataclass(frozen=True)
class Checks:
    """Batches of `CheckRow`, one `Report` each."""

    guard: GazeGuard

    def __call__(self, jobs: Sequence[Job]) -> list[Report]:
        """Check the captions in one pass."""
        images, prompts, captions = zip(*(job.payload for job in jobs), strict=True)
        return self.guard.check_all(images, captions, prompts)


@dataclass(frozen=True)
class Captions:
    """Batches of `CaptionRow`, one `Written` each.

    Attributes:
        guard: The guard.
        options: Of ``generate``, by name.
        deltas: Gets what can no longer be taken out of the only caption, as it is generated; None where nobody waits for it.
    """

    guard: GazeGuard
    options: tuple[tuple[str, Any], ...]
    deltas: Deltas | None = None

    @torch.no_grad()
    def __call__(self, jobs: Sequence[Job]) -> list[Written]:
        """Generate the captions, each until nobody waits for it any more."""
        guard, rows = self.guard, [job.payload for job in jobs]
        batch = encode(guard.model, guard.processor, [row.image for row in rows], [row.prompt for row in rows])
        streamer = None if self.deltas is None else _DeltaStreamer(guard.processor.tokenizer, self.deltas)
        _, reports = guard.generate_with_reports(
            **batch.inputs,
            **dict(self.options),
            picture_sizes=[[row.image.size] for row in rows],
            stopping_criteria=StoppingCriteriaList([_Stopped(jobs)]),
            **({} if streamer is None else {"streamer": streamer}),
        )
        lengths = batch.prompt_mask.sum(1).tolist()
        return [Written(report, length) for report, length in zip(reports, lengths, strict=True)]


class _Stopped(StoppingCriteria):
    """Ends the captions that nobody waits for any more."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(batch,) bool: which captions end here."""
        return torch.tensor([job.stopped.is_set() for job in self.jobs], device=input_ids.device)


class _DeltaStreamer(TextStreamer):
    """A streamer of transformers that hands whole words on."""

    def __init__(self, tokenizer: Any, deltas: Deltas) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.deltas = deltas

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece of text on."""
        if text:
            self.deltas(text)
