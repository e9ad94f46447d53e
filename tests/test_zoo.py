"""The laws on every family of vision-language models that transformers has and that can be built here."""

import pytest
import transformers
from zoo import BY_PROCESSOR, EXCEPTIONS, LAWS, LAYOUTS, MAKERS, OTHERS, works

from gazeguard.attention.backbone import find_backbone
from gazeguard.errors import UnsupportedError
from gazeguard.vision.image_tokens import image_token_id

pytestmark = pytest.mark.usefixtures("quietly")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_family_keeps_the_law(name, law):
    if not works(name):
        pytest.skip(f"transformers {transformers.__version__} lacks this class or runs it wrongly")
    if (name, law.__name__) in EXCEPTIONS:
        with pytest.raises(AssertionError):  # what is known not to be so is not so
            law(name)
    else:
        law(name)


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_watched_is_refused_by_name(name):
    """Encoder-decoders, cross-attention readers, classes with attention of their own, models without an image token."""
    model = OTHERS[name]().model

    def meet() -> None:
        image_token_id(model)
        find_backbone(model)

    with pytest.raises(UnsupportedError, match=type(model).__name__):
        meet()


def test_there_are_sixty_families_and_each_layout_is_told():
    assert len(MAKERS) >= 60
    assert set(LAYOUTS) == set(MAKERS)
    assert set(BY_PROCESSOR) <= set(MAKERS)
