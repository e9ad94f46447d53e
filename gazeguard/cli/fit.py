"""Command that fits a detector for any model without labels: fit."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from gazeguard.artifacts import DETECTOR_FILE, HEADS_FILE
from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import FLAGGED, count, note, other_heads, out, stoppable
from gazeguard.cli.models import DEFAULT_FOLDER, MODELS, show_detector
from gazeguard.cli.options import ModelOptions, PromptOption
from gazeguard.prompts import DEFAULT_PROMPT

if TYPE_CHECKING:
    from gazeguard.fitting.run import Fitted


class BudgetChoice(StrEnum):
    """How much is recorded."""

    QUICK = "quick"
    STANDARD = "standard"
    THOROUGH = "thorough"


@command(app, panel=MODELS)
def fit(
    loading: ModelOptions,
    model: Annotated[str, typer.Argument(help='Folder or hub id of a vision-language model, or "lab".')],
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the gaze heads, the detector and their card.")
    ] = DEFAULT_FOLDER,
    images: Annotated[
        Path | None,
        typer.Option(
            "--pictures", metavar="FOLDER", help="Your own images, of the kind you will check captions on; no labels."
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--captions",
            metavar="ROWS",
            help="Labelled captions, if there are any, as gazeguard train takes them: docs/evaluation-guide.md.",
        ),
    ] = None,
    budget: Annotated[
        BudgetChoice, typer.Option(help="How many images are described: docs/fitting.md says how long each takes.")
    ] = BudgetChoice.STANDARD,
    style: Annotated[
        list[str] | None,
        typer.Option(help="Style of the drawings; may be repeated.", show_default="all that can be drawn here"),
    ] = None,
    prompt: PromptOption = DEFAULT_PROMPT,
    seed: Annotated[int, typer.Option(help="Seed of the drawings and of sampling.")] = 1,
) -> Outcome:
    """Fit a detector for any model, without labels: from a checkpoint to verdicts in one command.

    Finds the gaze heads, lets the model describe drawn scenes whose truth is known, makes some of its claims false, and fits
    to both. Captions are judged only if the detector beats the text alone; the card has the figures. Exit code 1 if not. An
    interrupted fit goes on where it stopped.
    """
    from gazeguard.fitting.labelled import read_captions
    from gazeguard.fitting.run import fit as run

    captions = () if rows is None else read_captions(rows)
    with stoppable():
        fitted = run(
            *loading.load(),
            folder,
            images=images,
            captions=captions,
            budget=budget.value,
            prompt=prompt,
            styles=style,
            seed=seed,
            say=note,
        )
    return _outcome(fitted, folder, loading, model)


def _outcome(fitted: Fitted, folder: Path, loading: ModelOptions, model: str) -> Outcome:
    """What was fitted, on stdout, and what to do next."""
    files = f"{HEADS_FILE}, {DETECTOR_FILE} and their card"
    if fitted.detector is None:
        out.print(escape(fitted.refused), soft_wrap=True)
        kept = escape(str(folder / HEADS_FILE))
        out.print(f"{kept} keeps the figures. It is marked as unusable: every verdict will be unchecked.", soft_wrap=True)
        return Outcome(other_heads(model, folder), FLAGGED)
    out.print(f"{count(len(fitted.heads.heads), 'gaze head')}; {files}: [bold]{escape(str(folder))}[/]", soft_wrap=True)
    show_detector(fitted.detector)
    if fitted.refused:
        out.print(f"[bold red]not usable[/]: {escape(fitted.refused)}.", soft_wrap=True)
        return Outcome(f"read {folder}/README.md; then a larger --budget, images of your own, or labelled --captions", FLAGGED)
    figures = fitted.figures
    out.print(
        f"usable: objects of drawings are ranked with AUROC {figures['auroc']:.3f}, the text alone gives "
        f"{figures['text_auroc']:.3f} (lift {figures['lift']:+.3f}, from {figures['lift_low']:+.3f}).",
        soft_wrap=True,
    )
    return Outcome(f"check a caption: gazeguard check IMAGE --caption TEXT{loading.arguments(artifacts=folder)}")
