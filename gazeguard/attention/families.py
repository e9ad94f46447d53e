"""Declared facts about model families: what they do to logits, and which classes compute their text attention.

A family is a ``model_type`` of transformers. A family that stands in no table is read from the code of its forward
(`names_in_forward`), which the log and the self-test report; a test compares tables and code over every family of the tests.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gazeguard import _compat

LOGGER = logging.getLogger("gazeguard")


@dataclass(frozen=True)
class LogitChange:
    """What some families do to logits after the unembedding.

    Attributes:
        key: The key of the text configuration that holds the value; without a value nothing is done.
        change: What is done: (logits, value, text configuration) -> logits.
        cuts: It only leaves tokens out, and does nothing to those that remain.
    """

    key: str
    change: Callable[[Tensor, Any, Any], Tensor]
    cuts: bool = False


def _times(logits: Tensor, value: Any, _: Any) -> Tensor:
    return logits * value


def _over(logits: Tensor, value: Any, _: Any) -> Tensor:
    return logits / value


def _divided(logits: Tensor, value: Any, _: Any) -> Tensor:
    return logits * value**-1


def _capped(logits: Tensor, value: Any, _: Any) -> Tensor:
    return value * torch.tanh(logits / value)


def _scaled_by_width(logits: Tensor, value: Any, config: Any) -> Tensor:
    return logits * config.d_model**-0.5 if value else logits


def _cut(logits: Tensor, value: Any, _: Any) -> Tensor:
    return logits[..., :value]


SCALE = LogitChange("logit_scale", _times)
MULTIPLIER = LogitChange("output_multiplier", _times)
SCALING_FACTOR = LogitChange("logits_scaling", _times)
SCALING_DIVISOR = LogitChange("logits_scaling", _divided)
TIED_SCALE = LogitChange("scale_decoder_outputs", _scaled_by_width)  # T5 whose embeddings are tied
WIDTH_DIVISOR = LogitChange("logits_mup_width_multiplier", _over)
SOFT_CAP = LogitChange("final_logit_softcapping", _capped)
VOCABULARY_CUT = LogitChange("unpadded_vocab_size", _cut, cuts=True)

# model_type of the whole model -> what its forward does to logits, in order. A configuration may have a key that the class does
# not follow: Aya Vision around Cohere2 has a logit_scale. BLIP-2 and its relatives run a whole language model, T5 among them.
LOGIT_CHANGES: Mapping[str, tuple[LogitChange, ...]] = dict.fromkeys(
    (
        *("aria", "aya_vision", "chameleon", "cohere2_vision", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "deepseek_vl"),
        *("deepseek_vl_hybrid", "dots3_note", "emu3", "ernie4_5_vl_moe", "exaone4_5", "fast_vlm", "florence2", "fuyu"),
        *("gemma3", "glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "got_ocr2", "hunyuan_vl", "idefics", "idefics2"),
        *("idefics3", "internvl", "janus", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next"),
        *("llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral3"),
        *(
            "mllama",
            "molmo2",
            "nemotron_h_omni",
            "ovis2",
            "paddleocr_vl",
            "pp_chart2table",
            "qianfan_ocr",
            "qwen2_5_omni_thinker",
        ),
        *("qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe"),
        *("shieldgemma2", "smolvlm", "step3p7", "unlimited_ocr", "video_llama_3", "video_llava", "vipllava"),
    ),
    (),
) | {
    "blip-2": (TIED_SCALE,),
    "cohere_compass": (SCALE,),
    "gemma4": (SOFT_CAP,),
    "gemma4_unified": (SOFT_CAP,),
    "granite4_vision": (SCALING_DIVISOR,),
    "granite_docling": (SCALING_DIVISOR,),
    "hyperclovax_vision_v2": (SCALING_FACTOR,),
    "inkling2": (SOFT_CAP,),
    "inkling_mm_model": (WIDTH_DIVISOR, VOCABULARY_CUT),
    "instructblip": (TIED_SCALE,),
    "instructblipvideo": (TIED_SCALE,),
    "mistral_large4": (SOFT_CAP,),
    "muse_glimmer": (MULTIPLIER, SOFT_CAP),
    "muse_spark": (MULTIPLIER, SOFT_CAP),
    "paligemma": (SOFT_CAP,),
    "t5gemma2": (SOFT_CAP,),
}

# What a forward calls the value of each change, in the order in which families that have several make them.
CHANGES_BY_NAME: Mapping[str, LogitChange] = {
    "logit_scale": SCALE,
    "output_multiplier": MULTIPLIER,
    "logits_scaling": SCALING_DIVISOR,
    "scale_decoder_outputs": TIED_SCALE,
    "logits_mup_width_multiplier": WIDTH_DIVISOR,
    "final_logit_softcapping": SOFT_CAP,
    "logit_softcap": SOFT_CAP,
    "unpadded_vocab_size": VOCABULARY_CUT,
}

# model_type of the text decoder -> the classes of its attention modules. Decoders have others under a layer number: indexers,
# short convolutions, linear attention.
ATTENTION_CLASSES: Mapping[str, tuple[str, ...]] = {
    "aria_text": ("AriaTextAttention",),
    "bart": ("BartAttention",),
    "chameleon": ("ChameleonAttention",),
    "cohere2": ("Cohere2Attention",),
    "cohere_compass_text": ("CohereCompassAttention",),
    "cosmos3_edge_text": ("Cosmos3EdgeTextAttention",),
    "deepseek_ocr2_text": ("DeepseekOcr2TextAttention",),
    "deepseek_v3": ("DeepseekV3Attention",),
    "dots3_note_text": ("Dots3NoteTextAttention",),
    "emu3_text_model": ("Emu3Attention",),
    "ernie4_5_vl_moe_text": ("Ernie4_5_VLMoeTextAttention",),
    "exaone4": ("Exaone4Attention",),
    "gemma": ("GemmaAttention",),
    "gemma3_text": ("Gemma3Attention",),
    "gemma4_text": ("Gemma4TextAttention",),
    "gemma4_unified_text": ("Gemma4UnifiedTextAttention",),
    "glm4v_moe_text": ("Glm4vMoeTextAttention",),
    "glm4v_text": ("Glm4vTextAttention",),
    "glm5_next_text": ("Glm5NextTextAttention",),
    "glm_ocr_text": ("GlmOcrTextAttention",),
    "granite4_vision_text": ("Granite4VisionTextAttention",),
    "granite_docling_text": ("GraniteDoclingTextAttention",),
    "hunyuan_vl_text": ("HunYuanVLDenseV1Attention",),
    "hyperclovax": ("HyperCLOVAXAttention",),
    "idefics": ("IdeficsAttention",),
    "inkling2_text": ("Inkling2FullAttention", "Inkling2SlidingAttention"),
    "inkling_text": ("InklingAttention",),
    "lfm2": ("Lfm2Attention",),
    "lfm3": ("Lfm3Attention",),
    "llama": ("LlamaAttention",),
    "llama4_text": ("Llama4TextAttention",),
    "minimax_m3_vl_text": ("MiniMaxM3VLAttention",),
    "mistral": ("MistralAttention",),
    "mistral_large4_text": ("MistralLarge4TextAttention",),
    "mllama_text_model": ("MllamaTextCrossAttention",),
    "molmo2_text": ("Molmo2Attention",),
    "muse_glimmer_text": ("MuseGlimmerTextAttention",),
    "muse_spark_text": ("MuseSparkTextAttention",),
    "nemotron_h": ("NemotronHAttention",),
    "opt": ("OPTAttention",),
    "paddleocr_vl_text": ("PaddleOCRAttention",),
    "persimmon": ("PersimmonAttention",),
    "qwen2": ("Qwen2Attention",),
    "qwen2_5_omni_text": ("Qwen2_5OmniAttention",),
    "qwen2_5_vl_text": ("Qwen2_5_VLAttention",),
    "qwen2_vl_text": ("Qwen2VLAttention",),
    "qwen3": ("Qwen3Attention",),
    "qwen3_5_moe_text": ("Qwen3_5MoeAttention",),
    "qwen3_5_text": ("Qwen3_5Attention",),
    "qwen3_omni_moe_text": ("Qwen3OmniMoeThinkerTextAttention",),
    "qwen3_vl_moe_text": ("Qwen3VLMoeTextAttention",),
    "qwen3_vl_text": ("Qwen3VLTextAttention",),
    "step3p5": ("Step3p7Attention",),
    "t5": ("T5Attention",),
    "t5gemma2_decoder": ("T5Gemma2MergedAttention",),
    "unlimited_ocr_text": ("UnlimitedOcrTextAttention",),
}


def logit_changes(model_type: str, modules: Iterable[nn.Module]) -> tuple[tuple[LogitChange, ...], bool]:
    """What a family does to logits, and whether that was read from code in place of the table.

    Args:
        model_type: Of the whole model.
        modules: The model and its text decoder, whose forwards are read where the family stands in no table.
    """
    if model_type in LOGIT_CHANGES:
        return LOGIT_CHANGES[model_type], False
    report_unknown_family(model_type, "what it does to logits")
    return logit_changes_in_code(modules), True


def logit_changes_in_code(modules: Iterable[nn.Module]) -> tuple[LogitChange, ...]:
    """The changes whose values the forwards name. That a value multiplies or divides cannot be read in this way."""
    names = frozenset().union(*(_compat.names_in_forward(module) for module in modules))
    return tuple(dict.fromkeys(change for name, change in CHANGES_BY_NAME.items() if name in names))


def attention_modules(model_type: str, candidates: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], bool]:
    """Those of a text decoder's modules, by path, that compute attention, and whether that was read from code.

    Args:
        model_type: Of the text decoder.
        candidates: The modules that have a layer number.
    """
    classes = ATTENTION_CLASSES.get(model_type, ())
    if found := {path: module for path, module in candidates.items() if type(module).__name__ in classes}:
        return found, False
    found = attention_modules_in_code(candidates)
    if found:
        report_unknown_family(model_type, "which of its modules compute attention")
    return found, True


def attention_modules_in_code(candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules whose forward names transformers' attention registry."""
    return {path: module for path, module in candidates.items() if _compat.REGISTRY_NAME in _compat.names_in_forward(module)}


@functools.cache
def report_unknown_family(model_type: str, fact: str) -> None:
    """Log, once, that a fact about a family was read from code."""
    LOGGER.warning(
        "No table of GazeGuard knows the model type %r: %s was read from the code of its class. "
        "Run `gazeguard doctor` once to see that the recorder reads this model right.",
        model_type,
        fact,
    )
