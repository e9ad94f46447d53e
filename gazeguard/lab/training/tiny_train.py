"""Training of the tiny lab models from nothing, on two cores: ``python -m gazeguard.lab.training.tiny_train --out DIR``.

Encoder and language model are trained together from the first joint step to the last. Four measures make that short:

* a *warm-up* in which the encoder alone is trained to predict the noun, the colour and the location of each patch, in the
  token embeddings of the language model; this loss stays on as an auxiliary term, so that the encoder stays accurate;
* a *curriculum*: one panel or object first, then more (six panels from the start end on a plateau);
* a loss of their own for answers to questions, which would have little weight among the captions' tokens otherwise;
* bfloat16 autocast.

Progress is a bar on stderr and ``DIR/log.jsonl``; the state is saved every ``--save-every`` steps, and the same command
resumes from it. Everything is seeded; the conversations are drawn on the fly and never repeat.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from gazeguard.heads.pictographs import COLOURS
from gazeguard.lab.training.tiny_model import (
    ASSISTANT,
    BOS,
    EOS,
    FAKE_IMAGE,
    GLOBAL_IMAGE,
    IMAGE,
    USER,
    build_llava,
    build_llava_processor,
    build_model,
    build_processor,
)
from gazeguard.lab.world import NOUNS, PATCH, PATCHES, Drawing, Sample, conversations, descriptions

CURRICULUM = ((0.06, 1), (0.12, 2), (0.19, 4), (1.0, 8))  # until this share of the joint steps: at most so many objects
PATCH_WEIGHT = 0.3  # of the patches' loss once the language model is trained, too
ANSWER_WEIGHT = 1.0  # of the mean loss over answers to questions, of which there are few


@dataclass(frozen=True)
class Batch:
    """Conversations as tensors."""

    input_ids: Tensor  # (batch, tokens) int64, right-padded
    targets: Tensor  # (batch, tokens) int64: the next token where it is part of an answer, else -100
    answers: Tensor  # (batch, tokens) bool: the target is part of the answer to a question
    pixel_values: Tensor  # (batch, 1, 3, PAGE, PAGE) float32 in [-1, 1]
    nouns: Tensor  # (batch, patches) int64: 0 is the background
    colours: Tensor  # (batch, patches) int64: 0 is the background


class Collator:
    """Collator of conversations, equal to the processor and its chat template (a test compares them)."""

    def __init__(self, processor: Idefics3Processor | LlavaProcessor) -> None:
        tokenizer = processor.tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self.pad = tokenizer.pad_token_id
        self.bos, self.eos, self.user, self.assistant = map(ids, (BOS, EOS, USER, ASSISTANT))
        framed = isinstance(processor, Idefics3Processor)
        before, after = ([ids(FAKE_IMAGE), ids(GLOBAL_IMAGE)], [ids(FAKE_IMAGE)]) if framed else ([], [])
        self.image = [*before, *[ids(IMAGE)] * PATCHES**2, *after]
        self.encode = lru_cache(maxsize=65536)(lambda text: tokenizer(text, add_special_tokens=False).input_ids)

    def conversation(self, sample: Sample) -> tuple[list[int], list[bool], list[bool]]:
        """Token ids, whether each is a target, and whether it is part of the answer to a question."""
        ids, is_target, answers = [self.bos], [False], [False]
        for i, turn in enumerate(sample.turns):
            prompt = [self.user, *(self.image if i == 0 else ()), *self.encode(turn.prompt), self.eos, self.assistant]
            answer = [*self.encode(turn.answer), self.eos]
            ids += prompt + answer
            is_target += [False] * len(prompt) + [True] * len(answer)
            answers += [False] * len(prompt) + [turn.prompt.endswith("?")] * len(answer)
        return ids, is_target, answers

    def __call__(self, samples: list[Sample]) -> Batch:
        """Encode and pad a batch of conversations."""
        encoded = [self.conversation(sample) for sample in samples]
        length = -(-max(len(ids) for ids, *_ in encoded) // 16) * 16
        input_ids = torch.full((len(encoded), length), self.pad)
        targets = torch.full((len(encoded), length), -100)
        answering = torch.zeros((len(encoded), length), dtype=torch.bool)
        for row, (ids, is_target, answers) in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            next_ids, mask = torch.tensor(ids[1:]), torch.tensor(is_target[1:])
            targets[row, : len(ids) - 1] = torch.where(mask, next_ids, -100)
            answering[row, : len(ids) - 1] = torch.tensor(answers[1:])
        pixels = np.stack([np.asarray(sample.image) for sample in samples])
        pixel_values = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, None] / 127.5 - 1
        nouns, colours = zip(*(patch_labels(sample.drawing) for sample in samples), strict=True)
        return Batch(input_ids, targets, answering, pixel_values, torch.stack(nouns), torch.stack(colours))


def patch_labels(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """Noun and colour of each patch: indices into NOUNS and COLOURS plus one, 0 for the background; (patches,), row-major."""
    nouns, colours = torch.zeros(PATCHES, PATCHES, dtype=torch.int64), torch.zeros(PATCHES, PATCHES, dtype=torch.int64)
    names = list(COLOURS)
    for each in drawing.objects:
        x0, y0, x1, y1 = ((edge + PATCH // 2) // PATCH for edge in each.box)
        inside = slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1))
        nouns[inside], colours[inside] = NOUNS.index(each.noun) + 1, names.index(each.colour) + 1
    return nouns.flatten(), colours.flatten()


def batches(
    collate: Collator, seed: int, step: int, steps: int, size: int, start: int = 0, draw: Callable[..., Any] = conversations
) -> Iterator[Batch]:
    """The batches of what ``draw`` gives, from ``step`` on; the curriculum begins at step ``start``.

    Sixteen are drawn at once and cut by length, so that little is padding.
    """
    pool = 16
    while step < steps:
        first = step // pool * pool
        share = (first - start) / (steps - start)
        most = next(most for until, most in CURRICULUM if share < until) if first + pool > start else CURRICULUM[-1][1]
        drawn = list(islice(draw(seed, first * size, most), pool * size))
        drawn.sort(key=lambda sample: sum(len(turn.prompt) + len(turn.answer) + 12 for turn in sample.turns))
        groups = [drawn[i * size : (i + 1) * size] for i in range(pool)]
        random.Random(first).shuffle(groups)
        for group in groups[step - first : steps - first]:
            yield collate(group)
            step += 1


class Learner(nn.Module):
    """The model, and a linear probe for the location of a patch that is dropped in the end.

    Noun and colour of a patch are read through the model's own final norm and unembedding (the logit lens). So the encoder
    is trained to give image tokens in the token embeddings of the language model, and naming an object is copying the
    attended image tokens.
    """

    build_processor, build_model = staticmethod(build_processor), staticmethod(build_model)
    draw, warm_up = staticmethod(conversations), 0.09  # share of the steps in which only the encoder is trained

    def __init__(self, model: Idefics3ForConditionalGeneration, processor: Idefics3Processor) -> None:
        super().__init__()
        self.model = model
        self.location_probe = nn.Linear(model.config.text_config.hidden_size, PATCHES**2)
        background = processor.tokenizer.convert_tokens_to_ids(IMAGE)
        for name, words in (("nouns", NOUNS), ("colours", COLOURS)):
            ids = [background, *(processor.tokenizer.convert_tokens_to_ids(f"\u0120{word}") for word in words)]
            self.register_buffer(name, torch.tensor(ids), persistent=False)

    def forward(self, batch: Batch, encoder_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropies in nats: of the captions, of the answers to questions, and of the patches.

        The last one is that of noun, colour and location together.
        """
        device = batch.pixel_values.device
        features = self.model.model.get_image_features(batch.pixel_values)
        patches = torch.stack(features.pooler_output) if isinstance(features.pooler_output, list) else features.pooler_output
        patches = patches.reshape(len(batch.nouns), PATCHES**2, -1)
        locations = torch.arange(PATCHES**2, device=device).expand_as(batch.nouns)
        logits = self.model.lm_head(self.model.model.text_model.norm(patches))
        predictions = (
            (logits[..., self.nouns], batch.nouns),
            (logits[..., self.colours], batch.colours),
            (self.location_probe(patches), locations),
        )
        loss_of_patches = patch_loss(predictions, batch.nouns > 0)
        if encoder_only:
            return torch.zeros((), device=device), torch.zeros((), device=device), loss_of_patches
        hidden = self.model.model(
            input_ids=batch.input_ids, mm_encoder_outputs={"image": features}, use_cache=False
        ).last_hidden_state
        return *token_losses(self.model.lm_head, hidden, batch), loss_of_patches


class FrozenLearner(nn.Module):
    """A model whose encoder is trained first, by a probe for noun, colour and location of each patch, and then frozen.

    The probe is dropped; the projector and the language model are trained on the frozen encoder.
    """

    build_processor, build_model = staticmethod(build_llava_processor), staticmethod(build_llava)
    draw, warm_up = staticmethod(descriptions), 0.25

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        super().__init__()
        self.model = model
        self.kinds = [len(NOUNS) + 1, len(COLOURS) + 1, PATCHES**2]
        self.probe = nn.Linear(model.config.vision_config.hidden_size, sum(self.kinds))

    def forward(self, batch: Batch, encoder_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As `Learner`; once the encoder is frozen, the loss of the patches is 0."""
        device = batch.pixel_values.device
        with torch.set_grad_enabled(encoder_only):
            patches = self.model.model.vision_tower(batch.pixel_values[:, 0]).last_hidden_state[:, 1:]
        if encoder_only:
            locations = torch.arange(PATCHES**2, device=device).expand_as(batch.nouns)
            predictions = zip(
                self.probe(patches).split(self.kinds, dim=-1), (batch.nouns, batch.colours, locations), strict=True
            )
            return (
                torch.zeros((), device=device),
                torch.zeros((), device=device),
                patch_loss(tuple(predictions), batch.nouns > 0),
            )
        embeddings = self.model.model.get_input_embeddings()(batch.input_ids)
        is_image = (batch.input_ids == self.model.config.image_token_id)[..., None]
        projected = self.model.model.multi_modal_projector(patches).to(embeddings.dtype)
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings.masked_scatter(is_image, projected), use_cache=False
        ).last_hidden_state
        return *token_losses(self.model.lm_head, hidden, batch), torch.zeros((), device=device)


LEARNERS: dict[str, type[Learner] | type[FrozenLearner]] = {"idefics3": Learner, "llava": FrozenLearner}


def patch_loss(predictions: Sequence[tuple[Tensor, Tensor]], full: Tensor) -> Tensor:
    """Mean cross-entropy of (logits, labels) pairs over patches, with equal weight for full and for empty ones.

    Most are empty, and would hide that the full ones are not yet predicted.
    """
    parts = (full, ~full)
    losses = (F.cross_entropy(logits[part].float(), labels[part]) / 2 for logits, labels in predictions for part in parts)
    return sum(losses, torch.zeros((), device=full.device))


def token_losses(unembedding: nn.Module, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies of captions and of answers to questions, from the last hidden states (batch, tokens, width)."""
    is_target = batch.targets != -100
    losses = F.cross_entropy(unembedding(hidden[is_target]).float(), batch.targets[is_target], reduction="none")
    is_answer = batch.answers[is_target]
    captions, answers = (losses[part].sum() / part.sum().clamp(min=1) for part in (~is_answer, is_answer))
    return captions, answers


def rate(step: int, steps: int, start: int = 0) -> float:
    """Share of the peak learning rate: a cosine over all steps.

    It has a short ramp at the first step and at ``start``, where training of the rest of the model begins.
    """
    ramp = min(1.0, (step - (start if step >= start else 0) + 1) / 150)
    return ramp * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def save_state(path: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write weights, moments and step as one safetensors file, atomically."""
    tensors = {f"weight/{name}": value.detach().contiguous() for name, value in learner.named_parameters()}
    for name, parameter in learner.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    save_file({**tensors, "step": torch.tensor(step)}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(path: Path, learner: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_state` wrote; returns the step."""
    tensors = load_file(path)
    for name, parameter in learner.named_parameters():
        parameter.data.copy_(tensors[f"weight/{name}"])
        if f"step/{name}" in tensors:  # a parameter that never had a gradient has no moments
            optimizer.state[parameter] = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return int(tensors["step"])


def save_checkpoint(model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> None:
    """Write an ordinary checkpoint: fp16 on disk, but loaded as fp32, which is fast on CPUs."""
    halved = type(model)(copy.deepcopy(model.config))
    halved.load_state_dict(model.state_dict())
    halved.half().save_pretrained(out)
    processor.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def learning_rates(
    optimizer: torch.optim.Optimizer, peak: float, steps: int, joint: int, step: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of `rate` from ``step`` on; ``joint`` is the first step in which the language model is trained."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda index: rate(index, steps, joint), last_epoch=step - 1)


def prepare(
    architecture: type[Learner] | type[FrozenLearner],
    out: Path,
    start: Path | None,
    done: int,
    width: int,
    layers: int,
    device: str,
) -> tuple[nn.Module, ProcessorMixin, torch.optim.Optimizer, int]:
    """The learner, its processor, its optimizer, and the step at which training goes on.

    Args:
        architecture: One of `LEARNERS`.
        out: Folder of the run; a state that an interrupted run left there is resumed.
        start: A checkpoint whose weights and vocabulary are continued, if there is no state.
        done: The steps that ``start`` was trained for.
        width: Hidden size.
        layers: Layers of the language model.
        device: "cpu" or "cuda".
    """
    state = out / "state.safetensors"
    # An interrupted or continued run keeps its vocabulary, whatever the conversations of this version would give a new one.
    known = out if state.exists() else start
    processor = AutoProcessor.from_pretrained(known) if known else architecture.build_processor()
    learner = architecture(architecture.build_model(processor, width, layers), processor).to(device).train()
    learner.model.set_attn_implementation({"vision_config": "eager"})  # the faster one to train at this size, on CPUs
    optimizer = torch.optim.AdamW(learner.parameters(), betas=(0.9, 0.98), weight_decay=0.02)
    if state.exists():
        return learner, processor, optimizer, load_state(state, learner, optimizer)
    if start is not None:
        learner.model.load_state_dict(AutoModelForImageTextToText.from_pretrained(start).state_dict())
    return learner, processor, optimizer, done


def training_step(
    learner: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, encoder_only: bool, device: str
) -> dict[str, float]:
    """One optimizer step; returns the losses in nats."""
    batch = Batch(*(tensor.to(device) for tensor in vars(batch).values()))
    with torch.autocast(device, torch.bfloat16):
        captions, answers, patches = learner(batch, encoder_only)
    optimizer.zero_grad()
    (captions + ANSWER_WEIGHT * answers + (1.0 if encoder_only else PATCH_WEIGHT) * patches).backward()
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    # In the warm-up the language model has no gradient; its moments start with its first one.
    optimizer.step()
    return {"captions": captions.item(), "answers": answers.item(), "patches": patches.item()}


def train(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the state and the log.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Conversations per step.")] = 48,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 1.2e-3,
    width: Annotated[int, typer.Option(help="Hidden size; heads are 32 wide.")] = 192,
    layers: Annotated[int, typer.Option(help="Layers of the language model.")] = 6,
    save_every: Annotated[int, typer.Option(help="Steps between saved states.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of weights and conversations.")] = 0,
    start: Annotated[Path | None, typer.Option(help="A checkpoint to go on from, with its vocabulary.")] = None,
    done: Annotated[int, typer.Option(help="The steps that --start was trained for; --steps counts them.")] = 0,
    kind: Annotated[str, typer.Option(help="idefics3, which ships; or llava, whose encoder is trained first and frozen.")] = (
        "idefics3"
    ),
    compile_layers: Annotated[
        bool, typer.Option(help="torch.compile each layer: a sixth faster, needs a C++ compiler.")
    ] = False,
) -> None:
    """Train a tiny lab model, or go on where an interrupted run stopped."""
    if kind not in LEARNERS:
        raise typer.BadParameter(f"Unknown kind {kind!r}; expected one of: {', '.join(LEARNERS)}.")
    architecture = LEARNERS[kind]
    joint = max(int(architecture.warm_up * steps), done)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learner, processor, optimizer, step = prepare(architecture, out, start, done, width, layers, device)
    schedule = learning_rates(optimizer, learning_rate, steps, joint, step)
    if compile_layers:
        for layer in (
            layer for path, layer in learner.get_submodule("model").named_modules() if re.fullmatch(r".*\.layers\.\d+", path)
        ):
            layer.compile(dynamic=True)

    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, (out / "log.jsonl").open("a") as log:
        bar = progress.add_task("training", total=steps, completed=step)
        for batch in batches(Collator(processor), seed, step, steps, batch_size, joint, architecture.draw):
            encoder_only = step < joint
            losses = training_step(learner, batch, optimizer, encoder_only, device)
            schedule.step()
            step += 1
            progress.update(bar, advance=1, description=" ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
            if step % 10 == 0:
                log.write(json.dumps({"step": step, **{name: round(loss, 4) for name, loss in losses.items()}}) + "\n")
                log.flush()
            if (step % save_every == 0 and not encoder_only) or step == steps:
                save_checkpoint(learner.model, processor, out)  # first: a state is resumed with the processor beside it
                save_state(out / "state.safetensors", learner, optimizer, step)


if __name__ == "__main__":
    typer.run(train)
