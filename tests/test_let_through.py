"""What leaves a guard is what its policy lets through: the ids of generate decode to the filtered caption."""

import pytest
import torch
from guardkit import batch_of

from gazeguard.decoding.let_through import LetThrough, let_through
from gazeguard.errors import UnsupportedError
from gazeguard.guard import GazeGuard
from gazeguard.report import Verdict

WAYS = {
    "a batch": {},
    "several captions per prompt": {"num_return_sequences": 2, "do_sample": True},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "a dict": {"return_dict_in_generate": True, "output_scores": True},
    "cut off": {"max_new_tokens": 15},
}


def decoded(guard, output, start):
    ids = output if isinstance(output, torch.Tensor) else output.sequences
    return guard.processor.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)


@pytest.mark.parametrize("policy", ["drop", "abstain"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_ids_decode_to_the_filtered_captions(guard, policy, way):
    withholding = GazeGuard(guard.model, guard.processor, policy)
    inputs = batch_of(guard, **way)
    torch.manual_seed(0)
    output = withholding.generate(**inputs)
    filtered = [report.filtered_caption for report in withholding.reports]
    assert decoded(guard, output, inputs["input_ids"].shape[1]) == filtered
    assert filtered != [report.caption for report in withholding.reports], "the policy has to change something"


def test_captions_that_pass_keep_their_ids(guard):
    """Also through a watch and as a handed loop; the end token stands behind a filtered caption, too."""
    inputs = batch_of(guard)
    plain = guard.model.generate(**inputs)
    start, end = inputs["input_ids"].shape[1], guard.model.generation_config.eos_token_id
    withholding = GazeGuard(guard.model, guard.processor, "abstain")
    ids = withholding.generate(**inputs)
    passed = [report.verdict is Verdict.PASS for report in withholding.reports]
    assert set(passed) == {True, False}
    for row, before, kept, report in zip(ids.tolist(), plain.tolist(), passed, withholding.reports, strict=True):
        assert row[start:] == (before[start : len(row)] if kept else ([end] * report.trace.finished + row[start + 1 :]))
    with withholding.watch():
        assert torch.equal(guard.model.generate(**inputs), ids)
    assert torch.equal(guard.model.generate(**inputs, custom_generate=withholding), ids)


def test_a_tokenizer_that_cannot_write_the_filtered_caption_is_refused(guard):
    """Nothing that the policy took out may come back by the way of the ids."""

    class Lowering:
        is_fast, all_special_ids = False, ()

        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text.lower()]}

        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    captions = [LetThrough("A red star and a moon.", "A red star.", True)]
    with pytest.raises(UnsupportedError, match=r"writes the filtered caption 'A red star.' as 'a red star.'.*on_flag: keep"):
        let_through(torch.zeros(1, 4, dtype=torch.long), 2, captions, guard.model.generation_config, Lowering())
