"""Rewind decoding: what is generated after a rollback is what would have been generated had the phrase never been there."""

from __future__ import annotations

import re
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import family
from guardkit import invented, plain, two_lengths
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from gazeguard.claims.parse import claims
from gazeguard.decoding.rewind import CommittedPrefix, Draft, RewindLoop, list_delimiters, rollback_span
from gazeguard.errors import InputError, UnsupportedError
from gazeguard.guard import GazeGuard
from gazeguard.heads.pictographs import COLOURS
from gazeguard.lab.truth import mentions
from gazeguard.lab.world import NOUNS
from gazeguard.policy import load_policy, parse_policy
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

REWIND = {"version": 1, "name": "own", "rewind": {"budget": 8}}


@pytest.fixture(scope="module")
def batch(lab_vlm):
    """Twelve images with prompts of two lengths, so that rows are left-padded."""
    return two_lengths(lab_vlm)


@pytest.fixture(scope="module")
def few(batch):
    """Four of them, two with a phrase that is rolled back."""
    return {name: value[4:8] for name, value in batch[2].items()}


# ------------------------------------------------------------------------------------------------------------ the loop


class Doubts:
    """A judge that doubts what it is told to: (row, number of tokens generated) -> rollback points, each once."""

    def __init__(self, plan: dict[tuple[int, int], range]) -> None:
        self.plan = dict(plan)

    def __call__(self, rows: list[Draft | None]) -> list[CommittedPrefix]:
        return [
            CommittedPrefix(0) if row is None else CommittedPrefix(0, self.plan.pop((b, len(row.tokens)), range(0)))
            for b, row in enumerate(rows)
        ]


def teacher_forced(kind: families.Family, row: int, written: Tensor) -> Tensor:
    """(T, vocabulary): what the model says before each of the ``written`` (T,) words after the prompt of one row alone."""
    inputs = kind.extended(kind.batch([row]), written[None])
    logits = kind.model(**model_inputs(kind.model, inputs)).logits[0].float()
    return logits[-len(written) - 1 : -1]


@pytest.mark.usefixtures("quietly")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Idefics3", "LLaVA", "Qwen2.5-VL", "Qwen3-VL", "InternVL"])
def test_discarded_tokens_leave_no_trace(name, cache):
    """Rows of a left-padded batch go back by themselves, one of them twice, one not at all: each word's logits are those of a
    plain pass over what is left, and the rows that did not go back are those of plain generate.
    """
    kind = family(name)
    inputs = kind.batch([0, 1, 2])
    options = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    untouched = kind.model.generate(**inputs, **options).sequences
    loop = RewindLoop(Doubts({(0, 5): range(2, 4), (0, 8): range(6, 7), (2, 4): range(1)}), budget=2)
    made = kind.model.generate(**inputs, **options, custom_generate=loop)
    start = inputs["input_ids"].shape[1]
    assert made.sequences.shape == untouched.shape
    assert torch.equal(made.sequences[1], untouched[1])
    assert not torch.equal(made.sequences[0], untouched[0])
    for row, written in enumerate(made.sequences[:, start:]):
        torch.testing.assert_close(
            torch.stack(made.logits)[:, row], teacher_forced(kind, row, written), atol=2e-4, rtol=1e-3, msg=f"row {row}"
        )


@pytest.mark.usefixtures("quietly")
def test_a_banned_token_never_comes_back_where_it_stood():
    """Going back to the same place again and again takes the words there in the order of their likelihood."""
    kind = family("LLaVA")
    inputs = kind.batch([0])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    probability, order = kind.model.generate(**inputs, **options).scores[0][0].softmax(-1).sort(descending=True)
    # A word that the model gives less than one in a hundred is no alternative.
    likely = int((probability[1:] > 0.01).sum())
    assert likely >= 4
    for budget in (0, 1, 2, 3, likely + 5):
        doubts = [CommittedPrefix(0, range(1)) for _ in range(likely + 6)]
        loop = RewindLoop(
            lambda rows, doubts=doubts: [doubts.pop() if len(rows[0].tokens) == 1 else CommittedPrefix(0)], budget
        )
        made = kind.model.generate(**inputs, **options, custom_generate=loop)
        assert made.sequences[0, inputs["input_ids"].shape[1]] == order[min(budget, likely)]


def test_without_a_budget_it_is_generate(lab_vlm, few):
    """Greedy and sampled, ids and scores; the caption's reports, too."""
    model, _ = lab_vlm
    none = GazeGuard(*lab_vlm, policy=parse_policy({**REWIND, "rewind": {"budget": 0}}))
    mark = GazeGuard(*lab_vlm)
    for sample in (False, True):
        torch.manual_seed(1)
        wanted = plain(model, few, do_sample=sample, output_scores=True, return_dict_in_generate=True)
        torch.manual_seed(1)
        made = plain(none, few, do_sample=sample, output_scores=True, return_dict_in_generate=True)
        assert torch.equal(made.sequences, wanted.sequences)
        for t, (ours, theirs) in enumerate(zip(made.scores, wanted.scores, strict=True)):
            going_on = wanted.sequences[:, few["input_ids"].shape[1] + t] != model.generation_config.pad_token_id
            torch.testing.assert_close(ours[going_on], theirs[going_on], msg=f"word {t}")
        torch.manual_seed(1)
        plain(mark, few, do_sample=sample)
        for ours, theirs in zip(none.reports, mark.reports, strict=True):
            assert [f.to_dict() | {"risk": 0} for f in ours.findings] == [f.to_dict() | {"risk": 0} for f in theirs.findings]
            np.testing.assert_allclose(ours.trace.gaze, theirs.trace.gaze, atol=1e-5)
            np.testing.assert_allclose(ours.trace.internal_confidence, theirs.trace.internal_confidence, atol=1e-4)


def test_rewind_and_rerank_go_together(lab_vlm, batch):
    """Tokens are moved in the passes that are not rolled back as in those that are."""
    both = load_policy("rewind").model_copy(update={"rerank": load_policy("rerank").rerank})
    counts = []
    for policy in ("mark", "rerank", both):
        guard = GazeGuard(*lab_vlm, policy=policy)
        plain(guard, batch[2])
        counts.append(invented(batch[0], guard.reports))
    assert counts[0] > counts[1] >= counts[2]


# -------------------------------------------------------------------------------------------------------- with a guard


@pytest.fixture(scope="module")
def rewound(lab_vlm, batch):
    """A guard that rewinds after writing the batch."""
    guard = GazeGuard(*lab_vlm, policy="rewind")
    ids = plain(guard, batch[2])
    return guard, ids


def test_it_rolls_back_what_is_not_there(lab_vlm, batch, rewound):
    samples, _, inputs = batch
    guard, _ = rewound
    before = GazeGuard(*lab_vlm)
    plain(before, inputs)
    assert invented(samples, before.reports) >= 5
    assert invented(samples, guard.reports) <= invented(samples, before.reports) / 2  # no list is ended against all odds


def test_what_is_written_instead_is_a_sentence(batch, rewound):
    """No list goes on without a comma, no location without its preposition, no panel is described twice."""
    location = r"(?: (?:at the (?:top|bottom)(?: left| right)?|on the (?:left|right)|in the middle))?"
    thing = rf"an? (?:small )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(NOUNS)}){location}"
    sentence = re.compile(rf"(?:In panel (?P<panel>\w+) there|There) is {thing}(?:, {thing})*(?: and {thing})?\.")
    for report in rewound[0].reports:
        found = list(sentence.finditer(report.caption))
        assert " ".join(match[0] for match in found) == report.caption
        panels = [match["panel"] for match in found if match["panel"]]
        assert len(set(panels)) == len(panels)


def test_replay_equals_live_after_a_rollback(batch, rewound):
    """Invariant (b), for captions parts of which were written twice, in a batch in which rows went back at different times."""
    samples, prompts, _ = batch
    guard, _ = rewound
    live = guard.reports
    again = guard.check_all([s.image for s in samples], [r.caption for r in live], prompts)
    for one, other in zip(live, again, strict=True):
        assert one.trace.token_ids.tolist() == other.trace.token_ids.tolist()
        for name in ("gaze", "logprobs", "entropy", "attribution", "attended_logprob", "internal_confidence"):
            np.testing.assert_allclose(getattr(one.trace, name), getattr(other.trace, name), atol=2e-4, err_msg=name)
        assert [f.flagged for f in one.findings] == [f.flagged for f in other.findings]


def test_a_row_is_written_as_if_alone(lab_vlm, batch, rewound):
    samples, prompts, _ = batch
    alone = GazeGuard(*lab_vlm, policy="rewind")
    for i in range(6):
        report = alone.caption(samples[i].image, prompts[i], max_new_tokens=120, do_sample=False)
        assert report.caption == rewound[0].reports[i].caption


def test_static_caches_and_the_other_entrances_write_the_same(lab_vlm, few):
    model, _ = lab_vlm
    guard = GazeGuard(*lab_vlm, policy="rewind")
    written = plain(guard, few)
    assert not torch.equal(written, plain(model, few)), "something was rolled back"
    assert torch.equal(plain(guard, few, cache_implementation="static"), written)
    assert torch.equal(plain(model, few, custom_generate=guard), written)
    with guard.watch():
        assert torch.equal(plain(model, few), written)
    assert plain(guard, few, return_dict_in_generate=True).get("cache") is None


def test_sampling_rolls_back_too(lab_vlm, batch):
    torch.manual_seed(0)
    guard = GazeGuard(*lab_vlm, policy="rewind")
    plain(guard, batch[2], do_sample=True)
    false = [m for s, r in zip(batch[0], guard.reports, strict=True) for m in mentions(s.drawing, r.caption) if not m.present]
    assert len(false) <= 1


class Collected(BaseStreamer):
    """What a streamer is shown, and how much of it each time."""

    def __init__(self) -> None:
        self.shown: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.shown += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_stream_never_shows_what_is_rolled_back(lab_vlm, batch, rewound):
    samples, prompts, _ = batch
    guard = GazeGuard(*lab_vlm, policy="rewind")
    rewinds = 0
    for i in (3, 4, 5):
        inputs = encode(*lab_vlm, [samples[i].image], [prompts[i]]).inputs
        stream = Collected()
        ids = plain(guard, inputs, streamer=stream)
        assert stream.shown == ids[0].tolist()
        assert stream.ended
        handed = Collected()
        assert torch.equal(guard.model.generate(**inputs, max_new_tokens=120, streamer=handed, custom_generate=guard), ids)
        assert (handed.shown, handed.ended) == (stream.shown, True)
        rewinds += guard.reports[0].caption != GazeGuard(*lab_vlm).caption(samples[i].image, prompts[i]).caption
    assert rewinds  # or the test said nothing


def test_it_ends_at_every_limit(lab_vlm, batch):
    """At the length limit, whatever was rolled back; at a stopping criterion of the user's."""
    guard = GazeGuard(*lab_vlm, policy="rewind")
    start = batch[2]["input_ids"].shape[1]
    for limit in (1, 2, 7, 20, 33):
        ids = guard.generate(**batch[2], max_new_tokens=limit, do_sample=False)
        assert ids.shape[1] - start <= limit
        assert [r.trace.finished for r in guard.reports] == [len(r.trace) < limit for r in guard.reports]

    class AtAStop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return input_ids[:, -1] == guard.processor.tokenizer.convert_tokens_to_ids(".")

    plain(guard, batch[2], stopping_criteria=[AtAStop()])
    assert all(report.caption.count(".") == 1 and report.caption.endswith(".") for report in guard.reports)


def test_processors_see_each_row_without_what_was_rolled_back(lab_vlm, batch):
    """They may count words: what they see is always the prompt and what stands."""
    seen: list[list[int]] = []

    class Watching(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.extend(input_ids.tolist())
            return scores

    guard = GazeGuard(*lab_vlm, policy="rewind")
    samples, prompts, _ = batch
    for i in range(4):
        inputs = encode(*lab_vlm, [samples[i].image], [prompts[i]]).inputs
        seen.clear()
        ids = plain(guard, inputs, logits_processor=LogitsProcessorList([Watching()]))[0].tolist()
        prompt = inputs["input_ids"][0].tolist()
        assert all(row[: len(prompt)] == prompt for row in seen)
        assert ids[:-1] in seen


REFUSED = {
    "beams with rollbacks": {"num_beams": 2},
    "speculation with rollbacks": {"prompt_lookup_num_tokens": 3},
    "A phrase cannot be rolled back with no cache": {"use_cache": False},
    "cannot be combined with custom_generate": {"custom_generate": lambda *a, **k: None},
    "attentions or hidden states of tokens that may be rolled back": {"output_hidden_states": True},
    "A streamer shows one caption at a time": {"streamer": Collected()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_rewound_is_refused_by_name(lab_vlm, batch, message):
    guard = GazeGuard(*lab_vlm, policy="rewind")
    with pytest.raises(UnsupportedError, match=message):
        plain(guard, batch[2], **REFUSED[message])


@pytest.mark.usefixtures("quietly")
def test_caches_that_forget_are_refused():
    kind = families.gemma3(window=4)
    with pytest.raises(UnsupportedError, match=r"rolled back with a DynamicCache of .*DynamicSlidingWindowLayer"):
        kind.model.generate(**kind.batch([0]), max_new_tokens=3, custom_generate=RewindLoop(Doubts({}), budget=1))


def test_without_a_detector_nothing_can_be_rolled_back(lab_vlm):
    own = GazeGuard(*lab_vlm).heads
    with pytest.raises(InputError, match="Policy 'rewind' rolls back what a detector doubts, and there is none for this model"):
        GazeGuard(*lab_vlm, policy="rewind", heads=own)


def test_the_policy_says_how_often(lab_vlm, batch):
    """No budget, no change; each further rewind leaves at most as much invented."""
    assert load_policy("rewind").rewind.budget > 0
    captions = []
    for budget in (0, 1, 8):
        guard = GazeGuard(*lab_vlm, policy=parse_policy({**REWIND, "rewind": {"budget": budget}}))
        plain(guard, batch[2])
        captions.append(invented(batch[0], guard.reports))
    assert captions[0] > captions[1] >= captions[2]


# ------------------------------------------------------------------------------------------------------------ rollback points


@pytest.mark.parametrize(
    ("text", "thing", "window"),
    [
        ("There is a red star and a blue gear.", "a blue gear", " and a blue g"),
        ("There is a red star, a blue gear.", "a blue gear", ", a blue g"),
        ("There is a red star, and a blue gear.", "a blue gear", ", and a blue g"),
        ("There is a red star.", "a red star", " a red s"),
        ("A dog with a ball.", "a ball", " with a b"),
        ("Gears turn.", "Gears", "G"),
    ],
)
def test_an_alternative_begins_where_the_object_was_led_to(text, thing, window):
    claim = next(claim for claim in claims(text) if claim.text == thing)
    start, end = rollback_span(claim, text)
    assert text[start:end] == window


@given(st.text("ab ,.and", max_size=40))
def test_rollback_points_lie_before_the_head(text):
    for claim in claims(text):
        start, end = rollback_span(claim, text)
        assert 0 <= start < end <= claim.phrase.head.start + 1


def test_list_delimiters_are_what_lists_are_made_of(lab_vlm):
    tokenizer = lab_vlm[1].tokenizer
    found = {tokenizer.decode([token]).strip() for token in list_delimiters(tokenizer)}
    assert {",", "and"} <= found <= {",", ";", "and", "or", "plus", "with", "&"}
