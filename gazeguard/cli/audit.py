"""Command that audits a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import FLAGGED, note, out
from gazeguard.cli.models import MODELS
from gazeguard.cli.options import GuardOptions
from gazeguard.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from gazeguard.audit import Unguarded
    from gazeguard.guard import GazeGuard


def _subject(guarded: GuardOptions) -> GazeGuard | Unguarded:
    """The guard; or the model alone, where no artifacts are named and none are beside it, or its heads are of no use."""
    from gazeguard.audit import Unguarded

    loaded = guarded.load()
    try:
        guard = guarded.watch(*loaded)
        guard.heads.check_usable()
        return guard
    except (InputError, UnsupportedError) as error:
        if isinstance(error, InputError) and any((guarded.artifacts, guarded.heads, guarded.detector)):
            raise
        note(f"only its words are audited, not what a guard notices. {error}")
        return Unguarded(*loaded)


@command(app, panel=MODELS)
def audit(
    guarded: GuardOptions,
    model: Annotated[
        str | None, typer.Argument(help='Folder or hub id of a model, or "lab".', show_default="the lab's toy model")
    ] = None,
    page: Annotated[Path | None, typer.Option("--html", metavar="PAGE", help="Write a page with plots here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON instead of a table.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few scenes: seconds for the lab's model, wide intervals.")] = False,
) -> Outcome:
    """Does a model use the image at all? Blank and wrong images, misleading prompts, swapped colours.

    Says how often its words change and, with the gaze heads and the detector of gazeguard fit, how often the guard notices.
    Exit code 1 when the model does not use the image.
    """
    from gazeguard.audit import audit_model
    from gazeguard.audit.page import in_words
    from gazeguard.audit.page import page as write_page
    from gazeguard.audit.probes import QUICK_SCENES, SCENES

    result = audit_model(_subject(guarded), QUICK_SCENES if quick else SCENES)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(write_page(result), encoding="utf-8")
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        table = Table("probe", "words change", "guard notices")
        for probe in result.probes:
            table.add_row(probe.name, in_words(probe.changed), in_words(probe.noticed))
        out.print(table)
        out.print(result.conclusion)
    code = {} if result.uses_image else {"code": FLAGGED}
    following = f"open {page}" if page is not None else f"write the page: gazeguard audit {model or 'lab'} --html audit.html"
    return Outcome(following, **code)
