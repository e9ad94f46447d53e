"""How does lmms-eval run a guarded model? ``python -m lmms_eval --model gazeguard --model_args pretrained=MODEL --tasks pope``.

lmms-eval finds this module by its entry point when both are installed; GazeGuard itself never imports lmms-eval but here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

from gazeguard.errors import InputError
from gazeguard.guard import GazeGuard
from gazeguard.vision.encoding import encode
from gazeguard.vision.images import load_image

if TYPE_CHECKING:
    lmms = object
else:
    try:
        from lmms_eval.api.model import lmms
    except ImportError:  # the class below is of use without it, too: its requests are plain tuples
        lmms = object

PASSED_ON = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")


def manifest() -> Any:
    """What lmms-eval's registry asks its entry points for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("gazeguard", simple_class_path=f"{__name__}.GazeGuarded")


class GazeGuarded(lmms):
    """A guarded model as lmms-eval calls it: one picture and one question per request.

    pretrained: folder or hub id of the model, with gaze heads (and a detector) in its folder, or given by path
    reports:    a JSONL file that gets the report of every answer, in the order of the requests; lmms-eval sees the text
    """

    def __init__(
        self,
        pretrained: str,
        policy: str = "mark",
        heads: str | None = None,
        detector: str | None = None,
        reports: str | None = None,
        batch_size: int | str = 1,
        device: str = "cpu",
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown := {name: value for name, value in unknown.items() if value is not None}:
            raise InputError(f"model_args {', '.join(sorted(unknown))} are not known to GazeGuard. Leave them out.")
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype="auto").eval().to(device)
        self.guard = GazeGuard(model, AutoProcessor.from_pretrained(pretrained), policy, heads, detector)
        self.reports, self.batch_size = None if reports is None else Path(reports), int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The guarded answers, in order. A request's ``args`` are (question, options, doc_to_visual, id, task, split)."""
        answers: list[str] = []
        groups = list(_alike(requests, self.batch_size))
        for group in track(groups, "answering", console=Console(stderr=True), transient=True):
            pictures, questions = [], []
            for question, _, to_visual, number, task, split in (request.args for request in group):
                seen = to_visual(self.task_dict[task][split][number])
                if len(seen) != 1:
                    raise InputError(f"Item {number} of {task} has {len(seen)} pictures; GazeGuard answers to one.")
                pictures.append(load_image(seen[0]))
                questions.append(question.replace("<image>", "").strip())
            options = group[0].args[1]
            inputs = encode(self.guard.model, self.guard.processor, pictures, questions).inputs
            asked = {"max_new_tokens": 128, "do_sample": False} | {n: options[n] for n in PASSED_ON if n in options}
            with torch.no_grad():
                self.guard.generate(**inputs, **asked, picture_sizes=[[picture.size] for picture in pictures])
            for report in self.guard.reports:
                ends = [report.caption.find(stop) for stop in options.get("until", ()) if stop and stop in report.caption]
                answers.append(report.caption[: min(ends)] if ends else report.caption)
                if self.reports is not None:
                    with self.reports.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(report.to_dict()) + "\n")
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise InputError("GazeGuard watches what is written: choose tasks that generate (output_type: generate_until).")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise InputError("GazeGuard answers in one round: choose tasks with output_type: generate_until.")


def _alike(requests: Sequence[Any], most: int) -> Iterator[list[Any]]:
    """Neighbours with the same options, at most so many together."""
    group: list[Any] = []
    for request in requests:
        if group and (len(group) == most or request.args[1] != group[0].args[1]):
            yield group
            group = []
        group.append(request)
    if group:
        yield group
