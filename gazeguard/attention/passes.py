"""Forward passes of one run: which of them are captured, which positions they bring, and where their keys are."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from gazeguard import _compat
from gazeguard.attention.layout import KeyLayout
from gazeguard.errors import UnsupportedError


class ForwardPass(NamedTuple):
    """A forward pass that is captured.

    Attributes:
        past: Positions that were in the cache before it.
        steps: How many of its last queries predict a generated token; 0 within the prompt.
    """

    past: int
    steps: int


class PassTracker:
    """The forward passes of one run: the first whose batch is that of the prompts, and those that continue its cache.

    A decoding step is the query that predicts one generated token; step 0 is at position ``layout.last``.

    Args:
        layout: The keys of the prompts.
        own_keys: The recorded modules have keys of their own, as in cross-attention, which the layout describes.
        reordered: Rows of the batch are reordered between steps, as in beam search.
    """

    def __init__(self, layout: KeyLayout, own_keys: bool = False, reordered: bool = False) -> None:
        self.layout, self.own_keys, self.reordered = layout, own_keys, reordered
        self.first = layout.last  # the position of step 0
        self.seen = -1  # positions that the model has seen; -1 before the first pass
        self.current: ForwardPass | None = None  # while a captured pass runs
        self.thread: int | None = None  # the thread that runs the model; passes of others are not captured
        self._cache: weakref.ref[Any] | None = None  # weak: it is large, and whoever generates may drop it

    @property
    def cache(self) -> Any:
        """The cache of the first pass; None without one, and after it is gone."""
        return self._cache and self._cache()

    @property
    def steps(self) -> int:
        """Decoding steps so far; negative within the prompt."""
        return self.seen - self.first

    def start_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Decide whether a pass is captured, and which positions it brings.

        Args:
            args: What the decoder's forward got.
            kwargs: Its keyword arguments.

        Returns:
            How many rows of the batch each prompt has got by this pass: more than 1 only in the first one.

        Raises:
            UnsupportedError: A second pass without a cache, which cannot be told from the first.
        """
        self.current, first, times = None, self.seen < 0, 1
        inputs = (*(kwargs.get(name) for name in ("inputs_embeds", "input_ids", "hidden_states")), *args)
        batch, length = next(value for value in inputs if value is not None).shape[:2]
        cache = _compat.cache_argument(kwargs)
        if first:
            times, rest = divmod(batch, self.layout.real.shape[0])
            if rest or not times:
                return 1
            self._begin(cache, times)
        elif not self._continues(batch, cache):
            return 1
        past = 0 if cache is None else cache.get_seq_length()
        if not isinstance(past, int):  # a static cache keeps its length on the device
            past = int(past) if first else self.seen
        end = past + length
        if cache is None and end <= self.seen:
            raise UnsupportedError("The model ran twice in one recording. Call begin() before each run.")
        # Without a cache a pass brings all positions again, perhaps in other rows: those of earlier steps were captured then.
        new = max(past, self.first, self.seen if cache is None else 0)
        self.seen, self.current = end, ForwardPass(past, max(0, end - new))
        return times

    def _begin(self, cache: Any, times: int) -> None:
        if times > 1:
            self.layout = self.layout.repeated(times)
        self._cache = None if cache is None else weakref.ref(cache)
        self.thread = threading.get_ident()

    def _continues(self, batch: int, cache: Any) -> bool:
        """Whether a later pass has the batch and the cache of the first."""
        same_cache = cache is self.cache and (cache is None) == (self._cache is None)
        return same_cache and batch == self.layout.real.shape[0]

    def end_pass(self) -> ForwardPass | None:
        """The current pass, which is over then; None when it is not captured."""
        current, self.current = self.current, None
        return current

    def key_offset(self, layer: int, keys: int) -> int:
        """How many of the prompt's keys have left a layer's cache of so many keys, from the first on.

        Negative when so many others are in front of them.
        """
        if self.own_keys:
            return self.layout.keys - keys
        return 0 if _compat.layer_keeps_prompt(self.cache, layer) else max(0, self.seen - keys)

    def keys_stay(self, layer: int) -> bool:
        """Whether the keys of a layer stay what and where they are until the end, so that they can be read then."""
        return not self.reordered and _compat.layer_grows(self.cache, layer)
