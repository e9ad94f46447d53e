"""The recorder captures what the model does, for every family; invariants (a) to (d), (f) and (i) of `gazeguard.trace`."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from families import CACHE, IMAGE, MAKERS, PAD, VOCABULARY, Family, draw_weights, family, git, text_only
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from gazeguard.attention.attribution import direct_logit_attribution, token_statistics, top_k_statistics, top_tokens
from gazeguard.attention.backbone import Head, find_backbone
from gazeguard.attention.buffers import CapturedActivations, RowBuffer
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.logit_lens import attended_logprobs
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.errors import NoAttentionError, UnsupportedError
from gazeguard.heads.artifact import fingerprint
from gazeguard.trace import SEGMENTS
from gazeguard.vision.image_tokens import image_token_id
from gazeguard.vision.inputs import model_inputs

NEW = 8
every_family = pytest.mark.parametrize("name", list(MAKERS))


pytestmark = pytest.mark.usefixtures("quietly")


# ------------------------------------------------------------------------------------------------- ways to run a model


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)


def forward(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model(**model_inputs(model, inputs), use_cache=False, **options)


def announce(inputs: dict[str, Tensor]) -> KeyLayout:
    return KeyLayout.from_ids(inputs["input_ids"], inputs["attention_mask"], IMAGE)


def live(
    model: PreTrainedModel, inputs: dict[str, Tensor], heads: Sequence[Head] | None = None, **options: Any
) -> tuple[Any, CapturedActivations]:
    """Generate, and what was captured meanwhile."""
    with AttentionRecorder(model, heads or find_backbone(model).heads()) as recorder:
        recorder.begin(announce(inputs))
        return generate(model, inputs, **options), recorder.collect()


def replay(kind: Family, model: PreTrainedModel, inputs: dict[str, Tensor], written: Tensor) -> CapturedActivations:
    """One forward pass over prompt and ``generated`` (batch, T), and what was captured; T + 1 rows."""
    with AttentionRecorder(model, find_backbone(model).heads()) as recorder:
        recorder.begin(announce(inputs))
        forward(model, kind.extended(inputs, written))
        return recorder.collect()


@dataclass(frozen=True)
class Run:
    """A batch of three rows of different length, what the model wrote, and what the recorder captured of it."""

    inputs: dict[str, Tensor]
    written: Tensor
    logits: Tensor  # (batch, T, vocabulary), as generate returns them
    rows: CapturedActivations


@functools.cache
def run_of(name: str) -> Run:
    kind = family(name)
    inputs = kind.batch()
    made, rows = live(kind.model, inputs)
    written = made.sequences[:, inputs["input_ids"].shape[1] :]
    return Run(inputs, written, torch.stack(made.logits, dim=1), rows)


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes its attention the plain way and can return it."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def close(left: Tensor, right: Tensor, within: float) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=within)


def same_rows(left: CapturedActivations, right: CapturedActivations, within: float) -> None:
    for field in ("gaze", "segment_mass", "output", "hidden"):
        close(getattr(left, field), getattr(right, field), within)


def part(rows: CapturedActivations, index: Any) -> CapturedActivations:
    """Some of the batch and of the rows."""
    return CapturedActivations(*(tensor[index] for tensor in vars(rows).values()))


# ------------------------------------------------------------------------------------------------ the parts of a model


@every_family
def test_the_backbone_is_the_text_decoder(name):
    """Every self-attention of the text decoder is found, under its own layer number, and none of the vision tower."""
    model = family(name).model
    text = model.config.get_text_config(decoder=True)
    found = find_backbone(model).attention
    path_of = {id(module): path for path, module in model.named_modules()}
    paths = [path_of[id(module)] for module in found.values()]
    assert list(found) == list(range(text.num_hidden_layers))
    assert all(path.endswith(f".layers.{layer}.self_attn") for layer, path in zip(found, paths, strict=True))
    assert not any("vis" in path for path in paths)
    assert len(find_backbone(model).heads()) == text.num_hidden_layers * text.num_attention_heads


@every_family
def test_the_final_norm_weight_is_the_norms_slope(name):
    """The norm equals its weight times the scaled state, whether its class multiplies by weight or by one plus weight."""
    backbone = find_backbone(family(name).model)
    weight, centered = backbone.final_norm_weight
    state = torch.randn(5, len(weight), generator=torch.Generator().manual_seed(3)) * 4
    moved = state - state.mean(-1, keepdim=True) if centered else state
    expected = moved / moved.pow(2).mean(-1, keepdim=True).sqrt() * weight
    close(backbone.norm(state), expected, 1e-4)
    assert centered == (name == "AyaVision")


# ------------------------------------------------------------------------------------------------------------ invariant (a)


@every_family
def test_row_t_is_the_query_that_predicted_token_t(name):
    """Invariant (a): what is captured while generating equals the eager attention rows P - 1 + t; its sums by segment."""
    kind, run = family(name), run_of(name)
    whole = kind.extended(run.inputs, run.written)
    twin = eager(kind.model)
    attentions = forward(twin, whole, output_attentions=True).attentions
    width, steps = run.inputs["input_ids"].shape[1], run.written.shape[1]
    assert steps == NEW
    truth = torch.cat(attentions, dim=1)[:, :, width - 1 : width - 1 + steps].transpose(1, 2)  # (batch, T, H, S)
    ids, mask = run.inputs["input_ids"], run.inputs["attention_mask"].bool()
    assert run.rows.gaze.shape[:3] == truth.shape[:3]
    for row in range(len(ids)):
        image = (ids[row] == IMAGE).nonzero()[:, 0]
        assert len(image) == sum(kind.image_tokens(row))
        close(run.rows.gaze[row, ..., : len(image)], truth[row][..., image], 1e-5)
        assert not run.rows.gaze[row, ..., len(image) :].any(), "columns that the row does not have hold nothing"
        first = int(mask[row].nonzero()[0])
        other = [i for i in range(first + 1, width) if i not in set(image.tolist())]
        sums = [truth[row][..., where].sum(-1) for where in (image, other, slice(width, None), [first])]
        close(run.rows.segment_mass[row], torch.stack(sums, dim=-1), 1e-5)
    close(run.rows.segment_mass.sum(-1), torch.ones(truth.shape[:3]), 1e-5)
    assert truth.amax(-1).mean() > 0.3, "the attention of the test is too flat to tell rows apart"
    assert (truth[:, 1:] - truth[:, :-1]).abs().amax() > 0.3, "the rows of the test are too alike to tell apart"


def test_the_top_tokens_are_those_of_topk():
    """Looked for by blocks where the vocabulary has enough of them, whichever values are infinite or not a number."""
    scores = torch.randn(3, 2, 4096, generator=torch.Generator().manual_seed(0))
    scores[0, 0, ::3], scores[1, 1, 77], scores[2, 0, 5:] = -torch.inf, torch.inf, -torch.inf
    for vocabulary in (4096, 4095, 640, 12):
        part = scores[..., :vocabulary]
        values, ids = top_tokens(part, 21)
        expected = part.topk(min(21, vocabulary)).values
        assert torch.equal(values, expected)
        assert torch.equal(part.gather(-1, ids), expected)
        assert all(len(set(row)) == len(row) for row in ids.flatten(0, 1).tolist())
    scores[0, 1, 9] = torch.nan
    assert top_tokens(scores, 21)[1][0, 1, 0] == 9


@every_family
def test_the_states_of_image_tokens_are_the_models_own(name):
    """What is kept of each image token becomes the model's own logits there, live and replayed, and what is attended to
    is read from these: the mean probability by gaze, and the best image token.
    """
    kind, run = family(name), run_of(name)
    whole = kind.extended(run.inputs, run.written)
    logits = forward(kind.model, whole).logits.float()
    backbone = find_backbone(kind.model)
    with AttentionRecorder(kind.model, backbone.heads()) as recorder:
        recorder.begin(announce(run.inputs))
        generate(kind.model, run.inputs)
        rows, lens = recorder.collect(), recorder.layer_lens(top=True)
        recorder.begin(announce(run.inputs))
        assert recorder.logit_lens() is None, "a new watch forgets"
        forward(kind.model, whole)
        close(recorder.logit_lens().normed, lens.normed, 1e-4)
    lies, named = attended_logprobs(lens, rows.gaze, run.written)
    for row, ids in enumerate(run.inputs["input_ids"]):
        image = (ids == IMAGE).nonzero()[:, 0]
        assert lens.known[row].sum() == len(image)
        close(backbone.unembed(lens.normed[row, : len(image)]), logits[row, image], 1e-3)
        likely, word = logits[row, image].log_softmax(-1).max(-1)
        close(lens.top_logprob[row, : len(image)], likely, 1e-3)
        assert torch.equal(lens.top_id[row, : len(image)], word)
        said = logits[row, image].log_softmax(-1)[:, run.written[row]]  # (N, T)
        close(named[row], said.amax(0), 1e-3)
        look = rows.gaze[row, ..., : len(image)].mean(1)  # (T, N)
        close(lies[row], ((look / look.sum(-1, keepdim=True)) * said.T.exp()).sum(-1).log(), 1e-3)


@every_family
def test_output_is_what_the_projection_gets(name):
    """Each head's output is its slice of the output projection's input, at the same row."""
    kind, run = family(name), run_of(name)
    backbone = find_backbone(kind.model)
    seen: dict[int, Tensor] = {}
    handles = [
        backbone.projection(layer).register_forward_pre_hook(lambda _, args, at=layer: seen.update({at: args[0]}))
        for layer in backbone.attention
    ]
    forward(kind.model, kind.extended(run.inputs, run.written))
    for handle in handles:
        handle.remove()
    start = run.inputs["input_ids"].shape[1] - 1
    per_head = run.rows.output.shape[-1]
    truth = torch.cat([seen[layer].unflatten(-1, (-1, per_head)) for layer in backbone.attention], dim=2)
    close(run.rows.output, truth[:, start : start + NEW], 2e-5)


# -------------------------------------------------------------------------------------------------------- invariant (b), (d)


@every_family
def test_replay_equals_live(name):
    """Invariant (b): a teacher-forced pass over prompt and generated tokens captures what was captured live."""
    run = run_of(name)
    again = replay(family(name), family(name).model, run.inputs, run.written)
    assert again.gaze.shape[1] == NEW + 1, "the row after the last token is captured, too"
    same_rows(part(again, (slice(None), slice(NEW))), run.rows, 2e-5)  # some rounding of states that are larger than one


@every_family
def test_a_padded_batch_equals_its_single_rows(name):
    """Invariant (d): gaze, segment_mass, output, hidden state and logits of a left-padded row are those of the row alone."""
    kind, run = family(name), run_of(name)
    backbone = find_backbone(kind.model)
    lengths = set()
    for row in range(3):
        alone = kind.batch([row])
        assert alone["attention_mask"].all()
        lengths.add(alone["input_ids"].shape[1])
        made, rows = live(kind.model, alone)
        assert torch.equal(made.sequences[0, alone["input_ids"].shape[1] :], run.written[row])
        own = part(run.rows, slice(row, row + 1))
        count = rows.gaze.shape[-1]
        same_rows(rows, replace(own, gaze=own.gaze[..., :count]), 1e-4)
        close(backbone.logits(rows.hidden), backbone.logits(own.hidden), 1e-4)
    assert len(lengths) > 1, "a test of padding needs padding"


# ------------------------------------------------------------------------------------------------------------ invariant (c)


@every_family
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_watching_changes_no_logit(name, sampled):
    """Invariant (c): with and without the recorder, ids and logits are the same to the last bit."""
    kind = family(name)
    inputs = kind.batch()
    options = {"do_sample": sampled, **({"top_k": 0, "temperature": 1.3} if sampled else {})}
    torch.manual_seed(5)
    plain = generate(kind.model, inputs, **options)
    torch.manual_seed(5)
    watched, _ = live(kind.model, inputs, **options)
    assert torch.equal(plain.sequences, watched.sequences)
    assert len(plain.logits) == NEW
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, watched.logits, strict=True))


# ------------------------------------------------------------------------------------------------------------ invariant (f)


class Stumble(LogitsProcessor):
    """Fails at the third token."""

    def __init__(self) -> None:
        self.left = 3

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyError("stumbled")
        return scores


def shape_of(model: nn.Module) -> dict[str, Any]:
    """All that a recording could leave behind: attributes, and hooks of each module."""
    return {
        path: (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    }


@every_family
@pytest.mark.parametrize("how", ["done", "unused", "raised", "raised while writing"])
def test_leaving_restores_the_model(name, how):
    """Invariant (f): after the context, however it was left, the model has the attributes, hooks and tokens it had before."""
    kind = family(name)
    inputs = kind.batch()
    said = generate(kind.model, inputs, max_new_tokens=4)  # first: some classes install hooks of their own when they run
    before = shape_of(kind.model)
    recorder = AttentionRecorder(kind.model, [(0, 1), (2, 3)])
    try:
        with recorder:
            assert shape_of(kind.model) != before
            recorder.begin(announce(inputs))
            if how == "raised":
                raise KeyError("stumbled")
            if how != "unused":
                stumble = LogitsProcessorList([Stumble()] if how == "raised while writing" else [])
                generate(kind.model, inputs, logits_processor=stumble)
    except KeyError:
        assert how.startswith("raised")
    assert shape_of(kind.model) == before
    assert not any("_gazeguard_recorder" in vars(module) for module in kind.model.modules())
    after = generate(kind.model, inputs, max_new_tokens=4)
    assert torch.equal(after.sequences, said.sequences)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, said.logits, strict=True))


def test_a_recorder_can_be_used_again():
    """Invariant (f), the recorder's side: after an exception, and after it was left, it captures a run as the first."""
    kind, run = family("Qwen2.5-VL"), run_of("Qwen2.5-VL")
    recorder = AttentionRecorder(kind.model, find_backbone(kind.model).heads())
    with recorder:
        recorder.begin(announce(run.inputs))
        with pytest.raises(KeyError):
            generate(kind.model, run.inputs, logits_processor=LogitsProcessorList([Stumble()]))
    for _ in range(2):
        with recorder:
            recorder.begin(announce(run.inputs))
            generate(kind.model, run.inputs)
            same_rows(recorder.collect(), run.rows, 0)


# ------------------------------------------------------------------------------------------------------------ invariant (i)


@every_family
def test_capturing_nothing_raises(name):
    """Invariant (i): no begin, no run, a run of another batch size, and a recording that is over are errors."""
    kind = family(name)
    inputs = kind.batch()
    with AttentionRecorder(kind.model, [(1, 0)]) as recorder:
        with pytest.raises(NoAttentionError, match=r"did not run.*Run the model while the recorder is open"):
            recorder.collect()
        recorder.begin(announce(inputs))
        with pytest.raises(NoAttentionError, match="captured no attention in layer 1"):
            recorder.collect()
        generate(kind.model, kind.batch([0]), max_new_tokens=2)
        with pytest.raises(NoAttentionError, match="with the batch that the recording was begun with"):
            recorder.collect()
    with pytest.raises(NoAttentionError):
        recorder.collect()


def test_begin_forgets():
    """A second begin starts from nothing: its rows are those of the second run alone."""
    kind, run = family("Idefics3"), run_of("Idefics3")
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(kind.batch([1])))
        generate(kind.model, kind.batch([1]))
        recorder.begin(announce(run.inputs))
        with pytest.raises(NoAttentionError):
            recorder.collect()
        generate(kind.model, run.inputs)
        same_rows(recorder.collect(), run.rows, 0)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(2, 4)), min_size=1, max_size=12), st.integers(0, 20)
)
def test_a_row_buffer_is_a_list_that_can_be_written_over(puts, start):
    """What is put goes after the rows before it and in place of those from it on; a narrow row is filled up with zeros."""
    track, told, count = RowBuffer(), [], 0
    for back, rows, width in puts:
        at = max(0, len(told) - back)
        new = [torch.full((2, width), float(count + i + 1)) for i in range(rows)]
        count += rows
        track.put(at, torch.stack(new, dim=1))
        told[at:] = new
        assert len(track) == len(told)
        assert all(torch.equal(track.row(i), row) for i, row in enumerate(told))
    start = min(start, len(told) - 1)
    widest = max(row.shape[-1] for row in told[start:])
    expected = torch.stack([F.pad(row, (0, widest - row.shape[-1])) for row in told[start:]], dim=1)
    assert torch.equal(track.joined(start), expected)


def test_rows_captured_in_inference_mode_can_be_used_outside_of_it():
    """And blocks begun there can be generated on; what is captured never asks for gradients by itself."""
    track, captured = RowBuffer(), [torch.randn(2, 1, 4, requires_grad=True) for _ in range(3)]
    with torch.inference_mode():
        track.put(0, captured[0])
    with torch.enable_grad():
        track.put(1, captured[1])
    with torch.inference_mode():
        track.put(2, captured[2])
    with torch.enable_grad():
        weight = torch.ones(4, requires_grad=True)
        rows = track.joined()
        assert not rows.requires_grad
        (rows @ weight).sum().backward()
    close(weight.grad, torch.cat(captured, dim=1).detach().sum((0, 1)), 1e-5)


def test_a_long_text_is_kept_in_few_pieces():
    """Small tensors that stay from every token would break up the memory that a growing cache leaves (a factor of three)."""
    kind, new = family("LLaVA"), 70
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(kind.batch()))
        generate(kind.model, kind.batch(), max_new_tokens=new, min_new_tokens=new)
        for layer in recorder._recording.layers.values():
            tracks = {
                "queries": layer.queries,
                "masks": layer.masks,
                "output": layer.output,
                "hidden": recorder._recording.hidden,
            }
            for name, track in tracks.items():
                pieces = {rows.untyped_storage().data_ptr() for _, rows in track.parts}
                assert 0 < len(pieces) <= 2, f"{len(pieces)} pieces of {name}"


def test_the_cache_is_not_kept():
    """Once generate is over, its cache is the caller's alone; what was captured can still be told."""
    kind, run = family("LLaVA"), run_of("LLaVA")
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(kind.batch()))
        made = generate(kind.model, kind.batch())
        gone = weakref.ref(next(value for value in made.values() if isinstance(value, Cache)))
        del made
        gc.collect()
        assert gone() is None
        forward(kind.model, kind.batch())  # without a cache, so another run
        same_rows(recorder.collect(), run.rows, 1e-5)


def test_a_run_of_another_batch_is_not_mixed_in():
    """A forward pass of another batch size between two tokens leaves no trace, in no field."""
    kind, run = family("LLaVA"), run_of("LLaVA")
    stranger = kind.batch([0])

    class Interrupt(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            forward(kind.model, stranger)
            return scores

    _, rows = live(kind.model, run.inputs, logits_processor=LogitsProcessorList([Interrupt()]))
    same_rows(rows, run.rows, 0)


def test_a_second_run_is_not_mixed_in():
    """A recorder captures one run: a second one has a cache of its own, and is not appended."""
    kind, run = family("LLaVA"), run_of("LLaVA")
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(run.inputs))
        generate(kind.model, run.inputs)
        generate(kind.model, run.inputs, max_new_tokens=NEW + 2)
        same_rows(recorder.collect(), run.rows, 0)


@every_family
def test_a_second_pass_without_a_cache_raises(name):
    """Two passes without a cache cannot be told apart, so the second is refused."""
    kind = family(name)
    inputs = kind.batch()
    with AttentionRecorder(kind.model, [(0, 0)]) as recorder:
        recorder.begin(announce(inputs))
        forward(kind.model, inputs)
        with pytest.raises(UnsupportedError, match=r"ran twice in one recording\. Call begin\(\) before each run"):
            forward(kind.model, inputs)


# ------------------------------------------------------------------------------------------------ ways of generating


@pytest.mark.parametrize("name", ["Idefics3", "LLaVA", "Mistral3"])
def test_a_prefill_in_chunks_is_recorded_as_one(name):
    """Chunked prefill gives the rows of an unbroken one."""
    kind, run = family(name), run_of(name)
    # Chunks cannot be cut through images, so the row's embeddings go in as text; the prompt is tokens alone here.
    inputs = {key: run.inputs[key].clone() for key in ("input_ids", "attention_mask")}
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = 7
    _, whole = live(kind.model, inputs)
    _, chunks = live(kind.model, inputs, prefill_chunk_size=5)
    same_rows(chunks, whole, 1e-5)


@pytest.mark.parametrize("words", [1, NEW])
def test_a_prefix_mask_over_generated_tokens_is_refused(words):
    """PaliGemma's prompt attends both ways. Tokens replayed as prompt would attend to what follows, so this raises."""
    kind, run = family("PaliGemma"), run_of("PaliGemma")
    whole = kind.extended(run.inputs, run.written[:, :words])
    whole["token_type_ids"][:] = 0
    with AttentionRecorder(kind.model, [(0, 0)]) as recorder:
        recorder.begin(announce(run.inputs))
        with pytest.raises(UnsupportedError, match="token_type_ids of 1"):
            forward(kind.model, whole)


# ------------------------------------------------------------------------------------------------------ from a look on


@every_family
def test_hidden_becomes_the_models_own_logits(name):
    """The final norm and unembedding of the captured states give generate's logits, whatever the class does to them."""
    run = run_of(name)
    close(find_backbone(family(name).model).logits(run.rows.hidden), run.logits.float(), 1e-4)


@every_family
def test_token_statistics_are_of_the_models_logits(name):
    """Log-probability and entropy are those of the log-softmax of the model's logits, be these captured or computed."""
    kind, run = family(name), run_of(name)
    backbone = find_backbone(kind.model)
    logs = run.logits.float().log_softmax(-1)
    unknown = replace(run.rows, top_ids=torch.full_like(run.rows.top_ids, -1))
    some = replace(unknown, top_ids=run.rows.top_ids.where(torch.arange(NEW)[:, None] % 3 > 0, -1))
    rarest = logs.argmin(-1)  # not among the top k, which alone are captured
    judged = [
        (written, token_statistics(backbone, backbone.heads(), rows, written))
        for rows in (run.rows, unknown, some)
        for written in (run.written, rarest)
    ]
    for written, words in judged:
        close(words.logprobs, logs.gather(-1, written[..., None])[..., 0], 1e-4)
        close(words.entropy, -(logs.exp() * logs).sum(-1), 1e-4)
        assert words.attribution.shape == run.rows.output.shape[:3]
    for (_, words), (_, captured) in zip(judged[2:], judged[:2] * 2, strict=True):
        close(words.attribution, captured.attribution, 1e-4)


def test_logits_of_other_rows_are_not_taken_for_those_of_the_steps():
    """A pass that is asked for its last row, for all rows or for some by number does not say which the tokens' rows are."""
    kind, run = family("LLaVA"), run_of("LLaVA")
    whole = model_inputs(kind.model, kind.extended(run.inputs, run.written))
    for keep in (1, 0, torch.arange(NEW + 1)):
        with AttentionRecorder(kind.model, [(1, 0)]) as recorder:
            recorder.begin(announce(run.inputs))
            kind.model(**whole, use_cache=False, logits_to_keep=keep)
            assert (recorder.collect().top_ids == -1).all()
    with AttentionRecorder(kind.model, [(1, 0)]) as recorder:
        recorder.begin(announce(run.inputs))
        kind.model(**whole, use_cache=False, logits_to_keep=NEW + 1)  # these are the words' rows and no others
        rows = recorder.collect()
    logs = run.logits.log_softmax(-1)
    close(rows.top_logprobs[:, :NEW], top_k_statistics(logs)[1], 1e-4)
    assert torch.equal(rows.top_ids[:, :NEW], run.rows.top_ids)


def test_a_step_that_runs_again_has_its_new_logits():
    """Tokens that were rolled back and run anew, in a pass with logits of its last row alone, have no statistics."""
    kind, run = family("LLaVA"), run_of("LLaVA")
    cache = DynamicCache(config=kind.model.config.get_text_config())
    how = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    captured = []
    with AttentionRecorder(kind.model, [(1, 0)]) as recorder:
        recorder.begin(announce(run.inputs))
        kind.model(**run.inputs, **how)
        mask = run.inputs["attention_mask"]
        for words in (run.written[:, :1], run.written[:, 1:2], run.written[:, :2], run.written[:, 2:3]):
            if words.shape[1] > 1:
                cache.crop(-2)
                mask = run.inputs["attention_mask"]
            mask = F.pad(mask, (0, words.shape[1]), value=1)
            kind.model(input_ids=words, attention_mask=mask, **how)
            captured.append((recorder.collect().top_ids[0] >= 0).all(-1).tolist())
        assert (recorder.collect(start=2).top_ids >= 0)[0, :, 0].tolist() == [False, True]
    assert captured == [[True] * 2, [True] * 3, [True, False, False], [True, False, False, True]]


@every_family
def test_attributions_and_the_rest_add_up_to_the_logit(name):
    """Direct logit attribution: what all heads, all MLPs and the embedding add is the logit, norm scale held fixed."""
    kind, run = family(name), run_of(name)
    backbone = find_backbone(kind.model)
    decoder = kind.model.get_decoder()
    captured: list[Tensor] = []
    handles = [layer.mlp.register_forward_hook(lambda _, args, made: captured.append(made)) for layer in decoder.layers]
    handles.append(
        decoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: captured.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    forward(kind.model, kind.extended(run.inputs, run.written))
    for handle in handles:
        handle.remove()
    assert len(captured) == len(backbone.attention) + 1
    start = run.inputs["input_ids"].shape[1] - 1
    rest = torch.stack(captured).sum(0)[:, start : start + NEW]
    # The lens: the same norm, its scale that of the whole state.
    weight, centered = backbone.final_norm_weight
    state = run.rows.hidden
    if centered:
        rest, state = rest - rest.mean(-1, keepdim=True), state - state.mean(-1, keepdim=True)
    lens = rest * weight / state.pow(2).mean(-1, keepdim=True).sqrt()
    for contrast in (0, 5):  # the written word itself, and another one
        token = (run.written + contrast) % VOCABULARY
        direction = backbone.unembedding.weight[token]
        looked = direct_logit_attribution(backbone, backbone.heads(), run.rows.output, run.rows.hidden, direction)
        logit = backbone.logits(run.rows.hidden).gather(-1, token[..., None])[..., 0]
        close(looked.sum(-1) + (lens * direction).sum(-1), logit, 1e-3)
        assert looked.abs().mean() > 1e-2, "a test of sums needs summands"


@every_family
def test_a_head_without_a_projection_has_no_attribution(name):
    """A head whose slice of the output projection is zero adds nothing to any logit, and only that head."""
    kind = MAKERS[name]()
    backbone = find_backbone(kind.model)
    _, per_head = backbone.width(backbone.attention[1])
    backbone.projection(1).weight[:, 2 * per_head : 3 * per_head] = 0
    made, rows = live(kind.model, kind.batch())
    words = token_statistics(backbone, backbone.heads(), rows, made.sequences[:, -NEW:])
    silent = [head == (1, 2) for head in backbone.heads()]
    assert not words.attribution[..., silent].any()
    assert words.attribution[..., [not is_silent for is_silent in silent]].abs().amin((0, 1)).all()


def test_attribution_is_relative_to_the_contrast_tokens():
    """The judged attribution is the token's own attribution minus the mean over its twenty most probable contrast tokens'."""
    run = run_of("Qwen3-VL")
    backbone = find_backbone(family("Qwen3-VL").model)
    heads = [(0, 3), (2, 1)]
    where = [backbone.heads().index(head) for head in heads]
    rows = replace(run.rows, output=run.rows.output[:, :, where])
    words = token_statistics(backbone, heads, rows, run.written)
    for row in range(3):
        for step in range(NEW):
            ranked = run.logits[row, step].argsort(descending=True).tolist()
            written = int(run.written[row, step])
            contrast = [token for token in ranked[:21] if token != written]
            tokens = torch.tensor([written, *contrast])
            output, hidden = rows.output[row, step].expand(len(tokens), -1, -1), rows.hidden[row, step]
            each = direct_logit_attribution(
                backbone, heads, output, hidden.expand(len(tokens), -1), backbone.unembedding.weight[tokens]
            )
            close(words.attribution[row, step], each[0] - each[1:].mean(0), 1e-4)


@every_family
def test_reduced_gaze_is_the_gaze_reduced(name):
    """Gaze summed over regions as it is read is the gaze on image tokens times the regions, live and replayed."""
    kind, run = family(name), run_of(name)
    count = run.rows.gaze.shape[-1]
    regions = torch.rand(3, count, 5, generator=torch.Generator().manual_seed(1))
    expected = run.rows.gaze @ regions[:, None]
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(run.inputs), lambda gaze: gaze @ regions[:, None])
        generate(kind.model, run.inputs)
        close(recorder.reduced_gaze(), expected, 1e-5)
        recorder.begin(announce(run.inputs), lambda gaze: gaze @ regions[:, None])
        forward(kind.model, kind.extended(run.inputs, run.written))
        close(recorder.reduced_gaze()[:, :NEW], expected, 1e-5)


@every_family
def test_one_step_can_be_read(name):
    """Between two tokens, `step_at` gives the step that predicted the token about to be chosen; asking changes nothing."""
    kind, run = family(name), run_of(name)
    asked: list[tuple[Tensor, Tensor]] = []

    class Ask(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            asked.append(recorder.step_at(input_ids.shape[1] - 1))
            return scores

    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(run.inputs))
        generate(kind.model, run.inputs, logits_processor=LogitsProcessorList([Ask()]))
        same_rows(recorder.collect(), run.rows, 1e-5)
    close(torch.stack([output for output, _ in asked], dim=1), run.rows.output, 1e-5)
    close(torch.stack([hidden for _, hidden in asked], dim=1), run.rows.hidden, 0)


@every_family
def test_chosen_heads_are_those_of_all(name):
    """A recorder on some heads, in any order and twice, captures what one on all heads captures of them, by layer and head."""
    kind, run = family(name), run_of(name)
    every = find_backbone(kind.model).heads()
    _, rows = live(kind.model, run.inputs, [(2, 3), (0, 1), (2, 0), (0, 1)])
    where = [every.index(head) for head in ((0, 1), (2, 0), (2, 3))]
    close(rows.gaze, run.rows.gaze[:, :, where], 1e-6)
    close(rows.segment_mass, run.rows.segment_mass[:, :, where], 1e-6)
    close(rows.output, run.rows.output[:, :, where], 1e-6)
    close(rows.hidden, run.rows.hidden, 0)


@every_family
def test_half_precision_is_near_the_truth(name):
    """A bfloat16 model's rows are within 0.03 of the same weights run in float32.

    The weights are calmer here: peaky attention magnifies the rounding of the layers below, which is the model's own.
    """
    kind, run = family(name), run_of(name)
    half = draw_weights(copy.deepcopy(kind.model), peak=0.5).to(torch.bfloat16)
    whole = copy.deepcopy(half).to(torch.float32)
    small = {key: value.bfloat16() if value.is_floating_point() else value for key, value in run.inputs.items()}
    same = {key: value.float() if value.is_floating_point() else value for key, value in small.items()}
    rows, truth = replay(kind, half, small, run.written), replay(kind, whole, same, run.written)
    assert rows.hidden.dtype == torch.bfloat16
    assert rows.gaze.dtype == rows.output.dtype == torch.float32
    close(rows.gaze, truth.gaze, 0.03)
    close(rows.segment_mass, truth.segment_mass, 0.03)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("second", [[(0, 0)], [(2, 1)]], ids=["same layer", "another layer"])
def test_two_recorders_on_one_model(second):
    """A watched model is not watched again, and the first watch goes on unharmed."""
    kind, run = family("SmolVLM"), run_of("SmolVLM")
    with AttentionRecorder(kind.model, [(0, 0), (0, 1)]) as recorder:
        recorder.begin(announce(run.inputs))
        with (
            pytest.raises(UnsupportedError, match=r"recorded already, .* Leave that one first"),
            AttentionRecorder(kind.model, second),
        ):
            pass
        generate(kind.model, run.inputs)
        close(recorder.collect().gaze, run.rows.gaze[:, :, :2], 1e-6)
    with AttentionRecorder(kind.model, second):
        pass


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ([(3, 0)], r"no head \(3, 0\): .* layers 0 to 2 with 4 heads each"),
        ([(0, 1), (1, 4)], r"no head \(1, 4\)"),
        ([(0, -1)], r"no head \(0, -1\)"),
        ([], r"has no head to record \(the list is empty\)"),
    ],
)
def test_unknown_heads_are_refused(heads, said):
    """Heads that the text decoder does not have, and none at all, are refused with what it has."""
    with pytest.raises(UnsupportedError, match=said):
        AttentionRecorder(family("LLaVA").model, heads)


def test_models_without_images_or_without_the_registry_are_refused():
    """A text model has no image token; a model that computes its text attention itself has nothing to record."""
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM has no image token.*text-only"):
        image_token_id(text_only())
    with pytest.raises(UnsupportedError, match="GitForCausalLM has no text attention"):
        AttentionRecorder(git(), [(0, 0)])


@every_family
def test_the_image_token_is_read_from_the_configuration(name):
    """Every family names its image token, under whichever of two names."""
    assert image_token_id(family(name).model) == IMAGE


# ------------------------------------------------------------------------------------------------- prompts, by example


def test_prompts_by_example():
    """Columns of image tokens in order, padded columns marked, kinds one-hot; padding is nothing, whatever its id."""
    ids = torch.tensor([[PAD, IMAGE, 5, IMAGE, 6], [5, IMAGE, IMAGE, 6, IMAGE], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [1] * 5])
    prompts = KeyLayout.from_ids(ids, mask, IMAGE)
    assert prompts.columns.tolist() == [[3, 0, 0], [1, 2, 4], [0, 0, 0]]
    assert prompts.valid.tolist() == [[True, False, False], [True] * 3, [False] * 3]
    assert torch.equal(prompts.real, mask.bool())
    image, prompt, generated, first = (SEGMENTS.index(kind) for kind in ("image", "prompt", "generated", "first"))
    kinds = prompts.segments.argmax(-1)
    assert kinds[0, 2:].tolist() == [first, image, prompt]
    assert kinds[1].tolist() == [first, image, image, prompt, image]
    assert torch.equal(prompts.segments.sum(-1), mask.float())
    assert not prompts.segments[..., generated].any()


def test_prompts_need_no_mask():
    """Without a mask nothing is padding, even where the padding token stands; an image may come first."""
    prompts = KeyLayout.from_ids(torch.tensor([[IMAGE, PAD, 3]]), None, IMAGE)
    assert prompts.real.all()
    assert prompts.segments[0].argmax(-1).tolist() == [0, 1, 1]
    assert prompts.segments[0].sum(-1).tolist() == [1, 1, 1]


# -------------------------------------------------------------------------------------------------------- fingerprints


@every_family
def test_a_fingerprint_is_of_the_weights(name, tmp_path):
    """Invariant (h)'s ground: equal after saving and loading and in another precision, different for other weights."""
    model = family(name).model
    own = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == own
    assert fingerprint(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)) == own
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == own
    assert fingerprint(draw_weights(copy.deepcopy(model), seed=1)) != own


def test_fingerprints_tell_classes_apart():
    """Two classes around the same weights are two models."""
    assert torch.equal(
        find_backbone(family("Idefics3").model).projection(0).weight,
        find_backbone(family("SmolVLM").model).projection(0).weight,
    )
    assert len({fingerprint(family(name).model) for name in MAKERS}) == len(MAKERS)


# ------------------------------------------------------------------------------------------------------------- registry


def registry() -> dict[str, Any]:
    """All that recorders may change in transformers: the attention registry, and eager kernels beside the classes."""
    eager = {
        name: vars(module)["eager_attention_forward"]
        for name, module in sys.modules.items()
        if name.startswith("transformers.models.") and "eager_attention_forward" in vars(module)
    }
    return {**ALL_ATTENTION_FUNCTIONS, **eager}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_registry_is_what_it_was(kernel):
    """Invariant (f), of the process: kernels are wrapped while a recorder is open, and put back by the last one to close."""
    one, two = (copy.deepcopy(family(name).model) for name in ("LLaVA", "SmolVLM"))
    for model in (one, two):
        model.set_attn_implementation(kernel)
    before = registry()
    with pytest.raises(KeyError), AttentionRecorder(one, [(0, 0)]):
        raise KeyError("stumbled")
    assert registry() == before
    first, second = AttentionRecorder(one, [(0, 0), (1, 1)]), AttentionRecorder(two, [(1, 0)])
    assert registry() == before, "a recorder that is not open changes nothing"
    with second:
        with first:
            with pytest.raises(UnsupportedError), AttentionRecorder(one, [(2, 0)]):
                pass
            assert registry() != before
        assert registry() != before, "the second model is still recorded"
        second.begin(announce(family("SmolVLM").batch()))
        generate(two, family("SmolVLM").batch(), max_new_tokens=2)
        assert second.collect().gaze.shape[1] == 2
    assert registry() == before


def test_a_wrapper_around_ours_is_left_alone():
    """What others put into the registry while a recorder is open stays there, and records nothing twice."""
    kind, run = family("LLaVA"), run_of("LLaVA")
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls: list[int] = []
    try:
        with AttentionRecorder(kind.model, [(0, 0)]):
            ours = ALL_ATTENTION_FUNCTIONS["sdpa"]

            @functools.wraps(ours)
            def theirs(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return ours(*args, **kwargs)

            AttentionInterface.register("sdpa", theirs)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
        same_rows(live(kind.model, run.inputs)[1], run.rows, 0)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
        assert calls
    finally:
        AttentionInterface.register("sdpa", original)


# -------------------------------------------------------------------------------------------------------------- threads


def test_a_model_is_recorded_once_at_a_time_across_threads():
    """Many threads open a recorder on one model at once: one gets it, the others are refused by name."""
    kind, before = family("Idefics3"), registry()
    start, done = threading.Barrier(8), threading.Barrier(8)
    outcomes: list[str] = []

    def enter(layer: int) -> None:
        recorder = AttentionRecorder(kind.model, [(layer % 3, 0)])
        start.wait()
        try:
            with recorder:
                outcomes.append("recorded")
                done.wait()
        except UnsupportedError as error:
            outcomes.append(str(error))
            done.wait()

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[-1] == "recorded"
    assert len(outcomes) == 8
    assert all("being recorded already" in outcome and "in another thread" in outcome for outcome in sorted(outcomes)[:-1])
    assert registry() == before


def test_passes_of_other_threads_are_not_mixed_in():
    """While one thread is recorded, another may run the model: its passes are in no trace, in any order of events."""
    kind, run = family("LLaVA"), run_of("LLaVA")

    class Elsewhere(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: generate(kind.model, run.inputs, max_new_tokens=2))
            thread.start()
            thread.join()
            return scores

    _, rows = live(kind.model, run.inputs, logits_processor=LogitsProcessorList([Elsewhere()]))
    same_rows(rows, run.rows, 0)


def test_two_models_are_recorded_in_two_threads():
    """Each recorder has its own model's activations, though both models run the same kernel at the same time."""
    names, start = ("LLaVA", "SmolVLM"), threading.Barrier(2)
    expected = {name: run_of(name).rows for name in names}
    captured: dict[str, CapturedActivations] = {}

    def record(name: str) -> None:
        start.wait()
        with torch.no_grad():
            captured[name] = live(family(name).model, run_of(name).inputs)[1]

    threads = [threading.Thread(target=record, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        same_rows(captured[name], expected[name], 1e-5)


# ------------------------------------------------------------------------------------------------------------------ gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Idefics3", "LLaVA", "Qwen3-VL", "PaliGemma"])
def test_a_model_on_a_gpu_is_recorded(name, dtype):
    """On CUDA, in float32 and bfloat16: activations stay on the device, agree with eager attention, and change no logit."""
    kind = family(name)
    model = draw_weights(copy.deepcopy(kind.model), peak=0.5).to("cuda", dtype)
    inputs = {
        key: value.to("cuda", dtype) if value.is_floating_point() else value.cuda() for key, value in kind.batch().items()
    }
    plain = generate(model, inputs)
    made, rows = live(model, inputs)
    assert torch.equal(plain.sequences, made.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, made.logits, strict=True))
    assert {tensor.device.type for tensor in vars(rows).values()} == {"cuda"}
    assert rows.gaze.dtype == rows.output.dtype == torch.float32
    assert rows.hidden.dtype == dtype
    written = made.sequences[:, inputs["input_ids"].shape[1] :]
    whole = {key: value.to(model.device) for key, value in kind.extended(inputs, written).items()}
    with AttentionRecorder(eager(model), find_backbone(model).heads()) as recorder:
        recorder.begin(announce(inputs))
        forward(recorder.model, whole)
        truth = recorder.collect()
    limit = 1e-4 if dtype == torch.float32 else 0.03
    close(rows.gaze, truth.gaze[:, :NEW], limit)
    close(rows.segment_mass, truth.segment_mass[:, :NEW], limit)
    statistics = token_statistics(find_backbone(model), find_backbone(model).heads(), rows, written)
    assert all(tensor.isfinite().all() for tensor in vars(statistics).values())


def test_key_layouts_stay_on_their_device():
    """No tensor of a layout is made on another device than the prompts', here one that holds no values."""
    layout = KeyLayout(*(torch.zeros(2, 3, *more, device="meta") for more in ((), (), (4,), ())), last=2)
    layout = replace(layout, columns=layout.columns.long(), valid=layout.valid.bool(), real=layout.real.bool()).repeated(2)
    weights = torch.zeros(4, 5, 1, 7, device="meta")
    parts = (*layout.image_columns(2), layout.image_attention(weights), layout.segment_attention(weights, -2))
    assert {part.device.type for part in parts} == {"meta"}
    assert layout.segment_attention(weights).shape == (4, 5, 1, 4)
    buffer = RowBuffer()
    buffer.put(0, torch.zeros(2, 3, 4, device="meta"))
    assert buffer.joined().device.type == "meta"
