"""Batch filter for caption datasets: columns of images and captions in, the same columns and a verdict per row out.

caption_filter = CaptionFilter(model="folder/or/hub-id", artifacts="folder/or/hub-id")
caption_filter({"image": ["a.jpg"], "caption": ["A red star."]})["gaze_verdict"]   # in a loop
dataset.map(caption_filter, batched=True, batch_size=256)                          # Hugging Face datasets

One bad row never costs another. Whatever goes wrong with a row (no image, no caption, no memory, no finite number, an error of
the model) makes that row *unchecked*, with the reason; only a row whose image the model has attended to can pass.

``docs/filter-recipes.md`` shows the filter in Ray Data, behind vLLM, in NeMo Curator and beside Data-Juicer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers

from gazeguard import __version__
from gazeguard.errors import GazeGuardError, InputError, UnsupportedError
from gazeguard.filtering.batches import PendingRow, batches_of, prefetch
from gazeguard.filtering.columns import report_columns
from gazeguard.filtering.readers import Source, fingerprint
from gazeguard.filtering.rows import COLUMNS, Row
from gazeguard.guard import GazeGuard
from gazeguard.policy import Policy
from gazeguard.prompts import DEFAULT_PROMPT
from gazeguard.report import Report
from gazeguard.tracing import Prepared
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import has_pixels

MAX_REASON = 300  # characters of the model's own error in a reason
NO_CAPTION = "there is no caption: name another key (--caption-column), or have it written (--write-captions)"

OnRows = Callable[[int], object]  # is told how many more rows are done


def ignore_rows(_: int) -> None:
    """Count nothing: the default of `OnRows`."""


class CaptionFilter:
    """Judge batches of image-caption rows; with the same guard, policy and batches always with the same results.

    Call it with a mapping of columns. An image is a path, the bytes of a file, a PIL image, an array (height, width, 3) uint8,
    or the mapping ``{"bytes", "path"}`` that Hugging Face datasets keep. Captions are written only with ``write_captions``, for
    rows that have none; a row's own caption is never replaced.

    Args:
        guard: A `GazeGuard`; or leave it out and give ``model``.
        model: Folder or hub id of a model to load.
        artifacts: Folder or hub id of its gaze heads and detector; by default those in the model's folder.
        device: Of the loaded model; "auto" takes the GPU if there is one.
        dtype: Of its weights; "auto" takes the checkpoint's.
        policy: For the loaded model; a guard has its own. By default "mark".
        batch_size: Rows per batch. Rows with the same image share a batch, so that most models read the image once; other rows
            are batched by similar length, to limit padding.
        workers: Threads that open images ahead of the model; one more thread encodes.
        prompt: The question that every caption answers; the column ``prompt`` overrides it.
        max_new_tokens: Maximum length of a caption that the model writes, greedily.
        image: Name of the column of images.
        caption: Name of the column of captions.
        write_captions: Write the captions that rows lack, and judge them; by default such rows are *unchecked*.
        options: More for `GazeGuard.from_pretrained`, such as ``device_map``, ``heads`` and ``detector``.

    Raises:
        InputError: There is neither a guard nor a model, or both; a number is below 1.
    """

    def __init__(
        self,
        guard: GazeGuard | None = None,
        *,
        model: str | Path | None = None,
        artifacts: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        policy: str | Path | Policy | None = None,
        batch_size: int = 16,
        workers: int = 2,
        prompt: str = DEFAULT_PROMPT,
        max_new_tokens: int = 256,
        image: str = "image",
        caption: str = "caption",
        write_captions: bool = False,
        **options: Any,
    ) -> None:
        if batch_size < 1 or workers < 1 or max_new_tokens < 1:
            numbers = f"{batch_size}, {workers} and {max_new_tokens}"
            raise InputError(f"batch_size, workers and max_new_tokens are {numbers}. Give each at least 1.")
        self._source: dict[str, Any] | None = None
        if guard is None:
            if model is None:
                raise InputError("There is neither a guard nor a model. Pass a GazeGuard, or model='folder or hub id'.")
            options |= {"artifacts": artifacts, "device": device, "dtype": dtype, "policy": policy or "mark"}
            guard, self._source = GazeGuard.from_pretrained(model, **options), {"model": model, **options}
        elif not isinstance(guard, GazeGuard):
            raise InputError(f"The guard is {guard!r}, expected a GazeGuard. Pass the folder or hub id of a model as model=...")
        elif model is not None or artifacts is not None or policy is not None or options:
            raise InputError("A guard has its own model, artifacts and policy. Pass the guard alone, or model=... without it.")
        self.guard, self.batch_size, self.workers, self.prompt = guard, batch_size, workers, prompt
        self.max_new_tokens, self.image, self.caption = max_new_tokens, image, caption
        self.write_captions = write_captions

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Judge a batch.

        Args:
            batch: Columns by name: images, and optionally captions and ``prompt``; other columns are passed on.

        Returns:
            The same columns, the captions with those that were written, and the result columns: ``gaze_verdict``,
            ``gaze_reason``, ``gaze_risk``, ``gaze_phrases``, ``gaze_caption``, ``gaze_policy`` and ``gaze_version``, as
            `gazeguard.filtering.columns.report_columns` describes them. Columns of the same names are replaced.

        Raises:
            InputError: There is no column of images; there is none of captions, and they are not to be written; or columns are
                not of one length. Nothing else raises.
        """
        if self.image not in batch:
            raise InputError(f"The batch has no column {self.image!r}, only {', '.join(map(repr, batch))}. Pass image=NAME.")
        if self.caption not in batch and not self.write_captions:
            names = ", ".join(map(repr, batch))
            raise InputError(
                f"The batch has no column {self.caption!r}, only {names}. Pass caption=NAME, or write_captions=True to "
                "have captions written."
            )
        images = list(batch[self.image])
        captions, prompts = (list(batch[name]) if name in batch else None for name in (self.caption, "prompt"))
        if any(column is not None and len(column) != len(images) for column in (captions, prompts)):
            raise InputError("The columns of the batch are not of one length. Pass one caption and one prompt per image.")
        results = self.judge(images, captions, prompts)
        added = (self.caption, *COLUMNS) if self.write_captions else COLUMNS
        return {**batch, **{name: [row[name] for row in results] for name in added}}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, a filter that was made of a model's name is its arguments: whoever hashes it (datasets) hashes no weights.

        Raises:
            UnsupportedError: It was made of a guard, whose model may be too large to copy.
        """
        if self._source is None:
            raise UnsupportedError(
                "A filter made of a guard cannot be hashed or sent to another process. Make it of the model's name: "
                "CaptionFilter(model='folder or hub id')."
            )
        names = ("batch_size", "workers", "prompt", "max_new_tokens", "image", "caption", "write_captions")
        own = {name: getattr(self, name) for name in names}
        return _made_again, (type(self), {**self._source, **own}, _guard_settings(self.guard))

    def judge(
        self,
        images: Sequence[Any],
        captions: Sequence[Any] | None,
        prompts: Sequence[Any] | None = None,
        on_rows: OnRows = ignore_rows,
    ) -> list[dict[str, Any]]:
        """Return what a call adds to each row; ``captions`` None: there are none."""
        results: dict[int, dict[str, Any]] = {}
        for number, report in self.iter_reports(images, captions, prompts):
            own = None if captions is None else captions[number]
            # without the trace, which is large
            results[number] = self._caption_column(own, report.caption) | report_columns(report)
            on_rows(1)
        return [results[number] for number in range(len(images))]

    def reports(
        self, images: Sequence[Any], captions: Sequence[Any] | None, prompts: Sequence[Any] | None = None
    ) -> list[Report]:
        """Return the whole report on each row, with its trace, which takes more memory than what `judge` keeps of it."""
        results = dict(self.iter_reports(images, captions, prompts))
        return [results[number] for number in range(len(images))]

    def iter_reports(
        self, images: Sequence[Any], captions: Sequence[Any] | None, prompts: Sequence[Any] | None = None
    ) -> Iterator[tuple[int, Report]]:
        """Iterate over the number of each row and the report on it, as the batches are judged, not in the order of the rows."""
        to_check: list[PendingRow] = []
        to_write: list[PendingRow] = []
        for number, image in enumerate(images):
            caption = None if captions is None else captions[number]
            prompt = None if prompts is None else prompts[number]
            prompt = self.prompt if prompt is None else str(prompt)
            if lacks_caption(caption) and self.write_captions:
                to_write.append(PendingRow(number, image, None, prompt))
            elif reason := unusable_caption(caption):
                yield number, self.guard.unchecked(caption if isinstance(caption, str) else "", reason)
            else:
                to_check.append(PendingRow(number, image, caption, prompt))
        size = self.batch_size
        groups = [to_write[start : start + size] for start in range(0, len(to_write), size)]
        groups += batches_of(to_check, size)
        for batch in prefetch(groups, self._prepare, self.workers, self.guard.tracer.background):
            for row, reason in batch.refused:
                yield row.number, self.guard.unchecked(row.caption or "", reason)
            for row, report in zip(batch.rows, self._judge_rows(batch.rows, batch.prepared), strict=True):
                yield row.number, report

    def filter_rows(self, rows: Sequence[Row], on_rows: OnRows = ignore_rows) -> list[dict[str, Any]]:
        """Return the results of rows of a dataset: the fields of each, and what `judge` says of it."""
        good = [row for row in rows if not row.error]
        images, captions, prompts = ([getattr(row, name) for row in good] for name in ("image", "caption", "prompt"))
        judged = iter(self.judge(images, captions, prompts, on_rows))
        results = []
        for row in rows:
            if row.error:
                on_rows(1)
                report = self.guard.unchecked(row.caption if isinstance(row.caption, str) else "", row.error)
                result = self._caption_column(row.caption, "") | report_columns(report)
            else:
                result = next(judged)
            results.append({**row.fields, **self._image_column(row), **result})
        return results

    def filter_chunks(self, chunks: Iterable[Sequence[Row]], on_rows: OnRows) -> Iterator[list[dict[str, Any]]]:
        """Iterate over the results of `filter_rows` for each chunk of rows."""
        return (self.filter_rows(chunk, on_rows) for chunk in chunks)

    def _image_column(self, row: Row) -> dict[str, Any]:
        """The path of a row's image, absolute, so that the results can be read from where they lie."""
        named = isinstance(row.image, Path) and isinstance(row.fields.get(self.image), str)
        return {self.image: str(row.image.absolute())} if named else {}

    def _caption_column(self, own: Any, written: str) -> dict[str, Any]:
        """The caption of a row where captions are written: its own, or the one that was written because it has none."""
        return {self.caption: written if lacks_caption(own) else own} if self.write_captions else {}

    def run_settings(self, source: Source, root: str | Path, chunk: int, label_only: bool) -> dict[str, str]:
        """Return all that results depend on, by name: an interrupted run goes on only where all of it is the same."""
        settings = {
            "input": fingerprint(source, Path(root)),
            "prompt": self.prompt,
            "task": f"check {self.caption}; {self._writing()}",
            "image column": self.image,
            "batch size": self.batch_size,
            "chunk": chunk,
            "label-only": label_only,
            **_guard_settings(self.guard),
        }
        return {name: str(value) for name, value in settings.items()}

    def _writing(self) -> str:
        return f"write missing ones, at most {self.max_new_tokens} tokens" if self.write_captions else "write none"

    def _prepare(self, rows: Sequence[PendingRow]) -> Prepared:
        columns = [row.image for row in rows], [row.caption or "" for row in rows], [row.prompt for row in rows]
        return self.guard.tracer.prepare(*columns, packed=True)

    def _judge_rows(self, rows: Sequence[PendingRow], prepared: Prepared | None = None) -> list[Report]:
        """A report per row. A batch that fails is halved until only the rows that fail alone are left, *unchecked*."""
        if not rows:
            return []
        try:
            if rows[0].caption is None:
                return self._write_captions(rows)
            return self.guard.check_prepared(prepared or self._prepare(rows))
        except Exception as error:
            reason = explain_failure(error)
        # Out here the error is gone, and with its traceback the tensors of the batch that failed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            return [self.guard.unchecked(rows[0].caption or "", reason)]
        half = len(rows) // 2
        return self._judge_rows(rows[:half]) + self._judge_rows(rows[half:])

    def _write_captions(self, rows: Sequence[PendingRow]) -> list[Report]:
        guard, images = self.guard, [row.image for row in rows]
        inputs = encode(guard.model, guard.processor, images, [row.prompt for row in rows]).inputs
        if not has_pixels(inputs):
            raise InputError("The image did not reach the model: the processor made no pixels. Use the model's own processor.")
        guard.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_return_sequences=1,
            picture_sizes=[[image.size] for image in images],
        )
        return guard.reports


def lacks_caption(caption: Any) -> bool:
    """Return whether a row has no caption of its own: None, NaN (None in pandas), or nothing but blanks."""
    return caption is None or (isinstance(caption, float) and math.isnan(caption)) or not str(caption).strip()


def unusable_caption(caption: Any) -> str:
    """Return why a caption cannot be judged, before any model; empty for one that can."""
    if not isinstance(caption, str):
        return NO_CAPTION if lacks_caption(caption) else f"the caption is not text: {type(caption).__name__}"
    if not caption.strip():
        return "the caption is empty"
    if "\0" in caption:
        return "the caption has NUL characters, as text read in a wrong encoding has: --encoding"
    return ""


def explain_failure(error: Exception) -> str:
    """Return why a row is unchecked, in one line that is the same each time: no addresses, no amounts of memory."""
    if isinstance(error, GazeGuardError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory, even for this row alone"
    message = next(iter(str(error).strip().splitlines()), "")[:MAX_REASON]
    return f"the model raised {type(error).__name__}" + (f": {message}" if message else "")


def _guard_settings(guard: GazeGuard) -> dict[str, str]:
    """All of a guard that results depend on, by name."""
    return {
        "model": guard.heads.model,
        "processor": type(guard.processor).__name__,
        "gaze heads": _digest(guard.heads.model_dump_json()),
        "detector": "none" if guard.detector is None else _digest(guard.detector.model_dump_json()),
        "policy": guard.policy.model_dump_json(),
        "background": guard.tracer.background,
        **({"nouns": " ".join(sorted(guard.judge.nouns))} if guard.judge.nouns else {}),
        "gazeguard": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _made_again(kind: type[CaptionFilter], arguments: dict[str, Any], _: dict[str, str]) -> CaptionFilter:
    """A filter of the same arguments; the settings of the guard count where the pickled filter is hashed."""
    return kind(**arguments)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
