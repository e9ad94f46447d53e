"""Is a question answered from the cache as it is from scratch, at the price that is claimed, and counted as it should be?"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import invariants
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import Cache

from gazeguard import lab
from gazeguard.claims.parse import claims
from gazeguard.decoding.verification import (
    AnswerTokens,
    answer_log_odds,
    can_reuse_cache,
    existence_question,
    question_suffixes,
    with_suffixes,
)
from gazeguard.detection.calibration import thresholds
from gazeguard.detection.detector import Detector
from gazeguard.detection.table import ClaimTable
from gazeguard.errors import MismatchError, UnsupportedError
from gazeguard.guard import GazeGuard
from gazeguard.judge import MIN_ANSWER_EFFECT
from gazeguard.policy import parse_policy
from gazeguard.report import Verdict
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

SAMPLES = lab.samples("test", 8, seed=7)
WORDS = AnswerTokens((5, 6), (7,), min_mass=0)  # random weights answer nothing


def cache_of(made) -> Cache:
    return next(value for value in made.values() if isinstance(value, Cache))


@contextmanager
def passes(model):
    """How many rows and tokens each pass of the model reads."""
    heard = []

    def note(_, args, inputs):
        heard.append(tuple(inputs["input_ids"].shape))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield heard
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("name", ["Idefics3", "LLaVA", "Molmo2", "Emu3", "GOT-OCR2"])
def test_the_cache_of_a_caption_answers_as_whole_prompts_do(quietly, name):
    """Invariant: in a left-padded batch, several questions of different lengths per image; and the cache stays as it was."""
    kind = invariants.MAKERS[name]()
    inputs, rng = kind.batch(), np.random.default_rng(0)
    assert not inputs["attention_mask"].bool().all(), "the test needs padding"
    rows, asked = [0, 2, 2, 1, 0, 2], [rng.integers(8, 100, n) for n in (3, 5, 2, 4, 4, 1)]
    cache = cache_of(invariants.write(kind.model, inputs))
    assert can_reuse_cache(kind.model, cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    with passes(kind.model) as cheap:
        quick = answer_log_odds(kind.model, inputs, rows, asked, WORDS, cache)
    with passes(kind.model) as dear:
        whole = answer_log_odds(kind.model, inputs, rows, asked, WORDS)
    torch.testing.assert_close(quick, whole, atol=1e-4, rtol=0)
    assert whole.std() > 0.01, "the test needs answers that differ"
    assert cheap == [(6, 5)]
    assert [rows for rows, _ in dear] == [3, 3, 3]
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "PaliGemma", "Gemma3", "Mllama", "T5Gemma2", "HyperCLOVAX-v2", "Qwen3.5"])
def test_where_no_cache_serves_whole_prompts_are_read(quietly, name):
    """Rows of a batch are answered as they are alone, whatever a cache holds: M-RoPE, words that look ahead, windows, states,
    cross-attention, encoder-decoders.
    """
    kind = invariants.MAKERS[name]()
    rng = np.random.default_rng(0)
    rows, asked = [2, 0, 2], [rng.integers(8, 100, n) for n in (3, 5, 2)]
    cache = cache_of(invariants.write(kind.model, kind.batch()))
    assert not can_reuse_cache(kind.model, cache)
    together = answer_log_odds(kind.model, kind.batch(), rows, asked, WORDS, cache)
    alone = [answer_log_odds(kind.model, kind.batch([row]), [0], [tail], WORDS) for row, tail in zip(rows, asked, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_the_lab_answers_from_its_cache_what_it_answers_to_the_processors_own_prompt(lab_vlm):
    """Invariant: a prompt made from a caption's prompt is that which the processor makes of image and question."""
    model, processor = lab_vlm
    images, prompts = (
        [s.image for s in SAMPLES[:3]],
        ["Describe the picture.", "Is there a red star in panel one?", "Name one."],
    )
    batch = encode(model, processor, images, prompts)
    assert not batch.prompt_mask.bool().all(), "the test needs padding"
    told = ["Is there a red star?", "Is there a skull in panel one?", "Are there two moons in the picture?"]
    asked, words = question_suffixes(model, processor, told), AnswerTokens.from_tokenizer(processor.tokenizer)
    own = encode(model, processor, images, told).prompt
    made = with_suffixes(model, batch.prompt, asked)
    assert all(torch.equal(made[name], own[name]) for name in own)
    expected = words.log_odds(model(**model_inputs(model, own)).logits[:, -1])
    cache = cache_of(model.generate(**batch.inputs, max_new_tokens=9, return_dict_in_generate=True))
    torch.testing.assert_close(
        answer_log_odds(model, batch.prompt, [0, 1, 2], asked, words, cache), expected, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(answer_log_odds(model, batch.prompt, [0, 1, 2], asked, words), expected, atol=1e-4, rtol=0)


def test_copies_of_a_prompt_and_beams_share_its_image(lab_vlm):
    """The cache of beams or of several captions per prompt holds each image as often; any of them serves."""
    model, processor = lab_vlm
    prompt = encode(model, processor, [s.image for s in SAMPLES[:2]], ["Describe the picture."] * 2).prompt
    asked, words = (
        question_suffixes(model, processor, ["Is there a red star?"]),
        AnswerTokens.from_tokenizer(processor.tokenizer),
    )
    expected = answer_log_odds(model, prompt, [1, 0], asked * 2, words)
    for how in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        cache = cache_of(model.generate(**prompt, max_new_tokens=5, return_dict_in_generate=True, **how))
        torch.testing.assert_close(answer_log_odds(model, prompt, [1, 0], asked * 2, words, cache), expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("caption", "asked"),
    [
        ("There is a red star.", "Is there a red star in the picture?"),
        ("The old man's umbrella is wet.", "Is there an old man in the picture?"),
        ("Two dogs sleep.", "Are there two dogs in the picture?"),
        ("The cats sleep.", "Are there cats in the picture?"),
        ("A glass of water.", "Is there a glass in the picture?"),
        ("Several people wait.", "Are there several people in the picture?"),
    ],
)
def test_a_thing_is_asked_about_in_its_own_words(caption, asked):
    assert existence_question(claims(caption)[0].phrase) == asked


def plain_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("<unk>", *words))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>")


def test_every_spelling_that_is_one_token_counts():
    assert AnswerTokens.from_tokenizer(plain_tokenizer("yes", "no", " Yes", "YES", "not")) == AnswerTokens((1, 3, 4), (2,))
    logits = torch.tensor([[9.0, 1.0, 0.5, 2.0, -1.0, 7.0]])
    expected = math.log(math.e + math.e**2 + math.e**-1) - 0.5
    assert AnswerTokens((1, 3, 4), (2,), min_mass=0).log_odds(logits).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("mass", "counts"), [(0.9, True), (0.51, True), (0.49, False), (1e-8, False)])
def test_an_answer_counts_only_where_the_model_answers(mass, counts):
    """By hand: yes has two thirds of what yes and no have together; whatever is left goes to another token."""
    logits = torch.tensor([mass / 3, mass / 3, mass / 3, 1 - mass]).log()
    found = AnswerTokens((0, 1), (2,)).log_odds(logits).item()
    assert math.isnan(found) is not counts
    assert not counts or found == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(("known", "missing"), [(("yes",), "no"), (("no",), "yes")])
def test_a_tokenizer_without_yes_or_no_is_refused(known, missing):
    with pytest.raises(UnsupportedError, match=f"no spelling of '{missing}' is a single token .* policy without verify"):
        AnswerTokens.from_tokenizer(plain_tokenizer(*known))


def test_a_prompt_that_does_not_tell_where_its_image_ends_is_refused(quietly):
    kind = invariants.MAKERS["Idefics"]()
    with pytest.raises(UnsupportedError, match=r"does not tell where the image ends\. Choose a policy without verify"):
        answer_log_odds(kind.model, kind.batch(), [0], [np.array([5])], WORDS)


# --------------------------------------------------------------------------------------------------------- evidence


def hearing(detector: Detector, answer=(1.0, -2.0, 0.5), kinds=("object", "attribute")) -> Detector:
    """The detector as if answers had been learnt to be worth so much."""
    made = {k: r.model_copy(update={"answer": answer if k in kinds else None}) for k, r in detector.kinds.items()}
    return detector.model_copy(update={"kinds": made})


def asking(guard: GazeGuard, detector: Detector, **sections) -> GazeGuard:
    policy = parse_policy({"version": 1, "name": "v", "verify": {}, **sections})
    return GazeGuard(guard.model, guard.processor, policy, heads=guard.heads, detector=detector)


def test_the_risk_after_an_answer_is_the_logistic_of_the_sum(guard):
    """By hand: risk .8 is log-odds log 4; an answer of no, log-odds -1, moves it as the weights say, nothing else."""
    heard = hearing(guard.detector, kinds=("object",)).update_with_answers(
        np.array([0.8, 0.8, 0.8, 1.0]), np.array([-1.0, np.nan, -1.0, 50.0]), ["object", "object", "location", "object"]
    )
    expected = 1 / (1 + math.exp(-(math.log(4) + 2 + 0.5)))
    assert heard[:3].tolist() == pytest.approx([expected, 0.8, 0.8], abs=1e-12)
    assert 0 <= heard[3] < 1e-20, "a risk of one is no wall"


def test_what_answers_are_worth_is_learnt_from_those_that_were_asked(guard):
    """Answers that tell the truth get a weight; answers that tell nothing get almost none; too few claims teach nothing."""
    rng = np.random.default_rng(0)
    risk, kinds = rng.uniform(0.05, 0.95, 900), rng.choice(["object", "attribute", "location"], 900)
    false = rng.random(900) < risk
    told = np.where(kinds == "object", np.where(false, -2, 2) + rng.normal(size=900), rng.normal(size=900))
    told[kinds == "location"] = np.nan
    table = ClaimTable(risk[:, None], false, kinds, np.arange(900) // 6)
    made = guard.detector.fit_answers(risk, told, table).kinds
    assert made["object"].answer[1] < -1.5
    assert made["attribute"].answer[:2] == pytest.approx((1, 0), abs=0.35)
    assert made["location"].answer is None
    left = {"answer", "verified"}
    assert made["object"].model_dump(exclude=left) == guard.detector.kinds["object"].model_dump(exclude=left)
    few = np.where(np.arange(900) < 40, told, np.nan)
    assert guard.detector.fit_answers(risk, few, table).kinds["object"] == guard.detector.kinds["object"]


SIX = "There is a star, a moon, a cup, a plane, a bolt and a gear."


def invented_claims(images: int, seed: int) -> tuple[np.ndarray, ...]:
    """Risks, answers, labels (images x 6,): a model that believes in half of what it invents, whatever it is asked."""
    rng = np.random.default_rng(seed)
    risk = rng.beta(0.5, 1.5, images * 6)
    false = rng.random(images * 6) < risk
    yes = ~false | (rng.random(images * 6) < 0.5)
    return risk, np.where(yes, 2, -2) + rng.normal(size=images * 6), false


def kept_false(guard, detector: Detector, claims: tuple[np.ndarray, ...], **sections) -> tuple[float, float]:
    """The share of a caption's claims that stay although they are false, and that which is flagged: means over captions."""
    judge = asking(guard, detector, **sections).judge
    assessment = judge.assess(guard.check(SAMPLES[0].image, SIX).trace)
    assert len(assessment.claims) == 6
    risk, answer, false = (column.reshape(-1, 6) for column in claims)
    kept, flagged = [], []
    for row in range(len(risk)):
        answers = {claim.phrase: told for claim, told in zip(assessment.claims, answer[row], strict=True)}
        findings = judge.report(replace(assessment, risks=risk[row]), answers).findings
        flags = np.array([finding.flagged for finding in findings])
        kept.append((false[row] & ~flags).mean())
        flagged.append(flags.mean())
    return float(np.mean(kept)), float(np.mean(flagged))


@pytest.mark.parametrize("verify", [{}, {"threshold": 0.02}, {"threshold": "f1"}])
def test_the_bound_holds_for_what_is_kept_after_the_answers(guard, verify):
    """On captions that set nothing, from whatever risk is asked; the bound of the risk before would let more stay false."""
    risk, answer, false = invented_claims(400, 5)
    table = ClaimTable(risk[:, None], false, np.full(2400, "object"), np.arange(2400) // 6)
    object_ = guard.detector.kinds["object"].model_copy(update={"thresholds": thresholds(risk, false, table.image)})
    heard = guard.detector.model_copy(update={"kinds": {"object": object_}}).fit_answers(risk, answer, table)
    held_out = invented_claims(400, 6)
    kept, flagged = kept_false(guard, heard, held_out, verify=verify, threshold="bound_0.05")
    assert kept <= 0.05 + 0.008, "two standard errors of the mean"
    assert 0 < flagged < 1
    before, after = heard.threshold("object", "bound_0.05"), heard.threshold("object", "bound_0.05", verified=True)
    assert after < before
    void, _ = kept_false(guard, heard, held_out, verify=verify, threshold=before)
    if not verify:
        assert kept > 0.04, "not by flagging everything"
        assert void > 0.05 + 0.016


def test_a_bound_of_before_the_answers_is_refused(guard):
    """A file of an earlier version: its best F1 serves, its bounds would be void."""
    old = hearing(guard.detector)
    assert old.threshold("object", "f1", verified=True) == old.threshold("object", "f1")
    assert old.threshold("location", "bound_0.05", verified=True) == old.threshold("location", "bound_0.05")
    images, captions, prompts = wrong_captions()
    with pytest.raises(MismatchError, match=r"no threshold 'bound_0.05' for claims of kind 'object' after self-verification"):
        asking(guard, old, threshold="bound_0.05").check_all(images, captions, prompts)


def test_a_detector_that_has_not_learnt_it_is_refused(guard):
    """An old file loads, and serves every policy but one that asks."""
    plain = guard.detector.model_dump()
    for kind in plain["kinds"].values():
        del kind["answer"], kind["verified"]
    deaf = Detector.model_validate(plain)
    told = r"Policy 'v' asks .* has no detector that has learnt what the answers are worth .* policy without verify"
    with pytest.raises(MismatchError, match=told):
        asking(guard, deaf)
    with pytest.raises(MismatchError, match=told):
        GazeGuard(guard.model, guard.processor, parse_policy({"version": 1, "name": "v", "verify": {}}), heads=guard.heads)
    assert GazeGuard(guard.model, guard.processor, heads=guard.heads, detector=deaf).check(SAMPLES[0].image, "A star.")


# ------------------------------------------------------------------------------------------------------------ guard


def wrong_captions() -> tuple[list, list[str], list[str]]:
    """Images, captions with an invented thing in every second one, prompts."""
    captions = []
    for number, sample in enumerate(SAMPLES):
        nouns = {thing.noun for thing in sample.drawing.objects}
        absent = [noun for noun in ("skull", "castle", "anchor", "moon") if noun not in nouns]
        thing = sample.drawing.objects[0]
        said = f"There is a {thing.colour} {thing.noun}."
        captions.append(said if number % 2 else f"{said[:-1]}, a green {absent[0]} and a blue {absent[1]}.")
    return [s.image for s in SAMPLES], captions, [s.prompt for s in SAMPLES]


def test_checked_captions_are_asked_about_in_one_pass_and_only_where_something_is_flagged(guard):
    """One pass for the batch; its answers are those of each question alone, and the risk is what they make of it."""
    images, captions, prompts = wrong_captions()
    before = guard.check_all(images, captions, prompts)
    flagged = [(b, f) for b, report in enumerate(before) for f in report.findings if f.flagged]
    assert len({b for b, _ in flagged}) > 2
    assert len(flagged) > len({b for b, _ in flagged}), "a test of batches needs several phrases of one caption"
    strict = asking(guard, hearing(guard.detector))
    with passes(guard.model) as heard:
        after = strict.check_all(images, captions, prompts)
    phrases = {(b, f.claim.phrase) for b, f in flagged}
    assert len(heard) == 2, "the caption's, and one for all that is asked"
    assert heard[1][0] == len(phrases)
    assert heard[1][1] < 30, "only the questions' own words are read"
    words = AnswerTokens.from_tokenizer(guard.processor.tokenizer)
    for b, old in flagged:
        new = next(f for f in after[b].findings if f.claim == old.claim)
        own = encode(guard.model, guard.processor, [images[b]], [existence_question(old.claim.phrase)]).prompt
        with torch.no_grad():
            told = words.log_odds(guard.model(**model_inputs(guard.model, own)).logits[0, -1]).item()
        assert new.answer == pytest.approx(1 / (1 + math.exp(-told)), abs=1e-4)
        logit = math.log(old.risk / (1 - old.risk)) - 2 * told + 0.5
        assert new.risk == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-4)
        reason = f"asked whether it is there, the model answers {'yes' if told > 0 else 'no'}"
        assert (reason in new.reasons) == (abs(2 * told) >= MIN_ANSWER_EFFECT)
        assert after[b].to_dict()["phrases"][after[b].findings.index(new)]["answer"] == new.answer
    untouched = [b for b in range(len(images)) if b not in {b for b, _ in flagged}]
    assert [after[b].to_dict() | {"policy": "mark"} for b in untouched] == [before[b].to_dict() for b in untouched]
    with passes(guard.model) as heard:
        strict.check_all([images[b] for b in untouched], [captions[b] for b in untouched], [prompts[b] for b in untouched])
    assert len(heard) == 1, "nothing is flagged, nothing is asked"


@pytest.mark.parametrize("bias", [-80.0, 80.0])
def test_the_verdict_follows_the_answer(guard, bias):
    """An answer that clears everything leaves no flag, and nothing to cut; one that condemns leaves what was flagged."""
    images, captions, prompts = wrong_captions()
    before = guard.check_all(images, captions, prompts)
    after = asking(guard, hearing(guard.detector, (1.0, 0.0, bias)), on_flag="drop").check_all(images, captions, prompts)
    for old, new in zip(before, after, strict=True):
        if bias > 0:
            assert [f.flagged for f in new.findings] == [f.flagged for f in old.findings]
            assert new.reason == old.reason
        else:
            assert new.verdict is Verdict.PASS
            assert new.filtered_caption == new.caption
            assert all(f.answer is not None for f, was in zip(new.findings, old.findings, strict=True) if was.flagged)


def test_a_lower_threshold_asks_about_more(guard):
    """From risk 0 on every thing is asked about, once, and no place is."""
    images, captions, prompts = wrong_captions()
    strict = asking(guard, hearing(guard.detector), verify={"threshold": 0.0})
    reports = strict.check_all(images, [f"{c[:-1]} at the top left." for c in captions], prompts)
    findings = [f for report in reports for f in report.findings]
    assert {f.claim.kind for f in findings} == {"object", "attribute", "location"}
    assert all((f.answer is None) == (f.claim.kind == "location") for f in findings)
    assert len({f.answer for f in findings}) > len(images)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"cache_implementation": "static"},
        {"custom_generate": True},
        {"rewind": 8},
        {"rewind": 0},
    ],
    ids=str,
)
def test_captions_are_asked_about_as_they_are_when_checked(guard, how):
    """Live and replay agree, whatever wrote the caption and left what cache; what generate returns is the same."""
    how = dict(how)
    more = {} if (budget := how.pop("rewind", None)) is None else {"rewind": {"budget": budget}}
    options = {"max_new_tokens": 120, "do_sample": False, **how}
    strict = asking(guard, hearing(guard.detector), threshold=0.05, **more)
    inputs = encode(guard.model, guard.processor, [s.image for s in SAMPLES], [s.prompt for s in SAMPLES]).inputs
    torch.manual_seed(0)
    if options.pop("custom_generate", False):
        ids = guard.model.generate(**inputs, **options, custom_generate=strict)
    else:
        ids = strict.generate(**inputs, **options)
    if not more:
        torch.manual_seed(0)
        assert torch.equal(guard.model.generate(**inputs, **options), ids)
    copies = how.get("num_return_sequences", 1)
    rows = [sample for sample in SAMPLES for _ in range(copies)]
    assert any(f.answer is not None for report in strict.reports for f in report.findings), "something must be asked"
    checker = asking(guard, strict.detector, threshold=0.05)
    replayed = checker.check_all([s.image for s in rows], [r.caption for r in strict.reports], [s.prompt for s in rows])
    for live, again in zip(strict.reports, replayed, strict=True):
        for one, two in zip(live.findings, again.findings, strict=True):
            assert (one.answer is None) == (two.answer is None)
            assert one.answer == pytest.approx(two.answer, abs=1e-4)
            assert one.risk == pytest.approx(two.risk, abs=1e-3)


def test_generate_asks_in_one_pass_and_hands_back_the_cache_as_it_was(guard):
    """Beside the passes of plain generate there is one; the cache that the caller gets is as long as the caption."""
    inputs = encode(guard.model, guard.processor, [s.image for s in SAMPLES], [s.prompt for s in SAMPLES]).inputs
    options = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    strict = asking(guard, hearing(guard.detector), threshold=0.05)
    with passes(guard.model) as plain:
        expected = guard.model.generate(**inputs, **options)
    with passes(guard.model) as watched:
        made = strict.generate(**inputs, **options)
    assert watched[:-1] == plain
    asked = {(b, f.claim.phrase) for b, r in enumerate(strict.reports) for f in r.findings if f.answer is not None}
    assert watched[-1][0] == len(asked) > 0
    for one, two in zip(cache_of(made).layers, cache_of(expected).layers, strict=True):
        assert torch.equal(one.keys, two.keys)


@pytest.mark.parametrize("policy", ["verify", "strict"])
def test_the_labs_own_detector_verifies(guard, policy):
    """The policies that come along run with what ships. What the lab model answers carries nothing, and moves little."""
    asked = GazeGuard(guard.model, guard.processor, policy)
    images, captions, prompts = wrong_captions()
    for old, new in zip(guard.check_all(images, captions, prompts), asked.check_all(images, captions, prompts), strict=True):
        for before, after in zip(old.findings, new.findings, strict=True):
            assert after.answer is not None or not before.flagged
            assert after.risk == pytest.approx(before.risk, abs=0.05)
