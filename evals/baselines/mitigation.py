"""How do the peers write? Their decoders on stock transformers, each a function from a batch of prompts to written ids.

The functions take and give what ``model.generate`` does; ``options`` go to it (``max_new_tokens``, ``do_sample``, ...). KeyLayout
may be padded on the left. Nothing of a model's code is replaced: a second branch is a `LogitsProcessor`, and attention is
turned through `gazeguard.recorder.AttentionRecorder.steer`.

Greedy, beam search and sampling are ``model.generate`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from evals.detection import without
from gazeguard import _compat
from gazeguard.attention.backbone import Head
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.visual_keys import visual_keys
from gazeguard.claims.parse import claims, things
from gazeguard.detection.detector import Detector
from gazeguard.guard import GazeGuard
from gazeguard.lab.training.tiny_fit import caption_and_label
from gazeguard.policy import Policy
from gazeguard.vision.image_tokens import image_token_id

Inputs = Mapping[str, Any]
PLAUSIBLE = 0.1  # VCD's and PAI's beta
STEPS = 1000  # of VCD's diffusion
NOISED = 500  # of them, by default
BLIND = -30.0  # logits; no more than exp(-30) of a head's look is left on the picture

# --------------------------------------------------------------------------------------------------- two branches


def contrast(logits: Tensor, other: Tensor, alpha: float, beta: float = PLAUSIBLE) -> Tensor:
    """``(1 + alpha) logits - alpha other`` for plausible words, -inf for the rest; both (..., vocabulary).

    beta: the least share of the likeliest word's probability, by ``logits`` alone, that makes a word plausible; 0 cuts none
    (VCD: Leng et al. 2024, arXiv 2311.16922, equations 3 and 6. Classifier-free guidance, which PAI takes over, is the same
    with alpha = gamma - 1: Sanchez et al. 2023, arXiv 2306.17806.)
    """
    made = (1 + alpha) * logits - alpha * other
    if not beta:
        return made
    return made.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(beta), -torch.inf)


class Branch:
    """What the model would say after another prompt and the same written words.

    prompt: what its forward takes; the ids must be as many as the first branch's, each at one position (no M-RoPE)
    first:  called before the branch's first pass

    The branch has a cache of its own. In VCD's published code both branches wrote into one (VCD#7, VCD#13, and the forks that
    took it over): the words of the noised picture became keys of the clean one.
    """

    def __init__(self, model: PreTrainedModel, prompt: Inputs, first: Callable[[], None] | None = None) -> None:
        self.model, self.prompt, self.first = model, prompt, first
        self.mask, self.cache = prompt["attention_mask"], DynamicCache(config=model.config.get_text_config(decoder=True))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """The logits (batch, vocabulary) of the word after ``ids`` (batch, length); one word more at each call."""
        if len(ids) != len(self.mask):
            raise ValueError(f"{len(ids)} rows are written to {len(self.mask)} prompts. A second branch follows no beams.")
        if ids.shape[1] == self.mask.shape[1]:
            if self.first is not None:
                self.first()
            given = dict(self.prompt)
        else:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(ids), 1)), dim=1)
            given = {"input_ids": ids[:, -1:], "attention_mask": self.mask}
        given[_compat.cache_argument_name()] = self.cache
        at = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -given["input_ids"].shape[1] :]
        made = self.model(**given, position_ids=at, use_cache=True, logits_to_keep=1)
        return made.logits[:, -1].float()


class Contrast(LogitsProcessor):
    """`contrast` with a second branch: one more forward pass per word."""

    def __init__(self, branch: Branch, alpha: float, beta: float = PLAUSIBLE) -> None:
        self.branch, self.alpha, self.beta = branch, alpha, beta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (batch, vocabulary) logits of the word after ``input_ids`` (batch, length)."""
        return contrast(scores, self.branch(input_ids), self.alpha, self.beta)


def _contrasted(model: PreTrainedModel, inputs: Inputs, branch: Branch, alpha: float, beta: float, options: Any) -> Tensor:
    return model.generate(**inputs, **options, logits_processor=LogitsProcessorList([Contrast(branch, alpha, beta)]))


# ------------------------------------------------------------------------------------------------------------ VCD


def noised(pixels: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Pictures (batch, ...) after ``steps`` of VCD's forward diffusion, each with the same noise; 0 leaves them alone.

    ``sqrt(a) x + sqrt(1 - a) noise``, with ``a`` the product of ``1 - b`` over the steps and ``b`` from 1e-5 to 5e-3 along a
    sigmoid from -6 to 6 (Leng et al. 2024, arXiv 2311.16922, equation 2, and their schedule).
    """
    if not steps:
        return pixels
    betas = torch.linspace(-6, 6, STEPS).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - betas)[:steps].prod())
    noise = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(seed)).to(pixels)
    return math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise


def vcd(
    model: PreTrainedModel,
    inputs: Inputs,
    alpha: float = 1.0,
    beta: float = PLAUSIBLE,
    steps: int = NOISED,
    **options: Any,
) -> Tensor:
    """Visual contrastive decoding: contrast with the same prompt under a noised picture (Leng et al. 2024)."""
    other = {**inputs, "pixel_values": noised(inputs["pixel_values"], steps)}
    return _contrasted(model, inputs, Branch(model, other), alpha, beta, options)


# ------------------------------------------------------------------------------------------------------ attention


def middle_heads(heads: Sequence[Head]) -> list[Head]:
    """Of all heads, those of the layers but the first and the last: PAI leaves out the ones before the picture is read."""
    layers = sorted({layer for layer, _ in heads})
    return [head for head in heads if head[0] in layers[1:-1]]


def turned(recorder: AttentionRecorder, inputs: Inputs, bias: float) -> None:
    """A recorder that uses_answers from now on, and adds ``bias`` to its heads' scores of all image cells, wherever words are written."""
    prompts = KeyLayout.from_ids(*visual_keys(recorder.model, inputs, inputs["input_ids"], inputs["attention_mask"]))
    recorder.begin(prompts)
    if bias:
        recorder.steer(
            torch.full((len(prompts.valid), len(recorder.heads), prompts.valid.shape[1]), bias, device=recorder.model.device)
        )


def without_picture(model: PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
    """The prompt with its image cells closed to every word and no place taken by them: words alone."""
    ids = inputs["input_ids"]
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"] * (ids != image_token_id(model))}


def pai(
    model: PreTrainedModel,
    inputs: Inputs,
    heads: Sequence[Head],
    boost: float = 0.5,
    alpha: float = 0.1,
    beta: float = PLAUSIBLE,
    **options: Any,
) -> Tensor:
    """PAI-style: image keys weigh more for the query that writes, and the prompt without its picture is contrasted.

    heads: all of the middle layers. Liu et al. 2024 (arXiv 2407.21771) add ``boost`` times a score's absolute value to it; here
    ``boost`` itself is added, which does not depend on where a head's scores have their zero.
    """
    with AttentionRecorder(model, heads) as recorder:
        turned(recorder, inputs, boost)
        return _contrasted(model, inputs, Branch(model, without_picture(model, inputs)), alpha, beta, options)


def blindfolded(
    model: PreTrainedModel,
    inputs: Inputs,
    heads: Sequence[Head],
    alpha: float = 1.0,
    beta: float = PLAUSIBLE,
    bias: float = BLIND,
    **options: Any,
) -> Tensor:
    """Contrast with a branch whose gaze heads are kept off the picture while words are written."""
    with ExitStack() as stack:
        # Entered when the first branch has read its prompt, the recorder hears the second alone: it follows one cache.
        branch = Branch(model, inputs, lambda: turned(stack.enter_context(AttentionRecorder(model, heads)), inputs, bias))
        return _contrasted(model, inputs, branch, alpha, beta, options)


# ----------------------------------------------------------------------------------------------------- no decoding


def first_things(caption: str, most: int) -> str:
    """A caption through the last of its first ``most`` things and what is said of it, and a full stop; shorter ones stay."""
    named = things(caption)
    if len(named) <= most:
        return caption
    if not most:
        return ""
    return f"{caption[: max(claim.end for claim in claims(caption) if claim.phrase == named[most - 1])]}."


# --------------------------------------------------------------------------------------------------- other heads


def random_guard(guard: GazeGuard, captions: int, seed: int, policy: str | Policy = "mark") -> GazeGuard:
    """A guard over as many random heads of the same layers, with a detector fitted on what they see, as the lab's own was.

    captions: greedy and as many sampled ones to learn from, of training pictures; half as many validation pictures tune it.
    What lies under the gaze is left out: `UNDER` (in `evals.detection`) tells of objects whatever the heads look at.
    """
    heads = guard.heads.with_heads(guard.heads.matched(np.random.default_rng(seed)))
    listener = GazeGuard(guard.model, guard.processor, heads=heads)
    learnt, held = (
        caption_and_label(listener, split, n, seed) for split, n in (("train", captions), ("validation", captions // 2))
    )
    detector = Detector.fit(learnt.x, learnt.false, learnt.kind, heads, without(heads.heads))
    tuned = detector.calibrated(held.x, held.false, held.kind, held.image)
    return GazeGuard(guard.model, guard.processor, policy=policy, heads=heads, detector=tuned)
