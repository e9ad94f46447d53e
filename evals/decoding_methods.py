"""Decoding methods that `evals.mitigation` compares, each with its settings, and methods that only cut a plain caption."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from evals.baselines import mitigation as baselines
from evals.guards import Setup, lab_guard, random_detector_guard, random_heads_guard, text_only_guard
from evals.subject import Chosen
from gazeguard.decoding.call import end_tokens
from gazeguard.decoding.rerank import tokens_spelling
from gazeguard.errors import GazeGuardError
from gazeguard.guard import GazeGuard
from gazeguard.policy import Policy, load_policy
from gazeguard.report import Report

MAX_NEW_TOKENS = 200
DROP_THRESHOLDS = (0.1, 0.5, 0.7, 0.9, 0.97)
OBJECT_COUNTS = (8, 12, 10, 9, 7, 6, 5, 4, 3, 2)  # after which a caption is truncated
STOP_BONUSES = (1.0, 0.5, 2.0, 4.0)
# Without the image or the gaze heads: a policy is worth something where it lies under what these reach.
TRIVIAL = ("plain", "stop_bonus", "truncated", "text_only_drop", "random_drop", "random_rerank", "random_rewind")
POLICIES = ("rerank", "rewind", "rewind_verify", "rerank_rewind", "drop")

Inputs = Mapping[str, Any]
Writer = Callable[[Inputs, bool], list[str]]  # a batch of prompts, and whether to sample -> captions
Cutter = Callable[[Report], str]  # the report of a plain caption -> what is left of the caption


def of_decoder(chosen: Chosen, decoder: Callable[..., Tensor], **settings: Any) -> Writer:
    """A writer from a function with the arguments and the result of ``model.generate``."""

    def write(inputs: Inputs, do_sample: bool) -> list[str]:
        guard = lab_guard(chosen)
        output = decoder(guard.model, inputs, **settings, do_sample=do_sample, max_new_tokens=MAX_NEW_TOKENS)
        return guard.processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return write


def generate(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Tensor:
    """Stock transformers."""
    return model.generate(**inputs, **options)


def under(policy: Policy, known: GazeGuard) -> GazeGuard:
    """A guard with another policy and the same heads and detector."""
    return GazeGuard(known.model, known.processor, policy, heads=known.heads, detector=known.detector)


def of_policy(policy: Policy, base: Callable[[], GazeGuard]) -> Writer:
    """A writer from a policy of the package, with the heads and the detector of a guard."""
    guard = functools.cache(lambda: under(policy, base()))

    def write(inputs: Inputs, do_sample: bool) -> list[str]:
        guard().generate(**inputs, do_sample=do_sample, max_new_tokens=MAX_NEW_TOKENS)
        return [report.filtered_caption for report in guard().reports]

    return write


def vary(name: str, section: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Policy]:
    """A policy of the package with other values of some keys of a section, by the name of the setting."""
    policy = load_policy(name)
    part = getattr(policy, section)
    return {
        setting: policy.model_copy(update={section: part.model_copy(update=values)}) for setting, values in settings.items()
    }


@functools.cache
def policies() -> dict[str, dict[str, Policy]]:
    """The policies that decode, by method and setting, the default one first."""
    rewind, rerank = load_policy("rewind"), load_policy("rerank").rerank
    settings = {
        "usual": {},
        "strong": {"attended_logprob": 4.0},
        "attribution": {"attribution": 0.5},
        "ends": {"end_bonus": 2.0},
    }
    return {
        "rerank": vary("rerank", "rerank", settings),
        "rewind": {"f1": rewind},
        "rewind_verify": {"f1": rewind.model_copy(update={"verify": load_policy("verify").verify})},
        "rerank_rewind": {"f1": rewind.model_copy(update={"rerank": rerank})},
    }


def refused(setup: Setup) -> dict[str, str]:
    """The policies that the subject's guard refuses, each with the reason."""
    found = {}
    for method, (policy, *_) in ((method, list(settings.values())) for method, settings in policies().items()):
        try:
            under(policy, lab_guard(setup.chosen))
        except GazeGuardError as error:
            found[method] = str(error)
    return found


@functools.cache
def methods(setup: Setup = Setup()) -> dict[str, dict[str, Writer]]:  # noqa: B008 (a value)
    """Every decoding method: its settings, the default one first."""
    chosen, known = setup.chosen, lab_guard(setup.chosen)
    gaze, middle = known.heads.heads, baselines.middle_heads(known.heads.all_heads)
    stops = [*tokens_spelling(known.processor.tokenizer, (".",)).tolist(), *end_tokens(known.model.generation_config)]
    decoder = functools.partial(of_decoder, chosen)

    def own(method: str, base: Callable[[], GazeGuard]) -> dict[str, Writer]:
        return {name: of_policy(policy, base) for name, policy in policies()[method].items()}

    subject_guard = functools.partial(lab_guard, chosen)
    return {
        "plain": {"": decoder(generate)},
        "beam": {str(beams): decoder(generate, num_beams=beams) for beams in (3,)},
        "vcd": {f"{alpha:g}": decoder(baselines.vcd, alpha=alpha) for alpha in (1.0, 0.5)},
        "pai": {f"{boost:g}": decoder(baselines.pai, heads=middle, boost=boost, alpha=boost / 5) for boost in (0.5, 0.25)},
        "image_ablated": {f"{alpha:g}": decoder(baselines.image_ablated, heads=gaze, alpha=alpha) for alpha in (0.5, 1.0)},
        "stop_bonus": {f"{bonus:g}": decoder(baselines.stop_bonus, stops=stops, bonus=bonus) for bonus in STOP_BONUSES},
        **{method: own(method, subject_guard) for method in policies()},
        "random_rerank": {
            name: writer
            for name, writer in own("rerank", functools.partial(random_heads_guard, setup)).items()
            if name in ("strong", "ends")  # nothing is measured for random heads
        },
        "random_rewind": own("rewind", functools.partial(random_detector_guard, setup)),
    }


def _dropping(guard: GazeGuard) -> dict[str, GazeGuard]:
    """Guards that drop, by the threshold from which they do."""
    usual = load_policy("drop")
    rules = {"f1": usual} | {f"{risk:g}": usual.model_copy(update={"threshold": risk}) for risk in DROP_THRESHOLDS}
    return {setting: under(policy, guard) for setting, policy in rules.items()}


@functools.cache
def cutters(setup: Setup = Setup()) -> dict[str, dict[str, Cutter]]:  # noqa: B008
    """The methods that only cut a plain caption: settings, the default one first.

    Without controls of its own a subject other than the tiny lab has no text-only detector.
    """

    def dropping(guard: GazeGuard) -> dict[str, Cutter]:
        guards = _dropping(guard)
        return {name: lambda report, each=each: each.judge(report.trace).filtered_caption for name, each in guards.items()}

    found = {
        "truncated": {
            str(most): lambda report, most=most: baselines.first_objects(report.caption, most) for most in OBJECT_COUNTS
        },
        "drop": dropping(lab_guard(setup.chosen)),
    }
    if setup.controls or setup.chosen == Chosen():
        found["text_only_drop"] = dropping(text_only_guard(setup))
    return found


def random_drops(setup: Setup, trace_of: Callable[[GazeGuard], Sequence[Report]]) -> dict[tuple[str, str], list[str]]:
    """What random heads and their detector leave of captions, by ("random_drop", threshold); nothing without controls.

    trace_of: a guard -> reports of the captions, replayed by its heads
    """
    if not setup.controls:
        return {}
    reports = trace_of(random_detector_guard(setup))
    guards = _dropping(random_detector_guard(setup))
    return {
        ("random_drop", name): [each.judge(report.trace).filtered_caption for report in reports]
        for name, each in guards.items()
    }
