"""Ids of filtered captions: what ``generate`` returns under a policy that removes phrases or withholds captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gazeguard.decoding.call import end_tokens
from gazeguard.errors import UnsupportedError
from gazeguard.vision.text import tokenize


class LetThrough(NamedTuple):
    """A generated caption, what a policy lets through of it, and whether the caption ended by itself."""

    caption: str
    filtered: str
    finished: bool


def let_through(
    output: Any, start: int, captions: Sequence[LetThrough], config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """What ``generate`` returned, with the filtered captions in its sequences.

    A caption that the policy changes is encoded anew, an end token behind it if it had ended by itself; the others keep their
    ids. What else the output holds (scores, hidden states, the cache) stays as it was generated.

    Args:
        output: Ids (captions, length), or a ModelOutput with such ``sequences``.
        start: Number of tokens before the captions.
        captions: One per row.
        config: Of the generation; it names the end tokens and the padding.
        tokenizer: The model's.

    Returns:
        The output; decoded without special tokens, each row is its filtered caption.

    Raises:
        UnsupportedError: The tokenizer cannot write a filtered caption.
    """
    if all(each.caption == each.filtered for each in captions):
        return output
    sequences = output if isinstance(output, Tensor) else output.sequences
    ends = sorted(end_tokens(config))
    padding = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
    rows = []
    for row, each in zip(sequences, captions, strict=True):
        if each.caption != each.filtered:
            ids = _encoded(tokenizer, each.filtered) + ends[:1] * each.finished
            row = torch.cat((row[:start], row.new_tensor(ids)))
        rows.append(row)
    filtered = pad_sequence(rows, batch_first=True, padding_value=padding)
    if isinstance(output, Tensor):
        return filtered
    output.sequences = filtered
    return output


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that decode to it again."""
    ids: list[int] = tokenize(tokenizer, text)[0].tolist() if text else []
    if (decoded := tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) != text:
        raise UnsupportedError(
            f"The tokenizer writes the filtered caption {text!r:.80} as {decoded!r:.80}, so that generate cannot return it as "
            "ids. Choose a policy with on_flag: keep, and judge what it wrote with guard.check under this one."
        )
    return ids
