"""Is it made up? One logistic regression per kind of claim on gaze and text features, saved as numbers in JSON.

A gradient boosting on the same features was .003 of AUROC better in the lab: not worth a file that is no table of numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from huggingface_hub import HfApi, hf_hub_download
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from gazeguard.artifacts import read_json
from gazeguard.claims.parse import Kind
from gazeguard.detection import features
from gazeguard.detection.calibration import calibration_error, log_odds, logistic, reliability, thresholds
from gazeguard.detection.plots import draw_reliability
from gazeguard.errors import ArtifactError, InputError, MismatchError
from gazeguard.heads.artifact import GazeHeads

FILE_NAME, CARD_NAME, PICTURE_NAME = "detector.json", "README.md", "reliability.png"
FEWEST = 20  # false claims of a kind, and true ones, from which a regression on them is worth having
Share = Annotated[float, Field(ge=0, le=1)]


class ValidationMetrics(BaseModel):
    """What was seen on the validation data that set a regression's probabilities and thresholds. Immutable.

    ece:  expected calibration error over 15 bins of equal mass; data: fingerprint of the features and labels
    bins: (mean risk, share that is false, claims) of ten bins of equal mass
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    claims: int
    false: int
    images: int
    auroc: Share
    average_precision: Share
    brier: Share
    ece: Share
    bins: tuple[tuple[Share, Share, int], ...]
    data: str


class Regression(BaseModel):
    """The probability that a claim of one kind is false: ``sigmoid((x - mean) / scale @ weights + bias)``. Immutable.

    thresholds: risks from which a claim is flagged, by the rule that set them on validation data; see `thresholds`
    answer:     what the model's own answer is worth when it is asked whether the thing is there: the weights of the risk's
                log-odds and of the answer's (yes against no), and a bias; None when that was not learnt. See `heard`
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    thresholds: dict[str, Share]
    claims: int = Field(description="number of claims it was fitted on")
    false: int = Field(description="how many of them were false")
    data: str = Field(description="fingerprint of the features and labels it was fitted on")
    validation: ValidationMetrics | None = None
    answer: tuple[float, float, float] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Regression:
        for name in ("mean", "scale", "weights"):
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers for {len(self.names)} features")
        if not np.isfinite([*self.mean, *self.scale, *self.weights, self.bias, *(self.answer or ())]).all() or 0 in self.scale:
            raise ValueError("every number must be finite and no scale zero")
        if "f1" not in self.thresholds:
            raise ValueError("thresholds lack the default, 'f1'")
        return self

    @classmethod
    def fit(cls, x: NDArray[np.float64], false: NDArray[np.bool_], names: Sequence[str], regularisation: float) -> Regression:
        """Fitted on features (claims, F) and labels (claims,); flags from 0.5 until it has thresholds of its own."""
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=regularisation, max_iter=5000).fit(scaler.transform(x), false)
        return cls(
            names=tuple(names),
            mean=tuple(scaler.mean_.tolist()),
            scale=tuple(scaler.scale_.tolist()),
            weights=tuple(model.coef_[0].tolist()),
            bias=float(model.intercept_[0]),
            thresholds={"f1": 0.5},
            claims=len(x),
            false=int(false.sum()),
            data=fingerprint(x, false),
        )

    @np.errstate(invalid="ignore", over="ignore")  # of a file with numbers near the largest; the guard takes no such risk
    def contributions(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each feature adds to the logit, (claims, F)."""
        return (x - np.array(self.mean)) / np.array(self.scale) * np.array(self.weights)

    @np.errstate(invalid="ignore", over="ignore")
    def logit(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the log-odds that each claim is false."""
        return self.contributions(x).sum(-1) + self.bias

    def risk(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the probability that each claim is false."""
        return logistic(self.logit(x))

    def update_with_answers(self, risk: NDArray[np.float64], answer: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the risk once the model was asked, from the risk before and the log-odds of yes against no (claims,)."""
        weight, weight_of_answer, bias = self.answer
        return logistic(weight * log_odds(risk) + weight_of_answer * answer + bias)

    def fit_answers(self, risk: NDArray[np.float64], answer: NDArray[np.float64], false: NDArray[np.bool_]) -> Regression:
        """The same with ``answer`` fitted to claims that were asked about (claims,); as it is when they are too few."""
        if not FEWEST <= false.sum() <= len(false) - FEWEST:
            return self
        made = LogisticRegression(max_iter=5000).fit(np.stack((log_odds(risk), answer), axis=1), false)
        return self.model_copy(update={"answer": (*made.coef_[0].tolist(), float(made.intercept_[0]))})

    def calibrated(self, x: NDArray[np.float64], false: NDArray[np.bool_]) -> Regression:
        """The same ranking with probabilities fitted to validation data (Platt 1999): logit * slope + shift, folded in."""
        platt = LogisticRegression(C=np.inf, max_iter=5000).fit(self.logit(x)[:, None], false)
        slope, shift = float(platt.coef_[0, 0]), float(platt.intercept_[0])
        if slope <= 0:
            raise InputError("On the validation data high risks are not the false claims. Are the labels the right way round?")
        weights = tuple(weight * slope for weight in self.weights)
        return self.model_copy(update={"weights": weights, "bias": self.bias * slope + shift})


class Detector(BaseModel):
    """The probability that a claim of a caption is false, from its features. Immutable.

    It belongs to one model and one set of gaze heads, and refuses others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    model: str = Field(description="fingerprint of the model whose traces it was fitted on")
    heads: tuple[tuple[int, int], ...]
    kinds: dict[Kind, Regression]

    @model_validator(mode="after")
    def _fits_together(self) -> Detector:
        if "object" not in self.kinds:
            raise ValueError("kinds lack 'object'")
        known = set(features.names(self.heads))
        for kind, regression in self.kinds.items():
            if unknown := sorted(set(regression.names) - known):
                raise ValueError(f"kinds.{kind}: these heads have no feature {unknown[0]!r}")
        return self

    # --------------------------------------------------------------------------------------------------- fitting

    @classmethod
    def fit(
        cls,
        x: NDArray[np.float64],
        false: NDArray[np.bool_],
        kinds: NDArray[np.str_],
        heads: GazeHeads,
        names: Sequence[str] | None = None,
        regularisation: float = 1.0,
    ) -> Detector:
        """Fit one regression per kind on `features` (claims, F), labels (claims,) and kinds (claims,).

        names: the features to use; by default all that are finite in every claim (of a model that takes its pictures through
        cross-attention, what lies under the gaze is not known). A kind with fewer than `FEWEST` true or false claims gets
        none; raises `InputError` when objects are such a kind.
        """
        if names is None:
            names = [name for name, column in zip(features.names(heads.heads), x.T, strict=True) if np.isfinite(column).all()]
        chosen = features.pick(x, heads.heads, names)
        enough = [k for k in np.unique(kinds) if FEWEST <= false[kinds == k].sum() <= (kinds == k).sum() - FEWEST]
        if "object" not in enough:
            of = kinds == "object"
            raise InputError(
                f"{int(false[of].sum())} of {int(of.sum())} objects are invented; a detector needs at least {FEWEST} invented "
                f"and {FEWEST} real ones. Take more captions."
            )
        fitted = {str(k): Regression.fit(chosen[kinds == k], false[kinds == k], names, regularisation) for k in enough}
        return cls(model=heads.model, heads=heads.heads, kinds=fitted)

    def calibrated(
        self, x: NDArray[np.float64], false: NDArray[np.bool_], kinds: NDArray[np.str_], image: NDArray[np.int64]
    ) -> Detector:
        """The same detector with probabilities and thresholds from validation data.

        image: (claims,) whose caption each claim is from; see `thresholds`. Raises `InputError` for data of one label only.
        """
        made = {}
        for kind, regression in self.kinds.items():
            of = kinds == kind
            if false[of].all() or not false[of].any():
                raise InputError(
                    f"{int(false[of].sum())} of {int(of.sum())} validation claims of kind {kind!r} are false; thresholds need "
                    "both kinds. Take more captions."
                )
            mine = features.pick(x[of], self.heads, regression.names)
            better = regression.calibrated(mine, false[of])
            risk = better.risk(mine)
            found = {
                "thresholds": thresholds(risk, false[of], image[of]),
                "validation": _held(mine, risk, false[of], image[of]),
            }
            made[kind] = better.model_copy(update=found)
        return self.model_copy(update={"kinds": made})

    def fit_answers(
        self,
        risk: NDArray[np.float64],
        answer: NDArray[np.float64],
        false: NDArray[np.bool_],
        kinds: NDArray[np.str_],
    ) -> Detector:
        """The same detector with what the model's answers are worth, from validation claims that it was asked about (claims,).

        answer: log-odds of yes against no, to the question whether the claim's thing is there; NaN where it was not asked. A
        kind with fewer than `FEWEST` true or false claims that were does not learn it.
        """
        of = {kind: (kinds == kind) & ~np.isnan(answer) for kind in self.kinds}
        made = {kind: own.fit_answers(risk[of[kind]], answer[of[kind]], false[of[kind]]) for kind, own in self.kinds.items()}
        return self.model_copy(update={"kinds": made})

    # ----------------------------------------------------------------------------------------------------- using

    def uses(self, *names: str) -> bool:
        """Whether any of these features counts for any kind of claim."""
        return any(name in regression.names for regression in self.kinds.values() for name in names)

    @property
    def uses_answers(self) -> bool:
        """Whether it has learnt what the model's own answers are worth, for any kind of claim."""
        return any(regression.answer is not None for regression in self.kinds.values())

    def unknown(self, x: NDArray[np.float64], kinds: Sequence[str]) -> str:
        """The first feature that counts for a claim and is not finite, as where a model's numbers overflowed; or ""."""
        if np.isfinite(x).all():
            return ""
        for row, kind in zip(x, kinds, strict=True):
            names = self.kinds[kind].names
            if not (finite := np.isfinite(features.pick(row[None], self.heads, names)[0])).all():
                return names[int(np.argmin(finite))]
        return ""

    def risk(self, x: NDArray[np.float64], kinds: Sequence[str]) -> NDArray[np.float64]:
        """(claims,): the probability that each claim is false, from `features` (claims, F); NaN for kinds it does not know."""
        kinds, risk = np.asarray(kinds, str), np.full(len(x), np.nan)
        for kind, regression in self.kinds.items():
            of = kinds == kind
            risk[of] = regression.risk(features.pick(x[of], self.heads, regression.names))
        return risk

    def update_with_answers(
        self, risk: NDArray[np.float64], answer: NDArray[np.float64], kinds: Sequence[str]
    ) -> NDArray[np.float64]:
        """(claims,): the risk once the model was asked, for claims whose ``answer`` (log-odds of yes) is not NaN."""
        kinds, risk = np.asarray(kinds, str), risk.copy()
        for kind, regression in self.kinds.items():
            if regression.answer is not None:
                of = (kinds == kind) & ~np.isnan(answer)
                risk[of] = regression.update_with_answers(risk[of], answer[of])
        return risk

    def reasons(self, x: NDArray[np.float64], kinds: Sequence[str], most: int = 2) -> list[tuple[str, ...]]:
        """For each claim the features that raise its risk most, in words, strongest first; heads' votes are summed."""
        found = []
        for row, kind in zip(x, kinds, strict=True):
            regression = self.kinds[kind]
            values = features.pick(row[None], self.heads, regression.names)
            votes: dict[str, float] = {}
            for name, value, usual, vote in zip(
                regression.names, values[0], regression.mean, regression.contributions(values)[0], strict=True
            ):
                text = features.meaning(name, high=bool(value > usual))
                votes[text] = votes.get(text, 0.0) + float(vote)
            strongest = sorted(votes, key=votes.__getitem__, reverse=True)[:most]
            found.append(tuple(text for text in strongest if votes[text] > 0))
        return found

    def threshold(self, kind: str, rule: str | float) -> float:
        """The risk from which claims of a kind are flagged: by a named rule, or the number itself.

        Raises `MismatchError` for a rule for which no threshold could be set.
        """
        if not isinstance(rule, str):
            return rule
        known = self.kinds[kind].thresholds
        if rule not in known:
            raise MismatchError(
                f"This detector has no threshold {rule!r} for claims of kind {kind!r}; it has {', '.join(known)}. Name one of "
                "these in the policy, give a number, or tune the detector on more captions."
            )
        return known[rule]

    def check_heads(self, heads: GazeHeads) -> None:
        """Raise `MismatchError` unless the detector was fitted on traces of these heads of this model."""
        if (self.model, self.heads) != (heads.model, heads.heads):
            raise MismatchError(
                f"This detector was fitted for model {self.model} with heads {list(self.heads)}; the guard has model "
                f"{heads.model} with heads {list(heads.heads)}. Fit a detector on traces of these heads."
            )

    # --------------------------------------------------------------------------------------------------- keeping

    # Not huggingface_hub's ModelHubMixin: that deletes the config.json of the folder it saves to, and a detector is at home
    # in the folder of its model.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``detector.json`` into a folder, its reliability diagram, and a card unless the folder has a README."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")
        draw_reliability({kind: made.validation.bins for kind, made in self.kinds.items() if made.validation}).savefig(
            folder / PICTURE_NAME, dpi=90, metadata={"Software": None}
        )
        if not (folder / CARD_NAME).exists():
            (folder / CARD_NAME).write_text(self.card(), encoding="utf-8")

    def push_to_hub(self, repo_id: str, api: HfApi | None = None, **upload: Any) -> str:
        """Put what `save_pretrained` writes into a repository of the hub, made if need be; returns the address of the commit.

        api: with your token or endpoint; ``upload`` goes to `HfApi.upload_folder` (``commit_message``, ``create_pr``, ...)
        """
        api = api or HfApi()
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload))

    @classmethod
    def from_pretrained(cls, path: str | Path, **download: Any) -> Detector:
        """Read a detector from a folder, a file, or a repository of the hub (``owner/name``). Raises `ArtifactError`.

        download: of a repository, goes to `hf_hub_download` (``revision``, ``token``, ``cache_dir``, ...)
        """
        if not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            try:
                path = hf_hub_download(str(path), FILE_NAME, **download)
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ArtifactError(f"No detector can be had from the repository {str(path)!r} ({reason}).") from error
        path = Path(path)
        return read_json(cls, path / FILE_NAME if path.is_dir() else path, "a detector", "Detector.save_pretrained")

    def card(self) -> str:
        """What to know of this detector before one relies on it, in Markdown."""
        kinds = [
            f"| {kind} | {made.claims:,} ({made.false:,}) | {made.data} | "
            + (
                f"{held.claims:,} ({held.false:,}) of {held.images:,} | {held.data} | {held.auroc:.3f} | "
                f"{held.average_precision:.3f} | {held.brier:.3f} | {held.ece:.3f} |"
                if (held := made.validation)
                else "none | | | | | |"
            )
            for kind, made in self.kinds.items()
        ]
        rules = [
            f"| {kind} | {rule} | {risk:.3f} |" for kind, made in self.kinds.items() for rule, risk in made.thresholds.items()
        ]
        return CARD.format(model=self.model, heads=list(self.heads), kinds="\n".join(kinds), rules="\n".join(rules))


CARD = """---
library_name: gazeguard
tags: [gazeguard, hallucination-detection, vision-language]
---
# A GazeGuard detector

The probability that a claim of a caption is false, from where the gaze heads of one model looked while it was written. It
belongs to the model with fingerprint `{model}` and its heads (layer, head) {heads}, and refuses others.

```python
guard = GazeGuard(model, processor, heads=..., detector=Detector.from_pretrained(...))
```

| kind of claim | fitted on (false) | data | validation (false), images | data | AUROC | average precision | Brier | ECE |
|---|---|---|---|---|---|---|---|---|
{kinds}

No picture is in both parts. The figures are of the validation data, which also set the probabilities and the thresholds
below: measure on pictures of your own before you rely on them. False is the positive class.

| kind of claim | rule | flagged from |
|---|---|---|
{rules}

`bound_0.05`: at most 5 % of the claims made stay as false ones, in expectation over captions like these: the same model,
prompt, decoder and kind of picture. Under any other the bound is void.

![reliability](reliability.png)
"""


def fingerprint(x: NDArray[np.float64], false: NDArray[np.bool_]) -> str:
    """16 hex digits of the SHA-256 of features and labels."""
    return hashlib.sha256(np.ascontiguousarray(x).tobytes() + np.ascontiguousarray(false).tobytes()).hexdigest()[:16]


def _held(
    x: NDArray[np.float64], risk: NDArray[np.float64], false: NDArray[np.bool_], image: NDArray[np.int64]
) -> ValidationMetrics:
    return ValidationMetrics(
        claims=len(x),
        false=int(false.sum()),
        images=len(np.unique(image)),
        auroc=float(roc_auc_score(false, risk)),
        average_precision=float(average_precision_score(false, risk)),
        brier=float(brier_score_loss(false, risk)),
        ece=calibration_error(risk, false),
        bins=tuple(reliability(risk, false, 10)),
        data=fingerprint(x, false),
    )
