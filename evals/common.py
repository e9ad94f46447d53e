"""What every evaluation segment_mass: figures with intervals, and a file that says how they came about.

An evaluation writes ``{"figures": {key: {"value": x, "ci": [low, high]}}, "meta": {...}}``. Intervals are 95 % percentile
bootstraps over *images*, never over phrases: the phrases of one caption depend on each other.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap, quantile_test

import gazeguard
from gazeguard import lab

RESAMPLES, FEW_RESAMPLES, FEW_IMAGES = 1000, 300, 100  # so few images need no finer percentiles
Out = Annotated[Path, typer.Option("--out", help="The JSON file to write.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few images: under 45 seconds, wide intervals.")]

Figure = dict[str, Any]


def figure(value: float, interval: tuple[float, float] | None = None) -> Figure:
    """One figure; ``interval`` is its 95 % interval, or None for what has none."""
    ci = None if interval is None else [float(f"{edge:.4g}") for edge in interval]
    return {"value": float(f"{value:.4g}"), "ci": ci}


def over_images(count: int, statistic: Callable[[NDArray[np.int64]], float], seed: int = 0) -> Figure:
    """A figure over ``count`` images. ``statistic`` gets how often each image is drawn, (count,) int64, all ones at first.

    One image alone gives no interval.
    """
    if count < 2:
        return figure(statistic(np.ones(count, np.int64)))

    def of_draw(images: NDArray[np.int64]) -> float:
        return statistic(np.bincount(images, minlength=count))

    made = bootstrap(
        (np.arange(count),),
        of_draw,
        vectorized=False,
        n_resamples=FEW_RESAMPLES if count < FEW_IMAGES else RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return figure(of_draw(np.arange(count)), tuple(made.confidence_interval))


def median(values: Sequence[float]) -> Figure:
    """The median of repeated measurements, with its 95 % interval by order statistics; of fewer than six, their range."""
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return figure(float(np.median(values)), (min(values), max(values)) if np.isnan(low) else (low, high))


def rate(events: Sequence[float], of: Sequence[float]) -> Figure:
    """Sum of ``events`` over sum of ``of``, both one number per image."""
    events, of = np.asarray(events, float), np.asarray(of, float)
    return over_images(len(events), lambda drawn: (events * drawn).sum() / max(1e-12, (of * drawn).sum()))


def ranking(
    false: NDArray[np.bool_],
    score: NDArray[np.float64],
    image: NDArray[np.int64],
    bins: NDArray[np.int64] | None = None,
) -> Callable[[NDArray[np.int64]], float]:
    """The area under the ROC curve with *false* as the positive class, as a function of how often each image is drawn.

    image: (claims,) whose claim it is, counted from 0; bins: (claims,) the mean of the areas within them, weighted by their
    size; bins of one class only have none. Pairs are counted per pair of images once, so that a resample costs a product.
    """
    bins = np.zeros(len(score), np.int64) if bins is None else bins
    count = int(image.max()) + 1
    tables = []
    for b in np.unique(bins):
        bad, good = (np.flatnonzero((bins == b) & (false == is_bad)) for is_bad in (True, False))
        if len(bad) and len(good):
            higher = (score[bad][:, None] > score[good]) + 0.5 * (score[bad][:, None] == score[good])
            of_bad, of_good = (np.eye(count)[image[at]] for at in (bad, good))
            tables.append((of_bad.T @ higher @ of_good, of_bad.sum(0), of_good.sum(0)))

    def area(drawn: NDArray[np.int64]) -> float:
        areas, sizes = [], []
        for won, bad, good in tables:
            pairs = (drawn @ bad) * (drawn @ good)
            if pairs:
                areas.append(drawn @ won @ drawn / pairs)
                sizes.append(drawn @ (bad + good))
        return float(np.average(areas, weights=sizes)) if areas else float("nan")

    return area


def auroc(
    false: NDArray[np.bool_],
    score: NDArray[np.float64],
    image: NDArray[np.int64],
    bins: NDArray[np.int64] | None = None,
) -> Figure:
    """`ranking` with its interval."""
    return over_images(int(image.max()) + 1, ranking(false, score, image, bins))


def write(
    out: Path,
    figures: dict[str, Figure],
    quick: bool,
    ids: Sequence[str] = (),
    checkpoint: Path | None = lab.checkpoint_path(),  # noqa: B008
    **meta: Any,
) -> None:
    """Write the file, and show the figures on stderr.

    ``checkpoint`` is the folder of the model that was measured, None where what others wrote was.
    """
    weights = checkpoint and hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]
    told = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": quick,
        "gazeguard": gazeguard.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "lab_weights": weights,
        "image_ids": list(ids),
        **meta,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"figures": figures, "meta": told}, indent=1) + "\n", encoding="utf-8")
    table = Table("figure", "value", "95 % interval", title=str(out))
    for key, made in figures.items():
        low_high = "" if made["ci"] is None else f"{made['ci'][0]:.4g} to {made['ci'][1]:.4g}"
        table.add_row(key, f"{made['value']:.4g}" if isinstance(made["value"], float) else str(made["value"]), low_high)
    Console(stderr=True).print(table)
