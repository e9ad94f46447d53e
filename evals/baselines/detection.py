"""Published signals of hallucinated objects, from the attention of all heads: higher is more likely false.

Each takes the traces of captions with *all* heads recorded, and the index of each claim's first token. Those with parameters
are fitted to captions of training drawings, as the detector is.

svar:       minus the attention on the image, summed over the layers 5 to 18 of 32 or the like, mean over their heads
            (Jiang et al. 2025, arXiv 2411.16724)
preceding:  attention of the first layer on the generated text, mean over heads (PAS, arXiv 2511.11502)
lookback:   per head, mean attention on an image token over that plus the mean on a generated token, in a logistic regression
            (Chuang et al. 2024, arXiv 2407.07071, with the image as the context)
haloprobe:  mean and entropy of the 20 greatest weights of every head before and after the token, and its distribution;
            balanced given position and repetition, times that prior (arXiv 2604.06165; a linear probe, online repetition)
confidence: minus the best probability of the token at any image token in any layer (Jiang et al. 2025, arXiv 2410.02762)
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
TOP_WEIGHTS = 20


@dataclass(frozen=True)
class RecordedClaim:
    """One claim.

    trace:        the trace of its caption with all heads recorded
    token:        index of the first token of its noun
    object_index: log(1 + number of objects named before)
    repeated:     1 when the same noun was named before
    """

    trace: GazeTrace
    token: int
    object_index: float
    repeated: float


def _share(row: RecordedClaim, name: str) -> F64:
    """(all heads,) attention on one of `SEGMENTS`."""
    return row.trace.segment_mass[row.token, :, SEGMENTS.index(name)].astype(np.float64)


def svar(rows: Sequence[RecordedClaim]) -> F64:
    """(claims,)"""
    layers = np.array([layer for layer, _ in rows[0].trace.heads])
    depth = layers.max() + 1
    middle = (layers >= depth * 5 // 32) & (layers <= depth * 18 // 32)
    return -np.array([_share(row, "image")[middle].sum() for row in rows])


def preceding(rows: Sequence[RecordedClaim]) -> F64:
    """(claims,)"""
    first = np.array([layer == 0 for layer, _ in rows[0].trace.heads])
    return np.array([_share(row, "generated")[first].mean() for row in rows])


def _lookback(row: RecordedClaim) -> F64:
    image = _share(row, "image") / row.trace.gaze.shape[-1]
    generated = _share(row, "generated") / max(1, row.token)
    return image / np.maximum(image + generated, 1e-12)


def lookback(train: Sequence[RecordedClaim], false: NDArray[np.bool_], rows: Sequence[RecordedClaim]) -> F64:
    """(claims,)"""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(np.stack([_lookback(row) for row in train]), false)
    return model.decision_function(np.stack([_lookback(row) for row in rows]))


def _top_weights(gaze: F64) -> F64:
    """Mean and entropy of each head's greatest attention weights, (2 * all heads,)."""
    top = np.sort(gaze, axis=-1)[:, -TOP_WEIGHTS:]
    share = top / np.maximum(top.sum(-1, keepdims=True), 1e-12)
    return np.concatenate((top.mean(-1), -(share * np.log(np.maximum(share, 1e-12))).sum(-1)))


def haloprobe(train: Sequence[RecordedClaim], false: NDArray[np.bool_], rows: Sequence[RecordedClaim]) -> F64:
    """(claims,) log-odds."""

    def inside(row: RecordedClaim) -> F64:
        after = min(row.token + 1, len(row.trace) - 1)
        weights = (_top_weights(row.trace.gaze[token].astype(np.float64)) for token in (row.token, after))
        return np.concatenate((*weights, [row.trace.entropy[row.token], row.trace.logprobs[row.token]]))

    def outside(row: RecordedClaim) -> list[float]:
        return [np.log1p(row.token), row.object_index, row.repeated]

    prior = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit([outside(row) for row in train], false)
    chance = prior.predict_proba([outside(row) for row in train])[np.arange(len(train)), false.astype(int)]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(np.stack([inside(row) for row in train]), false, logisticregression__sample_weight=1 / chance)
    balanced = model.decision_function(np.stack([inside(row) for row in rows]))
    return balanced + prior.decision_function([outside(row) for row in rows])


@torch.no_grad()
def confidence(guard: GazeGuard, samples: Sequence[Sample], image: NDArray[np.int64], words: Sequence[str]) -> F64:
    """(claims,): ``words[k]`` is claimed of the image of ``samples[image[k]]``. Image tokens never attend to the caption."""
    norm, unembed = guard.tracer.recorder.backbone.norm, guard.model.get_output_embeddings()
    pieces = [guard.processor.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    scores = np.zeros(len(words))
    for number in np.unique(image):
        sample = samples[number]
        batch = encode(guard.model, guard.processor, [sample.image], [sample.prompt])
        output = guard.model(**model_inputs(guard.model, batch.inputs), output_hidden_states=True, use_cache=False)
        patches = batch.inputs["input_ids"][0] == guard.model.config.image_token_id
        *lower, last = (state[0, patches] for state in output.hidden_states)  # the last one is normalised already
        layers = [unembed(state).softmax(-1).amax(0) for state in (*map(norm, lower), last)]
        best = torch.stack(layers).amax(0)
        for k in np.flatnonzero(image == number):
            scores[k] = -best[pieces[k]].max().item()
    return scores
