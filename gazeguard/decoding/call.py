"""Calls of ``generate``: what a guard has to know of one before it runs, and what can be read off its output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from gazeguard import _compat
from gazeguard.decoding.rewind import RewindLoop
from gazeguard.errors import InputError, UnsupportedError
from gazeguard.policy import Policy
from gazeguard.vision.batch_grids import check_image_sizes

ImageSizes = Sequence[Sequence[tuple[int, int]]]  # for each prompt (width, height) of its images, pixels
Run = Callable[[Sequence[LogitsProcessor], RewindLoop | None], Any]

_NAMED_ARGUMENTS = frozenset(inspect.signature(GenerationMixin.generate).parameters)  # they configure nothing
_OF_ONE_PASS = ("position_ids", "cache_position")  # tensors that a pass is given beside its prompts and their images


class Refusal(NamedTuple):
    """A way of generating that cannot be recorded, by its configuration, and what to do instead."""

    name: str
    applies: Callable[[GenerationConfig], Any]
    instead: str


REFUSED = (
    Refusal(
        "continuous batching, which takes no images",
        lambda config: config.cache_implementation == "paged",
        "generate, and check_all() for many captions at once",
    ),
    Refusal(
        "classifier-free guidance without a cache",
        lambda config: (config.guidance_scale or 1) != 1 and config.use_cache is False,
        "use_cache=True",
    ),
    Refusal("token healing, which rewrites the prompt", lambda config: config.token_healing, "token_healing=False"),
)
# What a policy that rewinds excludes beside that.
REFUSED_WITH_REWIND = (
    Refusal("beams with rollbacks", lambda config: (config.num_beams or 1) > 1, "num_beams=1, or a policy without rewind"),
    Refusal(
        "speculation with rollbacks",
        lambda config: config.prompt_lookup_num_tokens or config.is_assistant,
        "no prompt look-up, or a policy without rewind",
    ),
    Refusal(
        "guidance with rollbacks",
        lambda config: (config.guidance_scale or 1) != 1,
        "no guidance, or a policy without rewind",
    ),
    Refusal(
        "attentions or hidden states of tokens that may be rolled back",
        lambda config: config.output_attentions or config.output_hidden_states,
        "neither of them, or a policy without rewind",
    ),
)


class GeneratedIds(NamedTuple):
    """A generated caption: its token ids (T,) without the end token, and whether it ended by itself."""

    ids: NDArray[np.int64]
    finished: bool


@dataclass(frozen=True, eq=False)
class GenerateCall:
    """One call of ``generate``.

    Attributes:
        run: Generates, with logits processors before the caller's own, or in a `RewindLoop` in place of transformers' loop.
        ids: (batch, P) int64, the prompts; each may be there several times, one after the other.
        mask: (batch, P), 0 for padding; None where nothing is.
        inputs: Everything that the model is given.
        config: The configuration that is in force.
        returns_dict: Whether the caller wants a ModelOutput.
        image_sizes: For each row of ids the (width, height) of its images, pixels; None if unknown.
        streams: Whether a streamer shows the tokens as they are generated.
    """

    run: Run
    ids: Tensor
    mask: Tensor | None
    inputs: Mapping[str, Any]
    config: GenerationConfig
    returns_dict: bool
    image_sizes: ImageSizes | None = None
    streams: bool = False

    @classmethod
    def from_generate(cls, model: PreTrainedModel, inputs: Tensor | None, arguments: Mapping[str, Any]) -> GenerateCall:
        """Of the arguments of ``model.generate``, and ``picture_sizes`` among them.

        Raises:
            InputError: The prompt has no token ids, or the image sizes are not sizes.
            UnsupportedError: The decode loop is to be loaded from a repository.
        """
        arguments = dict(arguments)
        sizes = arguments.pop("picture_sizes", None)
        if inputs is not None and (name := _first_argument(model)) != "inputs":  # pixel_values, in models of BLIP's kind
            arguments[name], inputs = inputs, None
        if isinstance(arguments.get("custom_generate"), str):
            raise UnsupportedError(
                "GazeGuard runs no code from the hub: custom_generate is the name of a repository. Pass a function of yours."
            )
        ids = inputs if inputs is not None else arguments.get("input_ids")
        if ids is None or ids.ndim != 2 or not ids.shape[1]:
            raise InputError("The prompt has no token ids: generate got inputs_embeds alone. Pass input_ids.")
        options = {name: value for name, value in arguments.items() if name not in _NAMED_ARGUMENTS}
        config = _compat.generation_config(model, arguments.get("generation_config"), options)
        mask = arguments.get("attention_mask")
        if mask is None and config.pad_token_id is not None and config.pad_token_id not in end_tokens(config):
            mask = ids != config.pad_token_id  # as generate does
        run = partial(_generate, model, inputs, arguments)
        returns_dict = bool(config.return_dict_in_generate)
        streams = arguments.get("streamer") is not None
        return cls(run, ids, mask, arguments, config, returns_dict, check_image_sizes(sizes, len(ids)), streams)

    @classmethod
    def from_loop(
        cls,
        model: PreTrainedModel,
        ids: Tensor,
        processors: LogitsProcessorList,
        stops: StoppingCriteriaList,
        config: GenerationConfig,
        sizes: ImageSizes | None,
        model_kwargs: Mapping[str, Any],
        arguments: Mapping[str, Any],
    ) -> GenerateCall:
        """Make a call from the arguments of a ``custom_generate``; transformers has given the prompt to the streamer already.

        Prompts and images are described by the arguments of ``generate``, if they are known: each prompt is there once, and
        in the order of its images, and what was made of these is there even where they have been encoded already.
        """
        streamer = arguments.get("streamer")
        returns_dict, config.return_dict_in_generate = bool(config.return_dict_in_generate), True

        def run(more: Sequence[LogitsProcessor], loop: RewindLoop | None) -> Any:
            decode, options = _compat.decoding_loop(model, config), {"streamer": streamer} if streamer is not None else {}
            if loop is not None:
                loop.streamer, loop.prompt_streamed = streamer, True
                decode, options = partial(loop, model), {}
            return decode(
                ids,
                logits_processor=LogitsProcessorList([*more, *processors]),
                stopping_criteria=stops,
                generation_config=config,
                **options,
                **model_kwargs,
            )

        known = next((value for value in map(arguments.get, ("inputs", "input_ids")) if value is not None), None)
        inputs, prompts = (model_kwargs, ids) if known is None else (arguments, known)
        image_sizes = check_image_sizes(sizes, len(prompts))
        return cls(run, prompts, inputs.get("attention_mask"), inputs, config, returns_dict, image_sizes, streamer is not None)

    @property
    def beams(self) -> int:
        """Beams of the search; 1 without one."""
        return self.config.num_beams or 1

    def prompts(self) -> dict[str, Any]:
        """The batch of prompts alone, as a processor makes it."""
        inputs = {name: v for name, v in self.inputs.items() if isinstance(v, Tensor) and name not in _OF_ONE_PASS}
        mask = torch.ones_like(self.ids) if self.mask is None else self.mask.long()
        return inputs | {"input_ids": self.ids, "attention_mask": mask}

    def captions(self, output: Any, start: int) -> list[GeneratedIds]:
        """The captions in what `run` returned, whose first ``start`` tokens are the prompt."""
        ends = end_tokens(self.config)
        rows = (output if isinstance(output, Tensor) else output.sequences)[:, start:].cpu().numpy()
        lengths = [next((i for i, token in enumerate(row.tolist()) if token in ends), len(row)) for row in rows]
        return [GeneratedIds(row[:length], length < len(row)) for row, length in zip(rows, lengths, strict=True)]

    def result(self, output: Any) -> Any:
        """What the caller gets of what `run` returned."""
        return output if self.returns_dict or isinstance(output, Tensor) else output.sequences


def _generate(
    model: PreTrainedModel,
    inputs: Tensor | None,
    arguments: Mapping[str, Any],
    processors: Sequence[LogitsProcessor],
    loop: RewindLoop | None,
) -> Any:
    """`GenerateCall.run` for the arguments of ``model.generate``."""
    options = {**arguments, "return_dict_in_generate": True}
    if processors:
        options["logits_processor"] = LogitsProcessorList([*processors, *(arguments.get("logits_processor") or ())])
    if loop is not None:
        if other := next((name for name in ("custom_generate", "assistant_model") if options.get(name)), None):
            raise UnsupportedError(
                f"A policy with rewind decodes in its own loop, which cannot be combined with {other}. Leave that out, or "
                "choose a policy without rewind."
            )
        options["custom_generate"], loop.streamer = loop, options.pop("streamer", None)
    first = () if inputs is None else (inputs,)  # another class may call its first argument otherwise
    return type(model).generate(model, *first, **options)  # of the class: the instance's may be wrapped by a watch


def _first_argument(model: PreTrainedModel) -> str:
    """The name of the first argument of a model's ``generate``."""
    return list(inspect.signature(type(model).generate).parameters)[1]


def end_tokens(config: GenerationConfig) -> set[int]:
    """The tokens that end a caption."""
    ends = config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def cache_of(output: Mapping[str, Any] | Tensor) -> Cache | None:
    """The cache in what a forward pass or ``generate`` returned; None without one."""
    values = () if isinstance(output, Tensor) else output.values()
    return next((value for value in values if isinstance(value, Cache)), None)


def check_supported(config: GenerationConfig, policy: Policy, encoder_decoder: bool) -> None:
    """Raise `UnsupportedError` for a way of generating that cannot be recorded, or not under this policy."""
    for refusal in (*REFUSED, *(REFUSED_WITH_REWIND if policy.rewind else ())):
        if refusal.applies(config):
            raise UnsupportedError(f"GazeGuard cannot watch {refusal.name}. Generate with {refusal.instead}.")
    if policy.rewind is not None and encoder_decoder:
        raise UnsupportedError(
            f"Policy {policy.name!r} rolls phrases back, which a guard around an encoder-decoder cannot do. Choose a policy "
            "without rewind."
        )


def check_streamable(policy: Policy, streams: bool) -> None:
    """Raise `UnsupportedError` for a streamer under a policy that may withhold what the streamer has shown already."""
    if streams and policy.on_flag != "keep":
        raise UnsupportedError(
            f"A streamer shows a caption before it is judged, and policy {policy.name!r} lets through only what is left of it "
            f"(on_flag: {policy.on_flag}). Leave the streamer out and show report.filtered_caption, or choose a policy with "
            "on_flag: keep."
        )


def check_loop_supported(config: GenerationConfig, encoder_decoder: bool, arguments: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for what a guard cannot do as ``custom_generate``, where its own ``generate`` can.

    Args:
        config: The configuration that is in force.
        encoder_decoder: Whether the model is one.
        arguments: Of the running ``generate``.
    """
    assisted = arguments.get("assistant_model") is not None
    refusals = (
        (assisted or config.prompt_lookup_num_tokens or config.is_assistant, "cannot speculate"),
        (encoder_decoder, "gets no prompt from an encoder-decoder"),
    )
    if reason := next((reason for applies, reason in refusals if applies), None):
        raise UnsupportedError(f"custom_generate=guard {reason}. Call guard.generate with the same arguments.")
    if arguments.get("streamer") is not None and (config.num_beams or 1) > 1:
        raise UnsupportedError("custom_generate=guard cannot stream beams. Use num_beams=1, or leave the streamer out.")
