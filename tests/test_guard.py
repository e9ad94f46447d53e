"""The guard on the lab's own VLM: the laws of `gazeguard.trace`, and every way to be told no."""

import copy

import pytest
import torch
from guardkit import SAMPLES, assert_same_trace, batch_of
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, pipeline
from transformers.generation.streamers import BaseStreamer

from gazeguard import lab
from gazeguard.detection.detector import Detector
from gazeguard.errors import InputError, MismatchError, UnsupportedError
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads

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


# -------------------------------------------------------------------------------------------------------- unchecked


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


def test_a_text_only_model_is_refused(lab_vlm):
    """No image token, no gaze."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    with pytest.raises(UnsupportedError, match="text-only model"):
        GazeGuard(LlamaForCausalLM(config), lab_vlm[1])


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
