"""Domain of a detector: the features and images that it was fitted on, and how far from them it may be asked."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, model_validator

F64 = NDArray[np.float64]

MAX_COMPONENTS = 32  # principal components of a region; the rest of its variance is taken as equal in every direction
OUTSIDE_SHARE = 0.005  # of captions like those it was fitted on that a region calls outside
FOLDS = 5
MIN_IMAGES = 10  # from which a region is fitted
MIN_SCALE = 1e-6  # of the largest standard deviation; what moves less is a constant


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
        limit: The distance above which a caption lies outside.
        captions: Number of captions that set the limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: tuple[PositiveFloat, ...]
    centres: tuple[tuple[FiniteFloat, ...], ...] = Field(min_length=1)
    components: tuple[tuple[FiniteFloat, ...], ...]
    variances: tuple[PositiveFloat, ...]
    noise: PositiveFloat
    limit: PositiveFloat
    captions: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Region:
        if any(len(row) != len(self.scale) for row in (*self.centres, *self.components)):
            raise ValueError(f"every centre and component must have {len(self.scale)} numbers, as the scale has")
        if len(self.variances) != len(self.components):
            raise ValueError(f"{len(self.variances)} variances for {len(self.components)} components")
        return self

    @np.errstate(invalid="ignore", over="ignore")  # a file may hold numbers near the largest float
    def distances(self, x: F64) -> F64:
        """(n,): the distance of vectors (n, D) to the nearest centre."""
        offset = x[:, None] / np.array(self.scale) - np.array(self.centres)
        along = offset @ np.array(self.components).reshape(-1, len(self.scale)).T
        rest = np.maximum((offset**2).sum(-1) - (along**2).sum(-1), 0)
        squared = (along**2 / np.array(self.variances)).sum(-1) + rest / self.noise
        return np.sqrt(squared.min(1) / len(self.scale))


class Distance(NamedTuple):
    """How far a caption is from a region: the distance, and the limit above which it lies outside."""

    value: float
    limit: float

    @property
    def outside(self) -> bool:
        """Whether it is over the limit; a distance that is no number is."""
        return not self.value <= self.limit


class Domain(BaseModel):
    """What the captions that a detector was fitted on are like. Immutable.

    Attributes:
        names: The features that are compared.
        features: The region of the claims' features, with one centre per kind and label; a caption counts by the root mean
            square over its claims.
        states: The region of the images: the mean state of an image's tokens in the last layer; None where the model has no
            such tokens.
        scope: What the detector was fitted on, in words, where that says more than the distance ("the drawings of the lab").
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...]
    features: Region
    states: Region | None = None
    scope: str = Field("", max_length=200)

    @model_validator(mode="after")
    def _fits_together(self) -> Domain:
        if len(self.names) != len(self.features.scale):
            raise ValueError(f"{len(self.names)} names for {len(self.features.scale)} features")
        return self
