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
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from gazeguard import __version__
from gazeguard.errors import GazeGuardError, InputError
from gazeguard.files import Row, Slice, Source, identity, reason
from gazeguard.guard import DEFAULT_PROMPT, GazeGuard, Prepared
from gazeguard.inputs import encode, has_pixels, load_image
from gazeguard.policy import Policy
from gazeguard.report import Entry, Report
from gazeguard.results import Results, labelled

COLUMNS = (
    "gaze_verdict", "gaze_reason", "gaze_risk", "gaze_phrases", "gaze_caption", "gaze_policy", "gaze_version"
)  # fmt: skip
AHEAD = 2  # batches that are made ready while the model works on another one; chunks that wait at a Ray actor
RETRIES = 3  # of a chunk over which a Ray actor dies
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
                put(number, self.guard._unchecked(text, why))
            else:
                rows.append(_Row(number, image, told, self.prompt if asked is None else str(asked)))
        tick(len(images) - len(rows))
        rows.sort(key=lambda row: len(row.caption or ""))  # stable: the order never depends on anything else
        groups = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        for loaded, blank, prepared in self._loaded(groups):
            for row in blank:
                put(row.number, self.guard._unchecked(row.caption or "", row.image))
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
                report = self.guard._unchecked(row.caption if isinstance(row.caption, str) else "", row.wrong)
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
            return [self.guard._unchecked(rows[0].caption or "", why)]
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


def replay(keep: CaptionFilter, source: Source, passed: bool = True) -> Iterator[Entry]:
    """The rows of an input in their order, judged, as entries of a replay page; without ``passed`` only what did not pass."""
    numbered = enumerate(source.rows(), 1)
    while rows := list(islice(numbered, keep.batch_size * AHEAD)):
        good = [row for _, row in rows if not row.wrong]
        captions = [row.caption for row in good] if source.captioned else None
        reports = iter(keep.reports([row.image for row in good], captions, [row.prompt for row in good]))
        for number, row in rows:
            told = row.caption if isinstance(row.caption, str) else ""
            report = keep.guard._unchecked(told, row.wrong) if row.wrong else next(reports)
            if passed or report.verdict != "pass":
                picture = picture_of(row.image)
                name = row.own.get(keep.image) or row.own.get("key") or f"row {number}"
                yield Entry(str(name), picture if isinstance(picture, Image.Image) else None, report)


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
        report.repaired,
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


class ArrowFilter(CaptionFilter):
    """`CaptionFilter` over Arrow tables, whose columns are of the same types whatever a batch happens to hold."""

    def __call__(self, batch: Any) -> Any:
        """``pyarrow.Table`` in, ``pyarrow.Table`` out: its columns, and behind them those of `CaptionFilter.__call__`."""
        columns = {name: batch[name].to_pylist() for name in (self.image, self.caption, "prompt") if name in batch.column_names}
        made = super().__call__(columns)
        return labelled(batch, {name: values for name, values in made.items() if name not in columns})


def ray_filter(dataset: Any, model: str | Path, actors: int = 1, rows: int = 256, gpus: float = 0, **options: Any) -> Any:
    """A Ray Dataset with the columns of `CaptionFilter` behind its own; lazy, as Ray's own ``map_batches`` that it calls.

    model:   folder or hub id, which every machine of the cluster can load
    actors:  processes that each hold the model; ``gpus`` of the cluster for each
    rows:    handed over at once; the model sees ``batch_size`` of them
    options: of `CaptionFilter`

    Ray gives blocks back as they are done, unless its ``preserve_order`` is set. An actor that dies is started anew and its
    rows are judged again.
    """
    ray = _ray()
    return dataset.map_batches(
        ArrowFilter,
        fn_constructor_args=(str(model),),
        fn_constructor_kwargs=options,
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=rows,
        batch_format="pyarrow",
        num_gpus=gpus or None,
    )


class _Actor(CaptionFilter):
    def process(self) -> int:
        """Its number, which says that it is there."""
        return os.getpid()


class RayPool:
    """`CaptionFilter` in Ray actors, for `filter_files`: chunks are judged side by side and come back in their order.

    model:   folder or hub id, which every machine of the cluster can load, as it must be able to read the input's pictures
    actors:  processes that each hold the model, on a GPU each if the cluster has any; None: as many as GPUs, else two
    options: of `CaptionFilter`

    An actor that dies is started anew and its chunk judged again, `RETRIES` times at most. Uses the cluster that Ray is
    connected to or finds by ``RAY_ADDRESS``, else one of its own on this machine, which ends with the pool.
    Raises `InputError` without Ray, for more actors than GPUs, and for a model that the actors cannot load.
    """

    def __init__(self, model: str | Path, actors: int | None = None, **options: Any) -> None:
        self._ray = ray = _ray()
        self._own = not ray.is_initialized()
        if self._own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a filter tells nobody that it runs
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus and actors and actors > gpus:
            self.close()
            raise InputError(f"{actors} actors are asked for, but the cluster has {gpus} GPUs. Ask for at most so many.")
        actor = ray.remote(_Actor).options(num_gpus=min(gpus, 1), max_restarts=-1, max_task_retries=RETRIES)
        self.actors = [actor.remote(str(model), **options) for _ in range(actors or gpus or 2)]

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and the cluster if it is the pool's own."""
        for actor in getattr(self, "actors", ()):
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()

    def processes(self) -> list[int]:
        """The process of each actor, on whatever machine it is."""
        return [self._come(actor.process.remote()) for actor in self.actors]

    def settings(self, source: Source, root: str | Path, chunk: int, label_only: bool) -> dict[str, str]:
        """`CaptionFilter.settings` of the first actor."""
        return self._come(self.actors[0].settings.remote(source, Path(root).resolve(), chunk, label_only))

    def chunks(
        self, batches: Iterable[Sequence[Row]], captioned: bool, tick: Callable[[int], object]
    ) -> Iterator[list[dict[str, Any]]]:
        """`CaptionFilter.rows` for every batch, in their order; at most `AHEAD` batches wait at every actor."""
        waiting: deque[Any] = deque()

        def come() -> list[dict[str, Any]]:
            made = self._come(waiting.popleft())
            tick(len(made))
            return made

        for batch, actor in zip(batches, cycle(self.actors), strict=False):
            waiting.append(actor.rows.remote(batch, captioned))
            if len(waiting) >= AHEAD * len(self.actors):
                yield come()
        while waiting:
            yield come()

    def _come(self, promised: Any) -> Any:
        try:
            return self._ray.get(promised)
        except self._ray.exceptions.RayTaskError as error:
            raise InputError(f"An actor raised {explain(error.cause)}") from error
        except self._ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()[-1][:MAX_REASON]  # before it stands a traceback
            raise InputError(
                f"Ray's actors cannot go on: {said} Finished chunks are kept. See that every machine can load the model and "
                "has the memory for it, and give the same command again."
            ) from error


def _ray() -> ModuleType:
    """Ray with its data. Raises `InputError` when it is not installed. Ray's way with SIGTERM, set on import, is undone."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        import ray.data
    except ImportError as error:
        raise InputError("Ray is not installed: pip install 'gazeguard[ray]'.") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    return ray


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def filter_files(
    keep: CaptionFilter | RayPool,
    source: Source,
    results: Results,
    chunk: int,
    tick: Callable[[int], object] = lambda rows: None,
) -> dict[str, Any]:
    """Judge every row of ``source`` that has no result yet, and put the results together; what ``summary.json`` says.

    chunk: rows between two savings; whatever kills the run costs at most so many. ``tick`` hears of rows done here.
    Raises `InputError` when the input or a folder of other results cannot be used, `OutputError` when writing fails.
    """
    with results.opened():
        if not results.finished():
            first = results.done()
            rows = source.rows(first * chunk)
            batches = iter(lambda: _next(rows, chunk), [])
            for number, made in enumerate(keep.chunks(batches, source.captioned, tick), first):
                results.save(number, made)
        return results.finish(source)


def _next(rows: Iterator[Row], count: int) -> list[Row]:
    try:
        return list(islice(rows, count))
    except (OSError, ValueError) as error:  # Arrow's own are of both kinds
        raise InputError(f"The input cannot be read on: {error}. Rows before are kept; repair it and start anew.") from error
