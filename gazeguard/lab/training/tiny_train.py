"""How does the lab's VLM learn? ``python -m gazeguard.lab.train --out DIR`` trains it from nothing on two cores.

Encoder and language model learn together from the first joint step to the last. Four things make that short:

* a *warm-up* in which the encoder alone learns what lies in each cell and where the cell is, in the word vectors of the
  language model; this loss stays on as an auxiliary term, so that the encoder keeps its sharpness;
* a *curriculum*: one panel or thing first, then more (six panels from the start sit on a plateau);
* a loss of their own for answers to questions, which would drown in the captions otherwise;
* bfloat16 autocast.

Progress is a bar on stderr and ``DIR/log.jsonl``; the state is saved every ``--save-every`` steps, and the same command
resumes from it. Everything is seeded; the lessons are drawn on the fly and never repeat.
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

from gazeguard.heads.strips import COLOURS
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
from gazeguard.lab.world import CELL, CELLS, NOUNS, Picture, Sample, lessons, tales

CURRICULUM = ((0.06, 1), (0.12, 2), (0.19, 4), (1.0, 8))  # until this share of the joint steps: at most so many things
CELL_WEIGHT = 0.3  # of the cells' loss once the language model learns, too
ANSWER_WEIGHT = 1.0  # of the mean loss over answers to questions, which would drown among the captions' many words


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # (batch, tokens) int64, right-padded
    targets: Tensor  # (batch, tokens) int64: the next token where it is part of an answer, else -100
    answers: Tensor  # (batch, tokens) bool: the target is part of the answer to a question
    pixel_values: Tensor  # (batch, 1, 3, PAGE, PAGE) float32 in [-1, 1]
    nouns: Tensor  # (batch, cells) int64: 0 is nothing
    colours: Tensor  # (batch, cells) int64: 0 is nothing


class Collator:
    """Turns conversations into tensors, as the processor and its chat template would (a test compares them)."""

    def __init__(self, processor: Idefics3Processor | LlavaProcessor) -> None:
        tokenizer = processor.tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self.pad = tokenizer.pad_token_id
        self.bos, self.eos, self.user, self.assistant = map(ids, (BOS, EOS, USER, ASSISTANT))
        framed = isinstance(processor, Idefics3Processor)
        before, after = ([ids(FAKE_IMAGE), ids(GLOBAL_IMAGE)], [ids(FAKE_IMAGE)]) if framed else ([], [])
        self.image = [*before, *[ids(IMAGE)] * CELLS**2, *after]
        self.encode = lru_cache(maxsize=65536)(lambda text: tokenizer(text, add_special_tokens=False).input_ids)

    def conversation(self, sample: Sample) -> tuple[list[int], list[bool], list[bool]]:
        """Token ids, whether each is one that the model has to say, and whether it answers a question."""
        ids, said, answers = [self.bos], [False], [False]
        for i, turn in enumerate(sample.turns):
            asked = [self.user, *(self.image if i == 0 else ()), *self.encode(turn.prompt), self.eos, self.assistant]
            answer = [*self.encode(turn.answer), self.eos]
            ids += asked + answer
            said += [False] * len(asked) + [True] * len(answer)
            answers += [False] * len(asked) + [turn.prompt.endswith("?")] * len(answer)
        return ids, said, answers

    def __call__(self, samples: list[Sample]) -> Batch:
        talks = [self.conversation(sample) for sample in samples]
        length = -(-max(len(ids) for ids, *_ in talks) // 16) * 16
        input_ids = torch.full((len(talks), length), self.pad)
        targets = torch.full((len(talks), length), -100)
        answering = torch.zeros((len(talks), length), dtype=torch.bool)
        for row, (ids, said, answers) in enumerate(talks):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            next_ids, spoken = torch.tensor(ids[1:]), torch.tensor(said[1:])
            targets[row, : len(ids) - 1] = torch.where(spoken, next_ids, -100)
            answering[row, : len(ids) - 1] = torch.tensor(answers[1:])
        pixels = np.stack([np.asarray(sample.image) for sample in samples])
        pixel_values = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, None] / 127.5 - 1
        nouns, colours = zip(*(cell_labels(sample.picture) for sample in samples), strict=True)
        return Batch(input_ids, targets, answering, pixel_values, torch.stack(nouns), torch.stack(colours))


def cell_labels(picture: Picture) -> tuple[Tensor, Tensor]:
    """What lies in each cell: index into NOUNS and COLOURS plus one, 0 for nothing; row-major, shape (cells,)."""
    nouns, colours = torch.zeros(CELLS, CELLS, dtype=torch.int64), torch.zeros(CELLS, CELLS, dtype=torch.int64)
    names = list(COLOURS)
    for thing in picture.things:
        x0, y0, x1, y1 = ((edge + CELL // 2) // CELL for edge in thing.box)
        where = slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1))
        nouns[where], colours[where] = NOUNS.index(thing.noun) + 1, names.index(thing.colour) + 1
    return nouns.flatten(), colours.flatten()


def batches(
    collate: Collator, seed: int, step: int, steps: int, size: int, start: int = 0, draw: Callable[..., Any] = lessons
) -> Iterator[Batch]:
    """The batches from ``step`` on, of what ``draw`` gives; the curriculum begins at step ``start``. Sixteen are drawn at once
    and cut by length, so that little is padding.
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
    """The model, and a linear probe for the place of a cell that is thrown away in the end.

    What lies in a cell is read through the model's own final norm and unembedding, as one reads a word: so the encoder
    learns to hand over pictures in the language model's word vectors, and to name a thing is to copy what is looked at.
    """

    build_processor, build_model = staticmethod(build_processor), staticmethod(build_model)
    lessons, warm_up = staticmethod(lessons), 0.09  # share of the steps in which only the encoder learns

    def __init__(self, model: Idefics3ForConditionalGeneration, processor: Idefics3Processor) -> None:
        super().__init__()
        self.model = model
        self.place_probe = nn.Linear(model.config.text_config.hidden_size, CELLS**2)
        nothing = processor.tokenizer.convert_tokens_to_ids(IMAGE)
        for name, words in (("nouns", NOUNS), ("colours", COLOURS)):
            ids = [nothing, *(processor.tokenizer.convert_tokens_to_ids(f"\u0120{word}") for word in words)]
            self.register_buffer(name, torch.tensor(ids), persistent=False)

    def forward(self, batch: Batch, encoder_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropies in nats: of the words, of the answers to questions, and of the cells (noun, colour and
        place together).
        """
        device = batch.pixel_values.device
        features = self.model.model.get_image_features(batch.pixel_values)
        cells = torch.stack(features.pooler_output) if isinstance(features.pooler_output, list) else features.pooler_output
        cells = cells.reshape(len(batch.nouns), CELLS**2, -1)
        places = torch.arange(CELLS**2, device=device).expand_as(batch.nouns)
        words = self.model.lm_head(self.model.model.text_model.norm(cells))
        seen = (
            (words[..., self.nouns], batch.nouns),
            (words[..., self.colours], batch.colours),
            (self.place_probe(cells), places),
        )
        cell_loss = loss_of_cells(seen, batch.nouns > 0)
        if encoder_only:
            return torch.zeros((), device=device), torch.zeros((), device=device), cell_loss
        hidden = self.model.model(
            input_ids=batch.input_ids, mm_encoder_outputs={"image": features}, use_cache=False
        ).last_hidden_state
        return *losses_of_words(self.model.lm_head, hidden, batch), cell_loss


class FrozenLearner(nn.Module):
    """A model whose encoder learns alone, what lies in each cell, by a probe that is thrown away; then it is left as it is,
    and the rest learns to use it.
    """

    build_processor, build_model = staticmethod(build_llava_processor), staticmethod(build_llava)
    lessons, warm_up = staticmethod(tales), 0.25

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        super().__init__()
        self.model = model
        self.kinds = [len(NOUNS) + 1, len(COLOURS) + 1, CELLS**2]
        self.probe = nn.Linear(model.config.vision_config.hidden_size, sum(self.kinds))

    def forward(self, batch: Batch, encoder_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As `Learner`; once the encoder is frozen, the cells' loss is 0."""
        device = batch.pixel_values.device
        with torch.set_grad_enabled(encoder_only):
            cells = self.model.model.vision_tower(batch.pixel_values[:, 0]).last_hidden_state[:, 1:]
        if encoder_only:
            places = torch.arange(CELLS**2, device=device).expand_as(batch.nouns)
            seen = zip(self.probe(cells).split(self.kinds, dim=-1), (batch.nouns, batch.colours, places), strict=True)
            return torch.zeros((), device=device), torch.zeros((), device=device), loss_of_cells(tuple(seen), batch.nouns > 0)
        words = self.model.model.get_input_embeddings()(batch.input_ids)
        picture = (batch.input_ids == self.model.config.image_token_id)[..., None]
        projected = self.model.model.multi_modal_projector(cells).to(words.dtype)
        hidden = self.model.model.language_model(
            inputs_embeds=words.masked_scatter(picture, projected), use_cache=False
        ).last_hidden_state
        return *losses_of_words(self.model.lm_head, hidden, batch), torch.zeros((), device=device)


LEARNERS = {"idefics3": Learner, "llava": FrozenLearner}


def loss_of_cells(seen: Sequence[tuple[Tensor, Tensor]], full: Tensor) -> Tensor:
    """Mean cross-entropy of (logits, labels) pairs over cells; full ones and empty ones count alike: most are empty, and
    would hide that the full ones are not yet known.
    """
    return sum(F.cross_entropy(logits[part].float(), labels[part]) / 2 for logits, labels in seen for part in (full, ~full))


def losses_of_words(unembedding: nn.Module, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies of the words and of the answers to questions, from the last states (batch, tokens, width)."""
    spoken = batch.targets != -100
    losses = F.cross_entropy(unembedding(hidden[spoken]).float(), batch.targets[spoken], reduction="none")
    asked = batch.answers[spoken]
    words, answers = (losses[part].sum() / part.sum().clamp(min=1) for part in (~asked, asked))
    return words, answers


def rate(step: int, steps: int, start: int = 0) -> float:
    """Share of the peak learning rate: cosine over all, with a short ramp at the first step and at ``start``, where the rest
    of the model begins to learn.
    """
    ramp = min(1.0, (step - (start if step >= start else 0) + 1) / 150)
    return ramp * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def save_state(path: Path, learner: Learner, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights, moments and step in one safetensors file, put in place at once."""
    tensors = {f"weight/{name}": value.detach().contiguous() for name, value in learner.named_parameters()}
    for name, parameter in learner.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    save_file({**tensors, "step": torch.tensor(step)}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(path: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> int:
    tensors = load_file(path)
    for name, parameter in learner.named_parameters():
        parameter.data.copy_(tensors[f"weight/{name}"])
        if f"step/{name}" in tensors:  # what never had a gradient has no moments
            optimizer.state[parameter] = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return int(tensors["step"])


def save_checkpoint(model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> None:
    """An ordinary checkpoint directory: fp16 on disk, but asking to be loaded as fp32, which CPUs are fast at."""
    halved = type(model)(copy.deepcopy(model.config))
    halved.load_state_dict(model.state_dict())
    halved.half().save_pretrained(out)
    processor.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train(
    out: Annotated[Path, typer.Option(help="Where the checkpoint, the state and the log go.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Conversations per step.")] = 48,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 1.2e-3,
    width: Annotated[int, typer.Option(help="Hidden size; heads are 32 wide.")] = 192,
    layers: Annotated[int, typer.Option(help="Layers of the language model.")] = 6,
    save_every: Annotated[int, typer.Option(help="Steps between saved states.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of weights and lessons.")] = 0,
    start: Annotated[Path | None, typer.Option(help="A checkpoint to go on from, with its vocabulary.")] = None,
    done: Annotated[int, typer.Option(help="The steps that --start has had already; --steps counts them.")] = 0,
    kind: Annotated[str, typer.Option(help="idefics3, which ships; or llava, whose encoder learns first and is frozen.")] = (
        "idefics3"
    ),
    compile_layers: Annotated[
        bool, typer.Option(help="torch.compile each layer: a sixth faster, needs a C++ compiler.")
    ] = False,
) -> None:
    """Train the lab's VLM, or go on where an interrupted run stopped."""
    if kind not in LEARNERS:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(LEARNERS)}.")
    lab = LEARNERS[kind]
    joint = max(int(lab.warm_up * steps), done)  # the first step in which the language model learns
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = out / "state.safetensors"
    # An interrupted or continued run keeps its vocabulary, whatever the lessons of this version would teach a new one.
    known = out if state.exists() else start
    processor = AutoProcessor.from_pretrained(known) if known else lab.build_processor()
    learner = lab(lab.build_model(processor, width, layers), processor).to(device).train()
    learner.model.set_attn_implementation({"vision_config": "eager"})  # on CPUs the faster one to train at this size
    optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    if state.exists():
        step = load_state(state, learner, optimizer)
    else:
        step = done
        if start is not None:
            learner.model.load_state_dict(AutoModelForImageTextToText.from_pretrained(start).state_dict())
    for group in optimizer.param_groups:
        group["initial_lr"] = learning_rate
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: rate(at, steps, joint), last_epoch=step - 1)
    if compile_layers:
        for layer in (layers for path, layers in learner.model.named_modules() if re.fullmatch(r".*\.layers\.\d+", path)):
            layer.compile(dynamic=True)

    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, (out / "log.jsonl").open("a") as log:
        bar = progress.add_task("training", total=steps, completed=step)
        for batch in batches(Collator(processor), seed, step, steps, batch_size, joint, lab.lessons):
            encoder_only = step < joint
            batch = Batch(*(tensor.to(device) for tensor in vars(batch).values()))
            with torch.autocast(device, torch.bfloat16):
                words, answers, cells = learner(batch, encoder_only)
            optimizer.zero_grad()
            (words + ANSWER_WEIGHT * answers + (1.0 if encoder_only else CELL_WEIGHT) * cells).backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            # In the warm-up the language model has no gradient; its moments start with its first one.
            optimizer.step()
            schedule.step()
            step += 1
            losses = {"words": words.item(), "answers": answers.item(), "cells": cells.item()}
            progress.update(bar, advance=1, description=" ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
            if step % 10 == 0:
                log.write(json.dumps({"step": step, **{name: round(loss, 4) for name, loss in losses.items()}}) + "\n")
                log.flush()
            if (step % save_every == 0 and not encoder_only) or step == steps:
                save_checkpoint(learner.model, processor, out)  # first: a state is resumed with the processor beside it
                save_state(state, learner, optimizer, step)


if __name__ == "__main__":
    typer.run(train)
