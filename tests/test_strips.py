"""Are the strips that find the gaze heads what they say they are?"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from labkit import ANYTHING
from PIL import Image

from gazeguard.claims.english import listed
from gazeguard.errors import InputError
from gazeguard.heads.pictographs import COLOURS, GLYPHS, glyph
from gazeguard.heads.strips import MAX_PANELS, ORDINALS, SIZES, a_phrase, draw_strips, load_strips, panel_boxes

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


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"panels": 0}, "A strip has 2 to 6 panels, not 0"),
        ({"panels": 1}, "A strip has 2 to 6 panels, not 1"),
        ({"panels": 7}, "A strip has 2 to 6 panels, not 7"),
        ({"style": "film"}, "Unknown style of strips 'film'; expected one of: page, strip, scene"),
        ({"size": (40, 400)}, "A strip of 40 x 400 pixels is too small to draw on. Give a width and a height of at least 48"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(wrong, told):
    with pytest.raises(InputError, match=told):
        draw_strips(1, **wrong)


@pytest.mark.parametrize("style", SIZES)
@pytest.mark.parametrize("panels", [2, 5, 6])
def test_every_style_draws_what_it_tells(style, panels):
    """In every panel of every style the colours are those of its span, and spans and questions are one per panel."""
    for strip in draw_strips(8, panels=panels, style=style):
        assert strip.image.size == SIZES[style]
        assert len(strip.panels) == len(strip.spans) == len(strip.questions) == panels
        for box, (start, end) in zip(strip.panels, strip.spans, strict=True):
            pixels = np.asarray(strip.image.crop(box)).reshape(-1, 3)
            shown = {name for name, colour in COLOURS.items() if (pixels == colour).all(1).any()}
            assert shown == {colour for _, colour, _ in MENTION.findall(strip.narration[start:end])}
        assert strip.narration.endswith(".")
        assert "  " not in strip.narration


def test_a_scene_is_told_as_the_lab_tells_one():
    (strip,) = draw_strips(1, panels=3, style="scene")
    assert re.fullmatch(r"There is an? \w+ \w+ (at|on|in) the [a-z ]+, an? \w+ .+ and an? \w+ .+\.", strip.narration)
    assert strip.questions[0].startswith("What is ")


@pytest.mark.parametrize("panels", [2, 3, 5])
def test_a_page_cut_short_is_the_page_with_fewer_panels(panels):
    """To the pixel and to the word, as if it had been drawn so."""
    (page,) = draw_strips(1)
    (drawn,) = draw_strips(1, panels=panels)
    assert digest(page.shortened(panels)) == digest(drawn)
    assert page.shortened(panels) == drawn


# ---------------------------------------------------------------------------------------------- a user's own strips


@pytest.fixture
def comics(tmp_path):
    """Two comics of three images, one of them with words, and one page with boxes."""
    for comic, worded in (("a", True), ("b", False)):
        (tmp_path / comic).mkdir()
        for number, size in enumerate(((40, 80), (80, 80), (120, 60))):
            Image.new("RGB", size, (number * 100, 0, 0)).save(tmp_path / comic / f"{number}.png")
            if worded:
                (tmp_path / comic / f"{number}.txt").write_text(f"A colour, number {number}.\n")
    Image.new("RGB", (100, 50)).save(tmp_path / "page.png")
    boxes = [{"box": [0, 0, 50, 50], "text": "left"}, {"box": [50, 0, 100, 50], "text": "right"}]
    (tmp_path / "page.json").write_text(json.dumps({"image": "page.png", "panels": boxes}))
    return tmp_path


def test_panels_of_a_folder_are_put_side_by_side(comics):
    """At one height, in the order of their names, each recognisable in its box; words make a narration."""
    worded, silent, page = load_strips(comics)
    assert worded.panels == ((0, 0, 128, 256), (128, 0, 384, 256), (384, 0, 896, 256))
    for number, box in enumerate(worded.panels):
        middle = ((box[0] + box[2]) // 2, 128)
        assert worded.image.getpixel(middle) == (number * 100, 0, 0)
    assert worded.image.getpixel((128, 10)) == (255, 255, 255), "a gap over each border"
    assert worded.narration == "Panel 1: A colour, number 0. Panel 2: A colour, number 1. Panel 3: A colour, number 2."
    assert [worded.narration[slice(*span)] for span in worded.spans] == [f"A colour, number {i}" for i in range(3)]
    assert (silent.narration, silent.spans) == ("", ())
    assert silent.questions[1] == (
        "The picture has 3 panels. What is in panel 2 of 3, counted from left to right? Answer briefly."
    )
    assert page.panels == ((0, 0, 50, 50), (50, 0, 100, 50))
    assert page.narration == "Panel 1: left. Panel 2: right."


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": "../page.png"}, "names the image '../page.png'. Give the name of a file beside it"),
        ({"image": "gone.png"}, "gone.png cannot be opened"),
        ({"panels": [{"box": [0, 0, 50, 50]}]}, "does not describe a page: panels"),
        ({"panels": [{"box": [0, 0, 50, 50]}, {"box": [50, 0, 101, 50]}]}, "panel 1 is .* no box of a 100 x 50 image"),
        ({"panels": [{"box": [0, 0, 50, 50]}, {"box": [9, 0, 9, 50]}]}, "panel 1 is .* no box of a 100 x 50 image"),
        ({"more": 1}, "does not describe a page: more: Extra inputs"),
    ],
    ids=str,
)
def test_a_page_that_is_wrong_is_refused_with_what_is_wrong(comics, change, told):
    path = comics / "page.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=told):
        load_strips(comics)


def test_folders_that_hold_no_strips_are_refused(comics, tmp_path):
    (comics / "a" / "0.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"0\.txt is not UTF-8 text"):
        load_strips(comics)
    with pytest.raises(InputError, match="holds 0 images; a strip has 2 to 64 panels"):
        load_strips(tmp_path_with(tmp_path / "one", "empty"))
    with pytest.raises(InputError, match="holds no strips: neither folders"):
        load_strips(tmp_path_with(tmp_path / "none"))
    with pytest.raises(InputError, match="is no folder"):
        load_strips(tmp_path / "gone")


def tmp_path_with(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).mkdir()
    return folder


@given(ANYTHING)
def test_any_json_is_refused_as_a_page(tmp_path_factory, anything):
    folder = tmp_path_factory.mktemp("pages")
    (folder / "page.json").write_text(json.dumps(anything))
    with pytest.raises(InputError, match=r"page\.json does not describe a page"):
        load_strips(folder)


def test_every_object_looks_different():
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
    said = [item for part in listed(items).split(", ") for item in part.split(" and ")]
    assert said == items
    assert listed(items).count(" and ") == (len(items) > 1)


@pytest.mark.parametrize(
    ("words", "said"), [(("orange", "cup"), "an orange cup"), (("small", "red", "sun"), "a small red sun")]
)
def test_articles(words, said):
    assert a_phrase(*words) == said


def test_the_json_of_ones_own_comics_sets_prompt_leads_and_questions(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "page.png")
    panels = [
        {"box": [0, 0, 50, 50], "text": "A red star.", "lead": "First, ", "question": "What comes first?"},
        {"box": [50, 0, 100, 50], "text": "a moon"},
    ]
    (tmp_path / "page.json").write_text(json.dumps({"image": "page.png", "prompt": "Tell the story.", "panels": panels}))
    (strip,) = load_strips(tmp_path)
    assert (strip.prompt, strip.narration) == ("Tell the story.", "First, A red star. Panel 2: a moon.")
    assert strip.questions[0] == "What comes first?"
    assert strip.questions[1].startswith("The picture has 2 panels. What is in panel 2 of 2")
    assert [strip.narration[start:end] for start, end in strip.spans] == ["A red star", "a moon"]
