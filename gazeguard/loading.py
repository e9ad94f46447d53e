"""Model loader behind every command and integration: one function, which never runs code from the hub.

A processor of one's own is imported from a module that the caller names.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import CONFIG_NAME

from gazeguard.artifacts import check_repository
from gazeguard.errors import InputError, extra
from gazeguard.vision.encoding import check_processor

logger = logging.getLogger(__name__)
LAB = "lab"  # the name of the lab's model, in the place of a folder or hub id; a folder of that name is ./lab
LAB_CHECKPOINT = Path(__file__).parent / "lab" / "checkpoint"


def load(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    processor: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model in evaluation mode, and its processor.

    Args:
        model: Folder or hub id of a model of transformers' AutoModelForImageTextToText, or "lab" for the model that ships
            with GazeGuard.
        device: Where the whole model goes: "cpu", "cuda:1", ...; "auto" takes the GPU if there is one.
        dtype: Of the weights: "bfloat16", "float16", "float32" or a torch.dtype; "auto" takes the checkpoint's.
        device_map: transformers' own distribution over several devices ("auto", ...), in the place of `device`.
        processor: "module:attribute" of a processor of one's own, see `import_processor`; by default the checkpoint's.

    Returns:
        The model and its processor.

    Raises:
        InputError: The model or the processor cannot be loaded, or the device or dtype is unknown or not available here.
    """
    source = LAB_CHECKPOINT if str(model) == LAB else model
    options = {"dtype": find_dtype(dtype), "trust_remote_code": False}  # False: not even a question whether code may run
    target = None
    if device_map is None:
        target = find_device(device)
    elif str(device) == "auto":
        options["device_map"] = device_map
    else:
        raise InputError(f"Both device {str(device)!r} and device_map {device_map!r} are given. Leave one of them out.")
    own = None if processor is None else import_processor(processor, source)
    if own is not None:
        check_processor(own)
    logger.info("loading %s (dtype %s) on %s", model, dtype, target or f"device_map {device_map}")
    try:
        if not Path(source).exists():
            check_repository(str(source), CONFIG_NAME)
        loaded = AutoModelForImageTextToText.from_pretrained(source, **options).eval()
        used = own if own is not None else AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of a folder that is no model transformers raises almost anything
        if isinstance(error, ImportError) and "torchvision" in str(error).lower():
            raise InputError(
                f"The processor of {model} needs torchvision, which is not installed. Install it: {extra('vision')}."
            ) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{model} cannot be loaded as a vision-language model: {reason} "
            "Give the folder or hub id of a model of transformers' AutoModelForImageTextToText."
        ) from error
    return loaded if target is None else _move(loaded, target), used


def import_processor(name: str, model: str | Path) -> Any:
    """Import a processor of one's own. The module is found as Python finds it, or in the working directory; its code runs.

    Args:
        name: "module:attribute". The attribute is a processor, as `gazeguard.vision.encoding.Processor` describes it, or a
            function or class that makes one.
        model: Folder or hub id of the model, which such a function is called with.

    Raises:
        InputError: There is no such module or attribute, or either fails.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise InputError(f"The processor is {name!r}; expected module:attribute, as in my_model:processor.")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last: nothing that is installed is hidden
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
        return value(model) if isinstance(value, type | functools.partial) or inspect.isroutine(value) else value
    except Exception as error:  # whatever code of one's own raises
        raise InputError(
            f"The processor {name} cannot be imported: {type(error).__name__}: {error} Give module:attribute, a processor or a "
            "function that makes one from the model's folder or hub id."
        ) from error


def find_device(device: str | torch.device = "auto") -> torch.device:
    """Resolve a device's name; "auto" is the GPU if there is one. Raises `InputError` for a name that torch does not know."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"Unknown device {str(device)!r}; expected one of: auto, cpu, cuda, cuda:N, mps.") from error


def find_dtype(dtype: str | torch.dtype = "auto") -> str | torch.dtype:
    """Resolve a dtype's name; "auto" is returned as it is. Raises `InputError` for what is no floating-point dtype."""
    if dtype == "auto":
        return "auto"
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InputError(f"Unknown dtype {str(dtype)!r}; expected one of: auto, bfloat16, float16, float32.")
    return resolved


def _move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    try:
        return model.to(device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # torch without CUDA asserts; out of memory: Runtime
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"The model cannot be moved to device {str(device)!r}: {reason} Give another device.") from error
