"""Visual keys: where the keys of the image are, in the prompt or in cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gazeguard.errors import InputError
from gazeguard.vision.image_tokens import image_token_id, image_token_ids
from gazeguard.vision.inputs import decoder_prompt


class VisualKeys(NamedTuple):
    """The keys that the tokens generated after a batch of prompts attend to, as `KeyLayout.from_ids` takes them.

    Attributes:
        ids: (batch, S) int64, one per key; the image token's id where a key is an image token.
        mask: (batch, S), 0 for keys that are masked for every token; None when there are none.
        image: The ids that stand for image tokens.
        last: The position, among all that the decoder reads, of the query that predicts the first generated token.
    """

    ids: Tensor
    mask: Tensor | None
    image: tuple[int, ...]
    last: int


@dataclass(frozen=True)
class VisualKeySource:
    """Keys of images that are not part of what the decoder reads.

    Where image tokens alone are the keys, all of every query's attention is on the image.

    Attributes:
        families: The model types with such keys.
        modules: How the paths of the decoder's attention modules over them end.
        keys: (model, processor's output, prompt ids (batch, P), mask or None) -> ids and mask of the keys (batch, S).
        gate: The layer's parameter whose tanh scales the module's output.
        after_generated: The decoder's own tokens, its start among them, are keys, too, in front of the others: generated text.
        encoder: The keys are the states of an encoder that reads the prompt.
    """

    families: tuple[str, ...]
    modules: str
    keys: Callable[[PreTrainedModel, Mapping[str, Any], Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    gate: str = ""
    after_generated: bool = False
    encoder: bool = False


def _encoded_prompt(_: Any, __: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The encoder's states are the keys: one per token of the prompt, which holds the image."""
    return ids, mask


def _image_tokens(name: str, count: Callable[[Any], int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The image tokens alone are the keys, as many as the configuration says for each column of the mask ``name``."""

    def keys(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = inputs.get(name)  # (batch, P or more, images) or (batch, P or more, images, tiles)
        if mask is None:
            raise InputError(
                f"{type(model).__name__} got no {name}, which says where each row's images are. Put an image into every "
                "message, and pass the processor's output whole."
            )
        # Tiles and images that only pad the batch are masked for every token.
        seen = mask[:, : ids.shape[1]].flatten(2).bool().any(1).repeat_interleave(count(model.config), dim=1)
        return torch.full_like(seen, image_token_id(model), dtype=ids.dtype), seen

    return keys


def _patches_and_class(vision: Any) -> int:
    return (vision.image_size // vision.patch_size) ** 2 + 1


def _idefics(config: Any) -> int:
    return config.perceiver_config.resampler_n_latents if config.use_resampler else _patches_and_class(config.vision_config)


VISUAL_KEY_SOURCES = (
    VisualKeySource(("florence2",), "encoder_attn", _encoded_prompt, encoder=True),
    # The following are built around T5; around a decoder alone their images are part of the prompt.
    VisualKeySource(("blip-2", "instructblip", "instructblipvideo"), "EncDecAttention", _encoded_prompt, encoder=True),
    VisualKeySource(("t5gemma2",), "self_attn", _encoded_prompt, after_generated=True, encoder=True),
    VisualKeySource(
        ("mllama",),
        "cross_attn",
        _image_tokens("cross_attention_mask", lambda config: _patches_and_class(config.vision_config)),
        gate="cross_attn_attn_gate",
    ),
    VisualKeySource(("idefics",), "cross_attn", _image_tokens("image_attention_mask", _idefics), gate="alpha_cross_attn"),
)


def visual_key_source(model: PreTrainedModel) -> VisualKeySource | None:
    """Where the keys of a model's image are; None when the image is part of the prompt that its decoder continues."""
    family, has_encoder = model.config.model_type, model.config.is_encoder_decoder
    return next(
        (source for source in VISUAL_KEY_SOURCES if family in source.families and (has_encoder or not source.encoder)), None
    )


def visual_keys(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> VisualKeys:
    """The keys that generated tokens attend to after prompts.

    Args:
        model: A vision-language model.
        inputs: The whole batch, as the processor made it.
        ids: (batch, P) int64, the prompts.
        mask: (batch, P), 0 for padding; None for none.

    Raises:
        UnsupportedError: The model has no image token.
        InputError: The batch does not say where its images are.
    """
    source = visual_key_source(model)
    keys, seen = (ids, mask) if source is None else source.keys(model, inputs, ids, mask)
    read = decoder_prompt(model, inputs) if model.config.is_encoder_decoder else ids
    return VisualKeys(keys, seen, image_token_ids(model), read.shape[1] - 1)


def supported_families(encoder: bool) -> str:
    """The model types of `VISUAL_KEY_SOURCES`, with an encoder or without one, for an error message."""
    return " or ".join(family for source in VISUAL_KEY_SOURCES if source.encoder == encoder for family in source.families)
