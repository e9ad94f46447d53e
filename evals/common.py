"""Figures with intervals, and the result file that says how they came about.

Every evaluation writes ``{"figures": {key: {"value": x, "ci": [low, high]}}, "meta": {...}}``. Intervals are 95 % percentile
bootstraps over *images*, never over phrases: the phrases of one caption depend on each other.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import quantile_test

import gazeguard
from gazeguard import lab
from gazeguard.detection import metrics
from gazeguard.detection.metrics import Statistic, bootstrap_images

Out = Annotated[Path, typer.Option("--out", help="The JSON file to write.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few images: under 45 seconds, wide intervals.")]
Lab = Annotated[str, typer.Option("--lab", help="tiny or scenes: whose images, and, without --model, whose model.")]
Model = Annotated[str | None, typer.Option("--model", help="Folder or hub id of another model, shown the lab's images.")]
Artifacts = Annotated[str | None, typer.Option("--artifacts", help="Its gaze heads and detector; by default in its folder.")]
Work = Annotated[Path | None, typer.Option("--work", help="Folder of what is recorded, to go on from; by default temporary.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the weights: float32, bfloat16; auto is the checkpoint's.")]

Figure = dict[str, Any]
DECODING = {"greedy": False, "sampled": True}  # do_sample of each


@contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """The folder of ``--work``; without one a temporary folder, which is removed at the end."""
    with TemporaryDirectory() as temporary:
        yield work or Path(temporary)


def figure(value: float, interval: tuple[float, float] | None = None) -> Figure:
    """One figure; ``interval`` is its 95 % interval, or None for what has none."""
    ci = None if interval is None else [float(f"{edge:.4g}") for edge in interval]
    return {"value": float(f"{value:.4g}"), "ci": ci}


def over_images(count: int, statistic: Statistic, seed: int = 0) -> Figure:
    """`bootstrap_images` as a figure."""
    return figure(*bootstrap_images(count, statistic, seed))


def median(values: Sequence[float]) -> Figure:
    """The median of repeated measurements, with its 95 % interval by order statistics; of fewer than six, their range."""
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return figure(float(np.median(values)), (min(values), max(values)) if np.isnan(low) else (low, high))


def rate(events: Sequence[float], trials: Sequence[float]) -> Figure:
    """Sum of ``events`` over sum of ``trials``, both one number per image."""
    events, trials = np.asarray(events, float), np.asarray(trials, float)
    return over_images(len(events), lambda drawn: (events * drawn).sum() / max(1e-12, (trials * drawn).sum()))


def auroc(
    false: NDArray[np.bool_],
    score: NDArray[np.float64],
    image: NDArray[np.int64],
    bins: NDArray[np.int64] | None = None,
) -> Figure:
    """The area under the ROC curve, over images, as a figure."""
    return figure(*metrics.auroc(false, score, image, bins))


def with_issue_keys(figures: dict[str, Figure], issue_keys: Mapping[str, str]) -> dict[str, Figure]:
    """The figures, and some of them also under the key by which an issue asks for them.

    Args:
        figures: The figures of an evaluation.
        issue_keys: Key of the issue -> key of the evaluation; one that was not measured is left out.
    """
    return figures | {issue: figures[key] for issue, key in issue_keys.items() if key in figures}


def write(
    out: Path,
    figures: dict[str, Figure],
    quick: bool,
    ids: Sequence[str] = (),
    checkpoint: Path | None = lab.checkpoint_path(),  # noqa: B008
    show: bool = True,
    **meta: Any,
) -> None:
    """Write the file, and show the figures on stderr unless ``show`` is False.

    ``checkpoint`` is the folder of the model that was measured, None where captions or answers of other models were.
    """
    file = checkpoint and checkpoint / "model.safetensors"
    weights = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file and file.is_file() else None
    described = {
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
    out.write_text(json.dumps({"figures": figures, "meta": described}, indent=1) + "\n", encoding="utf-8")
    if not show:
        return
    table = Table("figure", "value", "95 % interval", title=str(out))
    for key, each in figures.items():
        interval = "" if each["ci"] is None else f"{each['ci'][0]:.4g} to {each['ci'][1]:.4g}"
        table.add_row(key, f"{each['value']:.4g}" if isinstance(each["value"], float) else str(each["value"]), interval)
    Console(stderr=True).print(table)
