"""Published signals of hallucinated objects, from the attention of all heads: higher is more likely false.

The attention of a claim's first token is reduced to a few columns while its caption's trace (with *all* heads recorded) is at
hand, since traces of all heads are large; signals with parameters are then fitted to captions of training images, as the
detector is.

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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from gazeguard.attention.backbone import Backbone, find_backbone
from gazeguard.detection.cross_fitting import choose_regularisation
from gazeguard.detection.table import ClaimTable
from gazeguard.lab.worlds import Sample
from gazeguard.progress import track
from gazeguard.trace import SEGMENTS, GazeTrace
from gazeguard.vision.encoding import encode
from gazeguard.vision.image_tokens import image_token_id
from gazeguard.vision.inputs import model_inputs

F64 = NDArray[np.float64]
TOP_WEIGHTS = 20
LAYERS = 8  # layers that internal confidence is read at, evenly spaced, the last one included
PASS = 20  # images


def columns(trace: GazeTrace, token: int) -> dict[str, F64]:
    """The columns of one claim, by signal: each (n,).

    Args:
        trace: The trace of its caption with all heads recorded.
        token: Index of the first token of its noun.
    """
    share = {name: trace.segment_mass[token, :, i].astype(np.float64) for i, name in enumerate(SEGMENTS)}
    layers = np.array([layer for layer, _ in trace.heads])
    depth = layers.max() + 1
    middle = (layers >= depth * 5 // 32) & (layers <= depth * 18 // 32)
    image, generated = share["image"] / trace.gaze.shape[-1], share["generated"] / max(1, token)
    after = min(token + 1, len(trace) - 1)
    top = [_top_weights(trace.gaze[at].astype(np.float64)) for at in (token, after)]
    return {
        "svar": np.array([-share["image"][middle].sum()]),
        "preceding": np.array([share["generated"][layers == 0].mean()]),
        "lookback": image / np.maximum(image + generated, 1e-12),
        "haloprobe": np.concatenate((*top, [trace.entropy[token], trace.logprobs[token]])),
    }


def _top_weights(gaze: F64) -> F64:
    """Mean and entropy of each head's greatest attention weights, (2 * all heads,)."""
    top = np.sort(gaze, axis=-1)[:, -TOP_WEIGHTS:]
    share = top / np.maximum(top.sum(-1, keepdims=True), 1e-12)
    return np.concatenate((top.mean(-1), -(share * np.log(np.maximum(share, 1e-12))).sum(-1)))


def probe(known: ClaimTable, train: F64, rows: F64, weights: F64 | None = None) -> F64:
    """(claims,) log-odds of ``rows`` (claims, n) by a logistic regression on ``train`` (training claims, n).

    It is as well regularised as the detector: by nested validation over the images of the training claims ``known``.
    """
    strength = choose_regularisation(train, known, [str(i) for i in range(train.shape[1])])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))
    return model.fit(train, known.false, logisticregression__sample_weight=weights).decision_function(rows)


def haloprobe(known: ClaimTable, train: F64, train_prior: F64, rows: F64, prior: F64) -> F64:
    """(claims,) log-odds.

    known:              the training claims
    train, rows:        columns "haloprobe" of training and other claims
    train_prior, prior: (claims, 3) position, number of objects before, repetition
    """
    odds = probe(known, train_prior, np.concatenate((train_prior, prior)))
    chance = 1 / (1 + np.exp(np.where(known.false, -1, 1) * odds[: len(train)]))  # of each training claim's own label
    return probe(known, train, rows, 1 / chance) + odds[len(train) :]


@dataclass(frozen=True)
class ImageConfidence:
    """The image tokens of images, decoded at some layers.

    states:     per image (layers, N, width) after the final norm
    normalizer: per image (layers, N), log of the sum over the vocabulary
    """

    tokenizer: Any
    backbone: Backbone
    states: list[Tensor]
    normalizer: list[Tensor]

    @staticmethod
    @torch.no_grad()
    def read(model: Any, processor: Any, samples: Sequence[Sample], layer: int | None = None) -> ImageConfidence:
        """Decode the image tokens of samples at `LAYERS` layers, or at that one of them. They never attend to the caption."""
        backbone, states, normalizer = find_backbone(model), [], []
        for start in track(range(0, len(samples), PASS), "decoding image tokens"):
            group = samples[start : start + PASS]
            batch = encode(model, processor, [s.image for s in group], [s.prompt for s in group])
            output = model(**model_inputs(model, batch.inputs), output_hidden_states=True, use_cache=False, logits_to_keep=1)
            *lower, last = output.hidden_states  # the last one is normalised already
            chosen = np.linspace(0, len(lower), LAYERS + 1).round().astype(int)[1:]
            chosen = chosen if layer is None else chosen[layer : layer + 1]
            for row, ids in enumerate(batch.inputs["input_ids"]):
                patches = ids == image_token_id(model)
                normed = [last[row, patches] if i == len(lower) else backbone.norm(lower[i][row, patches]) for i in chosen]
                states.append(torch.stack(normed))
                normalizer.append(torch.stack([backbone.unembed(state).logsumexp(-1) for state in normed]))
        return ImageConfidence(processor.tokenizer, backbone, states, normalizer)

    @torch.no_grad()
    def scores(self, image: NDArray[np.int64], words: Sequence[str]) -> F64:
        """(claims, layers): minus the best probability of ``words[k]`` at any token of image ``image[k]``."""
        found = []
        for number, word in zip(image, words, strict=True):
            states = self.states[number]
            pieces = torch.tensor(self.tokenizer(f" {word}", add_special_tokens=False).input_ids, device=states.device)
            logits = self.backbone.unembed_tokens(pieces.expand(len(states), -1), states)  # (layers, pieces, N)
            found.append(-(logits - self.normalizer[number][:, None]).amax((1, 2)).exp().double().cpu().numpy())
        return np.array(found)
