"""Choice of features by transfer: those that a detector may learn from where its claims are not those it will judge.

A detector that is fitted without labels learns from drawings and from claims made false by construction. What ranks well there
may be a habit of that style: a feature is kept where a regression on one style ranks another style better with it than without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gazeguard.detection import features
from gazeguard.detection.calibration import calibrated_loss
from gazeguard.detection.regression import MIN_CLAIMS, Regression
from gazeguard.detection.table import ClaimTable
from gazeguard.detection.training import known_features
from gazeguard.errors import InputError

# How often claims are false at a position or when repeated is a fact about the captions of a fit, not about the image. On a
# held-out model `repeated` had a weight of -2.7, which passed what was invented twice; without it AUROC rose from .979 to .993.
PRIORS = ("position", "object_index", "repeated")
REGULARISATION = 0.1  # scikit-learn's C while features are compared
MAX_CLAIMS = 2000  # of a style that are used
MIN_GAIN = 1e-4  # nats per claim; a family that transfers no more than this is dropped


class Transfer(NamedTuple):
    """Features that transfer, and how well a regression on one style judges the claims of another.

    Attributes:
        names: The features, in the order of `features.names`.
        dropped: Families of features that were left out because they do not transfer, first the worst.
        loss_before: Log-loss, nats per claim, mean over pairs of styles, with all features but `PRIORS`.
        loss_after: The same with the chosen ones.
    """

    names: tuple[str, ...]
    dropped: tuple[str, ...]
    loss_before: float
    loss_after: float


def choose_features(styles: Mapping[str, ClaimTable], heads: Sequence[tuple[int, int]], kind: str = "object") -> Transfer:
    """Features whose weights transfer between styles, by backward elimination of whole families (all heads of a feature).

    Args:
        styles: Claims by style: of another kind of drawing, another world, or with claims made false by another construction.
        heads: The gaze heads as (layer, head).
        kind: The kind of claims that are compared.

    Raises:
        InputError: Fewer than two styles have `MIN_CLAIMS` false and as many true claims of this kind.
    """
    tables = {name: _some(table.select(table.kinds == kind)) for name, table in styles.items()}
    usable = [t for t in tables.values() if MIN_CLAIMS <= t.false.sum() <= len(t) - MIN_CLAIMS]
    if len(usable) < 2:
        counts = ", ".join(f"{name}: {int(t.false.sum())} of {len(t)}" for name, t in tables.items())
        raise InputError(
            f"Transfer needs two styles with at least {MIN_CLAIMS} false and {MIN_CLAIMS} true {kind} claims each; false are "
            f"{counts}. Draw more scenes."
        )
    every = set.intersection(*(set(known_features(table.x, heads)) for table in usable))
    names = [name for name in features.names(heads) if name in every and name not in PRIORS]
    current = before = _loss(usable, heads, names)
    dropped: list[str] = []
    while len(families := sorted({_family(name) for name in names})) > 1:
        without = {family: [name for name in names if _family(name) != family] for family in families}
        losses = {family: _loss(usable, heads, rest) for family, rest in without.items()}
        worst = min(losses, key=losses.__getitem__)
        if losses[worst] > current + MIN_GAIN:
            break
        dropped.append(worst)
        names, current = without[worst], losses[worst]
    return Transfer(tuple(names), tuple(dropped), before, current)


def _family(name: str) -> str:
    return name.partition("@")[0]


def _some(table: ClaimTable) -> ClaimTable:
    """At most `MAX_CLAIMS` claims of a table, drawn at random."""
    if len(table) <= MAX_CLAIMS:
        return table
    return table.select(np.sort(np.random.default_rng(0).permutation(len(table))[:MAX_CLAIMS]))


def _loss(tables: Sequence[ClaimTable], heads: Sequence[tuple[int, int]], names: Sequence[str]) -> float:
    """Mean log-loss, nats per claim, of regressions on one table that judge another, on a scale calibrated on the latter."""
    losses = []
    columns: list[NDArray[np.float64]] = [features.pick(table.x, heads, names) for table in tables]
    for one, other in permutations(range(len(tables)), 2):
        regression = Regression.fit(columns[one], tables[one].false, names, REGULARISATION, tables[one].weights)
        loss = calibrated_loss(regression.logit(columns[other]), tables[other].false, tables[other].weights)
        losses.append(loss.sum() / tables[other].weights.sum())
    return float(np.mean(losses))
