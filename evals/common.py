"""What every evaluation shares: figures with intervals, and a file that says how they came about.

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
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

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
    """A figure over ``count`` images. ``statistic`` gets how often each image is drawn, (count,) int64, all ones at first."""

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


def rate(events: Sequence[float], of: Sequence[float]) -> Figure:
    """Sum of ``events`` over sum of ``of``, both one number per image."""
    events, of = np.asarray(events, float), np.asarray(of, float)
    return over_images(len(events), lambda drawn: (events * drawn).sum() / max(1e-12, (of * drawn).sum()))


def auroc(invented: NDArray[np.bool_], score: NDArray[np.float64], image: NDArray[np.int64]) -> Figure:
    """Area under the ROC curve with *invented* as the positive class; ``image`` says whose phrase it is."""
    _, image = np.unique(image, return_inverse=True)
    return over_images(int(image.max()) + 1, lambda drawn: float(roc_auc_score(invented, score, sample_weight=drawn[image])))


def within_bins(
    invented: NDArray[np.bool_], score: NDArray[np.float64], bins: NDArray[np.int64], image: NDArray[np.int64]
) -> Figure:
    """The mean AUROC within bins, weighted by their size; bins of one class only are left out."""
    usable = [b for b in np.unique(bins) if 0 < invented[bins == b].sum() < (bins == b).sum()]
    _, image = np.unique(image, return_inverse=True)

    def statistic(drawn: NDArray[np.int64]) -> float:
        weights = drawn[image]
        areas, sizes = [], []
        for b in usable:
            inside = (bins == b) & (weights > 0)
            if 0 < invented[inside].sum() < inside.sum():
                areas.append(roc_auc_score(invented[inside], score[inside], sample_weight=weights[inside]))
                sizes.append(weights[inside].sum())
        return float(np.average(areas, weights=sizes)) if areas else float("nan")

    return over_images(int(image.max()) + 1, statistic)


def write(
    out: Path,
    figures: dict[str, Figure],
    quick: bool,
    ids: Sequence[str] = (),
    checkpoint: Path = lab.checkpoint_path(),  # noqa: B008
    **meta: Any,
) -> None:
    """Write the file, and show the figures on stderr. ``checkpoint`` is the folder of the model that was measured."""
    weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]
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
        table.add_row(key, f"{made['value']:.4g}", low_high)
    Console(stderr=True).print(table)
