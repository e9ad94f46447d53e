"""Stage 3 of the scenes VLM: language-model loss on packed lessons; LoRA, connector and encoder learn together.

``python -m gazeguard.lab.training.scenes.joint --out DIR`` goes on from the states of stages 1 and 2 in DIR, or from its own
last checkpoint, and stops after ``--steps`` steps. The learning rate is constant after a short warm-up, so that a later session
can go on; ``--decay N`` ends a run with N steps of falling rate and saves them as another state (``final.pt``), which is what
`export` writes into the package. ``--processes 2`` trains two copies on different batches and averages them every AVERAGE
steps; on a busy machine that uses two cores better than two threads do, which wait for each other at every operation.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gazeguard.lab.scenes import adapter, captions
from gazeguard.lab.scenes.language import load_language_model
from gazeguard.lab.scenes.model import assemble, build_processor, split_parts
from gazeguard.lab.scenes.world import Difficulty, generator, make_image
from gazeguard.lab.training.scenes import encoder as encoder_stage
from gazeguard.lab.training.scenes import state
from gazeguard.lab.training.scenes.evaluation import evaluate
from gazeguard.lab.training.scenes.packing import IGNORED, PACKED, PackedLesson, Packer, attention_mask

PAGE_SHARE = 0.3
POOL = 4  # batches that are drawn together and sorted by length
RATES = {"adapter": 8e-4, "connector": 4e-4, "encoder": 1e-4, "classifier": 1e-3}
DENSE_WEIGHT = 0.2  # of the patches' loss, which keeps the encoder sharp
WARM_UP = 50
CURRICULUM = ((1200, 2), (2400, 4))  # until so many lessons: at most so many objects; with eight at once attention forms late
AVERAGE = 10  # steps between two averages over the processes


@dataclass(frozen=True)
class Settings:
    """What a run is given on the command line."""

    folder: Path
    steps: int
    size: int
    seed: int
    device: str
    save_every: int
    evaluate_every: int
    decay: int
    processes: int
    language_model: str | None


class Lessons:
    """Packed batches by step number: sorted by length within a pool of POOL batches, the pool's batches shuffled."""

    def __init__(self, packer: Packer, seed: int, size: int) -> None:
        self.packer, self.seed, self.size = packer, seed, size
        self.pool = lru_cache(maxsize=2)(self._pool)

    def difficulty(self, pool: int) -> Difficulty:
        """How many objects the images of a pool may have."""
        lessons = pool * POOL * self.size
        return next((Difficulty(most) for until, most in CURRICULUM if lessons < until), Difficulty())

    def _pool(self, number: int) -> list[list[tuple[PackedLesson, tuple[np.ndarray, ...]]]]:
        drawn: list[tuple[PackedLesson, tuple[np.ndarray, ...]]] = []
        for position in range(POOL * self.size):
            rng = generator("train", self.seed, f"joint/{number}/{position}")
            image = make_image(rng, "page" if rng.random() < PAGE_SHARE else "scene", "train", self.difficulty(number))
            lesson = self.packer.pack(captions.lesson(rng, image))
            pixels = np.asarray(image.draw()).transpose(2, 0, 1)
            drawn.append((lesson, (pixels, *encoder_stage.patch_labels(image))))
        drawn.sort(key=lambda item: len(item[0].ids))
        batches = [drawn[start : start + self.size] for start in range(0, len(drawn), self.size)]
        random.Random(f"{self.seed}/{number}").shuffle(batches)
        return batches

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The batch of a step: the packer's tensors, ``pixels``, ``objects`` and ``colours``."""
        batch = self.pool(step // POOL)[step % POOL]
        arrays = zip(*(arrays for _, arrays in batch), strict=True)
        images = {
            name: torch.from_numpy(np.stack(values))
            for name, values in zip(("pixels", "objects", "colours"), arrays, strict=True)
        }
        return {**self.packer.collate([lesson for lesson, _ in batch]), **images}


def answer_losses(model: LlavaForConditionalGeneration, batch: dict[str, Tensor], features: Tensor) -> Tensor:
    """Cross-entropy of every answer token; logits are computed at these positions alone.

    Args:
        model: The VLM.
        batch: As `Lessons` makes it.
        features: The encoder's patch features (batch, patches, VISION_WIDTH).

    Returns:
        (answer tokens,) float32, in nats.
    """
    image = model.model.multi_modal_projector(features)
    embeddings = model.get_input_embeddings()(batch["ids"]).float()
    image_tokens = batch["ids"] == model.config.image_token_id
    embeddings = embeddings.masked_scatter(image_tokens[..., None], image.float())
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=attention_mask(batch["segments"]),
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    wanted = batch["targets"] != IGNORED
    logits = model.lm_head(hidden[wanted].to(model.lm_head.weight.dtype))
    return F.cross_entropy(logits.float(), batch["targets"][wanted], reduction="none")


def prepare(settings: Settings) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, encoder_stage.PatchClassifier]:
    """The model for training: frozen bfloat16 language model, adapter, connector and encoder of the earlier stages."""
    language, tokenizer = load_language_model(settings.language_model)
    model = assemble(language, tokenizer).train()
    del language
    text = model.model.language_model.to(torch.bfloat16)
    adapter.attach(text)
    text.set_attn_implementation(PACKED)
    for name, parameter in text.named_parameters():
        if name.endswith((".down", ".up")):
            parameter.data = parameter.data.float()
    model.lm_head.weight = text.embed_tokens.weight
    classifier = encoder_stage.PatchClassifier()
    for name, part in (("encoder", classifier), ("connector", model.model.multi_modal_projector)):
        saved = state.load(settings.folder, name)
        if saved is None:
            raise SystemExit(f"{settings.folder} has no {name}.pt; run gazeguard.lab.training.scenes.{name} first.")
        part.load_state_dict(saved["model" if name == "encoder" else name])
    classifier.encoder = model.model.vision_tower = _same(classifier.encoder, model.model.vision_tower)
    return model.to(settings.device), build_processor(tokenizer), classifier.to(settings.device)


def _same(trained: nn.Module, tower: nn.Module) -> nn.Module:
    """The model's own tower with the trained weights."""
    tower.load_state_dict(trained.state_dict())
    return tower


def optimizer_for(model: LlavaForConditionalGeneration, classifier: encoder_stage.PatchClassifier) -> torch.optim.AdamW:
    """AdamW with a rate of its own for each part."""
    heads = [*classifier.objects.parameters(), *classifier.colours.parameters(), *classifier.positions.parameters()]
    groups = {
        "adapter": [parameter for parameter in model.model.language_model.parameters() if parameter.requires_grad],
        "connector": list(model.model.multi_modal_projector.parameters()),
        "encoder": list(model.model.vision_tower.parameters()),
        "classifier": heads,
    }
    return torch.optim.AdamW(
        [{"params": group, "lr": RATES[name], "peak": RATES[name]} for name, group in groups.items()],
        weight_decay=0.01,
        betas=(0.9, 0.98),
    )


def snapshot(model: LlavaForConditionalGeneration, classifier: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a run needs to go on, except the language model itself."""
    return {
        "adapter": adapter.factors(model.model.language_model),
        "connector": model.model.multi_modal_projector.state_dict(),
        "classifier": classifier.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def restore(
    saved: dict[str, Any], model: LlavaForConditionalGeneration, classifier: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a snapshot back."""
    adapter.set_factors(model.model.language_model, saved["adapter"])
    model.model.multi_modal_projector.load_state_dict(saved["connector"])
    classifier.load_state_dict(saved["classifier"])
    if "optimizer" not in saved:  # started from the package's parts
        return
    peaks = [group["peak"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["peak"] = peak  # today's rates, not those of the run that was saved


def average(optimizer: torch.optim.Optimizer) -> None:
    """Replace every trained parameter by its mean over the processes."""
    parameters = [parameter.data for group in optimizer.param_groups for parameter in group["params"]]
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, mean in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.copy_(mean.view_as(parameter))


def train(settings: Settings) -> None:
    """Run to ``settings.steps`` from the last checkpoint, in one process or several."""
    if settings.processes == 1:
        run(0, settings, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (settings, f"file://{folder}/meeting"), settings.processes)


def run(rank: int, settings: Settings, meeting: str) -> None:
    """One process of the training. Process 0 writes the log and the checkpoints."""
    if meeting:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=settings.processes)
    torch.manual_seed(settings.seed)
    model, processor, classifier = prepare(settings)
    optimizer = optimizer_for(model, classifier)
    first = 0
    if saved := state.load(settings.folder, "joint"):
        first = saved["step"]
        restore(saved, model, classifier, optimizer)
    last = first + settings.decay if settings.decay else settings.steps
    name = "final" if settings.decay else "joint"
    log, threads = state.Log(settings.folder, name, first, last), state.Threads()
    lessons = Lessons(Packer(processor), settings.seed, settings.size)
    batches: Iterator[dict[str, Tensor]] = state.feed(lambda step: lessons(step * settings.processes + rank), first, last)
    averages: dict[str, float] = {}
    for step, batch in enumerate(batches, first):
        scale = (last - step) / settings.decay if settings.decay else min(1.0, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        figures = train_step(model, classifier, optimizer, {key: value.to(settings.device) for key, value in batch.items()})
        averages = {key: 0.95 * averages.get(key, value) + 0.05 * value for key, value in figures.items()}
        if meeting and ((step + 1) % AVERAGE == 0 or step + 1 == last):
            average(optimizer)
        if rank:
            continue
        if (step + 1) % 10 == 0:
            log(step + 1, **averages, threads=1 if meeting else threads.adapt())
        if (step + 1) % settings.save_every == 0 or step + 1 == last:
            state.save(settings.folder, name, step + 1, snapshot(model, classifier, optimizer))
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == last:
            model.model.language_model.set_attn_implementation("sdpa")
            log(step + 1, **evaluate(model, processor, 24, "validation"))
            model.model.language_model.set_attn_implementation(PACKED)


def train_step(
    model: LlavaForConditionalGeneration,
    classifier: encoder_stage.PatchClassifier,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
) -> dict[str, float]:
    """One step of the optimizer; returns the losses per token (nats) and per patch."""
    with torch.autocast(batch["ids"].device.type, torch.bfloat16):
        features = model.model.vision_tower(encoder_stage.normalised(batch["pixels"])).last_hidden_state
        losses = answer_losses(model, batch, features)
        dense = encoder_stage.loss_of(classifier.classify(features), batch)
    weights = batch["weights"][batch["targets"] != IGNORED]
    loss = (losses * weights).sum() / weights.sum()
    (loss + DENSE_WEIGHT * dense).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    decisive = losses[weights > 1]
    return {
        "loss": loss.item(),
        "yes_no": decisive.mean().item() if len(decisive) else 0.0,
        "dense": dense.item(),
        "norm": norm.item(),
    }


def stored_parts(saved: dict[str, Any]) -> dict[str, Tensor]:
    """What the package stores of a snapshot: encoder, connector, adapter and the classifier's heads, in float16."""
    parts = {f"{kind}.{name}": value for kind in ("connector", "adapter") for name, value in saved[kind].items()}
    for name, value in saved["classifier"].items():
        parts[name if name.startswith("encoder.") else f"classifier.{name}"] = value
    return {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in parts.items()}


def export(folder: Path, target: Path) -> None:
    """Write the trained parts of ``final.pt`` (or ``joint.pt``) for the package."""
    name = "final" if (folder / "final.pt").is_file() else "joint"
    saved = state.load(folder, name)
    if saved is None:
        raise SystemExit(f"{folder} has neither final.pt nor joint.pt.")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored_parts(saved), target, {"step": str(saved["step"]), "state": name})
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB, {name} state of step {saved['step']}")


def start_from(parts: Path, folder: Path) -> None:
    """Make a folder of training states from stored parts, where there is none: a run goes on, with a fresh optimizer."""
    if state.load(folder, "joint") is not None:
        raise SystemExit(f"{folder} already has a joint.pt; leave --start out to go on with it.")
    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(parts, "pt") as file:
        step = int(file.metadata()["step"])
    split = split_parts({name: value.float() for name, value in load_file(parts).items()})
    classifier = {f"encoder.{name}": value for name, value in split["encoder"].items()} | split["classifier"]
    state.save(folder, "encoder", step, {"model": classifier})
    state.save(folder, "connector", step, {"connector": split["connector"]})
    state.save(folder, "joint", step, {"adapter": split["adapter"], "connector": split["connector"], "classifier": classifier})


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description="Train the scenes VLM as a whole, or go on with it.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--steps", type=int, default=3000, help="stop after this step, counted from the very first one")
    parser.add_argument("--decay", type=int, default=0, help="instead: so many steps of falling rate from the last checkpoint")
    parser.add_argument("--export", type=Path, help="instead: write the trained parts to this file")
    parser.add_argument("--start", type=Path, help="begin with the trained parts of this file (the package's, say)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1, help="copies that train on different batches, averaged")
    parser.add_argument("--language-model", help="folder, GGUF file or hub id; by default the installed wheel")
    options = parser.parse_args()
    if options.export:
        export(options.out, options.export)
        return
    if options.start:
        start_from(options.start, options.out)
    train(
        Settings(
            options.out,
            options.steps,
            options.batch,
            options.seed,
            options.device,
            options.save_every,
            options.evaluate_every,
            options.decay,
            options.processes,
            options.language_model,
        )
    )


if __name__ == "__main__":
    main()
