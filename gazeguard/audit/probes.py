"""Probes of an audit: the same captions and scenes with the image blanked, exchanged or recoloured, and misleading prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from gazeguard import __version__
from gazeguard.claims.english import with_article
from gazeguard.detection.metrics import Estimate, bootstrap_images, wilson
from gazeguard.errors import InputError
from gazeguard.fitting.visual_words import Vocabulary
from gazeguard.guard import GazeGuard
from gazeguard.heads.pictographs import COLOURS
from gazeguard.lab.truth import decided_claims
from gazeguard.lab.world import NOUNS, Sample, samples
from gazeguard.progress import track
from gazeguard.prompts import DEFAULT_PROMPT
from gazeguard.report import Report, Verdict
from gazeguard.vision.encoding import encode


@dataclass(frozen=True)
class Unguarded:
    """A model without gaze heads that could be watched: whether its words change can be audited, not what a guard notices."""

    model: PreTrainedModel
    processor: Any


SCENES, QUICK_SCENES, MIN_SCENES = 48, 16, 4
MISLEADING = "There is {noun}. {prompt}"
WHITE = (255, 255, 255)
MAX_NEW_TOKENS = 96


class Share(BaseModel):
    """A share of scenes: how many of how many, with Wilson's 95 % interval; no share where there were no trials."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    events: int
    trials: int
    share: float | None
    low: float
    high: float

    @classmethod
    def count(cls, outcomes: Sequence[bool]) -> Share:
        """Of one outcome per scene."""
        events, trials = sum(outcomes), len(outcomes)
        value, interval = wilson(events, trials)
        low, high = interval or (0.0, 1.0)
        return cls(events=events, trials=trials, share=value if trials else None, low=low, high=high)


class Probe(BaseModel):
    """What one change to image or prompt did.

    Attributes:
        name: Of the probe.
        question: What was done, and what a model that uses the image does then.
        changed: Scenes whose caption says something else than without the change; None where nothing was generated.
        noticed: Scenes in which the guard did not let pass what the change made false; None without a guard.
        verdicts: The guard's verdicts on those captions, by name; empty without one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    question: str
    changed: Share | None
    noticed: Share | None
    verdicts: dict[str, int]


class Audit(BaseModel):
    """The outcome of an audit.

    Attributes:
        model: The model's class and where it is from.
        scenes: Number of drawn scenes.
        distinct_captions: Number of different captions that it writes of them.
        uses_image: Whether its captions belong to their scenes more than to others, beyond chance.
        right: Share of the named objects that are drawn in the scene, mean over scenes.
        right_elsewhere: The same against another scene, which is what a model gets that does not use its image.
        lift: Their difference, with its 95 % interval over scenes; None where too few captions name anything.
        probes: What the changes did.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    scenes: int
    distinct_captions: int
    uses_image: bool
    right: float
    right_elsewhere: float
    lift: tuple[float, float, float] | None
    probes: tuple[Probe, ...]

    @property
    def conclusion(self) -> str:
        """The outcome in one sentence."""
        if self.distinct_captions == 1:
            return f"It does not use the image: it writes the same caption for all {self.scenes} scenes."
        if self.lift is None:
            return "Its captions name too few of the drawn objects to tell whether it uses the image."
        value, low, high = self.lift
        figures = (
            f"{self.right:.0%} of the objects that it names are drawn; {self.right_elsewhere:.0%} are drawn in other scenes"
        )
        lift = f"difference {value:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
        return f"It {'uses' if self.uses_image else 'does not use'} the image: {figures} ({lift})."


@dataclass(frozen=True)
class _Subject:
    """The audited guard or model, how many captions it takes at a time, and the drawn scenes."""

    guard: GazeGuard | Unguarded
    batch_size: int
    scenes: Sequence[Sample]

    def write(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Report]:
        """Greedy captions."""
        reports: list[Report] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = encode(self.guard.model, self.guard.processor, images[part], prompts[part]).inputs
            options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
            if isinstance(self.guard, GazeGuard):
                reports += self.guard.generate_with_reports(**inputs, **options)[1]
            else:
                reports += map(_unguarded, _generate(self.guard, {**inputs, **options}))
        return reports

    def check(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[Report]:
        """Captions replayed with other images."""
        if isinstance(self.guard, Unguarded):
            return [_unguarded(caption) for caption in captions]
        reports: list[Report] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            reports += self.guard.check_all(images[part], captions[part], DEFAULT_PROMPT)
        return reports


@torch.no_grad()
def _generate(subject: Unguarded, arguments: dict[str, Any]) -> list[str]:
    """Captions by `model.generate` alone."""
    ids = subject.model.generate(**arguments)
    start = 0 if subject.model.config.is_encoder_decoder else arguments["input_ids"].shape[1]
    return [text.strip() for text in subject.processor.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)]


def _unguarded(caption: str) -> Report:
    return Report(caption, Verdict.UNCHECKED, "there is no guard", (), "none", "", __version__)


def audit_model(guard: GazeGuard | Unguarded, scenes: int = SCENES, batch_size: int = 8, seed: int = 0) -> Audit:
    """Audit a model on drawn scenes.

    Args:
        guard: Over the model; its detector gives the verdicts, and without one nothing passes. Or the model alone, whose words
            are audited.
        scenes: How many.
        batch_size: Captions at a time.
        seed: Of the scenes.

    Raises:
        InputError: There are fewer than `MIN_SCENES` scenes.
    """
    if scenes < MIN_SCENES:
        raise InputError(f"Got {scenes} scenes; an audit needs at least {MIN_SCENES}.")
    subject = _Subject(guard, batch_size, samples("test", scenes, seed, "scene"))
    words = Vocabulary(NOUNS, guard.processor.tokenizer)
    images = [scene.image for scene in subject.scenes]
    plain = subject.write(images, [DEFAULT_PROMPT] * scenes)
    probes: tuple[Callable[..., Probe], ...] = (_own, _blank, _wrong, _misled, _recoloured)
    found = tuple(probe(subject, words, images, plain) for probe in track(probes, "auditing"))
    if isinstance(guard, Unguarded):
        found = tuple(each.model_copy(update={"noticed": None, "verdicts": {}}) for each in found)
    captions = [report.caption for report in plain]
    right, elsewhere = (_right(captions, subject.scenes, words, shift) for shift in (0, scenes // 2))
    known = np.isfinite(right)
    lift = _lift(right[known] - elsewhere[known])
    return Audit(
        model=f"{type(guard.model).__name__} from {_short(guard.model.name_or_path)}",
        scenes=scenes,
        distinct_captions=len(set(captions)),
        uses_image=lift is not None and lift[1] > 0,
        right=float(right[known].mean()) if known.any() else 0.0,
        right_elsewhere=float(elsewhere[known].mean()) if known.any() else 0.0,
        lift=lift,
        probes=found,
    )


def _short(source: str) -> str:
    """Where a model is from, without the folders around it."""
    return Path(source).resolve().name if source and Path(source).exists() else source or "memory"


def _right(captions: Sequence[str], scenes: Sequence[Sample], words: Vocabulary, shift: int) -> NDArray[np.float64]:
    """(scenes,) the share of named objects that are drawn in the scene ``shift`` scenes further on; NaN if none is named."""
    shares = []
    for i, caption in enumerate(captions):
        drawn = {each.noun for each in scenes[(i + shift) % len(scenes)].drawing.objects}
        named = [noun in drawn for _, noun in words.named(caption)]
        shares.append(float(np.mean(named)) if named else np.nan)
    return np.array(shares)


def _lift(differences: NDArray[np.float64]) -> tuple[float, float, float] | None:
    """Their mean with its interval."""
    if len(differences) < MIN_SCENES:
        return None
    estimate: Estimate = bootstrap_images(len(differences), lambda drawn: np.average(differences, weights=drawn))
    return None if estimate.interval is None else (estimate.value, *estimate.interval)


# ------------------------------------------------------------------------------------------------------------ probes


def _probe(
    name: str, question: str, changed: Sequence[bool] | None, noticed: Sequence[bool], reports: Sequence[Report]
) -> Probe:
    verdicts = Counter(str(report.verdict) for report in reports)
    counted = None if changed is None else Share.count(changed)
    return Probe(name=name, question=question, changed=counted, noticed=Share.count(noticed), verdicts=dict(verdicts))


def _withheld(reports: Sequence[Report]) -> list[bool]:
    return [report.verdict is not Verdict.PASS for report in reports]


def _says(report: Report, words: Vocabulary) -> frozenset[str]:
    """The objects that a caption names."""
    return frozenset(noun for _, noun in words.named(report.caption))


def _colours(report: Report) -> list[str]:
    """The colours that a caption names, in order."""
    return [word for word in report.caption.lower().replace(",", " ").replace(".", " ").split() if word in COLOURS]


Images = Sequence[Image.Image]


def _own(subject: _Subject, _: Vocabulary, __: Images, plain: Sequence[Report]) -> Probe:
    pairs = zip(subject.scenes, plain, strict=True)
    true = [report for scene, report in pairs if not any(false for *_, false in decided_claims(scene.drawing, report.caption))]
    question = "Nothing is changed. Only wholly true captions count: to withhold or flag one of them is a false positive."
    return _probe("own image", question, None, _withheld(true), true)


def _blank(subject: _Subject, words: Vocabulary, images: Images, plain: Sequence[Report]) -> Probe:
    blank = [Image.new("RGB", image.size, WHITE) for image in images]
    written = subject.write(blank, [DEFAULT_PROMPT] * len(blank))
    checked = subject.check(blank, [report.caption for report in plain])
    changed = [_says(a, words) != _says(b, words) for a, b in zip(plain, written, strict=True)]
    question = "A white image: does the caption name other objects, and is the former caption withheld?"
    return _probe("blank image", question, changed, _withheld(checked), checked)


def _wrong(subject: _Subject, words: Vocabulary, images: Images, plain: Sequence[Report]) -> Probe:
    shift = len(images) // 2
    checked = subject.check([*images[shift:], *images[:shift]], [report.caption for report in plain])
    changed = [_says(a, words) != _says(b, words) for a, b in zip(plain, [*plain[shift:], *plain[:shift]], strict=True)]
    question = "The image of another scene: does the caption name other objects, and is the former caption withheld?"
    return _probe("wrong image", question, changed, _withheld(checked), checked)


def _misled(subject: _Subject, words: Vocabulary, images: Images, plain: Sequence[Report]) -> Probe:
    absent = [_absent(scene, report, words) for scene, report in zip(subject.scenes, plain, strict=True)]
    prompts = [MISLEADING.format(noun=with_article(noun), prompt=DEFAULT_PROMPT) for noun in absent]
    written = subject.write(images, prompts)
    misled = [noun in _says(report, words) for noun, report in zip(absent, written, strict=True)]
    fooled = [(noun, report) for noun, report, named in zip(absent, written, misled, strict=True) if named]
    noticed = [_flags(report, noun) for noun, report in fooled]
    question = (
        "A prompt that claims an object which is not drawn: does the caption name it (a model that trusts the image does not), "
        "and if so, is the object flagged?"
    )
    return _probe("misleading prompt", question, misled, noticed, [report for _, report in fooled])


def _absent(scene: Sample, report: Report, words: Vocabulary) -> str:
    """A noun that is neither drawn nor named, another one for every scene."""
    taken = {each.noun for each in scene.drawing.objects} | _says(report, words)
    start = sum(map(ord, scene.id)) % len(NOUNS)
    return next(noun for noun in (*NOUNS[start:], *NOUNS[:start]) if noun not in taken)


def _flags(report: Report, noun: str) -> bool:
    """Whether an object of this name is flagged, or the caption was not judged."""
    flagged = {finding.claim.phrase.head.text.lower() for finding in report.findings if finding.flagged}
    return noun in flagged or report.verdict is Verdict.UNCHECKED


def _recoloured(subject: _Subject, _: Vocabulary, __: Images, plain: Sequence[Report]) -> Probe:
    order = list(COLOURS)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    coloured = [i for i, report in enumerate(plain) if _colours(report)]
    images = []
    for i in coloured:
        drawing = subject.scenes[i].drawing
        objects = tuple(replace(each, colour=after[each.colour]) for each in drawing.objects)
        images.append(replace(drawing, objects=objects).draw())
    before = [plain[i] for i in coloured]
    written = subject.write(images, [DEFAULT_PROMPT] * len(images)) if images else []
    checked = subject.check(images, [report.caption for report in before]) if images else []
    changed = [_colours(a) != _colours(b) for a, b in zip(before, written, strict=True)]
    question = "Every object in another colour: does the caption name other colours, and is the former caption withheld?"
    return _probe("swapped colours", question, changed, _withheld(checked), checked)
