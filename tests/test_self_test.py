"""The self-test: a model that is read right is told from one that is not, and is left as it was."""

import copy
import re

import pytest
import torch
from families import IMAGE, family, gemma3, git, llava_mistral
from typer.testing import CliRunner

from gazeguard import lab
from gazeguard.attention.kernels import MASK_RULES
from gazeguard.attention.self_test import run_self_test
from gazeguard.cli import app
from gazeguard.vision.encoding import encode
from gazeguard.vision.grid import ImageGrid

NAMES = (
    "the text decoder's heads are found",
    "every image token has its region",
    "recording changes no logit",
    "the recorder reads what eager attention does",
    "padding changes nothing",
)


def examined(kind, rows=(0,)):
    inputs = kind.batch(rows)
    count = int((inputs["input_ids"][0] == IMAGE).sum())
    return run_self_test(kind.model, None, inputs, known=ImageGrid.regular(1, count, (16, 16)))


@pytest.mark.parametrize(
    "make", [lambda: family("LLaVA"), lambda: family("Qwen3-VL"), lambda: gemma3(12), lambda: llava_mistral(12)]
)
def test_a_model_that_is_read_right_passes(make):
    """Every check passes, with what was measured; the attention implementation is what it was."""
    kind = make()
    before = {type(m).__name__: m.config._attn_implementation for m in kind.model.modules() if hasattr(m, "config")}
    checks = examined(kind)
    assert [check.name for check in checks] == list(NAMES)
    assert all(check.ok for check in checks), "\n".join(map(str, checks))
    assert "logits differ by 0" in checks[2].detail
    assert before == {type(m).__name__: m.config._attn_implementation for m in kind.model.modules() if hasattr(m, "config")}


def test_a_batch_with_padding_is_examined_as_it_is():
    """Rows of different length, as the processor would pad them."""
    kind = family("Idefics3")
    inputs = kind.batch()
    assert not inputs["attention_mask"].all()
    assert all(check.ok for check in run_self_test(kind.model, None, inputs))


def test_scores_that_the_recorder_does_not_know_are_found(monkeypatch):
    """A family that does something unknown to its scores: the recorder's numbers are not the model's, and the check says so."""
    kind = family("LLaVA")
    monkeypatch.setitem(MASK_RULES, "sdpa", lambda call, rows: None)
    inputs = kind.batch()
    checks = {check.name: check for check in run_self_test(kind.model, None, inputs)}
    assert not checks[NAMES[3]].ok
    assert re.search(r"attention differs by 0\.\d", checks[NAMES[3]].detail)
    assert checks[NAMES[2]].ok


def test_a_model_that_padding_moves_is_found():
    """A model that forgets its mask reads its padding."""
    twin = copy.deepcopy(family("LLaVA").model)
    inner = twin.model.language_model
    forward = inner.forward

    def careless(*args, attention_mask=None, **kwargs):
        return forward(*args, **kwargs)

    inner.forward = careless
    kind = copy.copy(family("LLaVA"))
    object.__setattr__(kind, "model", twin)
    checks = {check.name: check for check in examined(kind)}
    assert not checks[NAMES[4]].ok
    assert "padding in front, attention differs by 0." in checks[NAMES[4]].detail


def test_a_model_that_cannot_be_watched_says_why():
    """The first check fails with the reason, and nothing else is tried."""
    checks = run_self_test(git(), None, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    assert [check.ok for check in checks] == [False]
    assert "has no text attention that GazeGuard can record" in checks[0].detail


def test_a_guard_verifies_itself(guard):
    """On the lab's own model, in tokens."""
    sample = lab.samples("test", 1)[0]
    inputs = encode(guard.model, guard.processor, [sample.image], [sample.prompt]).inputs
    checks = guard.self_test(inputs)
    assert all(check.ok for check in checks)
    assert "144 image tokens, 144 with a region, over 100% of the width and 100% of the height" in checks[1].detail


def test_the_command_examines_the_labs_model():
    """Five lines, exit code 0."""
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("works ")] == [
        f"works {name}" for name in NAMES
    ]
