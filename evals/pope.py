"""POPE: does a model say yes to objects that are not there? On its own questions (Li et al. 2023).

Questions are POPE's files, JSON Lines of ``question_id, image, text, label``; answers are JSON Lines of
``question_id, answer`` and are joined by the id, each question answered once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from evals.common import Out, write
from evals.counting import count, pope_figures
from evals.records import Name, Row, Text, also, digests, errors_told, only_once, read_lines
from gazeguard.errors import InputError

SHORTENED = 2910  # questions in POPE's random file until October 2023; LLaVA's evaluation still asks these


class Question(Row):
    """A question whether an object is in the image."""

    question_id: int
    image: Name
    text: Text
    label: Literal["yes", "no"]


class Answer(Row):
    """A model's answer to it, in its own words; LLaVA's files call it ``text``, captioned rows ``caption``."""

    question_id: int
    answer: Text = also("answer", "text", "caption")


def yes_or_no(answer: str) -> Literal["yes", "no"]:
    """POPE's rule: "no" when the first sentence has the word "No", "no" or "not", else "yes".

    A sentence ends at a full stop, commas are dropped, and words are parted by single spaces: "No!" and "NO" are "yes".
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def join_answers(questions: Path, answers: Path) -> tuple[list[Question], list[str]]:
    """The questions of one file, and to each what the other file answers. Raises `InputError` unless they match."""
    asked, given = read_lines(questions, Question), read_lines(answers, Answer)
    if len(asked) == SHORTENED:
        raise InputError(
            f"{questions} has {SHORTENED} questions: it is the short file of random questions that POPE replaced in October "
            "2023. Figures on it do not compare with those on all 3,000; take the newer file."
        )
    if len(asked) != len(given):
        raise InputError(
            f"{answers} has {len(given)} answers, but {questions} has {len(asked)} questions. Answer each question once."
        )
    only_once(questions, "question_id", (question.question_id for question in asked))
    only_once(answers, "question_id", (answer.question_id for answer in given))
    answer_to = {answer.question_id: answer.answer for answer in given}
    for question in asked:
        if question.question_id not in answer_to:
            raise InputError(
                f"{answers} has no answer to question_id {question.question_id} of {questions}. Are they of the same split?"
            )
    return asked, [answer_to[question.question_id] for question in asked]


def main(
    questions: Annotated[Path, typer.Argument(help="POPE's file of questions.")],
    answers: Annotated[Path, typer.Argument(help="JSON Lines of question_id, answer.")],
    out: Out,
) -> None:
    """POPE's figures of a model's answers."""
    asked, given = join_answers(questions, answers)
    images = [question.image for question in asked]
    figures = pope_figures([question.label for question in asked], [yes_or_no(answer) for answer in given], images)
    figures["questions"] = count(len(asked))
    write(out, figures, False, list(dict.fromkeys(images)), None, files=digests([questions, answers]), seed=0)


if __name__ == "__main__":
    with errors_told():
        typer.run(main)
