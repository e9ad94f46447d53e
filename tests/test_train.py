"""Does the lab learn from what the processor would give it, and does an interrupted training go on as if nothing had been?"""

from __future__ import annotations

import json
import warnings
from functools import cache, partial
from itertools import islice

import pytest
import torch
import typer
from labkit import processor
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from gazeguard.heads.pictographs import COLOURS
from gazeguard.lab.training import tiny_train as training
from gazeguard.lab.training.tiny_model import build_model
from gazeguard.lab.training.tiny_train import (
    LEARNERS,
    Collator,
    FrozenLearner,
    Learner,
    batches,
    patch_labels,
    rate,
    save_checkpoint,
    train,
)
from gazeguard.lab.world import NOUNS, PATCH, PATCHES, conversations, descriptions, samples
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.encoding import encode


@pytest.fixture(scope="module")
def collate() -> Collator:
    return Collator(processor())


def conversation(sample) -> list[dict]:
    told = []
    for i, turn in enumerate(sample.turns):
        picture = [{"type": "image", "image": sample.image}] if i == 0 else []
        told.append({"role": "user", "content": [*picture, {"type": "text", "text": turn.prompt}]})
        told.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return told


def test_the_collator_says_what_processor_and_chat_template_say(collate):
    """Ids and pixels of whole conversations; targets are the answers and their ends, each one place early."""
    made = list(islice(conversations(0, 0), 12))
    batch = collate(made)
    for row, sample in enumerate(made):
        wanted = processor().apply_chat_template(conversation(sample), tokenize=True, return_dict=True, return_tensors="pt")
        length = wanted["input_ids"].shape[1]
        assert torch.equal(batch.input_ids[row, :length], wanted["input_ids"][0])
        assert (batch.input_ids[row, length:] == processor().tokenizer.pad_token_id).all()
        torch.testing.assert_close(batch.pixel_values[row], wanted["pixel_values"][0], atol=1e-6, rtol=0)
        targets = batch.targets[row]
        spoken = targets != -100
        assert torch.equal(targets[:-1][spoken[:-1]], batch.input_ids[row, 1:][spoken[:-1]])
        end = processor().tokenizer.eos_token
        assert processor().tokenizer.decode(targets[spoken]) == "".join(turn.answer + end for turn in sample.turns)


def test_answers_to_questions_have_a_loss_of_their_own(collate):
    """The answers' targets are marked, ends included; those of descriptions are not."""
    made = list(islice(conversations(0, 0), 12))
    batch = collate(made)
    end = processor().tokenizer.eos_token
    for row, sample in enumerate(made):
        asked = "".join(turn.answer + end for turn in sample.turns if turn.prompt.endswith("?"))
        assert processor().tokenizer.decode(batch.targets[row][batch.answers[row]]) == asked
    assert batch.answers.any()
    assert (batch.targets[~batch.answers] != -100).any()


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("step", [1, 15, 16, 21])
def test_batches_can_be_taken_up_anywhere(collate, step):
    """The stream from a step on is the stream from the start without what came before, across pools."""
    stream = partial(batches, collate, 0, steps=24, size=2)
    whole = list(stream(0))
    assert len(whole) == 24
    rest = list(stream(step))
    assert len(rest) == 24 - step
    assert all(map(equal, whole[step:], rest))
    assert not equal(whole[0], whole[1])


def test_lessons_never_repeat(collate):
    """No picture comes twice in the batches of a training, and another seed has others."""
    seen = [p.numpy().tobytes() for seed in (0, 1) for b in batches(collate, seed, 0, 20, 2) for p in b.pixel_values]
    assert len(set(seen)) == len(seen) == 80


def test_patches_are_marked_with_what_lies_in_them():
    """The patch under the centre of each object has its noun and colour; there is nothing where no object reaches."""
    for sample in samples("train", 100):
        nouns, colours = (labels.reshape(PATCHES, PATCHES) for labels in patch_labels(sample.drawing))
        touched = torch.zeros(PATCHES, PATCHES, dtype=torch.bool)
        for each in sample.drawing.objects:
            x0, y0, x1, y1 = each.box
            patch = (y0 + y1) // 2 // PATCH, (x0 + x1) // 2 // PATCH
            assert NOUNS[nouns[patch] - 1] == each.noun
            assert list(COLOURS)[colours[patch] - 1] == each.colour
            touched[y0 // PATCH : -(-y1 // PATCH), x0 // PATCH : -(-x1 // PATCH)] = True
        assert ((nouns > 0) == (colours > 0)).all()
        assert (nouns[~touched] == 0).all()


@pytest.mark.parametrize("steps", [3, 200, 6000])
def test_the_rate_is_a_share_that_ramps_twice_and_ends_low(steps):
    joint = int(Learner.warm_up * steps)
    rates = [rate(step, steps, joint) for step in range(steps)]
    assert all(0 < share <= 1 for share in rates)
    assert rates[-1] < 0.06 or steps < 100
    if joint > 10:
        assert rates[joint] < rates[joint - 1] / 5  # the language model starts slowly
        assert rates[joint] < rates[joint + 20]


@cache
def llava():
    return FrozenLearner.build_processor()


def frozen() -> FrozenLearner:
    torch.manual_seed(0)
    return FrozenLearner(FrozenLearner.build_model(llava(), width=32, layers=2), llava()).train()


def learner() -> Learner:
    torch.manual_seed(0)
    return Learner(build_model(processor(), width=32, layers=2), processor()).train()


@pytest.mark.parametrize("kind", LEARNERS)
def test_an_interrupted_training_goes_on_bitwise(kind, tmp_path, monkeypatch):
    """Stopped after a saved state and started again, it ends with the very state of one that was never stopped."""
    run = partial(train, steps=10, batch_size=2, width=32, layers=2, save_every=6, kind=kind)
    run(tmp_path / "whole")

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", crash)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    run(tmp_path / "stopped")
    for name in ("state.safetensors", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    assert [json.loads(line)["step"] for line in logs[0]] == [10]
    assert logs[0] == logs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


def test_a_finished_run_can_be_continued(tmp_path):
    """--start takes weights and vocabulary of another run, whose steps are counted; there is no second warm-up."""
    run = partial(train, batch_size=2, width=32, layers=2, save_every=6)
    run(tmp_path / "first", steps=10)
    run(tmp_path / "second", steps=14, start=tmp_path / "first", done=10, learning_rate=0.0)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first), "without a learning rate nothing moves"
    assert int(load_file(tmp_path / "second" / "state.safetensors")["step"]) == 14
    run(tmp_path / "third", steps=14, start=tmp_path / "first", done=10)
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert any(not torch.equal(first[name], third[name]) for name in first if "text_model.layers" in name)


def test_the_encoder_alone_learns_in_the_warm_up(collate):
    """Then no gradient reaches the language model's layers; afterwards it reaches everything."""
    taught = learner()
    batch = collate(list(islice(conversations(0, 0), 2)))
    *_, patches = taught(batch, encoder_only=True)
    patches.backward()
    layers = [p for name, p in taught.named_parameters() if "text_model.layers" in name]
    assert layers
    assert all(p.grad is None for p in layers)
    words, answers, patches = taught(batch, encoder_only=False)
    (words + answers + patches).backward()
    assert all(p.grad is not None for p in taught.parameters())


def test_the_second_kind_freezes_its_encoder():
    """The encoder learns alone; then nothing reaches it, and the projector and the language model learn."""
    taught = frozen()
    batch = Collator(llava())(list(islice(descriptions(0, 0), 2)))
    *_, patches = taught(batch, encoder_only=True)
    patches.backward()
    learns = {name for name, p in taught.named_parameters() if p.grad is not None and p.grad.any()}
    assert all("vision_tower" in name or "probe" in name for name in learns)
    assert any("encoder.layers.0" in name for name in learns)
    taught.zero_grad()
    words, answers, patches = taught(batch, encoder_only=False)
    (words + answers + patches).backward()
    learns = {name for name, p in taught.named_parameters() if p.grad is not None}
    assert any("projector" in name for name in learns)
    assert any("language_model.layers.0" in name for name in learns)
    assert not any("vision_tower" in name or "probe" in name for name in learns)


def test_the_second_kind_reads_what_its_own_forward_reads():
    """The learner's shortcut past `LlavaModel.forward` gives the model's own loss."""
    taught = frozen().eval()
    batch = Collator(llava())(list(islice(descriptions(0, 0), 2)))
    with torch.no_grad():
        words, *_ = taught(batch, encoder_only=False)
        logits = taught.model(input_ids=batch.input_ids, pixel_values=batch.pixel_values[:, 0]).logits
    spoken = batch.targets != -100
    torch.testing.assert_close(words, torch.nn.functional.cross_entropy(logits[spoken], batch.targets[spoken]))


def test_the_second_kind_is_told_what_its_processor_says():
    """Collator, processor and chat template agree, and the patches lie in twelve rows of twelve."""
    made = list(islice(descriptions(0, 0), 4))
    batch = Collator(llava())(made)
    for row, sample in enumerate(made):
        wanted = llava().apply_chat_template(conversation(sample), tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(batch.input_ids[row, : wanted["input_ids"].shape[1]], wanted["input_ids"][0])
        torch.testing.assert_close(batch.pixel_values[row], wanted["pixel_values"], atol=1e-5, rtol=0)
        assert all(not turn.prompt.endswith("?") for turn in sample.turns)
    model = frozen().model
    asked = encode(model, llava(), [made[0].image], ["Describe the picture."])
    (grid,) = image_grids(model, llava(), asked.inputs, asked.prompt_ids, asked.prompt_mask, [[made[0].image.size]])
    assert grid.pixels(13) == pytest.approx((12, 12, 24, 24))
    assert len(grid) == 144


def test_a_kind_that_is_none_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="Unknown kind 'bert'; expected one of: idefics3, llava"):
        train(tmp_path / "none", kind="bert")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_checkpoint_is_an_ordinary_one(kind, tmp_path):
    """The Auto classes load it as float32, with the logits of the model up to the rounding of its weights to fp16."""
    taught, made_by = {"idefics3": (learner, processor), "llava": (frozen, llava)}[kind]
    model = taught().model.eval()
    save_checkpoint(model, made_by(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        again = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    stored = sum(p.numel() for p in loaded.parameters()) * 2
    assert (tmp_path / "model.safetensors").stat().st_size < stored * 1.1
    sample = samples("test", 1)[0]
    talk = [[{"role": "user", "content": [{"type": "image", "image": sample.image}, {"type": "text", "text": "What?"}]}]]
    made = [
        used.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        for used in (made_by(), again)
    ]
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    with torch.no_grad():
        was, now = model(**made[0]).logits, loaded(**made[1]).logits
        halved = model.half().float()(**made[0]).logits
    torch.testing.assert_close(now, was, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(now, halved, atol=1e-5, rtol=1e-5)
