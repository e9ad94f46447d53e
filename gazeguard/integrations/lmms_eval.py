"""lmms-eval model: ``python -m lmms_eval --model gazeguard --model_args pretrained=MODEL,artifacts=DIR --tasks pope``.

lmms-eval finds this module by its entry point when both are installed; GazeGuard itself imports lmms-eval nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from gazeguard.errors import InputError
from gazeguard.guard import GazeGuard
from gazeguard.progress import track
from gazeguard.report import Report
from gazeguard.vision.encoding import check_prompt, encode
from gazeguard.vision.images import load_image

if TYPE_CHECKING:
    lmms = object
else:
    try:
        from lmms_eval.api.model import lmms
    except ImportError:  # the class below is of use without it, too: its requests are plain tuples
        lmms = object

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128  # of an answer, where the task does not say
GENERATION_OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")  # of a task, handed to generate


def manifest() -> Any:
    """Return what lmms-eval's registry asks its entry points for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("gazeguard", simple_class_path=f"{__name__}.GazeGuarded")


class GazeGuarded(lmms):
    """A guarded model as lmms-eval calls it: one image and one question per request.

    Args:
        pretrained: Folder or hub id of the model.
        policy: Name of a policy, or the path of one.
        artifacts: Folder or hub id of gaze heads and detector; by default those in the model's folder.
        heads: A file of gaze heads, in place of that of the artifacts.
        detector: A file or folder of a detector, in place of that of the artifacts.
        reports: A JSONL file that gets the report of every answer, in the order of the requests; lmms-eval sees the text.
        batch_size: Requests that are answered at once.
        device: Where the model goes; None takes the GPU if there is one.
        dtype: Of the weights; "auto" takes the checkpoint's.
        device_map: transformers' distribution over several devices, in place of ``device``.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: There is another argument; or the model cannot be loaded.
    """

    task_dict: dict[str, Any]  # of the base class: the data of every task

    def __init__(
        self,
        pretrained: str,
        policy: str = "mark",
        artifacts: str | None = None,
        heads: str | None = None,
        detector: str | None = None,
        reports: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        progress: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown := {name: value for name, value in unknown.items() if value is not None}:
            raise InputError(f"model_args {', '.join(sorted(unknown))} are not known to GazeGuard. Leave them out.")
        options = {"policy": policy, "heads": heads, "detector": detector}
        self.guard = GazeGuard.from_pretrained(
            pretrained, artifacts=artifacts, device=device or "auto", dtype=dtype, device_map=device_map, **options
        )
        self.reports, self.batch_size = None if reports is None else Path(reports), int(batch_size)
        self.progress = progress

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return what the policy lets through of the answers, in order.

        An item that has not just one image, or one that cannot be opened, is answered from its question alone, unwatched; its
        report is *unchecked* and names it, as a warning in the log does.

        Args:
            requests: Objects whose ``args`` are (question, options, doc_to_visual, id, task, split).
        """
        answers: list[str] = []
        groups = list(_group_by_options(requests, self.batch_size))
        for group in track(groups, "answering") if self.progress else groups:
            options = group[0].args[1]
            for report in self._answer(group, options):
                answers.append(_cut(report.filtered_caption, options.get("until", ())))
                if self.reports is not None:
                    with self.reports.open("a", encoding="utf-8") as file:
                        file.write(report.to_json() + "\n")
        return answers

    def _answer(self, group: Sequence[Any], options: dict[str, Any]) -> list[Report]:
        chosen = {name: options[name] for name in GENERATION_OPTIONS if name in options}
        chosen = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False} | chosen
        questions = [request.args[0].replace("<image>", "").strip() for request in group]
        images = [self._image(request) for request in group]
        seen = {i: image for i, image in enumerate(images) if not isinstance(image, str)}
        reports: dict[int, Report] = {}
        with torch.no_grad():
            if seen:
                asked = [questions[i] for i in seen]
                inputs = encode(self.guard.model, self.guard.processor, list(seen.values()), asked).inputs
                self.guard.generate(**inputs, **chosen, picture_sizes=[[image.size] for image in seen.values()])
                reports |= zip(seen, self.guard.reports, strict=True)
            for i, reason in enumerate(images):
                if isinstance(reason, str):
                    logger.warning("%s", reason)
                    reports[i] = self.guard.unchecked(self._answer_unwatched(questions[i], chosen), reason)
        return [reports[i] for i in range(len(group))]

    def _image(self, request: Any) -> Image.Image | str:
        """The image of an item, or why it is answered without one."""
        _, _, to_visual, number, task, split = request.args
        visuals = to_visual(self.task_dict[task][split][number]) or []
        if len(visuals) != 1:
            return f"item {number} of {task} has {len(visuals)} images, not one: answered from the question alone, unwatched"
        try:
            return load_image(visuals[0], self.guard.tracer.background)
        except InputError as error:
            return f"item {number} of {task} is answered from the question alone, unwatched: {error}"

    def _answer_unwatched(self, question: str, options: dict[str, Any]) -> str:
        """The model's answer to a question without an image."""
        model, processor = self.guard.model, self.guard.processor
        check_prompt(processor, question)
        if processor.chat_template is None:
            inputs = processor.tokenizer([question], return_tensors="pt")
        else:
            conversation = [[{"role": "user", "content": [{"type": "text", "text": question}]}]]
            inputs = processor.apply_chat_template(
                conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
        ids = model.generate(**inputs.to(model.device), **options)
        start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: nothing is generated. Raises `InputError`."""
        raise InputError("GazeGuard watches what is generated: choose tasks with output_type: generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: there is one round. Raises `InputError`."""
        raise InputError("GazeGuard answers in one round: choose tasks with output_type: generate_until.")


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop words."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def _group_by_options(requests: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Neighbours with the same options, at most so many together."""
    group: list[Any] = []
    for request in requests:
        if group and (len(group) == size or request.args[1] != group[0].args[1]):
            yield group
            group = []
        group.append(request)
    if group:
        yield group
