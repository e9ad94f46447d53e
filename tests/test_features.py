"""Are the numbers behind a risk what their names say, and never from the future?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labkit import make_trace

from gazeguard import features as module
from gazeguard.features import GAZE_FEATURES, HEAD_FEATURES, MEANING, TEXT_FEATURES, features, meaning, names
from gazeguard.phrases import claims
from gazeguard.trace import SHARES, GazeTrace

CAPTION = "There is a red star and a small blue moon on the left , a green star , an old cup ."
WORDS = CAPTION.split()


def words(chosen) -> list[str]:
    return [f" {word}" for word in chosen]


def cut(trace: GazeTrace, tokens: int) -> GazeTrace:
    """The trace as it was when so many tokens were written."""
    arrays = ("token_ids", "offsets", "logprobs", "entropy", "gaze", "shares", "readout", "content", "named")
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
    assert {claim.kind for claim in said} == {"object", "attribute", "place"}
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
        spans = [claim.phrase, claim.said, *([claim.other] if claim.other else [])]
        then = cut(trace, trace.tokens(claim.phrase.start, max(span.end for span in spans)).stop)
        # But for the last digits: a sum over fewer words may be taken in another order.
        np.testing.assert_allclose(features(then, said[: i + 1])[i], x[i], rtol=1e-12, atol=1e-12)


def test_known_values():
    """A trace by hand: tokens 'a', ' red', ' star', ' near', ' star', four cells, two heads."""
    even, one = [0.2] * 4, [0.8, 0, 0, 0]
    gaze = np.array([[even, even], [even, even], [one, even], [even, one], [one, one]], np.float32)
    shares = np.zeros((5, 2, 4), np.float32)
    shares[:, :, SHARES.index("picture")] = [[0.1, 0.1], [0.1, 0.1], [0.8, 0.8], [0.2, 0.6], [0.8, 0.4]]
    readout = np.array([[9, 9], [1, 2], [3, 1], [9, 9], [5, -1]], np.float32)
    trace = make_trace(
        ["a", " red", " star", " near", " star"],
        gaze=gaze,
        shares=shares,
        readout=readout,
        content=np.array([0, -3, -1, 0, -2], np.float32),
        named=np.array([0, -2, -0.5, 0, -1], np.float32),
        logprobs=np.array([0, 0, -2, 0, -0.5], np.float32),
        entropy=np.array([0, 0, 1.5, 0, 0.25], np.float32),
        heads=((1, 0), (2, 3)),
    )
    said = claims(trace.text)
    assert [(claim.kind, claim.text) for claim in said] == [("object", "a red star"), ("attribute", "red"), ("object", "star")]
    got = [dict(zip(names(trace.heads), row, strict=True)) for row in features(trace, said)]
    wanted = [
        {"position": np.log(3), "mention": 0, "repeated": 0, "surprise": 2, "entropy": 1.5, "readout": 4,
         "readout_words": 3, "content": -1, "named": -0.5, "agreement": 0.25, "visited": 0, "together": 1, "there": 0.5,
         "readout@1.0": 3, "readout@2.3": 1, "picture@1.0": 0.8, "picture@2.3": 0.8, "focus@1.0": 1, "focus@2.3": 0,
         "shift@1.0": 0, "shift@2.3": 0},
        {"position": np.log(2), "mention": 0, "repeated": 0, "surprise": 0, "entropy": 0, "readout": 3,
         "readout_words": 3, "content": -3, "named": -2, "agreement": 1, "visited": 0, "together": (0.25 + 1) / 2,
         "there": 0.5, "readout@1.0": 1, "readout@2.3": 2, "picture@1.0": 0.1, "picture@2.3": 0.1, "focus@1.0": 0,
         "focus@2.3": 0, "shift@1.0": 0, "shift@2.3": 0},
        {"position": np.log(5), "mention": np.log(2), "repeated": 1, "surprise": 0.5, "entropy": 0.25, "readout": 4,
         "readout_words": 4, "content": -2, "named": -1, "agreement": 1, "visited": (1 + 0.25) / 2, "together": 1,
         "there": 0.5, "readout@1.0": 5, "readout@2.3": -1, "picture@1.0": 0.8, "picture@2.3": 0.4, "focus@1.0": 1,
         "focus@2.3": 1, "shift@1.0": 0.6, "shift@2.3": -0.2},
    ]  # fmt: skip
    for row, expected in zip(got, wanted, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("place", "cell", "wanted"),
    [
        ("on the left", 0, 0.75),  # the cell's middle is a quarter of the width away
        ("on the left", 3, 0.25),
        ("at the top left", 0, 0.75),  # mean over the words, and over the axes that they name
        ("at the top left", 3, 0.25),
        ("in the middle", 0, 0.75),
        ("in panel two", 0, 0.5),  # a panel is no direction
    ],
)
def test_where_it_is_said_to_be(place, cell, wanted):
    """Two by two cells, all gaze in one of them."""
    text = f"a star {place}"
    gaze = np.zeros((len(text.split()), 1, 4), np.float32)
    gaze[..., cell] = 0.5
    trace = make_trace([text.split()[0], *words(text.split()[1:])], 1, side=2, gaze=gaze)
    said = claims(trace.text)
    assert [claim.kind for claim in said] == ["object", "place"]
    there = features(trace, said)[:, names(trace.heads).index("there")]
    assert there.tolist() == [0.5, wanted]


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
def test_agreement_is_an_overlap(heads, cells, seed):
    """Between 0 and 1, 1 for equal heads or a single one, 0 for heads that share no cell, blind to the order of heads."""
    where = np.random.default_rng(seed).dirichlet(np.ones(cells), heads)
    assert 0 <= module._agreement(where) <= 1 + 1e-9
    assert module._agreement(where) == pytest.approx(module._agreement(where[::-1]))
    assert module._agreement(np.repeat(where[:1], heads, axis=0)) == pytest.approx(1)
    assert module._agreement(np.eye(heads)) == (1 if heads == 1 else 0)
