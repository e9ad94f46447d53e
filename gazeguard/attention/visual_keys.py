"""TODO attention.visual_keys."""

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
    """What the words written after a batch of prompts look among, as `Prompts.of` takes it.

    ids:   (batch, S) int64, one per key; the image token where a key is an image cell
    mask:  (batch, S), 0 for keys that no word may look at; None when there are none
    image: the ids that stand for image cells
    last:  the position, among all that the decoder reads, of the query that predicts the first written token
    """

    ids: Tensor
    mask: Tensor | None
    image: tuple[int, ...]
    last: int


@dataclass(frozen=True)
class VisualKeySource:
    """A way in which words see pictures that are not part of what their decoder reads.

    families:    the model types that look in this way
    modules:     how the paths of those attention modules of the decoder end that look
    keys:        (model, processor's output, prompt ids (batch, P), mask or None) -> ids and mask of the keys (batch, S)
    gate:        the layer's parameter whose tanh scales the module's output
    after_words: the decoder's own tokens, its start among them, are keys, too, in front of the others: generated text

    Where the pictures alone are the keys, all of every row's attention is on the picture.
    """

    families: tuple[str, ...]
    modules: str
    keys: Callable[[PreTrainedModel, Mapping[str, Any], Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    gate: str = ""
    after_words: bool = False


def _encoded_prompt(_: Any, __: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The encoder's states are the keys: one per token of the prompt, which holds the picture."""
    return ids, mask


def _pictures(name: str, cells: Callable[[Any], int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The pictures alone are the keys, in as many cells as the configuration says for each column of the mask ``name``."""

    def keys(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        may = inputs.get(name)  # (batch, P or more, pictures) or (batch, P or more, pictures, tiles)
        if may is None:
            raise InputError(
                f"{type(model).__name__} got no {name}, which says where each row's pictures are. Put an image into every "
                "message, and pass the processor's output whole."
            )
        # Tiles and pictures that only pad the batch are closed to every word.
        seen = may[:, : ids.shape[1]].flatten(2).bool().any(1).repeat_interleave(cells(model.config), dim=1)
        return torch.full_like(seen, image_token_id(model), dtype=ids.dtype), seen

    return keys


def _patches_and_class(vision: Any) -> int:
    return (vision.image_size // vision.patch_size) ** 2 + 1


def _idefics(config: Any) -> int:
    return config.perceiver_config.resampler_n_latents if config.use_resampler else _patches_and_class(config.vision_config)


VISUAL_KEY_SOURCES = (
    VisualKeySource(("florence2",), "encoder_attn", _encoded_prompt),
    VisualKeySource(("blip-2", "instructblip", "instructblipvideo"), "EncDecAttention", _encoded_prompt),  # around T5
    VisualKeySource(("t5gemma2",), "self_attn", _encoded_prompt, after_words=True),
    VisualKeySource(
        ("mllama",),
        "cross_attn",
        _pictures("cross_attention_mask", lambda config: _patches_and_class(config.vision_config)),
        gate="cross_attn_attn_gate",
    ),
    VisualKeySource(("idefics",), "cross_attn", _pictures("image_attention_mask", _idefics), gate="alpha_cross_attn"),
)


def visual_key_source(model: PreTrainedModel) -> VisualKeySource | None:
    """How the model's words see the picture; None when it is part of the prompt that they continue."""
    kind, encodes = model.config.model_type, model.config.is_encoder_decoder
    return next(
        (look for look in VISUAL_KEY_SOURCES if kind in look.families and (encodes or look.keys is not _encoded_prompt)), None
    )


def visual_keys(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> VisualKeys:
    """What words look among that are written after prompts of these ``ids`` (batch, P); ``inputs`` is the whole batch.

    Raises `UnsupportedError` for a model without an image token, `InputError` for a batch that does not tell the picture.
    """
    look = visual_key_source(model)
    keys, seen = (ids, mask) if look is None else look.keys(model, inputs, ids, mask)
    read = decoder_prompt(model, inputs) if model.config.is_encoder_decoder else ids
    return VisualKeys(keys, seen, image_token_ids(model), read.shape[1] - 1)


def _families(encoder_decoder: bool) -> str:
    """The model types of `VISUAL_KEY_SOURCES` that can be used instead."""
    kinds = [kind for look in VISUAL_KEY_SOURCES if (look.keys is _encoded_prompt) == encoder_decoder for kind in look.families]
    return " or ".join(kinds)
