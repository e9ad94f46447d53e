"""What does the recorder cost? Time and peak memory of generating in several ways, as ratios to plain SDPA generate.

All ways write the same number of tokens. Each repeat runs every way once, in turning order and in one process, with a plain run
before and after it; a ratio is that of the way to the mean of these two, so that a machine whose speed drifts favours none.
``null`` is plain in the place of a way: the noise of the machine. A figure is the median over the repeats. ``memory`` is the
peak of the process, with what the C library's heap keeps between its blocks, which varies from run to run. ``memory_in_use`` is
that of a process of its own, twice, whose heap returns every block of `RETURNED` bytes at once. The models other than the lab's
have random weights, which cost what trained ones cost:

* ``lab``: the VLM that ships with the package;
* ``middle``: a LLaVA class, 12 layers 512 wide, 576 image tokens (figures without a prefix: the worse of batch 1 and 8);
* ``qwen3-vl-8b`` and ``llava-7b``: full size in bfloat16, 2,000-token prompts; need a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as tf
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from evals.common import Figure, Out, Quick, median, write
from gazeguard import lab
from gazeguard.attention.attribution import token_statistics
from gazeguard.attention.backbone import find_backbone
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.vision.encoding import encode
from gazeguard.vision.image_tokens import image_token_id

HEADS = 12  # gaze heads that are heard, as the source paper finds in models of 7 billion parameters
SEED = 500
RETURNED = 2**18  # bytes, far less than the blocks of a growing cache
Model = tuple[tf.PreTrainedModel, dict[str, Tensor]]


# -------------------------------------------------------------------------------------------------------- the models


def small(batch: int, new: int, device: str) -> Model:
    """The lab's VLM."""
    model, processor = lab.load()
    samples = lab.samples("test", batch, SEED)
    made = encode(model, processor, [s.image for s in samples], [s.prompt for s in samples])
    return model.to(device), {name: value.to(device) for name, value in made.inputs.items()}


def _llava(text: dict[str, Any], vision: dict[str, Any], batch: int, length: int, device: str, dtype: torch.dtype) -> Model:
    """A LLaVA with random weights, and prompts of ``length`` tokens around one picture."""
    size, patch = vision["image_size"], vision["patch_size"]
    config = tf.LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, **text},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 512, **vision},
        image_token_index=32000,
    )
    with torch.device(device):
        model = tf.LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    cells = (size // patch) ** 2
    ids = torch.randint(10, 30000, (batch, length), generator=torch.Generator().manual_seed(SEED))
    ids[:, 5 : 5 + cells] = 32000
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model, {name: value.to(device) for name, value in given.items()}


def middle(batch: int, new: int, device: str) -> Model:
    """Twelve layers, 512 wide, 576 image tokens."""
    text = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8}
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 336, "patch_size": 14}
    return _llava(text | {"num_key_value_heads": 8}, vision, batch, 608, device, torch.float32)


def llava_7b(batch: int, new: int, device: str) -> Model:
    """LLaVA-1.5-7B's sizes, bfloat16."""
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 336, "patch_size": 14}
    return _llava(text, vision, batch, 2000, device, torch.bfloat16)


def qwen3_vl_8b(batch: int, new: int, device: str) -> Model:
    """Qwen3-VL-8B's sizes, bfloat16; a picture of 1,024 cells."""
    config = tf.Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        vision_config={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
    )
    with torch.device(device):
        model = tf.Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(10, 30000, (batch, 2000), generator=torch.Generator().manual_seed(SEED))
    ids[:, 4], ids[:, 5 : 5 + 1024], ids[:, 5 + 1024] = config.vision_start_token_id, config.image_token_id, 151653
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(batch * 4096, 3 * 2 * 16 * 16, dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, 64, 64]] * batch),
    }
    return model, {name: value.to(device) for name, value in given.items()}


MODELS: dict[str, tuple[Callable[[int, int, str], Model], tuple[int, ...]]] = {  # how to make it, batch sizes
    "lab": (small, (1, 8)),
    "middle": (middle, (1, 8)),
    "llava-7b": (llava_7b, (1, 16)),
    "qwen3-vl-8b": (qwen3_vl_8b, (1, 16)),
}


# ---------------------------------------------------------------------------------------------------------- the ways


class SecondPass(tf.LogitsProcessor):
    """What contrastive decoding (VCD and its relatives) does at each word: a second pass, over a picture of noise."""

    def __init__(self, model: tf.PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        self.model = model
        self.inputs = inputs | {"pixel_values": torch.randn_like(inputs["pixel_values"])}
        self.cache = tf.DynamicCache(config=model.config.get_text_config())
        # The name of the argument from transformers 5.24 on, and before.
        self.name = "cache" if "cache" in inspect.signature(tf.LlamaModel.forward).parameters else "past_key_values"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.cache.get_seq_length():
            made = self.model(input_ids=input_ids[:, -1:], **{self.name: self.cache}, use_cache=True)
        else:
            made = self.model(**self.inputs, **{self.name: self.cache}, use_cache=True, logits_to_keep=1)
        return scores + 1.0 * (scores - made.logits[:, -1].float())


def ways(model: tf.PreTrainedModel, inputs: dict[str, Tensor], new: int) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name."""
    every = find_backbone(model).heads()
    last = {layer for layer, _ in every[-3 * len(every) // 4 :]}
    heads = [head for head in every if head[0] in last][::2][:HEADS]
    prompts = KeyLayout.from_ids(inputs["input_ids"], inputs["attention_mask"], image_token_id(model))
    bias = torch.zeros(len(prompts.columns), len(heads), prompts.columns.shape[1], device=prompts.columns.device)
    bias[..., :10] = 5.0

    def write_words(attention: str = "sdpa", **options: Any) -> Tensor:
        if model.config.get_text_config()._attn_implementation != attention:
            model.set_attn_implementation(attention)
        made = model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True, **options
        )
        return made.sequences[:, inputs["input_ids"].shape[1] :]

    def tapped(judge: bool = False, turn: bool = False) -> None:
        with torch.no_grad(), AttentionRecorder(model, heads) as recorder:
            recorder.begin(prompts)
            if turn:
                recorder.steer(bias)
            written = write_words()
            rows = recorder.collect()
            if judge:
                token_statistics(recorder.backbone, recorder.heads, rows, written)

    def second_pass() -> None:
        write_words(logits_processor=tf.LogitsProcessorList([SecondPass(model, inputs)]))

    return {
        "plain": write_words,
        "null": write_words,
        "recorder": tapped,
        "tap_readout": lambda: tapped(judge=True),
        "tap_steering": lambda: tapped(turn=True),
        "eager": lambda: write_words("eager"),
        "eager_output_attentions": lambda: write_words("eager", output_attentions=True),
        "second_pass": second_pass,
    }


# ------------------------------------------------------------------------------------------------------- the measures


def measured(run: Callable[[], object], device: str) -> tuple[float, int]:
    """Seconds of a run, and the most bytes that the process (or the GPU's allocator) held meanwhile, model included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated()
    taken = time.perf_counter() - start
    return taken, int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def prepared(name: str, batch: int, new: int, device: str) -> dict[str, Callable[[], object]]:
    """`ways` of one of the `MODELS`."""
    torch.manual_seed(SEED)
    return ways(*MODELS[name][0](batch, new, device), new)


def peak(name: str, batch: int, new: int, way: str) -> int:
    """The most bytes that a run of one way holds in this process."""
    return measured(prepared(name, batch, new, "cpu")[way], "cpu")[1]


def in_use(name: str, batch: int, new: int, way: str) -> int:
    """`peak` in a process of its own, whose heap keeps no large block that is not in use."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(RETURNED)  # glibc reads it when a process starts, so this one does not change
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(peak, name, batch, new, way).result()


def ratios(
    runs: dict[str, Callable[[], object]], repeats: int, device: str, done: Callable[[], object]
) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Of time and memory, for each way its ratios to the plain runs beside it, one per repeat; and the plain runs' seconds.

    ``done`` is called after each pair of runs.
    """
    others = [way for way in runs if way != "plain"]
    found: dict[str, dict[str, list[float]]] = {measure: {way: [] for way in others} for measure in ("time", "memory")}
    seconds = []
    for repeat in range(repeats):
        before = measured(runs["plain"], device)
        for i in range(len(others)):
            way = others[(i + repeat) % len(others)]
            this, after = measured(runs[way], device), measured(runs["plain"], device)
            for measure, held, *plain in zip(found, this, before, after, strict=True):
                found[measure][way].append(held / statistics.mean(plain))
            seconds.append(after[0])
            before = after
            done()
    return found, seconds


def worst(figures: dict[str, Figure]) -> dict[str, Figure]:
    """For each way of the middle model the larger ratio of its batch sizes, under a name of its own."""
    found: dict[str, list[Figure]] = {}
    for key, made in figures.items():
        if key.startswith("middle_") and "_ratio_batch_" in key:
            found.setdefault(key.removeprefix("middle_").rpartition("_batch_")[0], []).append(made)
    return {key: max(each, key=lambda made: made["value"]) for key, each in found.items()}


def main(
    out: Out,
    quick: Quick = False,
    models: Annotated[str, typer.Option(help=f"Which, by comma: {', '.join(MODELS)}.")] = "lab,middle",
    batches: Annotated[str, typer.Option(help="Batch sizes, by comma. [default: each model's own]")] = "",
    only: Annotated[str, typer.Option("--ways", help="Which beside plain, by comma. [default: all]")] = "",
    new: Annotated[int, typer.Option(help="Tokens to write.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of every way.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure what the recorder costs beside plain generate, and what others cost."""
    new, repeats = (8, 1) if quick else (new, repeats)
    figures: dict[str, Figure] = {}
    asked = {"models": models, "batches": batches, "ways": only, "new": new, "repeats": repeats, "device": device}
    command = " ".join(["evals.overhead", *(f"--{name} {value}" for name, value in asked.items() if value)])
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    with Progress(console=Console(stderr=True)) as progress:
        for name in models.split(","):
            own = MODELS[name][1]
            sizes = [int(size) for size in batches.split(",")] if batches else own
            for batch in sizes[:1] if quick else sizes:
                runs = prepared(name, batch, new, device)
                chosen = only.split(",") if only else list(runs)
                if strange := set(chosen) - set(runs):
                    raise typer.BadParameter(f"No way is called {strange.pop()!r}. There are {', '.join(runs)}.")
                runs = {"plain": runs["plain"]} | {way: runs[way] for way in chosen}
                bar = progress.add_task(f"{name}, batch {batch}", total=len(runs) + repeats * (len(runs) - 1))
                for run in runs.values():
                    run()  # so that nothing is met for the first time while it is measured
                    progress.advance(bar)
                found, seconds = ratios(runs, repeats, device, lambda bar=bar: progress.advance(bar))
                if device == "cpu":
                    held: dict[str, list[int]] = {way: [] for way in runs}
                    for way in progress.track(list(runs) * 2, description=f"{name}, batch {batch}, memory in use"):
                        held[way].append(in_use(name, batch, new, way))
                    plain = held.pop("plain")
                    found["memory_in_use"] = {way: [a / b for a, b in zip(of, plain, strict=True)] for way, of in held.items()}
                for measure, by_way in found.items():
                    for way, each in by_way.items():
                        figures[f"{name}_{way}_{measure}_ratio_batch_{batch}"] = median(each)
                speeds = [batch * new / taken for taken in seconds]
                figures[f"{name}_plain_tokens_per_second_batch_{batch}"] = median(speeds)
                del runs, run
                # Written after each, so that a long run that is stopped has something to show.
                write(out, figures | worst(figures), quick, seed=SEED, new_tokens=new, machine=machine, command=command)


if __name__ == "__main__":
    typer.run(main)
