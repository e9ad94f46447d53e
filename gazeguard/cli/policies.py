"""Commands for policies: list, show and validate."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import out
from gazeguard.policy import load_policy, policy_folder, policy_names

policies = typer.Typer(help="List and show policies, or check one of your own.", no_args_is_help=True)
app.add_typer(policies, name="policy", rich_help_panel="Start here")


@command(policies, "list")
def policy_list() -> Outcome:
    """List the policies that ship with GazeGuard, with what each does."""
    table = Table("policy", "what it does", box=None, pad_edge=False)
    for name in policy_names():
        lines = (policy_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        table.add_row(name, " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#")))
    out.print(table)
    return Outcome("print one in full: gazeguard policy show NAME")


@command(policies, "show")
def policy_show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A policy.", autocompletion=policy_names)],
) -> Outcome:
    """Print a policy with every key that it leaves out at its default, as a file that can be used again."""
    import yaml

    typer.echo(yaml.safe_dump(load_policy(name).model_dump(exclude_none=True), sort_keys=False), nl=False)
    return Outcome("save it as my.yaml, change it, and check it: gazeguard policy validate my.yaml")


@command(policies, "validate")
def policy_validate(file: Annotated[Path, typer.Argument(metavar="FILE", help="A .yaml file.")]) -> Outcome:
    """Check that a file is a policy: exit code 0 when it is, else 2 with the key, the value and what is allowed."""
    out.print(f"{escape(str(file))} is the policy {escape(repr(load_policy(file).name))}.", soft_wrap=True)
    return Outcome(f"use it: gazeguard caption IMAGE --policy {shlex.quote(str(file))}")
