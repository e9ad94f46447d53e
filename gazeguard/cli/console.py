"""Output of the commands: two consoles, a report in colour, and the note, error and next-step lines."""

from __future__ import annotations

import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.text import Text

from gazeguard.claims.english import count as count
from gazeguard.errors import GazeGuardError
from gazeguard.progress import show_progress

if TYPE_CHECKING:
    from gazeguard.report import Report


class _Console(Console):
    """A console whose lines, where it is no terminal, end where their text ends: rich pads them to the width of the console."""

    def print(self, *objects: Any, **options: Any) -> None:
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))
        self.file.flush()


out, err = _Console(highlight=False), _Console(stderr=True, highlight=False)
UNWRAPPED = 1_000_000  # columns of a console that is no terminal: no line is wrapped
FLAGGED, FAILED, STOPPED = 1, 2, 128  # exit codes; STOPPED plus the number of the signal
STYLES = {"pass": "green", "flag": "bold red", "unchecked": "yellow"}
LINE_STYLES = {"flagged": "red", "reason": "yellow", "filtered": "green"}

_quiet = False


class Verbosity(NamedTuple):
    """What `configure` was told, for another process."""

    verbose: bool
    quiet: bool


def verbosity() -> Verbosity:
    """What `configure` was told last."""
    return Verbosity(logging.getLogger("gazeguard").level == logging.INFO, _quiet)


def configure(verbose: bool = False, quiet: bool = False) -> None:
    """Set up streams, logging and progress for one command.

    Args:
        verbose: Show the log of the package from INFO.
        quiet: Show neither notes nor the next step nor progress, and the log from ERROR; results and errors stay.
    """
    global _quiet
    _quiet = quiet
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot write is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for console in (out, err):
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = UNWRAPPED
    show_progress(not quiet)
    if quiet or not err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, which tqdm reads when it is imported
    logger = logging.getLogger("gazeguard")
    logger.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _ErrorStream)]
    logger.addHandler(_ErrorStream())


class _ErrorStream(logging.Handler):
    """A handler for the stderr of now, whatever it was when the handler was made."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def note(text: str) -> None:
    """Print one line on stderr, unless the command is quiet."""
    if not _quiet:
        err.print(Text(f"note: {one_line(text)}", style="yellow"), soft_wrap=True)


def next_step(text: str) -> None:
    """Print what to do next on stderr, unless the command is quiet."""
    if not _quiet:
        err.print(Text.assemble(("next:", "bold"), " ", one_line(text)), soft_wrap=True)


def other_heads(model: str, folder: str | Path) -> str:
    """The next step where the gaze heads of a model are unusable."""
    command = shlex.join(["gazeguard", "heads", model, "--material", "FOLDER", "--out", str(folder)])
    return f"try comics that the model understands: {command}; docs/fitting.md has the format of FOLDER"


def one_line(text: str) -> str:
    """Text from outside in one line, without what could steer the terminal."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in " ".join(text.split())
    )


@contextmanager
def errors() -> Iterator[None]:
    """Turn what GazeGuard raises on purpose, and files that cannot be read or written, into one line and exit code 2."""
    try:
        yield
    except (GazeGuardError, OSError) as error:
        message = str(error)
        if not isinstance(error, GazeGuardError):
            message = f"{error.filename or 'A file'} cannot be read or written: {error.strerror or error}. Give another path."
        err.print(Text.assemble(("error:", "bold red"), " ", one_line(message)), soft_wrap=True)
        raise typer.Exit(FAILED) from error


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, as clusters send it, ends a run in good order, as Ctrl-C does; both say that the run can continue."""
    caught = [signal.SIGINT]

    def stop(number: int, _: Any) -> None:
        caught[0] = signal.Signals(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        err.print(f"stopped by {caught[0].name}. Finished chunks are kept: the same command continues from there.")
        raise typer.Exit(STOPPED + caught[0]) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def indented(text: str, by: int, style: str = "") -> None:
    """Print text on stdout, indented also where a narrow terminal wraps it."""
    out.print(Padding(Text(text, style=style), (0, 0, 0, by), expand=False))


def show_markdown(text: str) -> None:
    """Print Markdown on stdout: drawn on a terminal, as it is into a file."""
    if out.is_terminal:
        out.print(Markdown(text))
    else:
        typer.echo(text, nl=False)


def show_report(title: str, report: Report, truth: Sequence[str] = ()) -> None:
    """Print a report in colour, and the truth where it is known."""
    verdict, *lines = report.lines(title)
    out.print(Text.assemble((verdict.text[:9], STYLES[report.verdict]), (verdict.text[9:], "bold")))
    for line in lines:
        indented(line.text, 2 if line.role == "caption" else 4, LINE_STYLES.get(line.role, ""))
    for fact in truth:
        indented(f"truth: {fact}", 4, "dim")
    out.print()
