"""Fit of a detector for any model without a label: from a checkpoint to gaze heads, detector and card, in one resumable run.

    fitted = fit(model, processor, "my-artifacts", budget="quick")

(a) the self-test; (b) the gaze heads; (c) captions of drawn scenes, whose claims the drawings label; (d) the same captions with
one claim swapped, with another image and with a blank one; (e) the same on a user's own images, where the model's own claims
count as mostly true; (f) labelled captions, which outweigh all of it; (g) calibration and thresholds; (h) the gate. What was
recorded is kept in the folder: an interrupted run goes on where it stopped, and another one with images of one's own records
no drawing again.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, RootModel
from transformers import PreTrainedModel, ProcessorMixin

from gazeguard.artifacts import HEADS_FILE, read_json
from gazeguard.attention.self_test import run_self_test
from gazeguard.detection.detector import Detector
from gazeguard.detection.rerank_evidence import RerankEvidence
from gazeguard.errors import ArtifactError, InputError, MismatchError, UnsupportedError
from gazeguard.fitting.card import write_fit_card
from gazeguard.fitting.drawn import Shown, available_styles, check_styles, drawn, drawn_nouns
from gazeguard.fitting.labelled import LabelledCaption, check_labelled, record_labelled
from gazeguard.fitting.learn import Learnt, learn, left_out
from gazeguard.fitting.record import record, write
from gazeguard.fitting.rerank import measure_rerank
from gazeguard.fitting.rows import Recorded, Rows
from gazeguard.fitting.threads import few_threads
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.heads.discovery import find_heads
from gazeguard.heads.strips import IMAGE_SUFFIXES, draw_strips
from gazeguard.progress import track
from gazeguard.prompts import DEFAULT_PROMPT
from gazeguard.trace import F32
from gazeguard.vision.encoding import encode
from gazeguard.vision.images import load_image

LOGGER = logging.getLogger(__name__)
STATE_FOLDER = "fit-state"
CHUNK = 24  # images that are captioned and altered together, and kept as one file
MIN_IMAGE_TOKENS = 36  # of a drawing; smaller ones are enlarged
SIDES = (144, 288, 448, 672)
# Beside what the drawn worlds' own prompts are; one that a model does not answer with claims is left out.
PROMPTS = (DEFAULT_PROMPT, "Describe the picture and say where everything is.", "Describe the image in detail.")
FIRST_PICTURE, FIRST_LABELLED = 10**6, 2 * 10**6  # numbers of images that are not drawn


@dataclass(frozen=True)
class Budget:
    """How much is recorded.

    Attributes:
        scenes: Drawn images, over all styles; each has one caption, every other one sampled.
        images: Of the user's images at most.
        swaps: Per caption.
        strips: Comic pages for the gaze heads at most.
        rerank: Drawn images on which the evidence that rerank may use is measured; 0 leaves it out.
        probes: Drawn images of each style on which each prompt is tried.
    """

    scenes: int
    images: int
    swaps: int = 3
    strips: int = 48
    rerank: int = 32
    probes: int = 8


BudgetName = Literal["quick", "standard", "thorough"]
BUDGETS: dict[str, Budget] = {
    "quick": Budget(scenes=240, images=96, swaps=2, strips=24, rerank=16),
    "standard": Budget(scenes=720, images=240),
    "thorough": Budget(scenes=2160, images=960, swaps=4, rerank=64),
}


class Fitted(NamedTuple):
    """What a fit found: the gaze heads; the detector with its gate, None where the heads are of no use; and figures."""

    heads: GazeHeads
    detector: Detector | None
    figures: dict[str, float]

    @property
    def refused(self) -> str:
        """Why no caption will be judged; "" where they will."""
        if self.detector is None:
            return self.heads.unusable
        return "" if self.detector.gate is None else self.detector.gate.reason


def fit(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: str | Path,
    *,
    images: str | Path | None = None,
    captions: Sequence[LabelledCaption] = (),
    budget: BudgetName | Budget = "standard",
    prompt: str = DEFAULT_PROMPT,
    styles: Sequence[str] | None = None,
    heads: GazeHeads | None = None,
    seed: int = 1,
    say: Callable[[str], None] = LOGGER.info,
) -> Fitted:
    """Find the gaze heads of a model and fit a detector to drawn scenes.

    Args:
        model: A vision-language model.
        processor: Its processor.
        out: Folder of ``heads.json``, ``detector.json`` and their card; what an interrupted run recorded there is used.
        images: Folder of images of the kind that captions will be checked on; no labels are needed.
        captions: Labelled captions, if there are any; they outweigh everything else.
        budget: "quick", "standard", "thorough", or a `Budget`.
        prompt: What captions of the user's images answer.
        styles: Styles of the drawings; by default all that can be drawn on this machine.
        heads: The gaze heads, where they are known.
        seed: Of drawings, swaps and sampling.
        say: Is told what is being done, line by line.

    Raises:
        UnsupportedError: The model's attention cannot be recorded, or the self-test fails.
        InputError: An argument cannot be used, or the model says too little about the drawings.
    """
    out = Path(out)
    size = _budget(budget)
    chosen = check_styles(available_styles() if styles is None else styles)
    paths = _image_paths(images, size.images)
    check_labelled(captions)
    out.mkdir(parents=True, exist_ok=True)
    with few_threads(model):
        say("testing whether attention can be recorded")
        _self_test(model, processor)
        heads = _heads(model, processor, out, size.strips, heads, say)
        if heads.unusable:
            return Fitted(heads, None, {})
        guard = GazeGuard(model, processor, heads=heads)  # the detector beside the model's weights is left out by that
        recorder = _Recorder(guard, out / STATE_FOLDER, size, seed, say)
        recorded = [*recorder.drawings(chosen), *recorder.pictures(paths, prompt)]
        if captions:
            recorded.append(record_labelled(guard, captions, FIRST_LABELLED, say))
        say("next: the detector, from all claims")
        learnt = _learn(recorded, heads)
        written = (text for part in recorded for text in part.captions)
        detector = learnt.detector.model_copy(update={"left_out": left_out(learnt.detector, written)})
        if size.rerank and not (detector.gate and detector.gate.reason):
            say("next: the evidence that rerank may use")
            detector = detector.model_copy(update={"rerank": recorder.rerank(chosen)})
        detector.save_pretrained(out)
        write_fit_card(out, detector, learnt.figures, chosen, len(paths), len(captions))
        return Fitted(heads, detector, learnt.figures)


def _learn(recorded: Sequence[Recorded], heads: GazeHeads) -> Learnt:
    """`learn` from all that was recorded."""
    wording_nll = np.concatenate([part.wording_nll for part in recorded])
    return learn(Rows.joined([part.rows for part in recorded]), heads, _states(recorded), wording_nll=wording_nll)


def _states(recorded: Sequence[Recorded]) -> dict[int, F32]:
    """By number of an image the state of its tokens, where it has one."""
    return {int(i): state for part in recorded if part.states.size for i, state in zip(part.images, part.states, strict=True)}


def _budget(budget: str | Budget) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if budget not in BUDGETS:
        raise InputError(f"Unknown budget {budget!r}; expected one of: {', '.join(BUDGETS)}.")
    return BUDGETS[budget]


def _image_paths(folder: str | Path | None, most: int) -> list[Path]:
    """The images of a folder and its folders, at most so many, spread evenly over their sorted names."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is no folder. Give one that holds images of the kind that you will check captions on.")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}). Give a folder with some.")
    return [paths[i] for i in sorted({round(i) for i in np.linspace(0, len(paths) - 1, min(most, len(paths)))})]


def _self_test(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    image = draw_strips(1)[0].image
    checks = run_self_test(model, processor, encode(model, processor, [image], [DEFAULT_PROMPT]).inputs, [[image.size]])
    if failed := [str(check) for check in checks if not check.ok]:
        raise UnsupportedError(
            f"The self-test fails for {type(model).__name__}: {'; '.join(failed)}. Run `gazeguard doctor` for all checks."
        )


def _heads(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: Path,
    strips: int,
    heads: GazeHeads | None,
    say: Callable[[str], None],
) -> GazeHeads:
    """The gaze heads: given, those of the folder if they are this model's, or found now; saved in the folder."""
    if heads is None and (out / HEADS_FILE).is_file():
        try:
            heads = GazeHeads.from_pretrained(out)
            heads.check_model(model)
        except (ArtifactError, MismatchError) as error:
            raise InputError(f"{out} holds the gaze heads of something else ({error}) Give another folder.") from error
    if heads is None:
        say("finding the gaze heads")
        keep = out / STATE_FOLDER / "heads"
        keep.parent.mkdir(parents=True, exist_ok=True)
        heads = find_heads(model, processor, draw_strips(strips), keep=keep)
    heads.check_model(model)
    heads.save_pretrained(out)
    if not heads.unusable:
        say(f"next: captions of drawn scenes; {len(heads.heads)} gaze heads are in {out / HEADS_FILE}")
    return heads


class Prompts(RootModel[tuple[str, ...]]):
    """Prompts that a model answers with claims."""


Kept = TypeVar("Kept", bound=BaseModel)


@dataclass
class _Recorder:
    """What records the claims of a fit, chunk by chunk, and keeps them."""

    guard: GazeGuard
    folder: Path
    budget: Budget
    seed: int
    say: Callable[[str], None]

    def drawings(self, styles: Sequence[str]) -> list[Recorded]:
        """Claims about drawn images."""
        side = image_side(self.guard)
        each_style = -(-self.budget.scenes // len(styles))
        firsts = range(0, each_style, CHUNK)
        chunks = [(style, first, min(CHUNK, each_style - first)) for first in firsts for style in styles]
        prompts = {
            style: self._kept(
                f"prompts-{self._digest((style, side, PROMPTS, self.budget.probes))}",
                Prompts,
                partial(self._answered, style, side),
            ).root
            for style in styles
        }

        def shown(chunk: tuple[str, int, int]) -> list[Shown]:
            style, first, count = chunk
            base = list(styles).index(style) * 10**5
            return [
                Shown(base + each.number, each.image, each.prompt, each.style, each.decide)
                for each in drawn(style, first, count, self.seed, side, prompts[style])
            ]

        return self._chunks("drawings", chunks, shown)

    def pictures(self, paths: Sequence[Path], prompt: str) -> list[Recorded]:
        """Claims about a user's images."""
        chunks = [(first, prompt, tuple(map(_named, paths[first : first + CHUNK]))) for first in range(0, len(paths), CHUNK)]

        def shown(chunk: tuple[int, str, tuple[str, ...]]) -> list[Shown]:
            found, first = [], chunk[0]
            for number, path in enumerate(paths[first : first + CHUNK], start=first):
                try:
                    found.append(Shown(FIRST_PICTURE + number, load_image(path, self.guard.tracer.background), prompt))
                except InputError as error:
                    self.say(f"left out: {error}")
            return found

        return self._chunks("images", chunks, shown)

    def rerank(self, styles: Sequence[str]) -> RerankEvidence:
        """What rerank may use for the model, measured on other drawings than those of the fit, or read from an earlier run."""

        def measured() -> RerankEvidence:
            scenes, nouns = drawn_nouns(styles, self.budget.rerank, self.seed + 2, image_side(self.guard))
            return measure_rerank(self.guard, scenes, nouns)

        return self._kept(f"rerank-{self._digest((styles, self.budget.rerank))}", RerankEvidence, measured)

    def _kept(self, name: str, kind: type[Kept], measure: Callable[[], Kept]) -> Kept:
        """What an earlier run has measured, or what is measured now and kept."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return read_json(kind, path, f"the {name.partition('-')[0]} of an earlier fit", "gazeguard fit")
        value = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(value.model_dump_json(indent=1), encoding="utf-8")
        return value

    def _chunks(self, what: str, chunks: Sequence[Any], shown: Callable[[Any], list[Shown]]) -> list[Recorded]:
        """Record chunks, or read what an earlier run has recorded of them, and say after each tenth how far it is."""
        parts: list[Recorded] = []
        started, done = time.monotonic(), 0
        for number, chunk in enumerate(track(chunks, f"captions of {what}")):
            path = self.folder / f"{what}-{number:04}-{self._digest(chunk)}.npz"
            if path.is_file():
                parts.append(Recorded.load(path))
                continue
            images = shown(chunk)
            if not images:
                continue
            torch.manual_seed(self.seed * 1000 + number)
            rng = random.Random(f"{self.seed}/{what}/{number}")
            known = [caption for part in parts for caption in part.captions]
            parts.append(record(self.guard, images, number % 2 == 0, known, self.budget.swaps, rng))
            parts[-1].save(path)
            done += 1
            left = len(chunks) - number - 1
            if left and (done == 1 or left * 10 // len(chunks) < (left + 1) * 10 // len(chunks)):
                seconds = (time.monotonic() - started) / done * left
                self.say(f"captions of {what}: {number + 1} of {len(chunks)} parts, about {_minutes(seconds)} left")
        return parts

    def _digest(self, chunk: Any) -> str:
        """Names a chunk by everything that it depends on."""
        heads = self.guard.heads
        key = (heads.model, heads.heads, self.seed, self.budget.swaps, chunk)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:12]

    def _answered(self, style: str, side: int) -> Prompts:
        """The prompts that the model answers with at least half as many claims as it does the world's own prompt."""
        probes = self.budget.probes
        shown = drawn(style, 0, probes, self.seed + 1, side)
        tried = [
            replace(each, number=turn * probes + each.number, prompt=prompt or each.prompt)
            for turn, prompt in enumerate(("", *PROMPTS))
            for each in shown
        ]
        claims: Counter[int] = Counter()
        for written in write(self.guard, tried, False):
            claims[written.shown.number // probes] += len(written.decided)
        return Prompts(tuple(prompt for turn, prompt in enumerate(PROMPTS, start=1) if claims[turn] * 2 >= claims[0]))


def _named(path: Path) -> str:
    """What tells a file from another one."""
    return f"{path.name} {path.stat().st_size}"


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def image_side(guard: GazeGuard) -> int:
    """The side in pixels from which a drawing has enough image tokens for this model."""
    for side in SIDES:
        prepared = guard.prepare([Image.new("RGB", (side, side), "white")], ["A star."])
        if any(len(grid) >= MIN_IMAGE_TOKENS for part in prepared.parts for grid in part.prompts.grids):
            return side
    return SIDES[-1]
