"""Reading of captions: what the parser makes of sentences that were labelled by hand, and of human-labelled descriptions.

The labels and their rules are in ``tests/data/reading``. Sentences of the benchmarks are not part of this repository: they
are read from the folder of public benchmark data and checked by their hash; without it only our own are measured.
``--spacy NAME`` takes the classes of words from a spaCy pipeline instead of the package's tagger.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from evals.common import Figure, Out, Quick, figure, over_images, rate, write
from evals.records import DATA, errors_told
from gazeguard.claims.parse import Caption, Parser, parse

LABELS = Path(__file__).resolve().parents[1] / "tests" / "data" / "reading"
SPLIT = re.compile(r"(?<=[.!?])\s+|\n+")  # of a drawn text into the sentences that labels count
QUICK = 3  # every third description and text of another language; all labelled sentences
FOLDER = Path(os.environ.get("GAZEGUARD_EVALDATA", DATA))
ERRORS = {"vb_attribute": (2, ("attribute", "count")), "vb_relation": (3, ("relation", "location"))}

Interval = tuple[int, int]


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence; offsets are characters, heads are compared by their ends."""

    id: str
    text: str
    modern: bool
    heads: frozenset[int]
    optional_heads: frozenset[int]
    attributes: frozenset[tuple[Interval, int]]
    optional_attributes: frozenset[Interval]
    relations: frozenset[frozenset[int]]


@dataclass
class Counts:
    """True positives, false positives and false negatives of each sentence."""

    hits: list[int] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    def add(self, labelled: frozenset[Any], parsed: frozenset[Any]) -> None:
        """One sentence."""
        self.hits.append(len(labelled & parsed))
        self.extra.append(len(parsed - labelled))
        self.missing.append(len(labelled - parsed))

    def f1(self) -> Figure:
        """Harmonic mean of precision and recall, over all sentences."""
        hits, extra, missing = (np.asarray(values, float) for values in (self.hits, self.extra, self.missing))
        return over_images(len(hits), lambda n: 2 * (hits @ n) / max(1, 2 * (hits @ n) + extra @ n + missing @ n))

    def spurious(self) -> Figure:
        """The share of what was parsed that is not labelled."""
        return rate(self.extra, [hit + extra for hit, extra in zip(self.hits, self.extra, strict=True)])


def drawn_text(row: dict[str, Any], data: Path) -> str:
    """The sentence that a row refers to, from the folder of benchmark data; its hash has to be the row's."""
    lines = (data / row["file"]).read_text(encoding="utf-8").splitlines()
    source = json.loads(lines[row["row"]])
    parts = [part for part in SPLIT.split((source.get("text") or source.get("caption")).strip()) if part]
    text = parts[row["sentence"]]
    if hashlib.sha256(text.encode()).hexdigest() != row["sha256"]:
        raise ValueError(f"{row['id']}: {row['file']}, row {row['row']} is another text than the one that was labelled")
    return text


def sentences(part: str, data: Path | None) -> list[Sentence]:
    """The labelled sentences of a part, "development" or "heldout"; without ``data`` only our own."""
    result = []
    for kind in ("drawn", "modern"):
        if kind == "drawn" and data is None:
            continue
        for line in (LABELS / f"{kind}.{part}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = row["text"] if kind == "modern" else drawn_text(row, data)
            result.append(_sentence(row, text, kind == "modern"))
    return result


def _sentence(row: dict[str, Any], text: str, modern: bool) -> Sentence:
    return Sentence(
        row["id"],
        text,
        modern,
        frozenset(end for _, end in row["objects"]),
        frozenset(end for _, end in row["optional_objects"]),
        frozenset(((a["span"][0], a["span"][1]), a["object"][1]) for a in row["attributes"]),
        frozenset((start, end) for start, end in [*row["optional_attributes"], *(count["span"] for count in row["counts"])]),
        frozenset(frozenset((a[1], b[1])) for a, b in row["relations"]),
    )


def compare(rows: Sequence[Sentence], read: Callable[[str], Caption]) -> dict[str, Counts]:
    """What was labelled against what was parsed: heads, attributes, relations."""
    counts = {"head": Counts(), "attribute": Counts(), "relation": Counts()}
    for row in rows:
        claims = read(row.text).claims
        heads = frozenset(claim.span.end for claim in claims if claim.kind == "object")
        counts["head"].add(row.heads, heads - (row.optional_heads - row.heads))
        attributes = frozenset(
            ((claim.span.start, claim.span.end), claim.related.end)
            for claim in claims
            if claim.kind == "attribute"
            and (claim.span.start, claim.span.end) not in row.optional_attributes
            and claim.related.end not in row.optional_heads
        )
        counts["attribute"].add(row.attributes, attributes)
        relations = frozenset(frozenset((c.span.end, c.related.end)) for c in claims if c.kind == "relation")
        counts["relation"].add(row.relations, relations)
    return counts


def descriptions(data: Path, step: int, read: Callable[[str], Caption]) -> dict[str, Figure]:
    """VBackChecker: a claim of the kind that the human label says is wrong has to be there to be judged at all."""
    lines = (data / "vbackchecker" / "claims.jsonl").read_text(encoding="utf-8").splitlines()[::step]
    rows = [json.loads(line) for line in lines]
    kinds = [{claim.kind for claim in read(row["text"]).claims} for row in rows]
    figures = {"vb_thing": rate(["object" in names for names in kinds], [1] * len(rows))}
    for key, (error, wanted) in ERRORS.items():
        hit = [not names.isdisjoint(wanted) for names, row in zip(kinds, rows, strict=True) if row["type"] == error]
        figures[key] = rate(hit, [1] * len(hit))
    only = ["attribute" in names for names, row in zip(kinds, rows, strict=True) if row["type"] == ERRORS["vb_attribute"][0]]
    figures["vb_attribute_without_counts"] = rate(only, [1] * len(only))
    return figures


def languages(step: int, read: Callable[[str], Caption]) -> dict[str, Figure]:
    """The shares of texts in 12 other languages that are unchecked, and of English texts that are refused."""
    others = json.loads((LABELS / "languages.json").read_text(encoding="utf-8"))
    texts = [text for part in others.values() for text in part][::step]
    english = json.loads((LABELS / "english.json").read_text(encoding="utf-8"))[::step]
    return {
        "other_languages_unchecked": rate([not read(text).claims for text in texts], [1] * len(texts)),
        "english_refused": rate([bool(read(text).reading.refused) for text in english], [1] * len(english)),
    }


def speed(texts: Sequence[str], read: Callable[[str], Caption], seconds: float = 2.0) -> Figure:
    """Captions per second of processor time on one core."""
    read(texts[0])
    start, count = time.process_time(), 0
    while (passed := time.process_time() - start) < seconds:
        read(texts[count % len(texts)])
        count += 1
    return figure(count / passed)


def real_captions(data: Path) -> list[str]:
    """300 captions of LLaVA-1.5, 87 words on average."""
    path = data / "opera-llava-1.5" / "greedy.jsonl"
    return [json.loads(line)["caption"] for line in path.read_text(encoding="utf-8").splitlines()[:300]]


def measure(part: str, data: Path | None, quick: bool, nlp: Parser | None) -> dict[str, Figure]:
    """All figures."""

    def read(text: str) -> Caption:
        return parse(text, nlp)

    step = QUICK if quick else 1
    rows = sentences(part, data)
    everything = compare(rows, read)
    modern = compare([row for row in rows if row.modern], read)
    figures = {
        "head_f1": everything["head"].f1(),
        "head_f1_modern": modern["head"].f1(),
        "attribute_f1": everything["attribute"].f1(),
        "attribute_f1_modern": modern["attribute"].f1(),
        "relation_f1": everything["relation"].f1(),
        "spurious_object_share": modern["head"].spurious(),
        "spurious_object_share_all": everything["head"].spurious(),
        **languages(step, read),
    }
    texts = [row.text for row in rows]
    if data is not None:
        figures |= descriptions(data, step, read)
        texts = real_captions(data)
    return figures | {"captions_per_second": speed(texts, read, 0.5 if quick else 2.0)}


def evaldata(given: Path) -> Path | None:
    """The folder of benchmark data, None where it is absent."""
    return given if (given / "vbackchecker" / "claims.jsonl").is_file() else None


def main(
    out: Out,
    quick: Quick = False,
    data: Annotated[Path, typer.Option("--data", help="The folder of public benchmark data: vbackchecker/.")] = FOLDER,
    part: Annotated[str, typer.Option("--part", help="Labelled sentences: heldout or development.")] = "heldout",
    spacy: Annotated[str, typer.Option("--spacy", help="A spaCy pipeline for the classes of words.")] = "",
) -> None:
    """Measure how captions are read."""
    nlp = None
    if spacy:
        from spacy import load

        nlp = load(spacy, disable=["parser", "ner", "lemmatizer"])
    folder = evaldata(data)
    figures = measure(part, folder, quick, nlp)
    skipped = "" if folder else f"no benchmark data at {data}: drawn sentences and vb_ figures are left out"
    write(out, figures, quick, checkpoint=None, part=part, tagger=spacy or "gazeguard", skipped=skipped, seed=0)


if __name__ == "__main__":
    with errors_told():
        typer.run(main)
