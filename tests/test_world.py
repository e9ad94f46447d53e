"""Is the drawn world what its captions and its truth say it is, on every machine?"""

from __future__ import annotations

import hashlib
import random
import re
from itertools import combinations, islice

import numpy as np
import pytest

from gazeguard.heads.strips import COLOURS, MAX_PANELS, ORDINALS
from gazeguard.lab.truth import mentions
from gazeguard.lab.world import CELL, NOUNS, PAGE, PARTNER, PLACES, SPLITS, USUAL_COLOUR, ask, describe, lessons, samples

# The world is part of every published figure: when a digest changes, models, detectors and baselines are of another
# world. SHA-256 of the reprs of 50 samples, first 16 digits.
GOLDEN = {
    "train": "dc816ef381ed076a",
    "validation": "eacbb97b70e92de3",
    "test": "be57c8e06e577018",
    "shifted": "09e0a9f53631fb9f",
    "lessons": "fcd14a9c92a9a782",
}
QUESTION = re.compile(r"Is there an? (?:(\w+) )?(\w+?)(?: in panel (\w+))?\?")


def many(n: int, splits=SPLITS):
    return [sample for split in splits for sample in samples(split, n)]


def digest(made) -> str:
    return hashlib.sha256("".join(map(repr, made)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("split", SPLITS)
def test_the_world_is_the_same_everywhere(split):
    assert digest(samples(split, 50)) == GOLDEN[split]


def test_the_lessons_are_the_same_everywhere():
    assert digest(islice(lessons(0, 0), 50)) == GOLDEN["lessons"]


def test_a_sample_depends_on_split_seed_and_index_alone():
    """Not on how many are made, nor on what was made before; pixels included."""
    one, again = samples("test", 3, seed=5), samples("test", 6, seed=5)[:3]
    assert one == again
    assert [s.image.tobytes() for s in one] == [s.image.tobytes() for s in again]
    assert list(islice(lessons(3, 10), 5)) == list(islice(lessons(3, 8), 7))[2:]


def test_splits_and_seeds_share_no_sample():
    """All ids differ, and so do all pictures."""
    made = [s for seed in (0, 1) for split in SPLITS for s in samples(split, 100, seed)] + list(islice(lessons(0, 0), 100))
    assert len({s.id for s in made}) == len(made)
    assert len({repr(s.picture) for s in made}) == len(made)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown split 'dev'. The lab has train, validation, test, shifted"):
        samples("dev", 1)


def test_kinds_alternate_or_are_chosen():
    assert [bool(s.picture.panels) for s in samples("test", 4)] == [True, False] * 2
    assert all(s.picture.panels for s in samples("test", 4, kind="strip"))
    assert not any(s.picture.panels for s in samples("test", 4, kind="scene"))


def test_there_is_enough_to_see():
    """Every noun, colour, place, panel and look occurs; partners are mutual."""
    things = [thing for sample in many(150) for thing in sample.picture.things]
    assert len(NOUNS) >= 24
    assert {thing.noun for thing in things} == set(NOUNS) == set(PARTNER)
    assert {thing.colour for thing in things} == set(COLOURS) == set(USUAL_COLOUR.values())
    assert {thing.place for thing in things} == {None, *(place for row in PLACES for place in row)}
    assert {thing.panel for thing in things} == {None, *range(MAX_PANELS)}
    assert {thing.hidden for thing in things} == {"", "left", "right", "top", "bottom"}
    assert {(thing.small, thing.faint) for thing in things} == {(a, b) for a in (True, False) for b in (True, False)}
    assert all(PARTNER[PARTNER[noun]] == noun != PARTNER[noun] for noun in NOUNS)


def test_things_lie_where_they_are_said_to_lie():
    """Inside the page and their panel; in the third of the page that the place names; no two over each other."""
    for sample in many(150):
        picture = sample.picture
        assert picture.things
        for thing in picture.things:
            x0, y0, x1, y1 = thing.box
            left, top, right, bottom = (0, 0, PAGE, PAGE) if thing.panel is None else picture.panel_box(thing.panel)
            assert left <= x0 < x1 <= right
            assert top <= y0 < y1 <= bottom
            assert (thing.panel is None) == (picture.panels == 0) == (thing.place is not None)
            if thing.place:
                assert PLACES[int((y0 + y1) / 2 // (PAGE / 3))][int((x0 + x1) / 2 // (PAGE / 3))] == thing.place
            else:
                assert thing in picture.in_panel(thing.panel)
                assert 0 <= thing.panel < picture.panels
        for a, b in combinations(picture.things, 2):
            assert a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]


def test_things_come_in_reading_order():
    """Panel by panel; in a scene row by row of places, left to right."""
    rows = {place: y for y, row in enumerate(PLACES) for place in row}
    for sample in many(100):
        keys = [(rows[t.place], t.box[0] + t.box[2]) if t.panel is None else (t.panel, t.box[1]) for t in sample.picture.things]
        assert keys == sorted(keys)


def visible(thing) -> tuple[int, int, int, int]:
    """The half of a thing that nothing covers."""
    x0, y0, x1, y1 = thing.box
    x, y = (x0 + x1) // 2, (y0 + y1) // 2
    return {"left": (x, y0, x1, y1), "right": (x0, y0, x, y1), "top": (x0, y, x1, y1), "bottom": (x0, y0, x1, y)}.get(
        thing.hidden, thing.box
    )


def test_what_is_said_to_be_there_is_drawn():
    """What nothing hides has its colour among its pixels, a faint thing a tint of it; elsewhere the page is bare."""
    for sample in many(25):
        pixels = np.asarray(sample.image).astype(float)
        paper = np.array(sample.picture.paper, float)
        bare = np.ones((PAGE, PAGE), bool)
        for thing in sample.picture.things:
            x0, y0, x1, y1 = thing.box
            bare[y0:y1, x0:x1] = False
            x0, y0, x1, y1 = visible(thing)
            direction = np.array(COLOURS[thing.colour]) - paper
            # How far each pixel went from the paper to the colour: 1 is the pure colour.
            way = (pixels[y0:y1, x0:x1] - paper) @ direction / (direction @ direction)
            there = paper + way[..., None] * direction
            on_line = np.abs(pixels[y0:y1, x0:x1] - there).max(-1) < 3
            strongest = way[on_line].max()
            if thing.faint:
                assert 0.1 < strongest < 0.35
            else:  # what is left of a small thing may be thin
                assert strongest > (0.25 if thing.small and thing.hidden else 0.5)
        if not sample.picture.panels:
            assert (pixels[bare] == paper).all()


@pytest.mark.parametrize("split", SPLITS)
def test_honest_captions_are_true_and_whole(split):
    """The law that ties the world, the chunker and the truth: each mention is true, and there is one for every thing."""
    for sample in samples(split, 200):
        picture = sample.picture
        caption = describe(picture, random.Random(0), honest=True)
        found = mentions(picture, caption)
        assert [m.explained for m in found] == ["true"] * len(picture.things), caption
        assert [m.thing for m in found] == list(picture.things)
        assert [m.phrase.text for m in found] == [caption[m.phrase.start : m.phrase.end] for m in found]


def test_nouns_come_in_pairs_but_not_in_the_shifted_split():
    """How often a noun's partner is beside it, in scenes: well above the shifted world's rate. So with usual colours."""
    rates = {}
    for split in ("train", "test", "shifted"):
        scenes = [sample.picture.things for sample in samples(split, 1000, kind="scene")]
        beside = [PARTNER[t.noun] in {o.noun for o in things} for things in scenes for t in things if len(things) > 1]
        usual = [thing.colour == USUAL_COLOUR[thing.noun] for things in scenes for thing in things]
        rates[split] = (np.mean(beside), np.mean(usual))
    for split in ("train", "test"):
        assert rates[split][0] > 2 * rates["shifted"][0]
        assert rates[split][1] == pytest.approx(0.5 + 0.5 / 6, abs=0.05)
    assert rates["shifted"][1] == pytest.approx(1 / 6, abs=0.04)


def test_late_mentions_are_invented_more_often():
    """In training captions of strips position is a confound, as in real ones: the share of inventions rises."""
    early, late, colours = [], [], {True: [], False: []}
    for sample in samples("train", 800, kind="strip"):
        for mention in mentions(sample.picture, sample.turns[0].answer):
            (early if mention.order < 2 else late if mention.order >= 8 else []).append(not mention.placed)
            if mention.colour is not None:
                colours[mention.order >= 8].append(not mention.colour)
    assert np.mean(early) < 0.06
    assert np.mean(late) > 3 * np.mean(early)
    assert np.mean(colours[True]) > 3 * np.mean(colours[False])


def test_captions_for_evaluation_and_training_hold_only_known_words():
    """No caption, question or answer of the lab names a thing that the truth cannot judge."""
    for sample in islice(lessons(1, 0), 300):
        for turn in sample.turns:
            for mention in mentions(sample.picture, turn.answer):
                assert mention.phrase.head.text in NOUNS
            assert turn.answer.endswith(".")
            assert turn.prompt[-1] in ".?"


def test_questions_are_answered_by_what_is_there():
    """The answer, found anew from question and picture, is the one given; half are yes, and each form of lie occurs."""
    rng, answers, lies = random.Random(1), [], set()
    for sample in many(150):
        picture = sample.picture
        for _ in range(3):
            turn = ask(picture, rng)
            colour, noun, panel = QUESTION.fullmatch(turn.prompt).groups()
            things = picture.things if panel is None else picture.in_panel(ORDINALS.index(panel))
            true = any(thing.noun == noun and colour in (None, thing.colour) for thing in things)
            assert turn.answer == ("Yes." if true else "No."), turn
            answers.append(true)
            if not true:
                there = {thing.noun for thing in things}
                elsewhere = {thing.noun for thing in picture.things} - there
                lies.add("colour" if noun in there else "elsewhere" if noun in elsewhere else "nowhere")
                lies |= {"partner"} if PARTNER.get(noun) in there else set()
    assert np.mean(answers) == pytest.approx(0.5, abs=0.06)
    assert lies == {"colour", "elsewhere", "nowhere", "partner"}


def test_questions_about_colours_are_answered_truly():
    """The colour of the thing that was asked for, or that there is none; both come often."""
    told = {"There is none.": 0, "It is": 0}
    for sample in islice(lessons(2, 0), 300):
        for turn in sample.turns:
            if not (found := re.fullmatch(r"What colour is the (\w+)(?: in panel (\w+))?\?", turn.prompt)):
                continue
            noun, panel = found.groups()
            picture = sample.picture
            things = picture.things if panel is None else picture.in_panel(ORDINALS.index(panel))
            colours = [thing.colour for thing in things if thing.noun == noun]
            assert turn.answer == (f"It is {colours[0]}." if colours else "There is none."), turn
            assert len(colours) <= 1
            told["It is" if colours else "There is none."] += 1
    assert min(told.values()) > 50


@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_curriculum_bounds_panels_and_things(most):
    for sample in islice(lessons(0, 0, most), 150):
        assert sample.picture.panels <= most
        assert sample.picture.panels or len(sample.picture.things) <= most


def test_things_lie_on_the_lattice_of_cells():
    """A thing fills its cells: shrunk by two pixels on each side it touches at most two by two, a small one one."""
    for sample in many(100):
        for thing in sample.picture.things:
            x0, y0, x1, y1 = thing.box
            across, down = ((b - 3) // CELL - (a + 2) // CELL + 1 for a, b in ((x0, x1), (y0, y1)))
            assert max(across, down) <= (1 if thing.small else 2)
