"""Further families of AutoModelForImageTextToText, tiny and random like those of `families`.

LAYOUTS says how the image tokens of one image lie. OTHERS holds the classes whose words see the image by another way
than image tokens among the prompt's keys; their batches are what the class takes, with ``input_ids`` where it takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

from families import (
    END,
    IMAGE,
    PAD,
    TEXT,
    TOWER,
    VOCABULARY,
    WIDTH,
    Family,
    build,
    draw_noise,
    draw_weights,
    seeded,
    several,
    squares,
)

LLAMA: dict[str, Any] = {"model_type": "llama", **TEXT}
QFORMER: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "cross_attention_frequency": 1,
    "max_position_embeddings": 16,
}
KOSMOS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "embed_dim": WIDTH,
    "ffn_dim": 64,
    "layers": 3,
    "attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,  # or the model would say one word over and over
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "d_kv": 12,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "pad_token_id": PAD,
    "eos_token_id": None,
}
CODES = 8  # entries of a codebook; each is a token of the vocabulary, from 100 on


@dataclass(frozen=True)
class LevelFamily(Family):
    """Rows of one length, for classes that miscount the positions of left-padded rows while they write."""

    def _prompt(self, row: int) -> Tensor:
        prompt = super()._prompt(row)
        return torch.cat((prompt, torch.randint(2, IMAGE, (40 - len(prompt),), generator=seeded(50 + row))))


@dataclass(frozen=True)
class EncodedFamily(Family):
    """An encoder reads the prompts, padded on the right since some count positions from the left; a decoder writes."""

    def batch(self, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
        made = super().batch(rows)
        for row, padding in enumerate((made["attention_mask"] == 0).sum(1).tolist()):
            for name in ("input_ids", "attention_mask"):
                made[name][row] = made[name][row].roll(-padding)
        return made

    def extended(self, inputs: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
        return {**inputs, "decoder_input_ids": torch.cat((torch.ones_like(written[:, :1]), written), dim=1)}


@dataclass(frozen=True)
class PromptlessFamily(Family):
    """A class that takes images and no prompt."""

    def batch(self, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
        return self.image_inputs(rows)


def _shifted(model: PreTrainedModel, by: float, *endings: str) -> PreTrainedModel:
    """The model with weights of norms moved away from zero, so that attention is peaky."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(endings):
                weight.add_(by)
    return model


def _calm(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model whose attention is less peaky than `build`'s, where rounding would grow through its layers."""
    return draw_weights(kind._from_config(config, attn_implementation="sdpa"), peak=2.0)


def _inner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A model whose ``generate`` is that of its part ``name``, which gets the same settings."""
    getattr(model, name).generation_config = model.generation_config
    return model


def _starting(model: PreTrainedModel) -> PreTrainedModel:
    """An encoder-decoder whose decoder starts with token 1."""
    model.generation_config.decoder_start_token_id = 1
    return model


def _one_square(rows: Sequence[int]) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([draw_noise(row, 1, 3, 16, 16) for row in rows])}


def _no_image_tokens(_: int) -> list[int]:
    return []


def _grids(rows: Sequence[int]) -> list[tuple[int, int]]:
    return [(4, 4 + 2 * (row % 3)) for row in rows]


# ---------------------------------------------------------------------------------------------------- the families


def idefics2() -> Family:
    """Mistral text, a perceiver with a fixed number of latents, images of a row in a second axis."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        pixels = torch.zeros(len(rows), max(1 + row % 2 for row in rows), 3, 16, 16)
        for i, row in enumerate(rows):
            pixels[i, : 1 + row % 2] = draw_noise(row, 1 + row % 2, 3, 16, 16)
        return {"pixel_values": pixels}

    config = tf.Idefics2Config(
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        vision_config=dict(TOWER),
        perceiver_config={
            "hidden_size": WIDTH,
            "resampler_n_latents": 5,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
    )
    return Family("Idefics2", _calm(tf.Idefics2ForConditionalGeneration, config), several(5), image_inputs)


def aria() -> Family:
    """Experts in the text layers, queries that read the image."""
    config = tf.AriaConfig(
        text_config={"model_type": "aria_text", **TEXT, "intermediate_size": 32, "moe_num_experts": 4},
        vision_config={"model_type": "idefics3_vision", **TOWER},
        projector_patch_to_query_dict={16: 5},
        image_token_index=IMAGE,
    )
    return Family("Aria", _calm(tf.AriaForConditionalGeneration, config), several(5), squares)


def fast_vlm() -> Family:
    """Qwen2 text; a ResNet stands in for timm's convolutional tower, whose output has the same axes."""
    config = tf.FastVlmConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 32],
            "hidden_size": 32,
            "depths": [1, 1],
            "layer_type": "basic",
        },
        image_token_index=IMAGE,
    )
    model = draw_weights(tf.FastVlmForConditionalGeneration._from_config(config))  # a ResNet has no attention to name
    return Family("FastVLM", model, several(4), squares)


def chameleon() -> Family:
    """Images become codes of the text's own vocabulary; normed queries and keys; codes are never written."""
    config = tf.ChameleonConfig(
        **TEXT,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": CODES,
            "latent_channels": 8,
            "resolution": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={"<image>": IMAGE, **{f"IMGIMG{'ABCDEFGH'[code]}Z": 100 + code for code in range(CODES)}},
    )
    model = _shifted(build(tf.ChameleonForConditionalGeneration, config), 1.7, "q_norm.weight", "k_norm.weight")
    return Family("Chameleon", model, several(16), squares)


def emu3() -> Family:
    """Images become codes, one more token ends each row of an image; images of different size in one tensor."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        sizes = torch.tensor([(16, 16 + 8 * (row % 2)) for row in rows])
        return {"pixel_values": torch.cat([draw_noise(row, 1, 3, 16, 24) for row in rows]), "image_sizes": sizes}

    config = tf.Emu3Config(
        text_config=TEXT,
        vq_config={
            "codebook_size": CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [3],
            "hidden_size": 32,
        },
        vocabulary_map={
            "<image>": IMAGE,
            "<|extra_200|>": 99,
            **{f"<|visual token {code:06d}|>": 100 + code for code in range(CODES)},
        },
    )
    model = _calm(tf.Emu3ForConditionalGeneration, config)
    return Family("Emu3", model, lambda row: [2 * (3 + row % 2)], image_inputs)


def fuyu() -> Family:
    """No tower: patches go straight into Persimmon text, whose queries, keys and values are one projection."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([draw_noise(row, 1 + row % 2, 6, 12) for row in rows])}

    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    config = tf.FuyuConfig(text_config={"model_type": "persimmon", **text}, patch_size=2, image_token_id=IMAGE)
    model = _shifted(build(tf.FuyuForCausalLM, config), 0.7, "q_layernorm.weight", "k_layernorm.weight")
    return Family("Fuyu", model, lambda row: [3, 3] * (1 + row % 2), image_inputs)


def blip_2() -> Family:
    """A Q-Former reads the image; OPT text, which has its own ``generate`` and scales its queries itself."""
    config = tf.Blip2Config(
        text_config={
            "model_type": "opt",
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": PAD,
        },
        vision_config=TOWER,
        qformer_config=QFORMER,
        num_query_tokens=5,
        image_token_index=IMAGE,
    )
    model = _inner(build(tf.Blip2ForConditionalGeneration, config), "language_model")
    return Family("BLIP-2", model, several(5), squares)


def blip_2_t5() -> Family:
    """BLIP-2 around T5: the Q-Former's answers are in the encoder, queries are not scaled, positions are biases."""
    config = tf.Blip2Config(
        text_config={
            "model_type": "t5",
            **T5,
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "decoder_start_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "scale_decoder_outputs": False,
        },
        vision_config=TOWER,
        qformer_config=QFORMER,
        num_query_tokens=5,
        image_token_index=IMAGE,
    )
    model = _starting(_inner(build(tf.Blip2ForConditionalGeneration, config), "language_model"))
    return EncodedFamily("BLIP-2 (T5)", model, several(5), squares)


def _instruct_blip(config: Any, kind: type[PreTrainedModel], name: str, token: str, frames: int) -> Family:
    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        shape = (3, 16, 16) if frames == 1 else (frames, 3, 16, 16)
        counts = [1 + row % 2 for row in rows]
        words = torch.cat([torch.randint(1, 16, (n, 4), generator=seeded(row)) for n, row in zip(counts, rows, strict=True)])
        return {
            "pixel_values": torch.cat([draw_noise(row, n, *shape) for n, row in zip(counts, rows, strict=True)]),
            "qformer_input_ids": words,
            "qformer_attention_mask": torch.ones_like(words),
        }

    made = config(text_config=LLAMA, vision_config=TOWER, qformer_config=QFORMER, num_query_tokens=5, **{token: IMAGE})
    return Family(name, _inner(_calm(kind, made), "language_model"), several(5 * frames), image_inputs)


def instruct_blip() -> Family:
    """BLIP-2 whose Q-Former reads the question, too; Llama text."""
    kind = tf.InstructBlipForConditionalGeneration
    return _instruct_blip(tf.InstructBlipConfig, kind, "InstructBLIP", "image_token_index", 1)


def instruct_blip_video() -> Family:
    """InstructBLIP over the frames of a video; the configuration has a video token and no image token."""
    kind = tf.InstructBlipVideoForConditionalGeneration
    return _instruct_blip(tf.InstructBlipVideoConfig, kind, "InstructBlipVideo", "video_token_index", 2)


def kosmos_2() -> Family:
    """A mask says where the latents go; the text part has its own ``generate``; a norm before the output projection."""
    config = tf.Kosmos2Config(text_config=KOSMOS, vision_config=TOWER, latent_query_num=5, tie_word_embeddings=False)
    model = _inner(build(tf.Kosmos2ForConditionalGeneration, config), "text_model")
    return LevelFamily("Kosmos-2", model, several(5), squares, ("image_embeds_position_mask", 1, 0))


def kosmos_2_5() -> Family:
    """Patches with their row and column in front, latents by a mask, segment embeddings."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        at = torch.cartesian_prod(torch.arange(1, 3), torch.arange(1, 4)).float()
        return {"flattened_patches": torch.stack([torch.cat((at, draw_noise(row, 6, 12)), dim=1) for row in rows])}

    config = tf.Kosmos2_5Config(
        text_config=KOSMOS,
        vision_config={
            "hidden_size": 32,
            "patch_embed_hidden_size": 12,
            "intermediate_size": 32,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_num_patches": 8,
        },
        latent_query_num=5,
        tie_word_embeddings=False,
    )
    model = build(tf.Kosmos2_5ForConditionalGeneration, config)
    return LevelFamily("Kosmos-2.5", model, lambda row: [5], image_inputs, ("image_embeds_position_mask", 1, 0))


def nemotron_h_omni() -> Family:
    """Softmax attention in two of four layers, beside Mamba and an MLP; patches of all images in one tensor."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        grids = _grids(rows)
        patches = [draw_noise(row, h * w, 3 * 4 * 4) for row, (h, w) in zip(rows, grids, strict=True)]
        return {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(grids)}

    text = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"}
    config = tf.NemotronH_Omni_Reasoning_V3_Config(
        text_config={
            "model_type": "nemotron_h",
            **text,
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"],
            "head_dim": 12,
            "mamba_num_heads": 4,
            "mamba_head_dim": 24,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "mlp_hidden_act": "silu",
        },
        vision_config={
            "model_type": "radio",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 1.0,
            "patch_size": 4,
            "image_size": 16,
            "max_img_size": 32,
            "num_cls_tokens": 1,
            "num_registers": 1,
            "summary_idxs": [0],
            "video_temporal_patch_size": 2,
        },
        vision_hidden_size=32,
        projector_hidden_size=32,
        image_token_id=IMAGE,
    )
    model = _calm(tf.NemotronH_Omni_Reasoning_V3, config)
    return Family("Nemotron-H-Omni", model, lambda row: [h * w // 4 for h, w in _grids([row])], image_inputs)


def t5gemma2() -> Family:
    """The image is in the encoder; a decoder layer's keys are what was written, then the encoder's states."""
    text = {**TEXT, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 16}
    text["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    config = tf.T5Gemma2Config(
        encoder={
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model", **TOWER},
            "mm_tokens_per_image": 4,
            "eoi_token_index": END,
        },
        decoder=text,
        image_token_index=IMAGE,
    )
    model = _shifted(build(tf.T5Gemma2ForConditionalGeneration, config), 0.7, "q_norm.weight", "k_norm.weight")
    return EncodedFamily("T5Gemma2", model, several(4), squares)


@dataclass(frozen=True)
class TileFamily(Family):
    """Mllama: a mask says which images a word may look at, those whose token stands before it.

    Images come first: a word that may look at none attends to all, in transformers' class, those that pad the batch, too.
    """

    def _prompt(self, row: int) -> Tensor:
        prompt = super()._prompt(row)
        return torch.cat((prompt[prompt == IMAGE], prompt[prompt != IMAGE]))

    def batch(self, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
        made = super().batch(rows)
        begun = (made["input_ids"] == IMAGE).cumsum(1)[:, :, None, None]  # images that have begun at each word
        tiles = made["aspect_ratio_mask"] * (made["aspect_ratio_ids"] > 0)[:, :, None]
        number = torch.arange(tiles.shape[1])[:, None]
        return {**made, "cross_attention_mask": tiles[:, None] * (begun > number)}

    def extended(self, inputs: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
        made, seen = super().extended(inputs, written), inputs["cross_attention_mask"]
        return {**made, "cross_attention_mask": torch.cat((seen, seen[:, -1:].expand(-1, written.shape[1], -1, -1)), dim=1)}


def mllama() -> Family:
    """Layers 1 and 3 attend to the images' tiles alone, 0 and 2 to the words, among them one token per image."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        most = max(1 + row % 2 for row in rows)
        pixels, shapes = torch.zeros(len(rows), most, 2, 3, 16, 16), torch.zeros(len(rows), most, dtype=torch.long)
        for i, row in enumerate(rows):
            shapes[i, : 1 + row % 2] = torch.tensor([2 - row // 2, 1])[: 1 + row % 2]  # two tiles, or one
            for number in range(1 + row % 2):
                pixels[i, number, : shapes[i, number]] = draw_noise(10 * row + number, int(shapes[i, number]), 3, 16, 16)
        mask = torch.stack((torch.ones_like(shapes), shapes == 2), dim=-1).long()
        return {"pixel_values": pixels, "aspect_ratio_ids": shapes, "aspect_ratio_mask": mask}

    config = tf.MllamaConfig(
        text_config={**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        image_token_index=IMAGE,
    )
    model = build(tf.MllamaForConditionalGeneration, config)
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if name.endswith("_gate"):
                gate.add_(0.7)  # from shut, as they are made, to open
    return TileFamily("Mllama", model, several(1), image_inputs)


@dataclass(frozen=True)
class ApartFamily(Family):
    """Idefics: no token among the words; a mask says how many of a row's images each word may look at."""

    def batch(self, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
        made = super().batch(rows)
        image_inputs, length = made["pixel_values"].shape[1], made["input_ids"].shape[1]
        seen = torch.tensor([[number < 1 + row % 2 for number in range(image_inputs)] for row in rows]).long()
        return {**made, "image_attention_mask": seen[:, None].expand(-1, length, -1)}

    def extended(self, inputs: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
        made, seen = super().extended(inputs, written), inputs["image_attention_mask"]
        return {**made, "image_attention_mask": torch.cat((seen, seen[:, -1:].expand(-1, written.shape[1], -1)), dim=1)}


def idefics(latents: int = 0) -> Family:
    """Llama layers, and between some of them gated layers that attend to the images alone and have numbers of their own.

    latents: of a perceiver that reads each image; without any the tower's tokens are the keys
    """

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        pixels = torch.zeros(len(rows), max(1 + row % 2 for row in rows), 3, 16, 16)
        for i, row in enumerate(rows):
            pixels[i, : 1 + row % 2] = draw_noise(row, 1 + row % 2, 3, 16, 16)
        return {"pixel_values": pixels}

    config = tf.IdeficsConfig(
        **{key: value for key, value in TEXT.items() if key != "num_key_value_heads"} | {"num_hidden_layers": 4},
        vision_config={"embed_dim": 32, **{key: value for key, value in TOWER.items() if key != "hidden_size"}},
        perceiver_config={
            "use_resampler": latents > 0,
            "resampler_n_latents": latents,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
        },
        use_resampler=latents > 0,
        additional_vocab_size=2,
        cross_layer_interval=2,
        alpha_initializer="ones",
        alpha_type="vector",
        tie_word_embeddings=False,
    )
    return ApartFamily("Idefics", build(tf.IdeficsForVisionText2Text, config), _no_image_tokens, image_inputs)


def florence_2() -> Family:
    """BART: the image is in the encoder, and the decoder's cross attention reads the encoder."""
    config = tf.Florence2Config(
        text_config={"model_type": "bart", **BART},
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 2,
            "projection_dim": WIDTH,
        },
        image_token_id=IMAGE,
    )
    model = _starting(build(tf.Florence2ForConditionalGeneration, config))
    return EncodedFamily("Florence-2", model, several(5), squares)


MAKERS: dict[str, Callable[[], Family]] = {
    "Idefics2": idefics2,
    "Aria": aria,
    "FastVLM": fast_vlm,
    "Chameleon": chameleon,
    "Emu3": emu3,
    "Fuyu": fuyu,
    "BLIP-2": blip_2,
    "InstructBLIP": instruct_blip,
    "InstructBlipVideo": instruct_blip_video,
    "Nemotron-H-Omni": nemotron_h_omni,
    "T5Gemma2": t5gemma2,
    "Florence-2": florence_2,
    "BLIP-2 (T5)": blip_2_t5,
    "Mllama": mllama,
    "Idefics": idefics,
    "Idefics (perceiver)": lambda: idefics(5),
}


LAYOUTS: dict[str, str] = {
    "Idefics2": "perceiver latents (64), no grid; a run per image or crop",
    "Aria": "resampler queries by patch count (128 or 256), no grid; all crops of an image in one run",
    "FastVLM": "sqrt(N) x sqrt(N) of the convolutional tower's last map, row-major",
    "Chameleon": "h/16 x w/16 codes (32x32), row-major",
    "Emu3": "h/8 x (w/8 + 1) from image_sizes, row-major; the last column ends the row and is no token of the image",
    "Fuyu": "ceil(h/30) x ceil(w/30), row-major, a run per row: a |NEWLINE| token of another id ends each",
    "BLIP-2": "Q-Former queries (32), no grid",
    "InstructBLIP": "Q-Former queries (32), no grid",
    "InstructBlipVideo": "frames (4) times Q-Former queries (32), frame by frame, no grid; video_token_id",
    "Nemotron-H-Omni": "h/2 x w/2 from image_grid_hw, row-major",
    "T5Gemma2": "one square per image (16x16), row-major, in the encoder",
    "BLIP-2 (T5)": "Q-Former queries (32), no grid, in the encoder",
    "Florence-2": "the mean of all image tokens, then a square (24x24), row-major, in the encoder",
    "Idefics": "keys of their own: per image a class token and a square, row-major",
    "Idefics (perceiver)": "keys of their own: perceiver latents (64) per image, no grid",
    "Mllama": "keys of their own: per tile a class token and a square (40x40), tiles row-major; padding is none",
}


# ------------------------------------------------------------------------------------------- other ways to see an image


def pix2struct() -> Family:
    """T5's cross attention over patches that carry their row and column; no prompt but the image."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        at = torch.cartesian_prod(torch.arange(1, 3), torch.arange(1, 4)).float()
        patches = torch.stack([torch.cat((at, draw_noise(row, 6, 12)), dim=1) for row in rows])
        return {"flattened_patches": patches, "attention_mask": torch.ones(len(rows), 6)}

    config = tf.Pix2StructConfig(
        text_config={**T5, "vocab_size": VOCABULARY, "hidden_size": WIDTH},
        vision_config={
            "hidden_size": WIDTH,
            "patch_embed_hidden_size": 12,
            "d_ff": 32,
            "d_kv": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "seq_len": 8,
        },
    )
    return PromptlessFamily(
        "Pix2Struct", _starting(build(tf.Pix2StructForConditionalGeneration, config)), _no_image_tokens, image_inputs
    )


def udop() -> Family:
    """T5 over words with boxes, then the patches that no word covers."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        return {**_one_square(rows), "bbox": torch.zeros(len(rows), max(8 + 3 * row for row in rows), 4)}

    config = tf.UdopConfig(
        **T5, vocab_size=VOCABULARY, d_model=WIDTH, image_size=16, patch_size=4, max_2d_position_embeddings=32
    )
    return Family("UDOP", _starting(build(tf.UdopForConditionalGeneration, config)), _no_image_tokens, image_inputs)


def pp_formulanet() -> Family:
    """BART's decoder over a convolved map of patches; no prompt."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([draw_noise(row, 1, 3, 32, 32) for row in rows])}

    config = tf.PPFormulaNetConfig(
        text_config=BART,
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 32,
            "post_conv_in_channels": 16,
            "post_conv_mid_channels": 16,
            "post_conv_out_channels": 32,
            "decoder_hidden_size": WIDTH,
        },
    )
    model = _starting(build(tf.PPFormulaNetForConditionalGeneration, config))
    return PromptlessFamily("PPFormulaNet", model, _no_image_tokens, image_inputs)


def vision_encoder_decoder() -> Family:
    """A ViT read by the cross attention of any decoder, here BERT."""
    config = tf.VisionEncoderDecoderConfig(
        encoder={"model_type": "vit", **TOWER},
        decoder={
            "model_type": "bert",
            "is_decoder": True,
            "add_cross_attention": True,
            **{key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "max_position_embeddings")},
        },
    )
    model = _starting(build(tf.VisionEncoderDecoderModel, config))
    return PromptlessFamily("VisionEncoderDecoder", model, _no_image_tokens, _one_square)


def git() -> Family:
    """Image tokens before the words, without a location among the ids; attention that the class computes by itself."""
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    config = tf.GitConfig(vision_config=TOWER, **text)
    return Family("GIT", build(tf.GitForCausalLM, config, attention="eager"), _no_image_tokens, _one_square)


def blip() -> Family:
    """Cross attention over a ViT that the class computes by itself; the text part has its own ``generate``."""
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    config = tf.BlipConfig(text_config=text, vision_config=TOWER)
    model = build(tf.BlipForConditionalGeneration, config, attention="eager")
    return Family("BLIP", _inner(model, "text_decoder"), _no_image_tokens, _one_square)


OTHERS: dict[str, Callable[[], Family]] = {
    "Pix2Struct": pix2struct,
    "UDOP": udop,
    "PPFormulaNet": pp_formulanet,
    "VisionEncoderDecoder": vision_encoder_decoder,
    "GIT": git,
    "BLIP": blip,
    "Kosmos-2": kosmos_2,
    "Kosmos-2.5": kosmos_2_5,
}
