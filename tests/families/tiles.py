"""Tiny random models of families that cut an image into tiles, views or pages; like `families`, one function each.

``LAYOUTS`` says how the image tokens of one image lie, as read in the family's source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import (
    END,
    IMAGE,
    PAD,
    START,
    TEXT,
    TOWER,
    VOCABULARY,
    WIDTH,
    Family,
    build,
    draw_noise,
    draw_weights,
    several,
    squares,
)

VIDEO = 123
LLAMA: dict[str, Any] = {"model_type": "llama", **TEXT}
QWEN2: dict[str, Any] = {"model_type": "qwen2", **TEXT}
QWEN3: dict[str, Any] = {"model_type": "qwen3", **TEXT, "head_dim": 16}
CLIP: dict[str, Any] = {"model_type": "clip_vision_model", **TOWER, "projection_dim": 32}
SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
PIXTRAL: dict[str, Any] = {"model_type": "pixtral", **TOWER, "image_size": 32, "head_dim": 16}
SAM: dict[str, Any] = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 3,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}


def _pages(rows: Sequence[int]) -> dict[str, Tensor]:
    """``pixel_values`` (images, 3, 32, 32), as `squares` but larger."""
    return {"pixel_values": torch.cat([draw_noise(row, 1 + row % 2, 3, 32, 32) for row in rows])}


def _run(image_tokens: int) -> Callable[[int], list[int]]:
    """One image a row, of two tiles of ``image_tokens`` tokens in odd rows and one in even rows."""
    return lambda row: [image_tokens * (1 + row % 2)]


def _sharpen(model: PreTrainedModel, name: str, times: float = 1.0, plus: float = 0.0) -> PreTrainedModel:
    """Attention more (or less) peaky than `draw_weights` makes it, where that does not know the part that decides it."""
    for path, weight in model.get_decoder().named_parameters():
        if path.endswith(f"self_attn.{name}.weight"):
            weight.data.mul_(times).add_(plus)
    return model


# ------------------------------------------------------------------------------------------------ the LLaVA relatives


def vipllava() -> Family:
    """Features of several layers of the CLIP tower side by side."""
    config = tf.VipLlavaConfig(text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, vision_feature_layer=[-1, -2])
    return Family("VipLlava", build(tf.VipLlavaForConditionalGeneration, config), several(16), squares)


SIZES = ((16, 32), (8, 32), (32, 16))  # the heights and widths of the images of rows 0, 1 and 2
PINPOINTS = [[16, 32], [32, 16]]


def _any_res(config: Any, kind: type[PreTrainedModel], name: str, image_tokens: Sequence[int], **options: Any) -> Family:
    """One image a row, of a base tile and two more; rows of the map that are padding are cut away."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([draw_noise(row, 3, 3, 16, 16) for row in rows]),
            "image_sizes": torch.tensor([SIZES[row % 3] for row in rows]),
        }

    made = config(image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, tie_word_embeddings=False, **options)
    return Family(name, build(kind, made), lambda row: [image_tokens[row % 3]], image_inputs)


def llava_next() -> Family:
    """A base tile, then any-res rows that end in a newline token, all with the image's id."""
    return _any_res(
        tf.LlavaNextConfig,
        tf.LlavaNextForConditionalGeneration,
        "LLaVA-NeXT",
        (16 + 4 * 9, 16 + 2 * 9, 16 + 8 * 5),
        text_config=LLAMA,
        vision_config=CLIP,
    )


def llava_next_video() -> Family:
    """As LLaVA-NeXT; its pooler is for videos alone."""
    return _any_res(
        tf.LlavaNextVideoConfig,
        tf.LlavaNextVideoForConditionalGeneration,
        "LLaVA-NeXT-Video",
        (16 + 4 * 9, 16 + 2 * 9, 16 + 8 * 5),
        text_config=LLAMA,
        vision_config=CLIP,
        video_token_index=VIDEO,
    )


def llava_onevision() -> Family:
    """Qwen2 text, SigLIP tower; any-res maps of more than one tile's tokens are shrunk."""
    return _any_res(
        tf.LlavaOnevisionConfig,
        tf.LlavaOnevisionForConditionalGeneration,
        "LLaVA-OneVision",
        (16 + 2 * 6, 16 + 2 * 9, 16 + 5 * 3),
        text_config=QWEN2,
        vision_config=SIGLIP,
        video_token_index=VIDEO,
        vision_aspect_ratio="anyres_max_1",
    )


def video_llava() -> Family:
    """Two CLIP towers, one of them for videos."""
    config = tf.VideoLlavaConfig(text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, video_token_index=VIDEO)
    return Family("VideoLLaVA", build(tf.VideoLlavaForConditionalGeneration, config), several(16), squares)


# -------------------------------------------------------------------------------------------------- square images


def qianfan_ocr() -> Family:
    """InternVL's tower with Qwen3 text; tiles of one image in one run."""
    config = tf.QianfanOCRConfig(
        text_config=QWEN3,
        vision_config={**TOWER, "image_size": (16, 16), "patch_size": (4, 4)},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return Family("QianfanOCR", build(tf.QianfanOCRForConditionalGeneration, config), _run(4), squares)


def llama4() -> Family:
    """Mixture of experts; two layers attend in chunks, one without rotary positions attends to everything."""
    text = {
        **TEXT,
        "head_dim": 16,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 16,
    }
    tower = {
        **TOWER,
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    config = tf.Llama4Config(
        text_config=text, vision_config=tower, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END
    )
    return Family("Llama4", build(tf.Llama4ForConditionalGeneration, config), several(4), squares)


def ovis2() -> Family:
    """An image is a softmax over visual words; START and END are visual words, too."""
    config = tf.Ovis2Config(
        text_config=QWEN2,
        vision_config={**TOWER, "vocab_size": 40, "hidden_stride": 2},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, 124, 125, 126],
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
    )
    model = build(tf.Ovis2ForConditionalGeneration, config)
    model.generation_config.suppress_tokens += [124, 125, 126]
    return Family("Ovis2", model, several(4), squares)


def cohere2_vision() -> Family:
    """Cohere2 text as in AyaVision, with a gated projector and tied embeddings."""
    text = {"model_type": "cohere2", **TEXT, "sliding_window": 8, "logit_scale": 0.25}
    config = tf.Cohere2VisionConfig(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )
    return Family("Cohere2Vision", build(tf.Cohere2VisionForConditionalGeneration, config), several(4), squares)


def shieldgemma2() -> Family:
    """The class of Gemma 3 with a configuration of its own."""
    text = {
        "model_type": "gemma3_text",
        **TEXT,
        "head_dim": 12,
        "query_pre_attn_scalar": 1,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }
    config = tf.ShieldGemma2Config(
        text_config=text,
        vision_config=SIGLIP,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
    )
    model = build(tf.Gemma3ForConditionalGeneration, config)
    return Family("ShieldGemma2", model, several(4), squares, ("token_type_ids", 1, 0))


def janus() -> Family:
    """A tower of its own; the parts that paint images stay idle."""
    config = tf.JanusConfig(
        text_config=LLAMA,
        vision_config={**TOWER, "mlp_ratio": 1.0, "projection_dim": WIDTH, "num_image_tokens": 16},
        vq_config={
            "num_embeddings": 8,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": WIDTH,
            "image_token_embed_dim": WIDTH,
        },
        image_token_id=IMAGE,
    )
    return Family("Janus", build(tf.JanusForConditionalGeneration, config), several(16), squares)


def deepseek_vl() -> Family:
    """SigLIP tower, Llama text, tied embeddings."""
    config = tf.DeepseekVLConfig(text_config=LLAMA, vision_config=SIGLIP, image_token_id=IMAGE)
    return Family("DeepseekVL", build(tf.DeepseekVLForConditionalGeneration, config), several(16), squares)


def deepseek_vl_hybrid() -> Family:
    """DeepseekVL with a SAM tower beside the SigLIP one, whose map is brought to the same grid."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        return {**squares(rows), "high_res_pixel_values": _pages(rows)["pixel_values"]}

    config = tf.DeepseekVLHybridConfig(
        text_config=LLAMA,
        vision_config=SIGLIP,
        high_res_vision_config={"model_type": "sam_vision_model", **SAM},
        image_token_id=IMAGE,
    )
    model = build(tf.DeepseekVLHybridForConditionalGeneration, config)
    return Family("DeepseekVL-Hybrid", model, several(16), image_inputs)


def _got(config: Any, name: str) -> Family:
    made = config(text_config=QWEN2, vision_config=SAM, image_token_index=IMAGE, image_seq_length=4)
    kernels = {"": "eager", "text_config": "sdpa", "vision_config": "eager"}  # the tower has no other
    model = tf.GotOcr2ForConditionalGeneration._from_config(made, attn_implementation=kernels)
    return Family(name, draw_weights(model), _run(4), _pages)


def got_ocr2() -> Family:
    """SAM tower, Qwen2 text; several patches of one image in one run."""
    return _got(tf.GotOcr2Config, "GOT-OCR2")


def pp_chart2table() -> Family:
    """The class of GOT-OCR2 with a configuration of its own."""
    return _got(tf.PPChart2TableConfig, "PPChart2Table")


# ------------------------------------------------------------------------------------------- images of any shape


def _sizes(rows: Sequence[int]) -> dict[str, Tensor]:
    """Images 16 high and 16 or 24 wide in one tensor, with their ``image_sizes``."""
    sizes = [(16, 16 + 8 * (row % 2)) for row in rows]
    pixels = torch.zeros(len(rows), 3, 16, 24)
    for i, row in enumerate(rows):
        pixels[i, :, :, : sizes[i][1]] = draw_noise(row, 3, *sizes[i])
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def lighton_ocr() -> Family:
    """Mistral3's tower with Qwen3 text and tied embeddings, without break tokens."""
    config = tf.LightOnOcrConfig(text_config=QWEN3, vision_config=PIXTRAL, image_token_id=IMAGE)
    model = build(tf.LightOnOcrForConditionalGeneration, config)
    return Family("LightOnOCR", model, lambda row: [4 + 2 * (row % 2)], _sizes)


def mistral_large4() -> Family:
    """Latent attention over the keys that an indexer picks, values narrower than keys, capped logits."""
    text = {
        **TEXT,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "index_topk": 12,
        "index_head_dim": 16,
        "index_n_heads": 16,  # with fewer, keys tie at a score of zero
        "no_rope_layer_interval": 3,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "mscale_all_dim": 1.0,
        },
    }
    config = tf.MistralLarge4Config(text_config=text, vision_config=PIXTRAL, image_token_index=IMAGE)
    model = _sharpen(build(tf.MistralLarge4ForConditionalGeneration, config), "q_proj", times=4)
    return Family("Mistral-Large-4", model, lambda row: [4 + 2 * (row % 2)], _sizes)


def lfm2_vl() -> Family:
    """Short convolutions between the attention layers; SigLIP 2 patches padded to one length."""

    def width(row: int) -> int:
        return 4 + 2 * (row % 3)

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        most = max(4 * width(row) for row in rows)
        pixels, mask = torch.zeros(len(rows), most, 3 * 4 * 4), torch.zeros(len(rows), most, dtype=torch.long)
        for i, row in enumerate(rows):
            pixels[i, : 4 * width(row)] = draw_noise(row, 4 * width(row), 3 * 4 * 4)
            mask[i, : 4 * width(row)] = 1
        shapes = torch.tensor([(4, width(row)) for row in rows])
        return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}

    tower = {key: value for key, value in TOWER.items() if key != "image_size"}
    config = tf.Lfm2VlConfig(
        text_config={
            "model_type": "lfm2",
            **TEXT,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "full_attention"],
        },
        vision_config={"model_type": "siglip2_vision_model", **tower, "num_patches": 16, "vision_use_head": False},
        image_token_id=IMAGE,
        projector_hidden_size=32,
    )
    model = _sharpen(build(tf.Lfm2VlForConditionalGeneration, config), "q_layernorm", times=3)
    return Family("Lfm2-VL", model, lambda row: [width(row)], image_inputs)


def _global_and_local(side: int) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """A view of 32 x 32 and, in odd rows two and else one, local patches of ``side`` x ``side``."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.cat([draw_noise(row, 1, 3, 32, 32) for row in rows]),
            "pixel_values_local": torch.cat([draw_noise(row + 50, 1 + row % 2, 3, side, side) for row in rows]),
            "num_local_patches": torch.tensor([1 + row % 2 for row in rows]),
        }

    return image_inputs


EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
SAM_ENCODER: dict[str, Any] = {**SAM, "downsample_channels": [16, 32]}


def step3p7() -> Family:
    """Sliding layers with more heads than full ones, gated outputs, mixture of experts."""
    text = {
        **TEXT,
        **EXPERTS,
        "head_dim": 16,
        "share_expert_dim": 32,
        "sliding_window": 12,
        "num_sliding_attention_heads": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    config = tf.Step3p7Config(
        text_config=text, vision_config={**TOWER, "image_size": 32, "mlp_ratio": 1.0}, image_token_id=IMAGE
    )
    model = _sharpen(build(tf.Step3p7ForConditionalGeneration, config), "q_norm", plus=1)
    return Family("Step3p7", model, lambda row: [4 + 1 + row % 2], _global_and_local(16))


def deepseek_ocr2() -> Family:
    """SAM tower, then a language model whose last queries are the image tokens: four here, in place of its 144."""
    config = tf.DeepseekOcr2Config(
        text_config={**TEXT, **EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        vision_config={
            "sam_config": SAM_ENCODER,
            "encoder_config": {**TEXT, "hidden_size": 32, "num_hidden_layers": 2},
        },
        image_token_id=IMAGE,
    )
    model = tf.DeepseekOcr2ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.model.vision_tower.query_768_resolution = nn.Embedding(4, 32)
    return Family("DeepseekOCR2", draw_weights(model), lambda row: [4 * (2 + row % 2) + 1], _global_and_local(32))


def unlimited_ocr() -> Family:
    """SAM and CLIP towers in a chain; written words see the whole prompt and the last few words."""
    patches = _global_and_local(16)

    def image_inputs(rows: Sequence[int]) -> dict[str, Any]:
        made = patches(rows)
        # The processor leaves these two as lists.
        return {
            **made,
            "num_local_patches": made["num_local_patches"].tolist(),
            "patches_grid": [[1, 1 + row % 2] for row in rows],
        }

    config = tf.UnlimitedOcrConfig(
        text_config={**TEXT, **EXPERTS, "num_key_value_heads": 4, "n_shared_experts": 1},
        vision_config={"sam_config": SAM_ENCODER, "encoder_config": {**TOWER, "image_size": 8}},
        image_token_id=IMAGE,
    )
    model = build(tf.UnlimitedOcrForConditionalGeneration, config)
    return Family("UnlimitedOCR", model, lambda row: [2 * 3 + 1 + 2 * (1 + row % 2)], image_inputs)


# ------------------------------------------------------------------------------------------------------- the Gemmas


def _gemma4(config: Any, kind: type[PreTrainedModel], name: str, patch: int, pool: int, **options: Any) -> Family:
    """Images as a list of patches with their locations, padded; ``pool`` x ``pool`` patches are a token."""

    def shape(row: int) -> tuple[int, int]:
        return 2 * pool, (2 + row % 2) * pool

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        most = max(h * w for h, w in map(shape, rows))
        pixels, places = torch.zeros(len(rows), most, 3 * patch * patch), torch.full((len(rows), most, 2), -1)
        for i, row in enumerate(rows):
            h, w = shape(row)
            pixels[i, : h * w] = draw_noise(row, h * w, 3 * patch * patch).sigmoid()
            places[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1)
        return {"pixel_values": pixels, "image_position_ids": places}

    text = {
        **TEXT,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "global_head_dim": 24,
        "num_kv_shared_layers": 2,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
    }
    options["text_config"] = {**text, **options["text_config"]}
    special = {"boi_token_id": START, "eoi_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO}
    made = config(**options, **special, boa_token_id=124, audio_token_id=125, eoa_token_index=126)
    model = _sharpen(build(kind, made), "q_norm", times=0.2)  # it does not divide scores by the root of the head's width
    model.generation_config.suppress_tokens += [124, 125, 126]
    return Family(name, model, lambda row: [2 * (2 + row % 2)], image_inputs, ("mm_token_type_ids", 1, 0))


def gemma4() -> Family:
    """Full layers with wider heads than sliding ones; the last layers use the keys of earlier ones."""
    return _gemma4(
        tf.Gemma4Config,
        tf.Gemma4ForConditionalGeneration,
        "Gemma4",
        patch=4,
        pool=2,
        text_config={"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
        vision_config={
            **TOWER,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
    )


def gemma4_unified() -> Family:
    """Gemma 4 without a tower: pixels are projected into the text model."""
    return _gemma4(
        tf.Gemma4UnifiedConfig,
        tf.Gemma4UnifiedForConditionalGeneration,
        "Gemma4-unified",
        patch=8,
        pool=1,
        text_config={},
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        },
    )


# ------------------------------------------------------------------------------------------------------ the MiniCPMs


def _minicpm(config: Any, kind: type[PreTrainedModel], name: str, merge: int, **options: Any) -> Family:
    """Only some layers of Qwen3.5 attend; ``merge`` x ``merge`` patches are a token."""

    def shape(row: int) -> tuple[int, int]:
        return 2 * merge, (2 + row % 2) * merge

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        shapes = [shape(row) for row in rows]
        strips = [draw_noise(row, 1, 3, 4, 4 * h * w) for row, (h, w) in zip(rows, shapes, strict=True)]
        return {"pixel_values": torch.cat(strips, dim=3), "target_sizes": torch.tensor(shapes, dtype=torch.int32)}

    text = {
        "model_type": "qwen3_5_text",
        **TEXT,
        "head_dim": 16,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    made = config(
        text_config=text, vision_config=TOWER, insert_layer_id=0, image_token_id=IMAGE, video_token_id=VIDEO, **options
    )
    model = _sharpen(build(kind, made), "q_norm", plus=0.5)
    return Family(name, model, lambda row: [2 * (2 + row % 2)], image_inputs)


def minicpmv4_6() -> Family:
    """Patches are merged inside the tower and after it."""
    return _minicpm(tf.MiniCPMV4_6Config, tf.MiniCPMV4_6ForConditionalGeneration, "MiniCPM-V 4.6", merge=4)


def minicpmv4_7() -> Family:
    """As 4.6, with three-dimensional positions, for which it needs to know the markers of slices."""
    kind = _minicpm(
        tf.MiniCPMV4_7Config,
        tf.MiniCPMV4_7ForConditionalGeneration,
        "MiniCPM-V 4.7",
        merge=4,
        image_start_id=START,
        image_end_id=END,
        slice_start_id=124,
        slice_end_id=125,
        newline_id=126,
    )
    kind.model.generation_config.suppress_tokens += [124, 125, 126]
    return replace(kind, types=("mm_token_type_ids", 1, 0))


def minicpm_ocr() -> Family:
    """As 4.6 without the merger inside the tower; tied embeddings."""
    return _minicpm(tf.MiniCPMOcrConfig, tf.MiniCPMOcrForConditionalGeneration, "MiniCPM-OCR", merge=2)


# --------------------------------------------------------------------------------------------- Granite and Molmo


GRANITE: dict[str, Any] = {
    **TEXT,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 0.5,
}


def granite4_vision() -> Family:
    """Any-res as in LLaVA-NeXT, shrunk by window Q-Formers; features enter at several layers."""
    return _any_res(
        tf.Granite4VisionConfig,
        tf.Granite4VisionForConditionalGeneration,
        "Granite4Vision",
        (16 + 4 * 9, 16 + 2 * 9, 16 + 8 * 5),
        text_config=GRANITE,
        vision_config={**CLIP, "hidden_size": 64, "patch_size": 2},
        qformer_config={"num_hidden_layers": 1, "intermediate_size": 32, "cross_attention_frequency": 1},
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0], [2, 1]],
        spatial_target_layers=[2],
    )


def granite_docling() -> Family:
    """Tiles in a second axis, padded; tower features added after the first layers; scaled logits."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        most = max(1 + row % 2 for row in rows)
        pixels, mask = torch.zeros(len(rows), most, 3, 16, 16), torch.zeros(len(rows), most, dtype=torch.bool)
        for i, row in enumerate(rows):
            pixels[i, : 1 + row % 2] = draw_noise(row, 1 + row % 2, 3, 16, 16)
            mask[i, : 1 + row % 2] = True
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    config = tf.GraniteDoclingConfig(
        text_config=GRANITE,
        vision_config={**TOWER, "out_hidden_size": WIDTH, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    return Family("GraniteDocling", build(tf.GraniteDoclingForConditionalGeneration, config), several(4), image_inputs)


def molmo2() -> Family:
    """Pooled patches are named by their number in the batch; all image tokens see each other."""

    def shape(row: int) -> tuple[int, int]:
        return 1 + (row + 1) % 2, 2  # of the high-resolution view; that of the whole image is 2 x 2

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        grids = torch.tensor([(2, 2, *shape(row)) for row in rows])
        windows = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)  # 2 x 2 windows of 4 x 4 patches
        pooling = []
        for i, row in enumerate(rows):
            h, w = shape(row)
            pooling += [windows + 32 * i, windows[: h * w] + 32 * i + 16]
        pixels = torch.cat([draw_noise(row, 2, 16, 3 * 4 * 4) for row in rows])
        return {"pixel_values": pixels, "image_token_pooling": torch.cat(pooling), "image_grids": grids}

    tower = {"num_key_value_heads": 2, "head_dim": 16}
    config = tf.Molmo2Config(
        text_config={**TEXT, "head_dim": 16, "additional_vocab_size": 8},
        vision_config={**TOWER, **tower, "image_size": [16, 16]},
        adapter_config={
            "vision_feature_layer": [-1, -2],
            "hidden_size": 32,
            "num_attention_heads": 2,
            **tower,
            "intermediate_size": 32,
            "text_hidden_size": WIDTH,
        },
        image_patch_id=IMAGE,
        image_start_token_id=START,
        low_res_image_start_token_id=START,
        image_end_token_id=END,
        frame_start_token_id=124,
        frame_end_token_id=125,
    )
    model = _sharpen(build(tf.Molmo2ForConditionalGeneration, config), "q_norm", times=0.5)
    return Family("Molmo2", model, lambda row: [4 + shape(row)[0] * 2], image_inputs, ("mm_token_type_ids", 1, 0))


MAKERS: dict[str, Callable[[], Family]] = {
    "VipLlava": vipllava,
    "LLaVA-NeXT": llava_next,
    "LLaVA-NeXT-Video": llava_next_video,
    "LLaVA-OneVision": llava_onevision,
    "VideoLLaVA": video_llava,
    "QianfanOCR": qianfan_ocr,
    "Llama4": llama4,
    "Ovis2": ovis2,
    "Cohere2Vision": cohere2_vision,
    "ShieldGemma2": shieldgemma2,
    "Janus": janus,
    "DeepseekVL": deepseek_vl,
    "DeepseekVL-Hybrid": deepseek_vl_hybrid,
    "GOT-OCR2": got_ocr2,
    "PPChart2Table": pp_chart2table,
    "LightOnOCR": lighton_ocr,
    "Mistral-Large-4": mistral_large4,
    "Lfm2-VL": lfm2_vl,
    "Step3p7": step3p7,
    "DeepseekOCR2": deepseek_ocr2,
    "UnlimitedOCR": unlimited_ocr,
    "Gemma4": gemma4,
    "Gemma4-unified": gemma4_unified,
    "MiniCPM-V 4.6": minicpmv4_6,
    "MiniCPM-V 4.7": minicpmv4_7,
    "MiniCPM-OCR": minicpm_ocr,
    "Granite4Vision": granite4_vision,
    "GraniteDocling": granite_docling,
    "Molmo2": molmo2,
}

LAYOUTS: dict[str, str] = {
    "VipLlava": "24 x 24 row-major, fixed (image_size / patch_size), CLS dropped",
    "LLaVA-NeXT": "base 24 x 24 first, then the unpadded any-res map, each row ended by a newline token; one run, one id",
    "LLaVA-NeXT-Video": "as LLaVA-NeXT; videos are frames x pooled grid under another id",
    "LLaVA-OneVision": "as LLaVA-NeXT with 27 x 27, map shrunk to 9 tiles' tokens; several images: 27 x 27 + newline each",
    "VideoLLaVA": "16 x 16 row-major, fixed, CLS dropped; 257 tokens a frame, CLS kept, under another id",
    "QianfanOCR": "tiles of 16 x 16 in one run, row by row, thumbnail last; no separator, the run's length tells their number",
    "Llama4": "tiles of 12 x 12 row-major between separators (x within a row, y after it), global tile last",
    "Ovis2": "global 16 x 16 first, then tiles row by row between <IMG_COL> and <IMG_ROW>",
    "Cohere2Vision": "tiles of 16 x 16, row by row, thumbnail last; a line-break token (other id) after each tile",
    "ShieldGemma2": "16 x 16 row-major, fixed (mm_tokens_per_image)",
    "Janus": "24 x 24 row-major, fixed",
    "DeepseekVL": "24 x 24 row-major, fixed",
    "DeepseekVL-Hybrid": "24 x 24 row-major, fixed, for both towers",
    "GOT-OCR2": "patches of 16 x 16 in one run, row by row, thumbnail last; no separator, nor between pages",
    "PPChart2Table": "16 x 16 row-major, one page an image",
    "LightOnOCR": "h/(patch*merge) x w/(patch*merge) from image_sizes, row-major, no break token",
    "Mistral-Large-4": "h/(patch*merge) x w/(patch*merge) from image_sizes, row-major",
    "Lfm2-VL": "h/2 x w/2 of spatial_shapes row-major; tiles behind <|img_row_i_col_j|>, thumbnail last",
    "Step3p7": "local patches first, each between <patch_start> and <patch_end>, then the global view; squares, row-major",
    "DeepseekOCR2": "latent queries (144 or 256 a view), no grid: local views, global view, one separator; one run, one id",
    "UnlimitedOCR": "local map rows*l x (cols*l + newline) first, then global n x (n + newline), a separator; one run, one id",
    "Gemma4": "h/(patch*pool) x w/(patch*pool) from image_position_ids (x, y; -1 is padding), row-major",
    "Gemma4-unified": "h/(patch*pool) x w/(patch*pool), one token a row of image_position_ids (x, y; -1 is padding)",
    "MiniCPM-V 4.6": "h/4 x w/4 of target_sizes row-major; overview first, then slices row by row, rows ended by a line break",
    "MiniCPM-V 4.7": "as MiniCPM-V 4.6",
    "MiniCPM-OCR": "as MiniCPM-V 4.6 with h/2 x w/2 of target_sizes",
    "Granite4Vision": "as LLaVA-NeXT, after each side of a tile is multiplied by downsample_rate",
    "GraniteDocling": "tiles (32/scale_factor squared) behind <row_i_col_j>, global tile last; row-major",
    "Molmo2": "low-resolution view first, then the high-resolution one (image_grids), rows ended by <im_col> (other id)",
}
