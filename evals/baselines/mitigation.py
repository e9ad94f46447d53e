"""Published decoders that mitigate hallucination, on stock transformers, as baselines.

Each is a function with the arguments and the result of ``model.generate``; ``options`` go to it (``max_new_tokens``,
``do_sample``, ...). Prompts may be padded on the left. Nothing of a model's code is replaced: a second branch is a
`LogitsProcessor`, and attention is steered through `AttentionRecorder.steer`.

Greedy, beam search and sampling are ``model.generate`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from gazeguard import _compat
from gazeguard.attention.backbone import Head
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.visual_keys import visual_keys
from gazeguard.claims.parse import claims, things
from gazeguard.decoding.rerank import StopBonus
from gazeguard.vision.image_tokens import image_token_id

Inputs = Mapping[str, Any]
PLAUSIBLE = 0.1  # VCD's and PAI's beta
STEPS = 1000  # of VCD's diffusion
NOISED = 500  # of them, by default
ABLATION = -30.0  # logits; no more than exp(-30) of a head's attention is left on the image

# --------------------------------------------------------------------------------------------------- two branches


def contrast(logits: Tensor, other: Tensor, alpha: float, beta: float = PLAUSIBLE) -> Tensor:
    """``(1 + alpha) logits - alpha other`` for plausible tokens, -inf for the rest; both (..., vocabulary).

    beta: the least share of the top token's probability, by ``logits`` alone, that makes a token plausible; 0 cuts none
    (VCD: Leng et al. 2024, arXiv 2311.16922, equations 3 and 6. Classifier-free guidance, which PAI takes over, is the same
    with alpha = gamma - 1: Sanchez et al. 2023, arXiv 2306.17806.)
    """
    contrasted = (1 + alpha) * logits - alpha * other
    if not beta:
        return contrasted
    return contrasted.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(beta), -torch.inf)


class Branch:
    """The logits of the model after another prompt and the same generated tokens.

    prompt: arguments of its forward; as many ids as in the first branch, each at one position (no M-RoPE)
    first:  called before the branch's first pass

    The branch has a cache of its own. In VCD's published code both branches wrote into one (VCD#7, VCD#13, and the forks that
    took it over): the tokens of the noised image became keys of the clean one.
    """

    def __init__(self, model: PreTrainedModel, prompt: Inputs, first: Callable[[], None] | None = None) -> None:
        self.model, self.prompt, self.first = model, prompt, first
        self.mask, self.cache = prompt["attention_mask"], DynamicCache(config=model.config.get_text_config(decoder=True))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """The logits (batch, vocabulary) of the token after ``ids`` (batch, length); one token more at each call."""
        if len(ids) != len(self.mask):
            raise ValueError(f"{len(ids)} rows for {len(self.mask)} prompts; a second branch cannot follow beams.")
        if ids.shape[1] == self.mask.shape[1]:
            if self.first is not None:
                self.first()
            arguments = dict(self.prompt)
        else:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(ids), 1)), dim=1)
            arguments = {"input_ids": ids[:, -1:], "attention_mask": self.mask}
        arguments[_compat.cache_argument_name()] = self.cache
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -arguments["input_ids"].shape[1] :]
        output = self.model(**arguments, position_ids=positions, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()


class Contrast(LogitsProcessor):
    """`contrast` with a second branch: one more forward pass per token."""

    def __init__(self, branch: Branch, alpha: float, beta: float = PLAUSIBLE) -> None:
        self.branch, self.alpha, self.beta = branch, alpha, beta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (batch, vocabulary) logits of the token after ``input_ids`` (batch, length)."""
        return contrast(scores, self.branch(input_ids), self.alpha, self.beta)


def _contrasted(model: PreTrainedModel, inputs: Inputs, branch: Branch, alpha: float, beta: float, options: Any) -> Tensor:
    return model.generate(**inputs, **options, logits_processor=LogitsProcessorList([Contrast(branch, alpha, beta)]))


# ------------------------------------------------------------------------------------------------------------ VCD


def noised(pixels: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Images (batch, ...) after ``steps`` of VCD's forward diffusion, each with the same noise; 0 leaves them as they are.

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
    """Visual contrastive decoding: contrast with the same prompt under a noised image (Leng et al. 2024)."""
    other = {**inputs, "pixel_values": noised(inputs["pixel_values"], steps)}
    return _contrasted(model, inputs, Branch(model, other), alpha, beta, options)


# ------------------------------------------------------------------------------------------------------ attention


def middle_heads(heads: Sequence[Head]) -> list[Head]:
    """Of all heads, those of the layers but the first and the last: PAI leaves out the ones before the image is read."""
    layers = sorted({layer for layer, _ in heads})
    return [head for head in heads if head[0] in layers[1:-1]]


def steer_to_image(recorder: AttentionRecorder, inputs: Inputs, bias: float) -> None:
    """Let a recorder add ``bias`` to its heads' attention scores of all image tokens, from the next generated token on."""
    prompts = KeyLayout.from_ids(*visual_keys(recorder.model, inputs, inputs["input_ids"], inputs["attention_mask"]))
    recorder.begin(prompts)
    if bias:
        recorder.steer(
            torch.full((len(prompts.valid), len(recorder.heads), prompts.valid.shape[1]), bias, device=recorder.model.device)
        )


def without_image(model: PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
    """The prompt with its image tokens masked and without positions of their own: text alone."""
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
    """PAI-style: more weight for image keys at new tokens, in contrast with the prompt without its image.

    heads: those of the middle layers. Liu et al. 2024 (arXiv 2407.21771) add ``boost`` times a score's absolute value; here
    ``boost`` itself is added, which does not depend on where a head's scores have their zero.
    """
    with AttentionRecorder(model, heads) as recorder:
        steer_to_image(recorder, inputs, boost)
        return _contrasted(model, inputs, Branch(model, without_image(model, inputs)), alpha, beta, options)


def image_ablated(
    model: PreTrainedModel,
    inputs: Inputs,
    heads: Sequence[Head],
    alpha: float = 1.0,
    beta: float = PLAUSIBLE,
    bias: float = ABLATION,
    **options: Any,
) -> Tensor:
    """Contrast with a branch whose gaze heads do not attend to the image while tokens are generated."""
    with ExitStack() as stack:
        # Entered when the first branch has read its prompt, the recorder records the second alone: it follows one cache.
        branch = Branch(
            model, inputs, lambda: steer_to_image(stack.enter_context(AttentionRecorder(model, heads)), inputs, bias)
        )
        return _contrasted(model, inputs, branch, alpha, beta, options)


# ------------------------------------------------------------------------------------------------------- blind ends


def stop_bonus(model: PreTrainedModel, inputs: Inputs, stops: Sequence[int], bonus: float, **options: Any) -> Tensor:
    """Shorter captions, blindly: ``bonus`` logits for the full stop and the end at every step."""
    return model.generate(**inputs, **options, logits_processor=LogitsProcessorList([StopBonus(stops, bonus)]))


# ----------------------------------------------------------------------------------------------------- no decoding


def first_objects(caption: str, most: int) -> str:
    """A caption through the last of its first ``most`` objects and their claims, and a full stop; shorter ones stay."""
    named = things(caption)
    if len(named) <= most:
        return caption
    if not most:
        return ""
    return f"{caption[: max(claim.end for claim in claims(caption) if claim.phrase == named[most - 1])]}."
