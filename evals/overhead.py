"""Overhead of the attention recorder: time and peak memory of generation, as ratios to plain SDPA generate.

All methods generate the same number of tokens. Each repeat runs every method once, in rotating order and in one process,
with a plain run before and after it; a ratio is that of the method to the mean of these two, so that a machine whose speed
drifts favours none. ``aa_baseline`` is plain in the place of a method: the noise floor of the machine. A figure is the
median over the repeats. ``memory`` is the peak of the process, with what the C library's heap keeps between its blocks,
which varies from run to run. ``memory_in_use`` is that of two processes in turn whose heap returns every block of `RETURNED`
bytes at once. ``recorder_dla`` is the recorder with direct logit attribution. The models other than the lab's
have random weights, which cost what trained ones cost:

* ``lab``: the VLM that ships with the package;
* ``middle``: a LLaVA class, 12 layers 512 wide, 576 image tokens (figures without a prefix: the worse of batch 1 and 8);
* ``qwen3-vl-8b`` and ``llava-7b``: full size in bfloat16, 2,000-token prompts; need a GPU.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Annotated, Any

import torch
import transformers as tf
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from evals import random_models
from evals.common import Figure, Out, Quick, median, with_issue_keys, write
from evals.timing import time_and_memory
from gazeguard import _compat, lab
from gazeguard.attention.attribution import token_statistics
from gazeguard.attention.backbone import find_backbone
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.vision.encoding import encode
from gazeguard.vision.image_tokens import image_token_id

SEED = random_models.SEED
HEADS = 12  # gaze heads that are recorded, as many as the source paper finds in models of 7 billion parameters
RETURNED = 2**18  # bytes, far less than the blocks of a growing cache
# Keys by which issues ask for figures.
ISSUE_KEYS = {
    "tap_readout_time_ratio": "recorder_dla_time_ratio",
    "tap_readout_memory_ratio": "recorder_dla_memory_ratio",
}
Model = tuple[tf.PreTrainedModel, dict[str, Tensor]]


# -------------------------------------------------------------------------------------------------------- the models


def small(batch: int, new: int, device: str) -> Model:
    """The lab's VLM."""
    model, processor = lab.load()
    samples = lab.samples("test", batch, SEED)
    encoded = encode(model, processor, [s.image for s in samples], [s.prompt for s in samples])
    return model.to(device), {name: value.to(device) for name, value in encoded.inputs.items()}


def _random(name: str) -> Callable[[int, int, str], Model]:
    """One of `random_models.SIZES`."""
    sizes = random_models.SIZES[name]

    def made(batch: int, new: int, device: str) -> Model:
        model = random_models.build(sizes, device)
        return model, random_models.batch(sizes, model, batch)

    return made


MODELS: dict[str, tuple[Callable[[int, int, str], Model], tuple[int, ...]]] = {  # builder, batch sizes
    "lab": (small, (1, 8)),
    "middle": (_random("middle"), (1, 8)),
    "llava-7b": (_random("llava-7b"), (1, 16)),
    "qwen3-vl-8b": (_random("qwen3-vl-8b"), (1, 16)),
}


# --------------------------------------------------------------------------------------------------------- methods


class SecondPass(tf.LogitsProcessor):
    """What contrastive decoding (VCD and its relatives) does at each token: a second pass, over an image of noise."""

    def __init__(self, model: tf.PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        self.model = model
        self.inputs = inputs | {"pixel_values": torch.randn_like(inputs["pixel_values"])}
        self.cache = tf.DynamicCache(config=model.config.get_text_config())
        self.cache_argument = _compat.cache_argument_name()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.cache.get_seq_length():
            output = self.model(input_ids=input_ids[:, -1:], **{self.cache_argument: self.cache}, use_cache=True)
        else:
            output = self.model(**self.inputs, **{self.cache_argument: self.cache}, use_cache=True, logits_to_keep=1)
        return scores + 1.0 * (scores - output.logits[:, -1].float())


def methods(model: tf.PreTrainedModel, inputs: dict[str, Tensor], new: int) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name."""
    every = find_backbone(model).heads()
    last = {layer for layer, _ in every[-3 * len(every) // 4 :]}
    heads = [head for head in every if head[0] in last][::2][:HEADS]
    prompts = KeyLayout.from_ids(inputs["input_ids"], inputs["attention_mask"], image_token_id(model))
    bias = torch.zeros(len(prompts.columns), len(heads), prompts.columns.shape[1], device=prompts.columns.device)
    bias[..., :10] = 5.0

    def generate(attention: str = "sdpa", **options: Any) -> Tensor:
        if _compat.attention_kernels(model)["text_config"] != attention:
            model.set_attn_implementation(attention)
        output = model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True, **options
        )
        return output.sequences[:, inputs["input_ids"].shape[1] :]

    def recorded(dla: bool = False, steer: bool = False) -> None:
        with torch.no_grad(), AttentionRecorder(model, heads) as recorder:
            recorder.begin(prompts)
            if steer:
                recorder.steer(bias)
            tokens = generate()
            rows = recorder.collect()
            if dla:
                token_statistics(recorder.backbone, recorder.heads, rows, tokens)

    def second_pass() -> None:
        generate(logits_processor=tf.LogitsProcessorList([SecondPass(model, inputs)]))

    return {
        "plain": generate,
        "aa_baseline": generate,
        "recorder": recorded,
        "recorder_dla": lambda: recorded(dla=True),
        "recorder_steering": lambda: recorded(steer=True),
        "eager": lambda: generate("eager"),
        "eager_output_attentions": lambda: generate("eager", output_attentions=True),
        "second_pass": second_pass,
    }


# -------------------------------------------------------------------------------------------------------- measures


def build(name: str, batch: int, new: int, device: str) -> dict[str, Callable[[], object]]:
    """`methods` of one of the `MODELS`."""
    torch.manual_seed(SEED)
    return methods(*MODELS[name][0](batch, new, device), new)


def peaks(name: str, batch: int, new: int, chosen: list[str]) -> dict[str, int]:
    """Peak bytes of this process during a run of each method, after a first run of plain."""
    runs = build(name, batch, new, "cpu")
    runs["plain"]()
    return {method: time_and_memory(runs[method], "cpu")[1] for method in chosen}


def in_use(name: str, batch: int, new: int, chosen: list[str]) -> dict[str, int]:
    """`peaks` of a process of its own, whose heap keeps no large block that is not in use."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(RETURNED)  # glibc reads it when a process starts, so this one does not change
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(peaks, name, batch, new, chosen).result()


def ratios_to_plain(
    runs: dict[str, Callable[[], object]], repeats: int, device: str, done: Callable[[], object]
) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """For time and memory, and for each method, its ratios to the plain runs beside it, one per repeat; and plain seconds.

    ``done`` is called after each pair of runs.
    """
    others = [method for method in runs if method != "plain"]
    ratios: dict[str, dict[str, list[float]]] = {measure: {method: [] for method in others} for measure in ("time", "memory")}
    seconds = []
    for repeat in range(repeats):
        before = time_and_memory(runs["plain"], device)
        for i in range(len(others)):
            method = others[(i + repeat) % len(others)]
            this, after = time_and_memory(runs[method], device), time_and_memory(runs["plain"], device)
            for measure, value, *plain in zip(ratios, this, before, after, strict=True):
                ratios[measure][method].append(value / statistics.mean(plain))
            seconds.append(after[0])
            before = after
            done()
    return ratios, seconds


def worst(figures: dict[str, Figure]) -> dict[str, Figure]:
    """For each method and the middle model the larger ratio of its batch sizes, under a key without model and batch size."""
    ratios: dict[str, list[Figure]] = {}
    for key, each in figures.items():
        if key.startswith("middle_") and "_ratio_batch_" in key:
            ratios.setdefault(key.removeprefix("middle_").rpartition("_batch_")[0], []).append(each)
    return {key: max(of_sizes, key=lambda each: each["value"]) for key, of_sizes in ratios.items()}


def main(
    out: Out,
    quick: Quick = False,
    models: Annotated[str, typer.Option(help=f"Which, by comma: {', '.join(MODELS)}.")] = "lab,middle",
    batches: Annotated[str, typer.Option(help="Batch sizes, by comma. [default: each model's own]")] = "",
    only: Annotated[str, typer.Option("--methods", help="Which beside plain, by comma. [default: all]")] = "",
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of every method.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure the overhead of the recorder, and that of other methods."""
    new, repeats = (8, 1) if quick else (new, repeats)
    figures: dict[str, Figure] = {}
    options = {"models": models, "batches": batches, "methods": only, "new": new, "repeats": repeats, "device": device}
    command = " ".join(["evals.overhead", *(f"--{name} {value}" for name, value in options.items() if value)])
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    with Progress(console=Console(stderr=True)) as progress:
        for name in models.split(","):
            sizes = [int(size) for size in batches.split(",")] if batches else MODELS[name][1]
            for batch in sizes[:1] if quick else sizes:
                runs = build(name, batch, new, device)
                chosen = only.split(",") if only else list(runs)
                if unknown := sorted(set(chosen) - set(runs)):
                    raise typer.BadParameter(f"Unknown method {unknown[0]!r}; expected some of: {', '.join(runs)}.")
                runs = {"plain": runs["plain"]} | {method: runs[method] for method in chosen}
                bar = progress.add_task(f"{name}, batch {batch}", total=len(runs) + repeats * (len(runs) - 1))
                for run in runs.values():
                    run()  # warm-up
                    progress.advance(bar)
                ratios, seconds = ratios_to_plain(runs, repeats, device, lambda bar=bar: progress.advance(bar))
                if device == "cpu":
                    processes = progress.track(range(1 if quick else 2), description=f"{name}, batch {batch}, memory in use")
                    measured = [in_use(name, batch, new, list(runs)) for _ in processes]
                    ratios["memory_in_use"] = {
                        method: [each[method] / each["plain"] for each in measured] for method in runs if method != "plain"
                    }
                for measure, by_method in ratios.items():
                    for method, each in by_method.items():
                        figures[f"{name}_{method}_{measure}_ratio_batch_{batch}"] = median(each)
                speeds = [batch * new / taken for taken in seconds]
                figures[f"{name}_plain_tokens_per_second_batch_{batch}"] = median(speeds)
                del runs, run
                # Written after each, so that a long run that is stopped has something to show.
                every = with_issue_keys(figures | worst(figures), ISSUE_KEYS)
                write(out, every, quick, seed=SEED, new_tokens=new, machine=machine, command=command)


if __name__ == "__main__":
    typer.run(main)
