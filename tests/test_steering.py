"""Attention steering: the gaze heads attend to the target, when and where it is set, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gazeguard import lab
from gazeguard.attention.steering import SteeringTarget, image_tokens_in, undescribed_regions
from gazeguard.errors import InputError
from gazeguard.vision.encoding import encode
from gazeguard.vision.grid import ImageGrid

GRID = ImageGrid.regular(12, 12, (144, 144))
STRIPS = [sample for sample in lab.samples("validation", 60, 5, "strip") if sample.drawing.panels == 6][:3]
LEFT, RIGHT = STRIPS[0].drawing.panel_box(0), STRIPS[0].drawing.panel_box(5)
PAGE = (0.0, 0.0, 144.0, 144.0)


def written(guard, samples=STRIPS, prompt="Describe a panel.", target=None, **options) -> list[list[int]]:
    """New ids of every row, under ``target`` (arguments of steer) or unrecorded when that is None."""
    batch = encode(guard.model, guard.processor, [s.image for s in samples], [prompt] * len(samples))
    own = {"max_new_tokens": 16, "do_sample": False, **options}
    if target is None:
        made = guard.model.generate(**batch.inputs, **own)
    else:
        with guard.steer(*target[:1], **dict(zip(("strength", "mode", "prompt"), target[1:], strict=False))):
            made = guard.generate(**batch.inputs, **own, picture_sizes=[[s.image.size] for s in samples])
    return made[:, batch.prompt_ids.shape[1] :].tolist()


def mass_in(report, box, rows=slice(None)) -> float:
    return float(report.trace.gaze[rows, :, image_tokens_in(report.trace.grid, box)].sum(-1).mean())


# ------------------------------------------------------------------------------------------------------------ targets


@given(st.floats(0, 143), st.floats(0, 143), st.floats(0.5, 144), st.floats(0.5, 144))
def test_a_box_has_image_tokens(x, y, width, height):
    """Every box on the page has at least one cell; each of them touches it, and those that lie in it are all there."""
    box = (x, y, min(144.0, x + width), min(144.0, y + height))
    inside = image_tokens_in(GRID, box)
    share = GRID.overlap(box)
    assert inside.any()
    assert (share[inside] > 0).all()
    assert inside[share > 0.5].all()


def test_a_box_beside_the_image_is_refused():
    with pytest.raises(InputError, match=r"The box \(200, 0, 300, 50\) touches no image token of its image"):
        image_tokens_in(GRID, (200, 0, 300, 50))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"targets": (0, 0, 10, 10), "mode": "stare"},
            "Unknown steering mode .stare.; expected one of: both, boost, suppress",
        ),
        (
            {"targets": (0, 0, 10, 10), "strength": 1e4},
            "Steering strength 10000.0 is out of range; expected a number above 0 and up to 50",
        ),
        ({"targets": (0, 0, 10, 10), "strength": 0}, "Steering strength 0 is out of range"),
        ({"targets": (0, 0, 10, 10), "strength": float("nan")}, "Steering strength nan is out of range"),
        ({"targets": (10, 0, 10, 10)}, "Unexpected steering target .*; expected a box"),
        ({"targets": (0, 0, 10)}, "Unexpected steering target .*; expected a box"),
        ({"targets": [(0, 0, 10, 10), (0, 0, float("nan"), 10)]}, "Unexpected steering target .*; expected a box"),
        ({"targets": {-1: None}}, "Unexpected key -1 in a schedule; expected numbers of new tokens, 0 or more"),
        ({"targets": {"0": None}}, "Unexpected key '0' in a schedule; expected numbers of new tokens, 0 or more"),
    ],
    ids=str,
)
def test_what_is_no_target_is_refused(given, told):
    with pytest.raises(InputError, match=told):
        SteeringTarget(**given)


def test_as_many_targets_as_prompts(guard):
    with pytest.raises(InputError, match="Got 2 steering targets for 3 prompts"):
        written(guard, target=([LEFT, RIGHT],))
    with pytest.raises(InputError, match="There is no image 1 in the prompt"), guard.steer(LEFT, image=1):
        guard.caption(STRIPS[0].image)


# --------------------------------------------------------------------------------------------------------------- invariants


def test_no_target_changes_nothing(guard):
    """None, and a schedule of None, write the very tokens of plain generate; and so does what comes after steering."""
    plain = written(guard)
    assert written(guard, target=(None,)) == plain
    assert written(guard, target=({0: None, 5: None},)) == plain
    with pytest.raises(RuntimeError, match="stop"), guard.steer(LEFT):
        raise RuntimeError("stop")
    batch = encode(guard.model, guard.processor, [s.image for s in STRIPS], ["Describe a panel."] * 3)
    again = guard.generate(**batch.inputs, max_new_tokens=16, do_sample=False)[:, batch.prompt_ids.shape[1] :]
    assert again.tolist() == plain


@pytest.mark.parametrize("mode", ["both", "boost", "suppress"])
@pytest.mark.parametrize("prompt", [True, False])
def test_attention_goes_where_it_is_steered(guard, mode, prompt):
    """Whatever the mode, far more of the heads' attention is on the target than without steering."""
    written(guard, target=(None,))
    before = [mass_in(report, RIGHT) for report in guard.reports]
    written(guard, target=(RIGHT, 5.0, mode, prompt))
    after = [mass_in(report, RIGHT) for report in guard.reports]
    assert min(after) > 0.4
    assert all(a > 1.5 * b for a, b in zip(after, before, strict=True))


def test_the_answer_follows_attention(guard):
    """In the lab, "Describe a panel." is answered with the panel that is attended to."""
    for panel in range(6):
        written(guard, target=([sample.drawing.panel_box(panel) for sample in STRIPS],), max_new_tokens=24)
        for sample, report in zip(STRIPS, guard.reports, strict=True):
            first = report.findings[0].claim.phrase
            noun = report.caption[first.head.start : first.head.end]
            assert noun in {thing.noun for thing in sample.drawing.in_panel(panel)}, (sample.id, panel, report.caption)


def test_every_row_has_its_own_target(guard):
    """A batch with three targets, one of them None, writes what the rows write alone."""
    targets = [LEFT, None, {0: RIGHT, 6: LEFT}]
    together = written(guard, target=(targets,))
    for row, target in enumerate(targets):
        alone = written(guard, [STRIPS[row]], target=([target],))[0]
        assert alone == together[row][: len(alone)]


def test_a_schedule_holds_from_its_token_on(guard):
    """Before the first entry nothing differs from plain generate; after each, attention is there at once."""
    plain = written(guard, prompt="Describe all panels.")
    turned = written(guard, prompt="Describe all panels.", target=({4: LEFT, 9: RIGHT},))
    assert [row[:4] for row in turned] == [row[:4] for row in plain]
    for report in guard.reports:
        assert mass_in(report, LEFT, slice(4, 9)) > 0.5 > mass_in(report, LEFT, slice(9, 16))
        assert mass_in(report, RIGHT, slice(9, 16)) > 0.5 > mass_in(report, RIGHT, slice(4, 9))


@pytest.mark.parametrize("prompt", [True, False])
def test_a_replay_under_the_same_steering_is_the_same(guard, prompt):
    """Invariant (b) holds for steered captions, too: row by row, with a schedule."""
    with guard.steer({0: LEFT, 7: RIGHT}, prompt=prompt):
        live = guard.caption(STRIPS[0].image, "Describe a panel.", max_new_tokens=16, do_sample=False)
        replay = guard.check(STRIPS[0].image, live.caption, "Describe a panel.")
    steps = len(replay.trace)
    np.testing.assert_allclose(replay.trace.gaze, live.trace.gaze[:steps], atol=1e-4)
    np.testing.assert_allclose(replay.trace.logprobs, live.trace.logprobs[:steps], atol=1e-3)


@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_every_way_of_generating_can_be_steered(guard, way):
    """Beams, several captions per prompt, other caches and speculation attend to the target."""
    torch.manual_seed(0)
    samples = STRIPS[:1] if "prompt_lookup_num_tokens" in way else STRIPS
    written(guard, samples, target=(RIGHT,), **way)
    assert all(mass_in(report, RIGHT) > 0.4 for report in guard.reports)


def test_speculation_writes_what_plain_decoding_writes(guard):
    """A schedule counts tokens, not passes: with guesses that are rolled back, the tokens are the same."""
    target = ({0: LEFT, 7: RIGHT},)
    assert written(guard, STRIPS[:1], target=target) == written(guard, STRIPS[:1], target=target, prompt_lookup_num_tokens=3)


def test_what_a_caption_left_out_is_found_by_steering(guard):
    """Told of one half of a scene alone, the guard looks at the other and names what is there; it says nothing twice, and the
    caption's own report stays the guard's.
    """
    found = 0
    for sample in lab.samples("validation", 16, seed=9, kind="scene"):
        things = sample.drawing.objects
        if len(things) < 4:
            continue
        told = " and ".join(f"a {thing} {thing.location}" for thing in things[: len(things) // 2])
        report = guard.check(sample.image, f"There is {told}.", sample.prompt)
        before = guard.reports
        for more in guard.find_missed_objects(sample.image, report, regions=3):
            assert more.verdict == "pass"
            named = {finding.claim.phrase.head.text for finding in more.findings}
            assert not named & {finding.claim.phrase.head.text for finding in report.findings}
            found += bool(named & {thing.noun for thing in things})
        assert guard.reports is before
    assert found >= 8
    with pytest.raises(InputError, match="The report has no trace of a caption that names objects"):
        guard.find_missed_objects(STRIPS[0].image, guard.check(STRIPS[0].image, ""))


def test_undescribed_regions_are_those_without_gaze():
    grid = ImageGrid.regular(6, 6, (90, 90))
    gaze = np.zeros((2, 36))
    gaze[0, 0], gaze[1, 35] = 1, 1  # the first and the last cell
    boxes = undescribed_regions(grid, gaze, 7)
    assert (0, 0, 30, 30) not in boxes
    assert (60, 60, 90, 90) not in boxes
    assert len(set(boxes)) == 7
    assert undescribed_regions(grid, np.zeros((0, 36)), 1) == [(0, 0, 30, 30)]
