"""Domain of a detector: the features and images that it was fitted on, and how far from them it may be asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, model_validator

from gazeguard.detection import features
from gazeguard.detection.table import ClaimTable

F64 = NDArray[np.float64]

MAX_COMPONENTS = 32  # principal components of a region; the rest of its variance is taken as equal in every direction
OUTSIDE_SHARE = 0.005  # of vectors like those it was fitted on that a region calls outside
SLACK = 2  # for the attention behind captions that somebody else wrote, which are farther away than the model's own
WORDING_SLACK = 2  # for texts of which a claim was altered: the words behind it are less probable, too
MIN_NLL = 0.5  # nats per token; the limit of greedy captions alone would refuse sampled ones
FOLDS = 5
COMPARED = ("image_mass", "concentration")
MIN_IMAGES = 10  # from which a region is fitted
MIN_VARIANCE = 0.01  # along a direction, of standardised vectors; less would tell training data from all others


class Region(BaseModel):
    """A Gaussian region of vectors, and the distance from which a vector lies outside. Immutable.

    The distance is that of Mahalanobis to the nearest of several centres with a covariance in common (Lee et al. 2018, arXiv
    1807.03888), over the root of the number of dimensions, so that it is near 1 inside; the covariance is that of
    probabilistic principal components (Tipping & Bishop 1999): full along some, equal along all other directions.

    Attributes:
        scale: (D,) standard deviation of each dimension.
        centres: (C, D) in units of the scale.
        components: (K, D) orthonormal directions, in units of the scale.
        variances: (K,) along them.
        noise: The variance along every other direction.
        limit: The distance above which a vector lies outside.
        count: Number of vectors that set the limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: tuple[PositiveFloat, ...]
    centres: tuple[tuple[FiniteFloat, ...], ...] = Field(min_length=1)
    components: tuple[tuple[FiniteFloat, ...], ...]
    variances: tuple[PositiveFloat, ...]
    noise: PositiveFloat
    limit: PositiveFloat
    count: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Region:
        if any(len(row) != len(self.scale) for row in (*self.centres, *self.components)):
            raise ValueError(f"every centre and component must have {len(self.scale)} numbers, as the scale has")
        if len(self.variances) != len(self.components):
            raise ValueError(f"{len(self.variances)} variances for {len(self.components)} components")
        return self

    @classmethod
    def fit(cls, x: F64, group: NDArray[np.int64], image: NDArray[np.int64]) -> Region:
        """Fit to vectors that are all inside; the limit is set by vectors whose images a fit has not seen.

        Args:
            x: (n, D), finite.
            group: (n,) number of the centre that each vector belongs to.
            image: (n,) number of the image of each.
        """
        from sklearn.model_selection import GroupKFold

        distances = np.zeros(len(x))
        for train, test in GroupKFold(min(FOLDS, len(np.unique(image)))).split(x, groups=image):
            distances[test] = cls._covering(x[train], group[train]).distances(x[test])
        return cls._covering(x, group).model_copy(update={"limit": _upper_limit(distances), "count": len(x)})

    @classmethod
    def _covering(cls, x: F64, group: NDArray[np.int64]) -> Region:
        """The region of vectors without a limit of its own."""
        from sklearn.decomposition import PCA

        _, group = np.unique(group, return_inverse=True)
        counts = np.bincount(group)[:, None]
        means = np.stack([np.bincount(group, column) for column in x.T], axis=1) / counts
        residual = x - means[group]
        spread = residual.std(0)
        scale = np.where(spread > 1e-9 * np.maximum(1, np.abs(means).max(0)), spread, 1.0)  # of a constant any unit will do
        pca = PCA(min(MAX_COMPONENTS, min(x.shape) - 1), random_state=0).fit(residual / scale)
        return cls(
            scale=tuple(scale.tolist()),
            centres=tuple(map(tuple, (means / scale).tolist())),
            components=tuple(tuple(float(f"{n:.6g}") for n in row) for row in pca.components_),  # keeps the file small
            variances=tuple(np.maximum(pca.explained_variance_, MIN_VARIANCE).tolist()),
            noise=max(float(pca.noise_variance_), MIN_VARIANCE),
            limit=1.0,
            count=1,
        )

    @np.errstate(invalid="ignore", over="ignore")  # a file may hold numbers near the largest float
    def distances(self, x: F64) -> F64:
        """(n,): the distance of vectors (n, D) to the nearest centre."""
        offset = x[:, None] / np.array(self.scale) - np.array(self.centres)
        along = offset @ np.array(self.components).reshape(-1, len(self.scale)).T
        rest = np.maximum((offset**2).sum(-1) - (along**2).sum(-1), 0)
        squared = (along**2 / np.array(self.variances)).sum(-1) + rest / self.noise
        return np.sqrt(squared.min(1) / len(self.scale))


def _upper_limit(distances: F64) -> float:
    """The limit that all but `OUTSIDE_SHARE` of such distances keep: their quantile, or beyond few of them a log-normal's."""
    from scipy.stats import norm

    logs = np.log(np.maximum(distances, 1e-12))
    tail = float(np.exp(logs.mean() + norm.isf(OUTSIDE_SHARE) * logs.std()))
    return max(tail, float(np.quantile(distances, 1 - OUTSIDE_SHARE, method="higher")))


class Wording(BaseModel):
    """How improbable captions may be to the model, by `features.wording_nll`, in nats per token. Immutable.

    Attributes:
        limit: The figure above which a caption lies outside.
        count: Number of captions that set the limit, all written by the model itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: PositiveFloat
    count: int = Field(ge=1)

    @classmethod
    def fit(cls, wording_nll: F64) -> Wording | None:
        """The limit from the model's own captions (captions,), NaN for those without a word that counts; None for too few."""
        known = wording_nll[np.isfinite(wording_nll)]
        if len(known) < MIN_IMAGES:
            return None
        return cls(limit=WORDING_SLACK * max(_upper_limit(known), MIN_NLL), count=len(known))


class Distance(NamedTuple):
    """How far a caption is from a region: the distance, the limit above which it lies outside, and what they measure."""

    value: float
    limit: float
    measure: str = "Mahalanobis distance"

    @property
    def outside(self) -> bool:
        """Whether it is over the limit; a distance that is no number is."""
        return not self.value <= self.limit


class Domain(BaseModel):
    """What the captions that a detector was fitted on are like. Immutable.

    Attributes:
        names: The features that are compared: `COMPARED` of each head. The others say how odd the words are, and a false word
            that the model would never write is to be flagged, not left unchecked.
        features: The region of the claims' features, with one centre per kind and label; a caption counts by the mean over its
            claims, and has `SLACK`.
        states: The region of the images: the mean state of an image's tokens in the last layer; None where the model has no
            such tokens.
        scope: What the detector was fitted on, in words, where that says more than the distance ("the drawings of the lab").
        wording: Of the words that claim nothing; None in files of earlier versions, which compare none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...]
    features: Region
    states: Region | None = None
    scope: str = Field("", max_length=200)
    wording: Wording | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Domain:
        if len(self.names) != len(self.features.scale):
            raise ValueError(f"{len(self.names)} names for {len(self.features.scale)} features")
        return self

    @classmethod
    def fit(cls, table: ClaimTable, heads: Sequence[tuple[int, int]], scope: str = "") -> Domain | None:
        """The domain of labelled claims; None for fewer than `MIN_IMAGES` images.

        Args:
            table: The claims.
            heads: The gaze heads as (layer, head).
            scope: What the claims are about, in words.
        """
        images = np.unique(table.image)
        if len(images) < MIN_IMAGES:
            return None
        _, group = np.unique(
            [f"{kind} {false}" for kind, false in zip(table.kinds, table.false, strict=True)], return_inverse=True
        )
        names = [name for name in features.names(heads) if name.partition("@")[0] in COMPARED]
        x = features.pick(table.x, heads, names)
        claims = Region.fit(x, group, table.image)
        claims = claims.model_copy(update={"limit": claims.limit * SLACK})
        states = None
        if table.states is not None:
            known = images[np.isfinite(table.states[images]).all(1)]
            if len(known) >= MIN_IMAGES:
                states = Region.fit(table.states[known].astype(float), np.zeros(len(known), int), known)
        wording = None if table.wording_nll is None else Wording.fit(table.wording_nll)
        return cls(names=tuple(names), features=claims, states=states, scope=scope, wording=wording)

    def notes(self) -> list[str]:
        """What the card says of it."""
        what = {"images": self.states, "wording": self.wording, "attention": self.features}
        *others, last = (name for name, region in what.items() if region is not None)
        compared = f"{', '.join(others)} or {last}" if others else last
        scope = f" It was fitted on {self.scope}." * bool(self.scope)
        return [
            f"Captions whose {compared} are unlike those of the {self.features.count:,} claims that it was fitted on stay "
            f"*unchecked*; of captions like these fewer than {len(what) * OUTSIDE_SHARE:.1%} do.{scope}"
        ]

    def distances(
        self, x: F64, heads: Sequence[tuple[int, int]], state: NDArray[Any] | None, wording_nll: float = math.nan
    ) -> dict[str, Distance]:
        """How far a caption lies from what the detector was fitted on.

        Args:
            x: (claims, F) `features` of its claims; without claims, only the image is compared.
            heads: The gaze heads as (layer, head).
            state: `GazeTrace.image_state`; None, or another width than that of the region, is not compared.
            wording_nll: `features.wording_nll`; NaN is not compared.

        Returns:
            Of "image" and "wording", where they can be compared, and of "attention", that is of the features.
        """
        found = {}
        if self.states is not None and state is not None and len(state) == len(self.states.scale):
            found["image"] = Distance(float(self.states.distances(np.asarray(state, float)[None])[0]), self.states.limit)
        if self.wording is not None and not math.isnan(wording_nll):
            found["wording"] = Distance(wording_nll, self.wording.limit, "token NLL in nats")
        if len(x):
            claims = self.features.distances(features.pick(x, heads, self.names))
            found["attention"] = Distance(float(claims.mean()), self.features.limit)
        return found

    def outside(
        self, x: F64, heads: Sequence[tuple[int, int]], state: NDArray[Any] | None, wording_nll: float = math.nan
    ) -> str:
        """In words, with the figure, what of a caption lies outside of the domain; "" for one that lies inside.

        Args:
            x, heads, state, wording_nll: As for `distances`.
        """
        for what, distance in self.distances(x, heads, state, wording_nll).items():
            if distance.outside:
                scope = f" ({self.scope})" * bool(self.scope)
                return (
                    f"the {what} is far from all that the detector was fitted on{scope}: {distance.measure} "
                    f"{distance.value:.1f}, limit {distance.limit:.1f}"
                )
        return ""
