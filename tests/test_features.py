"""Are the numbers behind a risk what their names say, and never from the future?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labkit import make_trace

from gazeguard.claims.parse import claims
from gazeguard.detection.features import (
    GAZE_FEATURES,
    HEAD_FEATURES,
    MEANING,
    TEXT_FEATURES,
    features,
    head_agreement,
    meaning,
    names,
)
from gazeguard.trace import SEGMENTS, GazeTrace

CAPTION = "There is a red star and a small blue moon on the left , a green star , an old cup ."
WORDS = CAPTION.split()


def words(chosen) -> list[str]:
    return [f" {word}" for word in chosen]


def cut(trace: GazeTrace, tokens: int) -> GazeTrace:
    """The trace as it was when so many tokens were written."""
    arrays = (
        "token_ids",
        "offsets",
        "logprobs",
        "entropy",
        "gaze",
        "segment_mass",
        "attribution",
        "attended_logprob",
        "internal_confidence",
    )
    rows = {name: getattr(trace, name)[:tokens] for name in arrays}
    text = trace.text[: int(rows["offsets"][-1, 1])]
    return GazeTrace(text=text, heads=trace.heads, grid=trace.grid, model=trace.model, **rows)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=5, unique=True))
def test_every_column_has_one_name_and_a_meaning(heads):
    """One per text and gaze feature, one per head feature and head; each can be said in words, high and low."""
    found = names(heads)
    assert len(set(found)) == len(found) == len(TEXT_FEATURES) + len(GAZE_FEATURES) + len(HEAD_FEATURES) * len(heads)
    assert all(meaning(name, True) != meaning(name, False) for name in found)
    assert {name.partition("@")[0] for name in found} <= set(MEANING)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_the_matrix_has_the_columns_of_its_names(heads):
    trace = make_trace(words(WORDS), heads)
    said = claims(trace.text)
    assert {claim.kind for claim in said} == {"object", "attribute", "location"}
    x = features(trace, said)
    assert x.shape == (len(said), len(names(trace.heads)))
    assert np.isfinite(x).all()
    assert features(trace, []).shape == (0, x.shape[1])
    for some in ([], [0], [len(said) - 1], [1, 3], range(len(said))):
        np.testing.assert_array_equal(features(trace, said, some), x[list(some)])


@settings(max_examples=60)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=20), st.integers(1, 3), st.integers(0, 2**32))
def test_nothing_looks_ahead(chosen, heads, seed):
    """The features of a claim are the same when nothing after its thing and its place has been written yet."""
    trace = make_trace(words(chosen), heads, seed=seed)
    said = claims(trace.text)
    x = features(trace, said)
    for i, claim in enumerate(said):
        spans = [claim.phrase, claim.span, *([claim.related] if claim.related else [])]
        then = cut(trace, trace.tokens(claim.phrase.start, max(span.end for span in spans)).stop)
        # But for the last digits: a sum over fewer words may be taken in another order.
        np.testing.assert_allclose(features(then, said[: i + 1], [i])[0], x[i], rtol=1e-12, atol=1e-12)


def test_known_values():
    """A trace by hand: tokens 'a', ' red', ' star', ' near', ' star', four cells, two heads."""
    even, one = [0.2] * 4, [0.8, 0, 0, 0]
    gaze = np.array([[even, even], [even, even], [one, even], [even, one], [one, one]], np.float32)
    segment_mass = np.zeros((5, 2, 4), np.float32)
    segment_mass[:, :, SEGMENTS.index("image")] = [[0.1, 0.1], [0.1, 0.1], [0.8, 0.8], [0.2, 0.6], [0.8, 0.4]]
    attribution = np.array([[9, 9], [1, 2], [3, 1], [9, 9], [5, -1]], np.float32)
    trace = make_trace(
        ["a", " red", " star", " near", " star"],
        gaze=gaze,
        segment_mass=segment_mass,
        attribution=attribution,
        attended_logprob=np.array([0, -3, -1, 0, -2], np.float32),
        internal_confidence=np.array([0, -2, -0.5, 0, -1], np.float32),
        logprobs=np.array([0, 0, -2, 0, -0.5], np.float32),
        entropy=np.array([0, 0, 1.5, 0, 0.25], np.float32),
        heads=((1, 0), (2, 3)),
    )
    said = claims(trace.text)
    assert [(claim.kind, claim.text) for claim in said] == [("object", "a red star"), ("attribute", "red"), ("object", "star")]
    wanted = {
        "position": [np.log(3), np.log(2), np.log(5)],
        "object_index": [0, 0, np.log(2)],
        "repeated": [0, 0, 1],
        "token_nll": [2, 0, 0.5],
        "entropy": [1.5, 0, 0.25],
        "attribution": [4, 3, 4],
        "attribution_min": [3, 3, 4],
        "attended_logprob": [-1, -3, -2],
        "internal_confidence": [-0.5, -2, -1],
        "head_agreement": [0.25, 1, 1],
        "earlier_overlap": [0, 0, (1 + 0.25) / 2],
        "related_overlap": [1, (0.25 + 1) / 2, 1],
        "location_agreement": [0.5, 0.5, 0.5],
        "attribution@1.0": [3, 1, 5],
        "attribution@2.3": [1, 2, -1],
        "image_mass@1.0": [0.8, 0.1, 0.8],
        "image_mass@2.3": [0.8, 0.1, 0.4],
        "concentration@1.0": [1, 0, 1],
        "concentration@2.3": [0, 0, 1],
        "image_mass_shift@1.0": [0, 0, 0.6],
        "image_mass_shift@2.3": [0, 0, -0.2],
    }
    x = features(trace, said)
    assert list(wanted) == list(names(trace.heads))
    for name, column in zip(names(trace.heads), x.T, strict=True):
        assert column == pytest.approx(wanted[name], abs=1e-6), name


@pytest.mark.parametrize(
    ("location", "token", "wanted"),
    [
        ("on the left", 0, 0.75),  # the patch's middle is a quarter of the width away
        ("on the left", 3, 0.25),
        ("at the top left", 0, 0.75),  # mean over the words, and over the axes that they name
        ("at the top left", 3, 0.25),
        ("in the middle", 0, 0.75),
        ("in panel two", 0, 0.5),  # a panel is no direction
    ],
)
def test_location_agreement(location, token, wanted):
    """Two by two image tokens, all attention on one of them."""
    text = f"a star {location}"
    gaze = np.zeros((len(text.split()), 1, 4), np.float32)
    gaze[..., token] = 0.5
    trace = make_trace([text.split()[0], *words(text.split()[1:])], 1, side=2, gaze=gaze)
    said = claims(trace.text)
    assert [claim.kind for claim in said] == ["object", "location"]
    there = features(trace, said)[:, names(trace.heads).index("location_agreement")]
    assert there.tolist() == [0.5, wanted]


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
def test_agreement_is_an_overlap(heads, cells, seed):
    """Between 0 and 1, 1 for equal heads or a single one, 0 for heads that share no cell, blind to the order of heads."""
    where = np.random.default_rng(seed).dirichlet(np.ones(cells), heads)
    assert 0 <= head_agreement(where) <= 1 + 1e-9
    assert head_agreement(where) == pytest.approx(head_agreement(where[::-1]))
    assert head_agreement(np.repeat(where[:1], heads, axis=0)) == pytest.approx(1)
    assert head_agreement(np.eye(heads)) == (1 if heads == 1 else 0)
