"""Is each mention of a caption judged as a person who sees the picture would judge it?"""

from __future__ import annotations

import pytest

from gazeguard.lab.truth import decided_claims, mentions
from gazeguard.lab.world import Drawing, DrawnObject

WHITE = (255, 255, 255)
STRIP = Drawing(
    (
        DrawnObject("star", "red", (12, 12, 36, 36), panel=0, location=None),
        DrawnObject("moon", "blue", (60, 12, 84, 36), panel=1, location=None),
        DrawnObject("star", "green", (60, 40, 84, 64), panel=1, location=None, small=True),
    ),
    2,
    WHITE,
)
SCENE = Drawing(
    (
        DrawnObject("cup", "orange", (0, 0, 24, 24), panel=None, location="at the top left"),
        DrawnObject("horse", "red", (60, 60, 84, 84), panel=None, location="in the middle"),
    ),
    0,
    WHITE,
)


@pytest.mark.parametrize(
    ("picture", "caption", "explained"),
    [
        (STRIP, "In panel one there is a red star. In panel two there is a blue moon and a small green star.", ["true"] * 3),
        (STRIP, "In panel one there is a red crown.", ["not in the image"]),
        (STRIP, "In panel one there is a blue moon.", ["not there: it is in panel two"]),
        (STRIP, "In panel two there is a red star.", ["it is green"]),
        (STRIP, "In panel one there is a green star.", ["it is red"]),
        (STRIP, "In panel one there is a star and a yellow moon.", ["true", "not there: it is in panel two"]),
        (STRIP, "There is a green star.", ["true"]),  # nothing is said of where: any star may be meant
        (STRIP, "There is a yellow star.", ["it is red"]),
        (STRIP, "There is a red dog and a wooden chair.", []),  # no objects of the lab
        (SCENE, "There is an orange cup at the top left and a red horse in the middle.", ["true"] * 2),
        (SCENE, "There is an orange cup on the right.", ["not there: it is at the top left"]),
        (SCENE, "There is a blue horse in the middle and an orange cup.", ["it is red", "true"]),
        (SCENE, "There is an orange cup and a red anchor in the middle.", ["true", "not in the image"]),
        (SCENE, "An orange horse.", ["it is red"]),
        (SCENE, "There is a small orange cup.", ["it is not small"]),
        (SCENE, "", []),
    ],
)  # fmt: skip
def test_worked_examples(picture, caption, explained):
    assert [mention.explanation for mention in mentions(picture, caption)] == explained


def test_a_mention_holds_what_was_drawn_and_where_it_was_said():
    """Order counts from 0; the object is the one that agrees best; a wrong colour does not make it absent."""
    caption = "There is a green star, a red moon and a crown."
    star, moon, crown = mentions(STRIP, caption)
    assert [m.order for m in (star, moon, crown)] == [0, 1, 2]
    assert (star.object, star.present, star.located, star.colour) == (STRIP.objects[2], True, True, True)
    assert (moon.object, moon.present, moon.located, moon.colour) == (STRIP.objects[1], True, True, False)
    assert (crown.object, crown.present, crown.located, crown.colour) == (None, False, False, None)
    assert caption[moon.phrase.start : moon.phrase.end] == "a red moon"


def test_no_colour_said_is_no_colour_wrong():
    (mention,) = mentions(STRIP, "There is a moon.")
    assert mention.colour is None
    assert mention.explanation == "true"


@pytest.mark.parametrize(
    ("picture", "caption", "false"),
    [
        # all that can be said is said: the object, its colour, its panel
        (STRIP, "In panel one there is a red star.", {"a red star": False, "red": False, "panel": False}),
        (STRIP, "In panel one there is a blue star.", {"a blue star": False, "blue": True, "panel": False}),
        # nothing of an absent each is judged but that it is absent
        (STRIP, "In panel one there is a red crown.", {"a red crown": True}),
        # elsewhere: the place is wrong; whether "a blue moon" in panel one is true is anybody's guess
        (STRIP, "In panel one there is a blue moon.", {"panel": True}),
        (STRIP, "In panel two there is a small green star.", {"a small green star": False, "small": False, "green": False,
                                                              "panel": False}),
        (STRIP, "In panel one there is a small red star.", {"a small red star": False, "small": True, "red": False,
                                                            "panel": False}),
        (SCENE, "There is an orange cup on the right.", {"on the right": True}),
        (SCENE, "There is a wooden cup.", {"a wooden cup": False}),
        (SCENE, "", {}),
    ],
)  # fmt: skip
def test_claims_are_judged_where_the_truth_is_clear(picture, caption, false):
    """Each claim by the words that are blamed; of "in panel one ... a star" that is the star, said last."""
    told = {
        "panel" if picture.panels and c.kind == "location" else c.text: is_false
        for c, _, is_false in decided_claims(picture, caption)
    }
    assert told == false
