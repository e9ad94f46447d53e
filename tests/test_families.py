"""The invariants on every family of vision-language models that transformers has and that can be built here."""

import copy

import pytest
import torch
import transformers
from invariants import BY_PROCESSOR, EXCEPTIONS, FEW_POSITIONS, INVARIANTS, LAYOUTS, MAKERS, OTHERS, run_of, works, write

from gazeguard import _compat
from gazeguard.attention.backbone import Backbone, find_backbone
from gazeguard.attention.families import LogitChange, attention_modules_in_code, logit_changes_in_code, report_unknown_family
from gazeguard.attention.self_test import run_self_test
from gazeguard.attention.visual_keys import visual_key_source
from gazeguard.errors import UnsupportedError
from gazeguard.vision.image_tokens import image_token_id

pytestmark = pytest.mark.usefixtures("quietly")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.__name__)
def test_the_family_keeps_the_invariant(name, invariant):
    if not works(name):
        pytest.skip(f"transformers {transformers.__version__} lacks this class or runs it wrongly")
    if (name, invariant.__name__) in EXCEPTIONS:
        with pytest.raises(AssertionError):  # what is known not to be so is not so
            invariant(name)
    else:
        invariant(name)


@pytest.mark.parametrize("name", FEW_POSITIONS)
def test_gemma_4_differs_by_its_positions_alone(name):
    """The exception from `changes_no_logit`: without the recorder, but at all positions, it computes the recorded bits."""
    kind, inputs, _, made, _ = run_of(name)
    plain = write(kind.model, inputs)
    differences = [float((a - b).abs().max()) for a, b in zip(plain.logits, made.logits, strict=True)]
    assert 0 < differences[0] < 1e-5
    assert differences[1:] == [0] * (len(differences) - 1)
    decoder = kind.model.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda _, args, kw: (args, _compat.with_all_positions(kw)), with_kwargs=True)
    everywhere = write(kind.model, inputs)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(everywhere.logits, made.logits, strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_recorded_is_refused_by_name(name):
    """Encoder-decoders, cross-attention readers, classes with attention of their own, models without an image token."""
    model = OTHERS[name]().model

    def meet() -> None:
        image_token_id(model)
        find_backbone(model)

    with pytest.raises(UnsupportedError, match=type(model).__name__):
        meet()


def test_there_are_sixty_families_and_each_layout_is_declared():
    assert len(MAKERS) >= 60
    assert set(LAYOUTS) == set(MAKERS)
    assert set(BY_PROCESSOR) <= set(MAKERS)


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", MAKERS)
def test_the_tables_are_what_the_code_does(name):
    """Of every family: the declared logit changes and attention classes are those that the code of its classes names."""
    if not works(name):
        pytest.skip(f"transformers {transformers.__version__} lacks this class or runs it wrongly")
    model = run_of(name)[0].model
    backbone, decoder, source = find_backbone(model), model.get_decoder(), visual_key_source(model)
    assert backbone.read_from_code == ()
    keys = {change.key for change in in_force(backbone)}
    in_code = {change.key for change in logit_changes_in_code((model, decoder))}
    assert keys == {key for key in in_code if getattr(backbone.config, key, None) is not None}
    candidates = {
        path: module
        for path, module in decoder.named_modules()
        if hasattr(module, "layer_idx") and (source is None or path.endswith(source.modules))
    }
    assert list(attention_modules_in_code(candidates).values()) == list(backbone.attention.values())


def in_force(backbone: Backbone) -> list[LogitChange]:
    """Its logit changes, without those that its configuration leaves out."""
    return [change for change in backbone.logit_changes if getattr(backbone.config, change.key, None) is not None]


def test_a_family_that_no_table_knows_is_read_from_code(caplog):
    """It is recorded, the log says so once, and the self-test says so."""
    kind, inputs, *_ = run_of("PaliGemma")
    model = copy.deepcopy(kind.model)
    known = find_backbone(model)
    model.config.model_type, model.config.text_config.model_type = "strange", "strange_text"
    report_unknown_family.cache_clear()
    backbones = [find_backbone(model) for _ in range(2)]
    for backbone in backbones:
        assert backbone.read_from_code == ("attention modules", "logit changes")
        assert list(backbone.attention) == list(known.attention)
        assert in_force(backbone) == in_force(known)
    assert [record.name for record in caplog.records] == ["gazeguard"] * 2
    assert "knows the model type 'strange_text'" in caplog.text
    (check, *_) = run_self_test(model, None, inputs)
    assert check.ok
    assert "attention modules and logit changes read from the code of its classes" in check.detail
