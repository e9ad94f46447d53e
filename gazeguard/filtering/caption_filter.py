"""And a million times? `CaptionFilter`: columns of pictures and captions in, the same columns and a verdict per row out.

keep = CaptionFilter("path/of/a/model", policy="mark")
keep({"image": ["a.jpg"], "caption": ["A red star."]})["gaze_verdict"]   # a for-loop
dataset.map(keep, batched=True, batch_size=256)                          # Hugging Face datasets
ray_filter(ray_dataset, "path/of/a/model", actors=8, gpus=1)             # Ray Data; pictures as bytes, arrays or shared paths

One bad row never costs another. Whatever goes wrong with a row (no picture, no caption, no memory, no finite number, an error
of the model) makes that row *unchecked*, with the reason; only a row whose picture the model has looked at can pass.

Where it sits in a larger pipeline: behind whatever writes captions, since one forward pass per caption judges them all. The
columns are the interface: what comes after it filters by ``gaze_verdict``. The lines above are tested; those below are not, as
the libraries need GPUs or pin other versions of torch and transformers.

Behind captions of vLLM in Ray Data, whose processor leaves the columns that it gets::

    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    config = vLLMEngineProcessorConfig(model_source="Qwen/Qwen3-VL-8B-Instruct")
    write = build_processor(config, preprocess=..., postprocess=...)
    told = ray_filter(write(ray.data.read_parquet("pictures/")), "folder/of/the/model", actors=8, gpus=1)
    told.filter(expr="gaze_verdict == 'pass'").write_parquet("kept/")

As a stage of NeMo Curator, in the environment of which this package is installed::

    @dataclass
    class GazeStage(ProcessingStage[ImageBatch, ImageBatch]):
        resources: Resources = field(default_factory=lambda: Resources(gpus=1))

        def setup(self, worker_metadata=None):
            self.keep = CaptionFilter("folder/of/the/model")

        def process(self, task):
            own = task.data
            made = self.keep({"image": [x.image_data for x in own], "caption": [x.metadata["caption"] for x in own]})
            for i, x in enumerate(own):
                x.metadata.update({name: made[name][i] for name in COLUMNS})
            return task

Data-Juicer pins transformers 4, with which this package does not run: filter first, in an environment of its own, and let its
``general_field_filter`` read the column: ``filter_condition: "gaze_verdict == 'pass'"``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from gazeguard import __version__
from gazeguard.errors import GazeGuardError, InputError
from gazeguard.filtering.readers import Row, Slice, Source, identity, reason
from gazeguard.guard import DEFAULT_PROMPT, GazeGuard, Prepared
from gazeguard.policy import Policy
from gazeguard.report import Report
from gazeguard.vision.encoding import encode
from gazeguard.vision.images import load_image
from gazeguard.vision.inputs import has_pixels

COLUMNS = (
    "gaze_verdict", "gaze_reason", "gaze_risk", "gaze_phrases", "gaze_caption", "gaze_policy", "gaze_version"
)  # fmt: skip
AHEAD = 2  # batches that are made ready while the model works on another one; chunks that wait at a Ray actor
MAX_REASON = 300  # characters that an error of the model may say


@dataclass(frozen=True, eq=False)
class _Row:
    """A row on its way; ``caption`` is None where one is to be written."""

    number: int
    image: Any
    caption: str | None
    prompt: str


class _Loaded(NamedTuple):
    """A batch on its way: rows with their pictures, others with the reason why there is none in the picture's place, and the
    first as the model reads them; None where that failed, or where captions are to be written.
    """

    rows: Sequence[_Row]
    blank: Sequence[_Row]
    prepared: Prepared | None


class CaptionFilter:
    """Columns in, the same columns and `COLUMNS` out; with the same guard, policy and batches always the same.

    guard:          a `GazeGuard`, or the folder or hub id of a model with its gaze heads and detector beside it
    policy:         of the guard that is made for a model; a guard brings its own
    batch_size:     rows that the model sees at once; neighbours in length, so that little is padded
    workers:        threads that unpack pictures ahead of the model, at most `AHEAD` batches of them; one more encodes
    prompt:         what every caption answers, unless the column ``prompt`` says so
    max_new_tokens: of a caption that has to be written, where there is no column of captions; written greedily
    image, caption: names of the columns that are read
    device:         of a model that is loaded here; by default a GPU if there is one
    options:        for `GazeGuard`, such as ``heads`` and ``detector``

    A picture is a path, the bytes of a file, a PIL image, an array (height, width, 3) uint8, or the mapping
    ``{"bytes", "path"}`` that Hugging Face datasets keep. Columns of the same names are replaced.
    """

    def __init__(
        self,
        guard: GazeGuard | str | Path,
        policy: str | Path | Policy = "mark",
        batch_size: int = 16,
        workers: int = 2,
        prompt: str = DEFAULT_PROMPT,
        max_new_tokens: int = 256,
        image: str = "image",
        caption: str = "caption",
        device: str | None = None,
        **options: Any,
    ) -> None:
        if batch_size < 1 or workers < 1 or max_new_tokens < 1:
            raise InputError(
                f"batch_size, workers and max_new_tokens are {batch_size}, {workers} and {max_new_tokens}. "
                "Give each at least 1."
            )
        if not isinstance(guard, GazeGuard):
            model = AutoModelForImageTextToText.from_pretrained(guard, trust_remote_code=False).eval()
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            guard = GazeGuard(model, AutoProcessor.from_pretrained(guard, trust_remote_code=False), policy=policy, **options)
        self.guard, self.batch_size, self.workers, self.prompt = guard, batch_size, workers, prompt
        self.max_new_tokens, self.image, self.caption = max_new_tokens, image, caption

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch's columns, the captions that were written if there were none, and per row:

        gaze_verdict: "pass", "flag" or "unchecked"
        gaze_reason:  why, for the last two; empty for pass
        gaze_risk:    the highest risk of a phrase, in [0, 1]; None where no phrase was judged
        gaze_phrases: for each claim ``text``, ``span`` [start, end) in characters of the caption, ``kind``, ``risk``,
                      ``flagged``, and ``box``, the gazed region, [x0, y0, x1, y1] in pixels of the upright picture, or None
        gaze_caption: what the policy lets through: the caption, or what is left of it, or ""
        gaze_policy:  name of the policy
        gaze_version: of GazeGuard

        Raises `InputError` only for columns that are missing or not of one length.
        """
        if self.image not in batch:
            raise InputError(f"The batch has no column {self.image!r}, only {', '.join(map(repr, batch))}. Pass image=NAME.")
        images = list(batch[self.image])
        captions, prompts = (list(batch[name]) if name in batch else None for name in (self.caption, "prompt"))
        if any(column is not None and len(column) != len(images) for column in (captions, prompts)):
            raise InputError("The columns of the batch are not of one length. Pass one caption and one prompt per picture.")
        made = self.judge(images, captions, prompts)
        added = COLUMNS if captions is not None else (self.caption, *COLUMNS)
        return {**batch, **{name: [row[name] for row in made] for name in added}}

    def judge(
        self,
        images: Sequence[Any],
        captions: Sequence[Any] | None,
        prompts: Sequence[Any] | None = None,
        tick: Callable[[int], object] = lambda rows: None,
    ) -> list[dict[str, Any]]:
        """What `__call__` adds, one mapping per row; ``captions`` None: they are written. ``tick`` hears of rows done."""
        made: dict[int, dict[str, Any]] = {}

        def put(number: int, report: Report) -> None:  # without its trace, which is large
            made[number] = ({self.caption: report.caption} if captions is None else {}) | columns(report)

        self._judge(images, captions, prompts, tick, put)
        return [made[number] for number in range(len(images))]

    def reports(
        self,
        images: Sequence[Any],
        captions: Sequence[Any] | None,
        prompts: Sequence[Any] | None = None,
        tick: Callable[[int], object] = lambda rows: None,
    ) -> list[Report]:
        """The whole report on each row, with its gaze, which takes more room than what `judge` makes of it."""
        made: dict[int, Report] = {}
        self._judge(images, captions, prompts, tick, made.__setitem__)
        return [made[number] for number in range(len(images))]

    def _judge(
        self,
        images: Sequence[Any],
        captions: Sequence[Any] | None,
        prompts: Sequence[Any] | None,
        tick: Callable[[int], object],
        put: Callable[[int, Report], None],
    ) -> None:
        """Give ``put`` the number of each row and the report on it, a batch at a time."""
        rows: list[_Row] = []
        for number, image in enumerate(images):
            told = None if captions is None else captions[number]
            asked = None if prompts is None else prompts[number]
            if captions is not None and not (isinstance(told, str) and told.strip()):
                text, why = (told, "the caption is empty") if isinstance(told, str) else ("", "there is no caption")
                put(number, self.guard.unchecked(text, why))
            else:
                rows.append(_Row(number, image, told, self.prompt if asked is None else str(asked)))
        tick(len(images) - len(rows))
        rows.sort(key=lambda row: len(row.caption or ""))  # stable: the order never depends on anything else
        groups = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        for loaded, blank, prepared in self._loaded(groups):
            for row in blank:
                put(row.number, self.guard.unchecked(row.caption or "", row.image))
            for row, report in zip(loaded, self._judged(loaded, prepared), strict=True):
                put(row.number, report)
            tick(len(loaded) + len(blank))

    def rows(
        self, rows: Sequence[Row], captioned: bool, tick: Callable[[int], object] = lambda rows: None
    ) -> list[dict[str, Any]]:
        """`judge` for the rows of a file: what each repeats of its own, and what is said of it."""
        good = [row for row in rows if not row.wrong]
        captions = [row.caption for row in good] if captioned else None
        judged = iter(self.judge([row.image for row in good], captions, [row.prompt for row in good], tick))
        made = []
        for row in rows:
            if row.wrong:
                tick(1)
                report = self.guard.unchecked(row.caption if isinstance(row.caption, str) else "", row.wrong)
                told = ({} if captioned else {self.caption: ""}) | columns(report)
            else:
                told = next(judged)
            made.append({**row.own, **told})
        return made

    def settings(self, source: Source, root: str | Path, chunk: int, label_only: bool) -> dict[str, str]:
        """Everything that results depend on, by name: a run that was broken off goes on only where all of it is the same."""
        guard = self.guard
        told = {
            "input": identity(source, Path(root)),
            "model": guard.heads.model,
            "gaze heads": _digest(guard.heads.model_dump_json()),
            "detector": "none" if guard.detector is None else _digest(guard.detector.model_dump_json()),
            "policy": guard.policy.model_dump_json(),
            "prompt": self.prompt,
            "task": f"check with {self.caption}" if source.captioned else f"write at most {self.max_new_tokens} tokens",
            "image column": self.image,
            "batch size": self.batch_size,
            "chunk": chunk,
            "label-only": label_only,
            "gazeguard": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return {name: str(value) for name, value in told.items()}

    def chunks(
        self, batches: Iterable[Sequence[Row]], captioned: bool, tick: Callable[[int], object]
    ) -> Iterator[list[dict[str, Any]]]:
        """`rows` for one batch after the other."""
        return (self.rows(batch, captioned, tick) for batch in batches)

    def _loaded(self, groups: Sequence[Sequence[_Row]]) -> Iterator[_Loaded]:
        """The groups in their order, as they become ready."""
        pool, encoder = ThreadPoolExecutor(self.workers), ThreadPoolExecutor(1)
        try:
            ahead: deque[Future[_Loaded]] = deque()
            for group in groups:
                pictures = [pool.submit(picture_of, row.image) for row in group]
                ahead.append(encoder.submit(self._ready, group, pictures))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for threads in (pool, encoder):  # one that waits for a picture gets none
                threads.shutdown(cancel_futures=True)

    def _ready(self, group: Sequence[_Row], pictures: Sequence[Future[Image.Image | str]]) -> _Loaded:
        rows = [replace(row, image=picture.result()) for row, picture in zip(group, pictures, strict=True)]
        seen = [row for row in rows if isinstance(row.image, Image.Image)]
        prepared = None
        if seen and seen[0].caption is not None:
            with suppress(Exception):  # `_judged` meets it again
                prepared = self._prepared(seen)
        return _Loaded(seen, [row for row in rows if not isinstance(row.image, Image.Image)], prepared)

    def _judged(self, rows: Sequence[_Row], prepared: Prepared | None = None) -> list[Report]:
        """A report per row. A batch that fails is halved until only the rows that fail alone are left, *unchecked*."""
        if not rows:
            return []
        try:
            if rows[0].caption is None:
                return self._written(rows)
            return self.guard.check_prepared(prepared or self._prepared(rows))
        except Exception as error:
            why = explain(error)
        # Out here the error is gone, and with its traceback the tensors of the batch that failed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            return [self.guard.unchecked(rows[0].caption or "", why)]
        half = len(rows) // 2
        return self._judged(rows[:half]) + self._judged(rows[half:])

    def _prepared(self, rows: Sequence[_Row]) -> Prepared:
        return self.guard.prepare(
            [row.image for row in rows], [row.caption or "" for row in rows], [row.prompt for row in rows]
        )

    def _written(self, rows: Sequence[_Row]) -> list[Report]:
        guard, pictures = self.guard, [row.image for row in rows]
        inputs = encode(guard.model, guard.processor, pictures, [row.prompt for row in rows]).inputs
        if not has_pixels(inputs):
            raise InputError("The picture did not reach the model: the processor made no pixels. Use the model's own one.")
        guard.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_return_sequences=1,
            picture_sizes=[[picture.size] for picture in pictures],
        )
        return guard.reports


def columns(report: Report) -> dict[str, Any]:
    """`COLUMNS` of one report, as values that JSON and Arrow can hold."""
    phrases = [
        {
            "text": finding.claim.text,
            "span": [finding.claim.start, finding.claim.end],
            "kind": str(finding.claim.kind),
            "risk": round(float(finding.risk), 6),
            "flagged": bool(finding.flagged),
            "box": None if finding.box is None else [round(float(edge), 2) for edge in finding.box],
        }
        for finding in report.findings
    ]
    values = (
        str(report.verdict),
        report.reason,
        max((phrase["risk"] for phrase in phrases), default=None),
        phrases,
        report.filtered_caption,
        report.policy,
        report.version,
    )
    return dict(zip(COLUMNS, values, strict=True))


def picture_of(source: Any) -> Image.Image | str:
    """The picture that a row's image column means, upright RGB; or the reason why there is none, without its path."""
    name = str(source) if isinstance(source, (str, Path)) else None
    try:
        if isinstance(source, Mapping):  # as Hugging Face datasets keep pictures
            source = source.get("bytes") or source.get("path")
        if isinstance(source, Slice):
            source = source.read()
        if isinstance(source, np.ndarray):
            source = Image.fromarray(source)
        if source is None or (isinstance(source, float) and math.isnan(source)):  # how pandas says None
            return "there is no picture"
        return load_image(source)
    except InputError as error:
        return str(error).replace(name, "the picture") if name else str(error).replace("the given picture", "the picture")
    except Exception as error:  # of arrays that are no pictures, and of storage
        return f"the picture cannot be read: {reason(error)}"


def explain(error: Exception) -> str:
    """Why a row is unchecked, in one line that is the same each time: no addresses, no amounts of memory."""
    if isinstance(error, GazeGuardError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory, even for this row alone"
    said = next(iter(str(error).strip().splitlines()), "")[:MAX_REASON]
    return f"the model raised {type(error).__name__}: {said}" if said else f"the model raised {type(error).__name__}"


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
