"""Stage 1 of the scenes VLM: the vision encoder learns which object covers each patch.

``python -m gazeguard.lab.training.scenes.encoder --out DIR`` trains it from nothing. Labels are dense: for every patch the
objects that cover it (and their colour where one was given), as a soft target. One or two clear objects come first, then
four, then the world as it is. On two busy cores 1,800 steps of 32 images took 30 minutes (0.3 s a step on quiet ones).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, SegformerConfig

from gazeguard.lab.scenes.architecture import VISION_WIDTH, vision_config
from gazeguard.lab.scenes.vocabulary import COLOUR_NAMES, NOUNS
from gazeguard.lab.scenes.world import GRID, PATCH, Difficulty, DrawnImage, Split, generator, make_image
from gazeguard.lab.training.scenes import state

CURRICULUM = ((0.10, Difficulty(2, False)), (0.25, Difficulty(4, False)), (1.0, Difficulty()))
PAGE_SHARE = 0.35  # of comic pages among the images
COVERED = 0.15  # of a patch, from which on an object counts as lying there
COLOUR_WEIGHT, POSITION_WEIGHT = 0.3, 0.1


def patch_labels(image: DrawnImage) -> tuple[np.ndarray, np.ndarray]:
    """Soft labels of the patches.

    Returns:
        Objects (patches, nouns + 1) float32, the last column is "nothing", rows sum to 1; colours (patches,) int64 of
        the object that covers most, 0 for none.
    """
    edges = np.arange(GRID) * PATCH
    objects = np.zeros((GRID * GRID, len(NOUNS) + 1), np.float32)
    colours = np.zeros(GRID * GRID, np.int64)
    most = np.zeros(GRID * GRID, np.float32)
    for item in image.objects:
        x0, y0, x1, y1 = item.box
        width = np.clip(np.minimum(edges + PATCH, x1) - np.maximum(edges, x0), 0, None)
        height = np.clip(np.minimum(edges + PATCH, y1) - np.maximum(edges, y0), 0, None)
        cover = (height[:, None] * width[None]).ravel().astype(np.float32)
        relative = cover / min(PATCH * PATCH, (x1 - x0) * (y1 - y0))
        cover = np.where(relative >= COVERED, relative, 0)
        objects[:, NOUNS.index(item.noun)] += cover
        colours = np.where(cover > most, COLOUR_NAMES.index(item.colour) + 1 if item.colour else 0, colours)
        most = np.maximum(most, cover)
    objects[:, -1] = most == 0
    return objects / objects.sum(-1, keepdims=True), colours


def draw_batch(seed: int, step: int, size: int, difficulty: Difficulty, split: Split = "train") -> dict[str, Tensor]:
    """One batch: ``pixels`` (batch, 3, SIZE, SIZE) uint8, ``objects`` and ``colours`` of `patch_labels`."""
    pixels, objects, colours = [], [], []
    for position in range(size):
        rng = generator(split, seed, f"encoder/{step}/{position}")
        image = make_image(rng, "page" if rng.random() < PAGE_SHARE else "scene", split, difficulty)
        pixels.append(np.asarray(image.draw()).transpose(2, 0, 1))
        labels = patch_labels(image)
        objects.append(labels[0])
        colours.append(labels[1])
    return {
        name: torch.from_numpy(np.stack(value))
        for name, value in (("pixels", pixels), ("objects", objects), ("colours", colours))
    }


def normalised(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], as the image processor does it."""
    return pixels.float().div_(127.5).sub_(1.0)


class PatchClassifier(nn.Module):
    """The encoder and linear layers on its patch features: object, colour, and the patch's own row and column.

    A Segformer has no position embedding; the third layer makes it carry positions from the borders inwards.
    """

    def __init__(self) -> None:
        super().__init__()
        config = vision_config()
        self.encoder = AutoModel.from_config(
            SegformerConfig(**{key: value for key, value in config.items() if key != "model_type"})
        )
        self.objects = nn.Linear(VISION_WIDTH, len(NOUNS) + 1)
        self.colours = nn.Linear(VISION_WIDTH, len(COLOUR_NAMES) + 1)
        self.positions = nn.Linear(VISION_WIDTH, 2 * GRID)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, 3, SIZE, SIZE) in [-1, 1] to logits (batch, patches, classes): nouns + 1, colours + 1, rows and columns."""
        return self.classify(self.encoder(pixels).last_hidden_state)

    def classify(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the encoder's features (batch, patches, VISION_WIDTH)."""
        return self.objects(features).float(), self.colours(features).float(), self.positions(features).float()


def loss_of(outputs: tuple[Tensor, Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy with the soft labels; empty patches count a fifth."""
    logits, colour_logits, position_logits = outputs
    targets = batch["objects"].to(logits)
    weight = 1 - 0.8 * targets[..., -1]
    losses = -(targets * F.log_softmax(logits, -1)).sum(-1)
    colours = F.cross_entropy(colour_logits.flatten(0, 1), batch["colours"].flatten(), reduction="none").view_as(weight)
    patches = torch.arange(GRID * GRID, device=logits.device).expand(len(logits), -1)
    rows = F.cross_entropy(position_logits[..., :GRID].flatten(0, 1), (patches // GRID).flatten())
    columns = F.cross_entropy(position_logits[..., GRID:].flatten(0, 1), (patches % GRID).flatten())
    return ((losses + COLOUR_WEIGHT * colours) * weight).sum() / weight.sum() + POSITION_WEIGHT * (rows + columns)


@torch.inference_mode()
def evaluate(model: PatchClassifier, batch: dict[str, Tensor]) -> dict[str, float]:
    """Share of the covered patches whose most likely label is right, of empty ones, and of colours where one was given."""
    logits, colours, positions = model(normalised(batch["pixels"]))
    best = logits.argmax(-1)
    right = batch["objects"].gather(-1, best[..., None])[..., 0] > 0
    covered = batch["objects"][..., -1] == 0
    coloured = batch["colours"] > 0
    return {
        "covered": right[covered].float().mean().item(),
        "empty": right[~covered].float().mean().item(),
        "colour": (colours.argmax(-1) == batch["colours"])[coloured].float().mean().item(),
        "column": (positions[..., GRID:].argmax(-1) == torch.arange(GRID * GRID, device=best.device) % GRID)
        .float()
        .mean()
        .item(),
    }


def difficulty_at(share: float) -> Difficulty:
    """The curriculum's difficulty after this share of the steps."""
    return next(level for until, level in CURRICULUM if share <= until)


def rate_at(step: int, steps: int, peak: float, warm_up: int = 200) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))))


def train(folder: Path, steps: int, size: int, peak: float, seed: int, device: str, save_every: int) -> None:
    """Train up to ``steps`` steps from the saved state, if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = PatchClassifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    first = 0
    if saved := state.load(folder, "encoder"):
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    log = state.Log(folder, "encoder", first, steps)
    validation = draw_batch(seed, 0, 96, Difficulty(), "validation")
    validation = {key: value.to(device) for key, value in validation.items()}
    threads = state.Threads()
    build: Callable[[int], dict[str, Tensor]] = lambda step: draw_batch(seed, step, size, difficulty_at(step / steps))  # noqa: E731
    for step, batch in enumerate(state.feed(build, first, steps), first):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, peak)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            batch = {key: value.to(device) for key, value in batch.items()}
            loss = loss_of(model(normalised(batch["pixels"])), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            threads.adapt()
            log(step + 1, loss=loss.item(), **(evaluate(model, validation) if (step + 1) % 250 == 0 else {}))
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state.save(folder, "encoder", step + 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description="Train the vision encoder of the scenes VLM from nothing, or go on with it.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-every", type=int, default=500)
    options = parser.parse_args()
    train(options.out, options.steps, options.batch, options.rate, options.seed, options.device, options.save_every)


if __name__ == "__main__":
    main()
