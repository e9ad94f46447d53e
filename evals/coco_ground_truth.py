"""CHAIR's ground truth from COCO 2014's own annotation files, in both lineages (Rohrbach et al. 2018).

    python -m evals.coco_ground_truth --annotations annotations --data evaldata

reads ``instances_{train,val}2014.json`` and ``captions_{train,val}2014.json``, and writes the two files of `evals.chair`
into ``evaldata/chair``, where the word lists already lie. An image's objects are the categories of its segmentations and
those that its human captions name, each caption read as the lineage reads it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from evals.chair import Lineage, WordLists, lists_file, objects, tokens, truth_file
from evals.records import DATA, Data, Name, Row, Text, errors_told, read_json

MAX_ANNOTATION_BYTES = 2**30  # the largest file of COCO 2014 has 332 MB
SPLITS = ("train2014", "val2014")


class Category(Row):
    """A category of COCO."""

    id: int
    name: Name


class Segmentation(Row):
    """A segmented object; its outline is not needed."""

    image_id: int
    category_id: int


class Instances(Row):
    """``instances_*.json``."""

    categories: tuple[Category, ...]
    annotations: tuple[Segmentation, ...]


class HumanCaption(Row):
    """A caption that a person wrote."""

    image_id: int
    caption: Text


class HumanCaptions(Row):
    """``captions_*.json``."""

    annotations: tuple[HumanCaption, ...]


def ground_truth(
    instances: Sequence[Instances], captions: Sequence[HumanCaptions], lists: WordLists, lineage: Lineage
) -> dict[int, set[str]]:
    """The categories in every image.

    Args:
        instances: The segmentations of each split.
        captions: The human captions of each split.
        lists: CHAIR's word lists.
        lineage: How the words of captions are read.

    Returns:
        Image id -> categories, in the names of the word lists.
    """
    truth: dict[int, set[str]] = {}
    for split in instances:
        names = {category.id: lists.synonyms.get(category.name, category.name) for category in split.categories}
        for each in split.annotations:
            truth.setdefault(each.image_id, set()).add(names[each.category_id])
    written = [each for split in captions for each in split.annotations]
    for each in track(written, f"captions, lineage {lineage}", console=Console(stderr=True), transient=True):
        truth.setdefault(each.image_id, set()).update(objects(tokens(each.caption, lineage, lists), lists))
    return truth


def write_truth(path: Path, truth: Mapping[int, set[str]]) -> None:
    """Write a ground truth as `evals.chair` reads it; equal truths give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({str(image): sorted(truth[image]) for image in sorted(truth)}).encode()
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(content)


def main(
    annotations: Annotated[Path, typer.Option("--annotations", help="Folder of COCO 2014's annotation files.")],
    data: Data = DATA,
) -> None:
    """Write the ground truth of both lineages."""
    lists = read_json(lists_file(data), WordLists, "synonyms and double_words")
    instances, captions = (
        [read_json(annotations / f"{what}_{split}.json", kind, what, MAX_ANNOTATION_BYTES) for split in SPLITS]
        for what, kind in (("instances", Instances), ("captions", HumanCaptions))
    )
    for lineage in Lineage:
        write_truth(truth_file(data, lineage), ground_truth(instances, captions, lists, lineage))
        print(truth_file(data, lineage))


if __name__ == "__main__":
    with errors_told():
        typer.run(main)
