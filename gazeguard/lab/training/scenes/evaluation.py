"""A quick check of the scenes VLM in training: greedy captions and yes/no answers on a few images."""

from __future__ import annotations

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gazeguard.lab.scenes import captions
from gazeguard.lab.scenes.truth import Scores
from gazeguard.lab.scenes.world import DrawnImage, Split, generator, make_image

CAPTION_TOKENS, ANSWER_TOKENS = 120, 4


def inputs_for(processor: LlavaProcessor, images: list[DrawnImage], prompts: list[str]) -> dict[str, torch.Tensor]:
    """A left-padded batch of one image and one prompt each, through the chat template."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}], add_generation_prompt=True
        )
        for prompt in prompts
    ]
    return processor(images=[image.draw() for image in images], text=texts, return_tensors="pt", padding=True)


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: list[DrawnImage],
    prompts: list[str],
    tokens: int,
    size: int = 24,
) -> list[str]:
    """What the model answers, greedily, in batches of ``size``."""
    weights = next(model.parameters())
    found: list[str] = []
    for start in range(0, len(images), size):
        batch = inputs_for(processor, images[start : start + size], prompts[start : start + size])
        batch = {key: value.to(weights.device) for key, value in batch.items()}
        if not torch.is_autocast_enabled(weights.device.type):
            batch["pixel_values"] = batch["pixel_values"].to(weights.dtype)
        output = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        found += processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def evaluate(model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int, split: Split) -> dict[str, float]:
    """CHAIR_i, recall and yes/no accuracy on ``count`` scenes and comic pages; the model's mode is put back."""
    training = model.training
    model.eval()
    rngs = [generator(split, 0, f"quick/{index}") for index in range(count)]
    images = [make_image(rng, "page" if index % 3 == 2 else "scene", split) for index, rng in enumerate(rngs)]
    questions = [captions.yes_no_turn(rng, image) for rng, image in zip(rngs, images, strict=True) for _ in range(2)]
    twice = [image for image in images for _ in range(2)]
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        written = answers(
            model,
            processor,
            images,
            ["Describe all panels." if x.panels else "Describe the picture." for x in images],
            CAPTION_TOKENS,
        )
        replies = answers(model, processor, twice, [turn.prompt for turn in questions], ANSWER_TOKENS)
    scores = Scores()
    for image, caption in zip(images, written, strict=True):
        scores = scores.add(image, caption)
    right = sum(reply.strip() == turn.answer for reply, turn in zip(replies, questions, strict=True))
    print("  " + " || ".join(text.replace("\n", " / ") for text in written[:4]), flush=True)
    model.train(training)
    return {**scores.rates(), "yes_no_accuracy": right / len(questions)}
