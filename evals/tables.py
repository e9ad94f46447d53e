"""Tables of the documents, rewritten from the result files, and the demo's output: ``python -m evals.tables``.

A table stands between ``<!-- table NAME: PATTERN... -->`` and ``<!-- end -->``: the figures of ``evals/results/NAME.json``
whose keys match one of the patterns, in the order of the patterns. Between ``<!-- compare NAME: PATTERN... -->`` and the end
both labs stand side by side, from ``NAME.json`` and ``NAME_scenes.json``. The demo's real output stands between
``<!-- demo -->`` and ``<!-- end demo -->``, the README's table of both labs between ``<!-- headline -->`` and
``<!-- end headline -->``. ``evals/results/families.md`` is made whole.
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
DOCUMENTS = (
    ROOT / "docs" / "results.md",
    ROOT / "evals" / "README.md",
    ROOT / "gazeguard" / "lab" / "checkpoint" / "README.md",
)
WITH_DEMO = ROOT / "docs" / "how-it-works.md"
DEMO = re.compile(r"(<!-- demo -->\n).*?(<!-- end demo -->)", re.S)
TABLE = re.compile(r"(<!-- table (\w+): ([^>]*?) -->\n).*?(<!-- end -->)", re.S)
COMPARED = re.compile(r"(<!-- compare (\w+): ([^>]*?) -->\n).*?(<!-- end -->)", re.S)
HEADLINE = re.compile(r"(<!-- headline -->\n).*?(<!-- end headline -->)", re.S)
# The README's table of both labs: plain name of a figure, result file, pattern of its key.
HEADLINE_ROWS = (
    ("False objects per object that the model names (CHAIR_i), greedy", "captioner", "chair_i_greedy"),
    ("Detection: AUROC of the detector", "detection", "auroc_detector_within_bins_sampled"),
    ("... of the text alone", "detection", "auroc_text_only_within_bins_sampled"),
    ("... lift of the gaze over the text alone, paired", "detection", "lift_within_bins_sampled"),
    ("... of the gaze heads' logit attribution, nothing fitted", "detection", "auroc_dla_within_bins_sampled"),
    ("... of a detector fitted without labels", "fit", "*_auroc_label_free*"),
    ("... of detectors on random heads of the same layers, mean", "detection", "auroc_random_heads_mean_within_bins_sampled"),
    ("Calibration error (ECE)", "detection", "ece_sampled"),
    ("`rewind`: CHAIR_i, relative reduction", "mitigation", "rewind_chair_i_reduction_greedy"),
    ("`rewind`: change of recall", "mitigation", "rewind_recall_change_greedy"),
    ("Time of `mark` over plain generation, batch 8", "cost", "time_ratio_mark_batch_8"),
    ("Time of `rewind` over plain generation, batch 8", "cost", "time_ratio_rewind_batch_8"),
)
LABS = {"tiny lab": "", "scenes lab": "_scenes"}  # with the ending of their result files
SATURATED = 0.995  # an AUROC above it says that the task is too easy to compare methods


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
    command = meta.get("command", f"evals.{name}")
    lines += ["", f"`python -m {command}`, {meta['date']}, weights {meta['lab_weights']}, torch {meta['torch']}.", ""]
    return "\n".join(lines)


def compared(name: str, patterns: list[str]) -> str:
    """The Markdown table of both labs; a lab that was not measured has no column."""
    paths = {lab: ROOT / "evals" / "results" / f"{name}{ending}.json" for lab, ending in LABS.items()}
    results = {lab: json.loads(path.read_text(encoding="utf-8")) for lab, path in paths.items() if path.is_file()}
    keys = dict.fromkeys(
        key for pattern in patterns for result in results.values() for key in result["figures"] if fnmatchcase(key, pattern)
    )
    lines = ["| figure | " + " | ".join(results) + " |", "|---" * (1 + len(results)) + "|"]
    for key in keys:
        cells = (_cell(key, result["figures"].get(key)) for result in results.values())
        lines.append(f"| `{key}` | " + " | ".join(cells) + " |")
    said = (
        f"{lab}: `python -m {made['meta'].get('command', f'evals.{name}')}`, {made['meta']['date']}"
        for lab, made in results.items()
    )
    return "\n".join([*lines, "", "; ".join(said) + ".", ""])


def headline() -> str:
    """The README's table: the figures of `HEADLINE_ROWS` in both labs."""
    lines = ["| figure | " + " | ".join(LABS) + " |", "|---" * (1 + len(LABS)) + "|"]
    for name, result, pattern in HEADLINE_ROWS:
        cells = []
        for ending in LABS.values():
            path = ROOT / "evals" / "results" / f"{result}{ending}.json"
            figures = json.loads(path.read_text("utf-8"))["figures"] if path.is_file() else {}
            key = next((key for key in figures if fnmatchcase(key, pattern)), pattern)
            cells.append(_cell(key, figures.get(key)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(key: str, made: dict | None) -> str:
    if made is None:
        return "not measured"
    if "auroc" in key and made["value"] > SATURATED:
        return f"> {SATURATED} (saturated)"
    ci = "" if made["ci"] is None else f" ({made['ci'][0]:.3g} to {made['ci'][1]:.3g})"
    return f"{made['value']:.3g}{ci}"


def renewed(text: str) -> str:
    """A document with its tables as the result files have them."""
    text = COMPARED.sub(lambda found: f"{found[1]}{compared(found[2], found[3].split())}{found[4]}", text)
    return TABLE.sub(lambda found: f"{found[1]}{table(found[2], found[3].split())}{found[4]}", text)


def families() -> str:
    """What ``tests/invariants.py`` found of every family of vision-language models, as a page."""
    result = json.loads((ROOT / "evals" / "results" / "families.json").read_text(encoding="utf-8"))
    meta, invariants = result["meta"], result["meta"]["invariants"]
    lines = [
        "# Families of vision-language models",
        "",
        "The invariants on a tiny model of each real class, with random weights, in transformers "
        f"{meta['transformers']} (torch {meta['torch']}, {meta['date']}): `python tests/invariants.py --out "
        "evals/results/families.json`, then `python -m evals.tables`. The invariants: "
        + ", ".join(f"`{invariant}`" for invariant in invariants)
        + ".",
        "",
        "| family | class | image tokens of one image | grid | invariants |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(result["families"].items(), key=lambda item: item[0].lower()):
        broken = {invariant: why for invariant, why in row["invariants"].items() if why is not True}
        kept = "; ".join(f"not `{invariant}`: {why}" for invariant, why in broken.items()) or "all"
        lines.append(f"| {name} | `{row['class']}` | {row['layout']} | {row['grid']} | {kept} |".replace("|img", "\\|img"))
    lines += ["", "Refused by name:", "", "| model | class | why |", "|---|---|---|"]
    lines += [f"| {name} | `{row['class']}` | {row['why']} |" for name, row in result["refused"].items()]
    rest = {**result["not_tried"], **dict.fromkeys(meta["not_examined"], "no tiny model has been made of it")}
    lines += ["", "Not tried: " + "; ".join(f"`{key}` ({why})" for key, why in sorted(rest.items())) + "."]
    return "\n".join(lines) + "\n"


def demo() -> str:
    """What ``gazeguard demo --images 2`` prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gazeguard", "demo", "--images", "2"]
        made = subprocess.run(command, cwd=folder, env=os.environ | {"COLUMNS": "110"}, check=True, capture_output=True)
    lines = [line.rstrip() for line in made.stdout.decode().strip().splitlines()]
    return "\n".join(["```", "$ gazeguard demo --images 2", *lines, "```", ""])


def main() -> None:
    """Renew the tables in the documents."""
    (ROOT / "evals" / "results" / "families.md").write_text(families(), encoding="utf-8")
    for path in DOCUMENTS:
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path, part, shown in ((ROOT / "README.md", HEADLINE, headline()), (WITH_DEMO, DEMO, demo())):
        text = part.sub(lambda found, shown=shown: f"{found[1]}{shown}{found[2]}", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
