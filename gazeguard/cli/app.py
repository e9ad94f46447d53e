"""Typer application and the frame of every command: shared options, errors, the next step and the exit code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from gazeguard import __version__
from gazeguard.cli.console import configure, errors, next_step
from gazeguard.cli.options import ModelOptions

EXIT_CODES = """\
Exit codes:

* 0: nothing was flagged; demo, filter and replay: the work is complete, whatever the verdicts, and something could be checked

* 1: something was flagged; heads: no usable gaze heads; doctor: a check failed; audit: the model does not use the image

* 2: something could not be checked, or the call was wrong, or a file cannot be read or written

* 130, 143: stopped by Ctrl-C or SIGTERM; the same filter or fit command then continues
"""

app = typer.Typer(
    help="Records where a vision-language model attends while it writes, and flags what the image does not support.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what is being done.", rich_help_panel="Output")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, notes or next step.", rich_help_panel="Output")]


@dataclass(frozen=True)
class Outcome:
    """How a command ended: what to do next, and the exit code."""

    next: str
    code: int = 0


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gazeguard {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    configure(verbose, quiet)


def command(
    target: typer.Typer, name: str | None = None, panel: str | None = None
) -> Callable[[Callable[..., Outcome]], Callable[..., None]]:
    """Register a function as a command.

    A parameter whose type is `ModelOptions`, or a class derived from it, becomes one option per field; a field that the
    function declares itself (a positional MODEL) is taken from there.

    Args:
        target: The application or group.
        name: Of the command; by default the function's.
        panel: Heading under which ``--help`` lists the command.

    Returns:
        A decorator for functions that return an `Outcome`.
    """

    def register(function: Callable[..., Outcome]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters
        groups = {key: p.annotation for key, p in parameters.items() if _is_group(p.annotation)}
        shown = {key: p.replace(kind=p.KEYWORD_ONLY) for key, p in parameters.items() if key not in groups}
        own = set(shown)
        for group in groups.values():
            shown |= {key: p for key, p in _options_of(group).items() if key not in own}
        shown |= {key: _option(key, hint, False) for key, hint in (("verbose", VerboseOption), ("quiet", QuietOption))}

        @functools.wraps(function)
        def wrapper(verbose: bool, quiet: bool, **values: Any) -> None:
            if verbose or quiet:  # else as the application was told before the command's name
                configure(verbose, quiet)
            arguments = {key: values[key] for key in own}
            for key, group in groups.items():
                arguments[key] = group(**{field.name: values[field.name] for field in fields(group)})
            with errors():
                outcome = function(**arguments)
            next_step(outcome.next)
            raise typer.Exit(outcome.code)

        vars(wrapper)["__signature__"] = inspect.Signature(list(shown.values()))
        wrapper.__annotations__ = {key: p.annotation for key, p in shown.items()}
        del wrapper.__wrapped__  # typer would read its signature
        return target.command(name, rich_help_panel=panel)(wrapper)

    return register


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, ModelOptions)


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _options_of(group: type) -> dict[str, inspect.Parameter]:
    """One parameter per field of a group of options."""
    hints = get_type_hints(group, include_extras=True)
    return {field.name: _option(field.name, hints[field.name], field.default) for field in fields(group)}
