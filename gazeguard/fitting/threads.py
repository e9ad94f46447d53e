"""Threads of a fit: as many as its matrices are worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

NARROW = 512  # width of a decoder's states below which a second thread costs more than it saves


@contextmanager
def few_threads(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a narrow model on the CPU runs in one thread, and so do the regressions on some thousand claims.

    Threads wait for each other by spinning: on matrices this small they double the CPU time on an idle machine, and where other
    programs run, too, made a fit of the tiny lab's model several times as long.
    """
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", NARROW)
    narrow = model.device.type == "cpu" and width < NARROW
    with threadpool_limits(1, user_api="blas"):
        torch.set_num_threads(1 if narrow else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
