"""Commands for sets of captions: filter and replay."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import count, err, indented, note, one_line, out, stoppable
from gazeguard.cli.options import (
    BatchOption,
    CaptionColumn,
    CaptionSuffix,
    EncodingOption,
    GuardOptions,
    ImageColumn,
    PromptOption,
    WriteOption,
)
from gazeguard.errors import InputError
from gazeguard.progress import status
from gazeguard.prompts import DEFAULT_PROMPT

if TYPE_CHECKING:
    from gazeguard.filtering.caption_filter import CaptionFilter
    from gazeguard.filtering.ray import RayActorPool
    from gazeguard.filtering.readers import Source
    from gazeguard.filtering.rows import Row
    from gazeguard.filtering.shards import WebDataset
    from gazeguard.filtering.writer import Results
    from gazeguard.replay.page import Entry
    from gazeguard.report import Report

DATASETS = "Filter data sets"


@command(app, "filter", panel=DATASETS)
def filter_captions(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A .jsonl or .jsonl.gz file (keys: image, a path from its folder, and caption), a .parquet file or a "
            "webdataset .tar; or a folder of .parquet or .tar files, or of images with captions beside them in .txt.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or the folder of an interrupted run.")],
    guarded: GuardOptions,
    prompt: PromptOption = DEFAULT_PROMPT,
    label_only: Annotated[
        bool, typer.Option("--label-only", help="Write all rows into one file, in order, with their verdicts.")
    ] = False,
    batch_size: BatchOption = 16,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode images ahead of the model.")] = 2,
    chunk: Annotated[int, typer.Option(min=1, help="Rows per checkpoint; an interruption loses at most these.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a caption that is written, in tokens.")] = 256,
    image_column: ImageColumn = "image",
    caption_column: CaptionColumn = "caption",
    write_captions: WriteOption = False,
    caption_ext: CaptionSuffix = ".txt",
    encoding: EncodingOption = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run in Ray actors, in the cluster at RAY_ADDRESS or on this machine.")
    ] = False,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Number of Ray actors; each loads the model.", show_default="one per GPU, or 2")
    ] = None,
    shards: Annotated[
        bool,
        typer.Option("--shards", help="For shards: also write the rows as shards to OUT/shards, with the results in .json."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> Outcome:
    """Sort many captions into kept, flagged and excluded (what could not be checked), each with its reason.

    A row without a caption is excluded; with --write-captions the model writes one. The same command continues an interrupted
    run. The results hold every row once, in the order of the input. summary.json counts the reasons.
    """
    from gazeguard.filtering.readers import check_columns, open_source
    from gazeguard.filtering.run import filter_files
    from gazeguard.filtering.shard_writer import write_shards

    options = {"batch_size": batch_size, "workers": workers, "prompt": prompt, "max_new_tokens": max_new_tokens}
    options |= {"image": image_column, "caption": caption_column, "write_captions": write_captions}
    with stoppable(), ExitStack() as stack:
        rows = open_source(source, image_column, caption_column, caption_ext, encoding)
        check_columns(rows, write_captions)
        packed = _as_shards(rows) if shards else None
        _announce(write_captions)
        judge = stack.enter_context(_ray_pool(guarded, actors, options)) if ray else _local_filter(guarded, options)
        settings = judge.run_settings(rows, source if source.is_dir() else source.parent, chunk, label_only)
        summary = filter_files(judge, rows, _results(folder, settings, label_only), chunk, progress=True)
        if packed is not None:
            write_shards(folder, packed)
    given = _input_options(image_column, caption_column, caption_ext, encoding) + guarded.arguments()
    return _conclude(summary, folder, as_json, f"gazeguard replay {shlex.quote(str(source))} PAGE.html --skip-passed{given}")


def _results(folder: Path, settings: dict[str, Any], label_only: bool) -> Results:
    """The folder of the results, with a note where it is complete already."""
    from gazeguard.filtering.writer import Results

    results = Results(folder, settings, label_only)
    if results.finished():
        note(f"{folder} is complete already: nothing is judged again.")
    return results


def _as_shards(source: Source) -> WebDataset:
    """The input, for what can be done with shards alone."""
    from gazeguard.filtering.shards import WebDataset

    if not isinstance(source, WebDataset):
        raise InputError(f"{source.files()[0]} is no webdataset .tar. Leave --shards out.")
    return source


def _conclude(summary: dict[str, Any], folder: Path, as_json: bool, following: str) -> Outcome:
    """Show what has become of the rows; the command that follows shows them one by one."""
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _show_summary(summary, folder)
    if summary["excluded"] == summary["rows"]:
        _say_none_was_checked(Counter(summary["reasons"].get("unchecked", {})))
        return Outcome(f"see {folder / 'summary.json'} for every reason.", 2)
    return Outcome(f"see them: {following}")


def _input_options(*values: str | None) -> str:
    """The options of an input that differ from their defaults, as typed."""
    defaults = {"image-column": "image", "caption-column": "caption", "caption-ext": ".txt", "encoding": None}
    pairs = zip(defaults.items(), values, strict=True)
    return "".join(f" --{name} {shlex.quote(str(value))}" for (name, default), value in pairs if value != default)


def _announce(write_captions: bool) -> None:
    """Say first whether captions are checked alone or also written."""
    if write_captions:
        note("existing captions are checked; rows without a caption get one, which is checked, too.")
    else:
        note("only existing captions are checked; rows without one are excluded (--write-captions writes them).")


def _local_filter(guarded: GuardOptions, options: dict[str, Any]) -> CaptionFilter:
    from gazeguard.filtering.caption_filter import CaptionFilter

    return CaptionFilter(guarded.guard(), **options)


def _ray_pool(guarded: GuardOptions, actors: int | None, options: dict[str, Any]) -> RayActorPool:
    from gazeguard.filtering.ray import RayActorPool
    from gazeguard.policy import load_policy

    options = {**options, "policy": load_policy(guarded.policy), **guarded.options()}
    source = guarded.source
    with status("starting Ray's actors"):
        return RayActorPool(source, actors, **options)


def _say_none_was_checked(reasons: Counter[str]) -> None:
    if not reasons:
        err.print("error: no caption could be checked; the input has no rows.")
        return
    (reason, number), total = reasons.most_common(1)[0], reasons.total()
    err.print(f"error: no caption could be checked; {number} of {total}: {one_line(reason)}.", markup=False, soft_wrap=True)


def _show_summary(summary: dict[str, Any], folder: Path) -> None:
    from gazeguard.filtering.readers import TABLES

    for part, verdict in (("kept", "pass"), ("flagged", "flag"), ("excluded", "unchecked")):
        out.print(f"[bold]{summary[part]}[/] {part}")
        for reason, number in summary["reasons"].get(verdict, {}).items():
            indented(f"{number}: {one_line(reason)}", 2, "dim")
    for suffix, number in summary.get("unread", {}).items():
        files, suffix = count(number, "file"), one_line(suffix)
        if suffix in TABLES:
            indented(f"not read: {suffix}; give it as IN (as .jsonl), with --image-column file_name --caption-column text", 2)
        else:
            indented(f"not read: {files} with {suffix} beside the images (--caption-ext {suffix})", 2)
    out.print(f"{summary['rows']} rows: [bold]{escape(str(folder))}[/]", soft_wrap=True)


@command(app, panel=DATASETS)
def replay(
    source: Annotated[Path, typer.Argument(metavar="IN", help="What filter reads: a .jsonl, .parquet or .tar, or a folder.")],
    html: Annotated[Path, typer.Argument(metavar="PAGE", help="The .html file to write.")],
    guarded: GuardOptions,
    prompt: PromptOption = DEFAULT_PROMPT,
    most: Annotated[int, typer.Option(min=1, help="Maximum number of captions on the page.")] = 500,
    skip_passed: Annotated[bool, typer.Option("--skip-passed", help="Show only what was flagged or not checked.")] = False,
    edge: Annotated[int, typer.Option(min=16, help="Longest edge of an image on the page, in pixels.")] = 512,
    batch_size: BatchOption = 16,
    image_column: ImageColumn = "image",
    caption_column: CaptionColumn = "caption",
    write_captions: WriteOption = False,
    caption_ext: CaptionSuffix = ".txt",
    encoding: EncodingOption = None,
    judge_again: Annotated[
        bool, typer.Option("--judge-again", help="Run the model again on rows that filter has judged, to show the gaze.")
    ] = False,
) -> Outcome:
    """Write one page that replays many captions token by token, with a list to search and to filter by verdict.

    Rows that filter has judged keep their verdicts, unless you give --judge-again. A row without a caption is shown as not
    checked; with --write-captions the model writes one, as in filter.
    """
    from gazeguard.filtering.readers import check_columns, open_source
    from gazeguard.filtering.run import judged_rows, replay_entries, row_progress
    from gazeguard.filtering.verdicts import has_verdicts, saved_report
    from gazeguard.replay.page import page
    from gazeguard.vision.images import BACKGROUND

    if not html.parent.is_dir():  # before the work, not after it
        raise InputError(f"The folder of the page, {html.parent}, does not exist. Create it, or give another path.")
    rows = open_source(source, image_column, caption_column, caption_ext, encoding)
    check_columns(rows, write_captions)
    if has_verdicts(rows) and not judge_again:
        note("the page shows the verdicts of the input, without gaze; --judge-again runs the model to record it.")
        judged: Iterator[tuple[Row, Report]] = ((row, saved_report(row)) for row in rows.rows())
        background = BACKGROUND
    else:
        columns = {"image": image_column, "caption": caption_column, "write_captions": write_captions}
        _announce(write_captions)
        judge = _local_filter(guarded, {"batch_size": batch_size, "prompt": prompt, **columns})
        judged, background = judged_rows(judge, rows), judge.guard.tracer.background
    reasons: Counter[str] = Counter()  # of what is unchecked; "" for every other caption
    with row_progress("replaying", min(most, rows.count())) as advance:
        with_reasons = _with_reasons(judged, reasons)
        shown = replay_entries(with_reasons, image_column, not skip_passed, background)
        if (first := next(shown, None)) is None:
            why = "every caption passed; leave --skip-passed out to see them" if reasons else "the input has no rows"
            raise InputError(f"There is nothing to show: {why}.")
        entries = islice(chain([first], shown), most)
        text = page(_counted(entries, advance), title=f"GazeGuard: {source.name}", edge=edge)
    html.write_text(text, encoding="utf-8")
    out.print(f"Replay page: [bold]{escape(str(html))}[/]", soft_wrap=True)
    if not reasons[""]:
        _say_none_was_checked(+reasons)
        return Outcome(f"open {html} in a browser for the reasons.", 2)
    return Outcome(f"open {html} in a browser.")


def _with_reasons(judged: Iterable[tuple[Row, Report]], reasons: Counter[str]) -> Iterator[tuple[Row, Report]]:
    """The rows as they come, and why what is unchecked is so, counted."""
    from gazeguard.filtering.writer import reason_category

    for row, report in judged:
        reasons[reason_category(report.reason) if report.verdict == "unchecked" else ""] += 1
        yield row, report


def _counted(entries: Iterable[Entry], advance: Callable[[int], None]) -> Iterator[Entry]:
    for entry in entries:
        yield entry
        advance(1)
