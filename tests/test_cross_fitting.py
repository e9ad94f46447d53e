"""Does every labelled claim count, is none judged by a fit to its own image, and does too little data say so?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score
from test_detector import HEADS, NAMES, data, plain

from gazeguard.detection import features
from gazeguard.detection.calibration import platt
from gazeguard.detection.cross_fitting import beside_text, choose_regularisation, cross_fit, jointly
from gazeguard.detection.detector import Detector
from gazeguard.detection.domain import Domain, Region
from gazeguard.detection.regression import Regression, ValidationMetrics
from gazeguard.detection.table import ClaimTable
from gazeguard.errors import InputError

ATTRIBUTION = NAMES.index("attribution")


def table(n: int = 300, seed: int = 0, **changes) -> ClaimTable:
    x, false, kinds, image = data(n, seed)
    return ClaimTable(**{"x": x, "false": false, "kinds": kinds, "image": image, **changes})


def attributed(n: int, rare: int, seed: int = 0) -> ClaimTable:
    """Object claims of which ``rare`` are false and have a low attribution; all other features are noise."""
    rng = np.random.default_rng(seed)
    false = np.arange(n) % (n // rare) == 0
    x = rng.normal(size=(n, len(NAMES)))
    x[:, ATTRIBUTION] -= 2 * false
    return ClaimTable(x, false, np.full(n, "object"), np.arange(n) // 2)


def test_shares_that_rounding_put_over_one_are_one():
    """scikit-learn's average precision of a perfect ranking is 1 + 2e-16 on some data; a share of 1.5 is an error."""
    metrics = ValidationMetrics.measure(*(table(60).x, np.linspace(0, 1, 60), np.arange(60) > 40, np.arange(60))).model_dump()
    over = float(np.nextafter(1, 2))
    for name in ("auroc", "average_precision", "brier", "ece"):
        assert getattr(ValidationMetrics(**metrics | {name: over}), name) == 1
        assert getattr(ValidationMetrics(**metrics | {name: -1e-17}), name) == 0
        with pytest.raises(ValidationError):
            ValidationMetrics(**metrics | {name: 1.5})
    assert ValidationMetrics(**metrics | {"bins": ((over, -1e-17, 3),)}).bins == ((1.0, 0.0, 3),)


@pytest.mark.parametrize("extreme", [50, 1e3, 1e6])
def test_one_extreme_logit_does_not_turn_the_slope(extreme):
    """A false claim with an absurdly low risk among well-ranked ones: the slope stays positive and near that without it."""
    rng = np.random.default_rng(0)
    false = rng.random(60) < 0.3
    logit = rng.normal(size=60) + 2 * false
    slope, _ = platt(logit, false, np.ones(60))
    spoilt, _ = platt(np.append(logit, -extreme), np.append(false, True), np.ones(61))
    assert 0.3 < spoilt / slope < 1.1
    detector = Detector.model_validate(plain({"weights": [1, 0], "bias": 0}))
    x = np.zeros((61, len(features.names([(0, 1)]))))
    x[:, 0] = np.append(logit, -extreme)
    labels, kinds = np.append(false, True), np.full(61, "object")
    assert detector.calibrated(x, labels, kinds, np.arange(61)).kinds["object"].weights[0] > 0


def test_perfectly_ranked_claims_have_a_finite_slope():
    slope, shift = platt(np.arange(-10.0, 10), np.arange(-10, 10) >= 0, np.ones(20))
    assert 0 < slope < 20
    assert np.isfinite(shift)


def test_no_claim_is_judged_by_a_fit_to_its_own_image():
    """Labels without any meaning, and more features than claims: in the data of the fit all would be ranked perfectly."""
    rng = np.random.default_rng(4)
    noise = ClaimTable(rng.normal(size=(40, len(NAMES))), rng.random(40) < 0.4, np.full(40, "object"), np.arange(40) // 2)
    fitted = Detector.fit(noise.x, noise.false, noise.kinds, HEADS, regularisation=100)
    assert roc_auc_score(noise.false, fitted.risk(noise.x, noise.kinds)) > 0.95
    detector, risk = cross_fit(noise, HEADS)
    assert roc_auc_score(noise.false, risk) < 0.8
    assert not detector.gate.usable
    assert "object claims are ranked no better than by chance: AUROC 0." in detector.gate.reason
    assert detector.gate.figures["auroc_low"] <= 0.5


def test_every_claim_is_validated_and_its_kinds_are_as_good_as_held_out_ones():
    detector, risk = cross_fit(table(600), HEADS)
    seen, fresh = table(600), table(400, seed=0)
    for kind in ("object", "attribute"):
        metrics, rows = detector.kinds[kind].validation, seen.kinds == kind
        assert (metrics.claims, metrics.cross_fitted) == (rows.sum(), True)
        assert metrics.auroc == pytest.approx(roc_auc_score(seen.false[rows], risk[rows]))
        assert metrics.auroc_interval[0] < metrics.auroc < metrics.auroc_interval[1]
        assert risk[rows].mean() == pytest.approx(seen.false[rows].mean(), abs=5e-3)
        assert detector.kinds[kind].method == "regression"
    assert fresh is not seen
    assert Detector.model_validate_json(detector.model_dump_json()) == detector


def test_five_false_claims_of_the_whole_file_are_enough_and_fewer_are_counted():
    detector, _ = cross_fit(attributed(100, 5), HEADS)
    low, high = detector.kinds["object"].validation.auroc_interval
    assert 0.5 < low < high <= 1
    message = r"^4 of all 100 object claims are false; a detector needs at least 5 false and 5 true ones: 1 more false\. Add"
    with pytest.raises(InputError, match=message):
        cross_fit(attributed(100, 4), HEADS)


def test_kinds_left_out_are_said_with_how_many_are_missing():
    rare = table(400)
    false = rare.false & ~((rare.kinds == "attribute") & (np.cumsum(rare.false & (rare.kinds == "attribute")) > 3))
    detector, risk = cross_fit(table(400, false=false), HEADS)
    assert set(detector.kinds) == {"object"}
    assert detector.left_out["attribute"].startswith("3 of all ")
    assert detector.left_out["attribute"].endswith(": 2 more false.")
    assert f"- attribute: not judged. {detector.left_out['attribute']}" in detector.card()
    assert np.isnan(risk[rare.kinds == "attribute"]).all()
    assert "location" not in detector.left_out, "no caption has one"


def test_with_too_little_to_learn_from_the_attribution_is_the_detector():
    """It is declared in the file and on the card; a detector of text alone has no such substitute."""
    few = attributed(60, 6)
    detector, _ = cross_fit(few, HEADS)
    (regression,) = detector.kinds.values()
    assert (regression.method, regression.names) == ("attribution", ("attribution",))
    lower = np.stack((few.x[0], few.x[0]))
    lower[1, ATTRIBUTION] -= 1
    before, after = detector.risk(lower, ["object"] * 2)
    assert after > before
    assert "object: uses the direct logit attribution" in detector.card()
    assert detector.reasons(lower[1:], ["object"]) == [("low logit attribution from the gaze heads",)]
    x = few.x.copy()
    x[:, 0] -= few.false  # some evidence in the first text feature, less than in the attribution
    text, _ = cross_fit(replace(few, x=x), HEADS, features.TEXT_FEATURES)
    assert text.kinds["object"].method == "regression"


def test_regularisation_is_strong_where_there_is_nothing_to_learn_and_weak_where_there_is():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 20))
    image, kinds = np.arange(400) // 2, np.full(400, "object")
    names = [f"{i}" for i in range(20)]
    noise = ClaimTable(x, rng.random(400) < 0.3, kinds, image)
    signal = ClaimTable(x, x @ np.where(np.arange(20) < 2, 3.0, 0.0) > 0, kinds, image)
    assert choose_regularisation(x, noise, names) < choose_regularisation(x, signal, names)


def test_what_is_fitted_beside_a_regression_leaves_its_weights_alone():
    """The further features explain what is left; under a penalty that allows nothing they do nothing."""
    rng = np.random.default_rng(0)
    x, further, ones = rng.normal(size=(600, 2)), rng.normal(size=(600, 2)), np.ones(600)
    false = x[:, 0] + 2 * further[:, 1] + rng.logistic(size=600) > 1
    first = Regression.fit(x, false, ["a", "b"], 1e3)
    both = first.fit_beside(x, further, false, ["c", "d"], 1e3, ones)
    assert both.names == ("a", "b", "c", "d")
    assert both.weights[:2] == first.weights
    assert both.weights[3] > 1
    rest = first.fit_beside(x, further, false, ["c", "d"], 1e-9, ones)
    np.testing.assert_allclose(rest.weights[2:], 0, atol=1e-5)
    columns = np.concatenate((x, further), axis=1)
    assert roc_auc_score(false, both.logit(columns)) > roc_auc_score(false, first.logit(x)) + 0.1


def test_constructed_claims_teach_nothing_about_the_text():
    """They have a habit of the text that the model's own claims do not have; what the own ones say of the text is kept."""
    rng = np.random.default_rng(0)
    nll = NAMES.index("token_nll")
    x = rng.normal(size=(900, len(NAMES)))
    own = np.arange(900) < 300
    false = np.where(own, rng.random(900) < 0.4, True)
    x[:, nll] += np.where(own, 1.5 * false, -3)
    x[:, ATTRIBUTION] -= false
    claims = ClaimTable(x, false, np.full(900, "object"), np.arange(900) // 3, calibrating=own)
    weights = {}
    for fit in (jointly, beside_text):
        detector, risk = cross_fit(claims, HEADS, ("token_nll", "attribution"), fit=fit)
        weights[fit] = dict(zip(detector.kinds["object"].names, detector.kinds["object"].weights, strict=True))
    assert weights[jointly].get("token_nll", 0) <= 0 < weights[beside_text]["token_nll"]
    assert weights[beside_text]["attribution"] < 0
    assert roc_auc_score(false[own], risk[own]) > 0.8


def test_weights_of_claims_count():
    """Claims with weight zero might as well not be there."""
    some, other = table(300), table(300, seed=5)
    both = ClaimTable(
        np.concatenate((some.x, other.x)), np.concatenate((some.false, ~other.false)),
        np.concatenate((some.kinds, other.kinds)), np.concatenate((some.image, other.image + 1000)),
    )  # fmt: skip
    weights = np.repeat([1.0, 0.0], 300)
    weighted = Detector.fit(both.x, both.false, both.kinds, HEADS, weights=weights)
    alone = Detector.fit(some.x, some.false, some.kinds, HEADS)
    np.testing.assert_allclose(weighted.risk(other.x, other.kinds), alone.risk(other.x, other.kinds), atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- domain


def test_a_region_has_its_own_kind_inside_and_others_outside():
    """Correlated vectors around two centres; the share outside is small, and a shift along no direction of theirs is seen."""
    rng = np.random.default_rng(0)
    mixing, centres = rng.normal(size=(5, 40)), rng.normal(size=(2, 40)) * 5

    def draw(n):
        group = rng.integers(0, 2, n)
        return rng.normal(size=(n, 5)) @ mixing + 0.1 * rng.normal(size=(n, 40)) + centres[group], group

    x, group = draw(300)
    region = Region.fit(x, group, np.arange(300))
    fresh, _ = draw(1000)
    assert (region.distances(fresh) > region.limit).mean() <= 0.02
    assert (region.distances(fresh + 2 * rng.normal(size=40)) > region.limit).mean() == 1
    assert Region.model_validate_json(region.model_dump_json()) == region


def test_a_domain_compares_images_and_attention_and_says_the_figure():
    rng = np.random.default_rng(0)
    claims = table(400, states=rng.normal(size=(100, 16)))
    domain = Domain.fit(claims, HEADS.heads, "drawings")
    assert {name.partition("@")[0] for name in domain.names} == {"image_mass", "concentration"}
    first = claims.x[claims.image == 0]
    assert domain.outside(first, HEADS.heads, claims.states[0]) == ""
    far = domain.outside(first, HEADS.heads, claims.states[0] + 50)
    assert far.startswith("the image is far from all that the detector was fitted on (drawings): Mahalanobis distance ")
    assert domain.outside(first, HEADS.heads, None) == "", "a model without image tokens"
    odd = first.copy()
    odd[:, NAMES.index(domain.names[0])] += 1e4
    assert domain.outside(odd, HEADS.heads, None).startswith("the attention is far from all")
    assert Domain.fit(table(20), HEADS.heads) is None, "too few images"
