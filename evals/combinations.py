"""Ways of generating, drawn at random: any family, kernel, cache and search through a guard, compared with one plain pass.

The families are the tiny models of real classes that the tests build (`tests/families`). What is generated live, in a batch,
must have the trace of one teacher-forced pass over each caption alone.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.random_models import WordProcessor, heads_of
from gazeguard.attention.backbone import find_backbone
from gazeguard.errors import GazeGuardError, UnsupportedError
from gazeguard.guard import GazeGuard
from gazeguard.policy import load_policy, parse_policy
from gazeguard.trace import GazeTrace
from gazeguard.tracing import ReplayPart
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.encoding import EncodedBatch
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.inputs import append_tokens
from gazeguard.vision.text import decode

TESTS = str(Path(__file__).resolve().parents[1] / "tests")
if TESTS not in sys.path:  # where the families are
    sys.path.append(TESTS)

from families import Family, quietly  # noqa: E402
from families.kernels import flash_on_cpu, flex_on_cpu, use_kernel  # noqa: E402
from invariants import BY_PROCESSOR, MAKERS, keys, works  # noqa: E402

FIELDS = ("gaze", "segment_mass", "attribution", "attended_logprob", "internal_confidence", "logprobs", "entropy")
# Largest difference of a field between live and replayed; half precision is rounded anew in every pass.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.08}
ROWS, NEW = 4, 6  # rows of a batch, and tokens of a caption, at most
KERNELS = {"sdpa": "_supports_sdpa", "eager": "", "flash": "_supports_flash_attn", "flex": "_supports_flex_attn"}
LEFT_OUT = ("Chameleon",)  # `invariants.EXCEPTIONS`: its logits are changed where no replay sees them
# What does not compute what it should there, without any guard: the flash attention of the tests knows no empty part of a
# cache, and the logits of flex attention over a static cache are not those of the other kernels.
NOT_ON_CPU = {("flash", "static"), ("flex", "static")}
STRENGTHS = {"attribution": 1.0, "attended_logprob": 2.0, "end_bonus": 1.0}  # of rerank, which nothing has measured here
POLICIES = {
    "mark": load_policy("mark"),
    "rerank": parse_policy({"version": 1, "name": "rerank", "threshold": "f1", "rerank": STRENGTHS, "on_flag": "keep"}),
}
DOORS = ("generate", "watch", "custom_generate")
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "offloaded": {"cache_implementation": "offloaded"},
}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3, "top_k": 0, "temperature": 2.0},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "look-up": {"do_sample": False, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}


@dataclass(frozen=True)
class Combination:
    """One way of generating.

    Attributes:
        family: Name of the family.
        dtype: Of the weights.
        kernel: Of the attention in the text decoder.
        cache: Name in `CACHES`.
        search: Name in `SEARCHES`.
        copies: ``num_return_sequences``.
        rows: The rows of the family's batch; odd ones have two images in most families.
        padding_side: Where the shorter rows are padded.
        door: How the guard is called.
        policy: Of the guard.
        seed: Of the sampling.
    """

    family: str
    dtype: str
    kernel: str
    cache: str
    search: str
    copies: int
    rows: tuple[int, ...]
    padding_side: str
    door: str
    policy: str
    seed: int

    @classmethod
    def draw(cls, rng: random.Random) -> Combination:
        """Draw one; not every one can be run."""
        search = rng.choice(list(SEARCHES))
        several = search in ("sampled", "beams", "sampled beams")
        family = rng.choice([name for name in MAKERS if works(name) and name not in LEFT_OUT])
        return cls(
            family=family,
            dtype=rng.choice(["float32", "float32", *TOLERANCE]),
            kernel=rng.choice(["sdpa", "sdpa", "sdpa", "eager", "eager", "flash", "flash", "flex"]),
            cache=rng.choice(["dynamic", "dynamic", *CACHES]),
            search=search,
            copies=rng.randint(1, 3) if several else 1,
            rows=_draw_rows(rng, family, 1 if search == "look-up" else rng.randint(1, ROWS)),
            padding_side=rng.choice(["left", "left", "left", "right"]),
            door=rng.choice(DOORS),
            policy=rng.choice(["mark", "mark", "rerank"]),
            seed=rng.randrange(10**6),
        )

    @property
    def options(self) -> dict[str, Any]:
        """What ``generate`` is told."""
        length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
        return {**length, **SEARCHES[self.search], **CACHES[self.cache], "num_return_sequences": self.copies}


@dataclass
class Outcome:
    """What came of one combination; each list holds messages, none where all is well.

    Attributes:
        captions: How many captions were compared.
        crashes: Errors that are none of ours.
        refused: Errors that name what cannot be watched.
        mismatches: Differences between live and replay.
        changed: Whether ``mark`` changed what was generated.
        passes: Captions that pass although nothing can be said of them.
        unchecked: Reasons of captions without usable trace.
    """

    captions: int = 0
    crashes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def run(combination: Combination) -> Outcome | None:
    """Run one combination; None where the model itself cannot do it, without any guard."""
    with quietly(), _kernel(combination) as kind:
        if kind is None:
            return None
        inputs = _batch(kind, combination)
        torch.manual_seed(combination.seed)
        try:
            plain = kind.model.generate(**inputs, **combination.options)
        except Exception:  # whatever it is, it is transformers' own
            return None
        outcome = Outcome()
        try:
            _compare(combination, kind, inputs, plain, outcome)
        except GazeGuardError as error:
            outcome.refused.append(str(error))
        except Exception as error:
            outcome.crashes.append(f"{type(error).__name__}: {error}"[:300])
        return outcome


@functools.cache
def _family(name: str) -> Family:
    return MAKERS[name]()


def _draw_rows(rng: random.Random, family: str, count: int) -> tuple[int, ...]:
    """Rows of a batch; of as many image tokens each where the grid is given, which is one for all."""
    rows = [rng.randrange(6) for _ in range(count)]
    if family in BY_PROCESSOR:
        tokens = _family(family).image_tokens
        rows = [row for row in rows if sum(tokens(row)) == sum(tokens(rows[0]))]
    return tuple(rows)


@contextmanager
def _kernel(combination: Combination) -> Iterator[Family | None]:
    """The family with a model of its own in this dtype, whose text decoder runs this kernel; None where it has none such."""
    kind = _family(combination.family)
    supports = KERNELS[combination.kernel]
    if (supports and not getattr(kind.model, supports, False)) or (combination.kernel, combination.cache) in NOT_ON_CPU:
        yield None
        return
    twin = copy.deepcopy(kind.model).to(getattr(torch, combination.dtype))
    contexts = {"flash": flash_on_cpu, "flex": flex_on_cpu}
    with contexts.get(combination.kernel, lambda: nullcontext(combination.kernel))() as name:
        try:
            if combination.kernel == "flash":
                use_kernel(twin, name)
            else:
                text = "" if combination.kernel == "sdpa" else "text_config"
                twin.set_attn_implementation({text: name})
        except (ValueError, ImportError):
            yield None
            return
        yield replace(kind, model=twin)


def _batch(kind: Family, combination: Combination) -> dict[str, Tensor]:
    """The rows, padded on the side that is drawn, with pixels in the model's precision."""
    inputs = kind.batch(combination.rows)
    if combination.padding_side == "right":
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        order = (1 - mask).argsort(dim=1, stable=True)
        along = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape}
        inputs = {name: value.gather(1, order) if name in along else value for name, value in inputs.items()}
    dtype = kind.model.dtype
    return {name: value.to(dtype) if _is_float(value) else value for name, value in inputs.items()}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def guard_of(kind: Family, inputs: Mapping[str, Tensor], policy: str = "mark") -> GazeGuard:
    """A guard around a family's model, on a few heads of several layers; where no rule knows the grid, one without places."""
    model = kind.model
    every = find_backbone(model).heads()
    heads = heads_of(model, {every[0], every[1], every[-2]})
    processor: Any = WordProcessor(len(find_backbone(model).unembedding.weight))
    return GazeGuard(model, processor, POLICIES[policy], heads=heads, grid=_unknown_grid(kind, inputs))


def _unknown_grid(kind: Family, inputs: Mapping[str, Tensor]) -> ImageGrid | None:
    """A grid without places, for families whose rule asks the processor; None where a rule knows the places."""
    found = keys(kind, dict(inputs))
    try:
        image_grids(kind.model, None, inputs, *found[:2])
    except UnsupportedError:
        real = found.ids if found.mask is None else found.ids.masked_fill(~found.mask.bool(), -1)
        count = int(torch.isin(real[0], torch.tensor(found.image)).sum())
        return ImageGrid(np.full((count, 4), np.nan, np.float32), np.zeros(count, np.int64), ((64, 64),))
    return None


def _compare(combination: Combination, kind: Family, inputs: dict[str, Tensor], plain: Tensor, outcome: Outcome) -> None:
    """Generate through the guard, and hold each caption beside one plain pass over it."""
    guard = guard_of(kind, inputs, combination.policy)
    torch.manual_seed(combination.seed)
    options: dict[str, Any] = {**inputs, **combination.options}
    if combination.door == "watch":
        with guard.watch():
            output = kind.model.generate(**options)
    elif combination.door == "custom_generate":
        output = kind.model.generate(**options, custom_generate=guard)
    else:
        output = guard.generate(**options)
    if combination.policy == "mark" and not torch.equal(output, plain):
        outcome.changed.append("other tokens than without the guard")
    for number, report in enumerate(guard.reports):
        row = combination.rows[number // combination.copies]
        if report.verdict == "pass":
            outcome.passes.append(report.caption)
        if report.trace is None or "padded" in report.reason:
            outcome.unchecked.append(report.reason)
            continue
        outcome.captions += 1
        alone = _batch(kind, _alone(combination, row))
        difference = trace_difference(report.trace, replayed(guard, alone, report.trace.token_ids))
        if over := {name: value for name, value in difference.items() if not value <= TOLERANCE[combination.dtype]}:
            outcome.mismatches.append(f"row {row}: {', '.join(f'{name} {value:.2g}' for name, value in over.items())}")


def _alone(combination: Combination, row: int) -> Combination:
    return replace(combination, rows=(row,))


def replayed(guard: GazeGuard, inputs: dict[str, Tensor], token_ids: Any) -> GazeTrace:
    """The trace of one caption after its prompt alone, from one teacher-forced pass."""
    tracer, model = guard.tracer, guard.model
    prompts = tracer.prompts(inputs, inputs["input_ids"], inputs["attention_mask"])
    text, offsets = decode(guard.processor.tokenizer, token_ids)
    whole = append_tokens(model, dict(inputs), [token_ids])
    part = ReplayPart([0], [text], EncodedBatch(inputs, whole, (token_ids,), (offsets,)), prompts)
    return tracer.replay(part)[0][0]


def trace_difference(live: GazeTrace, replay: GazeTrace) -> dict[str, float]:
    """The largest absolute difference of each field; infinite where one is NaN and the other is not, or shapes differ."""
    differences = {}
    pairs = [(name, getattr(live, name), getattr(replay, name)) for name in FIELDS]
    for name, left, right in [*pairs, ("grid", live.grid.boxes, replay.grid.boxes)]:
        if left.shape != right.shape:
            differences[name] = float("inf")
        else:
            one_is_nan = np.isnan(left) != np.isnan(right)
            apart = np.where(one_is_nan, np.inf, np.nan_to_num(np.abs(left - right)))
            differences[name] = float(apart.max(initial=0))
    return differences
