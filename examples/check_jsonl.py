"""Check a JSONL file of captions: ``python check_jsonl.py IN.jsonl OUT.jsonl [MODEL [ARTIFACTS]]``; by default the lab's model.

A row has an image (its path, seen from the file) and a caption by whatever wrote it. ``gazeguard filter`` does the same for
millions of rows, and resumes.
"""

import json
import sys
from itertools import chain
from pathlib import Path

from gazeguard import GazeGuard

BATCH = 16  # captions that the model sees at once


def row_of(source: str, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
        row["image"], row["caption"]
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{source}, line {number}: expected a JSON object with image and caption ({error!r}).")
    return row


def main(source: str, target: str, model: str = "lab", artifacts: str | None = None) -> None:
    guard = GazeGuard.from_pretrained(model, artifacts=artifacts)
    rows = [row_of(source, *line) for line in enumerate(Path(source).read_text(encoding="utf-8").splitlines(), 1)]
    images = [Path(source).parent / row["image"] for row in rows]
    captions = [row["caption"] for row in rows]
    starts = range(0, len(rows), BATCH)
    reports = chain.from_iterable(guard.check_all(images[i : i + BATCH], captions[i : i + BATCH]) for i in starts)
    with Path(target).open("w", encoding="utf-8") as file:
        for row, report in zip(rows, reports, strict=True):
            flagged = [str(finding.claim) for finding in report.flagged]
            checked = {"verdict": report.verdict, "reason": report.reason, "flagged": flagged}
            file.write(json.dumps({**row, **checked}) + "\n")
            print(report.verdict, row["image"], *flagged, sep="\t")


if __name__ == "__main__":
    if not 2 <= len(sys.argv[1:]) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
