"""Is the drawn world what its captions and its truth say it is, on every machine?"""

from __future__ import annotations

import hashlib
import random
import re
from itertools import combinations, islice

import numpy as np
import pytest

from gazeguard.heads.pictographs import COLOURS
from gazeguard.heads.strips import MAX_PANELS, ORDINALS
from gazeguard.lab.truth import mentions
from gazeguard.lab.world import (
    LOCATION_PHRASES,
    NOUNS,
    PAGE,
    PARTNER,
    PATCH,
    SPLITS,
    USUAL_COLOUR,
    conversations,
    describe,
    samples,
    yes_no_question,
)

# The world is part of every published figure: when a digest changes, models, detectors and baselines are of another
# world. SHA-256 of the reprs of 50 samples, first 16 digits.
GOLDEN = {
    "train": "1567495d60277613",
    "validation": "d90d141e5d988e89",
    "test": "7175c48f14abf8ad",
    "shifted": "80ca025311b58399",
    "conversations": "f8cf0b5700d1d179",
}
QUESTION = re.compile(r"Is there an? (?:(\w+) )?(\w+?)(?: in panel (\w+))?\?")


def many(n: int, splits=SPLITS):
    return [sample for split in splits for sample in samples(split, n)]


def digest(made) -> str:
    return hashlib.sha256("".join(map(repr, made)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("split", SPLITS)
def test_the_world_is_the_same_everywhere(split):
    assert digest(samples(split, 50)) == GOLDEN[split]


def test_the_conversations_are_the_same_everywhere():
    assert digest(islice(conversations(0, 0), 50)) == GOLDEN["conversations"]


def test_a_sample_depends_on_split_seed_and_index_alone():
    """Not on how many are made, nor on what was made before; pixels included."""
    one, again = samples("test", 3, seed=5), samples("test", 6, seed=5)[:3]
    assert one == again
    assert [s.image.tobytes() for s in one] == [s.image.tobytes() for s in again]
    assert list(islice(conversations(3, 10), 5)) == list(islice(conversations(3, 8), 7))[2:]


def test_splits_and_seeds_share_no_sample():
    """All ids differ, and so do all pictures."""
    made = [s for seed in (0, 1) for split in SPLITS for s in samples(split, 100, seed)] + list(
        islice(conversations(0, 0), 100)
    )
    assert len({s.id for s in made}) == len(made)
    assert len({repr(s.drawing) for s in made}) == len(made)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown split 'dev'; expected one of: train, validation, test, shifted"):
        samples("dev", 1)


def test_kinds_alternate_or_are_chosen():
    assert [bool(s.drawing.panels) for s in samples("test", 4)] == [True, False] * 2
    assert all(s.drawing.panels for s in samples("test", 4, kind="strip"))
    assert not any(s.drawing.panels for s in samples("test", 4, kind="scene"))


def test_there_is_enough_to_see():
    """Every noun, colour, place, panel and look occurs; partners are mutual."""
    objects = [each for sample in many(150) for each in sample.drawing.objects]
    assert len(NOUNS) >= 24
    assert {each.noun for each in objects} == set(NOUNS) == set(PARTNER)
    assert {each.colour for each in objects} == set(COLOURS) == set(USUAL_COLOUR.values())
    assert {each.location for each in objects} == {None, *(place for row in LOCATION_PHRASES for place in row)}
    assert {each.panel for each in objects} == {None, *range(MAX_PANELS)}
    assert {each.hidden for each in objects} == {"", "left", "right", "top", "bottom"}
    assert {(each.small, each.faint) for each in objects} == {(a, b) for a in (True, False) for b in (True, False)}
    assert all(PARTNER[PARTNER[noun]] == noun != PARTNER[noun] for noun in NOUNS)


def test_things_lie_where_they_are_said_to_lie():
    """Inside the page and their panel; in the third of the page that the place names; no two over each other."""
    for sample in many(150):
        drawing = sample.drawing
        assert drawing.objects
        for each in drawing.objects:
            x0, y0, x1, y1 = each.box
            left, top, right, bottom = (0, 0, PAGE, PAGE) if each.panel is None else drawing.panel_box(each.panel)
            assert left <= x0 < x1 <= right
            assert top <= y0 < y1 <= bottom
            assert (each.panel is None) == (drawing.panels == 0) == (each.location is not None)
            if each.location:
                assert LOCATION_PHRASES[int((y0 + y1) / 2 // (PAGE / 3))][int((x0 + x1) / 2 // (PAGE / 3))] == each.location
            else:
                assert each in drawing.in_panel(each.panel)
                assert 0 <= each.panel < drawing.panels
        for a, b in combinations(drawing.objects, 2):
            assert a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]


def test_things_come_in_reading_order():
    """Panel by panel; in a scene row by row of places, left to right."""
    rows = {place: y for y, row in enumerate(LOCATION_PHRASES) for place in row}
    for sample in many(100):
        keys = [
            (rows[t.location], t.box[0] + t.box[2]) if t.panel is None else (t.panel, t.box[1]) for t in sample.drawing.objects
        ]
        assert keys == sorted(keys)


def visible(each) -> tuple[int, int, int, int]:
    """The half of an object that nothing covers."""
    x0, y0, x1, y1 = each.box
    x, y = (x0 + x1) // 2, (y0 + y1) // 2
    return {"left": (x, y0, x1, y1), "right": (x0, y0, x, y1), "top": (x0, y, x1, y1), "bottom": (x0, y0, x1, y)}.get(
        each.hidden, each.box
    )


def test_what_is_said_to_be_there_is_drawn():
    """What nothing hides has its colour among its pixels, a faint object a tint of it; elsewhere the page is bare."""
    for sample in many(25):
        pixels = np.asarray(sample.image).astype(float)
        paper = np.array(sample.drawing.paper, float)
        bare = np.ones((PAGE, PAGE), bool)
        for each in sample.drawing.objects:
            x0, y0, x1, y1 = each.box
            bare[y0:y1, x0:x1] = False
            x0, y0, x1, y1 = visible(each)
            direction = np.array(COLOURS[each.colour]) - paper
            # How far each pixel went from the paper to the colour: 1 is the pure colour.
            way = (pixels[y0:y1, x0:x1] - paper) @ direction / (direction @ direction)
            there = paper + way[..., None] * direction
            on_line = np.abs(pixels[y0:y1, x0:x1] - there).max(-1) < 3
            strongest = way[on_line].max()
            if each.faint:
                assert 0.1 < strongest < 0.35
            else:  # what is left of a small object may be thin
                assert strongest > (0.25 if each.small and each.hidden else 0.5)
        if not sample.drawing.panels:
            assert (pixels[bare] == paper).all()


@pytest.mark.parametrize("split", SPLITS)
def test_honest_captions_are_true_and_whole(split):
    """The law that ties the world, the chunker and the truth: each mention is true, and there is one for every object."""
    for sample in samples(split, 200):
        drawing = sample.drawing
        caption = describe(drawing, random.Random(0), honest=True)
        found = mentions(drawing, caption)
        assert [m.explanation for m in found] == ["true"] * len(drawing.objects), caption
        assert [m.object for m in found] == list(drawing.objects)
        assert [m.phrase.text for m in found] == [caption[m.phrase.start : m.phrase.end] for m in found]


def test_nouns_come_in_pairs_but_not_in_the_shifted_split():
    """How often a noun's partner is beside it, in scenes: well above the shifted world's rate. So with usual colours."""
    rates = {}
    for split in ("train", "test", "shifted"):
        scenes = [sample.drawing.objects for sample in samples(split, 1000, kind="scene")]
        beside = [PARTNER[t.noun] in {o.noun for o in objects} for objects in scenes for t in objects if len(objects) > 1]
        usual = [each.colour == USUAL_COLOUR[each.noun] for objects in scenes for each in objects]
        rates[split] = (np.mean(beside), np.mean(usual))
    for split in ("train", "test"):
        assert rates[split][0] > 2 * rates["shifted"][0]
        assert rates[split][1] == pytest.approx(0.5 + 0.5 / 6, abs=0.05)
    assert rates["shifted"][1] == pytest.approx(1 / 6, abs=0.04)


def test_late_mentions_are_invented_more_often():
    """In training captions of strips position is a confound, as in real ones: the share of inventions rises."""
    early, late, colours = [], [], {True: [], False: []}
    for sample in samples("train", 800, kind="strip"):
        for mention in mentions(sample.drawing, sample.turns[0].answer):
            (early if mention.order < 2 else late if mention.order >= 8 else []).append(not mention.located)
            if mention.colour is not None:
                colours[mention.order >= 8].append(not mention.colour)
    assert np.mean(early) < 0.06
    assert np.mean(late) > 3 * np.mean(early)
    assert np.mean(colours[True]) > 3 * np.mean(colours[False])


def test_captions_for_evaluation_and_training_hold_only_known_words():
    """No caption, question or answer of the lab names an object that the truth cannot judge."""
    for sample in islice(conversations(1, 0), 300):
        for turn in sample.turns:
            for mention in mentions(sample.drawing, turn.answer):
                assert mention.phrase.head.text in NOUNS
            assert turn.answer.endswith(".")
            assert turn.prompt[-1] in ".?"


def test_questions_are_answered_by_what_is_there():
    """The answer, found anew from question and drawing, is the one given; half are yes, and each form of lie occurs."""
    rng, answers, lies = random.Random(1), [], set()
    for sample in many(150):
        drawing = sample.drawing
        for _ in range(3):
            turn = yes_no_question(drawing, rng)
            colour, noun, panel = QUESTION.fullmatch(turn.prompt).groups()
            objects = drawing.objects if panel is None else drawing.in_panel(ORDINALS.index(panel))
            true = any(each.noun == noun and colour in (None, each.colour) for each in objects)
            assert turn.answer == ("Yes." if true else "No."), turn
            answers.append(true)
            if not true:
                there = {each.noun for each in objects}
                elsewhere = {each.noun for each in drawing.objects} - there
                lies.add("colour" if noun in there else "elsewhere" if noun in elsewhere else "nowhere")
                lies |= {"partner"} if PARTNER.get(noun) in there else set()
    assert np.mean(answers) == pytest.approx(0.5, abs=0.06)
    assert lies == {"colour", "elsewhere", "nowhere", "partner"}


def test_questions_about_colours_are_answered_truly():
    """The colour of the object that was asked for, or that there is none; both come often."""
    told = {"There is none.": 0, "It is": 0}
    for sample in islice(conversations(2, 0), 300):
        for turn in sample.turns:
            if not (found := re.fullmatch(r"What colour is the (\w+)(?: in panel (\w+))?\?", turn.prompt)):
                continue
            noun, panel = found.groups()
            drawing = sample.drawing
            objects = drawing.objects if panel is None else drawing.in_panel(ORDINALS.index(panel))
            colours = [each.colour for each in objects if each.noun == noun]
            assert turn.answer == (f"It is {colours[0]}." if colours else "There is none."), turn
            assert len(colours) <= 1
            told["It is" if colours else "There is none."] += 1
    assert min(told.values()) > 50


@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_curriculum_bounds_panels_and_things(most):
    for sample in islice(conversations(0, 0, most), 150):
        assert sample.drawing.panels <= most
        assert sample.drawing.panels or len(sample.drawing.objects) <= most


def test_things_lie_on_the_lattice_of_patches():
    """An object fills its patches: shrunk by two pixels on each side it touches at most two by two, a small one one."""
    for sample in many(100):
        for each in sample.drawing.objects:
            x0, y0, x1, y1 = each.box
            across, down = ((b - 3) // PATCH - (a + 2) // PATCH + 1 for a, b in ((x0, x1), (y0, y1)))
            assert max(across, down) <= (1 if each.small else 2)
