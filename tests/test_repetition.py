"""Repetition loops: degenerate text is found, lists and panels of real captions are none."""

from dataclasses import replace

import pytest

from gazeguard import lab
from gazeguard.claims.repetition import LEAST, find_repetition
from gazeguard.report import CUT_OFF

LONG_SENTENCE = "The image shows a red horse next to a blue dog and there is a green cat looking at a bird"


@pytest.mark.parametrize(
    ("text", "phrase", "count"),
    [
        (", ".join(["a red horse"] * 80) + ".", "a red horse", 80),
        ("A horse, " + ", ".join(["a red horse"] * 10), "a red horse", 10),
        ("There is a red star. " * 12, "There is a red star", 12),
        ("The horse is red.\n" * 7, "The horse is red", 7),
        ("a dog and " * 40 + "a", "a dog and", 40),
        ("It is very " + "very " * 9 + "red.", "very", 10),
        ("A Dog, a dog, " * 5, "A Dog", 10),
        (f"{LONG_SENTENCE}. " * 3, LONG_SENTENCE, 3),
        ("".join(f"{i}. A red horse\n" for i in range(1, 40)), "1. A red horse", 39),
        ("A red hors" + "e" * 300, "e", 300),
        ("A red horse says " + "ha" * 50, "ha", 50),
        ("redhorse" * 40, "redhorse", 40),
        ("A red horse. " + "0" * 300, "0", 300),
    ],
)
def test_a_loop_is_found_with_its_count(text, phrase, count):
    assert find_repetition(text) == (phrase, count)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "a red horse, " * (LEAST - 1),
        "A book, a book, a book and another book.",
        "! " * 100,
        f"{LONG_SENTENCE}. " * 2,
        "A clock shows 1 2 3 4 5 6 7 8 9 10 11 12.",
        "It costs 100000000000 yen, " + "_" * 40,
        "Panel 1: a dog. Panel 2: a cat. Panel 3: a dog. Panel 4: a cow. Panel 5: a hen. Panel 6: a pig. Panel 7: a dog.",
    ],
)
def test_what_is_no_loop_is_none(text):
    assert find_repetition(text) is None


def test_captions_of_the_lab_are_no_loops():
    assert [t for s in lab.samples("test", 300, seed=3) for t in s.turns if find_repetition(t.answer)] == []


def test_a_long_phrase_is_shown_short():
    shown = str(find_repetition("a very large and very old red house behind a wide green lawn with trees, " * 9))
    assert len(shown) < 90
    assert shown.endswith("…' repeated 9 times")


def test_a_terminal_shows_beside_a_flag_what_is_no_claim(guard):
    """The loop, and that the caption was cut off: the flagged claims stand above, once each."""
    sample = lab.samples("test", 2, seed=7)[1]
    report = guard.check(sample.image, ", ".join(["a purple horse"] * 20))
    assert report.verdict == "flag"
    assert [line.text for line in report.lines() if line.role == "reason"] == [
        "degenerate text: 'a purple horse' repeated 20 times"
    ]
    cut = guard.judge(replace(report.trace, finished=False))
    assert [line.text for line in cut.lines() if line.role == "reason"][1:] == [CUT_OFF]
    plain = guard.check(sample.image, "There is a purple horse.")
    assert plain.verdict == "flag"
    assert [line for line in plain.lines() if line.role == "reason"] == []
