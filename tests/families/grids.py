"""Tiny random models of the families that cut an image into a grid of their own, mostly given by ``image_grid_thw``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

from families import END, IMAGE, START, TEXT, TOWER, WIDTH, Family, draw_noise, draw_weights, qwen2_5_vl

PATCH = 4
FLAT, DEEP = (3 * PATCH**2,), (3 * 2 * PATCH**2,)  # the numbers of a patch, of one frame or of two
GRID: dict[str, Any] = {
    **TOWER,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
}
TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 123,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TYPES = ("mm_token_type_ids", 1, 0)
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
DEEPSTACK: dict[str, Any] = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
WINDOWED: dict[str, Any] = {"window_size": 16, "fullatt_block_indexes": [1]}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


def _shape(row: int) -> tuple[int, int]:
    return 4, 4 + 2 * (row % 3)  # patches, merged two by two


def _merged(row: int) -> list[int]:
    height, width = _shape(row)
    return [height * width // 4]


def _patches(rows: Sequence[int], patch: Sequence[int]) -> dict[str, Tensor]:
    grids = [(1, *_shape(row)) for row in rows]
    pixels = [draw_noise(row, h * w, *patch) for row, (_, h, w) in zip(rows, grids, strict=True)]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}


def _drawn(
    kind: type[PreTrainedModel], config: Any, sharp: dict[str, float] | None = None, attention: str = "sdpa"
) -> PreTrainedModel:
    """The model with fresh weights, those whose names end as ``sharp`` says made larger so that its attention is peaky."""
    model = draw_weights(kind._from_config(config, attn_implementation=attention))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(math.prod(times for ending, times in (sharp or {}).items() if name.endswith(ending)))
    return model


def _grid(
    name: str,
    config: Any,
    kind: type[PreTrainedModel],
    text: dict[str, Any],
    vision: dict[str, Any],
    *,
    patch: Sequence[int] = DEEP,
    types: tuple[str, int, int] | None = TYPES,
    image_tokens: Callable[[int], list[int]] = _merged,
    sharp: dict[str, float] | None = None,
    **more: Any,
) -> Family:
    made = config(text_config={**TEXT, **text}, vision_config={**GRID, **vision}, **{**TOKENS, **more})
    return Family(name, _drawn(kind, made, sharp), image_tokens, lambda rows: _patches(rows, patch), types)


# ----------------------------------------------------------------------------------------------------------- the Qwens


FRAMES = 2


@dataclass(frozen=True)
class Film(Family):
    """Every row holds a video, under an id and a token type of its own, odd rows an image before it."""

    def batch(self, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
        made = super().batch(rows)
        made["mm_token_type_ids"] = made["mm_token_type_ids"] + 2 * (made["input_ids"] == TOKENS["video_token_id"])
        return made

    def _prompt(self, row: int) -> Tensor:
        prompt = super()._prompt(row)
        last = torch.nonzero(prompt == IMAGE)[-self.image_tokens(row)[-1] :, 0]
        return prompt.index_fill(0, last, TOKENS["video_token_id"])


def qwen2_5_vl_video() -> Family:
    """Videos of two frames, some behind an image."""

    def film(row: int) -> tuple[int, int, int]:
        return FRAMES, *_shape(row + 1)

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        films = [film(row) for row in rows]
        pixels = [draw_noise(row + 50, math.prod(told), *DEEP) for row, told in zip(rows, films, strict=True)]
        made = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(films)}
        odd = [row for row in rows if row % 2]
        return {**made, **(_patches(odd, DEEP) if odd else {})}

    def image_tokens(row: int) -> list[int]:
        return [*(_merged(row) if row % 2 else []), math.prod(film(row)) // 4]

    return Film("Qwen2.5-VL (video)", qwen2_5_vl().model, image_tokens, image_inputs, TYPES)


def qwen2_vl() -> Family:
    """The tower's width is ``embed_dim``, and its ``hidden_size`` the text's."""
    vision = {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
    return _grid("Qwen2-VL", tf.Qwen2VLConfig, tf.Qwen2VLForConditionalGeneration, _rope(2, 2, 2), vision)


def qwen3_vl_moe() -> Family:
    """Qwen3-VL with experts."""
    text = {**_rope(4, 2, 2), **EXPERTS, "head_dim": 16}
    return _grid("Qwen3-VL-MoE", tf.Qwen3VLMoeConfig, tf.Qwen3VLMoeForConditionalGeneration, text, DEEPSTACK)


def qwen3_5() -> Family:
    """The first layer is linear attention, which nobody can watch; queries come with a gate."""
    return _qwen3_5("Qwen3.5", tf.Qwen3_5Config, tf.Qwen3_5ForConditionalGeneration)


def qwen3_5_moe() -> Family:
    """Qwen3.5 with experts, one of them shared."""
    experts = {**EXPERTS, "shared_expert_intermediate_size": 32}
    return _qwen3_5("Qwen3.5-MoE", tf.Qwen3_5MoeConfig, tf.Qwen3_5MoeForConditionalGeneration, **experts)


def _qwen3_5(name: str, config: Any, kind: type[PreTrainedModel], **more: Any) -> Family:
    text = {
        **_rope(2, 1, 1, partial_rotary_factor=0.5),
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        **more,
    }
    return _grid(name, config, kind, text, {"num_position_embeddings": 16}, sharp={"q_norm.weight": 4})


def qwen2_5_omni() -> Family:
    """No token types: images are found by the token that starts them. An audio tower stands idle."""
    return _omni(
        "Qwen2.5-Omni",
        tf.Qwen2_5OmniThinkerConfig,
        tf.Qwen2_5OmniThinkerForConditionalGeneration,
        _rope(2, 2, 2),
        WINDOWED,
        image_token_index=IMAGE,
    )


def qwen3_omni() -> Family:
    """Qwen3-VL-MoE with an audio tower, and positions without token types."""
    return _omni(
        "Qwen3-Omni",
        tf.Qwen3OmniMoeThinkerConfig,
        tf.Qwen3OmniMoeThinkerForConditionalGeneration,
        {**_rope(4, 2, 2), **EXPERTS, "head_dim": 16},
        DEEPSTACK,
    )


def _omni(name: str, config: Any, kind: type[PreTrainedModel], text: Any, vision: Any, **more: Any) -> Family:
    audio = {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "downsample_hidden_size": 4,
        "output_dim": WIDTH,
    }
    return _grid(name, config, kind, text, vision, types=None, audio_config=audio, **more)


def cosmos3_omni() -> Family:
    """Qwen3-VL's tower and text under another name."""
    text = {**_rope(4, 2, 2), "head_dim": 16}
    return _grid("Cosmos3-Omni", tf.Cosmos3OmniConfig, tf.Cosmos3OmniForConditionalGeneration, text, DEEPSTACK)


def cosmos3_edge() -> Family:
    """A SigLIP tower whose patches come merged block by block."""
    text = {**_rope(4, 2, 2), "head_dim": 16}
    kind = tf.Cosmos3EdgeForConditionalGeneration
    more = {"patch": FLAT, "projector_hidden_size": 64}
    return _grid("Cosmos3-Edge", tf.Cosmos3EdgeConfig, kind, text, {"num_patches": 16}, **more)


def cohere_compass() -> Family:
    """Qwen3-VL's tower, Cohere2 text: layer norms, ``logit_scale``, windows, full layers without positions."""
    rope = {"sliding_attention": _rope(2, 2, 2)["rope_parameters"], "full_attention": None}
    text = {"layer_types": SLIDING, "sliding_window": 16, "rope_parameters": rope, "logit_scale": 0.25}
    return _grid("CohereCompass", tf.CohereCompassConfig, tf.CohereCompassForConditionalGeneration, text, DEEPSTACK)


# ------------------------------------------------------------------------------------------------------------ the GLMs


def glm4v() -> Family:
    """Norms before and after each block, interleaved rotation."""
    return _grid("GLM-4V", tf.Glm4vConfig, tf.Glm4vForConditionalGeneration, _rope(2, 2, 2), {})


def glm46v() -> Family:
    """GLM-4V's tower and text under another name."""
    return _grid("GLM-4.6V", tf.Glm46VConfig, tf.Glm46VForConditionalGeneration, _rope(2, 2, 2), {})


def glm4v_moe() -> Family:
    """Experts from the second layer on, half of each head rotated."""
    text = {**_rope(2, 1, 1, partial_rotary_factor=0.5), **ROUTED, "head_dim": 16}
    return _grid("GLM-4V-MoE", tf.Glm4vMoeConfig, tf.Glm4vMoeForConditionalGeneration, text, {})


def glm_ocr() -> Family:
    """GLM-4V with normed queries in its tower."""
    return _grid("GLM-OCR", tf.GlmOcrConfig, tf.GlmOcrForConditionalGeneration, _rope(2, 2, 2), {})


def glm5_next() -> Family:
    """Linear attention, then latent attention to the pools of keys that an indexer picks; four residual streams."""
    text = {
        **LATENT,
        **ROUTED,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 0,
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full", "full", "shared"],
        "index_topk": 8,
        "index_kpool": 4,
        "index_head_dim": 8,
        "index_n_heads": 32,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "hc_sinkhorn_iters": 4,
    }
    vision = {"projection_intermediate_size": 64}
    more = {"types": None, "sharp": {"q_b_proj.weight": 1.5}}
    return _grid("GLM5-next", tf.Glm5NextConfig, tf.Glm5NextForConditionalGeneration, text, vision, **more)


# --------------------------------------------------------------------------------------------- others with a plain grid


@dataclass(frozen=True)
class Ernie(Family):
    """Takes the token types twice: for positions, and to route image tokens to experts of their own."""

    def batch(self, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
        made = super().batch(rows)
        return {**made, "moe_mm_token_type_ids": made["mm_token_type_ids"]}

    def extended(self, inputs: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
        made = super().extended(inputs, written)
        return {**made, "moe_mm_token_type_ids": made["mm_token_type_ids"]}


def ernie4_5_vl_moe() -> Family:
    """Experts for text and others for images."""
    text = {**_rope(2, 2, 2), "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [32, 16]}
    kind = tf.Ernie4_5_VLMoeForConditionalGeneration
    made = _grid("Ernie4.5-VL-MoE", tf.Ernie4_5_VLMoeConfig, kind, text, {}, patch=FLAT)
    return Ernie(**vars(made))


def paddleocr_vl() -> Family:
    """Patches row by row, merged by the projector; tied embeddings."""
    text = {**_rope(4, 2, 2), "head_dim": 16}
    kind = tf.PaddleOCRVLForConditionalGeneration
    return _grid("PaddleOCR-VL", tf.PaddleOCRVLConfig, kind, text, {}, patch=(3, PATCH, PATCH))


def exaone4_5() -> Family:
    """Exaone4 text: windows, full layers without positions; positions count the padding."""
    text = {"model_type": "exaone4", "layer_types": SLIDING, "sliding_window": 16}
    vision = {**WINDOWED, "num_key_value_heads": 1}
    kind = tf.Exaone4_5_ForConditionalGeneration
    return _grid("Exaone4.5", tf.Exaone4_5_Config, kind, text, vision, types=None)


def hyperclovax() -> Family:
    """Qwen2.5-VL's tower; text with multipliers on embeddings, residuals and logits; positions count the padding."""
    text = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 0.5}
    kind = tf.HyperCLOVAXVisionV2ForConditionalGeneration
    return _grid("HyperCLOVAX-v2", tf.HyperCLOVAXVisionV2Config, kind, text, WINDOWED, types=None)


def dots3() -> Family:
    """Latent attention: full layers to the keys that an indexer picks, windows with fewer heads; gated outputs."""
    text = {
        **LATENT,
        **ROUTED,
        "qk_rope_head_dim": 8,
        "head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 32,
        "sliding_window": 16,
        "shared_experts_intermediate_size": 32,
        **{f"swa_{name}": value for name, value in LATENT.items()},
        "swa_head_dim": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
    }
    vision = {
        "mlp_layer_types": ["dense", "sparse"],
        "num_local_experts": 4,
        "moe_intermediate_size": 16,
        "adapter_in_dim": 32,
        "adapter_out_dim": WIDTH,
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "feature_size": 8,
        "downsample_hidden_size": 4,
        "adapter_input_size": 32,
        "adapter_out_dim": WIDTH,
    }
    kind = tf.Dots3NoteForConditionalGeneration
    return _grid("Dots3", tf.Dots3NoteConfig, kind, text, vision, patch=FLAT, types=None, audio_config=audio)


def minimax_m3() -> Family:
    """Two layers whose indexer opens blocks of keys, another mask for each key head; here one block holds everything."""
    text = {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 32,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 64,
        "index_topk_blocks": 1,
    }
    more = {"types": None, "sharp": {"q_norm.weight": 4}, "projector_hidden_size": 32, "image_token_index": IMAGE}
    return _grid("MiniMax-M3-VL", tf.MiniMaxM3VLConfig, tf.MiniMaxM3SparseForConditionalGeneration, text, {}, **more)


# ---------------------------------------------------------------------------------- grids under another name or counted


def hunyuan_vl() -> Family:
    """A newline after each row of an image, a begin and an end, all under the image id; four axes of positions.

    The last axis, which counts the images of the whole batch, gets no frequencies: a row would depend on those before it.
    """

    def image_tokens(row: int) -> list[int]:
        height, width = _shape(row)
        return [height // 2 * (width // 2 + 1) + 2]

    text = {**_rope(3, 3, 2, 0), "head_dim": 16}
    kind, more = (
        tf.HunYuanVLForConditionalGeneration,
        {"patch": FLAT, "image_tokens": image_tokens, "sharp": {"query_layernorm.weight": 4}},
    )
    return _grid("HunYuan-VL", tf.HunYuanVLConfig, kind, text, {"max_image_size": 16}, **more)


def video_llama3() -> Family:
    """Qwen2 text; the number of patches to merge is an input, one for each image."""
    text, kind = {"model_type": "qwen2"}, tf.VideoLlama3ForConditionalGeneration
    made = _grid("VideoLlama3", tf.VideoLlama3Config, kind, text, {}, patch=FLAT, types=None)

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        return {**_patches(rows, FLAT), "image_merge_sizes": torch.full((len(rows),), 2)}

    return Family(made.name, made.model, made.image_tokens, image_inputs)


def kimi_k25() -> Family:
    """DeepSeek-V3 text: latent attention, experts. The side of a merged block is ``merge_kernel_size``."""
    text = {**LATENT, **ROUTED, "qk_rope_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    vision = {"pos_emb_height": 4, "pos_emb_width": 4, "merge_kernel_size": (2, 2)}
    more = {"projection_hidden_size": 32, "tie_word_embeddings": False, "sharp": {"q_b_proj.weight": 4}}
    kind, patch = tf.Kimi_K25ForConditionalGeneration, (3, PATCH, PATCH)
    return _grid("Kimi-K2.5", tf.Kimi_K25Config, kind, text, vision, patch=patch, types=None, **more)


def muse_glimmer() -> Family:
    """Windows, a full layer without positions, gated outputs, logits scaled and capped; ``merge_size`` patches a side."""
    return _muse("MuseGlimmer", tf.MuseGlimmerConfig, tf.MuseGlimmerForConditionalGeneration, {})


def muse_spark() -> Family:
    """MuseGlimmer with experts, gated residuals and an audio tower."""
    text = {**EXPERTS, "num_local_experts": 4, "moe_hidden_size": 32}
    audio = {
        "patch_sizes": (2, 2),
        "hidden_sizes": (8, 16),
        "depths": (1, 1),
        "num_hidden_layers": 2,
        "out_hidden_size": WIDTH,
    }
    return _muse("MuseSpark", tf.MuseSparkConfig, tf.MuseSparkForConditionalGeneration, text, audio_config=audio)


def _muse(name: str, config: Any, kind: type[PreTrainedModel], text: dict[str, Any], **more: Any) -> Family:
    text = {**text, "head_dim": 16, "sliding_window": 16, "layer_types": SLIDING}
    vision = {"pos_emb_height": 4, "pos_emb_width": 4}
    return _grid(name, config, kind, text, vision, types=None, out_hidden_size=128, projector_hidden_size=32, **more)


def lfm3_vl() -> Family:
    """Convolution, a window, a full layer; the final norm is ``embedding_norm``."""
    text = {
        "layer_types": ["conv", "sliding_attention", "full_attention"],
        "sliding_window": 16,
        "head_dim": 16,
        "conv_L_cache": 3,
    }
    vision = {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    kind = tf.Lfm3VlForConditionalGeneration
    return _grid("Lfm3-VL", tf.Lfm3VlConfig, kind, text, vision, types=None, projector_hidden_size=64)


INKLING: dict[str, Any] = {
    "head_dim": 12,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 12,
    "sliding_window_size": 16,
    "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
    "d_rel": 4,
    "rel_extent": 16,
    "route_scale": 2.0,
    "unpadded_vocab_size": 124,
    **ROUTED,
}


def inkling() -> Family:
    """Keys and values through short convolutions, distances as a bias; one token per patch, and no grid as an input."""

    def image_tokens(row: int) -> list[int]:
        return [4 + 2 * (row % 3)]

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([draw_noise(row, *image_tokens(row), 2, PATCH, PATCH, 3) for row in rows])}

    config = tf.InklingConfig(
        text_config={
            **TEXT,
            **INKLING,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "logits_mup_width_multiplier": 2.0,
        },
        vision_config={"patch_size": PATCH, "num_hidden_layers": 4},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=IMAGE,
    )
    model = _drawn(tf.InklingForConditionalGeneration, config, {"q_norm.weight": 4})
    return Family("Inkling", model, image_tokens, image_inputs)


def inkling2() -> Family:
    """Eager alone: a sink in each row of scores, which the hidden state decides; grid and pixels are in merged tokens."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        made = _patches(rows, (1,))["image_grid_thw"] // torch.tensor([1, 2, 2])
        pixels = [draw_noise(row, *_merged(row), 2 * PATCH, 2 * PATCH, 3) for row in rows]
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": made}

    config = tf.Inkling2Config(
        text_config={**TEXT, **INKLING, "n_layers_per_attn_res_block": 2},
        vision_config={**GRID, "posemb_grid_size": 4, "projection_hidden_dim": 64, "text_hidden_size": WIDTH},
        image_token_id=IMAGE,
    )
    model = _drawn(tf.Inkling2ForConditionalGeneration, config, {"q_proj.weight": 4, "k_proj.weight": 4}, attention="eager")
    return Family("Inkling2", model, _merged, image_inputs)


MAKERS: dict[str, Callable[[], Family]] = {
    "Qwen2.5-VL (video)": qwen2_5_vl_video,
    "Qwen2-VL": qwen2_vl,
    "Qwen3-VL-MoE": qwen3_vl_moe,
    "Qwen3.5": qwen3_5,
    "Qwen3.5-MoE": qwen3_5_moe,
    "Qwen2.5-Omni": qwen2_5_omni,
    "Qwen3-Omni": qwen3_omni,
    "Cosmos3-Omni": cosmos3_omni,
    "Cosmos3-Edge": cosmos3_edge,
    "CohereCompass": cohere_compass,
    "GLM-4V": glm4v,
    "GLM-4.6V": glm46v,
    "GLM-4V-MoE": glm4v_moe,
    "GLM-OCR": glm_ocr,
    "GLM5-next": glm5_next,
    "Ernie4.5-VL-MoE": ernie4_5_vl_moe,
    "PaddleOCR-VL": paddleocr_vl,
    "Exaone4.5": exaone4_5,
    "HyperCLOVAX-v2": hyperclovax,
    "Dots3": dots3,
    "MiniMax-M3-VL": minimax_m3,
    "HunYuan-VL": hunyuan_vl,
    "VideoLlama3": video_llama3,
    "Kimi-K2.5": kimi_k25,
    "MuseGlimmer": muse_glimmer,
    "MuseSpark": muse_spark,
    "Lfm3-VL": lfm3_vl,
    "Inkling": inkling,
    "Inkling2": inkling2,
}

_PLAIN = "h/2 x w/2 from image_grid_thw and spatial_merge_size, row-major"
LAYOUTS: dict[str, str] = {
    "Qwen2.5-VL (video)": "frames (pairs of them) of h/2 x w/2 from video_grid_thw, row-major; an id of its own",
    **dict.fromkeys(MAKERS, _PLAIN),
    "HunYuan-VL": "begin, h/2 rows of w/2 image tokens and a newline, end, all with the image id; h, w from image_grid_thw",
    "VideoLlama3": "h/m x w/m from image_grid_thw, row-major, m from image_merge_sizes",
    "Kimi-K2.5": "h/2 x w/2 from image_grid_thw and merge_kernel_size, row-major",
    "MuseGlimmer": "h/2 x w/2 from image_grid_thw and merge_size, row-major",
    "MuseSpark": "h/2 x w/2 from image_grid_thw and merge_size, row-major",
    "Inkling": "ceil(H/patch) x (W//patch + 1) of the resized image, row-major; no grid among the inputs",
    "Inkling2": "h x w from image_grid_thw, which counts merged image tokens already, row-major",
}
