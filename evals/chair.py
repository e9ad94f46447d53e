"""Which objects does a caption of a COCO picture make up? CHAIR on the public ground truth, in both of its lineages.

Captions are JSON Lines of ``image_id, caption``, one per image. The word lists and the ground truth are read from
``--data``; a picture's objects are those of COCO's segmentations and of its five human captions.
Lineage A puts every word into the singular; lineage B takes the base form of verbs and nouns. They differ in words, in
ground truth, and so in figures: never compare across them.

``--colour-aware`` gives every figure a second time, as ``NAME_colour_aware``: there, a word that the parser of captions reads
as a colour ("an orange kite") names no object. In captions of recent models "orange" alone is 13 to 18 % of the false words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from evals.common import Figure, Out, rate, write
from evals.counting import chair_figures, count
from evals.records import DATA, Data, Row, Text, also, digests, errors_told, only_once, read_json, read_lines
from evals.words import lemmas, singulars
from gazeguard.claims.parse import parse
from gazeguard.errors import InputError


class Caption(Row):
    """One caption; LLaVA's files of answers have ``question_id`` and ``text``."""

    image_id: int = also("image_id", "question_id")
    caption: Text = also("caption", "text")


class WordLists(Row):
    """synonyms: word or two words -> COCO category; double_words: two words that stand for one -> what they stand for."""

    synonyms: dict[str, str]
    double_words: dict[str, str]


COLOUR = "red"  # no object in any word list


class Lineage(StrEnum):
    """How words are read; `READS` says it in full."""

    A = "A"
    B = "B"


READS = {
    Lineage.A: "singularised words (TextBlob's singularize, NLTK's tokens), lineage-A ground truth",
    Lineage.B: "part-of-speech tags (TextBlob's) and WordNet-style base forms, lineage-B ground truth",
}


def merged(words: Sequence[str], lists: WordLists) -> list[str]:
    """Two words that stand for one become one, from the left."""
    found, i = [], 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        found.append(lists.double_words.get(pair, words[i]))
        i += 2 if pair in lists.double_words else 1
    return found


def tokens(caption: str, lineage: Lineage, lists: WordLists) -> list[str]:
    """The words of a caption in their base forms, double words merged, punctuation included."""
    if lineage is Lineage.A:
        return merged(singulars(caption), lists)
    known = {part for said in chain(lists.synonyms, lists.double_words) for part in said.split()}
    return merged(lemmas(caption, known), lists)


def objects(words: Sequence[str], lists: WordLists) -> list[str]:
    """The COCO categories that the words name, in order, repeats included. A toilet's seat is no chair."""
    seat_of_toilet = "toilet" in words
    return [lists.synonyms[w] for w in words if w in lists.synonyms and not (w == "seat" and seat_of_toilet)]


def chair(
    rows: Sequence[Caption], truth: Mapping[int, frozenset[str]], lists: WordLists, lineage: Lineage
) -> dict[str, Figure]:
    """The figures of captions, all of whose images are in ``truth``."""
    there = [truth[row.image_id] for row in rows]
    words = [tokens(row.caption, lineage, lists) for row in rows]
    mentions = [[(o, o not in t) for o in objects(w, lists)] for w, t in zip(words, there, strict=True)]
    figures = chair_figures(mentions, there)
    if lineage is Lineage.A:
        del figures["precision"], figures["f1"]
    else:
        figures["length"] = rate([len(w) / 100 for w in words], [1] * len(words))
    return figures | {
        "mentions": count(sum(map(len, mentions))),
        "hallucinated": count(sum(wrong for caption in mentions for _, wrong in caption)),
        "captions": count(len(rows)),
    }


def without_colours(caption: str, lists: WordLists) -> str:
    """The caption in which a word that is a colour, and would name an object otherwise, is another colour."""
    reading = parse(caption).reading
    result, at = [], 0
    for token, letter in zip(reading.tokens, reading.letters, strict=True):
        if letter == "a" and token.letter == "Y" and token.word in lists.synonyms:
            result += [caption[at : token.start], COLOUR]
            at = token.end
    return "".join([*result, caption[at:]])


def read(captions: Path, lineage: Lineage, data: Path) -> tuple[list[Caption], dict[int, frozenset[str]], WordLists]:
    """Captions, ground truth and word lists. Raises `InputError` for captions that cannot be counted."""
    rows = read_lines(captions, Caption)
    only_once(captions, "image_id", (row.image_id for row in rows))
    truth = read_json(truth_file(data, lineage), dict[str, frozenset[str]], "image ids and their objects")
    for row in rows:
        if str(row.image_id) not in truth:
            raise InputError(
                f"{captions} has image_id {row.image_id}, which is no image of COCO 2014. CHAIR's ground truth has no others; "
                "leave that caption out."
            )
    wanted = {row.image_id: truth[str(row.image_id)] for row in rows}
    return rows, wanted, read_json(lists_file(data), WordLists, "synonyms and double_words")


def truth_file(data: Path, lineage: Lineage) -> Path:
    """The ground truth of a lineage: image id -> categories."""
    return data / "chair" / f"coco2014_chair_gt_lineage{lineage}.json.gz"


def lists_file(data: Path) -> Path:
    """The word lists, which both lineages share."""
    return data / "chair" / "chair_synonym_maps.json"


def main(
    captions: Annotated[Path, typer.Argument(help="JSON Lines of image_id, caption.")],
    lineage: Annotated[Lineage, typer.Option("--lineage", help="A: singulars; B: tags and base forms.")],
    out: Out,
    data: Data = DATA,
    colour_aware: Annotated[
        bool, typer.Option("--colour-aware", help="Also count without words that the parser reads as colours.")
    ] = False,
) -> None:
    """CHAIR of captions of COCO pictures."""
    rows, truth, lists = read(captions, lineage, data)
    figures = chair(rows, truth, lists, lineage)
    if colour_aware:
        plain = [row.model_copy(update={"caption": without_colours(row.caption, lists)}) for row in rows]
        figures |= {f"{key}_colour_aware": value for key, value in chair(plain, truth, lists, lineage).items()}
    files = digests([captions, truth_file(data, lineage), lists_file(data)])
    ids = [str(row.image_id) for row in rows]
    libraries = {name: version(name) for name in ("nltk", "textblob")}
    reads = f"{lineage}: {READS[lineage]}"
    write(out, figures, False, ids, None, lineage=reads, colour_aware=colour_aware, files=files, seed=0, **libraries)


if __name__ == "__main__":
    with errors_told():
        typer.run(main)
