"""Models whose tokens see the image through cross-attention: what is special about them beside the invariants of every family.

The truth is the eager model's own attention, one row at a time, as the class returns it.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from families import IMAGE, VOCABULARY, Family, draw_weights
from invariants import MAKERS, keys, run_of, write
from test_generation_modes import Waits, counted
from torch import Tensor
from transformers import (
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LogitsProcessor,
    LogitsProcessorList,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from gazeguard import lab
from gazeguard.attention.attribution import direct_logit_attribution, token_statistics
from gazeguard.attention.backbone import find_backbone
from gazeguard.attention.buffers import CapturedActivations
from gazeguard.attention.kernels import Call, flash_mask
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.recording import Recording
from gazeguard.attention.self_test import run_self_test
from gazeguard.attention.visual_keys import visual_keys
from gazeguard.errors import InputError, UnsupportedError
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads, Score, fingerprint
from gazeguard.policy import Policy, parse_policy
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import append_tokens, model_inputs

NAMES = ("Mllama", "Florence-2", "T5Gemma2", "BLIP-2 (T5)", "Idefics", "Idefics (perceiver)")
OWN_KEYS = {"Mllama": ("cross_attention_mask", 17), "Idefics": ("image_attention_mask", 17)}
OWN_KEYS["Idefics (perceiver)"] = ("image_attention_mask", 5)
RESAMPLED = ("BLIP-2 (T5)", "Idefics (perceiver)")  # their image tokens have no locations
NEW = 6

pytestmark = pytest.mark.usefixtures("quietly")


def recorded(kind: Family, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, CapturedActivations]:
    """The generated ids (captions, T), and what all heads did."""
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(KeyLayout.from_ids(*keys(kind, inputs)), reordered=options.get("num_beams", 1) > 1)
        made = write(kind.model, inputs, **options)
        rows = recorder.collect(getattr(made, "beam_indices", None))
    return made.sequences[:, keys(kind, inputs).last + 1 :], rows


def truth(name: str, row: int, written: Tensor) -> Tensor:
    """(T, H, N): the attention of the rows that predict ``generated`` (T,) on the image of row ``row``."""
    kind = MAKERS[name]()
    alone = kind.batch([row])
    twin = copy.deepcopy(kind.model)
    twin.set_attn_implementation("eager")
    whole = model_inputs(twin, kind.extended(alone, written[None]))
    seen: list[Tensor] = []
    for module in find_backbone(twin).attention.values():
        module.register_forward_hook(lambda _, __, result: seen.append(result[-1]))  # of merged attention the encoder's part
    twin(**whole, use_cache=False)
    weights = torch.cat(seen, dim=1)[0, :, keys(kind, alone).last :][:, : len(written)].transpose(0, 1)
    if name in OWN_KEYS:
        mask, count = OWN_KEYS[name]
        return weights[..., alone[mask][0, -1].flatten().bool().repeat_interleave(count)]
    return weights[..., alone["input_ids"][0] == IMAGE]


def assert_captured(name: str, written: Tensor, rows: CapturedActivations, prompts: list[int]) -> None:
    for i, row in enumerate(prompts):
        expected = truth(name, row, written[i])
        assert expected.max() > 0.05
        got = rows.gaze[i, : len(expected)]
        torch.testing.assert_close(got[..., : expected.shape[-1]], expected, rtol=1e-4, atol=2e-5)
        assert not got[..., expected.shape[-1] :].any()
        torch.testing.assert_close(rows.segment_mass[i].sum(-1), torch.ones(rows.segment_mass[i].shape[:2]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, 1),
        ({"do_sample": True, "num_return_sequences": 2, "top_k": 0}, 2),
        ({"num_beams": 3}, 1),
        ({"use_cache": False}, 1),
        ({"cache_implementation": "static"}, 1),
    ],
    ids=["greedy", "sampled twice", "beams", "no cache", "static"],
)
def test_the_picture_is_where_the_class_says(name, options, copies):
    """However tokens are chosen, the gaze is the class's own attention on its image, and the segment_mass add up."""
    kind = MAKERS[name]()
    torch.manual_seed(3)
    written, rows = recorded(kind, kind.batch(), **options)
    assert_captured(name, written, rows, [row for row in range(3) for _ in range(copies)])


@pytest.mark.parametrize("name", ["Florence-2", "T5Gemma2"])  # of Mllama's cache transformers cuts the image off, too
def test_guesses_that_are_rejected_leave_no_rows(name):
    """Prompt look-up: rows are those of the tokens that stand."""
    kind = MAKERS[name]()
    written, rows = recorded(kind, kind.batch([1]), prompt_lookup_num_tokens=3, max_matching_ngram_size=1, max_new_tokens=12)
    assert_captured(name, written, rows, [1])


@pytest.mark.parametrize("name", NAMES)
def test_the_device_is_not_waited_for(name, monkeypatch):
    """After the first pass no tensor inside the recorder is turned into a number or moved."""
    kind, waits = MAKERS[name](), Waits()
    for own in ("on_pass_start", "on_attention", "on_head_output", "on_final_hidden"):
        monkeypatch.setattr(Recording, own, counted(getattr(Recording, own), waits))
    recorded(kind, kind.batch())
    assert waits.found == []


# ------------------------------------------------------------------------------------------------------------- steering


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_steering_is_a_bias_in_the_mask(name, kernel):
    """Heads that are turned in every row are those of the eager model with the same bias on the same keys."""
    kind, inputs, *_ = run_of(name)
    prompts = KeyLayout.from_ids(*keys(kind, inputs))
    cell, keyed = 2, prompts.real.shape[1]
    turned, twin = copy.deepcopy(kind.model), copy.deepcopy(kind.model)
    turned.set_attn_implementation(kernel)
    twin.set_attn_implementation("eager")
    with AttentionRecorder(turned, find_backbone(turned).heads()) as recorder:
        recorder.begin(prompts)
        bias = torch.zeros(3, len(recorder.heads), prompts.columns.shape[1])
        bias[:, :, cell] = 2.0
        recorder.steer(bias, prompt=True)
        made = write(turned, inputs)
        rows = recorder.collect()

    def add(_: Any, args: Any, options: dict[str, Any]) -> Any:
        name = next(name for name in ("merged_attention_mask", "attention_mask", "mask") if name in options)
        mask = options[name]
        more = torch.zeros(3, 1, 1, mask.shape[-1])
        more[torch.arange(3), 0, 0, prompts.columns[:, cell] + mask.shape[-1] - keyed] = 2.0
        return args, {**options, name: mask + more}

    for module in find_backbone(twin).attention.values():
        module.register_forward_pre_hook(add, with_kwargs=True)
    with AttentionRecorder(twin, find_backbone(twin).heads()) as recorder:
        recorder.begin(prompts)
        expected = write(twin, inputs)
        torch.testing.assert_close(rows.gaze, recorder.collect().gaze, rtol=0, atol=2e-5)
    plain = run_of(name)[3]
    assert torch.equal(expected.sequences, made.sequences)
    for left, right in zip(expected.logits, made.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)
    assert (plain.logits[0] - made.logits[0]).abs().max() > 1e-2, "a test of turning needs a turn"


# --------------------------------------------------------------------------------------------------------------- Mllama


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("T5Gemma2", "is an encoder-decoder, and GazeGuard does not know where .* Use florence2 or .*t5gemma2, or a model"),
        ("Mllama", r"through cross-attention \(layers.1.cross_attn\).* Use mllama or idefics, or a model"),
    ],
)
def test_a_kind_that_is_not_known_is_refused(name, said):
    """Nothing is taken for granted of a class because it is built alike."""
    model = MAKERS[name]().model
    model.config.model_type = "strange"
    with pytest.raises(UnsupportedError, match=said):
        find_backbone(model)


def test_only_the_looking_layers_are_watched():
    """Mllama's self-attention sees no image; an encoder's own attention and its decoder's self-attention neither."""
    assert {layer for layer, _ in find_backbone(MAKERS["Mllama"]().model).heads()} == {1, 3}
    with pytest.raises(UnsupportedError, match=r"no head \(0, 0\)"):
        AttentionRecorder(MAKERS["Mllama"]().model, [(0, 0)])
    model = MAKERS["Florence-2"]().model
    path_of = {id(module): path for path, module in model.named_modules()}
    for layer, module in find_backbone(model).attention.items():
        assert path_of[id(module)].endswith(f"decoder.layers.{layer}.encoder_attn")


@pytest.mark.parametrize("name", ["Mllama", "Idefics"])
def test_what_a_gated_head_delivers_is_gated(name):
    """The last layer's heads together are what the layer's attention adds to the residual stream."""
    kind, inputs, _, _, rows = run_of(name)
    backbone = find_backbone(kind.model)
    number = max(backbone.attention)
    layer = backbone.gated[number]
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    kind.model(**model_inputs(kind.model, inputs), use_cache=False)
    for handle in handles:
        handle.remove()
    added = (seen[1] - seen[0])[:, -1]
    delivered = rows.output[:, 0, 4:].flatten(1) @ backbone.output_weight(number, range(4)).T
    torch.testing.assert_close(delivered, added, rtol=1e-4, atol=1e-5)
    assert added.abs().max() > 0.05


def test_a_row_of_text_sees_no_picture():
    """Its mask opens no tile: no cell is captured in it, the other row is what it is alone, and a grid is refused."""
    kind = MAKERS["Mllama"]()
    inputs = kind.batch([0, 2])
    inputs["cross_attention_mask"][1] = 0
    _, rows = recorded(kind, inputs)
    assert not rows.gaze[1].any()
    assert not rows.segment_mass[1].any()
    _, alone = recorded(kind, kind.batch([0]))
    torch.testing.assert_close(rows.gaze[:1], alone.gaze, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="Row 1 of the batch has no image"):
        image_grids(kind.model, None, inputs, *keys(kind, inputs)[:2])


def test_a_batch_that_does_not_tell_its_pictures_is_refused():
    """Without a mask the class would be causal over tiles; with another batch's keys nothing fits."""
    kind = MAKERS["Mllama"]()
    inputs = kind.batch([0])
    bare = {name: value for name, value in inputs.items() if name != "cross_attention_mask"}
    with pytest.raises(InputError, match=r"got no cross_attention_mask.*pass the processor's output whole"):
        keys(kind, bare)
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(KeyLayout.from_ids(*keys(kind, inputs)))
        with pytest.raises(UnsupportedError, match=r"Layer 1 attends to 68 keys, but .* has 34"):
            write(kind.model, kind.batch([1]))


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (200, 30), (32, 32), (20, 11)])
def test_tiles_lie_where_the_processor_put_them(size):
    """One bright block of an image is found in the image tokens whose boxes it covers, whatever the image's shape."""
    edge, patch = 32, 8
    processor = MllamaImageProcessorPil(size={"height": edge, "width": edge}, max_image_tiles=4)
    model = copy.deepcopy(MAKERS["Mllama"]().model)
    vision = model.config.vision_config
    vision.image_size, vision.patch_size = edge, patch
    vision.supported_aspect_ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    width, height = size
    image = np.zeros((height, width, 3), np.uint8)
    box = (width // 2, height // 3, width * 3 // 4, height * 3 // 4)
    image[box[1] : box[3], box[0] : box[2]] = 255
    made = processor([[image]], return_tensors="pt")
    rows, columns = vision.supported_aspect_ratios[int(made["aspect_ratio_ids"]) - 1]
    tiles = made["pixel_values"][0, 0, : rows * columns].mean(1)  # (tiles, edge, edge)
    light = tiles.unfold(1, patch, patch).unfold(2, patch, patch).mean((-1, -2)).flatten(1)
    light = (light - light.min()) / (light.max() - light.min())
    mask = torch.zeros(1, 3, 1, 4, dtype=torch.long)
    mask[..., : rows * columns] = 1
    inputs = {**made, "cross_attention_mask": mask}
    told = visual_keys(model, inputs, torch.tensor([[IMAGE, 5, 6]]), None)
    grid = image_grids(model, None, inputs, told.ids, told.mask, [[size]])[0]
    cover = grid.overlap(box).reshape(rows * columns, -1)
    assert not cover[:, 0].any(), "a class cell has no place"
    assert np.isnan(grid.boxes.reshape(rows * columns, -1, 4)[:, 0]).all()
    assert np.corrcoef(cover[:, 1:].ravel(), light.numpy().ravel())[0, 1] > 0.95
    assert image_grids(model, None, inputs, told.ids, told.mask)[0].sizes == ((columns * edge, rows * edge),)


def test_words_that_a_model_keeps_apart_have_directions():
    """Idefics' added tokens: the rows of the unembedding are what it makes of units, and judging a text of them works."""
    kind, _, _, _, rows = run_of("Idefics")
    backbone = find_backbone(kind.model)
    units = torch.eye(rows.hidden.shape[-1])
    torch.testing.assert_close(backbone.unembedding_rows()(torch.arange(VOCABULARY + 2)), backbone.unembedding(units).T)
    words = token_statistics(backbone, backbone.heads(), rows, torch.full((3, NEW), VOCABULARY + 1))
    torch.testing.assert_close(words.logprobs, backbone.logits(rows.hidden).log_softmax(-1)[..., -1])
    assert words.attribution.isfinite().all()


# ---------------------------------------------------------------------------------------------------- encoder-decoders


def test_logits_of_tied_embeddings_are_scaled():
    """T5 with tied embeddings scales its logits, and so does what is read."""
    kind = MAKERS["BLIP-2 (T5)"]()
    kind.model.language_model.config.scale_decoder_outputs = True
    inputs = kind.batch([0])
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(KeyLayout.from_ids(*keys(kind, inputs)))
        made = write(kind.model, inputs)
        rows = recorder.collect()
    torch.testing.assert_close(recorder.backbone.logits(rows.hidden), torch.stack(made.logits, dim=1), rtol=1e-4, atol=1e-4)


def test_flash_attention_over_an_encoder_is_open_but_for_padding():
    """A module that is not causal: each row sees every real key."""
    module = torch.nn.Module()
    module.is_causal = False
    query, key = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    opening = flash_mask(Call(module, query, key, mask, {}), 2)
    assert torch.equal(opening == 0, mask.bool()[:, None, None].expand(2, 1, 2, 5))
    assert (flash_mask(Call(module, query, key, None, {}), 2) == 0).all()
    assert (flash_mask(Call(module, query, key, None, {"is_causal": True}), 2) < 0).sum() == 1


def test_where_every_sum_is_normed_the_attribution_follows_each_norm():
    """BART: what a head adds goes through all norms after it, each with the scale that it had for that row."""
    kind, inputs, written, made, rows = run_of("Florence-2")
    backbone = find_backbone(kind.model)
    layers, heads = kind.model.model.language_model.decoder.layers, backbone.heads()
    seen: dict[Any, Tensor] = {}
    watched = [module for layer in layers for name, module in layer.named_children() if "norm" in name]
    watched += [module.out_proj for module in backbone.attention.values()]
    handles = [
        module.register_forward_pre_hook(lambda module, args: seen.update({module: args[0][:, :NEW]})) for module in watched
    ]
    kind.model(**model_inputs(kind.model, kind.extended(inputs, written)), use_cache=False)
    for handle in handles:
        handle.remove()

    def through(norm: torch.nn.LayerNorm, part: Tensor) -> Tensor:
        spread = (seen[norm].var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        return (part - part.mean(-1, keepdim=True)) / spread * norm.weight

    direction = torch.randn(3, NEW, rows.hidden.shape[-1], generator=torch.Generator().manual_seed(7))
    got = direct_logit_attribution(backbone, heads, rows.output, rows.hidden, direction)
    for i, (number, head) in enumerate(heads):
        projection = backbone.projection(number)
        own = torch.zeros_like(seen[projection])
        own[..., 12 * head : 12 * head + 12] = seen[projection][..., 12 * head : 12 * head + 12]
        part = own @ projection.weight.T
        for layer in layers[number:]:
            if layer is not layers[number]:
                part = through(layer.self_attn_layer_norm, part)
            part = through(layer.final_layer_norm, through(layer.encoder_attn_layer_norm, part))
        torch.testing.assert_close(got[..., i], (direction * part).sum(-1), rtol=1e-3, atol=1e-4)
    assert got.abs().mean() > 0.1
    words = token_statistics(backbone, heads, rows, written)
    logs = torch.stack(made.logits, dim=1).log_softmax(-1)
    torch.testing.assert_close(words.logprobs, logs.gather(-1, written[..., None])[..., 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Florence-2", "T5Gemma2", "BLIP-2 (T5)"])
def test_a_longer_start_of_the_decoder_is_no_caption(name):
    """Tokens that the caller gives the decoder are the prompt's: rows begin with the first token after them."""
    kind = MAKERS[name]()
    inputs = kind.batch([0])
    plain, rows = recorded(kind, inputs)
    given = {**inputs, "decoder_input_ids": plain[:, :2]}
    told = visual_keys(kind.model, given, inputs["input_ids"], inputs["attention_mask"])
    assert told.last == 2  # the start token, which generate puts in front, and two words
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(KeyLayout.from_ids(*told))
        made = write(kind.model, given)
        again = recorder.collect()
    assert torch.equal(made.sequences[:, 3:][:, : NEW - 2], plain[:, 2:])
    torch.testing.assert_close(again.gaze[:, : NEW - 2], rows.gaze[:, 2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_doctor_passes_them(name):
    """Grids, tokens, eager truth and padding, through the package's own ways to extend and pad a batch."""
    kind = MAKERS[name]()
    checks = run_self_test(kind.model, None, kind.batch([0, 2]))
    assert len(checks) == 5
    told = "\n".join(map(str, checks))
    assert [check.ok for check in checks] == [True, name not in RESAMPLED, True, True, True], told


@pytest.mark.parametrize("name", NAMES)
def test_a_caption_follows_its_prompt(name):
    """What a batch is for a replay: the family's own way of writing on, with the shorter caption padded."""
    kind = MAKERS[name]()
    inputs = kind.batch([0, 1])
    written = torch.randint(2, IMAGE, (2, 4), generator=torch.Generator().manual_seed(2))
    made = append_tokens(kind.model, inputs, [written[0].numpy(), written[1, :2].numpy()])
    expected = kind.extended(inputs, written)
    assert set(made) == set(expected)
    for key, value in expected.items():
        if key in ("input_ids", "decoder_input_ids") and value.shape != inputs.get(key, value[:, :0]).shape:
            assert made[key][1, -2:].tolist() == [0, 0]
            assert torch.equal(made[key][1, :-2], value[1, :-2])
        assert torch.equal(made[key][0], value[0])


RERANK = parse_policy({"version": 1, "name": "attribution", "rerank": {"attribution": 0.5}})


def guarded(kind: type[PreTrainedModel], config: Any, processor: ProcessorMixin, policy: str | Policy) -> GazeGuard:
    """A guard around a model of this configuration with the processor's vocabulary, on two heads."""
    config.get_text_config(decoder=True).vocab_size = len(processor.tokenizer)
    config.image_token_id = config.image_token_index = processor.tokenizer.image_token_id
    model = draw_weights(kind._from_config(config, attn_implementation="sdpa"))
    model.generation_config.update(suppress_tokens=[processor.tokenizer.image_token_id])
    every = find_backbone(model).heads()
    figures = ("mass", "selectivity", "contrast", "hit_rate", "shuffled_mass", "sink_mass")
    none = Score(**dict.fromkeys(figures, (0.0,) * len(every)), matrix=())
    heads = GazeHeads(
        model=fingerprint(model),
        model_class=kind.__name__,
        heads=(every[1], every[-2]),
        all_heads=tuple(every),
        narration=none,
        query=none,
        strips=2,
        panels=2,
        split_half=1.0,
    )
    return GazeGuard(model, processor, policy, heads=heads)


@pytest.fixture
def tokenizer(lab_vlm):
    """The lab's, with the names that processors ask for."""
    made = copy.deepcopy(lab_vlm[1].tokenizer)
    made.image_token, made.image_token_id = "<image>", made.convert_tokens_to_ids("<image>")
    return made


@pytest.fixture
def watched(tokenizer):
    """A guard around Florence-2 with its real processor, and a start that generate would force."""
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    images.image_seq_length = 5
    config = copy.deepcopy(MAKERS["Florence-2"]().model.config)
    made = guarded(Florence2ForConditionalGeneration, config, Florence2Processor(images, tokenizer), RERANK)
    made.model.generation_config.update(decoder_start_token_id=2, forced_bos_token_id=1)
    return made


def test_a_guard_watches_an_encoder_decoder(watched):
    """Live and replayed, alone and padded: rows follow the decoder's own start, and the gaze is the class's own."""
    images = [sample.image for sample in lab.samples("test", 2)]
    live = watched.caption(images[0], "Describe the picture.", max_new_tokens=8, do_sample=False)
    assert len(live.trace) == 8
    assert 1 not in live.trace.token_ids, "the forced start is no token"
    assert live.trace.grid.sizes == (images[0].size,)
    captions, prompts = ["a red star", "a blue square and a red star"], ["Describe.", "Describe the picture now."]
    reports = watched.check_all(images, captions, prompts)
    twin = copy.deepcopy(watched.model)
    twin.set_attn_implementation("eager")
    for report, image, prompt in zip(reports, images, prompts, strict=True):
        made = encode(twin, watched.processor, [image], [prompt]).inputs
        ids = torch.tensor([[2, 1, *report.trace.token_ids]])
        seen = twin(**{**made, "decoder_input_ids": ids}, use_cache=False, output_attentions=True).cross_attentions
        image = made["input_ids"][0] == watched.model.config.image_token_id
        for i, (layer, head) in enumerate(report.trace.heads):
            expected = seen[layer][0, head, 1:-1][:, image].numpy()
            np.testing.assert_allclose(report.trace.gaze[:, i], expected, rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedError, match="custom_generate=guard gets no prompt from an encoder-decoder"):
        watched.model.generate(**made, custom_generate=watched, max_new_tokens=4)


def test_a_guard_watches_mllama(lab_vlm, tokenizer):
    """With its real processor, reranking: images of other shapes in one batch are each as alone, in their own pixels."""
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    config = copy.deepcopy(MAKERS["Mllama"]().model.config)
    config.vision_config.supported_aspect_ratios = [[1, 1], [1, 2], [2, 1]]
    processor = MllamaProcessor(images, tokenizer, chat_template=lab_vlm[1].chat_template)
    guard = guarded(MllamaForConditionalGeneration, config, processor, RERANK)
    images = [sample.image for sample in lab.samples("test", 2)]
    images[1] = images[1].resize((200, 80))
    captions, prompts = ["a red star", "a blue square and a red star"], ["Describe.", "Describe the picture now."]
    for report, image, caption, prompt in zip(
        guard.check_all(images, captions, prompts), images, captions, prompts, strict=True
    ):
        alone = guard.check(image, caption, prompt).trace
        assert report.trace.grid.sizes == (image.size,)
        for field in ("gaze", "segment_mass", "attribution", "logprobs"):
            np.testing.assert_allclose(getattr(report.trace, field), getattr(alone, field), rtol=0, atol=1e-4)
    live = guard.caption(images[1], prompts[1], max_new_tokens=8, do_sample=False).trace
    assert len(live) == 8
    assert live.gaze.shape[2] == len(live.grid) == 34
    batch = encode(guard.model, processor, images, prompts).inputs
    guard.model.generate(**batch, custom_generate=guard, max_new_tokens=3)
    assert [report.trace.grid.sizes for report in guard.reports] == [((16, 16),), ((32, 16),)]
    guard.generate(**batch, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert len(guard.reports) == 4


@pytest.mark.parametrize("name", NAMES)
def test_each_row_can_be_had_while_words_are_written(name):
    """What `AttentionRecorder.step_at` says before a token is chosen becomes the logits that it is chosen from."""
    kind = MAKERS[name]()
    inputs = kind.batch()

    class Look(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            _, hidden = recorder.step_at(input_ids.shape[1] - 1)
            torch.testing.assert_close(recorder.backbone.logits(hidden), scores, rtol=1e-4, atol=1e-4)
            return scores

    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(KeyLayout.from_ids(*keys(kind, inputs)))
        write(kind.model, inputs, logits_processor=LogitsProcessorList([Look()]), suppress_tokens=None, min_new_tokens=None)
