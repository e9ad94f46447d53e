"""Detector of false claims: one logistic regression per kind of claim on gaze and text features, saved as numbers in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gazeguard.artifacts import DETECTOR_FILE, find_file, push_folder, read_json
from gazeguard.claims.parse import ClaimKind, Kind
from gazeguard.detection import features
from gazeguard.detection.card import notes, write_card
from gazeguard.detection.domain import Domain
from gazeguard.detection.gate import Gate
from gazeguard.detection.plots import draw_reliability
from gazeguard.detection.regression import Regression
from gazeguard.detection.rerank_evidence import RerankEvidence
from gazeguard.detection.table import ClaimTable
from gazeguard.detection.training import calibrate_regressions, fit_regressions, known_features
from gazeguard.errors import MismatchError
from gazeguard.heads.artifact import GazeHeads

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD_FILE, DIAGRAM_FILE = "README.md", "reliability.png"


class Detector(BaseModel):
    """The probability that a claim of a caption is false, from its features. Immutable.

    A detector belongs to one model and one set of gaze heads, and refuses others.

    Attributes:
        gate: Whether its verdicts may be used; None if nobody measured that.
        domain: Images and captions like those of the fit; captions outside stay *unchecked*. None in files of earlier versions.
        rerank: The evidence that the rerank decoder may use for this model; None if it was not measured.
        left_out: For each kind of claim that is in the data but not judged, the reason and what is missing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    model: str = Field(description="fingerprint of the model whose traces it was fitted on")
    heads: tuple[tuple[int, int], ...]
    kinds: dict[Kind, Regression]
    gate: Gate | None = None
    domain: Domain | None = None
    rerank: RerankEvidence | None = None
    left_out: dict[ClaimKind, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Detector:
        if "object" not in self.kinds:
            raise ValueError("kinds lack 'object'")
        known = set(features.names(self.heads))
        used = {f"kinds.{kind}": regression.names for kind, regression in self.kinds.items()}
        if self.domain is not None:
            used["domain"] = self.domain.names
        for where, names in used.items():
            if unknown := sorted(set(names) - known):
                raise ValueError(f"{where}: these heads have no feature {unknown[0]!r}")
        return self

    def __repr__(self) -> str:
        """One line: model, heads, and AUROC on validation data by kind of claim."""
        kinds = ", ".join(
            kind if each.validation is None else f"{kind} (AUROC {each.validation.auroc:.3f})"
            for kind, each in self.kinds.items()
        )
        return f"Detector(model {self.model}, {len(self.heads)} gaze head{'s' * (len(self.heads) != 1)}: {kinds})"

    __str__ = __repr__

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
        weights: NDArray[np.float64] | None = None,
    ) -> Detector:
        """Fit one regression per kind of claim.

        Args:
            x: (claims, F) `features`.
            false: (claims,) labels.
            kinds: (claims,) kind of each claim.
            heads: The gaze heads whose traces the features are from.
            names: The features to use; by default all that are finite in every claim (a model that reads its images by
                cross-attention has no logit lens on image tokens).
            regularisation: Inverse strength of the L2 penalty, scikit-learn's ``C``.
            weights: (claims,) how much each claim counts; by default all alike.

        Returns:
            The detector; a kind with fewer than `regression.MIN_CLAIMS` true or false claims gets no regression.

        Raises:
            InputError: There are too few true or false claims of kind "object".
        """
        names = known_features(x, heads.heads) if names is None else names
        fitted = fit_regressions(x, false, kinds, heads.heads, names, regularisation, weights)
        return cls(model=heads.model, heads=heads.heads, kinds=cast(dict[Kind, Regression], fitted))

    def calibrated(
        self,
        x: NDArray[np.float64],
        false: NDArray[np.bool_],
        kinds: NDArray[np.str_],
        image: NDArray[np.int64],
        weights: NDArray[np.float64] | None = None,
    ) -> Detector:
        """A copy with probabilities and thresholds from validation data.

        Args:
            x: (claims, F) `features`.
            false: (claims,) labels.
            kinds: (claims,) kind of each claim.
            image: (claims,) index of the image of each claim; see `thresholds`.
            weights: (claims,) how much each claim counts for the probabilities; thresholds and metrics count all alike.

        Raises:
            InputError: All claims of a kind have the same label, or the labels contradict the risks.
        """
        calibrated = calibrate_regressions(self.kinds, self.heads, x, false, kinds, image, weights)
        return self.model_copy(update={"kinds": calibrated})

    def fit_answers(self, risk: NDArray[np.float64], answer: NDArray[np.float64], table: ClaimTable) -> Detector:
        """A copy that weighs self-verification answers, with thresholds of the risk after them, from validation claims.

        Args:
            risk: (claims,) risks of this detector.
            answer: (claims,) log-odds of yes against no to the question whether the claim's object is there; NaN where the
                model was not asked.
            table: The claims with their labels.

        Returns:
            The copy; a kind with fewer than `regression.MIN_CLAIMS` true or false answered claims stays as it is.
        """
        fitted = {}
        for kind, regression in self.kinds.items():
            rows = table.kinds == kind
            fitted[kind] = regression.fit_answers(risk[rows], answer[rows], table.false[rows], table.image[rows])
        return self.model_copy(update={"kinds": fitted})

    # ----------------------------------------------------------------------------------------------------- using

    def uses(self, *names: str) -> bool:
        """Whether any of these features is used for any kind of claim."""
        return any(name in regression.names for regression in self.kinds.values() for name in names)

    @property
    def uses_lens(self) -> bool:
        """Whether it needs the states of image tokens: for features by the logit lens, or to compare images."""
        return self.uses("attended_logprob", "internal_confidence") or bool(self.domain and self.domain.states)

    @property
    def uses_answers(self) -> bool:
        """Whether self-verification answers are weighed for any kind of claim; see `fit_answers`."""
        return any(regression.answer is not None for regression in self.kinds.values())

    def unknown(self, x: NDArray[np.float64], kinds: Sequence[str]) -> str:
        """The first feature that is used for a claim and is not finite, as after an overflow in the model; "" if none."""
        if np.isfinite(x).all():
            return ""
        for row, kind in zip(x, kinds, strict=True):
            names = self.kinds[cast(Kind, kind)].names
            if not (finite := np.isfinite(features.pick(row[None], self.heads, names)[0])).all():
                return names[int(np.argmin(finite))]
        return ""

    def risk(self, x: NDArray[np.float64], kinds: Sequence[str]) -> NDArray[np.float64]:
        """(claims,): the probability that each claim is false, from `features` (claims, F); NaN for unknown kinds."""
        each_kind, risk = np.asarray(kinds, str), np.full(len(x), np.nan)
        for kind, regression in self.kinds.items():
            rows = each_kind == kind
            risk[rows] = regression.risk(features.pick(x[rows], self.heads, regression.names))
        return risk

    def update_with_answers(
        self, risk: NDArray[np.float64], answer: NDArray[np.float64], kinds: Sequence[str]
    ) -> NDArray[np.float64]:
        """(claims,): the risk given the self-verification answers (log-odds of yes), where these are not NaN."""
        each_kind, risk = np.asarray(kinds, str), risk.copy()
        for kind, regression in self.kinds.items():
            if regression.answer is not None:
                rows = (each_kind == kind) & ~np.isnan(answer)
                risk[rows] = regression.update_with_answers(risk[rows], answer[rows])
        return risk

    def reasons(self, x: NDArray[np.float64], kinds: Sequence[str], most: int = 2) -> list[tuple[str, ...]]:
        """For each claim the evidence that raises its risk most, in words, strongest first; contributions of heads are summed.

        Args:
            x: (claims, F) `features`.
            kinds: (claims,) kind of each claim.
            most: Number of reasons at most.
        """
        rows = zip(x, (self.kinds[cast(Kind, kind)] for kind in kinds), strict=True)
        return [each.reasons(features.pick(row[None], self.heads, each.names), most) for row, each in rows]

    def threshold(self, kind: str, rule: str | float, verified: bool = False) -> float:
        """The risk from which claims of a kind are flagged.

        Args:
            kind: The kind of claim.
            rule: The name of a rule, or the threshold itself.
            verified: Whether it is the risk after the model's answers, for kinds that it is asked about.

        Raises:
            MismatchError: The detector has no threshold by this rule.
        """
        if not isinstance(rule, str):
            return rule
        known = self.kinds[cast(Kind, kind)].rules(verified)
        if rule not in known:
            what = " after self-verification" * verified
            raise MismatchError(
                f"This detector has no threshold {rule!r} for claims of kind {kind!r}{what}; it has {', '.join(known)}. "
                "Name one of these in the policy, give a number, or fit the detector anew, on more captions."
            )
        return known[rule]

    def check_heads(self, heads: GazeHeads) -> None:
        """Raise `MismatchError` unless the detector was fitted on traces of these heads of this model."""
        if (self.model, self.heads) != (heads.model, heads.heads):
            raise MismatchError(
                f"This detector was fitted for model {self.model} with heads {list(self.heads)}; the guard has model "
                f"{heads.model} with heads {list(heads.heads)}. Fit a detector on traces of these heads."
            )

    # ---------------------------------------------------------------------------------------------------- saving

    # Not huggingface_hub's ModelHubMixin: it deletes the config.json of the folder it saves to, and a detector is usually
    # saved beside its model.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``detector.json`` into a folder, its reliability diagram, and a card unless the folder has a README."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DETECTOR_FILE).write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")
        bins = {str(kind): each.validation.bins for kind, each in self.kinds.items() if each.validation}
        draw_reliability(bins).savefig(folder / DIAGRAM_FILE, dpi=90, metadata={"Software": None})
        if not (folder / CARD_FILE).exists():
            (folder / CARD_FILE).write_text(self.card(), encoding="utf-8")

    def push_to_hub(self, repo_id: str, api: HfApi | None = None, **upload: Any) -> str:
        """Upload what `save_pretrained` writes to the hub; returns the address of the commit.

        Args:
            repo_id: The repository (``owner/name``); created if need be.
            api: A client with your own token or endpoint.
            **upload: Options of `HfApi.upload_folder` (``commit_message``, ``create_pr``, ...).
        """
        return push_folder(self.save_pretrained, repo_id, api, **upload)

    @classmethod
    def from_pretrained(cls, path: str | Path, **download: Any) -> Detector:
        """Read a detector from a folder, a file, or a repository of the hub (``owner/name``).

        Args:
            path: Folder, file or repository.
            **download: Options of `huggingface_hub.hf_hub_download` (``revision``, ``token``, ``cache_dir``, ...).

        Raises:
            ArtifactError: There is no such file, or it is not a detector's.
        """
        return read_json(cls, find_file(path, DETECTOR_FILE, **download), "a detector", "Detector.save_pretrained")

    def card(self) -> str:
        """What to know of this detector before relying on it, in Markdown."""
        return write_card(self.model, self.heads, self.kinds, notes(self.kinds, self.left_out, self.domain, self.gate))
