"""What do the documents say? Rewrites their tables from the result files, and the README's demo: ``python -m evals.tables``.

A table stands between ``<!-- table NAME: PATTERN... -->`` and ``<!-- end -->``: the figures of ``evals/results/NAME.json``
whose keys match one of the patterns, in the order of the patterns. The demo's real output stands between
``<!-- demo -->`` and ``<!-- end demo -->``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import typer

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "gazeguard" / "lab" / "checkpoint" / "README.md")
DEMO = re.compile(r"(<!-- demo -->\n).*?(<!-- end demo -->)", re.S)
TABLE = re.compile(r"(<!-- table (\w+): ([^>]*?) -->\n).*?(<!-- end -->)", re.S)


def table(name: str, patterns: list[str]) -> str:
    """The Markdown table of one result file."""
    result = json.loads((ROOT / "evals" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    lines = ["| figure | value | 95 % interval |", "|---|---|---|"]
    for pattern in patterns:
        for key, made in result["figures"].items():
            if fnmatchcase(key, pattern):
                ci = "" if made["ci"] is None else f"{made['ci'][0]:.4g} to {made['ci'][1]:.4g}"
                lines.append(f"| `{key}` | {made['value']:.4g} | {ci} |")
    meta = result["meta"]
    lines += ["", f"`python -m evals.{name}`, {meta['date']}, weights {meta['lab_weights']}, torch {meta['torch']}.", ""]
    return "\n".join(lines)


def renewed(text: str) -> str:
    """A document with its tables as the result files have them."""
    return TABLE.sub(lambda found: f"{found[1]}{table(found[2], found[3].split())}{found[4]}", text)


def demo() -> str:
    """What ``gazeguard demo --pictures 4`` prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gazeguard", "demo", "--pictures", "4"]
        made = subprocess.run(command, cwd=folder, env=os.environ | {"COLUMNS": "110"}, check=True, capture_output=True)
    lines = [line.rstrip() for line in made.stdout.decode().strip().splitlines()]
    return "\n".join(["```", "$ gazeguard demo --pictures 4", *lines, "```", ""])


def main() -> None:
    """Renew the tables in the documents."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if DEMO.search(text):
            shown = demo()
            text = DEMO.sub(lambda found, shown=shown: f"{found[1]}{shown}{found[2]}", text)
        path.write_text(renewed(text), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
