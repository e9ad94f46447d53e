"""Image tokens of a model: the ids that stand for parts of images and videos, and their runs in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from gazeguard.errors import UnsupportedError

IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")
VIDEO_TOKEN_NAMES = ("video_token_id", "video_token_index")
# Model types whose images are no part of the token sequence; `NO_TOKEN_ID` stands for their image tokens among the keys.
WITHOUT_IMAGE_TOKEN = ("idefics",)
NO_TOKEN_ID = -1


def _configured(model: Any, names: Sequence[str]) -> int | None:
    """The first of these entries of a model's configuration that is set."""
    return next((value for name in names if (value := getattr(model.config, name, None)) is not None), None)


def image_token_id(model: PreTrainedModel) -> int:
    """The id that marks image tokens among the keys.

    Raises:
        UnsupportedError: The model has none.
    """
    if model.config.model_type in WITHOUT_IMAGE_TOKEN:
        return NO_TOKEN_ID
    if (token := _configured(model, (*IMAGE_TOKEN_NAMES, *VIDEO_TOKEN_NAMES))) is not None:
        return int(token)
    reason = "it is a text-only model, or it takes in images in a way that GazeGuard does not know"
    if model.config.is_encoder_decoder:
        reason = "it reads an image without a text prompt, or nothing in the prompt says which encoder states are the image"
    raise UnsupportedError(
        f"{type(model).__name__} has no image token in its configuration: {reason}. "
        "Use a vision-language model with image tokens."
    )


def video_token_id(model: Any) -> int | None:
    """The id that marks the tokens of a video, where it is not the one that marks those of an image."""
    image, video = _configured(model, IMAGE_TOKEN_NAMES), _configured(model, VIDEO_TOKEN_NAMES)
    return None if image is None or video == image else video


def image_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that mark tokens of images and, where they have an id of their own, of videos: see `image_token_id`."""
    video = video_token_id(model)
    return (image_token_id(model), *(() if video is None else (int(video),)))


def image_token_runs(ids: NDArray[np.int64], tokens: int | tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, length) of each unbroken run of image tokens, which have one id or several, in ``ids`` (T,)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.isin(ids, tokens).astype(np.int8), [0]))))
    return tuple((int(start), int(end - start)) for start, end in edges.reshape(-1, 2))
