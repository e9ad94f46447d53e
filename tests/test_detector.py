"""Is the risk the fitted probability, kept as numbers, explained by what raises it, and refused where it does not belong?"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from labkit import ANYTHING
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gazeguard import features
from gazeguard.detector import FILE_NAME, Detector
from gazeguard.errors import ArtifactError, MismatchError
from gazeguard.heads import GazeHeads, Score

ALL = tuple((layer, head) for layer in range(2) for head in range(4))


def gaze_heads(heads=((1, 0), (1, 2)), model="0123456789abcdef") -> GazeHeads:
    figures = ("mass", "selectivity", "contrast", "routing", "null_mass", "sinks")
    score = Score(**dict.fromkeys(figures, (0.1,) * 8), matrix=())
    return GazeHeads(
        model=model, model_class="M", heads=heads, all_heads=ALL, narration=score, query=score, strips=4, panels=6,
        split_half=1,
    )  # fmt: skip


HEADS = gaze_heads()
NAMES = features.names(HEADS.heads)


def data(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of any scale, of which two tell; a column that never changes is among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.normal(size=len(NAMES)), rng.uniform(0.1, 30, len(NAMES)), (n, len(NAMES)))
    x[:, 2] = 1.0
    z = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    return x, z[:, 5] * 2 - z[:, 0] + rng.logistic(size=n) > 1


X, INVENTED = data()


@pytest.fixture(scope="module")
def fitted() -> Detector:
    return Detector.fit(X, INVENTED, HEADS).with_threshold(*data(120, seed=1))


def plain(**changes) -> dict:
    """A small detector as its file holds it."""
    made = {
        "format": 1, "model": "m", "heads": [[0, 1]], "names": ["position", "readout@0.1"], "mean": [0, 1],
        "scale": [1, 2], "weights": [1, -1], "bias": 0.5, "threshold": 0.5, "phrases": 9, "invented": 3,
    }  # fmt: skip
    return made | changes


@pytest.mark.parametrize("regularisation", [0.01, 1, 100])
def test_the_risk_is_sklearns_probability(regularisation):
    """Scaling and regression folded into numbers give the pipeline's own probability, on seen and unseen data."""
    detector = Detector.fit(X, INVENTED, HEADS, regularisation=regularisation)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=5000)).fit(X, INVENTED)
    for x in (X, data(200, seed=2)[0]):
        np.testing.assert_allclose(detector.risk(x), pipeline.predict_proba(x)[:, 1], atol=1e-12, rtol=0)
    assert (detector.phrases, detector.invented) == (len(X), INVENTED.sum())
    assert (detector.names, detector.threshold) == (NAMES, 0.5)


def test_some_columns_alone():
    """With the text features alone it is the detector of these columns, under their names."""
    alone = Detector.fit(X[:, :5], INVENTED, HEADS, names=features.TEXT_FEATURES)
    assert alone.names == features.TEXT_FEATURES
    assert alone.risk(X[:, :5]).shape == (len(X),)


def test_extreme_features_give_extreme_risks_and_no_warning():
    detector = Detector.model_validate(plain())
    assert detector.risk(np.array([[1e6, 0], [-1e6, 0]])).tolist() == [1, 0]


@pytest.mark.parametrize("as_file", [True, False])
def test_json_keeps_every_bit(tmp_path, fitted, as_file):
    fitted.save_pretrained(tmp_path / "new" / "folder")
    back = Detector.from_pretrained(tmp_path / "new" / "folder" / (FILE_NAME if as_file else ""))
    assert back == fitted
    assert np.array_equal(back.risk(X), fitted.risk(X))


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_f1(fitted, seed):
    """No other threshold has a better F1 on the same data, by trying them all; the risks stay the same."""
    x, invented = data(60, seed=10 + seed)
    chosen = fitted.with_threshold(x, invented)
    risk = chosen.risk(x)
    tried = [f1_score(invented, risk >= threshold) for threshold in risk]
    assert f1_score(invented, risk >= chosen.threshold) == pytest.approx(max(tried), abs=1e-12)
    assert np.array_equal(risk, fitted.risk(x))


@given(st.integers(0, 200), st.integers(1, 4))
def test_reasons_name_only_what_raises_the_risk(seed, most):
    """Taking a reason away (its features at their usual values) lowers the risk; the strongest comes first."""
    rng = np.random.default_rng(seed)
    numbers = {key: rng.normal(size=len(NAMES)).tolist() for key in ("mean", "weights")}
    scale = rng.uniform(0.5, 2, len(NAMES)).tolist()
    detector = Detector.model_validate(plain(heads=HEADS.heads, names=NAMES, scale=scale, **numbers))
    x = rng.normal(size=(6, len(NAMES)))
    for row, reasons in zip(x, detector.reasons(x, most), strict=True):
        assert len(reasons) == len(set(reasons)) <= most
        gains = []
        for reason in reasons:
            said = [
                features.meaning(name, bool(value > usual)) == reason
                for name, value, usual in zip(NAMES, row, detector.mean, strict=True)
            ]
            without = np.where(said, detector.mean, row)
            gains.append(float((detector.risk(row[None]) - detector.risk(without[None]))[0]))
        assert all(gain > 0 for gain in gains)
        assert gains == sorted(gains, reverse=True)


def test_usual_features_have_no_reasons():
    detector = Detector.model_validate(plain())
    assert detector.reasons(np.array([[0.0, 1.0]])) == [()]


@pytest.mark.parametrize("other", [gaze_heads(model="f" * 16), gaze_heads(heads=((1, 0),))], ids=["model", "heads"])
def test_other_heads_are_refused(fitted, other):
    """Also the same heads of another model; both sides are named, and what to do."""
    fitted.check_heads(HEADS)
    with pytest.raises(MismatchError) as caught:
        fitted.check_heads(other)
    assert str(caught.value) == (
        f"This detector was fitted for model {HEADS.model} with heads [(1, 0), (1, 2)]; the guard has model "
        f"{other.model} with heads {list(other.heads)}. Fit a detector on traces of these heads."
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": [0]}, "mean has 1 numbers for 2 features"),
        ({"weights": [1, float("nan")]}, "every number must be finite and no scale zero"),
        ({"bias": float("inf")}, "every number must be finite and no scale zero"),
        ({"scale": [1, 0]}, "every number must be finite and no scale zero"),
        ({"names": ["position", "mood"]}, "these heads have no feature 'mood'"),
        ({"names": ["position", "readout@5.5"]}, "these heads have no feature 'readout@5.5'"),
        ({"threshold": float("nan")}, "threshold: Input should be"),
        ({"threshold": 1.5}, "threshold: Input should be less than or equal to 1"),
        ({"format": 2}, "format: Input should be 1"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path, change, said):
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(plain(**change)))
    with pytest.raises(ArtifactError) as caught:
        Detector.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path} is not a file of a detector: ")
    assert said in str(caught.value)
    assert str(caught.value).endswith(" Detector.save_pretrained writes one.")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("detectors") / "any.json"


@given(ANYTHING)
def test_any_json_is_refused(path, anything):
    path.write_text(json.dumps(anything))
    with pytest.raises(ArtifactError, match="is not a file of a detector"):
        Detector.from_pretrained(path)


@given(st.sampled_from(sorted(plain())), ANYTHING)
@example("bias", 10**400)
def test_any_json_in_one_place_is_refused_or_makes_a_working_detector(path, key, value):
    path.write_text(json.dumps(plain(**{key: value})))
    try:
        detector = Detector.from_pretrained(path)
    except ArtifactError:
        return
    x = np.ones((1, len(detector.names)))
    assert len(detector.reasons(x)) == 1
    assert detector.scale != (1, 2) or 0 <= detector.risk(x)[0] <= 1


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000], ids=lambda t: t[:3])
def test_what_is_no_json_is_refused(path, text):
    path.write_bytes(text)
    with pytest.raises(ArtifactError, match=r"cannot be read as a file of a detector \(.*Detector.save_pretrained writes"):
        Detector.from_pretrained(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot be read as a file of a detector .*No such file"):
        Detector.from_pretrained(tmp_path)


def test_a_detector_cannot_be_changed(fitted):
    with pytest.raises(ValidationError, match="frozen"):
        fitted.threshold = 0.1
