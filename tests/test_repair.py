"""Does a caption stay a text when phrases are cut from it? Laws on real captions, then examples."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gazeguard.claims.cutting import LONGEST
from gazeguard.claims.parse import Caption, Phrase, chunk, parse
from gazeguard.claims.removal import without

DATA = Path(os.environ.get("GAZEGUARD_EVALDATA", "evaldata")) / "opera-llava-1.5"
BROKEN = {
    "two spaces": r"  ",
    "two commas": r",\s*,",
    "two conjunctions": r"\b(?:and|or),?\s+(?:and|or)\b",
    "a space before a sign": r" [.,;:!?]",
    "a comma before a full stop": r",\.",
    "two full stops": r"(?<!\.)\.\s*\.(?!\.)",
    "a word that wants another at the end": r"\b(?:and|or|with|of|at|to|a|an|the|is|are|by|from|near)\.",
    "a small letter at the start": r"(?:^|[.!?]\s)[a-z]",
    "a sign at the start": r"(?:^|\n)\s*[,;:.]",
    "nothing after there is": r"\b[Tt]here (?:is|are)\s*[.,]",
    "a verb after a joining word": r"\b(?:with|of|to|by|an?|the)\s+(?:and|or|is|are)\b",
    "an article that does not fit": r"\b[Aa] (?:apple|orange|umbrella|elephant|oven|old)|\b[Aa]n [bcdfgjklmnpqrstvwxz]",
}


@pytest.fixture(scope="module")
def captions() -> list[Caption]:
    """1,500 captions of LLaVA-1.5, parsed."""
    if not DATA.is_dir():
        pytest.skip(f"the captions of LLaVA-1.5 that OPERA published are not at {DATA}")
    lines = [line for path in sorted(DATA.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    return [parse(json.loads(line)["caption"]) for line in lines]


def named(word: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I))


def cut(caption: str, *heads: str) -> str:
    """The caption without the things of these heads."""
    return without(caption, [(p.head.start, p.head.end) for p in chunk(caption) if p.head.text in heads])


def keeps_the_laws(caption: Caption, gone: Sequence[Phrase]) -> None:
    """What is cut is gone, everything else that was named is still named, and no new break of grammar is in the text."""
    left = without(caption, [(p.head.start, p.head.end) for p in gone])
    heads = [phrase.head.text.lower() for phrase in gone]
    for head in heads:
        assert named(head, left) <= named(head, caption.text) - heads.count(head), left
    for phrase in caption.objects:
        if phrase not in gone:
            assert named(phrase.head.text, left), (phrase.text, left)
    for what, pattern in BROKEN.items():
        assert len(re.findall(pattern, left)) <= len(re.findall(pattern, caption.text)), (what, left)


@settings(max_examples=400)
@given(number=st.integers(0, 1499), which=st.lists(st.integers(0, 30), unique=True, min_size=2, max_size=5))
def test_the_laws_of_cutting_on_real_captions(captions, number, which):
    objects = captions[number].objects
    keeps_the_laws(captions[number], [objects[i] for i in {i % len(objects) for i in which}])


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_laws_of_cutting_hold_for_each_object_alone(captions, every):
    for caption in captions[::every]:
        for phrase in caption.objects:
            keeps_the_laws(caption, [phrase])


def test_every_real_caption_loses_all_its_objects(captions):
    for caption in captions:
        left = without(caption, [(p.start, p.end) for p in caption.objects])
        heads = [p.head.text.lower() for p in caption.objects]
        assert all(named(head, left) <= named(head, caption.text) - heads.count(head) for head in heads)


def test_sentences_without_a_cut_stay_as_they_are(captions):
    for caption in captions[:300]:
        last = caption.objects[-1]
        left = without(caption, [(last.start, last.end)])
        first = re.match(r"[^.]*\.", caption.text)
        if last.start > first.end():
            assert left.startswith(first[0])


def test_cutting_nothing_changes_nothing(captions):
    for caption in captions:
        assert without(caption, []) == caption.text


@given(st.text(alphabet=string.ascii_letters + " .,;:'()-\n\u2019é0123456789", max_size=300), st.data())
def test_any_text_and_any_spans(text, data):
    """Nothing is raised, and no word appears that was not there but for those of "there is a"."""
    spans = data.draw(st.lists(st.tuples(st.integers(-3, 310), st.integers(-3, 310)), max_size=5))
    left = without(text, spans)
    added = {"there", "is", "are", "a", "an", "and", "the"}
    assert set(re.findall(r"\w+", left.lower())) <= set(re.findall(r"\w+", text.lower())) | added
    assert without(text, []) == text


def test_a_sentence_without_end_goes_whole():
    """So that no text can make the work grow out of hand."""
    text = "There is " + ", ".join(["a cup"] * LONGEST) + ". A dog sits there."
    assert cut(text, "cup") == "A dog sits there."


EXAMPLES = (
    # what an object takes along
    ("A pitcher is in the middle of throwing a pitch.", ["pitch"], "There is a pitcher."),
    ("There is a car with a lot of graffiti covering its surface.", ["graffiti"], "There is a car."),
    ("It is near a table, with the person' and the board on top.", ["person"], "It is near a table, with the board on top."),
    # lists
    ("There is a star at the top left, a moon and a cup in the middle.", ["star"], "There is a moon and a cup in the middle."),
    ("There is a star at the top left, a moon and a cup.", ["moon"], "There is a star at the top left and a cup."),
    ("There is a star, a moon and a cup in the middle.", ["cup"], "There is a star and a moon."),
    ("There is a star and a moon at the top.", ["moon"], "There is a star."),
    ("There are two cups, several forks, and a knife on it.", ["cups"], "There are several forks and a knife on it."),
    ("There are two cups, several forks, and a knife on it.", ["cups", "forks"], "There is a knife on it."),
    ("A man, a dog, and a cat are sitting on a bench.", ["cat"], "A man and a dog are sitting on a bench."),
    ("A man, a dog, and a cat are sitting on a bench.", ["dog"], "A man and a cat are sitting on a bench."),
    ("A man and a cat are sitting on a bench.", ["cat"], "A man is sitting on a bench."),
    ("A man and a cat are sitting on a bench.", ["man"], "A cat is sitting on a bench."),
    ("The bowl has apples, pears, figs, and nuts.", ["nuts"], "The bowl has apples, pears, and figs."),
    # "there is" without anything
    ("There is a star.", ["star"], ""),
    ("In panel one there is a star and a cup. In panel two there is a moon.", ["star", "cup"], "In panel two there is a moon."),
    ("There is a star. There is a moon.", ["moon"], "There is a star."),
    # prepositions and participles
    ("A man sits at a table with his dog.", ["table"], "A man sits with his dog."),
    ("In addition to the pizza, there is a bottle.", ["pizza"], "In addition, there is a bottle."),
    ("On the table, there is a bottle.", ["table"], "There is a bottle."),
    ("There is a plate filled with fruit.", ["fruit"], "There is a plate."),
    ("A man wearing a hat and holding a cup is smiling.", ["hat"], "A man holding a cup is smiling."),
    ("A man wearing a hat and holding a cup is smiling.", ["cup"], "A man wearing a hat is smiling."),
    ("A chair stands close to the wall.", ["wall"], "A chair stands."),
    # clauses and sentences that cannot stand
    ("A dog is chasing a ball.", ["dog"], "There is a ball."),
    ("A laptop is placed on the desk.", ["desk"], "There is a laptop."),
    ("A bench is in the back, and a chair is near the wall.", ["bench"], "A chair is near the wall."),
    ("The clock is on the left side, while the flag is on the right side.", ["flag"], "The clock is on the left side."),
    ("There is a dog. It is sleeping. A cat sits on a mat.", ["dog"], "A cat sits on a mat."),
    # owners
    ("The man's hat is red.", ["man"], "The hat is red."),
    # paragraphs and list markers
    ("There is a star.\n\nThere is a moon.\n\nThere is a cup.", ["moon"], "There is a star.\n\nThere is a cup."),
    ("There is a star. There is a sun.\n\nThere is a moon. There is a cup.", ["moon"],
     "There is a star. There is a sun.\n\nThere is a cup."),
)  # fmt: skip


@pytest.mark.parametrize(("caption", "heads", "left"), EXAMPLES, ids=lambda value: str(value)[:40])
def test_what_is_left(caption, heads, left):
    assert cut(caption, *heads) == left


@pytest.mark.parametrize(
    ("caption", "word", "left"),
    [
        ("There is a red star.", "red", "There is a star."),
        ("There is a red umbrella.", "red", "There is an umbrella."),
        ("There is an orange cup.", "orange", "There is a cup."),
        ("There is a red and white kite.", "red", "There is a white kite."),
        ("There is a red and white kite.", "white", "There is a red kite."),
        ("There is a small, clean and bright room.", "clean", "There is a small, bright room."),
        ("Two dogs are running.", "Two", "Dogs are running."),
        ("There is a red star at the top left and a moon.", "at the top left", "There is a red star and a moon."),
        ("A star is at the top left.", "at the top left", "There is a star."),
        ("On the left side, there is a star.", "On the left side", "There is a star."),
    ],
)
def test_attributes_and_places_are_cut_alone(caption, word, left):
    start = caption.index(word)
    assert without(caption, [(start, start + len(word))]) == left


def test_words_that_are_no_phrase_are_not_cut():
    caption = "There is a red star."
    assert without(caption, [(0, 5)]) == caption
