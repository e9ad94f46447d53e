"""The audit tells a model that uses its image from one that does not, and says what its guard notices."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

from gazeguard.audit import Share, Unguarded, audit_model, page
from gazeguard.cli import app
from gazeguard.detection.metrics import wilson
from gazeguard.errors import InputError
from gazeguard.guard import GazeGuard

SCENES = 8


@pytest.fixture(scope="module")
def audit(lab_vlm):
    return audit_model(GazeGuard(*lab_vlm), SCENES)


def probe(audit, name):
    return next(each for each in audit.probes if each.name == name)


def test_the_lab_model_uses_its_image_and_its_guard_notices(audit):
    assert audit.uses_image
    assert audit.right - audit.right_elsewhere == pytest.approx(audit.lift[0])
    assert "It uses the image" in audit.conclusion
    for name in ("blank image", "wrong image", "swapped colours"):
        assert probe(audit, name).changed.share > 0.8, name
        assert probe(audit, name).noticed.share > 0.6, name
    assert probe(audit, "own image").changed is None
    assert sum(probe(audit, "wrong image").verdicts.values()) == SCENES


def test_a_model_with_shuffled_image_features_is_found_out(lab_vlm):
    """Its words still change with the image, but they do not belong to it."""
    model, processor = copy.deepcopy(lab_vlm[0]), lab_vlm[1]
    order = torch.randperm(model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    connector = next(module for name, module in model.named_modules() if name.endswith("connector"))
    connector.register_forward_hook(lambda *hooked: hooked[-1][..., order])
    audit = audit_model(GazeGuard(model, processor), SCENES)
    assert not audit.uses_image
    assert audit.right < 0.5


def test_a_blind_model_is_called_one(lab_vlm):
    """It writes the same of every image, whether that names anything or not."""
    model, processor = copy.deepcopy(lab_vlm[0]), lab_vlm[1]
    connector = next(module for name, module in model.named_modules() if name.endswith("connector"))
    connector.register_forward_hook(lambda *hooked: torch.zeros_like(hooked[-1]))
    audit = audit_model(Unguarded(model, processor), 4)
    assert not audit.uses_image
    assert audit.conclusion == "It does not use the image: it writes the same caption for all 4 scenes."


def test_a_model_without_gaze_heads_is_audited_by_its_words(lab_vlm, audit):
    """The same words, and so the same shares; nothing is said of a guard that is not there."""
    alone = audit_model(Unguarded(*lab_vlm), SCENES)
    assert alone.uses_image
    assert alone.lift == audit.lift
    assert [each.changed for each in alone.probes] == [each.changed for each in audit.probes]
    assert all(each.noticed is None and not each.verdicts for each in alone.probes)
    assert page(alone).count("<tr>") == 1 + len(alone.probes)


def test_the_page_stands_alone_and_says_every_figure(audit):
    text = page(audit)
    assert text.count("<tr>") == 1 + len(audit.probes)
    assert "data:image/png;base64," in text
    assert "<script" not in text
    assert "http:" not in text.replace("http-equiv", "")
    assert audit.conclusion.replace("&", "&amp;") in text
    share = probe(audit, "blank image").changed
    assert f"({share.events}/{share.trials})" in text


def test_a_share_without_trials_is_none():
    """And Wilson's interval of none in ten and of ten in ten is not a point (values of Newcombe 1998)."""
    assert (Share.count([]).share, Share.count([]).low, Share.count([]).high) == (None, 0, 1)
    assert Share.count([False] * 10).high == pytest.approx(0.2775, abs=1e-3)
    assert Share.count([True] * 10).low == pytest.approx(0.7225, abs=1e-3)
    assert wilson(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_too_few_scenes_are_refused(guard):
    with pytest.raises(InputError, match="needs at least 4"):
        audit_model(guard, 3)


@pytest.mark.slow
def test_the_command_writes_a_page_and_json(tmp_path):
    result = CliRunner().invoke(app, ["audit", "--quick", "--json", "--html", str(tmp_path / "audit.html")])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["uses_image"] is True
    assert "open" in result.stderr
    assert (tmp_path / "audit.html").stat().st_size > 10_000
