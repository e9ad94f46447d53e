"""Ways of generating that once went wrong, each through a guard and beside one plain pass: live is replay.

`evals.torture` draws hundreds of others.
"""

from __future__ import annotations

import pytest
import torch
from invariants import MAKERS

from evals.combinations import Combination, guard_of, run

WAYS = {
    "beams without a cache": ("VideoLlama3", "sdpa", "none", "beams", 3, (1,), "generate"),
    "sampled beams over cross-attention without a cache": ("Mllama", "sdpa", "none", "sampled beams", 3, (5, 0), "generate"),
    "images encoded before the loop": ("Qwen2.5-VL", "sdpa", "dynamic", "greedy", 1, (2, 1), "custom_generate"),
    "several captions of several images in the loop": ("LLaVA", "sdpa", "dynamic", "sampled", 3, (1, 2), "custom_generate"),
    "beams over images encoded before the loop": ("LLaVA-OneVision", "sdpa", "static", "beams", 2, (3, 2), "custom_generate"),
    "a first argument that is not the ids": ("InstructBlipVideo", "sdpa", "dynamic", "greedy", 1, (1,), "watch"),
    "last layers that leave positions out": ("Gemma4", "sdpa", "dynamic", "greedy", 1, (2, 1), "generate"),
    "last layers that leave positions out, with guidance": ("Gemma4-unified", "eager", "dynamic", "guidance", 1, (1,), "watch"),
    "several captions of rows with several images": ("Idefics3", "flash", "dynamic", "sampled", 3, (1, 0, 3), "generate"),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_way_of_generating_is_recorded_as_a_replay_would(name):
    family, kernel, cache, search, copies, rows, door = WAYS[name]
    combination = Combination(family, "float32", kernel, cache, search, copies, rows, "left", door, "mark", 7)
    outcome = run(combination)
    if outcome is None:
        pytest.skip("the installed transformers does not run it without a guard")
    assert outcome.captions == copies * len(rows)
    assert (outcome.crashes, outcome.refused, outcome.mismatches, outcome.changed, outcome.passes) == ([], [], [], [], [])


@pytest.mark.parametrize("family", ["LLaVA", "Qwen2.5-VL", "PaliGemma"])
@pytest.mark.parametrize("door", ["generate", "custom_generate"])
def test_rows_padded_on_the_right_are_unchecked_by_name_and_the_others_as_alone(family, door):
    """Row 2 is the longest: it has no padding, and its trace is that of a fresh run."""
    outcome = run(Combination(family, "float32", "sdpa", "dynamic", "greedy", 1, (0, 2, 0), "right", door, "mark", 0))
    assert (
        outcome.unchecked
        == ["the prompt is padded on the right, so that the caption continues its padding: padding_side='left'"] * 2
    )
    assert (outcome.captions, outcome.mismatches, outcome.crashes, outcome.refused, outcome.changed) == (1, [], [], [], [])


@pytest.mark.parametrize("name", ["BLIP-2", "InstructBLIP"])
def test_the_first_argument_is_what_the_model_calls_it(name, quietly):
    """In models of BLIP's kind it is the pixels, not the ids."""
    kind = MAKERS[name]()
    inputs = kind.batch([0, 1])
    options = {"max_new_tokens": 4, "do_sample": False}
    guard = guard_of(kind, inputs)
    expected = guard.generate(**inputs, **options)
    pixels = inputs.pop("pixel_values")
    assert torch.equal(guard.generate(pixels, **inputs, **options), expected)
    assert torch.equal(kind.model.generate(pixels, **inputs, **options), expected)
