"""Tiny random models of real transformers classes, one function per family, with batches built by hand.

Row ``r`` of a batch is always the same prompt and the same images, alone or among others; prompts differ in length
and in their number of tokens, so a batch is left-padded and its columns are ragged. Weights are drawn anew with a fixed
seed: queries and keys large enough for peaky attention, norms and biases away from their neutral start.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

# What forward and generate call the cache: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(tf.LlamaModel.forward).parameters else "past_key_values"
VOCABULARY = 128
IMAGE, START, END, PAD = 120, 121, 122, 0
WIDTH = 48
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """A model and what it takes.

    image_tokens: for each image of a row, its number of image tokens
    image_inputs: everything but the ids, mask and token types, for some rows
    types:        the name of the token types that the class takes, their value on an image token, and on written text
    """

    name: str
    model: PreTrainedModel
    image_tokens: Callable[[int], list[int]]
    image_inputs: Callable[[Sequence[int]], dict[str, Tensor]]
    types: tuple[str, int, int] | None = None
    image_token: int = IMAGE

    def batch(self, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
        """What a processor would make of these rows: left-padded, mask, pixels, token types."""
        prompts = [self._prompt(row) for row in rows]
        length = max(map(len, prompts))
        ids = torch.stack([torch.cat((p.new_full((length - len(p),), PAD), p)) for p in prompts])
        mask = torch.stack([torch.arange(length) >= length - len(p) for p in prompts]).long()
        made = {"input_ids": ids, "attention_mask": mask, **self.image_inputs(rows)}
        if self.types is not None:
            name, image, _ = self.types
            made[name] = (ids == IMAGE).long() * image
        return made

    def extended(self, inputs: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
        """The same batch, each row followed by its own ``written`` (batch, T)."""
        made = dict(inputs)
        added = {"input_ids": written, "attention_mask": torch.ones_like(written)}
        if self.types is not None:
            added[self.types[0]] = torch.full_like(written, self.types[2])
        for name, value in added.items():
            made[name] = torch.cat((inputs[name], value), dim=1)
        return made

    def _prompt(self, row: int) -> Tensor:
        words = torch.randint(2, IMAGE, (8 + 3 * row,), generator=seeded(row))
        images = [torch.tensor([START] + [IMAGE] * count + [END]) for count in self.image_tokens(row)]
        return torch.cat((words[:3], *images, words[3:]))


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def draw_noise(row: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(1000 + row))


def squares(rows: Sequence[int]) -> dict[str, Tensor]:
    """``pixel_values`` (images, 3, 16, 16) for two images in odd rows and one in even rows."""
    return {"pixel_values": torch.cat([draw_noise(row, 1 + row % 2, 3, 16, 16) for row in rows])}


def several(image_tokens: int) -> Callable[[int], list[int]]:
    return lambda row: [image_tokens] * (1 + row % 2)


def draw_weights(model: PreTrainedModel, seed: int = 0, peak: float = 3.0) -> PreTrainedModel:
    """The model with fresh weights of a size that makes attention peaky, ready to be read."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                # Norms keep their start (one, or zero where the class adds one itself), plus some spread.
                weight.add_(noise * 0.3) if "norm" in name else weight.copy_(noise * 0.1)
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    weight.mul_(peak**0.5)
            else:
                sharp = name.endswith(("q_proj.weight", "k_proj.weight"))
                weight.copy_(noise * weight[0].numel() ** -0.5 * (peak**0.5 if sharp else 1.0))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [PAD, IMAGE, START, END, 123]  # these would need images when replayed
    return model.eval()


def build(kind: type[PreTrainedModel], config: Any, attention: str = "sdpa") -> PreTrainedModel:
    model = kind._from_config(config, attn_implementation=attention)
    return draw_weights(model)


# ---------------------------------------------------------------------------------------------------- the families


def idefics3() -> Family:
    """Llama text; a row's images lie in a second axis, padded with black ones."""
    return _idefics3(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration, "Idefics3")


def smolvlm() -> Family:
    return _idefics3(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration, "SmolVLM")


def _idefics3(config: Any, kind: type[PreTrainedModel], name: str) -> Family:
    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        most = max(1 + row % 2 for row in rows)
        pixels = torch.zeros(len(rows), most, 3, 16, 16)
        for i, row in enumerate(rows):
            pixels[i, : 1 + row % 2] = draw_noise(row, 1 + row % 2, 3, 16, 16)
        return {"pixel_values": pixels}

    made = config(
        text_config={"model_type": "llama", **TEXT},
        vision_config=TOWER,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return Family(name, build(kind, made), several(4), image_inputs)


def llava() -> Family:
    """CLIP tower, Llama text with as many key heads as query heads."""
    config = tf.LlavaConfig(
        text_config={"model_type": "llama", **TEXT, "num_key_value_heads": 4},
        vision_config={"model_type": "clip_vision_model", **TOWER, "projection_dim": 32},
        image_token_index=IMAGE,
    )
    return Family("LLaVA", build(tf.LlavaForConditionalGeneration, config), several(16), squares)


def _qwen(config: Any, kind: type[PreTrainedModel], name: str, vision: dict[str, Any], text: dict[str, Any]) -> Family:
    def shape(row: int) -> tuple[int, int]:
        return 4, 4 + 2 * (row % 3)  # patches, merged two by two

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        grids = [shape(row) for row in rows]
        patches = [draw_noise(row, h * w, 3 * 2 * 4 * 4) for row, (h, w) in zip(rows, grids, strict=True)]
        return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor([(1, h, w) for h, w in grids])}

    tower = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": WIDTH,
        **vision,
    }
    made = config(
        text_config={**TEXT, **text},
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=123,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Family(
        name,
        build(kind, made),
        lambda row: [shape(row)[0] * shape(row)[1] // 4],
        image_inputs,
        ("mm_token_type_ids", 1, 0),
    )


def qwen2_5_vl() -> Family:
    """Three-dimensional rotary positions, windowed tower, biases in the projections."""
    return _qwen(
        tf.Qwen2_5_VLConfig,
        tf.Qwen2_5_VLForConditionalGeneration,
        "Qwen2.5-VL",
        {"window_size": 16, "fullatt_block_indexes": [1]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
    )


def qwen3_vl() -> Family:
    """Normed queries and keys, tower features added to the first layers, heads wider than width / heads."""
    return _qwen(
        tf.Qwen3VLConfig,
        tf.Qwen3VLForConditionalGeneration,
        "Qwen3-VL",
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
    )


def internvl() -> Family:
    """Qwen2 text; tiles of one image in one run."""
    config = tf.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**TOWER, "image_size": (16, 16), "patch_size": (4, 4)},
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = build(tf.InternVLForConditionalGeneration, config)
    return Family("InternVL", model, lambda row: [4 * (1 + row % 2)], squares)


def mistral3() -> Family:
    """Pixtral tower, Mistral text without a window, images of different size in one tensor."""

    def image_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        pixels = torch.zeros(len(rows), 3, 16, 24)
        for i, row in enumerate(rows):
            pixels[i, :, :, : 16 + 8 * (row % 2)] = draw_noise(row, 3, 16, 16 + 8 * (row % 2))
        return {"pixel_values": pixels, "image_sizes": torch.tensor([(16, 16 + 8 * (row % 2)) for row in rows])}

    config = tf.Mistral3Config(
        text_config={"model_type": "mistral", **TEXT, "head_dim": 12, "sliding_window": None},
        vision_config={"model_type": "pixtral", **TOWER, "image_size": 32, "head_dim": 16},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    model = build(tf.Mistral3ForConditionalGeneration, config)
    return Family("Mistral3", model, lambda row: [4 + 2 * (row % 2)], image_inputs)


def paligemma() -> Family:
    """SigLIP tower, Gemma text (norms that add one), a prompt that attends both ways, tied embeddings."""
    config = tf.PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "num_key_value_heads": 1, "head_dim": 16},
        vision_config={"model_type": "siglip_vision_model", **TOWER, "projection_dim": WIDTH},
        image_token_index=IMAGE,
        projection_dim=WIDTH,
    )
    model = build(tf.PaliGemmaForConditionalGeneration, config)
    return Family("PaliGemma", model, several(16), squares, ("token_type_ids", 0, 1))


def aya_vision() -> Family:
    """Cohere2 text: layer norms, attention beside the MLP, a ``logit_scale`` that the class does not follow."""
    text = {**TEXT, "sliding_window": 8, "layer_types": ["full_attention"] * 3, "logit_scale": 0.25}
    config = tf.AyaVisionConfig(
        text_config={"model_type": "cohere2", **text},
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        downsample_factor=2,
        alignment_intermediate_size=32,
        tie_word_embeddings=False,
    )
    return Family("AyaVision", build(tf.AyaVisionForConditionalGeneration, config), several(4), squares)


MAKERS: dict[str, Callable[[], Family]] = {
    "Idefics3": idefics3,
    "SmolVLM": smolvlm,
    "LLaVA": llava,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "InternVL": internvl,
    "Mistral3": mistral3,
    "PaliGemma": paligemma,
    "AyaVision": aya_vision,
}


LAYOUTS: dict[str, str] = {
    "Idefics3": "tiles by tags, row by row, the whole image last",
    "SmolVLM": "tiles by tags, row by row, the whole image last",
    "LLaVA": "one square per image, row by row",
    "Qwen2.5-VL": "h/2 x w/2 from image_grid_thw, row by row",
    "Qwen3-VL": "h/2 x w/2 from image_grid_thw, row by row",
    "InternVL": "tiles of a canvas, row by row, the whole image last",
    "Mistral3": "h x w from image_sizes, another token after each row",
    "PaliGemma": "one square per image, row by row",
    "AyaVision": "tiles of a canvas, each a run of its own, the whole image last",
}


@contextmanager
def quietly() -> Iterator[None]:
    """One thread, so that sums are made in one order, and no gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@functools.cache
def family(name: str) -> Family:
    """The family of this name, made once. Tests leave its model as they found it, or make their own."""
    return MAKERS[name]()


# ------------------------------------------------------------------------------------------- models to be refused


def text_only() -> PreTrainedModel:
    return build(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT))


def git() -> PreTrainedModel:
    """Computes its text attention by itself, eager alone."""
    config = tf.GitConfig(
        vision_config={**TOWER},
        **{key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
    )
    return build(tf.GitForCausalLM, config, attention="eager")


def llava_mistral(window: int) -> Family:
    """LLaVA around a Mistral whose layers see no further back than ``window``."""
    config = tf.LlavaConfig(
        text_config={"model_type": "mistral", **TEXT, "sliding_window": window},
        vision_config={"model_type": "clip_vision_model", **TOWER, "projection_dim": 32},
        image_token_index=IMAGE,
    )
    return Family("LLaVA-Mistral", build(tf.LlavaForConditionalGeneration, config), several(16), squares)


def gemma3(window: int) -> Family:
    """Layers 0 and 1 slide over ``window`` tokens, layer 2 sees everything."""
    config = tf.Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": 12,
            "sliding_window": window,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    model = build(tf.Gemma3ForConditionalGeneration, config)
    return Family("Gemma3", model, several(4), squares, ("token_type_ids", 1, 0))
