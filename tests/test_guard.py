"""The guard on the lab's own VLM: the invariants of `gazeguard.trace`, what opens a guard, and every refusal."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from guardkit import SAMPLES, assert_same_trace, batch_of
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, pipeline
from transformers.generation.streamers import BaseStreamer

from gazeguard import lab
from gazeguard.detection.detector import Detector
from gazeguard.errors import ArtifactError, GazeGuardError, InputError, MismatchError, UnsupportedError
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.report import Verdict


class Collected(BaseStreamer):
    """What a streamer is given."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


# -------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 3}])
def test_mark_writes_what_plain_generate_writes(guard, how):
    """Invariant (e): the ids are identical, greedy, sampled and several per prompt; there is one report per row."""
    inputs = batch_of(guard, **how)
    torch.manual_seed(0)
    plain = guard.model.generate(**inputs)
    torch.manual_seed(0)
    assert torch.equal(guard.generate(**inputs), plain)
    assert len(guard.reports) == len(plain)


def test_unusable_gaze_heads_judge_nothing_and_steer_nothing(guard):
    """What generate writes is unchecked for that reason, and policies that need a detector are refused."""
    heads = guard.heads.model_copy(update={"unusable": "No head follows the narration. Find others."})
    blind = GazeGuard(guard.model, guard.processor, heads=heads, detector=guard.detector)
    blind.generate(**batch_of(guard))
    assert {(report.verdict, report.reason) for report in blind.reports} == {("unchecked", "No head follows the narration")}
    with pytest.raises(UnsupportedError, match="No head follows the narration"), blind.steer((0, 0, 8, 8)):
        pass
    with pytest.raises(InputError, match="No head follows the narration"):
        GazeGuard(guard.model, guard.processor, "rewind", heads=heads, detector=guard.detector)


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
    """Invariant (f): nothing of the watch is left on the model or its modules."""

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

    inputs = batch_of(guard, SAMPLES[:1])
    plain, watched = Collected(), Collected()
    guard.model.generate(**inputs, streamer=plain)
    guard.generate(**inputs, streamer=watched)
    assert watched.ended
    assert watched.ids == plain.ids
    handed = Collected()
    ids = guard.model.generate(**inputs, streamer=handed, custom_generate=guard)
    assert handed.ended
    assert handed.ids == plain.ids == ids[0].tolist()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"streamer": Collected(), "num_beams": 2}, "cannot stream beams. Use num_beams=1"),
        ({"assistant_model": "the model itself"}, r"cannot speculate\. Call guard\.generate"),
        ({"prompt_lookup_num_tokens": 3}, r"cannot speculate\. Call guard\.generate"),
    ],
)
def test_what_a_handed_loop_cannot_do_is_refused(guard, how, message):
    """transformers would leave streamer and assistant out without a word."""
    how = {name: guard.model if name == "assistant_model" else value for name, value in how.items()}
    with pytest.raises(UnsupportedError, match=message):
        guard.model.generate(**batch_of(guard, SAMPLES[:1]), custom_generate=guard, **how)


@pytest.mark.parametrize("policy", ["drop", "abstain", "strict"])
def test_nothing_is_streamed_that_the_policy_may_withhold(guard, policy):
    """A streamer shows a caption before it is judged: refused by name, on both ways in, before anything is shown."""
    withholding, shown = GazeGuard(guard.model, guard.processor, policy), Collected()
    inputs = batch_of(guard, SAMPLES[:1])
    with pytest.raises(UnsupportedError, match=r"lets through only what is left.*show report\.filtered_caption"):
        withholding.generate(**inputs, streamer=shown)
    with pytest.raises(UnsupportedError, match=r"lets through only what is left.*show report\.filtered_caption"):
        guard.model.generate(**inputs, streamer=Collected(), custom_generate=withholding)
    assert shown.ids == []


def test_generation_without_an_end_token_warns(guard, caplog):
    """The caption runs to its limit, is cut off, and never passes; the log says what to set."""
    inputs = batch_of(guard, SAMPLES[:1], max_new_tokens=12)
    guard.generate(**inputs)
    assert not caplog.records
    config = copy.deepcopy(guard.model.generation_config)
    config.update(eos_token_id=None, max_new_tokens=12, do_sample=False)
    before, guard.model.generation_config = guard.model.generation_config, config
    eos, guard.model.config.text_config.eos_token_id = guard.model.config.text_config.eos_token_id, None
    try:
        guard.generate(**inputs)
    finally:
        guard.model.generation_config, guard.model.config.text_config.eos_token_id = before, eos
    (record,) = caplog.records
    assert record.name == "gazeguard"
    assert "has no eos_token_id" in record.message
    assert guard.reports[0].verdict is not Verdict.PASS
    assert guard.reports[0].reason.endswith("the caption was cut off by the length limit")


def test_reports_come_as_a_result_too(guard):
    """generate_with_reports returns what generate returns, and its reports; guard.reports is left alone."""
    inputs = batch_of(guard, SAMPLES[:2])
    ids = guard.generate(**inputs)
    before = guard.reports
    output, reports = guard.generate_with_reports(**inputs, return_dict_in_generate=True)
    assert guard.reports is before
    assert torch.equal(output.sequences, ids)
    assert [report.to_dict() for report in reports] == [report.to_dict() for report in before]


def test_two_guards_in_two_threads_never_mix(guard):
    """While one records, the other is refused by name; in turn each gets its own results."""
    other = GazeGuard(guard.model, guard.processor)
    alone = [
        g.generate_with_reports(**batch_of(guard, [sample]))[1] for g, sample in zip((guard, other), SAMPLES, strict=False)
    ]
    inside, refused = threading.Event(), threading.Event()

    class Waits(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inside.set()
            assert refused.wait(60)
            return scores

    with ThreadPoolExecutor(2) as pool:
        inputs = batch_of(guard, SAMPLES[:1], logits_processor=LogitsProcessorList([Waits()]))
        first = pool.submit(guard.generate_with_reports, **inputs)
        assert inside.wait(60)
        second = pool.submit(other.generate_with_reports, **batch_of(guard, [SAMPLES[1]]))
        with pytest.raises(UnsupportedError, match="recorded already, by another guard or recorder or in another thread"):
            second.result(60)
        refused.set()
        assert_same_trace(first.result(60)[1][0].trace, alone[0][0].trace, 0)
        again = pool.submit(other.generate_with_reports, **batch_of(guard, [SAMPLES[1]]))
        assert_same_trace(again.result(60)[1][0].trace, alone[1][0].trace, 0)


# --------------------------------------------------------------------------------------------------- opening a guard


def test_a_guard_says_in_one_line_what_it_is(guard, lab_vlm):
    assert repr(guard) == (
        f"GazeGuard(Idefics3ForConditionalGeneration, policy 'mark', {len(guard.heads.heads)} gaze heads, "
        "detector of object, attribute, location)"
    )
    assert repr(GazeGuard(*lab_vlm, heads=guard.heads)).endswith("gaze heads, no detector)")


def test_a_model_in_one_folder_and_artifacts_in_another(guard, tmp_path):
    """save_pretrained and from_pretrained: the same reports; a folder of heads alone gives a guard without a detector."""
    model, artifacts, heads = tmp_path / "model", tmp_path / "artifacts", tmp_path / "heads"
    guard.model.save_pretrained(model)
    guard.processor.save_pretrained(model)
    guard.save_pretrained(artifacts)
    assert {"heads.json", "detector.json", "README.md"} <= {path.name for path in artifacts.iterdir()}
    with pytest.raises(InputError, match=rf"No gaze heads for {model}\. Run `gazeguard fit {model} --out DIR`"):
        GazeGuard.from_pretrained(model, device="cpu")
    again = GazeGuard.from_pretrained(model, artifacts=artifacts, device="cpu", policy="drop")
    assert (again.policy.name, again.heads, again.detector) == ("drop", guard.heads, guard.detector)
    sample = SAMPLES[1]
    reports = [g.check(sample.image, sample.turns[0].answer, sample.prompt) for g in (guard, again)]
    assert reports[0].to_dict()["phrases"] == reports[1].to_dict()["phrases"]
    GazeGuard(guard.model, guard.processor, heads=guard.heads).save_pretrained(heads)
    assert GazeGuard.from_pretrained(model, artifacts=heads, device="cpu").detector is None
    with pytest.raises(InputError, match=rf"No gaze heads for {model} in {model}\. Run"):
        GazeGuard.from_pretrained(model, artifacts=model, device="cpu")


def test_artifacts_from_the_hub(guard, lab_vlm, tmp_path, monkeypatch):
    """A repository without a detector gives none; any other trouble is an error."""
    guard.save_pretrained(tmp_path)

    def download(repo_id, name, **_):
        assert repo_id == "someone/artifacts"
        if name == missing:
            raise error(f"404: no {name}")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)  # the repository is there
    missing = None
    assert GazeGuard(*lab_vlm, artifacts="someone/artifacts").detector == guard.detector
    missing = "detector.json"
    for error in (type("EntryNotFoundError", (OSError,), {}), OSError):
        if error is OSError:
            with pytest.raises(ArtifactError, match=r"no detector\.json from the hub's repository \(404"):
                GazeGuard(*lab_vlm, artifacts="someone/artifacts")
        else:
            assert GazeGuard(*lab_vlm, artifacts="someone/artifacts").detector is None


def test_a_guard_is_pushed_to_the_hub(guard):
    class Api:
        def create_repo(self, repo_id, exist_ok):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **options):
            return f"{repo_id}: {sorted(path.name for path in Path(folder_path).iterdir())} {options}"

    pushed = guard.push_to_hub("mine", api=Api(), create_pr=True)
    assert pushed == "me/mine: ['README.md', 'detector.json', 'heads.json', 'reliability.png'] {'create_pr': True}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "someone/model"}, r"got 'someone/model' in place of a model\. Use GazeGuard\.from_pretrained\('someone/mo"),
        ({"model": Path("folder")}, r"Use GazeGuard\.from_pretrained\('folder'\)"),
        ({"model": torch.nn.Linear(1, 1)}, "got a Linear in place of a model; expected a vision-language model of transf"),
        ({"model": None}, "got a NoneType in place of a model"),
        ({"processor": None}, r"There is no processor\. Pass AutoProcessor\.from_pretrained"),
        (
            {"processor": "tokenizer"},
            r"is a tokenizer; expected the model's whole processor",
        ),
        ({"policy": 3}, r"policy is 3; expected the name of a policy \(abstain, .*\), the path of a \.yaml file, or a Policy"),
        ({"policy": None}, "policy is None; expected the name of a policy"),
        ({"heads": [(1, 2)]}, r"heads is \[\(1, 2\)\]; expected GazeHeads, or the path or hub id"),
        ({"detector": 0.5}, r"detector is 0\.5; expected Detector, or the path or hub id"),
    ],
)
def test_a_wrong_kind_of_argument_is_one_sentence(lab_vlm, arguments, message):
    given = {"model": lab_vlm[0], "processor": lab_vlm[1], **arguments}
    if given["processor"] == "tokenizer":
        given["processor"] = lab_vlm[1].tokenizer
    with pytest.raises(GazeGuardError, match=message) as caught:
        GazeGuard(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [[(144, 144)], (144, 144), [], [[(144, 144)]] * 5, [["wide"]], 7])
def test_image_sizes_one_bracket_short_are_one_sentence(guard, sizes):
    with pytest.raises(InputError, match=r"picture_sizes is .*; expected for each of the 2 prompts .* \[\[\(640, 480\)\]\]"):
        guard.generate(**batch_of(guard, SAMPLES[:2]), picture_sizes=sizes)


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


def test_a_prompt_without_a_image_is_refused(guard):
    """The image did not reach the prompt: an error, not an empty gaze."""
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
    """Invariant (h)."""
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
        match=r"^No gaze heads for somewhere/else\. Run `gazeguard fit somewhere/else --out DIR`, then pass `--artifacts",
    ):
        GazeGuard(model, lab_vlm[1])


def test_a_model_is_watched_once_at_a_time(guard):
    """A second watch is refused, and the first goes on."""
    with guard.watch():
        with pytest.raises(UnsupportedError, match="Leave the other watch first"), guard.watch():
            pass
        assert "generate" in vars(guard.model)


# --------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["mark", "rewind", "rerank", "strict"])
def test_a_guard_on_the_gpu_writes_watches_and_checks(policy, dtype):
    """Every policy runs on the GPU, its traces are finite, and replay finds what was recorded live."""
    guard = GazeGuard.from_pretrained("lab", device="cuda", dtype=dtype, policy=policy)
    inputs = batch_of(guard)
    assert inputs["input_ids"].device.type == "cuda"
    ids, reports = guard.generate_with_reports(**inputs)
    assert ids.device.type == "cuda"
    if policy == "mark":
        assert torch.equal(ids, guard.model.generate(**inputs))
    replayed = guard.check_all([s.image for s in SAMPLES], [r.caption for r in reports], [s.prompt for s in SAMPLES])
    for live, again in zip(reports, replayed, strict=True):
        assert_same_trace(again.trace, live.trace, 1e-3 if dtype == "float32" else 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_is_watched_wherever_accelerate_puts_it():
    guard = GazeGuard.from_pretrained("lab", device_map="auto")
    sample = SAMPLES[1]
    reference = GazeGuard.from_pretrained("lab", device="cpu").check(sample.image, sample.turns[0].answer, sample.prompt)
    assert_same_trace(guard.check(sample.image, sample.turns[0].answer, sample.prompt).trace, reference.trace, 1e-3)
