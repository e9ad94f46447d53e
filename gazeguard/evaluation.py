"""Evaluation of a detector on captions with labels: how well its risks rank and how far they can be believed.

    evaluation = evaluate(guard, read_captions("rows.jsonl"))
    evaluation.save("evaluation")

The rows are those that `gazeguard.fitting.read_captions` reads. *False* is the positive class. Every ranking stands beside
**text only**: a logistic regression on position, order, repetition, log-probability and entropy alone, fitted to the same
rows without the image at hand (five folds that share no image). What the gaze adds is the paired difference, the lift.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gazeguard.claims.english import count
from gazeguard.claims.parse import claims
from gazeguard.detection import features, metrics
from gazeguard.detection.calibration import calibration_error, reliability
from gazeguard.detection.metrics import Estimate
from gazeguard.errors import InputError, given
from gazeguard.fitting import LabelledCaption, labelled_claims
from gazeguard.guard import GazeGuard
from gazeguard.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BIN = 10  # tokens; within a bin the position of a word cannot help
FOLDS = 5  # of the text-only regression
JSON_FILE, TABLE_FILE, PLOT_FILE = "evaluation.json", "evaluation.md", "evaluation.png"
PARTS = {"all": "all claims", "within_bins": "within position bins", "first_within_bins": "first mentions, within bins"}


class Ranking(BaseModel):
    """How well the risks of one kind of claim rank, beside text alone; AUROC with 95 % intervals by image.

    part: a key of `PARTS`; ``text_only`` and ``lift`` are None where a class has fewer claims than `FOLDS`
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    part: str
    claims: int
    false: int
    images: int
    auroc: Estimate
    text_only: Estimate | None
    lift: Estimate | None


class Calibration(BaseModel):
    """How far the risks of one kind of claim can be believed, and what the policy's threshold flags.

    ece:       expected calibration error
    bins:      (mean risk, share that is false, claims) of ten bins of equal mass
    precision: false claims among the flagged ones; None when nothing is flagged
    recall:    flagged claims among the false ones
    """

    model_config = ConfigDict(frozen=True)

    ece: float
    bins: tuple[tuple[float, float, int], ...]
    precision: float | None
    recall: float


class Evaluation(BaseModel):
    """The figures of `evaluate`.

    skipped:   how many captions were left out for which reason
    unjudged:  labelled claims that no regression judges, by kind
    one_class: labelled claims of kinds without a true or without a false one, which give no ranking, by kind
    """

    model_config = ConfigDict(frozen=True)

    model: str
    policy: str
    captions: int
    skipped: dict[str, int]
    unjudged: dict[str, int]
    one_class: dict[str, int]
    rankings: tuple[Ranking, ...]
    calibration: dict[str, Calibration]

    def table(self) -> str:
        """The figures in Markdown."""
        lines = [
            f"Model `{self.model}`, policy {self.policy}, {count(self.captions, 'caption')}. AUROC with 95 % intervals "
            "by image; false is the positive class.",
            "",
            "| kind | part | claims (false), images | detector | text only | lift |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rankings:
            estimates = " | ".join(_shown(estimate) for estimate in (row.auroc, row.text_only, row.lift))
            size = f"{row.claims:,} ({row.false:,}), {row.images:,}"
            lines.append(f"| {row.kind} | {PARTS[row.part]} | {size} | {estimates} |")
        lines += ["", "| kind | calibration error (ECE) | precision of the flags | recall of the flags |", "|---|---|---|---|"]
        for kind, each in self.calibration.items():
            precision = "nothing is flagged" if each.precision is None else f"{each.precision:.2f}"
            lines.append(f"| {kind} | {each.ece:.3f} | {precision} | {each.recall:.2f} |")
        notes = [f"- {count(number, 'caption')} left out: {reason}" for reason, number in self.skipped.items()]
        notes += [f"- {count(number, 'labelled claim')} of kind {kind} not judged" for kind, number in self.unjudged.items()]
        notes += [
            f"- {count(number, 'claim')} of kind {kind}: all true or all false, which gives no ranking"
            for kind, number in self.one_class.items()
        ]
        return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"

    def plot(self) -> Figure:
        """The rankings as bars with their intervals, and the reliability of the risks; not registered with pyplot."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        rows = [row for row in self.rankings if row.part == "within_bins"]
        for offset, (name, colour) in enumerate((("auroc", "#0072b2"), ("text_only", "#999999"))):
            shown = [(place, getattr(row, name)) for place, row in enumerate(rows) if getattr(row, name) is not None]
            for place, estimate in shown:
                low, high = estimate.interval or (estimate.value, estimate.value)
                height = place + 0.35 * offset
                left.barh(height, estimate.value, 0.33, color=colour, label="detector" if name == "auroc" else "text only")
                left.plot([low, high], [height, height], color="black", linewidth=1)
        left.axvline(0.5, color="grey", linestyle=":", linewidth=1)
        left.set(xlim=(0, 1), yticks=[place + 0.17 for place in range(len(rows))], yticklabels=[row.kind for row in rows])
        left.set(xlabel="AUROC within position bins (dotted: chance)")
        left.invert_yaxis()
        handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=2, frameon=False)
        right.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for kind, each in self.calibration.items():
            risk, share, _ = zip(*each.bins, strict=True)
            right.plot(risk, share, "o-")
            right.annotate(f" {kind}", (risk[-1], share[-1]))
        right.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted risk", ylabel="share that is false")
        return figure

    def save(self, folder: str | Path) -> None:
        """Write `JSON_FILE`, `TABLE_FILE` and `PLOT_FILE` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_FILE).write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")
        (folder / TABLE_FILE).write_text(self.table(), encoding="utf-8")
        self.plot().savefig(folder / PLOT_FILE, dpi=110)


class _Claims(NamedTuple):
    """The labelled claims of all captions: risks, whether the policy flags them, text features, labels; (claims,) each."""

    risk: NDArray[np.float64]
    flagged: NDArray[np.bool_]
    text: NDArray[np.float64]
    false: NDArray[np.bool_]
    kind: NDArray[np.str_]
    image: NDArray[np.int64]

    def select(self, chosen: NDArray[np.bool_]) -> _Claims:
        """Some of the claims, their images numbered anew."""
        image = np.unique(self.image[chosen], return_inverse=True)[1]
        return _Claims(self.risk[chosen], self.flagged[chosen], self.text[chosen], self.false[chosen], self.kind[chosen], image)


def evaluate(guard: GazeGuard, captions: Sequence[LabelledCaption], batch_size: int = 16) -> Evaluation:
    """Check captions with labels, and measure the risks of their claims.

    Args:
        guard: A guard with a detector. Rows that its detector was fitted to flatter it: give others.
        captions: The captions with their labels.
        batch_size: Captions replayed at a time.

    Returns:
        The figures. A kind without both true and false claims has no ranking.

    Raises:
        InputError: The guard has no detector, or no labelled claim could be judged; the message says why.
    """
    if guard.heads.unusable:
        raise InputError(f"Nothing can be judged with these gaze heads: {guard.heads.unusable}")
    if guard.detector is None:
        raise InputError("This guard has no detector to evaluate. Give its artifacts, or fit one first: gazeguard train.")
    table, skipped, unjudged = _checked(guard, captions, batch_size)
    if not len(table.risk):
        reasons = "; ".join(f"{number} x {reason}" for reason, number in (skipped + unjudged).most_common(3))
        nothing = "no label is on a claim of its kind; docs/evaluation-guide.md has the format"
        raise InputError(f"No labelled claim of {count(len(captions), 'caption')} was judged: {reasons or nothing}.")
    rankings: list[Ranking] = []
    calibration: dict[str, Calibration] = {}
    one_class: dict[str, int] = {}
    for kind in sorted(set(table.kind)):
        part = table.select(table.kind == kind)
        if part.false.all() or not part.false.any():
            one_class[str(kind)] = len(part.false)
            continue
        rankings += _rankings(str(kind), part)
        calibration[str(kind)] = _calibration(part)
    return Evaluation(
        model=guard.heads.model,
        policy=guard.policy.name,
        captions=len(captions),
        skipped=dict(skipped),
        unjudged=dict(unjudged),
        one_class=one_class,
        rankings=tuple(rankings),
        calibration=calibration,
    )


def _checked(
    guard: GazeGuard, captions: Sequence[LabelledCaption], batch_size: int
) -> tuple[_Claims, Counter[str], Counter[str]]:
    """The labelled claims with what the guard says of them; captions left out by reason; claims not judged by kind."""
    columns: list[list] = [[] for _ in _Claims._fields]
    skipped: Counter[str] = Counter()
    unjudged: Counter[str] = Counter()
    images: dict[str, int] = {}
    batches = [captions[i : i + batch_size] for i in range(0, len(captions), batch_size)]
    for batch in track(batches, "checking captions"):
        paths, texts, prompts = zip(*((row.image, row.caption, row.prompt) for row in batch), strict=True)
        for row, report in zip(batch, guard.check_all(paths, texts, prompts), strict=True):
            if report.trace is None or not report.findings:
                skipped[report.reason] += 1
                continue
            every, findings = claims(row.caption), {finding.claim: finding for finding in report.findings}
            text = features.pick(features.features(given(report.trace), every), report.trace.heads, features.TEXT_FEATURES)
            for claim, false in labelled_claims(row, every):
                if (finding := findings.get(claim)) is None:
                    unjudged[claim.kind] += 1
                    continue
                image = images.setdefault(row.image, len(images))
                values = (finding.risk, finding.flagged, text[every.index(claim)], false, claim.kind, image)
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
    return _Claims(*map(np.array, columns)), skipped, unjudged


def _rankings(kind: str, part: _Claims) -> list[Ranking]:
    """One ranking per part that has both labels."""
    bins = np.expm1(part.text[:, features.TEXT_FEATURES.index("position")]).round().astype(np.int64) // BIN
    first = part.text[:, features.TEXT_FEATURES.index("repeated")] == 0
    few = _few(part)
    text_only = None if few else _text_only(part)
    everything, one_bin = np.ones(len(first), bool), np.zeros_like(bins)
    rankings = []
    for name, chosen, in_bins in (
        ("all", everything, one_bin),
        ("within_bins", everything, bins),
        ("first_within_bins", first, bins),
    ):
        some = part.select(chosen)
        labels = (some.false, some.image, in_bins[chosen])
        auroc = _auroc(some.risk, *labels)
        if auroc is None:
            continue
        beside = None if text_only is None else text_only[chosen]
        rankings.append(
            Ranking(
                kind=kind,
                part=name,
                claims=len(some.false),
                false=int(some.false.sum()),
                images=int(some.image.max()) + 1,
                auroc=auroc._replace(interval=None) if few else auroc,
                text_only=None if beside is None else _auroc(beside, *labels),
                lift=None if beside is None else metrics.lift(some.false, some.risk, beside, *labels[1:]),
            )
        )
    return rankings


def _auroc(
    score: NDArray[np.float64], false: NDArray[np.bool_], image: NDArray[np.int64], bins: NDArray[np.int64]
) -> Estimate | None:
    """The area with its interval; None where no bin has both labels."""
    estimate = metrics.auroc(false, score, image, bins) if len(false) else None
    return None if estimate is None or np.isnan(estimate.value) else estimate


def _few(part: _Claims) -> bool:
    """Whether too few images have true claims, or false ones, to say how sure a figure is, or to fit a regression on text."""
    return min(len(np.unique(part.image[part.false == label])) for label in (False, True)) < FOLDS


def _text_only(part: _Claims) -> NDArray[np.float64]:
    """(claims,) the probability of *false* by text alone, each from a regression that has not seen the claim's image."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(regression, part.text, part.false, groups=part.image, cv=folds, method="predict_proba")
    return np.asarray(predicted[:, 1], np.float64)


def _calibration(part: _Claims) -> Calibration:
    flagged_false = int((part.flagged & part.false).sum())
    return Calibration(
        ece=calibration_error(part.risk, part.false),
        bins=tuple(reliability(part.risk, part.false, 10)),
        precision=flagged_false / int(part.flagged.sum()) if part.flagged.any() else None,
        recall=flagged_false / int(part.false.sum()),
    )


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "too few claims"
    if estimate.interval is None:
        return f"{estimate.value:.3f}, of too few claims for an interval"
    return f"{estimate.value:.3f} [{estimate.interval[0]:.3f}, {estimate.interval[1]:.3f}]"
