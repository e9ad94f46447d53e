"""Stage 2 of the scenes VLM: the connector turns patch features into the language model's own words for the objects.

``python -m gazeguard.lab.training.scenes.connector --out DIR`` needs the state of stage 1 in DIR and no pass of the language
model: each covered patch is drawn to the mean input embedding of its noun's tokens (and of its colour's, where one was given).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from gazeguard.lab.scenes.language import load_language_model
from gazeguard.lab.scenes.model import assemble
from gazeguard.lab.scenes.vocabulary import COLOUR_NAMES, NOUNS
from gazeguard.lab.scenes.world import Difficulty
from gazeguard.lab.training.scenes import state
from gazeguard.lab.training.scenes.encoder import draw_batch, normalised

TEMPERATURE = 0.07
COLOUR_SHARE = 0.5  # of a colour's embedding that is added to a noun's


def word_embeddings(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> Tensor:
    """Mean input embedding of each word's tokens, with the space before it: (words, width)."""
    table = model.get_input_embeddings().weight.detach().float()
    return torch.stack([table[tokenizer(f" {word}", add_special_tokens=False).input_ids].mean(0) for word in words])


def loss_of(outputs: Tensor, batch: dict[str, Tensor], nouns: Tensor, colours: Tensor) -> tuple[Tensor, float]:
    """Cosine cross-entropy over the nouns on covered patches plus distance to the target; and the share of hits.

    Args:
        outputs: Connector outputs (batch, patches, width).
        batch: As `draw_batch` makes it.
        nouns: Embeddings (nouns, width); colours: (colours, width).
    """
    labels = batch["objects"].to(outputs)
    covered = labels[..., -1] == 0
    weights = labels[..., :-1]
    targets = weights @ nouns + COLOUR_SHARE * F.pad(colours, (0, 0, 1, 0))[batch["colours"]]
    logits = F.normalize(outputs, dim=-1) @ F.normalize(nouns, dim=-1).T / TEMPERATURE
    contrast = -(weights * F.log_softmax(logits, -1)).sum(-1)[covered].mean()
    distance = (outputs - targets).square().mean() / nouns.square().mean()
    hits = weights.gather(-1, logits.argmax(-1, keepdim=True))[..., 0][covered] > 0
    return contrast + distance, hits.float().mean().item()


def train(folder: Path, steps: int, size: int, peak: float, seed: int, device: str, language_model: str | None) -> None:
    """Train the connector over a frozen encoder and save it as ``connector.pt``."""
    encoder_state = state.load(folder, "encoder")
    if encoder_state is None:
        raise SystemExit(f"{folder} has no encoder.pt; run gazeguard.lab.training.scenes.encoder first.")
    torch.manual_seed(seed)
    language, tokenizer = load_language_model(language_model)
    model = assemble(language, tokenizer).requires_grad_(False)
    weights = {
        name.removeprefix("encoder."): value for name, value in encoder_state["model"].items() if name.startswith("encoder.")
    }
    model.model.vision_tower.load_state_dict(weights)
    connector = model.model.multi_modal_projector.requires_grad_(True).to(device)
    encoder = model.model.vision_tower.to(device)
    nouns, colours = (word_embeddings(model, tokenizer, words).to(device) for words in (NOUNS, COLOUR_NAMES))
    nn.init.normal_(connector.linear_2.weight, std=nouns.std().item() / connector.linear_2.in_features**0.5 * 4)
    optimizer = torch.optim.AdamW(connector.parameters(), lr=peak, weight_decay=0.0)
    log = state.Log(folder, "connector", 0, steps)
    for step, batch in enumerate(state.feed(lambda step: draw_batch(seed + 1, step, size, Difficulty()), 0, steps)):
        batch = {key: value.to(device) for key, value in batch.items()}
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            with torch.no_grad():
                features = encoder(normalised(batch["pixels"])).last_hidden_state
            outputs = connector(features).float()
        loss, hits = loss_of(outputs, batch, nouns, colours)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            log(step + 1, loss=loss.item(), hits=hits)
    state.save(folder, "connector", steps, {"connector": connector.state_dict()})


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description="Train the connector of the scenes VLM.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--language-model", help="folder, GGUF file or hub id; by default the installed wheel")
    options = parser.parse_args()
    train(options.out, options.steps, options.batch, options.rate, options.seed, options.device, options.language_model)


if __name__ == "__main__":
    main()
