"""Parts of the scenes VLM: configuration of its vision encoder and of the whole model, all stock classes.

The encoder is a Segformer tower: overlapping convolutions and self-attention in three stages, 160 x 160 pixels to 8 x 8
image tokens.
"""

from __future__ import annotations

from typing import Any

from gazeguard.lab.scenes.world import PATCH, SIZE

VISION_WIDTH = 256
STAGES = {"hidden_sizes": [48, 128, VISION_WIDTH], "depths": [2, 2, 4], "strides": [5, 2, 2], "num_attention_heads": [1, 2, 8]}


def vision_config() -> dict[str, Any]:
    """The encoder's configuration, as `LlavaConfig` takes it."""
    return {
        "model_type": "segformer",
        "num_encoder_blocks": 3,
        **STAGES,
        "sr_ratios": [4, 2, 1],
        "patch_sizes": [7, 3, 3],
        "mlp_ratios": [3, 3, 3],
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "reshape_last_stage": False,  # tokens instead of a map
        "hidden_size": VISION_WIDTH,  # read by LlavaConfig's users
        "image_size": SIZE,
        "patch_size": PATCH,
    }
