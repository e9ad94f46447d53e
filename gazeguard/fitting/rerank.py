"""Choice of the evidence that the rerank decoder may use for a model, measured on drawn scenes under the trivial frontier.

The *trivial frontier* is what shortens captions blindly: their first k objects, and a bonus on every plausible
full stop. Both lower the share of false objects and the recall. Evidence helps only if rerank has fewer false objects than the
frontier at the same recall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gazeguard.decoding.rerank import StopBonus, tokens_spelling
from gazeguard.detection.metrics import Estimate, bootstrap_images, draws, estimate
from gazeguard.detection.rerank_evidence import RerankEvidence
from gazeguard.errors import InputError, given
from gazeguard.fitting.visual_words import DrawnScene, Readability, Vocabulary, rank_swaps, read_image_tokens
from gazeguard.guard import GazeGuard
from gazeguard.policy import Policy, Rerank
from gazeguard.progress import track
from gazeguard.vision.encoding import encode

SCENES_READ = 12  # enough for a share of image tokens
MIN_SCENES = 8
STOP_BONUSES = (1.0, 2.0, 4.0)
SINGLE = {"attended_logprob": (2.0, 4.0), "attribution": (0.5, 2.0)}
END_BONUS = 2.0
MAX_RECALL_LOSS = 0.02
LEVEL = 0.005  # one-sided, of a setting that is below the frontier: several are compared on the same scenes

Counts = NDArray[np.float64]  # (scenes, 4): false mentions, mentions, drawn nouns that are named, drawn nouns
Setting = Mapping[str, float]


def measure_rerank(
    guard: GazeGuard,
    scenes: Sequence[DrawnScene],
    nouns: Collection[str],
    batch_size: int = 8,
    max_new_tokens: int = 128,
) -> RerankEvidence:
    """Measure what rerank may use for a model, and choose its strengths.

    Args:
        guard: Over the model, with its gaze heads; detector and policy are not used.
        scenes: Validation scenes, at least `MIN_SCENES`; 32 or more for intervals worth their name.
        nouns: All that the scenes decide: a caption that names one of them which is not drawn is wrong.
        batch_size: Captions that are generated at a time.
        max_new_tokens: Of a caption.

    Returns:
        The strengths that beat the trivial frontier, or what was measured where none does.

    Raises:
        InputError: There are too few scenes.
    """
    if len(scenes) < MIN_SCENES:
        raise InputError(f"{len(scenes)} drawn scenes are given; measuring rerank needs at least {MIN_SCENES}.")
    study = _Study(guard, scenes, Vocabulary(nouns, guard.processor.tokenizer), batch_size, max_new_tokens)
    readable = read_image_tokens(guard, scenes[:SCENES_READ], study.words)
    layer, figures = _best_layer(readable)
    guard.tracer.recorder.read_layer(layer)
    try:
        captions = study.write({})
        ranking = rank_swaps(guard, scenes, captions, study.words, batch_size)
    finally:
        guard.tracer.recorder.read_layer(None)
    ranks = {"attribution": _mean(ranking.attribution), "attended_logprob": _mean(ranking.attended)}
    for name, rank in ranks.items():
        figures |= {f"{name}_ranking": rank.value, f"{name}_ranking_low": _low(rank)}
    useful = [name for name, rank in ranks.items() if _low(rank) > 0.5]
    if not useful:
        reason = "neither the gaze heads' attribution nor the attended image tokens prefer drawn objects to others"
        return _evidence({}, layer, figures, reason)
    return _choose(study, useful, layer, captions, figures)


def _mean(values: NDArray[np.float64]) -> Estimate:
    """The mean over the scenes that have a value."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Estimate(math.nan, None)
    return bootstrap_images(len(known), lambda drawn: np.average(known, weights=drawn))


def _low(rank: Estimate) -> float:
    return math.nan if rank.interval is None else rank.interval[0]


def _best_layer(readable: Readability | None) -> tuple[int | None, dict[str, float]]:
    """The layer at which most image tokens name what is drawn, None for behind the last one, with the figures."""
    if readable is None:
        return None, {}
    shares, scenes = readable.drawn.mean(1), readable.drawn.shape[1]
    best = int(np.argmax(shares))
    gain = bootstrap_images(scenes, lambda drawn: np.average(readable.drawn[best] - readable.drawn[-1], weights=drawn))
    if not _low(gain) > 0:  # no better than behind the last layer
        best = len(shares) - 1
    figures = {
        "readable_share": float(shares[best]),
        "readable_share_of_other_scene": float(readable.other[best].mean()),
        "readable_share_last_layer": float(shares[-1]),
    }
    return readable.layers[best], figures


class _Study:
    """Captions of the scenes under settings of rerank, counted."""

    def __init__(
        self, guard: GazeGuard, scenes: Sequence[DrawnScene], words: Vocabulary, batch_size: int, max_new_tokens: int
    ) -> None:
        self.guard, self.scenes, self.words = guard, scenes, words
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.layer: int | None = None
        self.stops = tokens_spelling(guard.processor.tokenizer, (".",)).tolist()

    def write(self, setting: Setting, stop_bonus: float = 0.0) -> list[str]:
        """Greedy captions of the scenes under rerank with these strengths, and with a bonus on full stops."""
        rerank = Rerank(**setting, layer=self.layer) if setting else None
        policy = Policy(version=1, name="measured", rerank=rerank)
        known = self.guard
        guard = GazeGuard(known.model, known.processor, policy, heads=known.heads, grid=known.tracer.grid)
        processors = [StopBonus(self.stops, stop_bonus, Rerank().plausible)] if stop_bonus else []
        captions: list[str] = []
        for start in range(0, len(self.scenes), self.batch_size):
            some = self.scenes[start : start + self.batch_size]
            inputs = encode(known.model, known.processor, [s.image for s in some], [s.prompt for s in some]).inputs
            options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
            options["logits_processor"] = processors
            _, reports = guard.generate_with_reports(**inputs, **options)
            captions += [report.caption for report in reports]
        return captions

    def count(self, captions: Sequence[str], first: int | None = None) -> Counts:
        """The counts of captions, or of their first mentions alone."""
        rows = []
        for scene, caption in zip(self.scenes, captions, strict=True):
            named = [noun for _, noun in self.words.named(caption)][:first]
            false = sum(noun not in scene.nouns for noun in named)
            rows.append((false, len(named), len(scene.nouns & set(named)), len(scene.nouns)))
        return np.array(rows, float)

    def frontier(self, setting: Setting, captions: Sequence[str]) -> list[Counts]:
        """What blind methods make of captions under a setting: their first mentions, and bonuses on full stops."""
        most = max(len(self.words.named(caption)) for caption in captions)
        bonuses = track(STOP_BONUSES, "blind bonuses on full stops")
        shortened = [self.count(self.write(setting, bonus)) for bonus in bonuses]
        return [self.count(captions, first) for first in range(1, most + 1)] + shortened


class Comparison(NamedTuple):
    """A setting against a frontier: CHAIR_i at equal recall, negative is better, and the change of recall against plain."""

    setting: Setting
    captions: list[str]
    difference: Estimate
    p_value: float
    recall_change: float

    @property
    def helps(self) -> bool:
        """Whether it is below the frontier, and keeps the recall."""
        return self.p_value <= LEVEL and self.recall_change >= -MAX_RECALL_LOSS


def recall_and_chair(counts: Counts, drawn: NDArray[np.int64]) -> tuple[float, float]:
    """Recall of nouns and CHAIR_i of captions, with each scene as often as it is ``drawn``."""
    false, mentions, named, nouns = drawn @ counts
    return named / max(nouns, 1e-12), false / max(mentions, 1e-12)


def chair_at_recall(curve: Sequence[tuple[float, float]], recall: float) -> float:
    """The least CHAIR_i of a curve of points (recall, CHAIR_i) at this recall or more.

    Means of two neighbouring points count as points; where none has so much recall, that of the point with the most is taken.
    """
    points = sorted(curve, reverse=True)
    best = np.minimum.accumulate([chair for _, chair in points])
    return float(np.interp(recall, [own for own, _ in reversed(points)], best[::-1]))


def _compare(study: _Study, setting: Setting, frontier: Sequence[Counts], plain: Counts) -> Comparison:
    captions = study.write(setting)
    counts = study.count(captions)

    def difference(drawn: NDArray[np.int64]) -> float:
        recall, chair = recall_and_chair(counts, drawn)
        return chair - chair_at_recall([recall_and_chair(each, drawn) for each in frontier], recall)

    resamples = draws(len(counts))
    values = np.array([difference(drawn) for drawn in resamples])
    change = recall_and_chair(counts, resamples[0])[0] - recall_and_chair(plain, resamples[0])[0]
    p_value = (1 + (values[1:] >= 0).sum()) / len(values)
    return Comparison(setting, captions, estimate(values), float(p_value), change)


def _choose(
    study: _Study, useful: Sequence[str], layer: int | None, captions: Sequence[str], figures: dict[str, float]
) -> RerankEvidence:
    """The strengths that beat the trivial frontier most: first those of the objects, then, over these, the bonus of ends."""
    study.layer = layer
    plain = study.count(captions)
    frontier = [plain, *study.frontier({}, captions)]
    compare: Callable[[Setting], Comparison] = lambda setting: _compare(study, setting, frontier, plain)  # noqa: E731
    settings = [{name: strength} for name in useful for strength in SINGLE[name]]
    tried = [compare(setting) for setting in track(settings, "trying rerank")]
    if len(useful) > 1 and (best := _best(tried)) is not None:
        others = [each for each in tried if not set(each.setting) & set(best.setting)]
        other = min(others, key=lambda each: each.difference.value)
        tried.append(compare({**best.setting, **other.setting}))
    best = _best(tried)
    recall, chair = recall_and_chair(plain, np.ones(len(plain), np.int64))
    figures |= {"plain_chair_i": chair, "plain_recall": recall, "scenes": len(plain)}
    if best is None:
        least = min(tried, key=lambda each: each.difference.value)
        reason = (
            f"on {len(plain)} drawn scenes no strength has surely fewer false objects, at equal recall, than captions that are "
            "cut or ended blindly"
        )
        return _evidence({}, layer, figures | _figures_of(least), reason)
    over_best = [study.count(best.captions), *study.frontier(best.setting, best.captions), *frontier]
    ended = _compare(study, {**best.setting, "end_bonus": END_BONUS}, over_best, plain)
    best = ended if ended.helps else best
    return _evidence(best.setting, layer, figures | _figures_of(best), "")


def _best(tried: Sequence[Comparison]) -> Comparison | None:
    return min((each for each in tried if each.helps), key=lambda each: each.difference.value, default=None)


def _figures_of(comparison: Comparison) -> dict[str, float]:
    """What decided about a setting: CHAIR_i less that of the frontier at equal recall, with its interval."""
    value, (low, high) = comparison.difference.value, given(comparison.difference.interval)
    names = ("against_frontier", "against_frontier_low", "against_frontier_high", "p_value", "recall_change")
    return dict(zip(names, (value, low, high, comparison.p_value, comparison.recall_change), strict=True))


def _evidence(setting: Setting, layer: int | None, figures: Mapping[str, float], reason: str) -> RerankEvidence:
    known = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
    strengths = {"attribution": 0.0, "attended_logprob": 0.0, "end_bonus": 0.0, **setting}
    return RerankEvidence(**strengths, layer=layer, usable=not reason, reason=reason, figures=known)
