"""The guard on the lab's own VLM: the laws of `gazeguard.trace`, and every way to be told no."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, pipeline
from transformers.generation.streamers import BaseStreamer

from gazeguard import lab
from gazeguard.detection.detector import Detector
from gazeguard.errors import InputError, MismatchError, UnsupportedError
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.policy import parse_policy
from gazeguard.report import Verdict
from gazeguard.vision.encoding import encode
from gazeguard.vision.grid import ImageGrid

SAMPLES = lab.samples("test", 6, seed=7)


def batch_of(guard, samples=SAMPLES, **changes):
    made = encode(guard.model, guard.processor, [s.image for s in samples], [s.prompt for s in samples])
    return {**made.inputs, "max_new_tokens": 60, "do_sample": False, **changes}


def assert_same_trace(one, other, tolerance=1e-4):
    assert one.text == other.text
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_array_equal(one.offsets, other.offsets)
    for name in ("gaze", "segment_mass", "attribution", "attended_logprob", "internal_confidence", "logprobs", "entropy"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=tolerance, err_msg=name)


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 3}])
def test_mark_writes_what_plain_generate_writes(guard, how):
    """Law (e): the ids are identical, greedy, sampled and several per prompt; there is one report per row."""
    inputs = batch_of(guard, **how)
    torch.manual_seed(0)
    plain = guard.model.generate(**inputs)
    torch.manual_seed(0)
    assert torch.equal(guard.generate(**inputs), plain)
    assert len(guard.reports) == len(plain)


def test_a_loop_that_is_handed_pictures_in_another_order_refuses(guard):
    """For two beams generate makes g0 g0 g1 g1 of a row's grids g0 g1, where g0 g1 g0 g1 would be right."""
    inputs = batch_of(guard, SAMPLES[:1], num_beams=2)
    made = guard.model.generate(**inputs, custom_generate=guard)
    assert torch.equal(made, guard.generate(**inputs))
    config = guard.model._prepare_generation_config(None, num_beams=2)[0]
    with pytest.raises(UnsupportedError, match=r"in another order .* Call guard\.generate with the same arguments"):
        guard(guard.model, inputs["input_ids"], [], [], config, image_grid_thw=torch.ones(2, 3))


def test_replay_equals_live(guard):
    """Law (b): checking the caption that was generated gives the trace of its generation."""
    guard.generate(**batch_of(guard, max_new_tokens=200))
    live = guard.reports
    for sample, report in zip(SAMPLES, live, strict=True):
        replayed = guard.check(sample.image, report.caption, sample.prompt)
        assert_same_trace(replayed.trace, report.trace)
        assert [f.flagged for f in replayed.findings] == [f.flagged for f in report.findings]


def test_a_padded_batch_equals_its_single_rows(guard):
    """Law (d), live and replayed: prompts and captions of different lengths, together and alone."""
    prompts = ["Describe the picture.", "Is there a red star in panel one?", "Name one object."]
    images = [s.image for s in SAMPLES[:3]]
    made = encode(guard.model, guard.processor, images, prompts)
    assert not made.prompt_mask.bool().all(), "the law needs padding"
    guard.generate(**made.inputs, max_new_tokens=40, do_sample=False)
    together = guard.reports
    for report, image, prompt in zip(together, images, prompts, strict=True):
        alone = guard.caption(image, prompt, max_new_tokens=40, do_sample=False)
        assert_same_trace(alone.trace, report.trace)
    captions = [s.turns[0].answer for s in SAMPLES]
    replayed = guard.check_all([s.image for s in SAMPLES], captions)
    for report, sample, caption in zip(replayed, SAMPLES, captions, strict=True):
        assert_same_trace(guard.check(sample.image, caption).trace, report.trace)
    answered = guard.check_all([s.image for s in SAMPLES], captions, [s.prompt for s in SAMPLES])
    for report, sample, caption in zip(answered, SAMPLES, captions, strict=True):
        assert_same_trace(guard.check(sample.image, caption, sample.prompt).trace, report.trace)


def test_a_claim_about_what_is_not_there_is_no_second_flag(guard):
    """Of an invented thing only the thing is flagged; of a real one its false colour is, and the words say which."""
    sample = next(s for s in lab.samples("test", 20, seed=7) if s.drawing.panels and s.drawing.in_panel(0)[0].colour != "green")
    thing = sample.drawing.in_panel(0)[0]
    absent = next(noun for noun in ("skull", "castle", "anchor") if noun not in {t.noun for t in sample.drawing.objects})
    invented = guard.check(sample.image, f"In panel one there is a green {absent}.", sample.prompt)
    assert [f.claim.kind for f in invented.findings if f.flagged] == ["object"]
    recoloured = guard.check(sample.image, f"In panel one there is a green {thing.noun}.", sample.prompt)
    assert [str(f.claim) for f in recoloured.findings if f.flagged] == [f"green (a green {thing.noun})"]
    assert recoloured.reason == f"not supported by the image: green (a green {thing.noun})"


def test_a_number_that_is_not_finite_leaves_the_caption_unchecked(lab_vlm):
    """Weights that overflow: no risk is made of them, and nothing passes."""
    model, processor = copy.deepcopy(lab_vlm[0]), lab_vlm[1]
    guard = GazeGuard(model, processor)
    with torch.no_grad():
        guard.tracer.recorder.backbone.norm.weight[0] = torch.inf
    report = guard.check(SAMPLES[0].image, "There is a red star.", SAMPLES[0].prompt)
    assert report.verdict == Verdict.UNCHECKED
    assert report.reason.startswith("the model gave no finite number for ")


def test_three_ways_in_are_one(guard):
    """generate, watch and custom_generate give the same ids and traces."""
    inputs = batch_of(guard)
    ids, reports = guard.generate(**inputs), guard.reports
    with guard.watch() as same:
        assert same is guard
        watched = guard.model.generate(**inputs)
        traces = [report.trace for report in guard.reports]
        positional = dict(inputs)
        assert torch.equal(guard.model.generate(positional.pop("input_ids"), **positional), ids)
    handed = guard.model.generate(**inputs, custom_generate=guard)
    assert torch.equal(ids, watched)
    assert torch.equal(ids, handed)
    for first, second, third in zip(reports, traces, guard.reports, strict=True):
        assert_same_trace(first.trace, second, 0)
        assert_same_trace(first.trace, third.trace, 0)


def test_leaving_the_watch_restores_the_model_after_an_exception_too(guard):
    """Law (f): nothing of the watch is left on the model or its modules."""

    class Breaks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("in the middle of it")

    def state():
        return [(set(module.__dict__), len(module._forward_pre_hooks)) for module in guard.model.modules()]

    before, inputs = state(), batch_of(guard)
    plain = guard.model.generate(**inputs)
    with pytest.raises(RuntimeError, match="in the middle of it"), guard.watch():
        guard.model.generate(**inputs, logits_processor=LogitsProcessorList([Breaks()]))
    assert state() == before
    assert "generate" not in vars(guard.model)
    assert torch.equal(guard.model.generate(**inputs), plain)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"use_cache": False, "max_new_tokens": 12},
        {"cache_implementation": "static"},
        {"guidance_scale": 1.2},
        {"repetition_penalty": 1.1},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda how: " ".join(how),
)
def test_every_way_of_generating_is_watched(guard, how):
    """The ids are those of plain generate, and the trace is the one that checking the same caption gives."""
    samples = SAMPLES[:1] if "prompt_lookup_num_tokens" in how else SAMPLES
    inputs = batch_of(guard, samples, **{"max_new_tokens": 150, **how})
    torch.manual_seed(0)
    plain = guard.model.generate(**inputs)
    torch.manual_seed(0)
    assert torch.equal(guard.generate(**inputs), plain)
    copies = how.get("num_return_sequences", 1)
    assert len(guard.reports) == copies * len(samples)
    for report, sample in zip(guard.reports, [s for s in samples for _ in range(copies)], strict=True):
        assert_same_trace(guard.check(sample.image, report.caption, sample.prompt).trace, report.trace)


def test_a_decode_loop_of_ones_own_is_watched(guard):
    """custom_generate takes a function, as model.generate does."""

    def first_word_thrice(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        best = model(input_ids=input_ids, **{k: v for k, v in inputs.items() if k != "use_cache"}).logits[:, -1:].argmax(-1)
        return torch.cat((input_ids, best), dim=1)

    inputs = batch_of(guard)
    made = guard.generate(**inputs, custom_generate=first_word_thrice)
    assert torch.equal(made, guard.model.generate(**{**inputs, "max_new_tokens": 1}))
    assert [len(report.trace) for report in guard.reports] == [1] * len(SAMPLES)


def test_a_pipeline_is_watched(guard):
    """transformers' own pipeline calls generate, so a watch around it sees what it writes."""
    sample = SAMPLES[1]
    pipe = pipeline("image-text-to-text", model=guard.model, processor=guard.processor)
    content = [{"type": "image", "image": sample.image}, {"type": "text", "text": sample.prompt}]
    talk = [{"role": "user", "content": content}]
    with guard.watch():
        told = pipe(text=talk, max_new_tokens=60, do_sample=False, return_full_text=False)
    assert told[0]["generated_text"] == guard.reports[0].caption
    assert_same_trace(guard.check(sample.image, guard.reports[0].caption, sample.prompt).trace, guard.reports[0].trace)


RERANKS = [
    {"attribution": 5.0, "plausible": 0.01},
    {"attribution": 0.0, "plausible": 0.001, "attended_logprob": 2.0, "end_bonus": 2.0},
]


@pytest.mark.parametrize("rerank", RERANKS, ids=["attribution", "attended_logprob"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rerank_works_while_beams_change_places_and_guesses_are_taken_back(guard, beams, rerank):
    """Rerank reads the row of the word that is being chosen, whatever else the pass held."""
    strong, moved = GazeGuard(guard.model, guard.processor, parse_policy({"version": 1, "name": "r", "rerank": rerank})), 0
    for sample in SAMPLES:
        inputs = batch_of(guard, [sample], num_beams=beams)
        ids = strong.generate(**inputs)
        moved += not torch.equal(ids, guard.model.generate(**inputs))
        if beams == 1:
            assert torch.equal(strong.generate(**inputs, prompt_lookup_num_tokens=3), ids)
        caption = strong.reports[0].caption
        assert_same_trace(guard.check(sample.image, caption, sample.prompt).trace, strong.reports[0].trace)
    assert moved, "a test of rerank needs a word that moves"


def test_a_dict_result_and_scores_pass_through(guard):
    """What generate is asked to return, it returns."""
    inputs = batch_of(guard, return_dict_in_generate=True, output_logits=True)
    plain, watched = guard.model.generate(**inputs), guard.generate(**inputs)
    assert torch.equal(plain.sequences, watched.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, watched.logits, strict=True))


def test_a_streamer_gets_every_token(guard):
    """Streaming works as without the guard: the prompt, then each token, then the end."""

    class Keeps(BaseStreamer):
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    inputs = batch_of(guard, SAMPLES[:1])
    plain, watched = Keeps(), Keeps()
    guard.model.generate(**inputs, streamer=plain)
    guard.generate(**inputs, streamer=watched)
    assert watched.ended
    assert watched.ids == plain.ids


@pytest.mark.parametrize("rerank", RERANKS, ids=["attribution", "attended_logprob"])
def test_rerank_of_no_strength_is_plain_and_of_some_is_not(guard, rerank):
    """Strength 0 equals plain generate; a strength moves words, and the trace is still that of what was written."""
    none = {key: value if key == "plausible" else 0.0 for key, value in rerank.items()}
    off, on = (parse_policy({"version": 1, "name": "r", "rerank": own}) for own in (none, rerank))
    inputs = batch_of(guard)
    plain = guard.model.generate(**inputs)
    assert torch.equal(GazeGuard(guard.model, guard.processor, off).generate(**inputs), plain)
    strong = GazeGuard(guard.model, guard.processor, on)
    assert not torch.equal(strong.generate(**inputs), plain)
    for sample, report in zip(SAMPLES, strong.reports, strict=True):
        if report.trace.finished:
            assert_same_trace(guard.check(sample.image, report.caption, sample.prompt).trace, report.trace)


def test_boxes_are_in_pixels_of_the_picture_that_was_given(guard):
    """A larger copy of the same picture gives the same gaze, in larger boxes."""
    sample = SAMPLES[1]
    small = guard.check(sample.image, sample.turns[0].answer)
    large = guard.check(sample.image.resize((288, 288), 0), sample.turns[0].answer)
    assert (small.trace.grid.sizes, large.trace.grid.sizes) == (((144, 144),), ((288, 288),))
    for one, two in zip(small.findings, large.findings, strict=True):
        assert two.box[2] - two.box[0] > 23, "a cell of the large picture is 24 pixels wide"
        assert one.box == pytest.approx(tuple(edge / 2 for edge in two.box), abs=30)


@pytest.mark.parametrize("side", [144, 288])
def test_live_boxes_are_where_replay_sees_them(guard, side):
    """A generated caption's boxes are in the same pixels as those of its check, whatever the picture's size."""
    picture = SAMPLES[1].image.resize((side, side), 0)
    live = guard.caption(picture, SAMPLES[1].prompt, do_sample=False)
    replayed = guard.check(picture, live.caption, SAMPLES[1].prompt)
    assert live.trace.grid.sizes == ((side, side),)
    assert [finding.box for finding in live.findings] == [finding.box for finding in replayed.findings]


def test_boxes_of_a_bare_generate_are_in_the_processors_pixels(guard):
    """Without sizes the boxes are those of a picture as the processor made it, for several captions per prompt, too."""
    guard.generate(**batch_of(guard, num_return_sequences=2, do_sample=True))
    assert {report.trace.grid.sizes for report in guard.reports} == {((144, 144),)}
    inputs = batch_of(guard, num_return_sequences=2, do_sample=True)
    guard.generate(**inputs, picture_sizes=[[(10 * i, 20)] for i in range(1, 7)])
    assert [report.trace.grid.sizes[0][0] for report in guard.reports] == [10 * i for i in range(1, 7) for _ in (0, 1)]


def test_a_grid_that_the_caller_knows_takes_the_place_of_the_rules(guard):
    """The same grid gives the same trace; another number of cells is refused with both numbers."""
    sample = SAMPLES[1]
    own = GazeGuard(guard.model, guard.processor, grid=ImageGrid.regular(12, 12, (1, 1)))
    one, two = (g.check(sample.image, sample.turns[0].answer) for g in (guard, own))
    assert_same_trace(one.trace, two.trace, 0)
    assert [f.box for f in one.findings] == [f.box for f in two.findings]
    short = GazeGuard(guard.model, guard.processor, grid=ImageGrid.regular(3, 3, (1, 1)))
    with pytest.raises(InputError, match="has 9 boxes, but the prompt has 144 image tokens"):
        short.caption(sample.image)


# -------------------------------------------------------------------------------------------------------- unchecked


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "the caption is empty"),
        ("  \n", "the caption is empty"),
        ("It is very nice here.", "names nothing that could be checked"),
        ("There is a red star. " * 600, "more than the model's context of 2048"),
    ],
)
def test_what_cannot_be_checked_is_unchecked_and_says_why(guard, caption, reason):
    """Law (g): never a pass."""
    report = guard.check(SAMPLES[0].image, caption)
    assert report.verdict is Verdict.UNCHECKED
    assert reason in report.reason


def test_a_caption_cut_off_by_the_length_limit_does_not_pass(guard):
    """Law (g): a truncated caption is flagged or unchecked."""
    for sample in SAMPLES:
        report = guard.caption(sample.image, sample.prompt, max_new_tokens=8, do_sample=False)
        assert not report.trace.finished
        assert report.verdict is not Verdict.PASS


def test_without_a_detector_everything_is_watched_and_nothing_judged(lab_vlm):
    """No detector, no verdict."""
    heads = GazeHeads.from_pretrained(lab.checkpoint_path() / "heads.json")
    report = GazeGuard(*lab_vlm, heads=heads).check(SAMPLES[0].image, "There is a red star.")
    assert report.verdict is Verdict.UNCHECKED
    assert "no detector" in report.reason
    assert report.trace is not None


def test_one_bad_row_does_not_cost_the_others(guard):
    """Each row gets its own verdict; the good rows get the one they get alone."""
    good = SAMPLES[1]
    rows = [(good.image, good.turns[0].answer), ("nowhere.png", "A red star."), (good.image, ""), (b"no picture", "A star.")]
    rows.append((good.image, "There is a red star. " * 600))
    reports = guard.check_all(*zip(*rows, strict=True))
    assert_same_trace(reports[0].trace, guard.check(*rows[0]).trace)
    assert [r.verdict is Verdict.UNCHECKED for r in reports[1:]] == [True] * 4
    assert "cannot be opened" in reports[1].reason
    assert "not a picture" in reports[3].reason


# ------------------------------------------------------------------------------------------------------ clear errors


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"cache_implementation": "paged"}, "continuous batching.*Generate with generate, and check_all"),
        ({"use_cache": False, "guidance_scale": 2.0}, "guidance without a cache. Generate with use_cache=True"),
        ({"token_healing": True}, "token healing.*token_healing=False"),
        ({"custom_generate": "someone/loop"}, "runs no code from the hub.*Pass a function"),
    ],
)
def test_ways_of_generating_that_cannot_be_watched_are_refused_by_name(guard, how, told):
    """Never a silent gap: the message names the way out."""
    with pytest.raises(UnsupportedError, match=told):
        guard.generate(**batch_of(guard, SAMPLES[:1], **how))


def test_continuous_batching_is_refused_inside_a_watch(guard):
    """generate_batch would go by unseen."""
    with guard.watch(), pytest.raises(UnsupportedError, match=r"cannot watch generate_batch.*Use generate"):
        guard.model.generate_batch([[1, 2, 3]])
    assert "generate_batch" not in vars(guard.model)


def test_a_prompt_without_a_picture_is_refused(guard):
    """The picture did not reach the prompt: an error, not an empty gaze."""
    text = guard.processor.tokenizer("Describe the picture.", return_tensors="pt")
    with pytest.raises(InputError, match=r"no image token .* did not reach the prompt"):
        guard.generate(**text, max_new_tokens=3)


def test_two_pictures_where_one_is_expected(guard):
    """check and caption take one picture; a list is refused or unchecked with the reason."""
    pair = [SAMPLES[0].image, SAMPLES[1].image]
    assert "Expected one picture" in guard.check(pair, "A red star.").reason
    with pytest.raises(InputError, match="Expected one picture"):
        guard.caption(pair)


def test_two_pictures_in_one_prompt_are_watched(guard):
    """generate takes what the processor makes: the cells of both pictures, each with its own number."""
    images = [SAMPLES[0].image, SAMPLES[1].image]
    content = [{"type": "image", "image": image} for image in images]
    talk = [{"role": "user", "content": [*content, {"type": "text", "text": "Describe the picture."}]}]
    inputs = guard.processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    guard.generate(**inputs, max_new_tokens=4)
    grid = guard.reports[0].trace.grid
    assert np.bincount(grid.image).tolist() == [144, 144]
    assert len(grid.sizes) == 2


def test_a_text_only_model_is_refused(lab_vlm):
    """No image token, no gaze."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    with pytest.raises(UnsupportedError, match="text-only model"):
        GazeGuard(LlamaForCausalLM(config), lab_vlm[1])


def test_an_eager_model_is_watched(lab_vlm, guard):
    """Another attention implementation, the same trace."""
    model = copy.deepcopy(lab_vlm[0])
    model.set_attn_implementation("eager")
    twin = GazeGuard(model, lab_vlm[1], heads=guard.heads, detector=guard.detector)
    sample = SAMPLES[1]
    assert_same_trace(*(g.check(sample.image, sample.turns[0].answer).trace for g in (guard, twin)))


def test_heads_and_detectors_of_another_model_are_refused(lab_vlm):
    """Law (h)."""
    heads = GazeHeads.from_pretrained(lab.checkpoint_path() / "heads.json")
    with pytest.raises(MismatchError, match=r"another model .* find_heads\(model, processor\)"):
        GazeGuard(*lab_vlm, heads=heads.model_copy(update={"model": "0" * 16}))
    detector = Detector.from_pretrained(lab.checkpoint_path())
    for change in ({"model": "0" * 16}, {"heads": ((0, 0),)}):
        with pytest.raises(MismatchError, match="Fit a detector on traces of these heads"):
            GazeGuard(*lab_vlm, heads=heads, detector=detector.model_copy(update=change))


def test_a_model_without_heads_is_told_how_to_find_them(lab_vlm):
    """The first thing that a new user meets."""
    model = copy.deepcopy(lab_vlm[0])
    model.config._name_or_path = model.name_or_path = "somewhere/else"
    with pytest.raises(
        InputError,
        match=r"^No gaze heads for somewhere/else\. Run `gazeguard heads somewhere/else --out DIR`, then pass `--artifacts",
    ):
        GazeGuard(model, lab_vlm[1])


def test_a_model_is_watched_once_at_a_time(guard):
    """A second watch is refused, and the first goes on."""
    with guard.watch():
        with pytest.raises(UnsupportedError, match="Leave the other watch first"), guard.watch():
            pass
        assert "generate" in vars(guard.model)


def test_what_is_left_of_a_caption_is_as_the_policy_says(guard):
    """mark lets the caption through, drop cuts what is flagged and nothing else, abstain gives nothing, with the reason."""
    sample = next(s for s in lab.samples("test", 20, seed=7) if not s.drawing.panels and len(s.drawing.objects) == 2)
    one, two = sample.drawing.objects
    absent = next(noun for noun in ("skull", "castle", "anchor") if noun not in {one.noun, two.noun})
    wrong = f"There is a {one.colour} {one.noun} {one.location}, a green {absent} in the middle and a {two.colour} {two.noun}."
    dropped = f"There is a {one.colour} {one.noun} {one.location} and a {two.colour} {two.noun}."
    right = f"There is a {one.colour} {one.noun} {one.location}."
    expected = {"keep": (wrong, right), "drop": (dropped, right), "abstain": ("", right)}
    for left, texts in expected.items():
        policy = parse_policy({"version": 1, "name": "own", "threshold": 0.5, "on_flag": left})
        strict = GazeGuard(guard.model, guard.processor, policy)
        reports = [strict.check(sample.image, text, sample.prompt) for text in (wrong, right)]
        assert tuple(report.filtered_caption for report in reports) == texts
        assert reports[0].reason == f"not supported by the image: a green {absent}"
        assert reports[0].caption == wrong
        assert reports[0].to_dict()["filtered_caption"] == texts[0]
    assert GazeGuard(guard.model, guard.processor, "abstain").check(sample.image, "").filtered_caption == ""
