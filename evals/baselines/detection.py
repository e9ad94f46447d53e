"""Published signals of hallucinated objects, from the attention of all heads: higher is more likely invented.

Each takes the traces of captions with *all* heads heard, and the row of each claim's first token. Those that learn are
fitted on captions of training pictures, as the detector is.

svar:       minus the attention on the picture, summed over the layers 5 to 18 of 32 or the like, mean over their heads
            (Jiang et al. 2025, arXiv 2411.16724)
preceding:  attention of the first layer on what was written before, mean over heads (PAS, arXiv 2511.11502)
lookback:   per head, mean attention on a picture token over that plus the mean on a written token, in a logistic regression
            (Chuang et al. 2024, arXiv 2407.07071, with the picture as the context)
haloprobe:  mean and entropy of the 20 strongest looks of every head before and after the word, and the word's distribution;
            balanced given position and repetition, times that prior (arXiv 2604.06165; a linear probe, online repetition)
confidence: minus the best probability of the word at any image token in any layer (Jiang et al. 2025, arXiv 2410.02762)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gazeguard.guard import GazeGuard
from gazeguard.lab import Sample
from gazeguard.trace import SEGMENTS, GazeTrace
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

F64 = NDArray[np.float64]
STRONGEST = 20


@dataclass(frozen=True)
class Row:
    """One claim: the trace of its caption with all heads heard, the first token of its noun, and what was said before."""

    trace: GazeTrace
    at: int
    mention: float
    repeated: float


def _share(row: Row, name: str) -> F64:
    """(all heads,) attention on one of `SEGMENTS`."""
    return row.trace.segment_mass[row.at, :, SEGMENTS.index(name)].astype(np.float64)


def svar(rows: Sequence[Row]) -> F64:
    """(claims,)"""
    layers = np.array([layer for layer, _ in rows[0].trace.heads])
    depth = layers.max() + 1
    middle = (layers >= depth * 5 // 32) & (layers <= depth * 18 // 32)
    return -np.array([_share(row, "image")[middle].sum() for row in rows])


def preceding(rows: Sequence[Row]) -> F64:
    """(claims,)"""
    first = np.array([layer == 0 for layer, _ in rows[0].trace.heads])
    return np.array([_share(row, "generated")[first].mean() for row in rows])


def _lookback(row: Row) -> F64:
    picture = _share(row, "image") / row.trace.gaze.shape[-1]
    written = _share(row, "generated") / max(1, row.at)
    return picture / np.maximum(picture + written, 1e-12)


def lookback(learnt: Sequence[Row], false: NDArray[np.bool_], rows: Sequence[Row]) -> F64:
    """(claims,)"""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(np.stack([_lookback(row) for row in learnt]), false)
    return model.decision_function(np.stack([_lookback(row) for row in rows]))


def _strongest(gaze: F64) -> F64:
    """Mean and entropy of each head's strongest looks, (2 * all heads,)."""
    top = np.sort(gaze, axis=-1)[:, -STRONGEST:]
    share = top / np.maximum(top.sum(-1, keepdims=True), 1e-12)
    return np.concatenate((top.mean(-1), -(share * np.log(np.maximum(share, 1e-12))).sum(-1)))


def haloprobe(learnt: Sequence[Row], false: NDArray[np.bool_], rows: Sequence[Row]) -> F64:
    """(claims,) log-odds."""

    def inside(row: Row) -> F64:
        after = min(row.at + 1, len(row.trace) - 1)
        looks = (_strongest(row.trace.gaze[at].astype(np.float64)) for at in (row.at, after))
        return np.concatenate((*looks, [row.trace.entropy[row.at], row.trace.logprobs[row.at]]))

    def outside(row: Row) -> list[float]:
        return [np.log1p(row.at), row.mention, row.repeated]

    prior = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit([outside(row) for row in learnt], false)
    chance = prior.predict_proba([outside(row) for row in learnt])[np.arange(len(learnt)), false.astype(int)]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(np.stack([inside(row) for row in learnt]), false, logisticregression__sample_weight=1 / chance)
    balanced = model.decision_function(np.stack([inside(row) for row in rows]))
    return balanced + prior.decision_function([outside(row) for row in rows])


@torch.no_grad()
def confidence(guard: GazeGuard, samples: Sequence[Sample], image: NDArray[np.int64], words: Sequence[str]) -> F64:
    """(claims,): ``words[k]`` is said of the picture of ``samples[image[k]]``. Image tokens never see the caption."""
    norm, unembed = guard.tracer.recorder.backbone.norm, guard.model.get_output_embeddings()
    pieces = [guard.processor.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    found = np.zeros(len(words))
    for number in np.unique(image):
        sample = samples[number]
        batch = encode(guard.model, guard.processor, [sample.image], [sample.prompt])
        made = guard.model(**model_inputs(guard.model, batch.inputs), output_hidden_states=True, use_cache=False)
        patches = batch.inputs["input_ids"][0] == guard.model.config.image_token_id
        *lower, last = (state[0, patches] for state in made.hidden_states)  # the last one comes normed
        layers = [unembed(state).softmax(-1).amax(0) for state in (*map(norm, lower), last)]
        best = torch.stack(layers).amax(0)
        for k in np.flatnonzero(image == number):
            found[k] = -best[pieces[k]].max().item()
    return found
