"""And from the shell? ``gazeguard demo``, ``caption``, ``check``, ``filter``, ``replay``, ``heads``, ``policy``, ``doctor``.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 nothing was flagged, 1 something was flagged,
2 something could not be checked or the call was wrong. ``filter`` ends with 0 when every row has its place, with 2 when the
call was wrong or nothing can be written (a full disk), and with 128 plus its number for a signal (130 for Ctrl-C, 143 for
SIGTERM); after the last two the same command goes on from the last finished chunk.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gazeguard import __version__
from gazeguard.errors import GazeGuardError, InputError

# torch and transformers take seconds to import; each command imports what it needs, so that --help is quick.

app = typer.Typer(
    help="Watches where a vision-language model looks while it writes, and flags what the picture does not support.\n\n"
    "Exit codes: 0 nothing was flagged, 1 something was flagged, 2 something could not be checked or the call was wrong; "
    "filter ends with 0 when every row has its place, with 2 also on a full disk, and with 130 or 143 when Ctrl-C or SIGTERM "
    "stopped it; the same command then goes on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

FLAGGED, FAILED, STOPPED = 1, 2, 128  # STOPPED plus the number of the signal

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder or hub id of a vision-language model.", show_default="the lab's own"),
]
PolicyOption = Annotated[str, typer.Option("--policy", help="Name of a policy, or the path of a .yaml file.")]
PromptOption = Annotated[str, typer.Option("--prompt", help="What the model is asked, or what the caption answers.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object per picture and line, nothing else.")]
PageOption = Annotated[Path | None, typer.Option("--html", help="Also write a replay page here.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gazeguard {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):  # a name or a caption that the terminal cannot write is shown escaped
        stream.reconfigure(errors="backslashreplace")


@contextmanager
def _errors() -> Iterator[None]:
    """What GazeGuard raises on purpose, and files that cannot be read or written, become one line and exit code 2."""
    try:
        yield
    except (GazeGuardError, OSError) as error:
        told = str(error)
        if not isinstance(error, GazeGuardError):
            told = f"{error.filename or 'A file'} cannot be read or written: {error.strerror or error}. Give another path."
        err.print(Text.assemble(("error:", "bold red"), " ", _printable(" ".join(told.split()))), soft_wrap=True)
        raise typer.Exit(FAILED) from error


def _printable(text: str) -> str:
    """Text from outside in one line, without what could steer the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _load(model: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    from gazeguard import lab

    disable_progress_bar()
    with err.status("loading the model"):
        if model is None:
            return lab.load()
        try:
            # False: not even a question whether code from there may run.
            loaded = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=False)
            return loaded.eval(), AutoProcessor.from_pretrained(model, trust_remote_code=False)
        except Exception as error:  # of a folder that is no model transformers raises almost anything
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"{model} cannot be loaded as a vision-language model: {reason} "
                "Give the folder or hub id of a model of transformers' AutoModelForImageTextToText."
            ) from error


def _guard(model: str | None, policy: Any) -> Any:
    """A guard over a model, on a GPU if there is one."""
    import torch

    from gazeguard.guard import GazeGuard

    loaded, processor = _load(model)
    return GazeGuard(loaded.to("cuda") if torch.cuda.is_available() else loaded, processor, policy=policy)


def _show(title: str, report: Any, truth: Sequence[str] = ()) -> None:
    """One caption on the terminal: verdict, marked text, reasons, and the truth where it is known."""
    verdict, *lines = report.lines(title)
    label, style = verdict.text[:9], {"pass": "green", "flag": "bold red", "unchecked": "yellow"}[report.verdict]
    out.print(Text.assemble((label, style), (verdict.text[9:], "bold")))
    styles = {"flagged": "red", "reason": "yellow", "filtered": "green"}
    for line in lines:
        out.print(Padding(Text(line.text, style=styles.get(line.role, "")), (0, 0, 0, 2 if line.role == "caption" else 4)))
    for line in truth:
        out.print(Padding(Text(f"truth: {line}", style="dim"), (0, 0, 0, 4)))
    out.print()


def _finish(entries: Sequence[Any], html: Path | None, as_json: bool, files: Sequence[str]) -> None:
    """Print reports, write the page, and leave with the exit code that fits the verdicts."""
    from gazeguard.replay.page import page

    for entry, file in zip(entries, files, strict=True):
        if as_json:
            typer.echo(json.dumps({"image": file, **entry.report.to_dict()}, allow_nan=False))
        else:
            _show(entry.title, entry.report)
    if html is not None:
        html.write_text(page(entries), encoding="utf-8")
        err.print(f"replay page: {html}", soft_wrap=True)
    verdicts = {entry.report.verdict for entry in entries}
    raise typer.Exit(FAILED if "unchecked" in verdicts else FLAGGED if "flag" in verdicts else 0)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the replay page goes.")] = Path("gazeguard-demo"),
    pictures: Annotated[int, typer.Option(min=1, max=200, help="How many pictures, strips and scenes in turn.")] = 10,
    policy: PolicyOption = "mark",
    seed: Annotated[int, typer.Option(help="Which pictures of the lab's test split.")] = 0,
) -> None:
    """Draw comic strips and scenes, let the lab's own model describe them, and flag what it made up.

    Needs no network. The pictures come from the lab's test split, which neither the model nor the detector has seen.
    """
    with _errors():
        from gazeguard import lab
        from gazeguard.guard import GazeGuard
        from gazeguard.lab.training.tiny_fit import write_captions
        from gazeguard.lab.truth import decided_claims, mentions
        from gazeguard.replay.page import Entry, page

        folder.mkdir(parents=True, exist_ok=True)
        guard = GazeGuard(*_load(None), policy=policy)
        samples = lab.samples("test", pictures, seed)
        reports = write_captions(guard, samples, do_sample=False, batch_size=5)
        entries, named, false, caught, false_alarms = [], 0, 0, 0, 0
        for sample, report in zip(samples, reports, strict=True):
            found = {mention.phrase: mention for mention in mentions(sample.drawing, report.caption)}
            flagged = {finding.claim.phrase for finding in report.findings if finding.flagged}
            wrong = {claim.phrase for claim, _, is_false in decided_claims(sample.drawing, report.caption) if is_false}
            named, false = named + len(found), false + len(wrong)
            caught, false_alarms = caught + len(wrong & flagged), false_alarms + len(flagged - wrong)
            truth = [f"{phrase.text}: {found[phrase].explanation}" for phrase in found if phrase in flagged | wrong]
            title = f"strip of {sample.drawing.panels}" if sample.drawing.panels else "scene"
            panels = tuple((f"panel {n + 1}", sample.drawing.panel_box(n)) for n in range(sample.drawing.panels))
            entries.append(Entry(f"{title} ({sample.id})", sample.image, report, tuple(truth), panels))
            _show(entries[-1].title, report, truth or ["all of it is in the picture"])
        path = folder / "replay.html"
        path.write_text(page(entries, title="GazeGuard demo"), encoding="utf-8")
        out.print(
            f"{len(samples)} pictures, {named} things named, {false} of them not there, elsewhere or of another colour: "
            f"[bold]{caught} flagged, {false - caught} missed, {false_alarms} false alarms[/].",
        )
        out.print(f"Step through the words and see where the model looked: [bold]{escape(str(path))}[/]", soft_wrap=True)


@app.command()
def caption(
    images: Annotated[list[str], typer.Argument(help="Pictures.", metavar="IMAGE...")],
    model: ModelOption = None,
    policy: PolicyOption = "mark",
    prompt: PromptOption = "Describe the picture.",
    html: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe pictures and flag what they do not support."""
    with _errors():
        from gazeguard.guard import GazeGuard
        from gazeguard.replay.page import Entry
        from gazeguard.vision.images import load_image

        pictures = [load_image(image) for image in images]
        guard = GazeGuard(*_load(model), policy=policy)
        with err.status("writing"):
            entries = [
                Entry(name, picture, guard.caption(picture, prompt)) for name, picture in zip(images, pictures, strict=True)
            ]
        _finish(entries, html, as_json, images)


@app.command()
def check(
    image: Annotated[str, typer.Argument(help="A picture.", metavar="IMAGE")],
    text: Annotated[str, typer.Option("--caption", help="What was written about it, by whatever model or person.")],
    model: ModelOption = None,
    policy: PolicyOption = "mark",
    prompt: PromptOption = "Describe the picture.",
    html: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a caption that anything wrote against its picture."""
    with _errors():
        from gazeguard.guard import GazeGuard
        from gazeguard.replay.page import Entry
        from gazeguard.vision.images import load_image

        picture = load_image(image)
        guard = GazeGuard(*_load(model), policy=policy)
        entry = Entry(image, picture, guard.check(picture, text, prompt))
        _finish([entry], html, as_json, [image])


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, as clusters send it, ends a run in good order, as Ctrl-C does; both say that the run can go on."""
    caught = [signal.SIGINT]

    def stop(number: int, _: Any) -> None:
        caught[0] = signal.Signals(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        err.print(f"stopped by {caught[0].name}. Finished chunks are kept: the same command goes on from there.")
        raise typer.Exit(STOPPED + caught[0]) from error
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command("filter")
def filter_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A .jsonl (image: path from the file's folder, caption), .parquet or webdataset .tar; a folder of the last "
            "two, or of pictures with captions beside them in .txt.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or that of a run that was broken off.")],
    model: ModelOption = None,
    policy: PolicyOption = "mark",
    prompt: PromptOption = "Describe the picture.",
    label_only: Annotated[
        bool, typer.Option("--label-only", help="All rows into one file, in order, with their labels.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that the model sees at once.")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Threads that unpack pictures ahead of the model.")] = 2,
    chunk: Annotated[int, typer.Option(min=1, help="Rows between two savings: what a kill can cost.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a caption that has to be written.")] = 256,
    image_column: Annotated[str, typer.Option(help="Name of the pictures in JSONL and parquet.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Name of the captions in JSONL and parquet.")] = "caption",
    ray: Annotated[
        bool, typer.Option("--ray", help="In Ray actors: of the cluster at RAY_ADDRESS, or else on this machine.")
    ] = False,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Actors of Ray, each with the model: by default one per GPU, or 2.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Sort many captions into kept, flagged and excluded (what could not be checked), each with its reason.

    Without captions in the input they are written first. A run that was broken off, however, goes on with the same command;
    every row is in the results once, in the order of the input. summary.json counts the reasons.
    """
    with _errors(), _stoppable():
        from gazeguard import lab
        from gazeguard.filtering.caption_filter import CaptionFilter
        from gazeguard.filtering.ray import RayActorPool
        from gazeguard.filtering.readers import open_source
        from gazeguard.filtering.run import filter_files
        from gazeguard.filtering.writer import Results
        from gazeguard.policy import load_policy

        rows = open_source(source, image_column, caption_column)
        options = {
            "batch_size": batch_size,
            "workers": workers,
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "image": image_column,
            "caption": caption_column,
        }
        root, loaded_policy = source if source.is_dir() else source.parent, load_policy(policy)
        with ExitStack() as stack:
            if ray:
                with err.status("starting Ray's actors"):
                    pool = RayActorPool(model or lab.checkpoint_path(), actors, policy=loaded_policy, **options)
                    caption_filter = stack.enter_context(pool)
                    run = caption_filter.run_settings(rows, root, chunk, label_only)
            else:
                caption_filter = CaptionFilter(_guard(model, loaded_policy), **options)
                run = caption_filter.run_settings(rows, root, chunk, label_only)
            summary = filter_files(caption_filter, rows, Results(folder, run, label_only), chunk, progress=True)
        if as_json:
            typer.echo(json.dumps(summary))
            return
        for place, verdict in (("kept", "pass"), ("flagged", "flag"), ("excluded", "unchecked")):
            out.print(f"[bold]{summary[place]}[/] {place}")
            for reason, count in summary["reasons"].get(verdict, {}).items():
                out.print(Padding(Text(f"{count}: {_printable(reason)}", style="dim"), (0, 0, 0, 2)))
        out.print(f"{summary['rows']} rows: [bold]{escape(str(folder))}[/]", soft_wrap=True)


@app.command()
def replay(
    source: Annotated[Path, typer.Argument(metavar="IN", help="What filter reads: a .jsonl, .parquet or .tar, or a folder.")],
    html: Annotated[Path, typer.Argument(metavar="PAGE", help="The .html file to write.")],
    model: ModelOption = None,
    policy: PolicyOption = "mark",
    prompt: PromptOption = "Describe the picture.",
    most: Annotated[int, typer.Option(min=1, help="Show at most so many captions.")] = 500,
    skip_passed: Annotated[bool, typer.Option("--skip-passed", help="Show only what was flagged or not checked.")] = False,
    edge: Annotated[int, typer.Option(min=16, help="Shrink pictures to so many pixels.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that the model sees at once.")] = 16,
    image_column: Annotated[str, typer.Option(help="Name of the pictures in JSONL and parquet.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Name of the captions in JSONL and parquet.")] = "caption",
) -> None:
    """Write one page that replays many captions word by word, with a list to search and to filter by verdict.

    Captions that the input lacks are written first, as filter does.
    """
    with _errors():
        from gazeguard.filtering.caption_filter import CaptionFilter
        from gazeguard.filtering.readers import open_source
        from gazeguard.filtering.run import replay_entries, show_progress
        from gazeguard.replay.page import page

        if not html.parent.is_dir():  # said before the work, not after it
            raise InputError(f"{html.parent}, where the page is to go, is no folder. Make it, or give another path.")
        rows = open_source(source, image_column, caption_column)
        columns = {"image": image_column, "caption": caption_column}
        caption_filter = CaptionFilter(_guard(model, policy), batch_size=batch_size, prompt=prompt, **columns)
        entries = islice(replay_entries(caption_filter, rows, include_passed=not skip_passed), most)
        with show_progress("replaying", min(most, rows.count())) as advance:

            def counted() -> Iterator[Any]:
                for entry in entries:
                    yield entry
                    advance(1)

            text = page(counted(), title=f"GazeGuard: {source.name}", edge=edge)
        html.write_text(text, encoding="utf-8")
        out.print(f"Replay page: [bold]{escape(str(html))}[/]", soft_wrap=True)


@app.command()
def train(
    rows: Annotated[Path, typer.Argument(help="JSONL: image, caption, and labels or objects; see gazeguard.fitting.")],
    model: ModelOption = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the detector, its card and its diagram.")] = Path(
        "detector"
    ),
    heads_file: Annotated[
        Path | None, typer.Option("--heads", help="Gaze heads.", show_default="those in the model's folder")
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Label what the rows tell nothing of by asking the model itself: weak labels.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also learn what the model's answers are worth, for policies that verify.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions replayed at a time.")] = 16,
) -> None:
    """Fit a detector of made-up phrases on captions with labels, for a model of your own."""
    with _errors():
        from gazeguard.fitting import fit_detector, read_captions
        from gazeguard.guard import GazeGuard

        captions = read_captions(rows)
        guard = GazeGuard(*_load(model), heads=heads_file)
        detector, left_out = fit_detector(guard, captions, ask, batch_size, verify)
        detector.save_pretrained(folder)
        for kind, made in detector.kinds.items():
            held = made.validation
            out.print(
                f"{kind}: fitted on {made.claims} claims, {made.false} of them false; on {held.claims} others of "
                f"{held.images} pictures AUROC {held.auroc:.3f}, calibration error {held.ece:.3f}"
            )
        for reason, count in left_out.items():
            out.print(f"left out: {count} of {len(captions)} captions: {escape(reason)}")
        out.print(f"Detector, card and diagram: [bold]{escape(str(folder))}[/]", soft_wrap=True)


@app.command()
def heads(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a vision-language model; or the word show.")],
    shown: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="After show: a file of gaze heads.")] = None,
    file: Annotated[Path, typer.Option("--out", help="Where the gaze heads go, and beside it their picture.")] = Path(
        "heads.json"
    ),
    material: Annotated[
        str, typer.Option("--material", help="page, strip or scene, drawn; or a folder of your own comics.")
    ] = "page",
    strips: Annotated[int, typer.Option(min=2, help="At most so many are shown to the model.")] = 48,
    panels: Annotated[int, typer.Option(min=2, max=6, help="Panels of a drawn strip.")] = 6,
    keep: Annotated[Path | None, typer.Option(help="Keep what was seen here, so that the same command can go on.")] = None,
) -> None:
    """Find a model's gaze heads with comic strips, or show FILE: gazeguard heads show heads.json.

    Exit code 1 when no head follows the words, so that the model has no usable gaze heads.
    """
    with _errors():
        from gazeguard.heads.artifact import GazeHeads
        from gazeguard.heads.discovery import find_heads
        from gazeguard.heads.plots import draw_heads

        if model == "show":
            if shown is None:
                raise InputError("Say which file to show: gazeguard heads show heads.json")
            found = GazeHeads.from_pretrained(shown)
        else:
            from gazeguard.heads.strips import SIZES, draw_strips, load_strips

            drawn = material in SIZES
            pages = draw_strips(strips, panels=panels, style=material) if drawn else load_strips(material)[:strips]
            found = find_heads(*_load(model), pages, keep=keep)
            file.write_text(found.to_json(), encoding="utf-8")
        picture = file.with_suffix(".png")
        draw_heads(found).savefig(picture, dpi=110)
        score, where = found.score(), {head: i for i, head in enumerate(found.all_heads)}
        table = Table(
            "layer", "head", "mass on the described panel", "shuffled", "attends most to the described panel", box=None
        )
        for layer, head in found.heads:
            i = where[layer, head]
            table.add_row(
                f"{layer}", f"{head}", f"{score.mass[i]:.2f}", f"{score.shuffled_mass[i]:.2f}", f"{score.hit_rate[i]:.0%}"
            )
        out.print(table)
        out.print(
            f"{len(found.heads)} of {len(found.all_heads)} heads, ranked by {found.ranked_by} over {found.strips} strips."
        )
        out.print(
            f"Both halves of the strips agree on {found.split_half:.0%} of them. Picture: {escape(str(picture))}",
            soft_wrap=True,
        )
        if found.unusable:
            out.print(Text(found.unusable, style="bold red"))
    raise typer.Exit(FLAGGED if found.unusable else 0)


policies = typer.Typer(help="Look at the policies that come along, or check one of your own.", no_args_is_help=True)
app.add_typer(policies, name="policy")


@policies.command("show")
def policy_show(name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A policy.")]) -> None:
    """Print a policy with every key that it leaves out at its default, as a file that can be used again."""
    import yaml

    from gazeguard.policy import load_policy

    with _errors():
        typer.echo(yaml.safe_dump(load_policy(name).model_dump(exclude_none=True), sort_keys=False), nl=False)


@policies.command("validate")
def policy_validate(file: Annotated[Path, typer.Argument(metavar="FILE", help="A .yaml file.")]) -> None:
    """Say whether a file is a policy: exit code 0 when it is, else 2 with the key, the value and what is allowed."""
    from gazeguard.policy import load_policy

    with _errors():
        out.print(f"{escape(str(file))} is the policy {escape(repr(load_policy(file).name))}.", soft_wrap=True)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id of a model.", show_default="the lab's own")] = None,
    image: Annotated[
        str | None, typer.Option("--image", help="A picture to try it on.", show_default="a drawn comic strip")
    ] = None,
) -> None:
    """Examine whether watching works for a model: exit code 0 when every check passes, 1 when one fails."""
    with _errors():
        from gazeguard.attention.self_test import run_self_test
        from gazeguard.heads.strips import draw_strips
        from gazeguard.vision.encoding import encode
        from gazeguard.vision.images import load_image

        loaded, processor = _load(model)
        picture = load_image(image) if image else draw_strips(1)[0].image
        inputs = encode(loaded, processor, [picture], ["Describe the picture."]).inputs
        with err.status("examining"):
            checks = run_self_test(loaded, processor, inputs, [[picture.size]])
        for check in checks:
            out.print(Text.assemble(("works " if check.ok else "FAILS ", "green" if check.ok else "bold red"), str(check)))
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


if __name__ == "__main__":
    app()
