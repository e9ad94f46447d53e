"""Commands for single images: demo, caption and check."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import FAILED, FLAGGED, count, err, other_heads, out, show_report
from gazeguard.cli.options import BatchOption, GuardOptions, JsonOption, ModelOptions, PageOption, PromptOption
from gazeguard.errors import GazeGuardError, InputError
from gazeguard.progress import status, track
from gazeguard.prompts import DEFAULT_PROMPT

if TYPE_CHECKING:
    from PIL.Image import Image

    from gazeguard.guard import GazeGuard
    from gazeguard.lab import Sample
    from gazeguard.replay.page import Entry
    from gazeguard.report import Report

# torch and transformers take seconds to import; each command imports what it needs, so that --help is quick.

CAPTIONS, FIRST = "Check captions", "Start here"


@command(app, panel=FIRST)
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the replay page.")] = Path("gazeguard-demo"),
    images: Annotated[int, typer.Option(min=1, max=200, help="Number of images; strips and scenes alternate.")] = 10,
    policy: Annotated[str, typer.Option("--policy", help="Name of a policy, or a .yaml file.")] = "mark",
    seed: Annotated[int, typer.Option(help="Seed that chooses the images from the lab's test split.")] = 0,
) -> Outcome:
    """Caption drawn comic strips and scenes with the lab's model, and flag its hallucinations.

    Needs no network. The images are from the lab's test split, which neither the model nor the detector has seen.
    """
    from gazeguard import lab
    from gazeguard.guard import GazeGuard
    from gazeguard.lab.labels import write_captions
    from gazeguard.replay.page import page

    folder.mkdir(parents=True, exist_ok=True)
    guard = GazeGuard(*ModelOptions("lab").load(), policy=policy)
    samples = lab.samples("test", images, seed)
    reports = write_captions(guard, samples, do_sample=False, batch_size=5)
    entries, totals = [], [0, 0, 0, 0, 0]
    for sample, report in zip(samples, reports, strict=True):
        entry, counts = _demo_entry(sample, report)
        entries.append(entry)
        totals = [total + more for total, more in zip(totals, counts, strict=True)]
        show_report(entry.title, report, entry.truth or ["everything is in the image"])
    path = folder / "replay.html"
    path.write_text(page(entries, title="GazeGuard demo"), encoding="utf-8")
    named, absent, false, caught, false_positives = totals
    out.print(
        f"{count(len(samples), 'image')}, {count(named, 'object')} named, {false} of them hallucinated (absent, elsewhere or "
        f"of another colour; CHAIR_i counts the {absent} absent alone): [bold]{caught} flagged, "
        f"{count(false - caught, 'false negative')}, {count(false_positives, 'false positive')}[/]."
    )
    out.print(f"Replay page: [bold]{escape(str(path))}[/]", soft_wrap=True)
    return Outcome(f"open {path} in a browser; for a model of your own, gazeguard fit MODEL --out DIR.")


def _demo_entry(sample: Sample, report: Report) -> tuple[Entry, tuple[int, int, int, int, int]]:
    """A caption of the demo with its truth: objects named, absent ones, false ones, flagged ones of these, false positives."""
    from gazeguard.lab.truth import decided_claims, mentions
    from gazeguard.replay.page import Entry

    known = {mention.phrase: mention for mention in mentions(sample.drawing, report.caption)}
    flagged = {finding.claim.phrase for finding in report.findings if finding.flagged}
    false = {claim.phrase for claim, _, is_false in decided_claims(sample.drawing, report.caption) if is_false}
    wrong = dict.fromkeys(flagged - false, "false positive, it is there as the caption says")
    wrong |= {phrase: f"false negative, {known[phrase].explanation}" for phrase in false - flagged if phrase in known}
    truth = [f"{phrase.text}: {wrong.get(phrase, known[phrase].explanation)}" for phrase in known if phrase in flagged | false]
    panels = sample.drawing.panels
    title = f"strip of {panels}" if panels else "scene"
    boxes = tuple((f"panel {n + 1}", sample.drawing.panel_box(n)) for n in range(panels))
    entry = Entry(f"{title} ({sample.id})", sample.image, report, tuple(truth), boxes)
    absent = sum(not mention.present for mention in known.values())
    return entry, (len(known), absent, len(false), len(false & flagged), len(flagged - false))


@command(app, panel=CAPTIONS)
def caption(
    images: Annotated[list[str], typer.Argument(help="Images, or folders of images.", metavar="IMAGE...")],
    guarded: GuardOptions,
    prompt: PromptOption = DEFAULT_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a caption, in tokens.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sampling temperature; 0 decodes greedily.", show_default="the model's own setting"),
    ] = None,
    batch_size: BatchOption = 8,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE", help="Also write the captions as JSONL rows, which eval, train and evals read."),
    ] = None,
    html: PageOption = None,
    as_json: JsonOption = False,
) -> Outcome:
    """Caption images and flag what they do not support.

    An image that cannot be read is unchecked, and the others are captioned.
    """
    names = _image_files(images)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature is not None:
        options |= {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature else {})
    guard = guarded.guard()
    batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
    entries = [entry for batch in track(batches, "captioning") for entry in _captioned(guard, batch, prompt, options)]
    if rows is not None:
        _write_rows(rows, entries, prompt)
    return _finish(guard, guarded, entries, html, as_json)


def _write_rows(path: Path, entries: Sequence[Entry], prompt: str) -> None:
    """Write one row per image that has a caption: image (relative to the file), image_id, caption, prompt.

    image_id is the number that the name ends in, as COCO's and AMBER's do; a name without one gives none.
    """
    from gazeguard.vision.images import URI

    lines = []
    for entry in entries:
        if entry.report.caption:
            is_uri = URI.match(entry.title)
            number = None if is_uri else re.search(r"\d+$", Path(entry.title).stem)
            row: dict[str, Any] = {"image": entry.title if is_uri else os.path.relpath(entry.title, path.parent)}
            row |= {"image_id": int(number[0])} if number else {}
            lines.append(json.dumps(row | {"caption": entry.report.caption, "prompt": prompt}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    err.print(f"rows: {path}", soft_wrap=True, markup=False)


def _image_files(sources: Sequence[str]) -> list[str]:
    """The images that were named, with the images of a folder in place of the folder, by name."""
    from gazeguard.filtering.rows import IMAGE_SUFFIXES

    files: list[str] = []
    for source in sources:
        if not Path(source).is_dir():
            files.append(source)
            continue
        inside = sorted(str(path) for path in Path(source).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not inside:
            raise InputError(f"The folder {source} has no image ({', '.join(sorted(IMAGE_SUFFIXES))}). Give another folder.")
        files += inside
    return files


def _captioned(guard: GazeGuard, names: Sequence[str], prompt: str, options: dict[str, Any]) -> list[Entry]:
    """One entry per image; an image that cannot be read, or that the model refuses, is unchecked, with the reason."""
    from gazeguard.replay.page import Entry
    from gazeguard.vision.images import load_image

    loaded: dict[int, Image] = {}
    reports: dict[int, Report] = {}
    for number, name in enumerate(names):
        try:
            loaded[number] = load_image(name)
        except InputError as error:
            reports[number] = guard.unchecked("", str(error))
    try:
        written = _generate(guard, list(loaded.values()), prompt, options) if loaded else []
        reports |= dict(zip(loaded, written, strict=True))
    except GazeGuardError:
        for number, image in loaded.items():
            try:
                (reports[number],) = _generate(guard, [image], prompt, options)
            except GazeGuardError as error:
                reports[number] = guard.unchecked("", str(error))
    return [Entry(name, loaded.get(number), reports[number]) for number, name in enumerate(names)]


def _generate(guard: GazeGuard, images: Sequence[Image], prompt: str, options: dict[str, Any]) -> list[Report]:
    from gazeguard.vision.encoding import encode

    inputs = encode(guard.model, guard.processor, images, [prompt] * len(images)).inputs
    guard.generate(**inputs, **options, picture_sizes=[[image.size] for image in images])
    return guard.reports


@command(app, panel=CAPTIONS)
def check(
    image: Annotated[str, typer.Argument(help="An image.", metavar="IMAGE")],
    text: Annotated[str, typer.Option("--caption", help="The caption; any model or person may have written it.")],
    guarded: GuardOptions,
    prompt: PromptOption = DEFAULT_PROMPT,
    html: PageOption = None,
    as_json: JsonOption = False,
) -> Outcome:
    """Check a caption against its image, whoever wrote it."""
    from gazeguard.replay.page import Entry
    from gazeguard.vision.images import load_image

    loaded = load_image(image)
    guard = guarded.guard()
    with status("checking"):
        entry = Entry(image, loaded, guard.check(loaded, text, prompt))
    return _finish(guard, guarded, [entry], html, as_json)


def _finish(guard: GazeGuard, guarded: GuardOptions, entries: Sequence[Entry], html: Path | None, as_json: bool) -> Outcome:
    """Print reports, write the page, and choose the next step and the exit code that fits the verdicts."""
    from gazeguard.claims.repetition import shortened
    from gazeguard.replay.page import page
    from gazeguard.vision.images import URI

    for entry in entries:
        if as_json:
            typer.echo(json.dumps({"image": entry.title, **entry.report.to_dict()}, allow_nan=False))
        else:
            show_report(shortened(entry.title) if URI.match(entry.title) else entry.title, entry.report)
    if html is not None:
        html.write_text(page(entries), encoding="utf-8")
        err.print(f"replay page: {html}", soft_wrap=True, markup=False)
    verdicts = {entry.report.verdict for entry in entries}
    model, folder = guarded.model or "lab", guarded.artifacts or "DIR"
    if guard.heads.unusable:
        following = other_heads(model, folder)
    elif guard.detector is None:
        following = f"fit a detector, without labels: {shlex.join(['gazeguard', 'fit', model, '--out', folder])}"
    elif html is not None:
        following = f"open {html} in a browser."
    else:
        following = "see what the model attended to: the same command with --html PAGE.html"
    return Outcome(following, FAILED if "unchecked" in verdicts else FLAGGED if "flag" in verdicts else 0)
