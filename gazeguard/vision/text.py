"""Tokenisation of captions, with the characters that each token covers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gazeguard.errors import InputError

# A fast tokenizer stores in itself how the newest call wants to pad, so that two threads must not call one at once.
TOKENIZER_LOCK = threading.Lock()
WINDOW, OVERLAP = 16, 4  # tokens that are decoded together, and how many of them again with the next ones


def check_text(text: Any, name: str) -> None:
    """Raise `InputError` for what is no text, or none that could be written down; ``name`` is what the message calls it."""
    if not isinstance(text, str):
        raise InputError(f"The {name} is of type {type(text).__name__}; expected a str. Pass the text itself.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"Character {error.start} of the {name} is half of a surrogate pair, which is no text. Repair its encoding."
        ) from error


def tokenize(tokenizer: PreTrainedTokenizerBase, caption: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids of a caption and the characters that each covers, without special tokens: ``<image>`` in it is text.

    Returns:
        ids: (T,) int64.
        offsets: (T, 2) int64, start and end in characters of ``caption``.

    Raises:
        InputError: The caption is no text.
    """
    check_text(caption, "caption")
    options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    with TOKENIZER_LOCK:
        output = tokenizer(caption, add_special_tokens=False, split_special_tokens=True, **options)
    ids = np.array(output["input_ids"], np.int64)
    if tokenizer.is_fast:
        return ids, np.array(output["offset_mapping"], np.int64).reshape(-1, 2)
    return ids, decode(tokenizer, ids)[1]


def decode(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64]) -> tuple[str, NDArray[np.int64]]:
    """The text of token ids and the characters that each covers.

    A fast tokenizer that turns the text into the same ids again says the offsets itself; otherwise see `_offsets`.

    Args:
        tokenizer: The tokenizer.
        ids: (T,) int64.

    Returns:
        The text without special tokens, and offsets (T, 2) int64, start and end in its characters.
    """
    text = _text(tokenizer, ids)
    if tokenizer.is_fast:
        again, offsets = tokenize(tokenizer, text)
        if np.array_equal(again, ids):
            return text, offsets
    return text, _offsets(tokenizer, ids, len(text))


def _text(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64]) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _offsets(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """(T, 2) int64 offsets in a text of ``length`` characters, found by decoding.

    A token's characters are what it adds to the text of the few tokens before it, so that the cost grows with T and a
    tokenizer's rules about leading spaces are respected. Tokens that together make one character share it.
    """
    special = set(tokenizer.all_special_ids)
    offsets = np.zeros((len(ids), 2), np.int64)
    position, window, before = 0, 0, 0  # before: the length of the text of ids[window:i]
    for i, token in enumerate(ids.tolist()):
        if i - window == WINDOW:
            window = i - OVERLAP
            before = len(_text(tokenizer, ids[window:i]))
        now = len(_text(tokenizer, ids[window : i + 1]))
        end = min(length, position + max(0, now - before))
        before = now
        shared = end == position and position > 0 and token not in special
        offsets[i] = (position - 1 if shared else position, end)
        position = end
    return offsets
