"""Table of layout rules, and the search for the rule that lays out a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gazeguard.errors import UnsupportedError
from gazeguard.vision.geometry import Layout
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.layouts import separated_tiles as separated
from gazeguard.vision.layouts.any_resolution import any_resolution
from gazeguard.vision.layouts.padded_canvas import padded_canvas
from gazeguard.vision.layouts.patch_grids import patch_grids
from gazeguard.vision.layouts.patch_rows import rows_and_one_column, runs_of_rows
from gazeguard.vision.layouts.pixel_sizes import image_codes, pixel_sizes
from gazeguard.vision.layouts.prompt import Prompt
from gazeguard.vision.layouts.resamplers import resampler_outputs
from gazeguard.vision.layouts.squares import NO_SQUARE, one_square_per_image, one_token_and_square
from gazeguard.vision.layouts.tagged_tiles import tagged_tiles
from gazeguard.vision.layouts.tiled_canvas import map_and_page, tiled_canvas


@dataclass(frozen=True)
class LayoutRule:
    """A layout and the families that have it.

    Attributes:
        layout: The box of every image token of a prompt and the image that it belongs to; None where it does not fit.
        families: The model types that the rule serves.
        others: The rule is tried for every other model type, too: what it needs is in the processor's output.
        never: Model types that are excepted from ``others``, since they have a layout of their own.
    """

    layout: Callable[[Prompt], Layout | None]
    families: tuple[str, ...]
    others: bool = False
    never: tuple[str, ...] = ()

    def serves(self, model_type: str) -> bool:
        """Whether the rule is tried for models of this type."""
        return model_type in self.families or (self.others and model_type not in self.never)


# The first rule that fits lays out a prompt.
RULES = (
    LayoutRule(
        resampler_outputs,
        (
            "aria",
            "blip-2",
            "deepseek_ocr2",  # queries that have seen a tile, or the whole image
            "idefics",
            "idefics2",
            "instructblip",
            "instructblipvideo",
            "kosmos-2",
            "kosmos-2.5",
        ),
    ),
    LayoutRule(
        patch_grids,
        (
            *("cohere_compass", "cosmos3_edge", "cosmos3_omni", "dots3_note", "ernie4_5_vl_moe", "exaone4_5", "gemma4"),
            *("gemma4_unified", "glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "hunyuan_vl"),
            *("hyperclovax_vision_v2", "inkling2", "inkling2_mm_model", "kimi_k25", "lfm3_vl", "minimax_m3_vl", "molmo2"),
            *("muse_glimmer", "muse_spark", "nemotron_h_omni", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl"),
            *("qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "video_llama_3"),
        ),
        others=True,
    ),
    LayoutRule(any_resolution, ("granite4_vision", "llava_next", "llava_next_video", "llava_onevision"), others=True),
    LayoutRule(image_codes, ("emu3",)),
    LayoutRule(pixel_sizes, ("lighton_ocr", "mistral3", "mistral_large4"), others=True),
    LayoutRule(padded_canvas, ("mllama",), others=True),
    LayoutRule(separated.separated_tiles, tuple(separated.FAMILIES)),
    LayoutRule(map_and_page, ("unlimited_ocr",)),
    LayoutRule(
        tiled_canvas,
        ("aya_vision", "cohere2_vision", "got_ocr2", "internvl", "pp_chart2table", "qianfan_ocr"),
        others=True,
        never=(*separated.FAMILIES, "unlimited_ocr"),  # their image processors have such a canvas, and another order of tiles
    ),
    LayoutRule(tagged_tiles, ("idefics3", "lfm2_vl", "smolvlm"), others=True),
    LayoutRule(runs_of_rows, ("fuyu",)),
    LayoutRule(rows_and_one_column, ("inkling_mm_model",)),
    LayoutRule(one_token_and_square, ("florence2", "idefics")),
    LayoutRule(
        one_square_per_image,
        (
            *("aya_vision", "chameleon", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "fast_vlm", "gemma3"),
            *("granite_docling", "idefics3", "janus", "llava", "ovis2", "paligemma", "pp_chart2table", "shieldgemma2"),
            *("smolvlm", "t5gemma2", "video_llava", "vipllava"),
        ),
        others=True,
        never=NO_SQUARE,
    ),
)


def find_grid(prompt: Prompt) -> ImageGrid:
    """The image grid of one prompt, by the first rule that fits.

    Raises:
        UnsupportedError: No rule fits, or a rule and the prompt disagree on the number of image tokens.
    """
    for rule in RULES:
        layout = rule.layout(prompt) if rule.serves(prompt.model_type) else None
        if layout is None:
            continue
        boxes, image = layout
        if len(boxes) != prompt.token_count:
            raise UnsupportedError(
                f"The prompt has {prompt.token_count} image tokens, but the layout rule {rule.layout.__name__} expects "
                f"{len(boxes)}: {type(prompt.model).__name__} lays out its image tokens in a way that is not known, or from "
                "the images' original sizes. Pass picture_sizes= to generate, or grid=ImageGrid(...)."
            )
        return ImageGrid(boxes, image.astype(np.int64), prompt.sizes)
    lengths = ", ".join(map(str, prompt.run_lengths))
    raise UnsupportedError(
        f"No layout rule says where the {prompt.token_count} image tokens of {type(prompt.model).__name__} lie in the image "
        f"(runs of {lengths} tokens for {len(prompt.sizes)} images). Pass picture_sizes= to generate if the images' original "
        "sizes are missing, or grid=ImageGrid(...) with one box per image token."
    )
