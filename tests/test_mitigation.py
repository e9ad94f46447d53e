"""How decoding methods are compared: at equal recall, by one rule, on the same pictures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import caption_counts as c
from evals import mitigation as m
from evals.caption_jobs import SEED, Job, ObjectRisk, run
from evals.decoding_methods import cutters, methods
from gazeguard import lab
from gazeguard.lab.world import Drawing, DrawnObject, Sample
from gazeguard.lab.worlds import QUESTIONS, world

UNIT = st.floats(0, 1)
WHITE = (255, 255, 255)


def sample() -> Sample:
    """A red star at the top and a blue moon on the left."""
    things = (("star", "red", "at the top"), ("moon", "blue", "on the left"))
    return Sample("test/0", Drawing(tuple(DrawnObject(n, c, (0, 0, 24, 24), None, p) for n, c, p in things), 0, WHITE), ())


def of(false: float, mentions: float, right: float, there: float = 10, pictures: int = 4) -> c.Counts:
    """Equal counts on every picture."""
    names = dict.fromkeys(("misplaced", "with_false", "nouns", "words", "captions"), 1.0)
    names |= {"false": false, "wrong": false, "mentions": mentions, "right": right, "present": there}
    return {name: np.full(pictures, value) for name, value in names.items()}


def test_chair_counts_by_hand():
    """A star, and a cup that is not there; a moon in the wrong place is no false mention, but a misplaced one."""
    said = ["There is a red star at the top and a green cup on the right.", "There is a moon at the top."]
    made = c.count_captions(world(), [sample()] * 2, said)
    assert {name: values.tolist() for name, values in made.items()} == {
        "false": [1, 0], "misplaced": [0, 1], "wrong": [1, 1], "mentions": [2, 1], "with_false": [1, 0], "right": [1, 1],
        "present": [2, 2], "nouns": [2, 1], "words": [15, 7], "captions": [1, 1],
    }  # fmt: skip


def test_compared_by_hand():
    """False 2 of 10 after 4 of 10 is half; 8 of 10 kinds after 9 of 10 is a tenth lost; equal pictures have no spread."""
    made = c.compare(of(2, 10, 8), of(4, 10, 9))
    assert made["chair_i_reduction"] == {"value": 0.5, "ci": [0.5, 0.5]}
    assert made["recall_change"]["value"] == pytest.approx(-0.1)


def test_a_method_against_itself_is_no_change():
    own = c.count_captions(world(), [sample()], ["There is a red star at the top and a green cup on the right."])
    assert {key: made["value"] for key, made in c.compare(own, own).items()} == dict.fromkeys(c.compare(own, own), 0)
    assert c.difference_at_equal_recall(own, [own])["value"] == 0


@pytest.mark.parametrize(
    ("recall", "chair"),
    [(1.0, 0.2), (0.9, 0.1), (0.95, 0.15), (0.85, 0.1), (0.8, 0.1), (0.7, 0.05), (0.1, 0.05)],
)
def test_at_equal_recall_a_curve_is_taken_at_its_best(recall, chair):
    """Between .9 and .8 the curve is worse than at .9, which has the recall that is asked for; beyond its ends it is flat."""
    assert c.chair_at_recall([(0.9, 0.1), (0.7, 0.05), (0.95, 0.15), (0.8, 0.3), (1.0, 0.2)], recall) == pytest.approx(chair)


@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=8), UNIT, UNIT)
def test_less_recall_never_costs_chair(curve, one, other):
    low, high = sorted((one, other))
    assert c.chair_at_recall(curve, low) <= c.chair_at_recall(curve, high) + 1e-12
    assert c.chair_at_recall(curve, low) >= min(chair for _, chair in curve) - 1e-12


def test_the_setting_with_the_least_chair_that_keeps_recall_is_chosen():
    """In both decodings; where none keeps it, the one that loses least."""
    plain = {"greedy": of(4, 10, 9), "sampled": of(4, 10, 9)}
    weak = {"greedy": of(3, 10, 9), "sampled": of(3, 10, 9)}
    strong = {"greedy": of(2, 10, 9), "sampled": of(2, 10, 9)}
    lossy = {"greedy": of(1, 10, 9), "sampled": of(1, 10, 8)}
    worse = {"greedy": of(1, 10, 7), "sampled": of(1, 10, 7)}
    assert m.best_setting({"weak": weak, "strong": strong, "lossy": lossy}, plain) == "strong"
    assert m.best_setting({"worse": worse, "lossy": lossy}, plain) == "lossy"


def test_the_riskiest_objects_of_all_captions_are_dropped():
    """A quarter of four objects is the one with the greatest risk, by the detector that is asked."""
    captions = ["There is a red star and a green cup.", "There is a blue moon and a horse."]
    spans = [(9, 19), (24, 35)], [(9, 20), (25, 32)]
    assert [captions[0][a:b] for a, b in spans[0]] == ["a red star", "a green cup"]
    known = (0.2, 0.9), (0.3, 0.4)
    risks = [[ObjectRisk(*spans[i][j], known[i][j], 1 - known[i][j]) for j in (0, 1)] for i in (0, 1)]
    assert m.without_riskiest(captions, risks, "drop", 0.25) == ["There is a red star.", captions[1]]
    assert m.without_riskiest(captions, risks, "text_only_drop", 0.25) == ["There is a green cup.", captions[1]]
    assert m.without_riskiest(captions, risks, "drop", 0) == captions
    assert m.without_riskiest(captions, risks, "drop", 1) == ["", ""]


@pytest.mark.parametrize(("method", "passes"), [("plain", 1), ("vcd", 2)])
def test_passes_are_counted(method, passes):
    """Two rows: a pass over the prompt and one per token but the last; a second branch doubles them."""
    job = Job(method, next(iter(methods()[method])), "validation", 2, "greedy", questions=True)
    done = run(job)
    assert all(answer in ("No.", "Yes.") for answer in done.captions)
    assert done.passes == passes * 2 * QUESTIONS * 3  # "No", ".", the end: one batch of six rows


def test_a_job_is_the_same_however_often_it_is_done():
    """Sampling goes by the job's own seed."""
    job = Job("plain", "", "validation", 2, "sampled", seed=3)
    first, again = run(job), run(job)
    assert first.captions == again.captions
    assert first.cut == again.cut
    assert run(job._replace(seed=4)).captions != first.captions


def test_cuts_are_of_the_plain_captions():
    done = run(Job("plain", "", "validation", 2, "greedy"))
    samples = lab.samples("validation", 2, SEED)
    assert {name for name, _ in done.cut} == set(cutters())
    for (name, most), captions in done.cut.items():
        if name == "truncated":
            made = c.count_captions(world(), samples, captions)
            assert (made["mentions"] <= int(most)).all()
    assert [len(own) for own in done.risks] == c.count_captions(world(), samples, done.captions)["mentions"].tolist()


def test_holm_corrects_for_all_hypotheses():
    """The least p-value is held against level / 3, the next against level / 2; after the first that stays, all stay."""
    assert c.holm({"a": 0.01, "b": 0.02, "c": 0.04}, 0.05) == {"a", "b", "c"}
    assert c.holm({"a": 0.01, "b": 0.03, "c": 0.04}, 0.05) == {"a"}
    assert c.holm({"a": 0.02, "b": 0.02}, 0.025) == frozenset()


def test_a_policy_is_under_the_frontier_only_where_it_beats_the_best_of_it_at_equal_recall():
    frontier = [of(4, 10, 9), of(3, 10, 8)]
    made = c.frontier_figures({"better": of(2, 10, 9), "bought": of(3, 10, 8), "worse": of(5, 10, 9)}, frontier)
    assert {name: made[f"{name}_under_frontier"]["value"] for name in ("better", "bought", "worse")} == {
        "better": 1, "bought": 0, "worse": 0,
    }  # fmt: skip
    assert made["better_vs_frontier"]["value"] == pytest.approx(-0.2)
    assert made["bought_vs_frontier"]["value"] == pytest.approx(0)


def test_a_blind_bonus_on_the_full_stop_shortens_captions():
    plain, short = (
        run(Job(name, setting, "validation", 2, "greedy")) for name, setting in (("plain", ""), ("stop_bonus", "4"))
    )
    assert sum(map(len, short.captions)) < sum(map(len, plain.captions))
    assert all(caption.endswith(".") for caption in short.captions)
