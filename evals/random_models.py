"""Models of published sizes with random weights, batches for them, and what a guard needs around them: nothing is downloaded.

Random weights cost what trained ones cost. `SIZES` declares every number. Batches have random words around random pixels: each
prompt holds one image, as many image tokens as the model's processor would write for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerFast

from gazeguard.attention.backbone import Head, find_backbone
from gazeguard.errors import UnsupportedError
from gazeguard.heads.artifact import GazeHeads, Score, fingerprint

SEED = 500
END = 2  # the token that ends a caption


class Sizes(NamedTuple):
    """The sizes of a model.

    Attributes:
        family: Which of `CONFIGS` it is.
        text: Of the text decoder, as its configuration names them.
        vision: Of the vision encoder.
        grid: Image tokens of an image, rows and columns, for families whose images have any size.
        prompt: Tokens of a prompt, its image tokens among them.
        dtype: Of the weights.
    """

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    prompt: int
    grid: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.bfloat16


_CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SQUARE = {"image_size": 336, "patch_size": 14}
SIZES = {
    # Of no model: LLaVA's build at a size at which a CPU takes minutes, float32.
    "middle": Sizes(
        "llava",
        {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, **_SQUARE},
        608,
        dtype=torch.float32,
    ),
    # llava-hf/llava-1.5-7b-hf
    "llava-7b": Sizes(
        "llava",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        {**_CLIP_LARGE, **_SQUARE},
        2000,
    ),
    # Qwen/Qwen3-VL-8B-Instruct; an image of 1024 x 1024 pixels
    "qwen3-vl-8b": Sizes(
        "qwen3-vl",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
        2000,
        (32, 32),
    ),
    # Qwen/Qwen2.5-VL-3B-Instruct; an image of 280 x 280 pixels
    "qwen2.5-vl-3b": Sizes(
        "qwen2.5-vl",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
        300,
        (10, 10),
    ),
    # HuggingFaceTB/SmolVLM2-2.2B-Instruct; an image that is not cut into tiles
    "smolvlm-2b": Sizes(
        "smolvlm",
        {
            "vocab_size": 49280,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 378,
            "patch_size": 14,
        },
        300,
    ),
}
# What `tiny` puts in their place: the same code in seconds.
TINY_TEXT = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TINY_TEXT_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3-vl": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    "qwen2.5-vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
}
_TINY_GRID = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
_TINY_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_VISION: dict[str, dict[str, Any]] = {
    "llava": {**_TINY_TOWER, "image_size": 56},
    "smolvlm": {**_TINY_TOWER, "image_size": 84},
    "qwen3-vl": {**_TINY_GRID, "deepstack_visual_indexes": [0]},
    "qwen2.5-vl": {**_TINY_GRID, "fullatt_block_indexes": [1]},
}


def tiny(sizes: Sizes) -> Sizes:
    """The same family with two small layers, in float32."""
    text = {**sizes.text, **TINY_TEXT, **TINY_TEXT_OF_FAMILY.get(sizes.family, {})}
    grid = (4, 4) if sizes.grid[0] else sizes.grid
    return Sizes(sizes.family, text, {**sizes.vision, **TINY_VISION[sizes.family]}, 64, grid, torch.float32)


# ------------------------------------------------------------------------------------------------------------ families


def _llava(text: dict[str, Any], vision: dict[str, Any]) -> tf.PretrainedConfig:
    return tf.LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, **text},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 512, **vision},
        image_token_index=text.get("vocab_size", 32064) - 64,
    )


def _smolvlm(text: dict[str, Any], vision: dict[str, Any]) -> tf.PretrainedConfig:
    return tf.SmolVLMConfig(
        text_config={"model_type": "llama", "max_position_embeddings": 8192, **text},
        vision_config=vision,
        image_token_id=text["vocab_size"] - 90,
        scale_factor=3,
        pad_token_id=END,
        tie_word_embeddings=False,
    )


def _qwen(kind: type[tf.PretrainedConfig]) -> Any:
    def config(text: dict[str, Any], vision: dict[str, Any]) -> tf.PretrainedConfig:
        end = text["vocab_size"] - 200
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        return kind(text_config=text, vision_config=vision, **{name: end + i for i, name in enumerate(names)})

    return config


CONFIGS = {
    "llava": _llava,
    "smolvlm": _smolvlm,
    "qwen3-vl": _qwen(tf.Qwen3VLConfig),
    "qwen2.5-vl": _qwen(tf.Qwen2_5_VLConfig),
}


# What names layers of the vision encoder by their numbers.
LISTS_OF_LAYERS = {"qwen3-vl": ("deepstack_visual_indexes",), "qwen2.5-vl": ("fullatt_block_indexes",)}


def build(sizes: Sizes, device: str, layers: int | None = None) -> PreTrainedModel:
    """A model of these sizes, its weights drawn on the device.

    Args:
        sizes: Its sizes.
        device: Where it is made.
        layers: Layers of the text decoder and of the vision encoder, if fewer than they have are to be made.
    """
    text, vision = dict(sizes.text), dict(sizes.vision)
    if layers is not None:
        text["num_hidden_layers"] = layers
        vision["depth" if "depth" in vision else "num_hidden_layers"] = layers
        vision |= {name: [layers - 1] for name in LISTS_OF_LAYERS.get(sizes.family, ())}
    config = CONFIGS[sizes.family](text, vision)
    torch.manual_seed(SEED)
    with torch.device(device):
        model = tf.AutoModelForImageTextToText.from_config(config, dtype=sizes.dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 0
    return model


def batch(sizes: Sizes, model: PreTrainedModel, rows: int) -> dict[str, Tensor]:
    """Prompts of random words around an image each, on the model's device."""
    config, drawn = model.config, torch.Generator().manual_seed(SEED)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(vocabulary // 4, vocabulary // 2, (rows, sizes.prompt), generator=drawn)
    merged = sizes.grid[0] * sizes.grid[1]
    if merged:
        vision = config.vision_config
        side, patch = vision.spatial_merge_size, 3 * vision.temporal_patch_size * vision.patch_size**2
        height, width = (number * side for number in sizes.grid)
        image = {
            "pixel_values": torch.randn(rows * height * width, patch, generator=drawn),
            "image_grid_thw": torch.tensor([[1, height, width]] * rows),
        }
    else:
        edge = config.vision_config.image_size
        merged = (edge // config.vision_config.patch_size) ** 2 // getattr(config, "scale_factor", 1) ** 2
        shape = (rows, 3, edge, edge) if sizes.family == "llava" else (rows, 1, 3, edge, edge)
        image = {"pixel_values": torch.randn(shape, generator=drawn)}
    ids[:, 5 : 5 + merged] = config.image_token_id
    if "image_grid_thw" in image:
        ids[:, 4], ids[:, 5 + merged] = config.vision_start_token_id, config.vision_end_token_id
        image["mm_token_type_ids"] = (ids == config.image_token_id).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
    inputs["pixel_values"] = inputs["pixel_values"].to(sizes.dtype)
    return {name: value.to(model.device) for name, value in inputs.items()}


# --------------------------------------------------------------------------------------------------------------- guards


class WordProcessor:
    """The processor of a model whose batches are made by hand: a tokenizer of whole words.

    Attributes:
        tokenizer: It knows ``words`` and as many fillers ("w17") as the vocabulary has room for.
    """

    image_processor = None
    chat_template = None

    def __init__(self, vocabulary: int, words: Sequence[str] = ()) -> None:
        known = ["<unk>", "<s>", "</s>", *words]
        known += [f"w{i}" for i in range(len(known), vocabulary)]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        tokenizer.decoder = decoders.Metaspace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<s>"
        )

    def __call__(self, **_: Any) -> BatchFeature:
        """Refuse: there are no images, only pixels."""
        raise UnsupportedError("Batches of models with random weights are made by hand. Use evals.random_models.batch.")


def heads_of(model: PreTrainedModel, heads: Iterable[Head]) -> GazeHeads:
    """An artifact that names these heads as the model's gaze heads, with figures of nothing."""
    every = find_backbone(model).heads()
    figures = ("mass", "selectivity", "contrast", "hit_rate", "shuffled_mass", "sink_mass")
    return GazeHeads(
        model=fingerprint(model),
        model_class=type(model).__name__,
        heads=tuple(sorted(heads)),
        all_heads=tuple(every),
        narration=None,
        query=Score(**dict.fromkeys(figures, (0.0,) * len(every)), matrix=()),
        strips=2,
        panels=2,
        split_half=1.0,
    )


def middle_heads(model: PreTrainedModel, count: int) -> tuple[Head, ...]:
    """So many heads, spread evenly over the middle half of the layers, and over the heads of a layer."""
    every = find_backbone(model).heads()
    layers = sorted({layer for layer, _ in every})
    middle = layers[len(layers) // 4 : len(layers) - len(layers) // 4]
    chosen = [head for head in every if head[0] in middle]
    count = min(count, len(chosen))
    return tuple(chosen[i * len(chosen) // count] for i in range(count))
