"""Models that are blind, that see through noise, and that see: does the gate of a fit without labels tell them apart?

Each is the tiny lab's model with its image features (what the connector hands to the language model) altered, or with random
weights; none was there when the gate's rules were written but ``shuffled`` of seed 0. The lab's gaze heads are given to all but
those with random weights, so that the gate alone has to refuse them. The truth of each answer is measured on test drawings that
the altered model describes: does its detector rank false objects above true ones, and better than the text alone?

    shuffled    all numbers of an image's features in another order, another way for each image
    fixed       the same in one order for all images: the image still decides what the model says, in no language it knows
    zeros, mean the same features for every image: zeros, or the mean over drawings
    other       the features of another drawing, which the image chooses
    random      random weights
    noise       normal noise added, so many standard deviations of the features; other noise for other images
    places      the image's tokens in another order: what is there can be seen, and not where
    as it is    unaltered, with other seeds of the fit

What is recorded is kept in ``--work FOLDER``: an interrupted run goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoModelForImageTextToText

from evals.common import Figure, Out, Quick, Work, figure, work_folder, write
from evals.detection_figures import position_bins
from gazeguard import lab
from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.detection.detector import Detector
from gazeguard.detection.features import TEXT_FEATURES
from gazeguard.detection.metrics import auroc, lift
from gazeguard.detection.table import ClaimTable
from gazeguard.errors import InputError
from gazeguard.fitting.rows import Recorded, Rows
from gazeguard.fitting.run import STATE_FOLDER, Budget, Fitted, fit
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import LabelledClaims, label_claims, write_captions
from gazeguard.lab.worlds import world
from gazeguard.progress import track
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

TEST_SEED, BANK_SEED, BANK = 300, 301, 32  # of the test drawings, and of those whose features are the mean and the others
Alter = Callable[[Tensor, torch.Generator], Tensor]  # of one image: features (tokens, width) -> features
Sees = Literal["blind", "partly", "sighted"]


class Subject(NamedTuple):
    """A model to put to the gate: what it sees by construction, how it is altered, a seed, and whether its heads are found."""

    sees: Sees
    kind: str
    seed: int
    level: float = 0.0
    own_heads: bool = False

    @property
    def name(self) -> str:
        """Of its figures."""
        level = f"_{self.level:g}".replace(".", "p") if self.level else ""
        return f"{self.sees}_{self.kind.replace(' ', '_')}{level}_seed{self.seed}{'_own_heads' * self.own_heads}"


SUBJECTS = (
    *(Subject("blind", "shuffled", seed) for seed in range(4)),
    *(Subject("blind", "fixed", seed) for seed in range(2)),
    Subject("blind", "zeros", 0),
    Subject("blind", "mean", 0),
    *(Subject("blind", "other", seed) for seed in range(2)),
    Subject("blind", "shuffled", 0, own_heads=True),
    *(Subject("blind", "random", seed, own_heads=True) for seed in range(3)),
    *(Subject("partly", "noise", 0, level) for level in (0.5, 1.0, 2.0, 4.0)),
    Subject("partly", "places", 0),
    *(Subject("sighted", "as it is", seed) for seed in (2, 3, 4)),
)
FULL = (SUBJECTS, Budget(scenes=240, images=0, swaps=2, strips=24, rerank=0), 100)  # models, budget, test drawings
QUICK = (SUBJECTS[:1], Budget(scenes=12, images=0, swaps=1, strips=4, rerank=0), 8)


class Answer(NamedTuple):
    """What the gate said of a model, and what is true of its detector on test drawings (value, low, high)."""

    refused: str
    figures: dict[str, float]
    area: tuple[float, float, float] | None = None
    true_lift: tuple[float, float, float] | None = None


def gate_figures(answers: Mapping[Subject, Answer]) -> dict[str, Figure]:
    """The gate's answers to the models, counted and one by one; ``with_lift``: what the rule of the lift alone would accept."""
    found = {}
    for sees in ("blind", "partly", "sighted"):
        of_kind = {subject: answer for subject, answer in answers.items() if subject.sees == sees}
        passed = [answer for answer in of_kind.values() if answer.figures.get("lift_low", 0) > 0]
        found[f"tiny_gate_{sees}_models"] = figure(len(of_kind))
        found[f"tiny_gate_{sees}_accepted"] = figure(sum(not answer.refused for answer in of_kind.values()))
        found[f"tiny_gate_{sees}_with_lift"] = figure(len(passed))
    for subject, answer in answers.items():
        found |= _figures_of(f"gate_{subject.name}", answer)
    return found


def _figures_of(key: str, answer: Answer) -> dict[str, Figure]:
    found = {f"{key}_refused": figure(float(bool(answer.refused)))}
    for name in ("lift", "image_auroc"):
        if name in answer.figures:
            ends = answer.figures.get(f"{name}_low"), answer.figures.get(f"{name}_high")
            found[f"{key}_{name}"] = figure(answer.figures[name], None if None in ends else ends)  # type: ignore[arg-type]
    for name, value in (("test_auroc", answer.area), ("test_lift", answer.true_lift)):
        if value is not None:
            found[f"{key}_{name}"] = figure(value[0], value[1:])
    return found


def ask_gate(subject: Subject, budget: Budget, test: int, folder: Path) -> Answer:
    """Fit to a model, and judge the detector by test drawings that the model describes."""
    model, processor = lab.load()
    heads = None if subject.own_heads else GazeHeads.from_pretrained(lab.checkpoint_path())
    if subject.kind == "random":
        torch.manual_seed(subject.seed)
        model = AutoModelForImageTextToText.from_config(model.config).eval()
    with altered(model, alteration(subject, model, processor), subject.seed):
        options: dict[str, Any] = {"budget": budget, "styles": ["pictographs"], "heads": heads, "seed": 1}
        if subject.sees == "sighted":
            options["seed"] = subject.seed
        answer, fitted = refusal(lambda: fit(model, processor, folder, **options))
        print(f"{subject.name}: {answer.refused or 'usable'}", flush=True)
        if fitted is None or fitted.detector is None:
            return answer
        claims = described(GazeGuard(model, processor, heads=fitted.heads), test)
    return answer._replace(**_truth(claims, fitted.detector, fitted.heads, text_only(recorded(folder).rows, fitted.heads)))


def refusal(run: Callable[[], Fitted]) -> tuple[Answer, Fitted | None]:
    """What a fit answers, and the fit, None where it ends with an error."""
    try:
        fitted = run()
    except InputError as error:
        return Answer(str(error), {}), None
    return Answer(fitted.refused, fitted.figures), fitted


def described(guard: GazeGuard, test: int) -> LabelledClaims:
    """The claims of sampled captions of test drawings."""
    torch.manual_seed(TEST_SEED)
    samples = world("tiny").samples("test", test, TEST_SEED)
    return label_claims(world("tiny").decided, samples, write_captions(guard, samples, do_sample=True))


def _truth(claims: LabelledClaims, detector: Detector, heads: GazeHeads, text: Detector) -> dict[str, Any]:
    """AUROC of objects within bins, and the lift over the text alone, paired."""
    part = claims.select(claims.kind == "object")
    if not 0 < part.false.sum() < len(part.false):
        return {}
    bins = position_bins(part, heads.heads)
    risks = [each.risk(part.x, part.kind.tolist()) for each in (detector, text)]
    own, over_text = auroc(part.false, risks[0], part.image, bins), lift(part.false, *risks, part.image, bins)
    return {
        name: (each.value, *(each.interval or (np.nan, np.nan))) for name, each in (("area", own), ("true_lift", over_text))
    }


def recorded(folder: Path) -> Recorded:
    """What a fit has recorded of drawings."""
    return together([Recorded.load(path) for path in sorted((folder / STATE_FOLDER).glob("drawings-*.npz"))])


def together(parts: Sequence[Recorded]) -> Recorded:
    """Several recordings as one."""
    columns = {each.name: [getattr(part, each.name) for part in parts] for each in fields(Recorded)}
    rows, captions = Rows.joined(columns.pop("rows")), tuple(chain(*columns.pop("captions")))
    return Recorded(rows, captions, **{name: np.concatenate(column) for name, column in columns.items()})


def text_only(rows: Rows, heads: GazeHeads, names: Sequence[str] = TEXT_FEATURES) -> Detector:
    """A detector on text features alone, fitted on the model's own claims about drawings."""
    own = rows.select(rows.of("own"))
    return cross_fit(ClaimTable(own.x, own.false, own.kinds, own.image), heads, names).detector


# ------------------------------------------------------------------------------------------------------ alterations


@contextmanager
def altered(model: Any, alter: Alter | None, seed: int) -> Iterator[None]:
    """Inside, what the connector makes of each image is altered; the same image always in the same way."""

    if alter is None:
        yield
        return

    def hook(_: Any, __: Any, states: Tensor) -> Tensor:
        return torch.stack([alter(image, generator_of(image, seed)) for image in states])

    handle = model.model.connector.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def generator_of(image: Tensor, seed: int) -> torch.Generator:
    """Random numbers that belong to an image: where its largest feature is names it, whatever the batch rounds."""
    return torch.Generator().manual_seed(int(image.abs().argmax()) + 10**6 * seed)


def alteration(subject: Subject, model: Any, processor: Any) -> Alter | None:
    """How the features of one image are altered; None for a model that is left as it is."""
    kinds: dict[str, Callable[[], Alter | None]] = {
        "shuffled": lambda: _shuffled,
        "fixed": lambda: partial(_reordered, seed=subject.seed),
        "zeros": lambda: lambda states, _: torch.zeros_like(states),
        "mean": lambda: partial(_instead, bank=_bank(model, processor).mean(0, keepdim=True)),
        "other": lambda: partial(_instead, bank=_bank(model, processor)),
        "noise": lambda: partial(_noisy, level=subject.level),
        "places": lambda: _moved,
        "random": lambda: None,
        "as it is": lambda: None,
    }
    return kinds[subject.kind]()


def _shuffled(states: Tensor, generator: torch.Generator) -> Tensor:
    return states.flatten()[torch.randperm(states.numel(), generator=generator)].view_as(states)


def _reordered(states: Tensor, _: torch.Generator, seed: int) -> Tensor:
    return _shuffled(states, torch.Generator().manual_seed(seed))


def _moved(states: Tensor, generator: torch.Generator) -> Tensor:
    return states[torch.randperm(len(states), generator=generator)]


def _noisy(states: Tensor, generator: torch.Generator, level: float) -> Tensor:
    return states + level * states.std() * torch.randn(states.shape, generator=generator)


def _instead(states: Tensor, generator: torch.Generator, bank: Tensor) -> Tensor:
    return bank[int(torch.randint(len(bank), (), generator=generator))].to(states)


@torch.no_grad()
def _bank(model: Any, processor: Any) -> Tensor:
    """(drawings, tokens, width): image features of drawings that nothing else uses."""
    samples, kept = world("tiny").samples("train", BANK, BANK_SEED), []
    handle = model.model.connector.register_forward_hook(lambda _, __, states: kept.append(states))
    inputs = encode(model, processor, [each.image for each in samples], [each.prompt for each in samples]).inputs
    model(**model_inputs(model, inputs), use_cache=False)
    handle.remove()
    return torch.cat(kept)


def main(out: Out, work: Work = None, quick: Quick = False) -> None:
    """Put blind models to the gate of a fit without labels."""
    subjects, budget, test = QUICK if quick else FULL
    with work_folder(work) as folder:
        answers = {each: ask_gate(each, budget, test, folder / each.name) for each in track(subjects, "altered models")}
    write(out, gate_figures(answers), quick, seed=TEST_SEED, drawings=budget.scenes, test=test)


if __name__ == "__main__":
    typer.run(main)
