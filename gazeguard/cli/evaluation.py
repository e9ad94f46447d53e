"""Command that measures a detector on captions with labels: eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import out, show_markdown
from gazeguard.cli.models import MODELS, ROWS_HELP
from gazeguard.cli.options import BatchOption, GuardOptions


@command(app, "eval", panel=MODELS)
def evaluate_rows(
    rows: Annotated[Path, typer.Argument(help=ROWS_HELP)],
    guarded: GuardOptions,
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the table, the figures and the diagram.")
    ] = Path("gazeguard-eval"),
    batch_size: BatchOption = 16,
) -> Outcome:
    """Measure the detector on captions with labels: AUROC beside text alone, calibration, per kind of claim.

    Give rows that the detector was not fitted to.
    """
    from gazeguard.evaluation import JSON_FILE, PLOT_FILE, TABLE_FILE, evaluate
    from gazeguard.fitting import read_captions

    captions = read_captions(rows)
    evaluation = evaluate(guarded.guard(), captions, batch_size)
    evaluation.save(folder)
    show_markdown(evaluation.table())
    out.print(f"{TABLE_FILE}, {JSON_FILE}, {PLOT_FILE}: [bold]{escape(str(folder))}[/]", soft_wrap=True)
    return Outcome(f"filter a dataset: gazeguard filter IN OUT{guarded.arguments()}")
