"""Is the risk the fitted probability, kept as numbers, explained by what raises it, and refused where it does not belong?"""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest
from huggingface_hub import HfApi
from hypothesis import example, given
from hypothesis import strategies as st
from labkit import ANYTHING
from PIL import Image
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss, precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gazeguard.artifacts import DETECTOR_FILE
from gazeguard.detection import features
from gazeguard.detection.calibration import calibration_error, conformal, least_flagged, reliability, thresholds
from gazeguard.detection.detector import Detector
from gazeguard.errors import ArtifactError, InputError, MismatchError
from gazeguard.heads.artifact import GazeHeads, Score

ALL = tuple((layer, head) for layer in range(2) for head in range(4))


def gaze_heads(heads=((1, 0), (1, 2)), model="0123456789abcdef") -> GazeHeads:
    figures = ("mass", "selectivity", "contrast", "hit_rate", "shuffled_mass", "sink_mass")
    score = Score(**dict.fromkeys(figures, (0.1,) * 8), matrix=())
    return GazeHeads(
        model=model, model_class="M", heads=heads, all_heads=ALL, narration=score, query=score, strips=4, panels=6,
        split_half=1,
    )  # fmt: skip


HEADS = gaze_heads()
NAMES = features.names(HEADS.heads)


def data(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features of any scale, labels, kinds and images. Two features tell of objects, others of attributes; one never moves."""
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.normal(size=len(NAMES)), rng.uniform(0.1, 30, len(NAMES)), (n, len(NAMES)))
    x[:, 2] = 1.0
    z = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    kinds = rng.choice(["object", "attribute"], n)
    pulled = np.where(kinds == "object", z[:, 5] * 2 - z[:, 0], z[:, 7])
    return x, pulled + rng.logistic(size=n) > 1, kinds, np.arange(n) // 4


X, FALSE, KINDS, IMAGE = data()


@pytest.fixture(scope="module")
def fitted() -> Detector:
    return Detector.fit(X, FALSE, KINDS, HEADS).calibrated(*data(400, seed=1))


def regression(**changes) -> dict:
    """A small regression as the file of a detector holds it."""
    made = {
        "names": ["position", "attribution@0.1"], "mean": [0, 1], "scale": [1, 2], "weights": [1, -1], "bias": 0.5,
        "thresholds": {"f1": 0.5}, "claims": 9, "false": 3, "data": "",
    }  # fmt: skip
    return made | changes


def plain(changes: dict | None = None, **others) -> dict:
    """A small detector as its file holds it: ``others`` change the detector, ``changes`` its only regression."""
    return {"format": 2, "model": "m", "heads": [[0, 1]], "kinds": {"object": regression(**(changes or {}))}} | others


def row(**values: float) -> np.ndarray:
    """(1, F): features of one claim, of one head; zero where not given."""
    return np.array([[values.get(name, 0.0) for name in features.names([(0, 1)])]])


# ---------------------------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize("regularisation", [0.01, 1, 100])
def test_the_risk_is_sklearns_probability(regularisation):
    """Scaling and regression folded into numbers give the pipeline's own probability, kind by kind, on any data."""
    detector = Detector.fit(X, FALSE, KINDS, HEADS, regularisation=regularisation)
    seen = data(200, seed=2)
    for kind in ("object", "attribute"):
        of = kind == KINDS
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=5000)).fit(X[of], FALSE[of])
        for x in (X, seen[0]):
            risk = detector.risk(x, [kind] * len(x))
            np.testing.assert_allclose(risk, pipeline.predict_proba(x)[:, 1], atol=1e-12, rtol=0)
        made = detector.kinds[kind]
        assert (made.claims, made.false, made.names) == (of.sum(), FALSE[of].sum(), NAMES)
        assert detector.threshold(kind, "f1") == 0.5
    mixed = detector.risk(seen[0], seen[2])
    for kind in ("object", "attribute"):
        of = seen[2] == kind
        assert np.array_equal(mixed[of], detector.risk(seen[0][of], seen[2][of]))
    assert np.isnan(detector.risk(X[:2], ["location", "location"])).all(), "a kind that nothing was learnt about has no risk"


def test_some_columns_alone():
    """With the text features alone nothing else matters."""
    alone = Detector.fit(X, FALSE, KINDS, HEADS, names=features.TEXT_FEATURES)
    other = X.copy()
    other[:, len(features.TEXT_FEATURES) :] = 7
    assert alone.kinds["object"].names == features.TEXT_FEATURES
    assert alone.uses("position")
    assert not alone.uses("attribution", "attended_logprob")
    assert np.array_equal(alone.risk(X, KINDS), alone.risk(other, KINDS))


def test_what_is_not_known_of_some_claim_is_not_used():
    """A column with a NaN is left out of the fit, and nothing said of it; one that was learnt from is missed."""
    x = X.copy()
    x[3, NAMES.index("attended_logprob")] = np.nan
    detector = Detector.fit(x, FALSE, KINDS, HEADS)
    assert "attended_logprob" not in detector.kinds["object"].names
    assert detector.unknown(x, KINDS) == ""
    assert Detector.fit(X, FALSE, KINDS, HEADS).unknown(x, KINDS) == "attended_logprob"


def test_too_few_claims_of_a_kind_teach_nothing():
    """A rare kind gets no regression; rare objects are an error that says how many there were."""
    of = KINDS == "attribute"
    rare = FALSE & ~(of & (np.cumsum(FALSE & of) > 4))
    assert set(Detector.fit(X, rare, KINDS, HEADS).kinds) == {"object"}
    message = r"4 of all \d+ object claims are false; a detector needs at least 5 false and 5 true ones: 1 more false. Add more"
    with pytest.raises(InputError, match=message):
        Detector.fit(X, rare, np.where(of, "object", "attribute"), HEADS)


def test_extreme_features_give_extreme_risks_and_no_warning():
    detector = Detector.model_validate(plain())
    x = np.concatenate((row(position=1e6), row(position=-1e6)))
    assert detector.risk(x, ["object"] * 2).tolist() == [1, 0]


@pytest.mark.parametrize("as_file", [True, False])
def test_json_keeps_every_bit(tmp_path, fitted, as_file):
    fitted.save_pretrained(tmp_path / "new" / "folder")
    back = Detector.from_pretrained(tmp_path / "new" / "folder" / (DETECTOR_FILE if as_file else ""))
    assert back == fitted
    assert np.array_equal(back.risk(X, KINDS), fitted.risk(X, KINDS))


def test_a_folder_of_a_model_keeps_its_files(tmp_path, fitted):
    """A detector is at home in its model's folder: neither config nor README there is touched; elsewhere it brings a card."""
    for name in ("config.json", "README.md"):
        (tmp_path / name).write_text("mine")
    fitted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "README.md", DETECTOR_FILE, "reliability.png"}
    assert all((tmp_path / name).read_text() == "mine" for name in ("config.json", "README.md"))
    fitted.save_pretrained(tmp_path / "alone")
    card = (tmp_path / "alone" / "README.md").read_text()
    held = fitted.kinds["object"].validation
    assert (
        f"| object | {(KINDS == 'object').sum()} ({FALSE[KINDS == 'object'].sum()}) | {fitted.kinds['object'].data} |" in card
    )
    assert f"{held.claims} ({held.false}) of {held.images} | {held.data} | {held.area} |" in card
    assert f"| attribute | f1 | {fitted.threshold('attribute', 'f1'):.3f} | as before |" in card
    with Image.open(tmp_path / "alone" / "reliability.png") as picture:
        assert picture.width > picture.height > 300
    assert "none |" in Detector.fit(X, FALSE, KINDS, HEADS).card(), "what was not validated says so"


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload needs, on loopback; ``taken`` are the files of the last commit."""

    taken: ClassVar[dict[str, bytes]] = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/me/mine"}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path == "/api/validate-yaml":  # of the card's header
            answer = {"errors": [], "warnings": []}
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            self.taken |= {v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines) if "path" in v}
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/0", "commitOid": "0" * 40}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        """Nothing is printed."""


def test_to_the_hub_and_back(tmp_path, fitted):
    """What is uploaded, to a small hub on this machine, is what is read from the cache that a download fills."""
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_none")
        address = fitted.push_to_hub("me/mine", api=api)
        server.shutdown()
    assert address.endswith("/me/mine/commit/0") or "/me/mine/" in address
    assert set(Hub.taken) == {DETECTOR_FILE, "README.md", "reliability.png"}
    kept = tmp_path / "models--me--mine"
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc" / DETECTOR_FILE).write_bytes(Hub.taken[DETECTOR_FILE])
    assert Detector.from_pretrained("me/mine", cache_dir=tmp_path, local_files_only=True) == fitted
    with pytest.raises(ArtifactError, match=r"There is no folder 'me/other', and no detector.json from the hub's repository"):
        Detector.from_pretrained("me/other", cache_dir=tmp_path, local_files_only=True)


# ----------------------------------------------------------------------------------- probabilities and thresholds


def test_calibration_keeps_the_order_and_mends_the_probabilities():
    """A detector that is too sure of itself: the ranking stays, the log-loss falls to that of a Platt fit."""
    x, false, kinds, image = data(400, seed=3)
    detector = Detector.fit(X, FALSE, KINDS, HEADS, regularisation=1e6)
    tuned = detector.calibrated(x, false, kinds, image)
    for kind in ("object", "attribute"):
        of = kinds == kind
        logits = [made.kinds[kind].logit(x[of]) for made in (detector, tuned)]
        assert np.array_equal(*(np.argsort(logit) for logit in logits))
        before, after = detector.risk(x[of], kinds[of]), tuned.risk(x[of], kinds[of])
        assert log_loss(false[of], after) < log_loss(false[of], before)
        assert after.mean() == pytest.approx(false[of].mean(), abs=1e-3), "a Platt fit is right on average"


def test_the_calibration_error_by_hand():
    """Two groups, said 0.2 and 0.9, true 0.4 and 0.9: off by 0.2 in half of the claims."""
    risk = np.repeat([0.2, 0.9], 150)
    false = np.concatenate((np.tile([True, True, False, False, False], 30), np.tile([True] * 9 + [False], 15)))
    assert calibration_error(risk, false) == pytest.approx(0.1, abs=0.05)
    assert reliability(risk, false, 2) == [(pytest.approx(0.2), 0.4, 150), (pytest.approx(0.9), 0.9, 150)]
    assert [count for *_, count in reliability(risk[:3], false[:3], 10)] == [1, 1, 1]


def test_labels_the_wrong_way_round_are_said():
    x, false, kinds, image = data(400, seed=3)
    with pytest.raises(InputError, match=r"claims with a high risk are not the false ones \(AUROC 0\.\d+\)\. Check that"):
        Detector.fit(X, FALSE, KINDS, HEADS).calibrated(x, ~false, kinds, image)
    with pytest.raises(InputError, match=r"0 of \d+ validation claims of kind '[a-z]+' are false; thresholds need both true"):
        Detector.fit(X, FALSE, KINDS, HEADS).calibrated(x, np.zeros_like(false), kinds, image)


@pytest.mark.parametrize("seed", range(5))
def test_the_default_threshold_is_the_best_f1(seed):
    """No other threshold has a better F1 on the same data, by trying them all."""
    rng = np.random.default_rng(seed)
    risk = rng.random(60).round(1)
    false = risk + rng.normal(size=60) > 0.8
    tried = [f1_score(false, risk >= threshold) for threshold in risk]
    chosen = thresholds(risk, false, np.arange(60))["f1"]
    assert f1_score(false, risk >= chosen) == pytest.approx(max(tried), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_by_precision_is_the_lowest_that_keeps_it(seed):
    rng = np.random.default_rng(seed)
    risk = rng.random(80).round(2)
    false = risk + rng.normal(size=80) * 0.3 > 0.6
    good = [at for at in np.unique(risk) if precision_score(false, risk >= at) >= 0.9]
    assert thresholds(risk, false, np.arange(80)).get("precision_0.9") == min(good, default=None)


@given(st.integers(2, 60), st.sampled_from((0.02, 0.05, 0.2, 0.5)), st.integers(0, 2**32 - 1))
def test_the_bound_is_the_largest_threshold_that_the_formula_allows(images, alpha, seed):
    """Conformal risk control by its definition, over every threshold there is; None when not even flagging all is enough."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, images, 4 * images)
    risk = rng.random(len(image)).round(1)
    false = rng.random(len(image)) < risk
    n = len(np.unique(image))

    def bounded(threshold: float) -> bool:
        loss = [(false & (risk < threshold))[image == i].sum() / (image == i).sum() for i in np.unique(image)]
        return n / (n + 1) * np.mean(loss) + 1 / (n + 1) <= alpha + 1e-12

    allowed = [threshold for threshold in (*np.unique(risk), 1.0) if bounded(threshold)]
    assert conformal(risk, false, image, alpha) == (max(allowed) if allowed else None)


def test_too_few_images_for_a_bound_have_none():
    """1 / alpha - 1 images are needed even when nothing is ever false."""
    nothing = np.zeros(18, bool)
    assert conformal(np.full(18, 0.5), nothing, np.arange(18), 0.05) is None
    assert conformal(np.full(19, 0.5), np.zeros(19, bool), np.arange(19), 0.05) == 1
    assert thresholds(np.linspace(0, 1, 18), np.arange(18) > 8, np.arange(18)).keys() == {"f1", "precision_0.9"}


def test_what_no_filter_can_avoid():
    """With 12.6 % false claims at most 5 % are left only if at least 8 % are flagged (detection notes of LLaVA-1.5)."""
    assert least_flagged(0.126, 0.05) == pytest.approx(0.08)
    assert least_flagged(0.03, 0.05) == 0


def test_a_rule_without_a_threshold_is_named(fitted):
    assert fitted.threshold("object", 0.3) == 0.3
    alone = Detector.model_validate(plain())
    with pytest.raises(MismatchError) as caught:
        alone.threshold("object", "bound_0.02")
    assert str(caught.value) == (
        "This detector has no threshold 'bound_0.02' for claims of kind 'object'; it has f1. Name one of these in the "
        "policy, give a number, or fit the detector anew, on more captions."
    )


# ------------------------------------------------------------------------------------------------------------ using


@given(st.integers(0, 200), st.integers(1, 4))
def test_reasons_name_only_what_raises_the_risk(seed, most):
    """Taking a reason away (its features at their usual values) lowers the risk; the strongest comes first."""
    rng = np.random.default_rng(seed)
    numbers = {key: rng.normal(size=len(NAMES)).tolist() for key in ("mean", "weights")}
    scale = rng.uniform(0.5, 2, len(NAMES)).tolist()
    detector = Detector.model_validate(plain({"names": NAMES, "scale": scale, **numbers}, heads=HEADS.heads))
    x, kinds = rng.normal(size=(6, len(NAMES))), ["object"] * 6
    usual = detector.kinds["object"].mean

    def gain(line, texts):
        """How much risk the features have whose meaning is among the texts."""
        said = [features.meaning(n, bool(value > mean)) in texts for n, value, mean in zip(NAMES, line, usual, strict=True)]
        risks = detector.risk(np.stack((line, np.where(said, usual, line))), ["object"] * 2)
        return float(risks[0] - risks[1])

    for line, reasons in zip(x, detector.reasons(x, kinds, most), strict=True):
        assert len(reasons) == len(set(reasons)) <= most
        included = {each: features.INCLUDES.get(each) for each in reasons}
        gains = [gain(line, {each, other} if other and gain(line, {other}) > 0 else {each}) for each, other in included.items()]
        assert all(each > 0 for each in gains)
        assert gains == sorted(gains, reverse=True)


def test_usual_features_have_no_reasons():
    detector = Detector.model_validate(plain())
    assert detector.reasons(row(**{"attribution@0.1": 1.0}), ["object"]) == [()]


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
    ("file", "said"),
    [
        (plain({"mean": [0]}), "mean has 1 numbers for 2 features"),
        (plain({"weights": [1, float("nan")]}), "every number must be finite and no scale zero"),
        (plain({"bias": float("inf")}), "every number must be finite and no scale zero"),
        (plain({"scale": [1, 0]}), "every number must be finite and no scale zero"),
        (plain({"names": ["position", "mood"]}), "kinds.object: these heads have no feature 'mood'"),
        (plain({"names": ["position", "attribution@5.5"]}), "kinds.object: these heads have no feature 'attribution@5.5'"),
        (plain({"thresholds": {"f1": float("nan")}}), "kinds.object.thresholds.f1: Input should be"),
        (plain({"thresholds": {"f1": 1.5}}), "kinds.object.thresholds.f1: Input should be less than or equal to 1"),
        (plain({"thresholds": {}}), "thresholds lack the default, 'f1'"),
        (plain(kinds={}), "kinds lack 'object'"),
        (plain(kinds={"object": regression(), "mood": regression()}), "Input should be 'object', 'attribute' or 'location'"),
        (plain(format=1), "format: Input should be 2"),
        (plain(extra=1), "extra: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path, file, said):
    path = tmp_path / DETECTOR_FILE
    path.write_text(json.dumps(file))
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


@given(st.sampled_from(sorted(plain()) + sorted(regression())), ANYTHING)
@example("bias", 10**400)
def test_any_json_in_one_place_is_refused_or_makes_a_working_detector(path, key, value):
    path.write_text(json.dumps(plain({key: value}) if key in regression() else plain(**{key: value})))
    try:
        detector = Detector.from_pretrained(path)
    except ArtifactError:
        return
    x = np.ones((1, len(features.names(detector.heads))))
    assert len(detector.reasons(x, ["object"])) == 1
    assert detector.kinds["object"].scale != (1, 2) or 0 <= detector.risk(x, ["object"])[0] <= 1


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000], ids=lambda t: t[:3])
def test_what_is_no_json_is_refused(path, text):
    path.write_bytes(text)
    with pytest.raises(ArtifactError, match=r"cannot be read as a file of a detector \(.*Detector.save_pretrained writes"):
        Detector.from_pretrained(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"There is no detector\.json in the folder"):
        Detector.from_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot be read as a file of a detector .*No such file"):
        Detector.from_pretrained(tmp_path / "none.json")


def test_repr_is_one_line(fitted):
    """It says what the detector is: model, heads, and what it is worth."""
    auroc = fitted.kinds["object"].validation.auroc
    assert repr(fitted).startswith(f"Detector(model {HEADS.model}, 2 gaze heads: ")
    assert f"object (AUROC {auroc:.3f})" in repr(fitted)
    assert repr(Detector.model_validate(plain())) == "Detector(model m, 1 gaze head: object)"
    assert "\n" not in repr(fitted)


def test_a_detector_cannot_be_changed(fitted):
    with pytest.raises(ValidationError, match="frozen"):
        fitted.kinds = {}
