"""What does a detector learn from? Captions whose claims are labelled: by you, by a list of what is there, or by the model.

detector, left_out = learn(guard, read_rows("captions.jsonl"))
detector.save_pretrained("my-detector")
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import track

from gazeguard.claims.parse import Claim, Kind, Phrase, claims
from gazeguard.decoding.verification import AnswerTokens
from gazeguard.decoding.verification import ask as ask_about
from gazeguard.detection import features
from gazeguard.detection.detector import Detector
from gazeguard.errors import InputError
from gazeguard.guard import DEFAULT_PROMPT, GazeGuard
from gazeguard.report import Report
from gazeguard.vision.encoding import encode, model_inputs
from gazeguard.vision.images import load_image

MAX_ROW_BYTES = 2**20
HELD_OUT = 3  # one picture in so many sets probabilities and thresholds, the others the weights


class Label(BaseModel):
    """What is known of the claims of one kind on these characters of a caption, ``end`` exclusive."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    start: int = Field(ge=0)
    end: int = Field(gt=0)
    kind: Kind = "object"
    false: bool


class Row(BaseModel):
    """One captioned picture, as a line of a JSONL file has it.

    image:   path of the picture, from the folder of the file
    prompt:  what the caption answers
    labels:  what is known of its claims; the others are left out
    objects: without labels: everything that is in the picture, in the words of the captions ("dog", "dining table"), as the
             ground truth of CHAIR (Rohrbach et al. 2018) has it; whatever else is named counts as invented
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(min_length=1, max_length=4096)
    caption: str = Field(min_length=1, max_length=100_000)
    prompt: str = Field(DEFAULT_PROMPT, max_length=100_000)
    labels: tuple[Label, ...] | None = None
    objects: tuple[str, ...] | None = None


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL file. Raises `InputError` with the line that is wrong, and why."""
    path, rows = Path(path), []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if len(line) > MAX_ROW_BYTES:
                    raise InputError(f"{path}, line {number}: longer than {MAX_ROW_BYTES} bytes, more than any row needs.")
                if line.strip():
                    row = Row.model_validate_json(line)
                    rows.append(row.model_copy(update={"image": str(path.parent / row.image)}))
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}. Give a JSONL file of captioned pictures.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole line"
        raise InputError(
            f"{path}, line {number}: {where}: {first['msg']}. A row has image, caption, and labels or objects."
        ) from error
    return rows


def known(row: Row) -> Iterator[tuple[Claim, bool]]:
    """The claims of a row whose truth it tells, each with whether it is false."""
    there = None if row.objects is None else {_singular(name) for name in row.objects}
    for claim in claims(row.caption):
        for label in row.labels or ():
            if label.kind == claim.kind and label.start < claim.end and claim.start < label.end:
                yield claim, label.false
                break
        else:
            if row.labels is None and there is not None and claim.kind == "object":
                yield claim, _singular(claim.phrase.head.text) not in there


def _singular(name: str) -> str:
    """The name in lower case without a plural's "s"; the same for the caption's words and the list's."""
    name = name.strip().lower()
    return name if name.endswith("ss") else name.removesuffix("s")


@torch.no_grad()
def says_yes(guard: GazeGuard, images: Sequence[str], names: Sequence[str]) -> list[float]:
    """The probability of yes, against no, that the model answers to "Is there a NAME in the picture?" of each picture."""
    asked = [_question(name.lower()) for name in names]
    inputs = encode(guard.model, guard.processor, [load_image(image) for image in images], asked).inputs
    logits = guard.model(**model_inputs(guard.model, inputs), use_cache=False).logits[:, -1]
    return AnswerTokens.from_tokenizer(guard.processor.tokenizer).log_odds(logits).sigmoid().tolist()


def _question(name: str) -> str:
    if name != _singular(name):
        return f"Are there {name} in the picture?"
    return f"Is there a{'n' * name.startswith(tuple('aeiou'))} {name} in the picture?"


def learn(
    guard: GazeGuard, rows: Sequence[Row], ask: bool = False, batch_size: int = 16, verify: bool = False
) -> tuple[Detector, Counter[str]]:
    """A detector fitted on replays of the rows' captions, and how many rows were left out for which reason.

    ask: rows that tell nothing of their objects are labelled by asking the model itself, by `says_yes`. Such labels are weak:
         what the model believes when asked it may have written, too.
    verify: also learn, from the pictures that are held out, what the model's answers are worth when it is asked about a claim:
         what a policy with verify needs
    Pictures are held out for probabilities and thresholds by the hash of their path, so that no picture is on both sides.
    Raises `InputError` when there are too few false or true claims to learn from.
    """
    listener = GazeGuard(guard.model, guard.processor, heads=guard.heads, grid=guard.grid)
    listener.detector = None  # whatever it would say, it is about to be replaced
    left_out: Counter[str] = Counter()
    found: list[tuple[np.ndarray, bool, Kind, str]] = []
    sources: list[tuple[Row, Phrase]] = []  # of what was found
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for group in track(groups, "replaying captions", console=Console(stderr=True), transient=True):
        images, captions, prompts = zip(*((row.image, row.caption, row.prompt) for row in group), strict=True)
        reports = listener.check_all(images, captions, prompts)
        for row, report in zip(group, reports, strict=True):
            told = list(known(row)) if report.trace is not None else []
            if report.trace is not None and not told and ask:
                told = _asked(listener, row)
            if told:
                found += _measured(row, report, told)
                sources += [(row, claim.phrase) for claim, _ in told]
            else:
                left_out["nothing is known of its claims" if report.trace is not None else report.reason] += 1
    if not found:
        raise InputError(
            f"No claim of {len(rows)} captions has a label. Give labels or objects with the rows, or let the model be asked."
        )
    x, false, kinds, images = (np.array(column) for column in zip(*found, strict=True))
    numbers = np.unique(images, return_inverse=True)[1]
    held = np.array([int(hashlib.sha256(image.encode()).hexdigest(), 16) % HELD_OUT == 0 for image in images])
    detector = Detector.fit(x[~held], false[~held], kinds[~held], guard.heads)
    detector = detector.calibrated(x[held], false[held], kinds[held], numbers[held])
    if verify:
        said = _answers([source for source, is_held in zip(sources, held, strict=True) if is_held], kinds[held], listener)
        detector = detector.fit_answers(detector.risk(x[held], kinds[held]), said, false[held], kinds[held])
    return detector, left_out


def _answers(sources: Sequence[tuple[Row, Phrase]], kinds: np.ndarray, guard: GazeGuard) -> np.ndarray:
    """(claims,) log-odds of yes, when the model is asked whether the thing of each claim is there; NaN for places."""
    said = np.full(len(sources), np.nan)
    of_row: dict[int, list[int]] = {}
    for i, (row, _) in enumerate(sources):
        if kinds[i] != "location":
            of_row.setdefault(id(row), []).append(i)
    for own in track(of_row.values(), "asking about them", console=Console(stderr=True), transient=True):
        row, things = sources[own[0]][0], [sources[i][1] for i in own]
        image = load_image(row.image)
        said[own] = ask_about(guard.model, guard.processor, [image], [row.prompt], [0] * len(own), things).cpu().numpy()
    return said


def _asked(guard: GazeGuard, row: Row) -> list[tuple[Claim, bool]]:
    things = [claim for claim in claims(row.caption) if claim.kind == "object"]
    if not things:
        return []
    answers = says_yes(guard, [row.image] * len(things), [claim.phrase.head.text for claim in things])
    return [(claim, answer < 0.5) for claim, answer in zip(things, answers, strict=True)]


def _measured(row: Row, report: Report, told: Sequence[tuple[Claim, bool]]) -> Iterator[tuple[np.ndarray, bool, Kind, str]]:
    said = claims(row.caption)
    x = features.features(report.trace, said)
    for claim, false in told:
        yield x[said.index(claim)], false, claim.kind, row.image
