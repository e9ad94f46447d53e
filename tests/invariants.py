"""The invariants on every family of models. ``python tests/invariants.py --out FILE`` examines them all and writes the table.

A family is a tiny model of a real transformers class (the package `families`). The invariants are those of
`gazeguard.trace`, as far as they need no processor.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import families
import numpy as np
import torch
import transformers
import typer
from families import Family, grids, others, quietly, tiles
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from gazeguard.attention.attribution import top_k_statistics
from gazeguard.attention.backbone import find_backbone
from gazeguard.attention.buffers import CapturedActivations
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.visual_keys import VisualKeys, visual_keys
from gazeguard.errors import GazeGuardError, NoAttentionError, UnsupportedError
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.image_tokens import image_token_id
from gazeguard.vision.inputs import model_inputs

NEW = 6
GROUPS = (families, grids, tiles, others)
MAKERS: dict[str, Callable[[], Family]] = {name: make for group in GROUPS for name, make in group.MAKERS.items()}
MAKERS |= {"Gemma3": lambda: families.gemma3(12), "LLaVA (Mistral)": lambda: families.llava_mistral(12)}  # sliding windows
LAYOUTS: dict[str, str] = {name: told for group in GROUPS for name, told in group.LAYOUTS.items()}
LAYOUTS |= dict.fromkeys(("Gemma3", "LLaVA (Mistral)"), "one square per image, row by row")


def keys(kind: Family, inputs: dict[str, Tensor]) -> VisualKeys:
    return visual_keys(kind.model, inputs, inputs["input_ids"], inputs["attention_mask"])


def write(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)


def recorded(
    kind: Family, model: PreTrainedModel, inputs: dict[str, Tensor], run: Callable[[], Any]
) -> tuple[Any, CapturedActivations]:
    """What ``run`` returned, and what a recorder on all heads captured of it."""
    with AttentionRecorder(model, find_backbone(model).heads()) as recorder:
        recorder.begin(KeyLayout.from_ids(*keys(kind, inputs)))
        return run(), recorder.collect()


def replayed(kind: Family, model: PreTrainedModel, inputs: dict[str, Tensor], written: Tensor) -> CapturedActivations:
    whole = kind.extended(inputs, written)
    rows = recorded(kind, model, inputs, lambda: model(**model_inputs(model, whole), use_cache=False))[1]
    return CapturedActivations(*(tensor[:, : written.shape[1]] for tensor in vars(rows).values()))


@cache
def run_of(name: str) -> tuple[Family, dict[str, Tensor], Tensor, Any, CapturedActivations]:
    """The family, a padded batch, the tokens generated after it, what generate returned, and what was captured."""
    kind = MAKERS[name]()
    inputs = kind.batch()
    made, rows = recorded(kind, kind.model, inputs, lambda: write(kind.model, inputs))
    return kind, inputs, made.sequences[:, -NEW:], made, rows


def close(
    left: CapturedActivations,
    right: CapturedActivations,
    within: float,
    fields: tuple[str, ...] = ("gaze", "segment_mass", "output"),
) -> None:
    for field in fields:
        torch.testing.assert_close(getattr(left, field), getattr(right, field), rtol=1e-4, atol=within, msg=lambda m: m[:300])


# ------------------------------------------------------------------------------------------------------------- the invariants


def reads_as_eager(name: str) -> None:
    """(a) Row t is the query that predicted token t: the eager model's own weights, row by row."""
    kind, inputs, written, _, rows = run_of(name)
    twin = copy.deepcopy(kind.model)
    twin.set_attn_implementation("eager")
    close(rows, replayed(kind, twin, inputs, written), 1e-5, ("gaze", "segment_mass"))
    assert rows.gaze.max() > 0.05, "a test of attention needs attention"


def replay_is_live(name: str) -> None:
    """(b) One teacher-forced pass captures what was captured live."""
    kind, inputs, written, _, rows = run_of(name)
    close(rows, replayed(kind, kind.model, inputs, written), 1e-5)


def changes_no_logit(name: str) -> None:
    """(c) With and without the recorder, tokens and logits are the same to the last bit."""
    kind, inputs, written, made, _ = run_of(name)
    plain = write(kind.model, inputs)
    assert torch.equal(plain.sequences[:, -NEW:], written)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, made.logits, strict=True))


def padding_changes_nothing(name: str) -> None:
    """(d) A row of a left-padded batch is recorded as it is alone."""
    kind, _, written, _, rows = run_of(name)
    for row in range(3):
        alone = kind.batch([row])
        made, own = recorded(kind, kind.model, alone, lambda alone=alone: write(kind.model, alone))
        assert torch.equal(made.sequences[0, -NEW:], written[row])
        count = own.gaze.shape[-1]
        part = CapturedActivations(*(tensor[row : row + 1] for tensor in vars(rows).values()))
        part = replace(part, gaze=part.gaze[..., :count])
        close(own, part, 1e-4)


def hidden_becomes_logits(name: str) -> None:
    """The captured states, normed and unembedded, are the model's own logits: so are log-probability and attribution."""
    kind, _, _, made, rows = run_of(name)
    logits = find_backbone(kind.model).logits(rows.hidden)
    torch.testing.assert_close(logits, torch.stack(made.logits, dim=1).float(), rtol=1e-4, atol=1e-4, msg=lambda m: m[:300])


def logits_are_captured(name: str) -> None:
    """What the model gave while it generated is kept of every token but perhaps the first, whatever its parts are called."""
    _, _, _, made, rows = run_of(name)
    logs = torch.stack(made.logits, dim=1).float().log_softmax(-1)
    said = (rows.top_ids >= 0).all(-1)
    assert said[:, 1:].all()
    torch.testing.assert_close(logs.gather(-1, rows.top_ids.clamp(min=0))[said], rows.top_logprobs[said])
    for value, own in zip(top_k_statistics(logs)[1:], (rows.top_logprobs, rows.entropy), strict=True):
        torch.testing.assert_close(value[said], own[said])


def image_tokens_are_located(name: str) -> None:
    """A rule says where each image cell lies, or that it lies nowhere, or the layout is refused with the way out."""
    kind, inputs, *_ = run_of(name)
    try:
        grids = image_grids(kind.model, None, inputs, *keys(kind, inputs)[:2])
    except UnsupportedError as error:
        if "grid=ImageGrid(...)" in str(error):
            return
        raise
    assert [len(grid) for grid in grids] == KeyLayout.from_ids(*keys(kind, inputs)).valid.sum(1).tolist()


def leaves_nothing_behind(name: str) -> None:
    """(f) After an exception every module has the attributes and hooks that it had."""
    kind, inputs, *_ = run_of(name)

    def shape() -> list[Any]:
        return [(set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in kind.model.modules()]

    def stumble() -> None:
        write(kind.model, inputs)
        raise KeyError("stumbled")

    before = shape()
    try:
        recorded(kind, kind.model, inputs, stumble)
    except KeyError:
        assert shape() == before
    else:
        raise AssertionError("it did not stumble")


def capturing_nothing_is_an_error(name: str) -> None:
    """(i) A recorder that captured nothing raises."""
    kind, inputs, *_ = run_of(name)
    try:
        recorded(kind, kind.model, inputs, lambda: None)
    except NoAttentionError:
        return
    raise AssertionError("silence went by")


INVARIANTS = (
    reads_as_eager,
    replay_is_live,
    changes_no_logit,
    padding_changes_nothing,
    leaves_nothing_behind,
    capturing_nothing_is_an_error,
    hidden_becomes_logits,
    logits_are_captured,
    image_tokens_are_located,
)
# What is known not to be so, and why.
# The prompt's pass of Gemma 4 computes its last layers at the last position alone. Recorded, it computes them at all positions:
# the lens, the check of the domain and a replay read states of image tokens and of the caption's first tokens there. Matrix
# products of other numbers of rows sum in another order: 1e-6 in the first token's logits, nothing in the next ones. The
# recording itself changes no bit (`test_gemma_4_differs_by_its_positions_alone`).
FEW_POSITIONS = ("Gemma4", "Gemma4-unified") if transformers.__version__ in SpecifierSet(">5.20") else ()
_ALL_POSITIONS = "recorded, its last layers compute every position, so that image tokens have states; last bits differ"
EXCEPTIONS: dict[tuple[str, str], str] = {
    **{(name, "changes_no_logit"): _ALL_POSITIONS for name in FEW_POSITIONS},
    ("Chameleon", "hidden_becomes_logits"): "its forward forbids the image codes after the unembedding; other logits are right",
}
# Versions of transformers that have these classes and run them rightly by themselves.
WORKS_IN = dict.fromkeys(
    (
        *("Dots3", "GraniteDocling", "Inkling2", "Lfm3-VL", "MiniCPM-OCR", "Mistral-Large-4"),
        *("Fuyu", "MiniMax-M3-VL", "Qwen2.5-Omni", "Qwen3-Omni", "VideoLLaVA", "VipLlava"),
    ),
    SpecifierSet(">=5.23"),
) | {"Llama4": SpecifierSet("!=5.24.0")}  # its forward asks for image_outputs, which its text model has not
# Families whose rule asks the processor, most of them for the images' own sizes, too: `test_grid.py` tests them on pixels.
BY_PROCESSOR = (
    *("AyaVision", "Cohere2Vision", "Fuyu", "GOT-OCR2", "Inkling", "InternVL", "Lfm2-VL", "Llama4", "MiniCPM-OCR"),
    *("MiniCPM-V 4.6", "MiniCPM-V 4.7", "Ovis2", "PPChart2Table", "QianfanOCR", "Step3p7", "UnlimitedOCR"),
)
OTHERS = others.OTHERS  # models whose words see the image in a way that is refused


NOT_TRIED = {  # keys of the mapping that cannot be built here, or write no text word by word
    "diffusion_gemma": "writes in blocks, not word by word",
    "evolla": "reads proteins",
    "gemma3n": "its tower needs timm",
    "perception_lm": "its tower needs timm",
    "pi0": "moves robots, writes no text",
}


def works(name: str) -> bool:
    """Whether the installed transformers can run the family at all."""
    return transformers.__version__ in WORKS_IN.get(name, SpecifierSet())


def examined(name: str) -> dict[str, Any]:
    """What is so of one family."""
    kept: dict[str, bool | str] = {}
    for invariant in INVARIANTS:
        try:
            invariant(name)
            kept[invariant.__name__] = True
        except (AssertionError, GazeGuardError) as error:
            said = str(error).strip().partition("\n")[0]
            kept[invariant.__name__] = EXCEPTIONS.get((name, invariant.__name__), said or "not so")
    kind, inputs, *_ = run_of(name)
    try:
        find = image_grids(kind.model, None, inputs, *keys(kind, inputs)[:2])
        grid = "found" if not np.isnan(find[0].boxes).all() else "no places: the answers of a resampler"
    except UnsupportedError:
        grid = "found with its processor and the images' sizes" if name in BY_PROCESSOR else "pass grid="
    return {
        "model_type": kind.model.config.model_type,
        "class": type(kind.model).__name__,
        "layout": LAYOUTS[name],
        "grid": grid,
        "invariants": kept,
    }


def refused(name: str) -> dict[str, str]:
    """Why a model cannot be recorded."""
    model = OTHERS[name]().model
    try:
        image_token_id(model)
        find_backbone(model)
    except UnsupportedError as error:
        return {"model_type": model.config.model_type, "class": type(model).__name__, "why": str(error)}
    raise AssertionError(f"{name} was not refused")


def main(out: Annotated[Path, typer.Option(help="The JSON file to write.")]) -> None:
    """Examine every family of the installed transformers, and write what is so."""
    warnings.simplefilter("ignore")
    told: dict[str, Any] = {}
    with quietly():
        for name in track([name for name in MAKERS if works(name)], "examining", console=Console(stderr=True)):
            told[name] = examined(name)
            run_of.cache_clear()
        no = {name: refused(name) for name in OTHERS}
    broken = f"transformers {transformers.__version__} does not run it"
    skipped = NOT_TRIED | {MAKERS[name]().model.config.model_type: broken for name in MAKERS if not works(name)}
    seen = {row["model_type"] for row in (*told.values(), *no.values())} | set(skipped)
    meta = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "invariants": [invariant.__name__ for invariant in INVARIANTS],
        "mapping": sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        "not_examined": sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - seen),
    }
    made = {"families": told, "refused": no, "not_tried": skipped, "meta": meta}
    out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    good = sum(all(value is True for value in row["invariants"].values()) for row in told.values())
    placed = sum(row["grid"] != "pass grid=" for row in told.values())
    print(
        f"{good} of {len(told)} families keep all of {len(INVARIANTS)} invariants, {placed} have a rule for their places; "
        f"not examined: {meta['not_examined']}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    typer.run(main)
