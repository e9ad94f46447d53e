"""Cost of guarded generation on models of real size with random weights, beside plain SDPA generate: time, memory, waiting.

For every model and batch size, and each of ``mark``, ``rerank``, ``rewind`` and ``aa_baseline`` (plain in a policy's place):

* ``..._time_ratio``: seconds over those of plain, both of one turn; the order rotates from turn to turn. Median of the turns
* ``..._cpu_time_ratio``: the same of the process's CPU time, on a CPU that others use, too
* ``..._seconds``: median seconds; ``plain_seconds`` beside it
* ``..._memory_ratio``: peak of the GPU's allocator over that of plain, of the process on a CPU; model included
* ``..._passes_ratio``: forward passes over those of plain: what rolled back phrases cost by themselves
* ``..._waits_per_token_more``: how often more than in plain generation the host waits for the device, per token (see
  `evals.host_waits`): the slope between captions of two lengths, so that what comes once per caption is not in it
* ``..._waits_per_call_more``: the rest of it, once per call; ``waits`` in the file says where, for the first batch size

The models have random weights. Their logits are raised towards one written caption, the same for every method, so that there
are phrases to judge as in captions of trained models; a full stop is plausible at every step, so that ``rerank`` weighs its
evidence at every step, which trained models do at some. ``rewind`` rolls the first object of every caption back once.

``--tiny`` runs the same code on a CPU in seconds, with models of two small layers; its figures mean nothing.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel

from evals.common import Figure, Out, figure, median, write
from evals.host_waits import count_waits
from evals.random_models import SEED, SIZES, Sizes, WordProcessor, batch, build, heads_of, middle_heads, tiny
from evals.timing import interleaved, time_and_memory
from gazeguard.detection import features
from gazeguard.detection.detector import Detector
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.policy import Policy, Rerank, Rewind
from gazeguard.vision.text import tokenize

HEADS = 12
CAPTION = (
    "In the picture there is a red car, a blue bicycle and a white dog. A man in a green jacket sits on a wooden bench near a "
    "tall tree. Behind him there is a yellow house, a small garden and a wooden fence. Two birds sit on the roof."
)
RAISED, STOP_RAISED = 16.0, 13.0  # logits, of the caption's next token and of a full stop: 5 % of its probability
POLICIES = {
    "mark": Policy(version=1, name="mark", threshold=0.5),
    "rerank": Policy(
        version=1, name="rerank", threshold=0.5, rerank=Rerank(attribution=1.0, attended_logprob=2.0, end_bonus=2.0)
    ),
    "rewind": Policy(version=1, name="rewind", threshold=0.5, rewind=Rewind(budget=1, threshold=0.0)),
}
BETWEEN = (8, 24)  # lengths of the captions between which waits are counted
LEAST_TURNS, MOST_TURNS = 2, 25
CONSOLE = Console(stderr=True)


def processor_of(model: PreTrainedModel) -> WordProcessor:
    """A processor whose tokenizer knows the words of `CAPTION`."""
    words = dict.fromkeys(f"\u2581{word.strip('.,')}" for word in CAPTION.split())
    return WordProcessor(model.config.get_text_config().vocab_size, [*words, ".", ",", ";", "\u2581or", "\u2581with"])


def detector_of(heads: GazeHeads) -> Detector:
    """A detector of every feature, fitted to noise."""
    names, rng = features.names(heads.heads), np.random.default_rng(SEED)
    kinds = np.array(["object", "attribute", "location"] * 100)
    return Detector.fit(rng.normal(size=(len(kinds), len(names))), rng.random(len(kinds)) < 0.5, kinds, heads, names)


class Writing:
    """Inside, the model's logits are raised towards a caption (T,) and, less, towards a full stop.

    Attributes:
        passes: Forward passes since it was set to 0.
    """

    def __init__(self, model: PreTrainedModel, caption: list[int], stop: int) -> None:
        self.model, self.caption, self.stop, self.passes, self.position = model, caption, stop, 0, 0

    def _raise(self, _: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.passes += 1
        self.position = 0 if kwargs["input_ids"].shape[1] > 1 else self.position + 1
        output.logits[..., self.stop] += STOP_RAISED
        output.logits[..., self.caption[self.position % len(self.caption)]] += RAISED

    def __enter__(self) -> Writing:
        self._handle = self.model.register_forward_hook(self._raise, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@dataclass(frozen=True, eq=False)
class Setting:
    """A model with its guards.

    Attributes:
        sizes: Of the model.
        model: The model.
        guards: One for each of `POLICIES`.
        writing: What raises its logits.
    """

    sizes: Sizes
    model: PreTrainedModel
    guards: dict[str, GazeGuard]
    writing: Writing

    @classmethod
    def of(cls, sizes: Sizes, device: str, layers: int | None) -> Setting:
        """A model with random weights, made on the device."""
        model = build(sizes, device, layers)
        processor = processor_of(model)
        heads = heads_of(model, middle_heads(model, HEADS))
        shared: dict[str, Any] = {"heads": heads, "detector": detector_of(heads)}
        guards = {name: GazeGuard(model, processor, policy, **shared) for name, policy in POLICIES.items()}
        caption, _ = tokenize(processor.tokenizer, CAPTION)
        stop = processor.tokenizer.convert_tokens_to_ids(".")
        return cls(sizes, model, guards, Writing(model, caption.tolist(), stop))

    def runs(self, rows: int, new: int) -> dict[str, Callable[[], object]]:
        """What is timed, by name: ``new`` tokens after each of so many prompts."""
        inputs = batch(self.sizes, self.model, rows)
        options = {**inputs, "max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

        def plain() -> object:
            return self.model.generate(**options)

        guarded = {name: partial(guard.generate, **options) for name, guard in self.guards.items()}
        return {"plain": plain, "aa_baseline": plain, **guarded}


# ------------------------------------------------------------------------------------------------------------- measures


@dataclass(eq=False)
class Results:
    """What has been measured so far, written after every step: a run that is stopped leaves what it has."""

    out: Path
    meta: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)

    def add(self, model: str, rows: int, figures: dict[str, Figure]) -> None:
        """Take up figures of one model and batch size."""
        self.figures |= {f"{model}_{name}_batch_{rows}": each for name, each in figures.items()}
        self.save()

    def fail(self, what: str, error: Exception) -> None:
        """Note that something could not be measured."""
        traceback.print_exception(error)
        self.meta["failed"][what] = f"{type(error).__name__}: {error}"[:500]
        self.save()

    def save(self, show: bool = False) -> None:
        """Write the file."""
        write(self.out, self.figures, False, checkpoint=None, show=show, **self.meta)


def first_figures(setting: Setting, rows: int, new: int, device: str, results: Results) -> dict[str, Figure]:
    """Of one run each: peak memory, and forward passes. A policy that fails is left out from now on."""
    setting.runs(rows, 2)["plain"]()
    peaks, passes = {}, {}
    for name, run in setting.runs(rows, new).items():
        setting.writing.passes = 0
        try:
            peaks[name] = time_and_memory(run, device)[1]
        except Exception as error:  # costs no figure of the others
            results.fail(f"{name}, batch {rows}", error)
            del setting.guards[name]
            continue
        passes[name] = setting.writing.passes
    figures = {f"{name}_memory_ratio": figure(peaks[name] / peaks["plain"]) for name in peaks if name != "plain"}
    figures |= {f"{name}_passes_ratio": figure(passes[name] / passes["plain"]) for name in setting.guards}
    return figures | {"plain_memory_gigabytes": figure(peaks["plain"] / 1e9)}


def wait_figures(
    setting: Setting, rows: int, device: str, placed: bool
) -> tuple[dict[str, Figure], dict[str, dict[str, float]]]:
    """How often the host waits, and for each method where, by file and line, per token."""
    short, long = BETWEEN
    slopes: dict[str, float] = {}
    starts: dict[str, float] = {}
    places: dict[str, dict[str, float]] = {}
    runs = {new: setting.runs(rows, new) for new in BETWEEN}
    for name in ("plain", *setting.guards):
        (few, few_places), (many, many_places) = (count_waits(runs[new][name], device, placed) for new in BETWEEN)
        slopes[name] = (many - few) / (long - short)
        starts[name] = few - short * slopes[name]
        each = {place: (count - few_places[place]) / (long - short) for place, count in many_places.items()}
        places[name] = {place: round(slope, 3) for place, slope in each.items() if slope > 0}
    figures = {"plain_waits_per_token": figure(slopes["plain"])}
    for name in setting.guards:
        figures[f"{name}_waits_per_token_more"] = figure(slopes[name] - slopes["plain"])
        figures[f"{name}_waits_per_call_more"] = figure(starts[name] - starts["plain"])
    return figures, places


def time_figures(runs: dict[str, Callable[[], object]], device: str, limit: float) -> dict[str, Figure]:
    """Interleaved seconds and ratios, in as many turns as ``limit`` seconds hold, at least `LEAST_TURNS`."""

    def finished(run: Callable[[], object]) -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    turns = interleaved({name: partial(finished, run) for name, run in runs.items()}, MOST_TURNS, limit, LEAST_TURNS)
    figures = {f"{name}_seconds": median(each) for name, each in turns.clock.items()}
    for name in runs:
        if name != "plain":
            figures[f"{name}_time_ratio"] = turns.ratio(name, "plain")
            figures |= {f"{name}_cpu_time_ratio": turns.cpu_ratio(name, "plain")} if device == "cpu" else {}
    return figures | {"turns": figure(len(turns.clock["plain"]))}


def measure(setting: Setting, name: str, rows: int, new: int, device: str, limit: float, results: Results) -> None:
    """All figures of one model and batch size, in about ``limit`` seconds."""
    begun = time.perf_counter()
    CONSOLE.print(f"{name}, batch {rows}: memory and passes")
    results.add(name, rows, first_figures(setting, rows, new, device, results))
    if device == "cuda" or results.meta["tiny"]:  # on a CPU nothing waits
        CONSOLE.print(f"{name}, batch {rows}: waiting ({time.perf_counter() - begun:.0f} s so far)")
        figures, places = wait_figures(setting, rows, device, placed=name not in results.meta["waits"])
        results.meta["waits"].setdefault(name, places)
        results.add(name, rows, figures)
    CONSOLE.print(f"{name}, batch {rows}: time ({time.perf_counter() - begun:.0f} s so far)")
    left = limit - (time.perf_counter() - begun)
    results.add(name, rows, time_figures(setting.runs(rows, new), device, left))


def main(
    out: Out,
    models: Annotated[str, typer.Option(help=f"Which, by comma: {', '.join(SIZES)}.")] = "qwen3-vl-8b,llava-7b",
    batches: Annotated[str, typer.Option(help="Batch sizes, by comma.")] = "1,16",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    layers: Annotated[int | None, typer.Option(help="Layers of text decoder and vision encoder. [default: all]")] = None,
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 48,
    limit: Annotated[float, typer.Option("--seconds", help="About how long all of it may take.")] = 270.0,
    tiny_models: Annotated[bool, typer.Option("--tiny", help="Models of two small layers, on the CPU.")] = False,
) -> None:
    """Measure what watching costs on models of real size."""
    device = "cpu" if tiny_models else device
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    load = [round(each, 1) for each in os.getloadavg()]
    meta = {
        "machine": machine,
        "load": load,
        "cores": os.cpu_count(),
        "new_tokens": new,
        "layers": layers,
        "tiny": tiny_models,
        "seed": SEED,
    }
    options = {"models": models, "batches": batches, "device": device, "layers": layers, "new": new, "seconds": f"{limit:g}"}
    command = " ".join(["evals.cost_sizes", *(f"--{name} {value}" for name, value in options.items() if value)])
    results = Results(out, {**meta, "command": command, "waits": {}, "failed": {}})
    names, rows_of_batches = models.split(","), [int(each) for each in batches.split(",")]
    steps, begun = len(names) * len(rows_of_batches), time.perf_counter()
    for name in names:
        gc.collect()
        try:
            setting = Setting.of(tiny(SIZES[name]) if tiny_models else SIZES[name], device, layers)
            CONSOLE.print(f"{name}: built ({time.perf_counter() - begun:.0f} s so far)")
        except Exception as error:  # a model that fails costs no figure of another
            results.fail(name, error)
            steps -= len(rows_of_batches)
            continue
        for rows in rows_of_batches:
            share, steps = (limit - (time.perf_counter() - begun)) / steps, steps - 1
            try:
                with setting.writing:
                    measure(setting, name, rows, new, device, share, results)
            except Exception as error:
                results.fail(f"{name}, batch {rows}", error)
        del setting
    results.save(show=True)
    raise typer.Exit(1 if results.meta["failed"] else 0)


if __name__ == "__main__":
    typer.run(main)
