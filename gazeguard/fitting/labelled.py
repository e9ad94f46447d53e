"""Fitting of a detector to captions with labels: a person's, a list of the objects in the image, or the model's own answers.

    detector, left_out = fit_detector(guard, read_captions("captions.jsonl"))
    detector.save_pretrained("my-detector")

Each line of ``captions.jsonl`` is one captioned image, a JSON object with these keys:

| key | required | meaning |
|---|---|---|
| ``image`` | yes | path of the image, relative to the folder of the file |
| ``caption`` | yes | the caption that the model wrote |
| ``prompt`` | no | the prompt that the caption answers |
| ``image_id`` | no | number of the image in a public dataset; the evaluations on such datasets read it |
| ``labels`` | no | list of ``{"start": 0, "end": 8, "kind": "object", "false": true}``: claims of this kind on these characters of the caption (``end`` exclusive) are false, or with ``false: false`` are true; ``kind`` is object, attribute or location |
| ``objects`` | no | without ``labels``: every object in the image, in the words of the captions ("dog", "dining table"), as the ground truth of CHAIR lists them (Rohrbach et al. 2018); an object that the caption names and the list does not counts as false |

Claims without a label are left out.
"""  # noqa: E501 (a table)

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gazeguard.claims.english import article, is_plural, singular
from gazeguard.claims.parse import Caption, Claim, Kind, claims, parse
from gazeguard.decoding.verification import AnswerTokens
from gazeguard.decoding.verification import ask as ask_about
from gazeguard.detection import features
from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.detection.detector import Detector
from gazeguard.detection.table import ClaimTable, stack_states
from gazeguard.errors import GazeGuardError, InputError, given
from gazeguard.fitting.rows import Recorded, Rows
from gazeguard.guard import GazeGuard
from gazeguard.progress import track
from gazeguard.prompts import DEFAULT_PROMPT
from gazeguard.report import Report
from gazeguard.trace import F32
from gazeguard.vision.encoding import encode
from gazeguard.vision.images import load_image
from gazeguard.vision.inputs import model_inputs

LOGGER = logging.getLogger(__name__)
MAX_LINE_BYTES = 2**20


class Label(BaseModel):
    """Whether the claims of one kind on these characters of a caption are false; ``end`` is exclusive."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    start: int = Field(ge=0)
    end: int = Field(gt=0)
    kind: Kind = "object"
    false: bool


class LabelledCaption(BaseModel):
    """One captioned image with what is known of its claims, as a line of a JSONL file has it; the module says the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(min_length=1, max_length=4096)
    caption: str = Field(min_length=1, max_length=100_000)
    image_id: int | None = None
    prompt: str = Field(DEFAULT_PROMPT, max_length=100_000)
    labels: tuple[Label, ...] | None = None
    objects: tuple[str, ...] | None = None


class Example(NamedTuple):
    """One labelled claim with its features (F,), its caption and the `wording_nll` of that, and its image's state."""

    x: NDArray[np.float64]
    false: bool
    claim: Claim
    source: LabelledCaption
    state: F32 | None
    wording_nll: float


def read_captions(path: str | Path) -> list[LabelledCaption]:
    """Read captions with labels from a JSONL file.

    Args:
        path: The file; images are found relative to its folder.

    Raises:
        InputError: The file cannot be opened, or a line is not a labelled caption; the message names the line and the key.
    """
    path, captions = Path(path), []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes, more than any row needs.")
                if line.strip():
                    row = LabelledCaption.model_validate_json(line)
                    captions.append(row.model_copy(update={"image": str(path.parent / row.image)}))
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}. Give a JSONL file of captioned images.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole line"
        raise InputError(
            f"{path}, line {number}: {key}: {first['msg']}. A row has image, caption, and labels or objects."
        ) from error
    if not captions:
        raise InputError(f"{path} has no row. Give one line per captioned image: image, caption, and labels or objects.")
    return captions


def labelled_claims(row: LabelledCaption, every: Sequence[Claim] | None = None) -> Iterator[tuple[Claim, bool]]:
    """The claims of a caption that its labels or objects decide, each with whether it is false.

    Args:
        row: The caption.
        every: Its claims, where they are at hand; by default it is parsed for them.
    """
    objects = None if row.objects is None else {_noun(name) for name in row.objects}
    for claim in claims(row.caption) if every is None else every:
        for label in row.labels or ():
            if label.kind == claim.kind and label.start < claim.end and claim.start < label.end:
                yield claim, label.false
                break
        else:
            if row.labels is None and objects is not None and claim.kind == "object":
                yield claim, _noun(claim.phrase.head.text) not in objects


def _noun(name: str) -> str:
    """The name in lower case and in the singular; used alike for the words of captions and of lists."""
    return singular(name.strip().lower())


@torch.no_grad()
def yes_probability(guard: GazeGuard, images: Sequence[str], names: Sequence[str]) -> list[float]:
    """The model's answers to "Is there a NAME in the picture?".

    Args:
        guard: The guard whose model is asked.
        images: Paths of the images.
        names: For each image the object that is asked about.

    Returns:
        For each image the probability of yes against no.
    """
    questions = [_question(name.lower()) for name in names]
    inputs = encode(
        guard.model, guard.processor, [load_image(image, guard.tracer.background) for image in images], questions
    ).inputs
    logits = guard.model(**model_inputs(guard.model, inputs), use_cache=False).logits[:, -1]
    tokens = AnswerTokens.from_tokenizer(guard.processor.tokenizer)._replace(min_mass=0)  # a baseline takes any answer
    return tokens.log_odds(logits).sigmoid().tolist()


def _question(name: str) -> str:
    if is_plural(name):
        return f"Are there {name} in the picture?"
    return f"Is there {article(name)} {name} in the picture?"


def fit_detector(
    guard: GazeGuard, captions: Sequence[LabelledCaption], ask: bool = False, batch_size: int = 16, verify: bool = False
) -> tuple[Detector, Counter[str]]:
    """Fit a detector to replays of captions with labels.

    Every claim helps to fit and to calibrate; none is judged by a fit to its own image (see `cross_fit`).

    Args:
        guard: A guard over the model that wrote the captions; its heads are used, its detector is not.
        captions: The captions with their labels.
        ask: Label the objects of captions without labels by asking the model itself (`yes_probability`). Such labels are
            weak: a model that believes a false object may have written it for that reason.
        batch_size: Captions replayed at a time.
        verify: Also fit the weight of self-verification answers; policies that verify need it.

    Returns:
        The detector, and how many captions were left out for which reason.

    Raises:
        InputError: There are too few false or true claims.
        UnsupportedError: The gaze heads are unusable.
    """
    guard.heads.check_usable()
    examples, left_out = _examples(guard, captions, ask, batch_size)
    if not examples:
        raise InputError(
            f"No claim of {len(captions)} captions has a label. Give labels or objects with the rows, or set ask (--ask)."
        )
    table = claim_table(examples)
    detector, risk = cross_fit(table, guard.heads)
    if verify:
        detector = detector.fit_answers(risk, _answers(guard, examples), table)
    return detector, left_out


def claim_table(examples: Sequence[Example]) -> ClaimTable:
    """Labelled claims as detectors are fitted to them."""
    sources = {id(each.source): number for number, each in enumerate(examples)}
    paths, image = np.unique([each.source.image for each in examples], return_inverse=True)
    states = dict(zip(image.tolist(), (each.state for each in examples), strict=True))
    return ClaimTable(
        x=np.stack([each.x for each in examples]),
        false=np.array([each.false for each in examples]),
        kinds=np.array([each.claim.kind for each in examples]),
        image=image,
        caption=np.array([sources[id(each.source)] for each in examples]),
        states=stack_states([states[number] for number in range(len(paths))]),
        wording_nll=np.array(list({id(each.source): each.wording_nll for each in examples}.values())),
    )


def _examples(
    guard: GazeGuard, captions: Sequence[LabelledCaption], ask: bool, batch_size: int
) -> tuple[list[Example], Counter[str]]:
    """The labelled claims of captions with their features, and how many captions were left out for which reason."""
    replayer = GazeGuard(guard.model, guard.processor, heads=guard.heads, grid=guard.tracer.grid)
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    batches = [captions[i : i + batch_size] for i in range(0, len(captions), batch_size)]
    for batch in track(batches, "replaying captions"):
        columns = zip(*((row.image, row.caption, row.prompt) for row in batch), strict=True)
        for row, report in zip(batch, replayer.check_all(*columns), strict=True):
            if report.trace is None:
                left_out[report.reason] += 1
                continue
            caption = parse(row.caption)
            every = caption.claims
            labelled = list(labelled_claims(row, every)) or (_claims_by_asking(guard, row, every) if ask else [])
            if not labelled:
                left_out["no claim has a label"] += 1
            examples += _with_features(row, report, caption, labelled)
    return examples, left_out


def check_labelled(captions: Sequence[LabelledCaption]) -> None:
    """Raise `InputError` for captions of which no claim has a label; needs no model."""
    if captions and not any(True for row in captions for _ in labelled_claims(row)):
        raise InputError(
            f"No claim of {len(captions)} captions has a label. Add objects (every object in the image) or labels to the rows, "
            "or leave the captions out: a fit needs no labels."
        )


def record_labelled(
    guard: GazeGuard, captions: Sequence[LabelledCaption], first: int, say: Callable[[str], None], batch_size: int = 16
) -> Recorded:
    """Replay captions with labels for a fit that has other claims, too.

    Args:
        guard: A guard over the model that wrote them.
        captions: The captions.
        first: Number of the first image.
        say: Is told which captions are left out.
        batch_size: Captions replayed at a time.

    Raises:
        InputError: No caption is of use; the message says why.
    """
    examples, left_out = _examples(guard, captions, False, batch_size)
    reasons = [f"{reason} ({number} of {len(captions)})" for reason, number in left_out.items()]
    if not examples:
        raise InputError(f"None of the labelled captions is of use: {'; '.join(reasons)}.")
    for reason in reasons:
        say(f"labelled captions that are left out: {reason}")
    table = claim_table(examples)
    number = np.unique(table.image)
    rows = Rows(
        x=table.x,
        false=table.false,
        kinds=table.kinds,
        image=first + table.image,
        caption=first + table.caption,
        origin=np.full(len(examples), "labelled"),
        style=np.full(len(examples), ""),
        answer=_answers_if_any(guard, examples),
    )
    states = np.zeros((len(number), 0), np.float32) if table.states is None else table.states
    return Recorded(rows, ("",) * len(number), first + number, states, given(table.wording_nll))


def _claims_by_asking(guard: GazeGuard, row: LabelledCaption, every: Sequence[Claim]) -> list[tuple[Claim, bool]]:
    """The object claims of a caption, each false where the model answers no."""
    objects = [claim for claim in every if claim.kind == "object"]
    if not objects:
        return []
    answers = yes_probability(guard, [row.image] * len(objects), [claim.phrase.head.text for claim in objects])
    return [(claim, answer < 0.5) for claim, answer in zip(objects, answers, strict=True)]


def _with_features(
    row: LabelledCaption, report: Report, caption: Caption, labelled: Sequence[tuple[Claim, bool]]
) -> Iterator[Example]:
    if not labelled:
        return
    trace = given(report.trace)
    x, wording_nll = features.features(trace, caption.claims), features.wording_nll(trace, caption.phrases)
    for claim, false in labelled:
        yield Example(x[caption.claims.index(claim)], false, claim, row, trace.image_state, wording_nll)


def _answers(guard: GazeGuard, examples: Sequence[Example]) -> NDArray[np.float64]:
    """(examples,): log-odds of yes to the question whether each claim's object is there; NaN for locations."""
    answers = np.full(len(examples), np.nan)
    of_caption: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        if example.claim.kind != "location":
            of_caption.setdefault(id(example.source), []).append(i)
    for indices in track(of_caption.values(), "self-verification"):
        row, phrases = examples[indices[0]].source, [examples[i].claim.phrase for i in indices]
        image = load_image(row.image, guard.tracer.background)
        log_odds = ask_about(guard.model, guard.processor, [image], [row.prompt], [0] * len(phrases), phrases)
        answers[indices] = log_odds.cpu().numpy()
    return answers


def _answers_if_any(guard: GazeGuard, examples: Sequence[Example]) -> NDArray[np.float64]:
    """(examples,): `_answers`; NaN for all of a model that cannot be asked, as policies that verify will say."""
    try:
        return _answers(guard, examples)
    except GazeGuardError as error:
        LOGGER.info("the model is not asked about its claims: %s", error)
        return np.full(len(examples), np.nan)
