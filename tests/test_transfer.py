"""Are features chosen that hold in another style, and not habits of one?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_detector import HEADS, NAMES

from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.detection.table import ClaimTable
from gazeguard.detection.transfer import PRIORS, choose_features
from gazeguard.errors import InputError

EVIDENCE, HABIT = "internal_confidence", "head_agreement"


def style(habit: float, seed: int, n: int = 300) -> ClaimTable:
    """Object claims: false ones have less evidence in every style, are never repeated, and have a habit of their own."""
    rng = np.random.default_rng(seed)
    false = rng.random(n) < 0.3
    x = rng.normal(size=(n, len(NAMES)))
    x[:, NAMES.index(EVIDENCE)] -= 1.5 * false
    x[:, NAMES.index(HABIT)] += habit * false
    x[:, NAMES.index("repeated")] = (rng.random(n) < 0.5) & ~false
    return ClaimTable(x, false, np.full(n, "object"), np.arange(n) // 3)


def test_a_habit_of_one_style_is_not_learnt_and_evidence_is():
    """The repeated mention is a shortcut in every style, and is not even asked about: it says nothing about the image."""
    styles = {"icons": style(3, 0), "photographs": style(-2, 1)}
    chosen = choose_features(styles, HEADS.heads)
    assert EVIDENCE in chosen.names
    assert HABIT not in chosen.names
    assert not set(PRIORS) & set(chosen.names)
    assert HABIT in chosen.dropped
    assert chosen.loss_after < chosen.loss_before
    third = style(-2, 2)
    by_kind, _ = cross_fit(styles["icons"], HEADS, {"object": chosen.names})
    assert by_kind.kinds["object"].names == chosen.names
    aurocs = {}
    for label, names in (("all", None), ("chosen", chosen.names)):
        detector, _ = cross_fit(styles["icons"], HEADS, names)
        risk = detector.risk(third.x, third.kinds)
        aurocs[label] = (risk[third.false][:, None] > risk[~third.false]).mean()
    assert aurocs["chosen"] > aurocs["all"] + 0.1


def test_too_little_for_a_transfer_is_said():
    one, few = style(1, 0), style(1, 1)
    rare = replace(few, false=few.false & (np.cumsum(few.false) <= 2))
    with pytest.raises(InputError, match=r"needs two styles .* false are icons: \d+ of 300, photographs: 2 of 300\. Draw more"):
        choose_features({"icons": one, "photographs": rare}, HEADS.heads)
