"""Ray backends of the batch filter: actors for a Ray Dataset, and an actor pool for a filter run. Ray is imported when used."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

from gazeguard.errors import InputError, extra
from gazeguard.filtering.caption_filter import MAX_REASON, CaptionFilter, OnRows, explain_failure
from gazeguard.filtering.columns import append_columns
from gazeguard.filtering.readers import Source
from gazeguard.filtering.rows import Row

MAX_RETRIES = 3  # of a chunk over which an actor dies
QUEUED = 2  # chunks that wait at each actor


class ArrowCaptionFilter(CaptionFilter):
    """`CaptionFilter` over Arrow tables, whose columns are of the same types whatever a batch happens to hold."""

    def __call__(self, batch: Any) -> Any:
        """Judge a ``pyarrow.Table``; the returned one has its columns, and behind them those of `CaptionFilter.__call__`."""
        columns = {name: batch[name].to_pylist() for name in (self.image, self.caption, "prompt") if name in batch.column_names}
        results = super().__call__(columns)
        replaced = {self.caption} if self.write_captions else set()
        return append_columns(batch, {name: values for name, values in results.items() if name not in {*columns} - replaced})


def ray_filter(dataset: Any, model: str | Path, actors: int = 1, rows: int = 256, gpus: float = 0, **options: Any) -> Any:
    """Filter a Ray Dataset; lazy, as Ray's own ``map_batches`` that it calls.

    Ray gives blocks back as they are done, unless its ``preserve_order`` is set. An actor that dies is restarted and its rows
    are judged again.

    Args:
        dataset: A ``ray.data.Dataset`` with images as bytes, arrays or paths that every machine can read.
        model: Folder or hub id, which every machine of the cluster can load.
        actors: Processes that each hold the model.
        rows: Handed over at once; the model sees ``batch_size`` of them.
        gpus: Of the cluster, for each actor.
        options: Of `CaptionFilter`.

    Returns:
        The dataset with the result columns behind its own.
    """
    ray = _import_ray()
    return dataset.map_batches(
        ArrowCaptionFilter,
        fn_constructor_kwargs={"model": str(model), **options},
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=rows,
        batch_format="pyarrow",
        num_gpus=gpus or None,
    )


class _Actor(CaptionFilter):
    def process_id(self) -> int:
        """Its process, which says that it is there."""
        return os.getpid()


class RayActorPool:
    """`CaptionFilter` in Ray actors, for `filter_files`: chunks are judged side by side and come back in their order.

    An actor that dies is restarted and its chunk judged again, `MAX_RETRIES` times at most. The pool uses the cluster that Ray
    is connected to or finds by ``RAY_ADDRESS``, else one of its own on this machine, which ends with the pool.

    Args:
        model: Folder or hub id, which every machine of the cluster can load, as it must be able to read the input's images.
        actors: Processes that each hold the model, on a GPU each if the cluster has any; None: as many as GPUs, else two.
        options: Of `CaptionFilter`.

    Raises:
        InputError: Ray is not installed, there are more actors than GPUs, or the actors cannot load the model.
    """

    def __init__(self, model: str | Path, actors: int | None = None, **options: Any) -> None:
        self._ray = ray = _import_ray()
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a filter reports to nobody that it runs
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus and actors and actors > gpus:
            self.close()
            raise InputError(f"{actors} actors are asked for, but the cluster has {gpus} GPUs. Ask for at most so many.")
        actor = ray.remote(_Actor).options(num_gpus=min(gpus, 1), max_restarts=-1, max_task_retries=MAX_RETRIES)
        self.actors = [actor.remote(model=str(model), **options) for _ in range(actors or gpus or 2)]

    def __enter__(self) -> RayActorPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and the cluster if it is the pool's own."""
        for actor in getattr(self, "actors", ()):
            self._ray.kill(actor)
        if self._owns_cluster:
            self._ray.shutdown()

    def process_ids(self) -> list[int]:
        """Return the process of each actor, on whatever machine it is."""
        return [self._get(actor.process_id.remote()) for actor in self.actors]

    def run_settings(self, source: Source, root: str | Path, chunk: int, label_only: bool) -> dict[str, str]:
        """Return `CaptionFilter.run_settings` of the first actor."""
        return self._get(self.actors[0].run_settings.remote(source, Path(root).resolve(), chunk, label_only))

    def filter_chunks(self, chunks: Iterable[Sequence[Row]], on_rows: OnRows) -> Iterator[list[dict[str, Any]]]:
        """Iterate over `CaptionFilter.filter_rows` for every chunk, in their order; at most `QUEUED` wait at every actor."""
        waiting: deque[Any] = deque()

        def next_result() -> list[dict[str, Any]]:
            rows = self._get(waiting.popleft())
            on_rows(len(rows))
            return rows

        for chunk, actor in zip(chunks, cycle(self.actors), strict=False):
            waiting.append(actor.filter_rows.remote(chunk))
            if len(waiting) >= QUEUED * len(self.actors):
                yield next_result()
        while waiting:
            yield next_result()

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise InputError(f"An actor raised {explain_failure(error.cause)}") from error
        except self._ray.exceptions.RayError as error:
            message = str(error).strip().splitlines()[-1][:MAX_REASON]  # before it stands a traceback
            raise InputError(
                f"Ray's actors cannot go on: {message} Finished chunks are kept. Check that every machine can load the model "
                "and has enough memory, and run the same command again."
            ) from error


def _import_ray() -> ModuleType:
    """Import Ray with its data. Raises `InputError` when it is not installed. Its SIGTERM handler, set on import, is undone."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        import ray.data
    except ImportError as error:
        raise InputError(f"Ray is not installed: {extra('ray')}.") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    return ray
