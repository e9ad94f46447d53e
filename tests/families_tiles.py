"""Tiny random models of families that cut a picture into tiles, views or pages; like `families`, one function each.

``LAYOUTS`` says how the image tokens of one picture lie, as read in the family's source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf
from families import END, IMAGE, PAD, START, TEXT, TOWER, VOCABULARY, WIDTH, Family, _build, _noise, _several, _squares
from torch import Tensor
from transformers import PreTrainedModel

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
    """``pixel_values`` (pictures, 3, 32, 32), as `_squares` but larger."""
    return {"pixel_values": torch.cat([_noise(row, 1 + row % 2, 3, 32, 32) for row in rows])}


def _run(cells: int) -> Callable[[int], list[int]]:
    """One picture a row, of two tiles of ``cells`` tokens in odd rows and one in even rows."""
    return lambda row: [cells * (1 + row % 2)]


# ------------------------------------------------------------------------------------------------ the LLaVA relatives


def vipllava() -> Family:
    """Features of several layers of the CLIP tower side by side."""
    config = tf.VipLlavaConfig(text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, vision_feature_layer=[-1, -2])
    return Family("VipLlava", _build(tf.VipLlavaForConditionalGeneration, config), _several(16), _squares)


SIZES = ((16, 32), (8, 32), (32, 16))  # the heights and widths of the pictures of rows 0, 1 and 2
PINPOINTS = [[16, 32], [32, 16]]


def _any_res(config: Any, kind: type[PreTrainedModel], name: str, cells: Sequence[int], **options: Any) -> Family:
    """One picture a row, of a base tile and two more; rows of the map that are padding are cut away."""

    def pictures(rows: Sequence[int]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([_noise(row, 3, 3, 16, 16) for row in rows]),
            "image_sizes": torch.tensor([SIZES[row % 3] for row in rows]),
        }

    made = config(image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, tie_word_embeddings=False, **options)
    return Family(name, _build(kind, made), lambda row: [cells[row % 3]], pictures)


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
    return Family("VideoLLaVA", _build(tf.VideoLlavaForConditionalGeneration, config), _several(16), _squares)


# -------------------------------------------------------------------------------------------------- square pictures


def qianfan_ocr() -> Family:
    """InternVL's tower with Qwen3 text; tiles of one picture in one run."""
    config = tf.QianfanOCRConfig(
        text_config=QWEN3,
        vision_config={**TOWER, "image_size": (16, 16), "patch_size": (4, 4)},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return Family("QianfanOCR", _build(tf.QianfanOCRForConditionalGeneration, config), _run(4), _squares)


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
    return Family("Llama4", _build(tf.Llama4ForConditionalGeneration, config), _several(4), _squares)


def ovis2() -> Family:
    """A picture is a softmax over visual words; START and END are visual words, too."""
    config = tf.Ovis2Config(
        text_config=QWEN2,
        vision_config={**TOWER, "vocab_size": 40, "hidden_stride": 2},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, 124, 125, 126],
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
    )
    model = _build(tf.Ovis2ForConditionalGeneration, config)
    model.generation_config.suppress_tokens += [124, 125, 126]
    return Family("Ovis2", model, _several(4), _squares)


def cohere2_vision() -> Family:
    """Cohere2 text as in AyaVision, with a gated projector and tied embeddings."""
    text = {"model_type": "cohere2", **TEXT, "sliding_window": 8, "logit_scale": 0.25}
    config = tf.Cohere2VisionConfig(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )
    return Family("Cohere2Vision", _build(tf.Cohere2VisionForConditionalGeneration, config), _several(4), _squares)


def shieldgemma2() -> Family:
    """The class of Gemma 3 with a configuration of its own."""
    text = {
        "model_type": "gemma3_text",
        **TEXT,
        "head_dim": 12,
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
    model = _build(tf.Gemma3ForConditionalGeneration, config)
    return Family("ShieldGemma2", model, _several(4), _squares, ("token_type_ids", 1, 0))


def janus() -> Family:
    """A tower of its own; the parts that paint pictures stay idle."""
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
    return Family("Janus", _build(tf.JanusForConditionalGeneration, config), _several(16), _squares)


def deepseek_vl() -> Family:
    """SigLIP tower, Llama text, tied embeddings."""
    config = tf.DeepseekVLConfig(text_config=LLAMA, vision_config=SIGLIP, image_token_id=IMAGE)
    return Family("DeepseekVL", _build(tf.DeepseekVLForConditionalGeneration, config), _several(16), _squares)


def deepseek_vl_hybrid() -> Family:
    """DeepseekVL with a SAM tower beside the SigLIP one, whose map is brought to the same grid."""

    def pictures(rows: Sequence[int]) -> dict[str, Tensor]:
        return {**_squares(rows), "high_res_pixel_values": _pages(rows)["pixel_values"]}

    config = tf.DeepseekVLHybridConfig(
        text_config=LLAMA,
        vision_config=SIGLIP,
        high_res_vision_config={"model_type": "sam_vision_model", **SAM},
        image_token_id=IMAGE,
    )
    model = _build(tf.DeepseekVLHybridForConditionalGeneration, config)
    return Family("DeepseekVL-Hybrid", model, _several(16), pictures)


def _got(config: Any, name: str, **options: Any) -> Family:
    made = config(text_config=QWEN2, vision_config=SAM, image_token_index=IMAGE, image_seq_length=4, **options)
    return Family(name, _build(tf.GotOcr2ForConditionalGeneration, made), _run(4), _pages)


def got_ocr2() -> Family:
    """SAM tower, Qwen2 text; several patches of one picture in one run."""
    return _got(tf.GotOcr2Config, "GOT-OCR2")


def pp_chart2table() -> Family:
    """The class of GOT-OCR2 with a configuration of its own."""
    return _got(tf.PPChart2TableConfig, "PPChart2Table")


# ------------------------------------------------------------------------------------------- pictures of any shape


def _sizes(rows: Sequence[int]) -> dict[str, Tensor]:
    """Pictures 16 high and 16 or 24 wide in one tensor, with their ``image_sizes``."""
    sizes = [(16, 16 + 8 * (row % 2)) for row in rows]
    pixels = torch.zeros(len(rows), 3, 16, 24)
    for i, row in enumerate(rows):
        pixels[i, :, :, : sizes[i][1]] = _noise(row, 3, *sizes[i])
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def lighton_ocr() -> Family:
    """Mistral3's tower with Qwen3 text and tied embeddings, without break tokens."""
    config = tf.LightOnOcrConfig(text_config=QWEN3, vision_config=PIXTRAL, image_token_id=IMAGE)
    model = _build(tf.LightOnOcrForConditionalGeneration, config)
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
        "index_n_heads": 2,
        "no_rope_layer_interval": 3,
    }
    config = tf.MistralLarge4Config(text_config=text, vision_config=PIXTRAL, image_token_index=IMAGE)
    model = _build(tf.MistralLarge4ForConditionalGeneration, config)
    return Family("Mistral-Large-4", model, lambda row: [4 + 2 * (row % 2)], _sizes)


def lfm2_vl() -> Family:
    """Short convolutions between the attention layers; SigLIP 2 patches padded to one length."""

    def width(row: int) -> int:
        return 4 + 2 * (row % 3)

    def pictures(rows: Sequence[int]) -> dict[str, Tensor]:
        most = max(4 * width(row) for row in rows)
        pixels, mask = torch.zeros(len(rows), most, 3 * 4 * 4), torch.zeros(len(rows), most, dtype=torch.long)
        for i, row in enumerate(rows):
            pixels[i, : 4 * width(row)] = _noise(row, 4 * width(row), 3 * 4 * 4)
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
    model = _build(tf.Lfm2VlForConditionalGeneration, config)
    return Family("Lfm2-VL", model, lambda row: [width(row)], pictures)


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
}

LAYOUTS: dict[str, str] = {}
