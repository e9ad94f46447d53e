"""Do the policies make captions truer, at the same recall, and at what price? Every way of writing on the same pictures.

A *way of writing* has settings (a strength, a threshold). One setting is chosen on validation pictures, for all ways by one
rule: the least CHAIR_i, greedy and sampled captions together, among those that lose at most a point of recall against plain
in either. Test pictures are written with the chosen setting; greedily with the others, too, for the curves.

``{method}_{figure}_{greedy|sampled}{|_shifted}``: ``chair_i``, ``chair_s``, ``recall``, ``f1``, ``mentions`` and ``words`` per
caption; ``misplaced``, mentions of what is in the picture but not where it is said to be, which CHAIR lets pass, and ``wrong``,
these and the false ones. Against plain, on the same pictures: ``chair_i_reduction``, ``wrong_reduction`` and ``words_change``,
relative; ``recall_change``, in segment_mass; ``passes_ratio``, of rows that went through the decoder; ``time_ratio``, interleaved.
``{method}_over_{other}``: CHAIR_i less the other's at equal recall; below 0 is better. The other may take any setting, or a
mean of two, that keeps as much recall. ``drop_*_at_10``: when the tenth of things with the greatest risk is cut.
``yes_no_*``: POPE-form questions, greedily. With --quick: `QUICKLY` on test pictures, greedily, with their usual settings.

The captions are made by worker processes; times are taken when they are done.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from matplotlib import colormaps
from matplotlib.figure import Figure as Plot
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from evals.baselines import mitigation as peers
from evals.common import Figure, Out, Quick, figure, over_images, write
from evals.cost import ratios
from evals.counting import pope_figures
from gazeguard import lab
from gazeguard.claims.removal import without
from gazeguard.guard import GazeGuard
from gazeguard.lab.training.tiny_fit import TEXT_ONLY
from gazeguard.lab.truth import mentions
from gazeguard.lab.world import yes_no_question
from gazeguard.policy import Policy, load_policy
from gazeguard.report import Report
from gazeguard.vision.encoding import encode

SEED = 400  # of the pictures
PICTURES, TUNING, QUICK = 120, 48, 8  # of a test split; of the validation split; of a test split with --quick
NEW = 200  # tokens at most
ROWS = 25  # prompts in a batch
SAMPLED_SEEDS = 5
SLACK = 0.01  # of recall, that the choice of a setting may cost
QUESTIONS = 3  # per picture
PAIRS = 9  # of interleaved runs, for a time ratio
COVERAGES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4)
AT = 0.1  # the coverage that is a figure
WAYS = {"greedy": False, "sampled": True}
SPLITS = {"test": "", "shifted": "_shifted"}
OURS = ("rerank", "rewind", "rewind_verify", "rerank_rewind", "drop")
FIVE_SEEDS = ("plain", "truncated", "drop", "text_only_drop", "rerank", "rewind", "rerank_rewind")
QUICKLY = ("plain", "rerank", "rewind")
PLAIN_KEYS = {
    **dict.fromkeys(("rerank", "rewind"), ("chair_i_reduction", "recall_change", "time_ratio")),
    "rewind_verify": ("chair_i_reduction", "recall_change"),
    "drop": ("false_removed_at_10", "recall_change_at_10"),
    "text_only_drop": ("false_removed_at_10", "recall_change_at_10"),
}  # the figures that also go without an ending: lab test, greedy

Inputs = Mapping[str, Any]
Writer = Callable[[Inputs, bool], list[str]]  # a batch of prompts, and whether to sample -> captions
Counts = Mapping[str, NDArray[np.float64]]  # per picture

# --------------------------------------------------------------------------------------------------- ways of writing


@functools.cache
def lab_guard() -> GazeGuard:
    """A guard with policy ``mark`` over the lab's model; one per process."""
    return GazeGuard(*lab.load())


@functools.cache
def random_heads() -> GazeGuard:
    """A guard whose gaze heads are others of the same layers. It has no detector: `peers.random_guard` fits one."""
    known = lab_guard()
    heads = known.heads.with_heads(known.heads.matched(np.random.default_rng(SEED)))
    return GazeGuard(known.model, known.processor, heads=heads)


@functools.cache
def random_detector() -> GazeGuard:
    """The same with a detector fitted on what such heads see."""
    return peers.random_guard(lab_guard(), 100, 1)


def of_ids(decoder: Callable[..., Tensor], **settings: Any) -> Writer:
    """A writer from a function that takes and gives what ``model.generate`` does."""

    def write_ids(inputs: Inputs, do_sample: bool) -> list[str]:
        made = decoder(lab_guard().model, inputs, **settings, do_sample=do_sample, max_new_tokens=NEW)
        start = inputs["input_ids"].shape[1]
        return lab_guard().processor.tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)

    return write_ids


def generated(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Tensor:
    """Stock transformers."""
    return model.generate(**inputs, **options)


def of_policy(policy: Policy, base: Callable[[], GazeGuard] = lab_guard) -> Writer:
    """A writer that is a policy of the package, by the heads and the detector of a guard."""

    @functools.cache
    def guard() -> GazeGuard:
        known = base()
        return GazeGuard(known.model, known.processor, policy, heads=known.heads, detector=known.detector)

    def write_guarded(inputs: Inputs, do_sample: bool) -> list[str]:
        guard().generate(**inputs, do_sample=do_sample, max_new_tokens=NEW)
        return [report.filtered_caption for report in guard().reports]

    return write_guarded


def varied(name: str, section: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Policy]:
    """A policy of the package with other values of some keys of a section, by the name of the setting."""
    policy = load_policy(name)
    part = getattr(policy, section)
    return {own: policy.model_copy(update={section: part.model_copy(update=values)}) for own, values in settings.items()}


@functools.cache
def methods() -> dict[str, dict[str, Writer]]:
    """Every way of writing: its settings, the usual one first."""
    everything = lab_guard().heads.all_heads
    gaze, middle = lab_guard().heads.heads, peers.middle_heads(everything)
    moves = varied(
        "rerank",
        "rerank",
        {
            "usual": {},
            "strong": {"attended_logprob": 4.0},
            "attribution": {"attribution": 0.5},
            "ends": {"attended_logprob": 0.0},
        },
    )
    back = load_policy("rewind")
    asks = back.model_copy(update={"verify": load_policy("verify").verify})
    both = back.model_copy(update={"rerank": load_policy("rerank").rerank})
    return {
        "plain": {"": of_ids(generated)},
        "beam": {str(beams): of_ids(generated, num_beams=beams) for beams in (3,)},
        "vcd": {f"{alpha:g}": of_ids(peers.vcd, alpha=alpha) for alpha in (1.0, 0.5)},
        "pai": {f"{boost:g}": of_ids(peers.pai, heads=middle, boost=boost, alpha=boost / 5) for boost in (0.5, 0.25)},
        "blindfolded": {f"{alpha:g}": of_ids(peers.blindfolded, heads=gaze, alpha=alpha) for alpha in (0.5, 1.0)},
        "rerank": {name: of_policy(policy) for name, policy in moves.items()},
        "random_rerank": {name: of_policy(policy, random_heads) for name, policy in moves.items()},
        "rewind": {"f1": of_policy(back)},
        "rewind_verify": {"f1": of_policy(asks)},
        "rerank_rewind": {"f1": of_policy(both)},
        "random_rewind": {"f1": of_policy(back, random_detector)},
    }


@functools.cache
def cuts() -> dict[str, dict[str, Callable[[Report], str]]]:
    """What only cuts a plain caption: settings, and what is left of a plain report's."""

    def dropping(guard: GazeGuard) -> dict[str, Callable[[Report], str]]:
        policies = {"f1": load_policy("drop")}
        policies |= {f"{risk:g}": policies["f1"].model_copy(update={"threshold": risk}) for risk in (0.1, 0.5, 0.7, 0.9, 0.97)}
        guards = {
            value: GazeGuard(guard.model, guard.processor, policy, heads=guard.heads, detector=guard.detector)
            for value, policy in policies.items()
        }
        return {value: lambda report, own=own: own.judge(report.trace).filtered_caption for value, own in guards.items()}

    return {
        "truncated": {
            str(most): lambda r, most=most: peers.first_things(r.caption, most) for most in (8, 12, 10, 9, 7, 6, 5, 4)
        },
        "drop": dropping(lab_guard()),
        "text_only_drop": dropping(text_only()),
    }


@functools.cache
def text_only() -> GazeGuard:
    """A guard whose detector knows the words alone."""
    known = lab_guard()
    return GazeGuard(known.model, known.processor, heads=known.heads, detector=lab.checkpoint_path() / TEXT_ONLY)


# ------------------------------------------------------------------------------------------------------------ work


class Job(NamedTuple):
    """Captions of the first ``count`` pictures of a split, or answers to questions about them, by one writer."""

    method: str
    setting: str
    split: str
    count: int
    way: str
    seed: int = 0
    asked: bool = False


class Risks(NamedTuple):
    """Things of a caption: where, and how doubtful by the detector and by the one that knows the words alone."""

    start: int
    end: int
    drop: float
    text_only_drop: float


class Done(NamedTuple):
    """What became of a job.

    captions: one per picture (or answer)
    passes:   rows that went through the decoder
    cut:      of plain captions, what each cut leaves of them; risks: of each caption's things
    """

    captions: list[str]
    passes: int
    cut: dict[tuple[str, str], list[str]]
    risks: list[list[Risks]]


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Inside, the list grows by the number of rows of every pass of the text decoder."""
    rows: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(next(v for v in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if v is not None).shape[0])

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def asked_of(job: Job) -> list[tuple[lab.Sample, str]]:
    """The prompts of a job, each with its picture."""
    samples = lab.samples(job.split, job.count, SEED)
    if not job.asked:
        return [(sample, sample.prompt) for sample in samples]
    return [(sample, turn.prompt) for sample in samples for turn in questions(sample)]


def questions(sample: lab.Sample) -> list[Any]:
    """Different POPE-form questions on a picture."""
    rng = random.Random(sample.id)
    return [yes_no_question(sample.drawing, rng) for _ in range(QUESTIONS)]


@torch.no_grad()
def run(job: Job) -> Done:
    """Do a job; the same job gives the same captions in any process."""
    torch.set_num_threads(1)
    guard, writer = lab_guard(), methods()[job.method][job.setting]
    uses_answers = job.method == "plain" and not job.asked  # ids are the same, and reports can be cut
    captions: list[str] = []
    reports: list[Report] = []
    todo = asked_of(job)
    with counted(guard.model) as rows:
        for start in range(0, len(todo), ROWS):
            group = todo[start : start + ROWS]
            torch.manual_seed(1000 * job.seed + start)
            inputs = encode(guard.model, guard.processor, [s.image for s, _ in group], [prompt for _, prompt in group]).inputs
            if uses_answers:
                guard.generate(**inputs, do_sample=WAYS[job.way], max_new_tokens=NEW)
                reports += guard.reports
            else:
                captions += writer(inputs, WAYS[job.way])
    if not uses_answers:
        return Done(captions, sum(rows), {}, [])
    captions = [report.caption for report in reports]
    cut = {(name, value): list(map(left, reports)) for name, own in cuts().items() for value, left in own.items()}
    return Done(captions, sum(rows), cut, [risks(report) for report in reports])


def risks(report: Report) -> list[Risks]:
    """The things that a plain report is sure or not so sure of."""
    own, other = (
        {(f.claim.start, f.claim.end): f.risk for f in made.findings if f.claim.kind == "object"}
        for made in (report, text_only().judge(report.trace))
    )
    return [Risks(*span, risk, other[span]) for span, risk in own.items()]


# ---------------------------------------------------------------------------------------------------------- counting


def counts(samples: Sequence[lab.Sample], captions: Sequence[str]) -> Counts:
    """What CHAIR counts, per picture."""
    rows = []
    for sample, caption in zip(samples, captions, strict=True):
        named = mentions(sample.drawing, caption)
        false = sum(not mention.present for mention in named)
        misplaced = sum(mention.present and not mention.located for mention in named)
        kinds = {mention.phrase.head.text.lower() for mention in named}
        there = {thing.noun for thing in sample.drawing.objects}
        of_false = (false, misplaced, false + misplaced, len(named), false > 0)
        rows.append((*of_false, len(kinds & there), len(there), len(kinds), len(caption.split()), 1))
    names = ("false", "misplaced", "wrong", "mentions", "lies", "right", "there", "kinds", "words", "captions")
    return dict(zip(names, np.array(rows, float).T, strict=True))


def added(several: Sequence[Counts]) -> Counts:
    """The counts of several captions per picture."""
    return {name: np.sum([own[name] for own in several], axis=0) for name in several[0]}


PARTS = {
    "chair_i": ("false", "mentions"),
    "chair_s": ("lies", "captions"),
    "misplaced": ("misplaced", "mentions"),
    "wrong": ("wrong", "mentions"),
    "recall": ("right", "there"),
    "mentions": ("mentions", "captions"),
    "words": ("words", "captions"),
}


def share(of: Counts, name: str, drawn: NDArray[np.int64]) -> float:
    """A figure of captions, of pictures that are drawn so often."""
    top, bottom = PARTS[name]
    return float((of[top] @ drawn) / max(1e-12, of[bottom] @ drawn))


def f1(of: Counts, drawn: NDArray[np.int64]) -> float:
    """Of kinds of things: harmonic mean of precision and recall."""
    return float(2 * (of["right"] @ drawn) / max(1e-12, (of["kinds"] + of["there"]) @ drawn))


def measured(own: Counts) -> dict[str, Figure]:
    """The figures of captions by themselves."""
    count = len(own["captions"])
    found = {name: over_images(count, functools.partial(share, own, name)) for name in PARTS}
    return found | {"f1": over_images(count, functools.partial(f1, own))}


def compared(own: Counts, plain: Counts) -> dict[str, Figure]:
    """What captions are against plain ones of the same pictures."""
    count = len(own["captions"])

    def relative(name: str, drawn: NDArray[np.int64]) -> float:
        return share(own, name, drawn) / max(1e-12, share(plain, name, drawn)) - 1

    return {
        "chair_i_reduction": over_images(count, lambda drawn: -relative("chair_i", drawn)),
        "wrong_reduction": over_images(count, lambda drawn: -relative("wrong", drawn)),
        "words_change": over_images(count, functools.partial(relative, "words")),
        "recall_change": over_images(count, lambda drawn: share(own, "recall", drawn) - share(plain, "recall", drawn)),
    }


def at_recall(curve: Sequence[tuple[float, float]], recall: float) -> float:
    """The least CHAIR_i that points (recall, CHAIR_i), or means of two neighbours, have at so much recall or more; where none
    has so much, that of the point with the most.
    """
    points = sorted(curve, reverse=True)
    best = np.minimum.accumulate([chair for _, chair in points])
    return float(np.interp(recall, [own for own, _ in reversed(points)], best[::-1]))


def over(own: Counts, curve: Sequence[Counts]) -> Figure:
    """CHAIR_i of captions less that of a curve at equal recall."""

    def gap(drawn: NDArray[np.int64]) -> float:
        points = [(share(each, "recall", drawn), share(each, "chair_i", drawn)) for each in curve]
        return share(own, "chair_i", drawn) - at_recall(points, share(own, "recall", drawn))

    return over_images(len(own["captions"]), gap)


def chosen(made: Mapping[str, Mapping[str, Counts]], plain: Mapping[str, Counts]) -> str:
    """The setting with the least CHAIR_i over all ways that costs at most `SLACK` of recall in each; where all cost more, the
    one that costs least. made: setting -> way -> counts.
    """

    def all_of(of: Counts, name: str) -> float:
        return share(of, name, np.ones(len(of["captions"]), np.int64))

    lost = {s: max(all_of(plain[w], "recall") - all_of(c, "recall") for w, c in own.items()) for s, own in made.items()}
    chair = {s: float(np.mean([all_of(c, "chair_i") for c in own.values()])) for s, own in made.items()}
    fit = [setting for setting in made if lost[setting] <= SLACK]
    return min(fit, key=chair.__getitem__) if fit else min(made, key=lost.__getitem__)


def least_doubtful(captions: Sequence[str], risks: Sequence[Sequence[Risks]], by: str, coverage: float) -> list[str]:
    """Captions without that share of all their things which is most doubtful by one of the detectors."""
    order = sorted(((getattr(r, by), i, r.start, r.end) for i, own in enumerate(risks) for r in own), reverse=True)
    spans: list[list[tuple[int, int]]] = [[] for _ in captions]
    for _, i, start, end in order[: round(coverage * len(order))]:
        spans[i].append((start, end))
    return [without(caption, own) if own else caption for caption, own in zip(captions, spans, strict=True)]


def covered(samples: Sequence[lab.Sample], done: Done) -> tuple[dict[str, Figure], dict[str, list[list[float]]]]:
    """What cutting the most doubtful things takes away: at `AT` as figures, and for all of `COVERAGES` as curves of coverage,
    share of the false mentions that is gone, and change of recall.
    """
    plain, count, found, curves = counts(samples, done.captions), len(samples), {}, {}
    one, gone = np.ones(count, np.int64), {}

    def removed(of: Counts, name: str, drawn: NDArray[np.int64]) -> float:
        return float(1 - (of[name] @ drawn) / max(1e-12, plain[name] @ drawn))

    def lost(of: Counts, drawn: NDArray[np.int64]) -> float:
        return share(of, "recall", drawn) - share(plain, "recall", drawn)

    for by in ("drop", "text_only_drop"):
        left = {c: counts(samples, least_doubtful(done.captions, done.risks, by, c)) for c in COVERAGES}
        curves[by] = [[c, removed(own, "false", one), lost(own, one)] for c, own in left.items()]
        found[f"{by}_false_removed_at_10"] = over_images(count, functools.partial(removed, left[AT], "false"))
        found[f"{by}_mentions_removed_at_10"] = over_images(count, functools.partial(removed, left[AT], "mentions"))
        found[f"{by}_recall_change_at_10"] = over_images(count, functools.partial(lost, left[AT]))
        gone[by] = left

    def ahead(drawn: NDArray[np.int64]) -> float:
        own, other = ([removed(left, "false", drawn) for left in gone[by].values()] for by in ("drop", "text_only_drop"))
        return float(np.subtract(own, other).min())

    found["drop_ahead_of_text_only_drop"] = over_images(count, ahead)  # at the coverage where it is least
    return found, curves


def answered(done: Done, plain: Done, samples: Sequence[lab.Sample]) -> dict[str, Figure]:
    """Figures of yes/no answers, and the share that is another one than plain's."""
    labels = ["yes" if turn.answer.startswith("Yes") else "no" for sample in samples for turn in questions(sample)]
    images = [sample.id for sample in samples for _ in range(QUESTIONS)]
    own, before = ([answer.strip(" .").lower() for answer in each.captions] for each in (done, plain))
    made = pope_figures(labels, own, images)
    changed = np.array([a != b for a, b in zip(own, before, strict=True)], float).reshape(-1, QUESTIONS).mean(1)
    return {
        **{f"yes_no_{key}": made[key] for key in ("accuracy", "mcc", "yes_rate")},
        "yes_no_changed": over_images(len(changed), lambda drawn: float(np.average(changed, weights=drawn))),
    }


# -------------------------------------------------------------------------------------------------------- all together

Table = dict[tuple[str, str, str, str], list[Counts]]  # method, setting, split, way -> one per seed


def tabulated(done: Mapping[Job, Done]) -> Table:
    """The counts of all captions that were written, and of those that only had to be cut."""
    table: Table = {}
    for job, made in done.items():
        if job.asked:
            continue
        samples = lab.samples(job.split, job.count, SEED)
        for (method, setting), captions in {(job.method, job.setting): made.captions, **made.cut}.items():
            table.setdefault((method, setting, job.split, job.way), []).append(counts(samples, captions))
    return table


def ways_of(method: str) -> list[str]:
    """A beam search is no sampling."""
    return ["greedy"] if method == "beam" else list(WAYS)


def settings_of(table: Table, method: str, split: str, way: str) -> dict[str, list[Counts]]:
    return {key[1]: made for key, made in table.items() if (key[0], *key[2:]) == (method, split, way)}


def choose(table: Table) -> dict[str, str]:
    """Of every method the setting that is best on validation pictures."""
    plain = {way: table["plain", "", "validation", way][0] for way in WAYS}
    found = {}
    for method in dict.fromkeys(key[0] for key in table):
        made: dict[str, dict[str, Counts]] = {}
        for way in ways_of(method):
            for setting, (own, *_) in settings_of(table, method, "validation", way).items():
                made.setdefault(setting, {})[way] = own
        found[method] = chosen(made, plain)
    return found


def figures_of(done: Mapping[Job, Done], table: Table, choice: Mapping[str, str], split: str, way: str) -> dict[str, Figure]:
    """All figures of one split and way of writing, without their endings; ``table`` is that of what is ``done``."""
    found: dict[str, Figure] = {}
    curves = {method: settings_of(table, method, split, way) for method in choice}
    plain = curves["plain"][""]
    passes: dict[tuple[str, str], list[int]] = {}
    for job, made in done.items():
        if (job.split, job.way, job.asked) == (split, way, False):
            passes.setdefault((job.method, job.setting), []).append(made.passes)
    for method, setting in choice.items():
        if setting not in curves[method]:
            continue
        own = curves[method][setting]
        found |= {f"{method}_{key}": made for key, made in measured(added(own)).items()}
        if method == "plain":
            continue
        against = compared(added(own), added(plain[: len(own)]))
        found |= {f"{method}_{key}": made for key, made in against.items()}
        if spent := passes.get((method, setting)):
            found[f"{method}_passes_ratio"] = figure(sum(spent) / sum(passes["plain", ""][: len(own)]))
        for other, settings in curves.items():
            if other not in ("plain", method) and (method in OURS or other == "truncated") and settings:
                seeds = min(len(own), *map(len, settings.values()))
                curve = [added(each[:seeds]) for each in (plain, *settings.values())]
                found[f"{method}_over_{other}"] = over(added(own[:seeds]), curve)
    return found


def timed(choice: Mapping[str, str], ways: Sequence[str], pairs: int) -> dict[str, Figure]:
    """The price of every method, with its chosen setting, for a batch of eight."""
    guard = lab_guard()
    samples = lab.samples("test", 8, SEED)
    inputs = encode(guard.model, guard.processor, [s.image for s in samples], [s.prompt for s in samples]).inputs
    writers = {method: methods()[method][setting] for method, setting in choice.items() if method in methods()}
    writers["drop"] = of_policy(load_policy("drop"))
    found = {}
    for method, writer in writers.items():
        for way in set(ways_of(method)) & set(ways):
            torch.manual_seed(SEED)
            plain, own = (functools.partial(each, inputs, WAYS[way]) for each in (writers["plain"], writer))
            own()
            found[f"{method}_time_ratio_{way}"] = ratios(plain, own, pairs)
    return found


def plain_names(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """The figures of `PLAIN_KEYS` under their names without an ending."""
    found = {f"{name}_{key}": figures.get(f"{name}_{key}_greedy") for name, keys in PLAIN_KEYS.items() for key in keys}
    return {name: made for name, made in found.items() if made is not None}


def drawn(path: Path, curves: Mapping[str, Any], coverage: Mapping[str, Any], choice: Mapping[str, str]) -> None:
    """CHAIR_i against recall for all methods and settings, and what cutting takes away; one row per split."""
    plot = Plot(figsize=(11, 8.5), layout="constrained")
    for (split, methods_), row in zip(curves.items(), plot.subplots(len(curves), 2, squeeze=False), strict=True):
        row[0].set_prop_cycle(color=colormaps["tab20"].colors)  # more methods than the usual ten colours
        for method, points in methods_.items():
            some = sorted(points.values())
            (line,) = row[0].plot(*zip(*some, strict=True), "o-", markersize=3, linewidth=1, label=method.replace("_", " "))
            if choice[method] in points:
                row[0].plot(*points[choice[method]], "o", markersize=8, color=line.get_color(), markerfacecolor="none")
        row[0].set(xlabel="recall", ylabel="CHAIR_i", title=f"{split}, greedy (ring: setting chosen on validation)")
        row[0].legend(fontsize=7)
        for by, points in coverage[split].items():
            share_cut, gone, _ = zip(*points, strict=True)
            row[1].plot([0, *share_cut], [0, *gone], "o-", markersize=3, label=by.replace("_", " "))
        row[1].set(xlabel="share of things cut", ylabel="share of false mentions gone", title=f"{split}, greedy", ylim=(0, 1))
        row[1].legend()
    plot.savefig(path, dpi=110, metadata={"Software": None})


def done_by(jobs: Sequence[Job], workers: int, what: str) -> dict[Job, Done]:
    """All jobs, in several processes."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        made = pool.map(run, jobs)
        return dict(zip(jobs, track(made, what, total=len(jobs), console=Console(stderr=True), transient=True), strict=True))


def main(
    out: Out,
    quick: Quick = False,
    only: Annotated[str, typer.Option("--methods", help="Names, with commas; by default all.")] = "",
    workers: Annotated[int, typer.Option(help="Processes that write captions.")] = 2,
    times: Annotated[bool, typer.Option("--times", help="Only the time ratios anew, others as the file has them.")] = False,
) -> None:
    """Measure every way of writing, and draw the curves beside the JSON file."""
    if times:
        told = json.loads(out.read_text(encoding="utf-8"))
        meta = {key: told["meta"][key] for key in ("quick", "seed", "chosen", "curves", "coverage")}
        found = told["figures"] | timed(meta["chosen"], list(WAYS), 1 if quick else PAIRS)
        write(out, found | plain_names(found), ids=told["meta"]["image_ids"], **meta)
        return
    known = methods()
    if strange := set(only.split(",")) - {"", *known}:
        raise typer.BadParameter(f"There is no method {sorted(strange)[0]!r}. Known: {', '.join(known)}.")
    wanted = only.split(",") if only else QUICKLY if quick else known
    names = [name for name in known if name == "plain" or name in wanted]
    count = QUICK if quick else PICTURES
    ways = ["greedy"] if quick else list(WAYS)
    splits = {"test": ""} if quick else SPLITS
    if quick:
        choice = {name: next(iter(settings)) for name, settings in (known | cuts()).items() if name in (*names, *cuts())}
    else:
        grid = [Job(n, s, "validation", TUNING, way) for n in names for s in known[n] for way in ways_of(n)]
        choice = choose(tabulated(done_by(grid, workers, "choosing settings")))
    jobs = [
        Job(name, setting, split, count, way, seed)
        for split in splits
        for name in names
        for way in ways_of(name)
        if way in ways
        for setting in known[name]
        if setting == choice[name] or (way == "greedy" and not quick)
        for seed in range(SAMPLED_SEEDS if way == "sampled" and name in FIVE_SEEDS else 1)
    ]
    jobs += [Job(name, choice[name], "test", count, "greedy", asked=True) for name in names]
    done = done_by(jobs, workers, "writing captions")
    table = tabulated(done)
    figures: dict[str, Figure] = {}
    curves: dict[str, Any] = {}
    coverage: dict[str, Any] = {}
    for split, ending in splits.items():
        samples = lab.samples(split, count, SEED)
        for way in ways:
            cut, lines = covered(samples, done[Job("plain", "", split, count, way)])
            found = figures_of(done, table, choice, split, way) | cut
            figures |= {f"{key}_{way}{ending}": made for key, made in found.items()}
            if way == "greedy":
                coverage[split] = lines
        one = np.ones(count, np.int64)
        curves[split] = {
            name: {
                setting: [share(own, "recall", one), share(own, "chair_i", one)]
                for setting, (own, *_) in settings_of(table, name, split, "greedy").items()
            }
            for name in choice
        }
    samples = lab.samples("test", count, SEED)
    for name in names:
        own, plain = (done[Job(each, choice[each], "test", count, "greedy", asked=True)] for each in (name, "plain"))
        figures |= {f"{name}_{key}": made for key, made in answered(own, plain, samples).items()}
    figures |= timed({name: choice[name] for name in names}, ways, 1 if quick else PAIRS)
    figures |= plain_names(figures)
    ids = [sample.id for split in splits for sample in lab.samples(split, count, SEED)]
    drawn(out.with_suffix(".png"), curves, coverage, choice)
    write(out, figures, quick, ids, seed=SEED, chosen=choice, curves=curves, coverage=coverage)


if __name__ == "__main__":
    typer.run(main)
