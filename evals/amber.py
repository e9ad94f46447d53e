"""AMBER: false objects in descriptions, and right answers to questions about what is not there (Wang et al. 2023).

Responses are AMBER's own form, a JSON array of ``id, response``. Each of the dimensions (generative, existence, attribute,
relation) is answered wholly or not at all. Annotations, the vocabulary with its synonyms and the safe words are read from
``--data``.

Generative, over the nouns of a response that are in the vocabulary: ``chair`` is those that are not in the image / all,
``hal`` responses with one / responses, ``cover`` objects in the image that are named / objects in the image, ``cog``
annotated false objects that are named / annotated false objects. Discriminative: the positive answer is "No", and only "Yes"
and "No" are answers. ``amber_score`` is (1 - chair + f1) / 2. All are rates from 0 to 1, where AMBER prints per cent.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from pydantic import Field

from evals.common import Figure, Out, over_images, rate, write
from evals.counting import count, indexed, pope_figures
from evals.records import DATA, Data, Name, Row, Text, also, digests, errors_told, only_once, read_json, read_words
from evals.words import nouns
from gazeguard.errors import InputError

DIMENSIONS = {
    "generative": "generative",
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}
PARTS = {
    "": tuple(DIMENSIONS)[1:],
    "_existence": ("discriminative-hallucination",),
    "_attribute": ("discriminative-attribute-state", "discriminative-attribute-number", "discriminative-attribute-action"),
    "_state": ("discriminative-attribute-state",),
    "_number": ("discriminative-attribute-number",),
    "_action": ("discriminative-attribute-action",),
    "_relation": ("discriminative-relation", "relation"),
}  # what stands behind a figure's name -> the types of question that it is of
# In the folder amber/ of --data.
FILES = ("annotations.json", "relation.json", "safe_words.txt", "query_generative.json", "query_discriminative.json")


class Response(Row):
    """A model's response; other tools' files have ``question_id`` and ``text``."""

    id: int = also("id", "question_id")
    response: Text = also("response", "answer", "text", "caption")


class Scene(Row):
    """What a description may name. truth: objects in the image; hallu: objects that models tend to add."""

    id: int
    type: Literal["generative"]
    truth: tuple[Name, ...]
    hallu: tuple[Name, ...]


class Question(Row):
    """A question's right answer."""

    id: int
    type: Literal[
        "discriminative-hallucination",
        "discriminative-attribute-state",
        "discriminative-attribute-number",
        "discriminative-attribute-action",
        "discriminative-relation",
        "relation",
    ]
    truth: Literal["yes", "no"]


Item = Annotated[Scene | Question, Field(discriminator="type")]


class Query(Row):
    """The image of an item."""

    id: int
    image: Name


@dataclass(frozen=True)
class Benchmark:
    """AMBER's files. vocabulary: a word -> the words that count as it; safe: words that are never wrong and never right."""

    items: Mapping[int, Scene | Question]
    image: Mapping[int, str]
    vocabulary: Mapping[str, tuple[str, ...]]
    safe: frozenset[str]

    @property
    def known(self) -> frozenset[str]:
        """Every word of the vocabulary."""
        return frozenset(chain(self.vocabulary, *self.vocabulary.values()))


@dataclass(frozen=True)
class DescriptionCounts:
    """The counts of one description.

    kept:     its nouns that are in the vocabulary, with repeats
    unsafe:   those of them that are not in the image
    covered:  objects in the image that are named, of ``truth``
    expected: annotated false objects that are named, of ``hallu``
    """

    kept: int
    unsafe: int
    covered: int
    truth: int
    expected: int
    hallu: int


def count_description(
    kept: Sequence[str], item: Scene, vocabulary: Mapping[str, tuple[str, ...]], safe: Set[str]
) -> DescriptionCounts:
    """Counts of one description, from its nouns. A noun names an object by its own word or by one that counts as it.

    As in AMBER's code, a noun names the first object that it counts as, and only then one of its own word: of two equal
    objects one can be covered.
    """
    real, made_up = (_meanings(words, vocabulary) for words in (item.truth, item.hallu))
    judged = [noun for noun in kept if noun not in safe]
    unsafe = [noun for noun in judged if noun not in real]
    return DescriptionCounts(
        kept=len(kept),
        unsafe=len(unsafe),
        covered=len({real[noun] for noun in judged if noun in real}),
        truth=len(item.truth),
        expected=len({made_up[noun] for noun in unsafe if noun in made_up}),
        hallu=len(item.hallu),
    )


def _meanings(words: Sequence[str], vocabulary: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """A noun -> the index of the annotated word that it names."""
    found: dict[str, int] = {}
    for position, word in enumerate(words):
        for other in vocabulary.get(word, ()):
            found.setdefault(other, position)
    for position, word in enumerate(words):
        found.setdefault(word, position)
    return found


def generative(found: Sequence[DescriptionCounts]) -> dict[str, Figure]:
    """Figures of descriptions, one per image."""
    return {
        "chair": rate([each.unsafe for each in found], [each.kept for each in found]),
        "cover": rate([each.covered for each in found], [each.truth for each in found]),
        "hal": rate([each.unsafe > 0 for each in found], [1] * len(found)),
        "cog": rate([each.expected for each in found], [each.hallu for each in found]),
        "nouns": count(sum(each.kept for each in found)),
        "responses": count(len(found)),
    }


def yes_or_no(response: str) -> str:
    """ "yes", "no", or "neither": AMBER knows the exact words "Yes" and "No" alone."""
    return {"Yes": "yes", "No": "no"}.get(response, "neither")


def normalised(response: str) -> str:
    """ "Yes" for "Yes.", "yes, there is", and so for "No"; any other response as it is."""
    first = response.split(maxsplit=1)[:1]
    word = first[0].strip(string.punctuation).capitalize() if first else ""
    return word if word in ("Yes", "No") else response


def normalised_figures(responses: Mapping[int, str], benchmark: Benchmark) -> dict[str, Figure]:
    """The figures of the questions with `normalised` responses, as ``NAME_normalised``; none where that changes nothing."""
    asked = {n: r for n, r in responses.items() if isinstance(benchmark.items[n], Question)}
    changed = {number: normalised(response) for number, response in asked.items()}
    if not (others := sum(changed[number] != response for number, response in asked.items())):
        return {}
    print(
        f"warning: {others} of {len(asked)} answers are not the bare word Yes or No. AMBER counts them as wrong, and so do the "
        "figures of its names; those that end in _normalised read the first word.",
        file=sys.stderr,
    )
    return {f"{key}_normalised": value for key, value in measure(changed, benchmark).items()}


def discriminative(labels: Sequence[str], answers: Sequence[str], images: Sequence[str]) -> dict[str, Figure]:
    """Figures of answers, of the positive answer "no"."""
    figures = pope_figures(labels, answers, images, positive="no")
    return {key: figures[key] for key in ("accuracy", "precision", "recall", "f1", "yes_rate")} | {
        "neither": count(sum(answer == "neither" for answer in answers)),
        "questions": count(len(answers)),
    }


def amber_score(found: Mapping[str, DescriptionCounts], answers: Sequence[tuple[str, str, str]]) -> Figure:
    """(1 - chair + f1) / 2. found: image -> its counts; answers: image, label and answer."""
    at, number = indexed([*found, *(image for image, _, _ in answers)])
    of_image, of_answer = np.split(at, [len(found)])
    label, answer = (np.array([each[i] for each in answers]) for i in (1, 2))
    unsafe, kept = (np.bincount(of_image, [getattr(t, key) for t in found.values()], number) for key in ("unsafe", "kept"))
    hits = np.bincount(of_answer, (label == "no") & (answer == "no"), number)
    noes = np.bincount(of_answer, (label == "no").astype(int) + (answer == "no"), number)

    def score(drawn: NDArray[np.int64]) -> float:
        return float(1 - drawn @ unsafe / max(1e-12, drawn @ kept) + 2 * (drawn @ hits) / max(1e-12, drawn @ noes)) / 2

    return over_images(number, score)


def read_benchmark(data: Path) -> Benchmark:
    """AMBER's files. Raises `InputError`."""
    annotations, relation, safe, scenes, questions = paths(data)
    items = read_json(annotations, list[Item], "annotations: id, type, truth, hallu")
    queries = [q for path in (scenes, questions) for q in read_json(path, list[Query], "queries: id, image, query")]
    return Benchmark(
        {item.id: item for item in items},
        {query.id: query.image for query in queries},
        read_json(relation, dict[str, tuple[str, ...]], "words and the words that count as them"),
        frozenset(read_words(safe)),
    )


def paths(data: Path) -> list[Path]:
    """AMBER's files, in the order of `FILES`."""
    return [data / "amber" / name for name in FILES]


def read_responses(path: Path, items: Mapping[int, Scene | Question]) -> dict[int, str]:
    """id -> response. Raises `InputError` for an unknown id, and for a dimension that is answered in part."""
    rows = read_json(path, list[Response], "a JSON array of objects: id (a whole number), response (text)")
    only_once(path, "id", (row.id for row in rows))
    found = {row.id: row.response for row in rows}
    if not found:
        raise InputError(f"{path} holds no responses. It should be a JSON array of objects with id and response.")
    if unknown := found.keys() - items.keys():
        raise InputError(f"{path} has id {min(unknown)}, which AMBER does not have; expected ids from 1 to {max(items)}.")
    for dimension in dict.fromkeys(DIMENSIONS.values()):
        wanted = {number for number, item in items.items() if DIMENSIONS[item.type] == dimension}
        missing = wanted - found.keys()
        if missing and missing != wanted:
            raise InputError(
                f"{path} answers {len(wanted) - len(missing)} of the {len(wanted)} items of the dimension {dimension}; "
                f"id {min(missing)} is missing. Answer all of a dimension, or none."
            )
    return found


def measure(responses: Mapping[int, str], benchmark: Benchmark) -> dict[str, Figure]:
    """The figures of the dimensions that are answered."""
    known = benchmark.known
    described: dict[str, DescriptionCounts] = {}
    answers: dict[str, list[tuple[str, str, str]]] = {}
    for number, response in responses.items():
        item, image = benchmark.items[number], benchmark.image[number]
        if isinstance(item, Scene):
            kept = [noun for noun in nouns(response, known) if noun in known]
            described[image] = count_description(kept, item, benchmark.vocabulary, benchmark.safe)
        else:
            answers.setdefault(item.type, []).append((image, item.truth, yes_or_no(response)))
    figures = generative(list(described.values())) if described else {}
    for ending, types in PARTS.items():
        if all(kind in answers for kind in types):
            images, labels, given = zip(*chain(*(answers[kind] for kind in types)), strict=True)
            figures |= {f"{key}{ending}": each for key, each in discriminative(labels, given, images).items()}
    if described and "f1" in figures:
        figures["amber_score"] = amber_score(described, list(chain(*answers.values())))
    return figures


def main(
    responses: Annotated[Path, typer.Argument(help="JSON array of id, response.")],
    out: Out,
    data: Data = DATA,
) -> None:
    """AMBER's figures of a model's responses."""
    benchmark = read_benchmark(data)
    given = read_responses(responses, benchmark.items)
    figures = measure(given, benchmark) | normalised_figures(given, benchmark)
    ids = list(dict.fromkeys(benchmark.image[number] for number in given))
    libraries = {name: version(name) for name in ("nltk", "textblob")}
    write(out, figures, False, ids, None, files=digests([responses, *paths(data)]), seed=0, **libraries)


if __name__ == "__main__":
    with errors_told():
        typer.run(main)
