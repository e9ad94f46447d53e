"""Rerank uses what was measured to help the model, and is refused, with the figures, where nothing does."""

import math

import pytest
import torch
from guardkit import batch_of

from gazeguard.decoding.rerank import StopBonus
from gazeguard.detection.rerank_evidence import RerankEvidence, with_measured_strengths
from gazeguard.errors import InputError, PolicyError, UnsupportedError
from gazeguard.fitting.rerank import MIN_SCENES, measure_rerank
from gazeguard.fitting.visual_words import DrawnScene, Vocabulary, rank_swaps, read_image_tokens
from gazeguard.guard import GazeGuard
from gazeguard.lab.world import NOUNS
from gazeguard.lab.worlds import world
from gazeguard.policy import Rerank, load_policy, parse_policy

WORLD = world()
SCENES = [DrawnScene(each.image, each.prompt, WORLD.nouns(each)) for each in WORLD.samples("validation", MIN_SCENES, 3)]
NONE = {"attribution": 0, "attended_logprob": 0, "end_bonus": 0}
HELPS = RerankEvidence(attribution=0, attended_logprob=3, end_bonus=0, layer=2, usable=True)
NO_HELP = RerankEvidence(**NONE, usable=False, reason="nothing ranks", figures={"attribution_ranking": 0.5123})


@pytest.mark.parametrize("policy", ["rerank", "strict"])
def test_a_policy_takes_the_strengths_that_were_measured(guard, policy):
    measured = with_measured_strengths(load_policy(policy), HELPS).rerank
    assert (measured.strengths, measured.layer) == ({"attribution": 0, "attended_logprob": 3, "end_bonus": 0}, 2)
    own = GazeGuard(guard.model, guard.processor, policy).policy.rerank
    assert own.attended_logprob == guard.detector.rerank.attended_logprob > 0


def test_strengths_of_ones_own_stand(guard):
    """Whatever was measured, and without a detector."""
    mine = parse_policy({"version": 1, "name": "mine", "rerank": {"end_bonus": 1.0}})
    for evidence in (None, HELPS, NO_HELP):
        assert with_measured_strengths(mine, evidence) == mine
    assert with_measured_strengths(load_policy("mark"), None).rerank is None


def test_a_model_that_nothing_helps_refuses_rerank_with_the_figures(guard):
    detector = guard.detector.model_copy(update={"rerank": NO_HELP})
    for policy in ("rerank", "strict"):
        with pytest.raises(PolicyError, match=r"this model: nothing ranks \(attribution_ranking 0.512\)\. Choose"):
            GazeGuard(guard.model, guard.processor, policy, heads=guard.heads, detector=detector)
    with pytest.raises(PolicyError, match=r"this guard has none.*Run gazeguard fit.*set one of rerank\.attribution"):
        GazeGuard(guard.model, guard.processor, "rerank", heads=guard.heads)


def test_the_lens_reads_the_layer_that_the_policy_names(guard):
    """Layer 0 would be the embeddings; a layer that is not there is refused by name."""
    inputs, lenses = batch_of(guard), {}
    for layer in (None, 3):
        policy = load_policy("rerank").model_copy(update={"rerank": Rerank(attended_logprob=2.0, layer=layer)})
        reader = GazeGuard(guard.model, guard.processor, policy)
        prompts = reader.tracer.prompts(inputs, inputs["input_ids"], inputs["attention_mask"])
        with torch.no_grad(), reader.tracer.record(prompts) as recorder:
            reader.model.generate(**inputs | {"max_new_tokens": 1})
            lenses[layer] = (recorder.layer_lens(), recorder.logit_lens())
    assert torch.equal(lenses[None][0].normed, lenses[None][1].normed)
    assert torch.equal(lenses[3][1].normed, lenses[None][1].normed)
    options = {"output_hidden_states": True}
    hidden = guard.model(**{k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}, **options)
    first = lenses[3][0]
    expected = guard.tracer.recorder.backbone.norm(hidden.hidden_states[3])
    columns = (inputs["input_ids"][0] == guard.model.config.image_token_id).nonzero()[:, 0]
    torch.testing.assert_close(first.normed[0], expected[0, columns], atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="has no layer 99 whose image tokens"):
        guard.tracer.recorder.read_layer(99)


def test_the_lab_model_shows_what_is_drawn(guard):
    """Its image tokens name drawn objects and no others, and its gaze heads prefer them; in other images they do not."""
    words = Vocabulary(NOUNS, guard.processor.tokenizer)
    readable = read_image_tokens(guard, SCENES[:4], words)
    assert readable.layers[-1] is None
    assert readable.drawn[-1].mean() > 0.1 > 0.01 > readable.other[-1].mean()
    captions = [WORLD.true_caption(each) for each in WORLD.samples("validation", MIN_SCENES, 3)]
    ranking = rank_swaps(guard, SCENES, captions, words)
    assert ranking.attribution[~torch.tensor(ranking.attribution).isnan().numpy()].mean() > 0.95
    assert ranking.attended[~torch.tensor(ranking.attended).isnan().numpy()].mean() > 0.95


@pytest.mark.slow
def test_measuring_gives_strengths_or_a_reason(guard):
    """So few scenes prove nothing: the answer has figures and is never a strength without evidence."""
    with pytest.raises(InputError, match="needs at least"):
        measure_rerank(guard, SCENES[:2], NOUNS)
    evidence = measure_rerank(guard, SCENES, NOUNS, max_new_tokens=40)
    assert {"readable_share", "attribution_ranking", "attended_logprob_ranking"} <= set(evidence.figures)
    assert evidence.usable == (evidence.figures["p_value"] <= 0.005)
    assert guard.tracer.recorder.layer_lens() is None  # nothing is left of the measurement


def test_the_blind_bonus_moves_plausible_full_stops_alone():
    scores = torch.tensor([[0.0, -1.0, -9.0], [-3.0, 0.0, 0.0]])
    moved = StopBonus([1, 2], 2.0, math.exp(-2))(None, scores)
    assert moved.tolist() == [[0.0, 1.0, -9.0], [-3.0, 2.0, 2.0]]
    assert scores[0, 1] == -1.0
