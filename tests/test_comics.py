"""Are the strips that find the gaze heads what they say they are?"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gazeguard.comics import COLOURS, GLYPHS, MAX_PANELS, ORDINALS, a_phrase, draw_strips, glyph, join, panel_boxes

MENTION = re.compile(r"(an?) (\w+) (\w+)")


def digest(strip) -> str:
    return hashlib.sha256(repr((strip.narration, strip.spans, strip.panels)).encode() + strip.image.tobytes()).hexdigest()


def test_the_same_arguments_draw_the_same_pages_and_others_do_not():
    """Page i does not depend on how many are drawn."""
    pages = [digest(strip) for strip in draw_strips(3)]
    assert pages == [digest(strip) for strip in draw_strips(5)[:3]]
    assert len({*pages, *(digest(strip) for strip in draw_strips(3, seed=1))}) == 6


@pytest.mark.parametrize("panels", range(2, MAX_PANELS + 1))
def test_words_and_panels_belong_together(panels):
    """Span i is what panel i holds: one to three things, no thing twice on a page, each with its article."""
    for strip in draw_strips(20, panels=panels, size=(144, 144)):
        assert len(strip.panels) == len(strip.spans) == len(strip.questions) == panels
        told = ""
        for ordinal, (start, end), question in zip(ORDINALS, strip.spans, strip.questions, strict=False):
            words = strip.narration[start:end]
            told += f"In panel {ordinal} there is {words}. "
            assert question == f"Describe panel {ordinal}."
            assert 1 <= len(MENTION.findall(words)) <= 3
        assert told.strip() == strip.narration
        mentions = MENTION.findall(strip.narration.replace("there is", ""))
        nouns = [noun for _, _, noun in mentions]
        assert len(set(nouns)) == len(nouns)
        assert {colour for _, colour, _ in mentions} <= set(COLOURS)
        assert set(nouns) <= set(GLYPHS)
        assert all((article == "an") == (colour[0] in "aeiou") for article, colour, _ in mentions)


def test_each_panel_shows_the_colours_that_are_said_of_it_and_no_others():
    """A pixel of the pure colour lies in the panel for each colour said, for none that is not."""
    for strip in draw_strips(12):
        for box, (start, end) in zip(strip.panels, strip.spans, strict=True):
            pixels = np.asarray(strip.image.crop(box)).reshape(-1, 3)
            shown = {name for name, colour in COLOURS.items() if (pixels == colour).all(1).any()}
            assert shown == {colour for _, colour, _ in MENTION.findall(strip.narration[start:end])}


@given(st.integers(1, MAX_PANELS), st.integers(30, 900), st.integers(30, 900))
def test_panels_lie_on_the_page_in_reading_order_and_do_not_overlap(panels, width, height):
    boxes = panel_boxes(panels, (width, height))
    assert [(y0, x0) for x0, y0, _, _ in boxes] == sorted((y0, x0) for x0, y0, _, _ in boxes)
    page = np.zeros((height, width), int)
    for x0, y0, x1, y1 in boxes:
        page[y0:y1, x0:x1] += 1
    assert page.max() == 1
    assert page.sum() == panels * (width // 3) * (height // 2)


@pytest.mark.parametrize("panels", [0, 1, 7])
def test_too_few_or_too_many_panels_are_refused(panels):
    with pytest.raises(ValueError, match=f"A strip has 2 to 6 panels, not {panels}"):
        draw_strips(1, panels=panels)


def test_every_thing_looks_different():
    """No two pictographs are nearly the same mask, and none is empty: the font has them all."""
    masks = np.stack([np.asarray(glyph(noun, (32, 32)), float) / 255 for noun in GLYPHS])
    assert masks.mean((1, 2)).min() > 0.05
    apart = np.abs(masks[:, None] - masks[None]).mean((2, 3))
    assert apart[~np.eye(len(masks), dtype=bool)].min() > 0.05
    assert len(GLYPHS) >= 24
    assert len(COLOURS) == 6


@given(st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=5))
def test_lists_are_joined_as_one_says_them(items):
    """Taken apart at commas and the last "and", it is the list again."""
    said = [item for part in join(items).split(", ") for item in part.split(" and ")]
    assert said == items
    assert join(items).count(" and ") == (len(items) > 1)


@pytest.mark.parametrize(
    ("words", "said"), [(("orange", "cup"), "an orange cup"), (("small", "red", "sun"), "a small red sun")]
)
def test_articles(words, said):
    assert a_phrase(*words) == said
