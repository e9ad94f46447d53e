"""Commands that prepare a model of one's own: doctor, heads and train."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gazeguard.artifacts import DETECTOR_FILE, HEADS_FILE
from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import FLAGGED, count, other_heads, out
from gazeguard.cli.options import ArtifactsOption, BatchOption, HeadsOption, ModelOptions
from gazeguard.errors import InputError
from gazeguard.progress import status
from gazeguard.prompts import DEFAULT_PROMPT

if TYPE_CHECKING:
    from gazeguard.detection.detector import Detector
    from gazeguard.heads.artifact import GazeHeads

MODELS = "Prepare a model of your own"
DEFAULT_FOLDER = Path("gazeguard-artifacts")
ROWS_HELP = (
    'JSONL, a line per image: {"image": PATH, "caption": TEXT, "labels": [{"start": 0, "end": 8, "kind": "object", "false": '
    'true}]}, or "objects": [NAME, ...] in the place of labels. docs/evaluation-guide.md has the keys.'
)


@command(app, panel=MODELS)
def doctor(
    loading: ModelOptions,
    model: Annotated[
        str | None, typer.Argument(help='Folder or hub id of a model, or "lab".', show_default="the lab's toy model")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", help="An image to test it on.", show_default="a drawn comic strip")
    ] = None,
) -> Outcome:
    """Test whether attention can be recorded for a model: exit code 0 when every check passes, 1 when one fails."""
    from gazeguard.attention.self_test import run_self_test
    from gazeguard.heads.strips import draw_strips
    from gazeguard.vision.encoding import encode
    from gazeguard.vision.images import load_image

    loaded, processor = loading.load()
    picture = load_image(image) if image else draw_strips(1)[0].image
    inputs = encode(loaded, processor, [picture], [DEFAULT_PROMPT]).inputs
    with status("testing"):
        checks = run_self_test(loaded, processor, inputs, [[picture.size]])
    for check in checks:
        out.print(Text.assemble(("works " if check.ok else "FAILS ", "green" if check.ok else "bold red"), str(check)))
    name = shlex.quote(model or "lab")
    if all(check.ok for check in checks):
        return Outcome(f"fit a detector, without labels: gazeguard fit {name} --out DIR")
    return Outcome(f"try another image: gazeguard doctor {name} --image IMAGE", FLAGGED)


@command(app, panel=MODELS)
def heads(
    loading: ModelOptions,
    model: Annotated[str, typer.Argument(help='Folder or hub id of a model, or "lab"; or the word show.')],
    shown: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="After show: a heads file or its folder.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of heads.json and its figure heads.png.",
            show_default=f"{DEFAULT_FOLDER}; none for show",
        ),
    ] = None,
    material: Annotated[
        str, typer.Option("--material", help="page, strip or scene, drawn; or a folder of your own comics.")
    ] = "page",
    strips: Annotated[int, typer.Option(min=2, help="Maximum number of strips that the model reads.")] = 48,
    panels: Annotated[int, typer.Option(min=2, max=6, help="Number of panels in a drawn strip.")] = 6,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for intermediate results, from which the same command continues.")
    ] = None,
) -> Outcome:
    """Find a model's gaze heads with comic strips, or show FILE: gazeguard heads show heads.json.

    Exit code 1 when no head follows the narration, so that the model has no usable gaze heads.
    """
    from gazeguard.heads.artifact import GazeHeads
    from gazeguard.heads.plots import draw_heads

    if folder is not None and folder.suffix == ".json":
        raise InputError(f"{folder} is the name of a file; --out takes the folder in which {HEADS_FILE} goes.")
    if model == "show":
        if shown is None:
            raise InputError("The file to show is missing: gazeguard heads show heads.json")
        artifact = GazeHeads.from_pretrained(shown)
    else:
        artifact = _find(loading, material, strips, panels, keep)
        folder = folder or DEFAULT_FOLDER
    if folder is not None:
        artifact.save_pretrained(folder)
        draw_heads(artifact).savefig((folder / HEADS_FILE).with_suffix(".png"), dpi=110)
    _show_heads(artifact, folder)
    if artifact.unusable:
        return Outcome(other_heads("MODEL" if model == "show" else model, folder or "DIR"), FLAGGED)
    if model == "show":
        return Outcome("fit a detector for them, without labels: gazeguard fit MODEL --out DIR")
    return Outcome(f"fit a detector for them: gazeguard fit {shlex.quote(model)} --out {shlex.quote(str(folder))}")


def _find(loading: ModelOptions, material: str, strips: int, panels: int, keep: Path | None) -> GazeHeads:
    from gazeguard.heads.discovery import find_heads
    from gazeguard.heads.strips import SIZES, draw_strips, load_strips

    pages = draw_strips(strips, panels=panels, style=material) if material in SIZES else load_strips(material)[:strips]
    return find_heads(*loading.load(), pages, keep=keep)


def _show_heads(artifact: GazeHeads, folder: Path | None) -> None:
    score, index = artifact.score(), {head: i for i, head in enumerate(artifact.all_heads)}
    table = Table(
        "layer", "head", "mass on the narrated panel", "shuffled", "narrated panel attended most", box=None, pad_edge=False
    )
    for layer, head in artifact.heads:
        i = index[layer, head]
        table.add_row(
            f"{layer}", f"{head}", f"{score.mass[i]:.2f}", f"{score.shuffled_mass[i]:.2f}", f"{score.hit_rate[i]:.0%}"
        )
    out.print(table)
    lengths, sets = artifact.length_agreement, artifact.distinct_matched_sets()
    out.print(
        f"{len(artifact.heads)} of {count(len(artifact.all_heads), 'head')}, ranked by {artifact.ranked_by} over "
        f"{count(artifact.strips, 'strip')}. Both halves of the strips agree on {artifact.split_half:.0%} of them."
        + ("" if lengths is None else f" Strips of another length agree on {lengths:.0%}.")
        + f" Controls: {count(sets, 'distinct layer-matched set')} of other heads."
    )
    if folder is not None:
        out.print(f"Gaze heads and their figure: [bold]{escape(str(folder))}[/]", soft_wrap=True)
    if artifact.unusable:
        out.print(Text(artifact.unusable, style="bold red"))


@command(app, panel=MODELS)
def train(
    rows: Annotated[Path, typer.Argument(help=ROWS_HELP)],
    loading: ModelOptions,
    artifacts: ArtifactsOption = None,
    heads_file: HeadsOption = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the detector, its card and diagram, and the heads.",
            show_default=f"the artifacts' folder, or {DEFAULT_FOLDER}",
        ),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Label rows without labels by asking the model itself; such labels are weak.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also fit the weight of the model's own answers, which policies with verify need.")
    ] = False,
    batch_size: BatchOption = 16,
) -> Outcome:
    """Fit a detector of hallucinations on captions with labels, for a model of your own."""
    from gazeguard.fitting import fit_detector, read_captions
    from gazeguard.guard import GazeGuard

    captions = read_captions(rows)
    guard = GazeGuard(*loading.load(), artifacts=artifacts, heads=heads_file)
    detector, left_out = fit_detector(guard, captions, ask, batch_size, verify)
    if folder is None:
        folder = Path(artifacts) if artifacts is not None and Path(artifacts).is_dir() else DEFAULT_FOLDER
    detector.save_pretrained(folder)
    if not (folder / HEADS_FILE).exists():
        guard.heads.save_pretrained(folder)
    show_detector(detector)
    for reason, number in left_out.items():
        out.print(f"left out: {number} of {count(len(captions), 'caption')}: {escape(reason)}")
    out.print(f"{DETECTOR_FILE}, its card and its diagram: [bold]{escape(str(folder))}[/]", soft_wrap=True)
    return Outcome(f"check a caption: gazeguard check IMAGE --caption TEXT{loading.arguments(artifacts=folder)}")


def show_detector(detector: Detector) -> None:
    """Print what a detector was fitted to and what it is worth, a line per kind of claim."""
    for kind, regression in detector.kinds.items():
        metrics = regression.validation
        validated = (
            "without validation"
            if metrics is None
            else f"validated on {count(metrics.claims, 'other')} of {count(metrics.images, 'image')}: AUROC "
            f"{metrics.area}, calibration error {metrics.ece:.3f}"
        )
        if regression.method == "attribution":
            validated = f"direct logit attribution of the gaze heads, without training; {validated}"
        out.print(f"{kind}: fitted on {count(regression.claims, 'claim')}, {regression.false} of them false; {validated}")
    for other, reason in detector.left_out.items():
        out.print(f"{other}: not judged: {reason}")
    if detector.gate is not None and not detector.gate.usable:
        out.print(f"Every verdict will be unchecked: {detector.gate.reason}")
