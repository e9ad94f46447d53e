"""Decoding methods that `evals.mitigation` compares, each with its settings, and methods that only cut a plain caption."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from evals.baselines import mitigation as baselines
from evals.guards import lab_guard, random_detector_guard, random_heads_guard, text_only_guard
from gazeguard.guard import GazeGuard
from gazeguard.policy import Policy, load_policy
from gazeguard.report import Report

MAX_NEW_TOKENS = 200
DROP_THRESHOLDS = (0.1, 0.5, 0.7, 0.9, 0.97)
OBJECT_COUNTS = (8, 12, 10, 9, 7, 6, 5, 4)  # after which a caption is truncated

Inputs = Mapping[str, Any]
Writer = Callable[[Inputs, bool], list[str]]  # a batch of prompts, and whether to sample -> captions
Cutter = Callable[[Report], str]  # the report of a plain caption -> what is left of the caption


def of_decoder(decoder: Callable[..., Tensor], **settings: Any) -> Writer:
    """A writer from a function with the arguments and the result of ``model.generate``."""

    def write(inputs: Inputs, do_sample: bool) -> list[str]:
        output = decoder(lab_guard().model, inputs, **settings, do_sample=do_sample, max_new_tokens=MAX_NEW_TOKENS)
        start = inputs["input_ids"].shape[1]
        return lab_guard().processor.tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)

    return write


def generate(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Tensor:
    """Stock transformers."""
    return model.generate(**inputs, **options)


def of_policy(policy: Policy, base: Callable[[], GazeGuard] = lab_guard) -> Writer:
    """A writer from a policy of the package, with the heads and the detector of a guard."""

    @functools.cache
    def guard() -> GazeGuard:
        known = base()
        return GazeGuard(known.model, known.processor, policy, heads=known.heads, detector=known.detector)

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
def methods() -> dict[str, dict[str, Writer]]:
    """Every decoding method: its settings, the default one first."""
    every_head = lab_guard().heads.all_heads
    gaze, middle = lab_guard().heads.heads, baselines.middle_heads(every_head)
    rerank = {
        "usual": {},
        "strong": {"attended_logprob": 4.0},
        "attribution": {"attribution": 0.5},
        "ends": {"attended_logprob": 0.0},
    }
    reranks = vary("rerank", "rerank", rerank)
    rewind = load_policy("rewind")
    rewind_verify = rewind.model_copy(update={"verify": load_policy("verify").verify})
    rerank_rewind = rewind.model_copy(update={"rerank": load_policy("rerank").rerank})
    return {
        "plain": {"": of_decoder(generate)},
        "beam": {str(beams): of_decoder(generate, num_beams=beams) for beams in (3,)},
        "vcd": {f"{alpha:g}": of_decoder(baselines.vcd, alpha=alpha) for alpha in (1.0, 0.5)},
        "pai": {f"{boost:g}": of_decoder(baselines.pai, heads=middle, boost=boost, alpha=boost / 5) for boost in (0.5, 0.25)},
        "image_ablated": {f"{alpha:g}": of_decoder(baselines.image_ablated, heads=gaze, alpha=alpha) for alpha in (0.5, 1.0)},
        "rerank": {name: of_policy(policy) for name, policy in reranks.items()},
        "random_rerank": {name: of_policy(policy, random_heads_guard) for name, policy in reranks.items()},
        "rewind": {"f1": of_policy(rewind)},
        "rewind_verify": {"f1": of_policy(rewind_verify)},
        "rerank_rewind": {"f1": of_policy(rerank_rewind)},
        "random_rewind": {"f1": of_policy(rewind, random_detector_guard)},
    }


@functools.cache
def cutters() -> dict[str, dict[str, Cutter]]:
    """The methods that only cut a plain caption: settings, the default one first."""

    def dropping(guard: GazeGuard) -> dict[str, Cutter]:
        policies = {"f1": load_policy("drop")}
        policies |= {f"{risk:g}": policies["f1"].model_copy(update={"threshold": risk}) for risk in DROP_THRESHOLDS}
        guards = {
            setting: GazeGuard(guard.model, guard.processor, policy, heads=guard.heads, detector=guard.detector)
            for setting, policy in policies.items()
        }
        return {
            setting: lambda report, each=each: each.judge(report.trace).filtered_caption for setting, each in guards.items()
        }

    return {
        "truncated": {
            str(most): lambda report, most=most: baselines.first_objects(report.caption, most) for most in OBJECT_COUNTS
        },
        "drop": dropping(lab_guard()),
        "text_only_drop": dropping(text_only_guard()),
    }
