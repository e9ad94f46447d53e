"""Every way of generating is captured: each row is the one that a plain pass over the generated tokens would give.

The truth is always the same: one forward pass of eager attention over one row's prompt and what was written after it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import CACHE, IMAGE, Family, family, gemma3, llava_mistral
from families.kernels import flash_by_hand, flash_on_cpu, flex_on_cpu, use_kernel
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    cache_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from evals.host_waits import Waits
from gazeguard.attention.attribution import token_statistics, top_k_statistics
from gazeguard.attention.backbone import find_backbone
from gazeguard.attention.buffers import CapturedActivations
from gazeguard.attention.kernels import Call, dense_mask, flash_mask
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.recording import Recording
from gazeguard.attention.scores import attention_weights
from gazeguard.heads.artifact import fingerprint
from gazeguard.vision.inputs import model_inputs

NEW = 8
NAMES = ("Idefics3", "Qwen3-VL", "LLaVA")


pytestmark = pytest.mark.usefixtures("quietly")


def prompts_of(inputs: dict[str, Tensor]) -> KeyLayout:
    return KeyLayout.from_ids(inputs["input_ids"], inputs["attention_mask"], IMAGE)


def live(kind: Family, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, CapturedActivations, Any]:
    """Generate in some way: the generated ids (captions, T), what was captured of them, and what generate returned."""
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(prompts_of(inputs), reordered=options.get("num_beams", 1) > 1)
        made = kind.model.generate(**inputs, **options)
        rows = recorder.collect(getattr(made, "beam_indices", None))
    return made.sequences[:, inputs["input_ids"].shape[1] :], rows, made


def truth(kind: Family, row: int, written: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eager attention (T, H, S) of the rows that predict ``generated`` (T,) in row ``row``, its image columns, and the
    final states (T, width).
    """
    alone = kind.batch([row])
    whole = kind.extended(alone, written[None])
    twin = copy.deepcopy(kind.model)
    twin.set_attn_implementation("eager")
    states: list[Tensor] = []
    handle = find_backbone(twin).norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    attentions = twin(**model_inputs(twin, whole), use_cache=False, output_attentions=True).attentions
    handle.remove()
    first = alone["input_ids"].shape[1] - 1
    steps = slice(first, first + len(written))
    image = (alone["input_ids"][0] == IMAGE).nonzero()[:, 0]
    return torch.cat(attentions, dim=1)[0, :, steps].transpose(0, 1), image, states[0][0, steps]


def assert_captured(kind: Family, written: Tensor, rows: CapturedActivations, prompts: list[int]) -> None:
    """Each caption, generated after ``prompts[i]``, was captured as a plain pass would say."""
    assert rows.gaze.shape[1] >= written.shape[1]
    logs = find_backbone(kind.model).logits(rows.hidden).float().log_softmax(-1)
    said = (rows.top_ids >= 0).all(-1)
    torch.testing.assert_close(rows.top_logprobs[said], top_k_statistics(logs)[1][said], rtol=0, atol=1e-4)
    for i, row in enumerate(prompts):
        expected, image, hidden = truth(kind, row, written[i])
        steps = written.shape[1]
        for got, want in (
            (rows.gaze[i, :steps, :, : len(image)], expected[..., image]),
            (rows.hidden[i, :steps], hidden),
            (rows.segment_mass[i, :steps].sum(-1), torch.ones(steps, expected.shape[1])),
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
        assert rows.output.shape[:3] == rows.gaze.shape[:3]


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"do_sample": True}, 1),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
        ({"num_beams": 3}, 1),
        ({"num_beams": 3, "num_return_sequences": 2}, 2),
        ({"num_beams": 2, "do_sample": True, "top_k": 0, "temperature": 2.0}, 1),
        ({"num_beams": 3, "cache_implementation": "static"}, 1),
        ({"use_cache": False}, 1),
        ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, 1),
        ({"guidance_scale": 1.5}, 1),
        ({"cache_implementation": "static"}, 1),
        ({"cache_implementation": "dynamic"}, 1),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_rows_are_those_of_the_written_words(name, options, copies):
    """Sampling, several captions per prompt, beams that change places, guidance, and caches of every kind."""
    if name == "Qwen3-VL" and "guidance_scale" in options:
        pytest.skip("transformers' guidance passes a single token to a model that expects its images again")
    kind = family(name)
    torch.manual_seed(3)
    written, rows, made = live(kind, kind.batch(), **options)
    assert_captured(kind, written, rows, [row for row in range(3) for _ in range(copies)])
    if options.get("use_cache", True):
        assert (rows.top_ids >= 0).all(), "the model said something of each"
    if "num_beams" in options and not options.get("do_sample"):
        beams = made.beam_indices
        assert (beams[:, 1:] != beams[:, :-1]).any(), "a test of beams needs beams that change places"


@pytest.mark.parametrize("make", [gemma3, llava_mistral])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}],
    ids=["dynamic", "static", "beams", "no cache"],
)
def test_sliding_windows_are_recorded(make, options):
    """Layers that forget old keys, beside layers that see everything: what has left the window holds nothing."""
    kind = make(12)
    written, rows, _ = live(kind, kind.batch(), **options)
    assert_captured(kind, written, rows, [0, 1, 2])
    assert (rows.segment_mass[..., 0] == 0).any(), "a test of windows needs images that leave them"


def test_a_static_cache_that_is_larger_than_needed():
    """Room for later keys is not looked at."""
    kind = family("LLaVA")
    cache = StaticCache(kind.model.config.get_text_config(), 100)
    written, rows, _ = live(kind, kind.batch(), **{CACHE: cache})
    assert_captured(kind, written, rows, [0, 1, 2])


# ---------------------------------------------------------------------------------------------------------- speculation


@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup_leaves_no_rejected_rows(name):
    """Guesses from the prompt that are rejected vanish; those accepted are rows like any other."""
    kind = family(name)
    passes: list[int] = []
    handle = find_backbone(kind.model).decoder.register_forward_pre_hook(lambda *_: passes.append(1), with_kwargs=True)
    written, rows, _ = live(kind, kind.batch([1]), prompt_lookup_num_tokens=3, max_matching_ngram_size=1, max_new_tokens=16)
    handle.remove()
    assert_captured(kind, written, rows, [1])


def test_an_assistants_guesses_are_recorded_once_they_stand():
    """Another model guesses; the watched model's rows are those of what was generated in the end."""
    kind = family("Idefics3")
    text = kind.batch([0])
    text["input_ids"][text["input_ids"] == IMAGE] = 7
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    weaker = copy.deepcopy(kind.model)
    for weight in weaker.parameters():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    plain = kind.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    told = []
    for options in ({}, {"assistant_model": weaker}):
        with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
            recorder.begin(prompts_of(inputs))
            made = kind.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
            told.append(recorder.collect())
        assert torch.equal(made, plain)
    for name in ("segment_mass", "output", "hidden"):
        left, right = (getattr(rows, name)[:, :NEW] for rows in told)
        torch.testing.assert_close(left, right, rtol=0, atol=2e-5)


# --------------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("name", NAMES)
def test_a_continued_cache_is_recorded_from_where_it_goes_on(name):
    """A second turn on the first one's cache is recorded as the same conversation in one prompt would be."""
    kind = family(name)
    inputs = kind.batch([1])
    cache = DynamicCache(config=kind.model.config.get_text_config())
    first = kind.model.generate(**inputs, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    more = torch.cat((first, torch.tensor([[9, 11, 13]])), dim=1)
    written = more[:, inputs["input_ids"].shape[1] :]
    longer = kind.extended(inputs, written)
    whole, together, _ = live(kind, longer)
    words = {name: value for name, value in longer.items() if name != "pixel_values"}  # the cache has seen the images
    again, continued, _ = live(kind, words, **{CACHE: cache})
    assert torch.equal(whole, again)
    for field in ("gaze", "segment_mass", "output", "hidden"):
        torch.testing.assert_close(getattr(continued, field), getattr(together, field), rtol=0, atol=2e-5)


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *((name, "eager") for name in (*NAMES, "PaliGemma", "AyaVision")),
        *((name, "flex_attention") for name in ("Idefics3", "LLaVA", "PaliGemma", "AyaVision")),  # all that have it
    ],
)
def test_other_kernels_are_recorded(name, kernel):
    """Eager attention says itself what it did; flex attention is read through its mask function."""
    kind = family(name)
    twin = copy.deepcopy(kind.model)
    twin.set_attn_implementation({"text_config": kernel})
    other = Family(kind.name, twin, kind.image_tokens, kind.image_inputs, kind.types)
    with flex_on_cpu():
        written, rows, _ = live(other, other.batch())
    assert_captured(kind, written, rows, [0, 1, 2])
    assert not any(
        "gazeguard" in str(module.config._attn_implementation) for module in twin.modules() if hasattr(module, "config")
    )


@pytest.fixture
def flash() -> Iterator[str]:
    """Flash attention on a CPU: transformers' own masks for it, and the arithmetic by hand."""
    with flash_on_cpu() as name:
        yield name


@pytest.mark.parametrize("make", [*(functools.partial(family, name) for name in NAMES), lambda: llava_mistral(12)])
@pytest.mark.parametrize("beams", [1, 2])
def test_flash_attention_is_recorded(make, beams, flash):
    """Its masks hold the padding alone and its windows are options; full layers and sliding ones are read right."""
    kind = make()
    twin = copy.deepcopy(kind.model)
    use_kernel(twin, flash)
    other = Family(kind.name, twin, kind.image_tokens, kind.image_inputs, kind.types)
    written, rows, _ = live(other, other.batch(), num_beams=beams)
    assert_captured(kind, written, rows, [0, 1, 2])


class Alone(nn.Module):
    """An attention module's worth of attributes."""

    layer_idx = 0


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "sliding_window"])
def test_what_alters_scores_is_honoured(option):
    """Soft caps, sinks, position biases and windows: the weights that the recorder computes give the kernel's own output."""
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, heads, 7, 16, generator=generator) for heads in (4, 2, 2))
    given = {
        "softcap": 1.5,
        "s_aux": torch.randn(4, generator=generator),
        "position_bias": torch.randn(1, 4, 7, 7, generator=generator),
        "sliding_window": 3,
    }
    options = {option: given[option]}
    call = Call(Alone(), query, key, None, {"scaling": 0.25, **options})
    mask = (dense_mask if option == "position_bias" else flash_mask)(call, 3)
    weights = attention_weights(call, query[:, :, -3:][:, [1, 2]], torch.tensor([1, 2]), mask)
    kernel = sdpa_attention_forward if option == "position_bias" else flash_by_hand
    module = Alone()
    module.num_key_value_groups = 2
    expected = kernel(module, query, key, value, None, scaling=0.25, **options)[0][:, -3:, [1, 2]]
    got = (weights @ value[:, [0, 1]]).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ what stands between


def test_compiled_decoding_is_recorded():
    """torch.compile with a static cache: the recorder's own code is left out of the graph."""
    kind = family("LLaVA")
    twin = copy.deepcopy(kind.model)
    other = Family(kind.name, twin, kind.image_tokens, kind.image_inputs, kind.types)
    how = CompileConfig(backend="eager", mode=None)
    how._compile_all_devices = True
    written, rows, _ = live(other, other.batch(), cache_implementation="static", compile_config=how)
    assert hasattr(twin, "_compiled_call"), "a test of compiled decoding needs a compiled model"
    assert_captured(kind, written, rows, [0, 1, 2])


def test_a_quantised_cache_is_recorded_as_it_is():
    """Keys that were rounded are read as they were used; the truth is eager attention over the same cache."""
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no quantised cache that needs no other package")
    kind = family("LLaVA")
    inputs = kind.batch()
    how = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "fp8"},
    }
    written, rows, _ = live(kind, inputs, **how)
    twin = copy.deepcopy(kind.model)
    twin.set_attn_implementation("eager")
    made = twin.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, output_attentions=True, return_dict_in_generate=True, **how
    )
    assert torch.equal(made.sequences[:, inputs["input_ids"].shape[1] :], written)
    for step, attentions in enumerate(made.attentions):
        last = torch.cat(attentions, dim=1)[:, :, -1]
        for row in range(3):
            image = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
            # Not closer: a key between two values of eight bits may be rounded up in one run and down in the other.
            torch.testing.assert_close(rows.gaze[row, step, :, : len(image)], last[row][:, image], rtol=0, atol=2e-3)


def test_offloaded_layers_are_recorded(tmp_path):
    """Weights that accelerate keeps on the disk until they are used."""
    pytest.importorskip("accelerate")
    kind = family("LLaVA")
    kind.model.save_pretrained(tmp_path)
    layers = {f"model.language_model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    where = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "disk",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "disk",
        **layers,
    }
    model = type(kind.model).from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "off").eval()
    assert find_backbone(model).projection(1).weight.is_meta
    assert fingerprint(model) == fingerprint(kind.model)
    other = Family(kind.name, model, kind.image_tokens, kind.image_inputs, kind.types)
    inputs = kind.batch()
    written, rows, _ = live(other, inputs)
    assert_captured(kind, written, rows, [0, 1, 2])
    _, plain, _ = live(kind, inputs)
    one, two = (
        token_statistics(find_backbone(m), find_backbone(m).heads(), r, written)
        for m, r in ((model, rows), (kind.model, plain))
    )
    for field in ("logprobs", "entropy", "attribution"):
        torch.testing.assert_close(getattr(one, field), getattr(two, field), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_a_peft_model_is_recorded():
    """A model with LoRA adapters is the same as the model with the adapters merged, attribution included."""
    peft = pytest.importorskip("peft")
    kind = family("LLaVA")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|o_proj)", init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(kind.model), config).eval()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    told = []
    for model in (wrapped, merged):
        other = Family(kind.name, model, kind.image_tokens, kind.image_inputs, kind.types)
        written, rows, _ = live(other, kind.batch())
        backbone = find_backbone(model)
        told.append((written, rows, token_statistics(backbone, backbone.heads(), rows, written)))
    (one, rows, words), (two, others, same) = told
    assert torch.equal(one, two)
    torch.testing.assert_close(rows.gaze, others.gaze, rtol=0, atol=1e-4)
    torch.testing.assert_close(words.attribution, same.attribution, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- steering


class SteerFrom(LogitsProcessor):
    """Turns attention from a certain token on."""

    def __init__(self, recorder: AttentionRecorder, bias: Tensor, step: int) -> None:
        self.recorder, self.bias, self.left = recorder, bias, step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.recorder.steer(self.bias)
        return scores


def steered(kind: Family, inputs: dict[str, Tensor], bias: Tensor | None, prompt: bool = False, step: int = 0) -> Any:
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(prompts_of(inputs))
        turn = SteerFrom(recorder, bias, step)
        if step == 0:
            recorder.steer(bias, prompt)
        made = kind.model.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([turn]),
        )
        return made, recorder.collect()


def bias_of(kind: Family, inputs: dict[str, Tensor], value: float, cell: int = 1) -> Tensor:
    prompts, heads = prompts_of(inputs), find_backbone(kind.model).heads()
    bias = torch.zeros(len(prompts.columns), len(heads), prompts.columns.shape[1])
    bias[:, :, cell] = value
    return bias


@pytest.mark.parametrize("name", [*NAMES, "PaliGemma"])
@pytest.mark.parametrize("prompt", [False, True])
def test_no_bias_changes_nothing(name, prompt):
    """A bias of zero puts every chosen row in its place, and no logit moves."""
    kind = family(name)
    inputs = kind.batch()
    plain = kind.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    made, _ = steered(kind, inputs, bias_of(kind, inputs, 0.0), prompt)
    assert torch.equal(plain.sequences, made.sequences)
    for left, right in zip(plain.logits, made.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_attention_follows_its_bias(name, kernel):
    """A large bias puts all attention on its image token and a large negative one takes all away, in every row of the batch."""
    kind = family(name)
    twin = copy.deepcopy(kind.model)
    twin.set_attn_implementation({"text_config": kernel})
    kind = Family(kind.name, twin, kind.image_tokens, kind.image_inputs, kind.types)
    inputs = kind.batch()
    _, drawn = steered(kind, inputs, bias_of(kind, inputs, 50.0))
    torch.testing.assert_close(drawn.gaze[..., 1], torch.ones_like(drawn.gaze[..., 1]), rtol=0, atol=1e-4)
    _, kept_away = steered(kind, inputs, bias_of(kind, inputs, -50.0))
    assert kept_away.gaze[..., 1].max() < 1e-6
    assert kept_away.gaze[..., 0].max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_steered_apart(name):
    """Each row has its own bias: one that is turned does not move the others."""
    kind = family(name)
    inputs = kind.batch()
    plain, _ = steered(kind, inputs, bias_of(kind, inputs, 0.0))
    bias = bias_of(kind, inputs, 0.0)
    bias[1, :, 2] = 30.0
    made, rows = steered(kind, inputs, bias)
    for step in range(NEW):
        torch.testing.assert_close(made.logits[step][[0, 2]], plain.logits[step][[0, 2]], rtol=0, atol=1e-4)
    assert (made.logits[0][1] - plain.logits[0][1]).abs().max() > 1e-2
    assert rows.gaze[1, ..., 2].min() > 0.99


def test_attention_can_be_steered_in_mid_sentence():
    """Tokens before the turn are what they were; from the next token on attention is elsewhere."""
    kind = family("Idefics3")
    inputs = kind.batch()
    plain, before = steered(kind, inputs, None, step=99)
    made, rows = steered(kind, inputs, bias_of(kind, inputs, 50.0), step=3)
    for step in range(3):
        assert torch.equal(made.logits[step], plain.logits[step])
    torch.testing.assert_close(rows.gaze[:, :3], before.gaze[:, :3], rtol=0, atol=1e-5)
    assert rows.gaze[:, 3:, :, 1].min() > 0.99


def test_a_steered_prompt_is_another_prompt():
    """With the prompt steered, too, the model is the eager one with a mask of the same bias."""
    kind = family("LLaVA")
    inputs = kind.batch([0])
    bias = bias_of(kind, inputs, 2.0)
    made, _ = steered(kind, inputs, bias, prompt=True)
    twin = copy.deepcopy(kind.model)
    twin.set_attn_implementation("eager")
    column = int(prompts_of(inputs).columns[0, 1])
    for module in find_backbone(twin).attention.values():

        def add(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"].clone()
            mask[..., column] += 2.0
            return args, {**kwargs, "attention_mask": mask}

        module.register_forward_pre_hook(add, with_kwargs=True)
    expected = twin.generate(**inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(expected.sequences, made.sequences)
    for left, right in zip(expected.logits, made.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- cost


def counted(own: Any, waits: Waits) -> Any:
    """A method of the recorder whose waiting is counted, but for that of the first pass."""

    def method(recording: Recording, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if recording.passes.seen < 0 else waits:
            return own(recording, *args, **kwargs)

    return method


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=["", "beams", "static"])
def test_the_recorder_never_waits_for_the_device(name, options, monkeypatch):
    """No tensor is turned into a number or moved inside the recorder while tokens are generated; only the first pass may."""
    kind, waits = family(name), Waits()
    for own in ("on_pass_start", "on_attention", "on_head_output", "on_final_hidden"):
        monkeypatch.setattr(Recording, own, counted(getattr(Recording, own), waits))
    live(kind, kind.batch(), **options)
    assert waits.found == []
    with waits:
        torch.ones(1).item()
    assert waits.found == ["_local_scalar_dense"], "a test of waiting must see it"
