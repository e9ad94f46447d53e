"""The recorder hears what the model does, for every family; laws (a) to (d), (f) and (i) of `gazeguard.trace`."""

from __future__ import annotations

import copy
import functools
import gc
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

from gazeguard.attention.attribution import direct_logit_attribution, token_statistics, top_k_statistics
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
    """Generate, and what was heard meanwhile."""
    with AttentionRecorder(model, heads or find_backbone(model).heads()) as recorder:
        recorder.begin(announce(inputs))
        return generate(model, inputs, **options), recorder.collect()


def replay(kind: Family, model: PreTrainedModel, inputs: dict[str, Tensor], written: Tensor) -> CapturedActivations:
    """One forward pass over prompt and ``written`` (batch, T), and what was heard; T + 1 rows."""
    with AttentionRecorder(model, find_backbone(model).heads()) as recorder:
        recorder.begin(announce(inputs))
        forward(model, kind.extended(inputs, written))
        return recorder.collect()


@dataclass(frozen=True)
class Story:
    """A batch of three rows of different length, what the model wrote, and what the recorder heard of it."""

    inputs: dict[str, Tensor]
    written: Tensor
    logits: Tensor  # (batch, T, vocabulary), as generate says
    rows: CapturedActivations


@functools.cache
def story(name: str) -> Story:
    kind = family(name)
    inputs = kind.batch()
    made, rows = live(kind.model, inputs)
    written = made.sequences[:, inputs["input_ids"].shape[1] :]
    return Story(inputs, written, torch.stack(made.logits, dim=1), rows)


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
def test_the_gain_is_the_norms_slope(name):
    """The norm equals gain times the scaled state, whether its class multiplies by weight or by one plus weight."""
    backbone = find_backbone(family(name).model)
    gain, centres = backbone.final_norm_weight
    state = torch.randn(5, len(gain), generator=torch.Generator().manual_seed(3)) * 4
    moved = state - state.mean(-1, keepdim=True) if centres else state
    expected = moved / moved.pow(2).mean(-1, keepdim=True).sqrt() * gain
    close(backbone.norm(state), expected, 1e-4)
    assert centres == (name == "AyaVision")


# ------------------------------------------------------------------------------------------------------------ law (a)


@every_family
def test_row_t_is_the_query_that_predicted_token_t(name):
    """Law (a): what is heard while generating equals the eager attention rows P - 1 + t; the segment_mass are its sums."""
    kind, told = family(name), story(name)
    whole = kind.extended(told.inputs, told.written)
    twin = eager(kind.model)
    attentions = forward(twin, whole, output_attentions=True).attentions
    width, steps = told.inputs["input_ids"].shape[1], told.written.shape[1]
    assert steps == NEW
    truth = torch.cat(attentions, dim=1)[:, :, width - 1 : width - 1 + steps].transpose(1, 2)  # (batch, T, H, S)
    ids, mask = told.inputs["input_ids"], told.inputs["attention_mask"].bool()
    assert told.rows.gaze.shape[:3] == truth.shape[:3]
    for row in range(len(ids)):
        image = (ids[row] == IMAGE).nonzero()[:, 0]
        assert len(image) == sum(kind.image_tokens(row))
        close(told.rows.gaze[row, ..., : len(image)], truth[row][..., image], 1e-5)
        assert not told.rows.gaze[row, ..., len(image) :].any(), "columns that the row does not have hold nothing"
        first = int(mask[row].nonzero()[0])
        other = [i for i in range(first + 1, width) if i not in set(image.tolist())]
        sums = [truth[row][..., where].sum(-1) for where in (image, other, slice(width, None), [first])]
        close(told.rows.segment_mass[row], torch.stack(sums, dim=-1), 1e-5)
    close(told.rows.segment_mass.sum(-1), torch.ones(truth.shape[:3]), 1e-5)
    assert truth.amax(-1).mean() > 0.3, "the attention of the test is too flat to tell rows apart"
    assert (truth[:, 1:] - truth[:, :-1]).abs().amax() > 0.3, "the rows of the test are too alike to tell apart"


@every_family
def test_the_states_of_the_cells_are_the_models_own(name):
    """What is kept of each image cell becomes the model's own logits there, live and replayed, and what lies under the gaze
    is read from these: the mean probability by gaze, and the best cell.
    """
    kind, told = family(name), story(name)
    whole = kind.extended(told.inputs, told.written)
    logits = forward(kind.model, whole).logits.float()
    backbone = find_backbone(kind.model)
    with AttentionRecorder(kind.model, backbone.heads()) as recorder:
        recorder.begin(announce(told.inputs))
        generate(kind.model, told.inputs)
        rows, cells = recorder.collect(), recorder.logit_lens()
        recorder.begin(announce(told.inputs))
        assert recorder.logit_lens() is None, "a new watch forgets"
        forward(kind.model, whole)
        close(recorder.logit_lens().normed, cells.normed, 1e-4)
    lies, named = attended_logprobs(cells, rows.gaze, told.written)
    for row, ids in enumerate(told.inputs["input_ids"]):
        image = (ids == IMAGE).nonzero()[:, 0]
        assert cells.known[row].sum() == len(image)
        close(backbone.unembed(cells.normed[row, : len(image)]), logits[row, image], 1e-3)
        likely, word = logits[row, image].log_softmax(-1).max(-1)
        close(cells.top_logprob[row, : len(image)], likely, 1e-3)
        assert torch.equal(cells.top_id[row, : len(image)], word)
        said = logits[row, image].log_softmax(-1)[:, told.written[row]]  # (N, T)
        close(named[row], said.amax(0), 1e-3)
        look = rows.gaze[row, ..., : len(image)].mean(1)  # (T, N)
        close(lies[row], ((look / look.sum(-1, keepdim=True)) * said.T.exp()).sum(-1).log(), 1e-3)


@every_family
def test_output_is_what_the_projection_gets(name):
    """Each head's output is its slice of the output projection's input, at the same row."""
    kind, told = family(name), story(name)
    backbone = find_backbone(kind.model)
    seen: dict[int, Tensor] = {}
    handles = [
        backbone.projection(layer).register_forward_pre_hook(lambda _, args, at=layer: seen.update({at: args[0]}))
        for layer in backbone.attention
    ]
    forward(kind.model, kind.extended(told.inputs, told.written))
    for handle in handles:
        handle.remove()
    start = told.inputs["input_ids"].shape[1] - 1
    per_head = told.rows.output.shape[-1]
    truth = torch.cat([seen[layer].unflatten(-1, (-1, per_head)) for layer in backbone.attention], dim=2)
    close(told.rows.output, truth[:, start : start + NEW], 2e-5)


# -------------------------------------------------------------------------------------------------------- law (b), (d)


@every_family
def test_replay_equals_live(name):
    """Law (b): one teacher-forced pass over prompt and written words hears what was heard while they were written."""
    told = story(name)
    again = replay(family(name), family(name).model, told.inputs, told.written)
    assert again.gaze.shape[1] == NEW + 1, "the row after the last word is heard too"
    same_rows(part(again, (slice(None), slice(NEW))), told.rows, 2e-5)  # some rounding of states that are larger than one


@every_family
def test_a_padded_batch_equals_its_single_rows(name):
    """Law (d): gaze, segment_mass, output, hidden state and logits of a left-padded row are those of the row alone."""
    kind, told = family(name), story(name)
    backbone = find_backbone(kind.model)
    lengths = set()
    for row in range(3):
        alone = kind.batch([row])
        assert alone["attention_mask"].all()
        lengths.add(alone["input_ids"].shape[1])
        made, rows = live(kind.model, alone)
        assert torch.equal(made.sequences[0, alone["input_ids"].shape[1] :], told.written[row])
        own = part(told.rows, slice(row, row + 1))
        cells = rows.gaze.shape[-1]
        same_rows(rows, replace(own, gaze=own.gaze[..., :cells]), 1e-4)
        close(backbone.logits(rows.hidden), backbone.logits(own.hidden), 1e-4)
    assert len(lengths) > 1, "a test of padding needs padding"


# ------------------------------------------------------------------------------------------------------------ law (c)


@every_family
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_watching_changes_no_logit(name, sampled):
    """Law (c): with and without the recorder, ids and logits are the same to the last bit."""
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


# ------------------------------------------------------------------------------------------------------------ law (f)


class Stumble(LogitsProcessor):
    """Fails at the third word."""

    def __init__(self) -> None:
        self.left = 3

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyError("stumbled")
        return scores


def shape_of(model: nn.Module) -> dict[str, Any]:
    """All that a watch could leave behind: attributes, and hooks of each module."""
    return {
        path: (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    }


@every_family
@pytest.mark.parametrize("how", ["done", "unused", "raised", "raised while writing"])
def test_leaving_restores_the_model(name, how):
    """Law (f): after the context, however it was left, the model has the attributes, hooks and words it had before."""
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


def test_a_tap_can_be_used_again():
    """Law (f), the recorder's side: a recorder that was left, or that met an exception, hears the next run as the first."""
    kind, told = family("Qwen2.5-VL"), story("Qwen2.5-VL")
    recorder = AttentionRecorder(kind.model, find_backbone(kind.model).heads())
    with recorder:
        recorder.begin(announce(told.inputs))
        with pytest.raises(KeyError):
            generate(kind.model, told.inputs, logits_processor=LogitsProcessorList([Stumble()]))
    for _ in range(2):
        with recorder:
            recorder.begin(announce(told.inputs))
            generate(kind.model, told.inputs)
            same_rows(recorder.collect(), told.rows, 0)


# ------------------------------------------------------------------------------------------------------------ law (i)


@every_family
def test_hearing_nothing_raises(name):
    """Law (i): no begin, no run, a run of another batch size, and a watch that is over are errors with a way out."""
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
    kind, told = family("Idefics3"), story("Idefics3")
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(kind.batch([1])))
        generate(kind.model, kind.batch([1]))
        recorder.begin(announce(told.inputs))
        with pytest.raises(NoAttentionError):
            recorder.collect()
        generate(kind.model, told.inputs)
        same_rows(recorder.collect(), told.rows, 0)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(2, 4)), min_size=1, max_size=12), st.integers(0, 20)
)
def test_a_track_is_a_list_that_can_be_written_over(puts, start):
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


def test_rows_heard_in_inference_mode_can_be_used_outside_of_it():
    """And blocks begun there can be written on; what is heard never asks for gradients by itself."""
    track, heard = RowBuffer(), [torch.randn(2, 1, 4, requires_grad=True) for _ in range(3)]
    with torch.inference_mode():
        track.put(0, heard[0])
    with torch.enable_grad():
        track.put(1, heard[1])
    with torch.inference_mode():
        track.put(2, heard[2])
    with torch.enable_grad():
        weight = torch.ones(4, requires_grad=True)
        rows = track.joined()
        assert not rows.requires_grad
        (rows @ weight).sum().backward()
    close(weight.grad, torch.cat(heard, dim=1).detach().sum((0, 1)), 1e-5)


def test_a_long_text_is_kept_in_few_pieces():
    """Small tensors that stay from every word would break up the memory that a growing cache leaves (a factor of three)."""
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
    """Once generate is over, its cache is the caller's alone; what was heard can still be told."""
    kind, told = family("LLaVA"), story("LLaVA")
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(kind.batch()))
        made = generate(kind.model, kind.batch())
        gone = weakref.ref(next(value for value in made.values() if isinstance(value, Cache)))
        del made
        gc.collect()
        assert gone() is None
        forward(kind.model, kind.batch())  # without a cache, so another run
        same_rows(recorder.collect(), told.rows, 1e-5)


def test_a_run_of_another_batch_is_not_mixed_in():
    """A forward pass of another batch size between two words leaves no trace, in no field."""
    kind, told = family("LLaVA"), story("LLaVA")
    stranger = kind.batch([0])

    class Interrupt(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            forward(kind.model, stranger)
            return scores

    _, rows = live(kind.model, told.inputs, logits_processor=LogitsProcessorList([Interrupt()]))
    same_rows(rows, told.rows, 0)


def test_a_second_run_is_not_mixed_in():
    """A recorder hears one run: a second one has a cache of its own, and is not appended."""
    kind, told = family("LLaVA"), story("LLaVA")
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(told.inputs))
        generate(kind.model, told.inputs)
        generate(kind.model, told.inputs, max_new_tokens=NEW + 2)
        same_rows(recorder.collect(), told.rows, 0)


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
def test_a_prefill_in_chunks_is_heard_as_one(name):
    """Chunked prefill gives the rows of an unbroken one."""
    kind, told = family(name), story(name)
    # Chunks cannot be cut through pictures, so the row's embeddings go in as text; the prompt is words alone here.
    inputs = {key: told.inputs[key].clone() for key in ("input_ids", "attention_mask")}
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = 7
    _, whole = live(kind.model, inputs)
    _, chunks = live(kind.model, inputs, prefill_chunk_size=5)
    same_rows(chunks, whole, 1e-5)


@pytest.mark.parametrize("words", [1, NEW])
def test_a_prefix_mask_over_written_words_is_refused(words):
    """PaliGemma's prompt attends both ways. Words replayed as prompt would see what follows, so this raises."""
    kind, told = family("PaliGemma"), story("PaliGemma")
    whole = kind.extended(told.inputs, told.written[:, :words])
    whole["token_type_ids"][:] = 0
    with AttentionRecorder(kind.model, [(0, 0)]) as recorder:
        recorder.begin(announce(told.inputs))
        with pytest.raises(UnsupportedError, match="token_type_ids of 1"):
            forward(kind.model, whole)


# ------------------------------------------------------------------------------------------------------ from a look on


@every_family
def test_hidden_becomes_the_models_own_logits(name):
    """The final norm and unembedding of the heard states give generate's logits, whatever the class does to them."""
    told = story(name)
    close(find_backbone(family(name).model).logits(told.rows.hidden), told.logits.float(), 1e-4)


@every_family
def test_words_are_judged_by_the_models_logits(name):
    """Log-probability and entropy are those of the log-softmax of the model's logits, be these heard or computed."""
    kind, told = family(name), story(name)
    backbone = find_backbone(kind.model)
    logs = told.logits.float().log_softmax(-1)
    deaf = replace(told.rows, top_ids=torch.full_like(told.rows.top_ids, -1))
    some = replace(deaf, top_ids=told.rows.top_ids.where(torch.arange(NEW)[:, None] % 3 > 0, -1))
    rarest = logs.argmin(-1)  # not among the likeliest, of which alone it is heard
    judged = [
        (written, token_statistics(backbone, backbone.heads(), rows, written))
        for rows in (told.rows, deaf, some)
        for written in (told.written, rarest)
    ]
    for written, words in judged:
        close(words.logprobs, logs.gather(-1, written[..., None])[..., 0], 1e-4)
        close(words.entropy, -(logs.exp() * logs).sum(-1), 1e-4)
        assert words.attribution.shape == told.rows.output.shape[:3]
    for (_, words), (_, heard) in zip(judged[2:], judged[:2] * 2, strict=True):
        close(words.attribution, heard.attribution, 1e-4)


def test_logits_of_other_rows_are_not_taken_for_those_of_the_words():
    """A pass that is asked for its last row, for all rows or for some by number does not say which the words' rows are."""
    kind, told = family("LLaVA"), story("LLaVA")
    whole = model_inputs(kind.model, kind.extended(told.inputs, told.written))
    for keep in (1, 0, torch.arange(NEW + 1)):
        with AttentionRecorder(kind.model, [(1, 0)]) as recorder:
            recorder.begin(announce(told.inputs))
            kind.model(**whole, use_cache=False, logits_to_keep=keep)
            assert (recorder.collect().top_ids == -1).all()
    with AttentionRecorder(kind.model, [(1, 0)]) as recorder:
        recorder.begin(announce(told.inputs))
        kind.model(**whole, use_cache=False, logits_to_keep=NEW + 1)  # these are the words' rows and no others
        rows = recorder.collect()
    logs = told.logits.log_softmax(-1)
    close(rows.top_logprobs[:, :NEW], top_k_statistics(logs)[1], 1e-4)
    assert torch.equal(rows.top_ids[:, :NEW], told.rows.top_ids)


def test_a_row_that_runs_again_says_what_it_says_now():
    """Words that were taken back and run anew, in a pass that speaks of its last row alone, have nothing said of them."""
    kind, told = family("LLaVA"), story("LLaVA")
    cache = DynamicCache(config=kind.model.config.get_text_config())
    how = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    heard = []
    with AttentionRecorder(kind.model, [(1, 0)]) as recorder:
        recorder.begin(announce(told.inputs))
        kind.model(**told.inputs, **how)
        mask = told.inputs["attention_mask"]
        for words in (told.written[:, :1], told.written[:, 1:2], told.written[:, :2], told.written[:, 2:3]):
            if words.shape[1] > 1:
                cache.crop(-2)
                mask = told.inputs["attention_mask"]
            mask = F.pad(mask, (0, words.shape[1]), value=1)
            kind.model(input_ids=words, attention_mask=mask, **how)
            heard.append((recorder.collect().top_ids[0] >= 0).all(-1).tolist())
        assert (recorder.collect(start=2).top_ids >= 0)[0, :, 0].tolist() == [False, True]
    assert heard == [[True] * 2, [True] * 3, [True, False, False], [True, False, False, True]]


@every_family
def test_readouts_and_the_rest_add_up_to_the_logit(name):
    """Direct logit attribution: what all heads, all MLPs and the embedding add is the logit, norm scale held fixed."""
    kind, told = family(name), story(name)
    backbone = find_backbone(kind.model)
    decoder = kind.model.get_decoder()
    heard: list[Tensor] = []
    handles = [layer.mlp.register_forward_hook(lambda _, args, made: heard.append(made)) for layer in decoder.layers]
    handles.append(
        decoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: heard.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    forward(kind.model, kind.extended(told.inputs, told.written))
    for handle in handles:
        handle.remove()
    assert len(heard) == len(backbone.attention) + 1
    start = told.inputs["input_ids"].shape[1] - 1
    rest = torch.stack(heard).sum(0)[:, start : start + NEW]
    # The lens: the same norm, its scale that of the whole state.
    gain, centres = backbone.final_norm_weight
    state = told.rows.hidden
    if centres:
        rest, state = rest - rest.mean(-1, keepdim=True), state - state.mean(-1, keepdim=True)
    lens = rest * gain / state.pow(2).mean(-1, keepdim=True).sqrt()
    for rival in (0, 5):  # the written word itself, and another one
        token = (told.written + rival) % VOCABULARY
        direction = backbone.unembedding.weight[token]
        looked = direct_logit_attribution(backbone, backbone.heads(), told.rows.output, told.rows.hidden, direction)
        logit = backbone.logits(told.rows.hidden).gather(-1, token[..., None])[..., 0]
        close(looked.sum(-1) + (lens * direction).sum(-1), logit, 1e-3)
        assert looked.abs().mean() > 1e-2, "a test of sums needs summands"


@every_family
def test_a_head_without_a_projection_has_no_readout(name):
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


def test_readout_is_relative_to_the_rivals():
    """The judged attribution is the word's own attribution minus the mean over its twenty likeliest rivals'."""
    told = story("Qwen3-VL")
    backbone = find_backbone(family("Qwen3-VL").model)
    heads = [(0, 3), (2, 1)]
    where = [backbone.heads().index(head) for head in heads]
    rows = replace(told.rows, output=told.rows.output[:, :, where])
    words = token_statistics(backbone, heads, rows, told.written)
    for row in range(3):
        for step in range(NEW):
            ranked = told.logits[row, step].argsort(descending=True).tolist()
            written = int(told.written[row, step])
            rivals = [token for token in ranked[:21] if token != written]
            tokens = torch.tensor([written, *rivals])
            output, hidden = rows.output[row, step].expand(len(tokens), -1, -1), rows.hidden[row, step]
            each = direct_logit_attribution(
                backbone, heads, output, hidden.expand(len(tokens), -1), backbone.unembedding.weight[tokens]
            )
            close(words.attribution[row, step], each[0] - each[1:].mean(0), 1e-4)


@every_family
def test_what_gaze_is_reduced_to_is_made_of_the_gaze(name):
    """Gaze summed over regions as it is read is the gaze on cells times the regions, live and replayed."""
    kind, told = family(name), story(name)
    cells = told.rows.gaze.shape[-1]
    regions = torch.rand(3, cells, 5, generator=torch.Generator().manual_seed(1))
    expected = told.rows.gaze @ regions[:, None]
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(told.inputs), lambda gaze: gaze @ regions[:, None])
        generate(kind.model, told.inputs)
        close(recorder.reduced_gaze(), expected, 1e-5)
        recorder.begin(announce(told.inputs), lambda gaze: gaze @ regions[:, None])
        forward(kind.model, kind.extended(told.inputs, told.written))
        close(recorder.reduced_gaze()[:, :NEW], expected, 1e-5)


@every_family
def test_one_row_can_be_asked_for(name):
    """Between two words, `at` gives the row that predicted the word about to be chosen; asking changes nothing."""
    kind, told = family(name), story(name)
    asked: list[tuple[Tensor, Tensor]] = []

    class Ask(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            asked.append(recorder.step_at(input_ids.shape[1] - 1))
            return scores

    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(announce(told.inputs))
        generate(kind.model, told.inputs, logits_processor=LogitsProcessorList([Ask()]))
        same_rows(recorder.collect(), told.rows, 1e-5)
    close(torch.stack([output for output, _ in asked], dim=1), told.rows.output, 1e-5)
    close(torch.stack([hidden for _, hidden in asked], dim=1), told.rows.hidden, 0)


@every_family
def test_chosen_heads_are_those_of_all(name):
    """A recorder on some heads, given in any order and twice, hears what a recorder on all hears of them, by layer and head."""
    kind, told = family(name), story(name)
    every = find_backbone(kind.model).heads()
    _, rows = live(kind.model, told.inputs, [(2, 3), (0, 1), (2, 0), (0, 1)])
    where = [every.index(head) for head in ((0, 1), (2, 0), (2, 3))]
    close(rows.gaze, told.rows.gaze[:, :, where], 1e-6)
    close(rows.segment_mass, told.rows.segment_mass[:, :, where], 1e-6)
    close(rows.output, told.rows.output[:, :, where], 1e-6)
    close(rows.hidden, told.rows.hidden, 0)


@every_family
def test_half_precision_is_near_the_truth(name):
    """A bfloat16 model's rows are within 0.03 of the same weights run in float32.

    The weights are calmer here: peaky attention magnifies the rounding of the layers below, which is the model's own.
    """
    kind, told = family(name), story(name)
    half = draw_weights(copy.deepcopy(kind.model), peak=0.5).to(torch.bfloat16)
    whole = copy.deepcopy(half).to(torch.float32)
    small = {key: value.bfloat16() if value.is_floating_point() else value for key, value in told.inputs.items()}
    same = {key: value.float() if value.is_floating_point() else value for key, value in small.items()}
    rows, truth = replay(kind, half, small, told.written), replay(kind, whole, same, told.written)
    assert rows.hidden.dtype == torch.bfloat16
    assert rows.gaze.dtype == rows.output.dtype == torch.float32
    close(rows.gaze, truth.gaze, 0.03)
    close(rows.segment_mass, truth.segment_mass, 0.03)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("second", [[(0, 0)], [(2, 1)]], ids=["same layer", "another layer"])
def test_two_taps_on_one_model(second):
    """A watched model is not watched again, and the first watch goes on unharmed."""
    kind, told = family("SmolVLM"), story("SmolVLM")
    with AttentionRecorder(kind.model, [(0, 0), (0, 1)]) as recorder:
        recorder.begin(announce(told.inputs))
        with (
            pytest.raises(UnsupportedError, match=r"recorded already, .* Leave that one first"),
            AttentionRecorder(kind.model, second),
        ):
            pass
        generate(kind.model, told.inputs)
        close(recorder.collect().gaze, told.rows.gaze[:, :, :2], 1e-6)
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


def test_models_without_pictures_or_without_the_registry_are_refused():
    """A text model has no image token; a model that computes its text attention itself has nothing to listen to."""
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
    picture, prompt, generated, first = (SEGMENTS.index(kind) for kind in ("image", "prompt", "generated", "first"))
    kinds = prompts.segments.argmax(-1)
    assert kinds[0, 2:].tolist() == [first, picture, prompt]
    assert kinds[1].tolist() == [first, picture, picture, prompt, picture]
    assert torch.equal(prompts.segments.sum(-1), mask.float())
    assert not prompts.segments[..., generated].any()


def test_prompts_need_no_mask():
    """Without a mask nothing is padding, even where the padding token stands; a picture may come first."""
    prompts = KeyLayout.from_ids(torch.tensor([[IMAGE, PAD, 3]]), None, IMAGE)
    assert prompts.real.all()
    assert prompts.segments[0].argmax(-1).tolist() == [0, 1, 1]
    assert prompts.segments[0].sum(-1).tolist() == [1, 1, 1]


# -------------------------------------------------------------------------------------------------------- fingerprints


@every_family
def test_a_fingerprint_is_of_the_weights(name, tmp_path):
    """Law (h)'s ground: equal after saving and loading and in another precision, different for other weights."""
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
