"""TODO filtering.ray."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

from gazeguard.errors import InputError
from gazeguard.filtering.caption_filter import AHEAD, MAX_REASON, CaptionFilter, explain
from gazeguard.filtering.readers import Row, Source
from gazeguard.filtering.writer import labelled

RETRIES = 3  # of a chunk over which a Ray actor dies


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
