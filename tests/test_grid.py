"""Does every image token get the location that the processor really cut it from?"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from families import Family
from families.tiles import VIDEO
from hypothesis import given
from hypothesis import strategies as st
from invariants import MAKERS, works
from labkit import processor
from PIL import Image
from transformers import (
    AddedToken,
    FuyuProcessor,
    Idefics3Processor,
    Lfm2VlProcessor,
    Llama4Processor,
    LlavaProcessor,
    MiniCPMV4_6Processor,
    Molmo2Processor,
    Ovis2Processor,
    PreTrainedTokenizerBase,
    Step3p7Processor,
)
from transformers.image_utils import SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.granite4_vision.modeling_granite4_vision import Granite4VisionModel
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.pp_chart2table.image_processing_pil_pp_chart2table import PPChart2TableImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.step3p7.image_processing_step3p7 import Step3p7ImageProcessor

from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.visual_keys import visual_keys
from gazeguard.errors import InputError, UnsupportedError
from gazeguard.lab.training.tiny_model import IMAGE, build_processor
from gazeguard.lab.world import PAGE, PATCH, PATCHES
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.image_tokens import image_token_runs
from gazeguard.vision.layouts.prompt import Prompt
from gazeguard.vision.layouts.rules import RULES, find_grid
from gazeguard.vision.layouts.squares import NO_SQUARE

SIZES = st.tuples(st.integers(24, 900), st.integers(24, 900))
SIDES = st.integers(1, 12)
SEGMENTS = st.floats(0, 1, allow_subnormal=False)


# ------------------------------------------------------------------------------------------------------- geometry


@given(SIDES, SIDES, SIZES)
def test_the_page_holds_every_token_and_tokens_do_not_overlap(rows, columns, size):
    """overlap(page) is 1 for each token; overlap(pixels(c)) is 1 for c and 0 for every other token."""
    grid = ImageGrid.regular(rows, columns, size)
    assert len(grid) == rows * columns
    np.testing.assert_allclose(grid.overlap((0, 0, *size)), 1, atol=1e-3)
    for cell in (0, len(grid) // 2, len(grid) - 1):
        np.testing.assert_allclose(grid.overlap(grid.pixels(cell)), np.arange(len(grid)) == cell, atol=1e-3)


@given(SIDES, SIDES, SIZES, st.lists(SEGMENTS, max_size=4), st.lists(SEGMENTS, max_size=4))
def test_a_partition_of_the_page_is_a_partition_of_each_token(rows, columns, size, xs, ys):
    """However the page is cut into boxes, the shares of an image token add up to 1, and none is outside [0, 1]."""
    grid = ImageGrid.regular(rows, columns, size)
    xs, ys = ([0, *sorted(n * cut for cut in cuts), n] for cuts, n in zip((xs, ys), size, strict=True))
    shares = [grid.overlap((x0, y0, x1, y1)) for x0, x1 in pairwise(xs) for y0, y1 in pairwise(ys)]
    assert all(((share >= 0) & (share <= 1.001)).all() for share in shares)
    np.testing.assert_allclose(sum(shares), 1, atol=2e-3)


def test_tokens_run_row_by_row_in_reading_order():
    grid = ImageGrid.regular(2, 3, (90, 40))
    np.testing.assert_allclose([grid.pixels(cell)[:2] for cell in (0, 2, 3)], [(0, 0), (60, 0), (0, 20)], atol=1e-4)


def test_a_token_without_a_location_lies_in_no_box_and_other_images_do_not_count():
    boxes = np.array([[0, 0, 1, 1], [np.nan] * 4, [0, 0, 1, 1]], np.float32)
    grid = ImageGrid(boxes, np.array([0, 0, 1]), ((10, 10), (20, 20)))
    assert grid.overlap((0, 0, 10, 10)).tolist() == [1, 0, 0]
    assert grid.overlap((0, 0, 10, 10), image=1).tolist() == [0, 0, 0.25]


def test_a_grid_that_does_not_fit_together_is_refused():
    with pytest.raises(
        InputError, match=r"one box per image token: boxes have shape \(3, 4\) for 2 image tokens. Pass boxes of shape"
    ):
        ImageGrid(np.zeros((3, 4), np.float32), np.zeros(2, np.int64), ((8, 8),))
    with pytest.raises(InputError, match=r"tokens of images 0 to 1, but the sizes of 1. Pass the \(width, height\)"):
        ImageGrid(np.zeros((2, 4), np.float32), np.array([0, 1]), ((8, 8),))


@given(SIDES, SIDES, SIZES)
def test_a_regular_grid_has_a_shape(rows, columns, size):
    """Rows and columns are those that the grid was made of, also of a crop; the repr is one line."""
    for view in ((0.0, 0.0, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0)):
        grid = ImageGrid.regular(rows, columns, size, view)
        assert grid.shape == (rows, columns)
        assert repr(grid) == f"ImageGrid({rows} x {columns} image tokens, image {size[0]} x {size[1]})"


def test_what_is_no_regular_grid_has_no_shape():
    """Two views of one image, two images, a token without a location, a row that is short, no token at all."""
    grid = ImageGrid.regular(2, 3, (30, 20))
    views = ImageGrid(np.tile(grid.boxes, (2, 1)), np.zeros(12, np.int64), ((30, 20),))
    images = ImageGrid(views.boxes, np.repeat((0, 1), 6), ((30, 20), (9, 9)))
    newline = ImageGrid(np.concatenate((grid.boxes, np.full((1, 4), np.nan, np.float32))), np.zeros(7, np.int64), ((30, 20),))
    short = ImageGrid(grid.boxes[:5], np.zeros(5, np.int64), ((30, 20),))
    nothing = ImageGrid(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), ((30, 20),))
    assert [made.shape for made in (views, images, newline, short, nothing)] == [None] * 5
    assert repr(views) == "ImageGrid(12 image tokens, image 30 x 20)"
    assert repr(images) == "ImageGrid(12 image tokens, 2 images)"


def test_every_family_is_named_by_one_rule_at_most_that_stands_before_squares():
    """The table of layout rules: no family twice, but for those with a square and something else by processor."""
    names = [name for rule in RULES[:-1] for name in rule.families]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"idefics"}, "its resampler is an option"
    assert not set(NO_SQUARE) & set(RULES[-1].families)
    assert all(rule.others or not rule.never for rule in RULES)


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_unbroken_complete_and_as_long_as_can_be(mask):
    """The runs, laid out again, are the mask; between two runs lies at least one other token."""
    runs = image_token_runs(np.where(mask, 7, 1), 7)
    again = np.zeros(len(mask), bool)
    for start, length in runs:
        again[start : start + length] = True
    assert again.tolist() == mask
    assert all(a + length < b for (a, length), (b, _) in pairwise(runs))


# ------------------------------------------------------------------- rules, tested on what the processor really cut


def prompt_of(made, sizes, used, token: int, merge: int = 1) -> Prompt:
    ids = made["input_ids"][0].numpy()
    vision = SimpleNamespace(spatial_merge_size=merge)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, model_type="any"))
    return Prompt(ids, image_token_runs(ids, token), dict(made), tuple(sizes), model, used)


def lit(size: tuple[int, int], box: tuple[float, ...]) -> Image.Image:
    """A black image with the middle half of ``box`` in white."""
    x0, y0, x1, y1 = box
    dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), tuple(map(round, (x0 + dx, y0 + dy, x1 - dx, y1 - dy))))
    return image


def patches(frames: torch.Tensor, patch: int) -> np.ndarray:
    """Mean brightness of each patch of frames (n, 3, height, width), frame by frame, row by row."""
    return torch.nn.functional.avg_pool2d(frames.mean(1), patch).flatten().numpy()


def check_tokens(grid: ImageGrid, size, brightness, views: list[slice]) -> None:
    """In each view of the image: a square drawn into an image token's box makes that very token the brightest of the view."""
    for view in views:
        cells = range(len(grid))[view]
        for cell in {cells[0], cells[5], cells[len(cells) // 2 + 1], cells[-6], cells[-1]}:
            assert int(np.argmax(brightness(lit(size, grid.pixels(cell)))[view])) == cell - cells[0]


@pytest.mark.parametrize("size", [(144, 144), (200, 90), (60, 300)])
def test_lab_layout(size):
    """One view: the page is stretched to a square."""
    used = processor()
    token = used.tokenizer.convert_tokens_to_ids(IMAGE)

    def run(image):
        return used(images=[[image]], text=["<image>what"], return_tensors="pt")

    grid = find_grid(prompt_of(run(Image.new("RGB", size)), [size], used, token))
    assert grid.sizes == (size,)
    check_tokens(grid, size, lambda image: patches(run(image)["pixel_values"][0], PATCH), [slice(0, PATCHES**2)])


@pytest.fixture(scope="module")
def tiling() -> Idefics3Processor:
    """The lab's processor as SmolVLM has it: a large image is cut into tiles of a page each."""
    used = build_processor()
    tags = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    used.tokenizer.add_tokens([AddedToken(tag, special=True) for tag in tags])
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 3 * PAGE}, max_image_size={"longest_edge": PAGE}, do_image_splitting=True
    )
    return Idefics3Processor(images, used.tokenizer, image_seq_len=PATCHES**2)


@pytest.mark.parametrize(("size", "tiles"), [((432, 288), 6), ((300, 500), 6), ((400, 100), 3), ((120, 120), 9)])
def test_tiles_and_thumbnail(tiling, size, tiles):
    """Each tile's tokens lie in the tile; the thumbnail's tokens, last, cover the whole image once more."""
    token = tiling.tokenizer.convert_tokens_to_ids(IMAGE)

    def run(image):
        return tiling(images=[[image]], text=["<image>what"], return_tensors="pt")

    grid = find_grid(prompt_of(run(Image.new("RGB", size)), [size], tiling, token))
    each = PATCHES**2
    assert len(grid) == (tiles + 1) * each
    views = [slice(0, tiles * each), slice(tiles * each, (tiles + 1) * each)]
    for view in views:
        box_areas = np.prod(grid.boxes[view, 2:] - grid.boxes[view, :2], axis=1)
        assert box_areas.sum() == pytest.approx(1, abs=1e-4)
    check_tokens(grid, size, lambda image: patches(run(image)["pixel_values"][0], PATCH), views)


def test_tiles_of_two_images(tiling):
    """The second image's tiles are its own: a square in it lights a token of image 1 whose box holds the square."""
    token = tiling.tokenizer.convert_tokens_to_ids(IMAGE)
    size, box = (432, 288), (96.0, 204.0, 108.0, 216.0)
    originals = [Image.new("RGB", size), lit(size, box)]
    made = tiling(images=[originals], text=["<image>this<image>that"], return_tensors="pt")
    grid = find_grid(prompt_of(made, [size, size], tiling, token))
    brightest = int(np.argmax(patches(made["pixel_values"][0], PATCH)))
    assert grid.image[brightest] == 1
    assert grid.pixels(brightest) == pytest.approx(box, abs=0.01)


@pytest.mark.parametrize("size", [(84, 84), (300, 200), (150, 400), (600, 100)])
def test_centre_crop(size):
    """LLaVA: the short edge is resized and the middle cut out; the boxes are those of what is left."""
    images = CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
    used = LlavaProcessor(images, processor().tokenizer, patch_size=14, vision_feature_select_strategy="full")
    token = used.tokenizer.convert_tokens_to_ids(IMAGE)

    def run(image):
        return used(images=[image], text=["<image>what"], return_tensors="pt")

    grid = find_grid(prompt_of(run(Image.new("RGB", size)), [size], used, token))
    assert len(grid) == 36
    left, top = grid.pixels(0)[:2]
    right, bottom = grid.pixels(35)[2:]
    assert (right - left, bottom - top) == pytest.approx((min(size), min(size)), rel=0.02)
    check_tokens(grid, size, lambda image: patches(run(image)["pixel_values"], 14), [slice(0, 36)])


PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]


@pytest.mark.parametrize("size", [(96, 48), (300, 200), (90, 400), (100, 97), (31, 190)])
@pytest.mark.parametrize("family", ["next", "onevision", "onevision, shrunk", "granite"])
def test_any_resolution(size, family):
    """The processor's real tiles, packed by the model's own function: a square lights the token whose box holds it."""
    next_one = family in ("next", "granite")
    edge = 8 if family == "granite" else 4  # of a token in pixels
    base = (48 // edge) ** 2
    kind = LlavaNextImageProcessorPil if next_one else LlavaOnevisionImageProcessorPil
    edges = {"shortest_edge": 48} if next_one else {"height": 48, "width": 48}
    crop = {"crop_size": {"height": 48, "width": 48}} if next_one else {}
    used = kind(size=edges, image_grid_pinpoints=PINPOINTS, resample=2, **crop)
    vision = SimpleNamespace(image_size=48, patch_size=4)
    most = {
        "next": {},
        "granite": {"downsample_rate": "1/2"},
        "onevision": {"vision_aspect_ratio": "anyres_max_9"},
        "onevision, shrunk": {"vision_aspect_ratio": "anyres_max_1"},
    }[family]
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS, model_type="llava", **most)
    model, newline = SimpleNamespace(config=config, layerwise_projectors=(), downsample_rate="1/2"), torch.full((1,), -1e9)

    def packed(image):
        made = used(images=[image], return_tensors="pt")
        tiles = torch.from_numpy(patches(made["pixel_values"][0], edge)).reshape(-1, base, 1)
        if family == "granite":
            features = Granite4VisionModel.pack_image_features(model, [tiles], made["image_sizes"], "default", newline)
        elif next_one:
            features, _ = LlavaNextModel.pack_image_features(model, [tiles], made["image_sizes"], "default", newline)
        else:
            ratio = most["vision_aspect_ratio"]
            features, _ = LlavaOnevisionModel.pack_image_features(model, [tiles], made["image_sizes"], newline, ratio)
        return made, features[0][:, 0].numpy()

    made, features = packed(Image.new("RGB", size))
    made["input_ids"] = torch.tensor([[1, *[7] * len(features), 1]])
    prompt = prompt_of(made, [size], None, 7)
    grid = find_grid(replace(prompt, model=model))
    newlines = features < -1e8
    np.testing.assert_array_equal(np.isnan(grid.boxes[:, 0]), newlines)
    assert newlines.sum() > 0
    real = np.flatnonzero(~newlines)
    for view in (real[:base], real[base:]):
        width = grid.boxes[view, 2] - grid.boxes[view, 0]
        height = grid.boxes[view, 3] - grid.boxes[view, 1]
        assert (width * height).sum() == pytest.approx(1, abs=0.04 if edge == 4 else 0.34), "unpadding may cut a line, too"
        for cell in view[[3, len(view) // 3, len(view) // 2 + 1, -4]]:
            x0, y0, x1, y1 = grid.pixels(cell)
            original = lit(size, (x0 - (x1 - x0) / 3, y0 - (y1 - y0) / 3, x1 + (x1 - x0) / 3, y1 + (y1 - y0) / 3))
            values = packed(original)[1][view]
            assert values[list(view).index(cell)] >= values.max() - 0.25 * abs(values.max() - values.min())
            assert abs(int(view[values.argmax()]) - cell) <= 1


def test_several_images_of_onevision_have_no_finer_map():
    """Each is one square and one newline."""
    vision = SimpleNamespace(image_size=48, patch_size=4)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS, model_type="llava_onevision")
    made = {"input_ids": torch.tensor([[1, *[7] * 290, 1]]), "image_sizes": torch.tensor([[50, 60], [70, 80]])}
    grid = find_grid(replace(prompt_of(made, [(60, 50), (80, 70)], None, 7), model=SimpleNamespace(config=config)))
    assert np.flatnonzero(np.isnan(grid.boxes[:, 0])).tolist() == [144, 289]
    assert np.bincount(grid.image).tolist() == [145, 145]


@pytest.mark.parametrize("size", [(112, 112), (300, 200), (90, 400)])
def test_images_in_their_own_size(size):
    """Pixtral: ``image_sizes`` in pixels after the resize; a token is two by two patches."""
    used = PixtralImageProcessorPil(size={"longest_edge": 224}, patch_size={"height": 28, "width": 28})
    made = used(images=[Image.new("RGB", size)], return_tensors="pt")
    height, width = made["image_sizes"][0].tolist()
    row = [*[7] * (width // 28), 8]
    made["input_ids"] = torch.tensor([[1, *row * (height // 28), 1]])
    prompt = prompt_of(made, [size], None, 7)
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14), spatial_merge_size=2, model_type="mistral3")
    grid = find_grid(replace(prompt, model=SimpleNamespace(config=config)))
    np.testing.assert_allclose(grid.overlap((0, 0, *size)), 1, atol=1e-3)

    def brightness(image):
        return patches(used(images=[image], return_tensors="pt")["pixel_values"], 28)

    check_tokens(grid, size, brightness, [slice(0, len(grid))])


@pytest.mark.parametrize(("size", "tiles"), [((100, 100), 1), ((300, 200), 6), ((90, 400), 5), ((56, 150), 3)])
def test_tiles_of_a_canvas(size, tiles):
    """InternVL and its relatives: tiles of the canvas that the image processor chose, the whole image last."""
    used = GotOcr2ImageProcessorPil(
        size={"height": 48, "width": 48}, crop_to_patches=tiles > 1, min_patches=1, max_patches=6, do_center_crop=False
    )

    def run(image):
        return used(images=[image], return_tensors="pt")["pixel_values"]

    count = len(run(Image.new("RGB", size)))
    made = {"input_ids": torch.tensor([[1, *[7] * (count * 144), 1]])}
    prompt = prompt_of(made, [size], SimpleNamespace(image_processor=used), 7)
    grid = find_grid(prompt)
    assert len(grid) == (tiles + (tiles > 1)) * 144
    views = [slice(0, tiles * 144)] + ([slice(tiles * 144, (tiles + 1) * 144)] if tiles > 1 else [])
    check_tokens(grid, size, lambda image: patches(run(image), 4), views)


def test_a_canvas_needs_the_images_own_size():
    """Without it the number of tiles does not fit, and the message says what to pass."""
    used = GotOcr2ImageProcessorPil(size={"height": 48, "width": 48}, crop_to_patches=True, min_patches=1, max_patches=6)
    made = {"input_ids": torch.tensor([[1, *[7] * (7 * 144), 1]])}
    with pytest.raises(UnsupportedError, match=r"original sizes\. Pass picture_sizes= to generate, or grid="):
        find_grid(prompt_of(made, [(48, 48)], SimpleNamespace(image_processor=used), 7))


def test_a_square_number_of_tokens_need_not_be_a_square():
    """Four tiles of 64 tokens are 256 tokens, too: a model that may have them is refused, not guessed at."""
    made = {"input_ids": torch.tensor([[1, *[7] * 256, 1]])}
    prompt = prompt_of(made, [(40, 30)], None, 7)
    assert len(find_grid(prompt)) == 256
    config = SimpleNamespace(model_type="internvl", vision_config=SimpleNamespace())
    with pytest.raises(UnsupportedError, match=r"No layout rule says where .* or grid=ImageGrid"):
        find_grid(replace(prompt, model=SimpleNamespace(config=config)))


def test_tiles_are_not_taken_for_images():
    """Without the images' own sizes nobody knows how many tiles each has: refused, with what to pass."""
    used = GotOcr2ImageProcessorPil(size={"height": 48, "width": 48}, crop_to_patches=True, min_patches=1, max_patches=6)
    tiles = [token for _ in range(3) for token in (*[7] * 144, 8)]
    prompt = prompt_of({"input_ids": torch.tensor([[1, *tiles]])}, [(48, 48)] * 3, SimpleNamespace(image_processor=used), 7)
    config = SimpleNamespace(model_type="aya_vision", vision_config=SimpleNamespace())
    with pytest.raises(UnsupportedError, match="Pass picture_sizes= to generate"):
        find_grid(replace(prompt, model=SimpleNamespace(config=config), original_sizes=False))


def test_a_page_without_tiles():
    """PP-Chart2Table has the model of GOT-OCR2, and an image processor that never cuts tiles."""
    used, size = PPChart2TableImageProcessorPil(size={"height": 64, "width": 64}), (100, 70)
    made = {"input_ids": torch.tensor([[1, *[7] * 64, 1]])}
    prompt = prompt_of(made, [size], SimpleNamespace(image_processor=used), 7)
    grid = find_grid(replace(prompt, model=model_of("pp_chart2table")))
    check_tokens(
        grid, size, lambda image: patches(used(images=[image], return_tensors="pt")["pixel_values"], 8), [slice(0, 64)]
    )


def test_answers_of_a_resampler_have_no_location():
    """The tokens of a Q-Former or perceiver have seen everything; no box holds any of them."""
    made = {"input_ids": torch.tensor([[1, *[7] * 32, 1]])}
    config = SimpleNamespace(model_type="blip-2")
    grid = find_grid(replace(prompt_of(made, [(40, 30)], None, 7), model=SimpleNamespace(config=config)))
    assert len(grid) == 32
    assert np.isnan(grid.boxes).all()
    assert not grid.overlap((0, 0, 40, 30)).any()


@pytest.mark.parametrize("size", [(300, 200), (90, 400)])
def test_patches_merged_two_by_two(size):
    """Qwen-VL: ``image_grid_thw`` counts patches; a token is two by two of them, which come next to each other."""
    used = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=28**2 * 16, max_pixels=28**2 * 100)
    made = used(images=[Image.new("RGB", size)], return_tensors="pt")
    count = len(made["pixel_values"]) // 4
    made["input_ids"] = torch.tensor([[1, *[7] * count, 1]])
    grid = find_grid(prompt_of(made, [size], None, 7, merge=2))
    np.testing.assert_allclose(grid.overlap((0, 0, *size)), 1, atol=1e-3)

    def brightness(image):
        return used(images=[image], return_tensors="pt")["pixel_values"].mean(1).reshape(-1, 4).mean(1).numpy()

    check_tokens(grid, size, brightness, [slice(0, count)])


def test_two_grids_in_one_prompt():
    """Tokens belong to their images in order, each with its own number of rows and columns."""
    made = {"input_ids": torch.tensor([[7] * 6 + [1] + [7] * 4]), "image_grid_thw": [[1, 4, 6], [1, 4, 4]]}
    grid = find_grid(prompt_of(made, [(60, 40), (40, 40)], None, 7, merge=2))
    assert grid.image.tolist() == [0] * 6 + [1] * 4
    assert grid.pixels(5) == pytest.approx((40, 20, 60, 40))
    assert grid.pixels(9) == pytest.approx((20, 20, 40, 40))


def test_an_unknown_layout_says_what_was_found_and_what_to_do():
    made = {"input_ids": torch.tensor([[1, 7, 7, 7, 1, 7, 7]])}
    prompt = prompt_of(made, [(8, 8)], SimpleNamespace(tokenizer=processor().tokenizer), 7)
    with pytest.raises(UnsupportedError) as caught:
        find_grid(prompt)
    assert str(caught.value) == (
        "No layout rule says where the 5 image tokens of SimpleNamespace lie in the image (runs of 3, 2 tokens for 1 images). "
        "Pass picture_sizes= to generate if the images' original sizes are missing, or grid=ImageGrid(...) with one box per "
        "image token."
    )


def test_a_layout_that_does_not_add_up_is_refused():
    made = {"input_ids": torch.tensor([[7] * 5]), "image_grid_thw": [[1, 4, 4]]}
    with pytest.raises(
        UnsupportedError, match=r"has 5 image tokens, but the layout rule patch_grids expects 4: SimpleNamespace .* or grid="
    ):
        find_grid(prompt_of(made, [(8, 8)], None, 7, merge=2))


@pytest.mark.parametrize("size", [(300, 200), (90, 400)])
def test_patches_that_tell_their_locations(size):
    """Gemma 4: patches come padded to one length with their (x, y); three by three of them are a token."""
    used = Gemma4ImageProcessorPil(max_soft_tokens=70)
    made = used(images=[Image.new("RGB", size), Image.new("RGB", size[::-1])], return_tensors="pt")
    counts = made["num_soft_tokens_per_image"].tolist()
    made["input_ids"] = torch.tensor([[1, *[7] * counts[0], 1, *[7] * counts[1]]])
    config = SimpleNamespace(vision_config=SimpleNamespace(pooling_kernel_size=3), model_type="gemma4")
    prompt = replace(prompt_of(made, [size, size[::-1]], None, 7), model=SimpleNamespace(config=config))
    grid = find_grid(prompt)
    assert np.bincount(grid.image).tolist() == counts
    for number in range(2):
        own = grid.image == number
        np.testing.assert_allclose(grid.overlap((0, 0, *grid.sizes[number]), number)[own], 1, atol=1e-3)
    columns = int(made["image_position_ids"][0, :, 0].max() + 1) // 3

    def brightness(image):
        seen = used(images=[image], return_tensors="pt")
        places, bright = seen["image_position_ids"][0], seen["pixel_values"][0].mean(1)
        real = places[:, 0] >= 0
        cell = places[real, 0] // 3 + columns * (places[real, 1] // 3)
        return torch.zeros(counts[0]).index_add(0, cell, bright[real]).numpy()

    check_tokens(grid, size, brightness, [slice(0, counts[0])])


@pytest.mark.parametrize("size", [(300, 200), (90, 400)])
def test_codes_with_a_token_after_each_row(size):
    """Emu3: the last token of each row ends it and has no location."""
    used = Emu3ImageProcessor(min_pixels=64 * 64, max_pixels=128 * 128, spatial_factor=8)
    made = used(images=[Image.new("RGB", size)], return_tensors="pt")
    height, width = (edge // 8 for edge in made["image_sizes"][0].tolist())
    made["input_ids"] = torch.tensor([[1, *[7] * (height * (width + 1)), 1]])
    config = SimpleNamespace(vq_config=SimpleNamespace(channel_multiplier=[1, 2, 2, 4]), model_type="emu3")
    grid = find_grid(replace(prompt_of(made, [size], None, 7), model=SimpleNamespace(config=config)))
    ends = np.arange(len(grid)) % (width + 1) == width
    assert (np.isnan(grid.boxes).all(axis=1) == ends).all()
    np.testing.assert_allclose(grid.overlap((0, 0, *size)), ~ends, atol=1e-3)

    def brightness(image):
        pixels = used(images=[image], return_tensors="pt")["pixel_values"].reshape(1, 3, height * 8, width * 8)
        return patches(pixels, 8)

    places = replace(grid, boxes=grid.boxes[~ends], image=grid.image[~ends])
    check_tokens(places, size, brightness, [slice(0, len(places))])


@functools.cache
def untaught() -> PreTrainedTokenizerBase:
    return build_processor().tokenizer


def taught(tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """The lab's tokenizer with some more tokens."""
    tokenizer = copy.deepcopy(untaught())
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


@pytest.mark.parametrize("size", [(40, 40), (140, 90), (90, 200), (1200, 240)])
def test_tiles_with_tokens_between_them(size):
    """Ovis2: the whole image first, then tiles; the second image's tokens are its own."""
    images = Ovis2ImageProcessorPil(size={"height": 48, "width": 48}, crop_to_patches=True, max_patches=9)
    marks = ["<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    used = Ovis2Processor(images, taught(marks), image_seq_length=144)
    token = used.tokenizer.convert_tokens_to_ids("<IMG_ATOM>")
    model = SimpleNamespace(config=SimpleNamespace(model_type="ovis2", vision_config=SimpleNamespace()))
    originals = [Image.new("RGB", size), Image.new("RGB", (40, 40))]
    made = used(images=originals, text=["<image>this<image>that"], return_tensors="pt")
    grid = find_grid(replace(prompt_of(made, [size, (40, 40)], used, token), model=model))
    tiles = int(images(images=originals, return_tensors="pt")["grids"][0].prod())  # as the image processor cut it
    tiles = 0 if tiles == 1 else tiles
    assert np.bincount(grid.image).tolist() == [(1 + tiles) * 144, 144]

    def brightness(image):
        return patches(images(images=[image], return_tensors="pt")["pixel_values"].flatten(0, -4), 4)

    views = [slice(0, 144), *([slice(144, (tiles + 1) * 144)] if tiles else [])]
    for view in views:
        np.testing.assert_allclose(np.prod(grid.boxes[view, 2:] - grid.boxes[view, :2], axis=1).sum(), 1, atol=1e-3)
        for cell in range(view.start, view.stop, 13):
            assert int(np.argmax(brightness(lit(size, grid.pixels(cell)))[view])) == cell - view.start


@pytest.mark.parametrize(("size", "tiles"), [((60, 48), (1, 2)), ((48, 24), (1, 1)), ((90, 70), (2, 2)), ((30, 140), (3, 1))])
def test_tiles_from_the_corner_with_tokens_between_them(size, tiles):
    """Llama 4: tiles of a canvas that the image need not fill, then the whole image, stretched; one tile is padded, too.

    Its image processor needs torchvision, so the image is laid onto the canvas here as that does it.
    """
    images = SimpleNamespace(resize_to_max_canvas=False)
    tokens = ("<|image_start|>", "<|image|>", "<|patch|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
    tokenizer = taught(tokens)
    text = Llama4Processor._prompt_split_image(None, tiles, 144)
    ids = tokenizer(text + "what" + text, return_tensors="pt")
    used = SimpleNamespace(tokenizer=tokenizer, image_processor=images)
    config = SimpleNamespace(model_type="llama4", vision_config=SimpleNamespace(image_size=48))
    prompt = prompt_of(ids, [size, size], used, tokenizer.convert_tokens_to_ids("<|patch|>"))
    prompt = replace(prompt, model=SimpleNamespace(config=config))
    grid = find_grid(prompt)
    rows, columns = tiles
    count = rows * columns
    each = (count + (count > 1)) * 144
    assert np.bincount(grid.image).tolist() == [each, each]
    np.testing.assert_array_equal(grid.boxes[:each], grid.boxes[each:])

    most = [min(max(own, 48), edge) for own, edge in zip(size, (columns * 48, rows * 48), strict=True)]
    scale = min(edge / own for own, edge in zip(size, most, strict=True))

    def brightness(image):
        canvas = Image.new("RGB", (columns * 48, rows * 48))
        canvas.paste(image.resize(tuple(int(own * scale + 1e-9) for own in size)), (0, 0))
        views = [canvas.crop((x * 48, y * 48, x * 48 + 48, y * 48 + 48)) for y in range(rows) for x in range(columns)]
        views += [image.resize((48, 48))] if count > 1 else []
        return patches(torch.tensor(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2).float(), 4)

    for view in [slice(0, count * 144), *([slice(count * 144, each)] if count > 1 else [])]:
        whole = np.nan_to_num(np.prod(grid.boxes[view, 2:] - grid.boxes[view, :2], axis=1)).sum()
        assert whole == pytest.approx(1, abs=1e-3)
        sizes = grid.boxes[view, 2:] - grid.boxes[view, :2]
        full = (sizes > 0.7 * np.nanmax(sizes, axis=0)).all(axis=1)  # not those that hold but a sliver of the image
        for cell in (np.flatnonzero(full) + view.start)[::7]:
            assert int(np.argmax(brightness(lit(size, grid.pixels(cell)))[view])) == cell - view.start
    with pytest.raises(UnsupportedError, match="Pass picture_sizes= to generate"):
        find_grid(replace(prompt, original_sizes=False))


@pytest.mark.parametrize("size", [(100, 70), (300, 200), (45, 180)])
def test_a_run_for_each_row(size):
    """Fuyu: a newline after each row of patches; the last row and column hold what is left of the image."""
    images = FuyuImageProcessorPil(size={"height": 120, "width": 180}, patch_size={"height": 15, "width": 15})
    tokenizer = taught(["|NEWLINE|", "|SPEAKER|", "<s>"])
    used = FuyuProcessor(images, tokenizer)
    model = SimpleNamespace(config=SimpleNamespace(model_type="fuyu"))

    def run(image):
        """What FuyuProcessor._process_images cuts; it does not run itself on what this image processor makes."""
        made = images(images=[[image]])
        kept = (made["image_unpadded_heights"][0][0], made["image_unpadded_widths"][0][0])
        rows, columns = (-(-edge // 15) for edge in kept)
        return np.asarray(made["images"][0][0])[:, : rows * 15, : columns * 15]

    _, height, width = run(Image.new("RGB", size)).shape
    text = used.replace_image_token({}, 0, num_patches=height * width // 225, row_width=width // 15)
    ids = tokenizer([text], return_tensors="pt", add_special_tokens=False)
    prompt = replace(prompt_of(ids, [size], used, tokenizer.convert_tokens_to_ids("|SPEAKER|")), model=model)
    grid = find_grid(prompt)
    assert len(prompt.runs) > 1
    areas = np.prod(grid.boxes[:, 2:] - grid.boxes[:, :2], axis=1)
    assert areas.sum() == pytest.approx(1, abs=1e-3)

    def brightness(image):
        return images.patchify_image(run(image)).mean(-1)

    for cell in np.flatnonzero(areas > 0.5 * areas.max()):  # the last row and column may hold but a sliver
        assert int(np.argmax(brightness(lit(size, grid.pixels(cell))))) == cell
    with pytest.raises(UnsupportedError, match="Pass picture_sizes= to generate"):
        find_grid(replace(prompt, original_sizes=False))


def ids_of(tokenizer: PreTrainedTokenizerBase, *parts: str) -> dict[str, torch.Tensor]:
    return tokenizer(["".join(parts)], return_tensors="pt", add_special_tokens=False)


def model_of(kind: str, **config: object) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(model_type=kind, vision_config=SimpleNamespace(), **config))


def areas(grid: ImageGrid, view: slice = slice(None)) -> np.ndarray:
    """The shares of the image that tokens cover, 0 for those without a location."""
    return np.nan_to_num(np.prod(grid.boxes[view, 2:] - grid.boxes[view, :2], axis=1))


def check_some(grid: ImageGrid, size, brightness, view: slice) -> None:
    """As `check_tokens`, for seven tokens all over a view, slivers at the edge of the image aside."""
    cells = np.flatnonzero(areas(grid, view) > 0.5 * areas(grid, view).max()) + view.start
    for cell in cells[np.linspace(0, len(cells) - 1, 7).round().astype(int)]:
        assert int(np.nanargmax(brightness(lit(size, grid.pixels(cell)))[view])) == cell - view.start


def cropped(image: Image.Image, rows: int, columns: int, edge: int) -> np.ndarray:
    """The mean brightness of each 4 x 4 patch of each tile of ``edge`` pixels, after an image filled the canvas of tiles."""
    canvas = np.asarray(image.resize((columns * edge, rows * edge)), np.float32)
    tiles = [canvas[y : y + edge, x : x + edge] for y in range(0, rows * edge, edge) for x in range(0, columns * edge, edge)]
    return patches(torch.tensor(np.stack(tiles)).permute(0, 3, 1, 2), 4)


LFM2 = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
LFM2 += [f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)]


@pytest.mark.parametrize(("size", "tiles"), [((200, 120), (1, 1)), ((300, 200), (2, 3)), ((90, 270), (3, 1))])
@pytest.mark.parametrize("overview", [True, False])
def test_tagged_tiles_of_any_shape(size, tiles, overview):
    """Lfm2-VL: the whole image keeps its shape, and may be left out beside tiles. Two images, one of them without tiles.

    Its image processor needs torchvision, so the image is cut here as that does it; the tags are the processor's own.
    """
    tokenizer = taught(LFM2)
    rows, columns = tiles
    shapes = [(12, 12)] * (rows * columns if rows * columns > 1 else 0) + [(8, 16)] * (overview or rows * columns == 1)

    def text(rows, columns):
        return Lfm2VlProcessor._build_image_tokens(SimpleNamespace(**NAMES), rows, columns, 36, 32, overview, True)

    made = ids_of(tokenizer, "one", text(rows, columns), "two", text(1, 1), "three")
    made["spatial_shapes"] = torch.tensor([*shapes, (8, 16)])
    used = SimpleNamespace(tokenizer=tokenizer)
    prompt = prompt_of(made, [size, (64, 32)], used, tokenizer.convert_tokens_to_ids("<image>"))
    grid = find_grid(replace(prompt, model=model_of("lfm2_vl")))
    count = sum(height * width // 4 for height, width in shapes)
    assert np.bincount(grid.image).tolist() == [count, 32]

    def brightness(image):
        fine = cropped(image, rows, columns, 24) if rows * columns > 1 else np.zeros(0)
        page = np.asarray(image.resize((32, 16)), np.float32)
        return np.concatenate((fine, patches(torch.tensor(page).permute(2, 0, 1)[None], 4)))

    parts = [slice(0, rows * columns * 36)] if rows * columns > 1 else []
    for view in [*parts, *([slice(count - 32, count)] if overview or not parts else [])]:
        assert areas(grid, view).sum() == pytest.approx(1, abs=1e-3)
        check_some(grid, size, brightness, view)


NAMES = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}


def test_tiles_without_their_tags_are_refused():
    """Lfm2-VL may be told to write no tags: then nobody knows which tokens are the whole image."""
    tokenizer = taught(LFM2)
    text = Lfm2VlProcessor._build_image_tokens(SimpleNamespace(**NAMES), 2, 2, 36, 32, True, False)
    made = ids_of(tokenizer, text) | {"spatial_shapes": torch.tensor([(12, 12)] * 4 + [(8, 16)])}
    prompt = prompt_of(made, [(60, 60)], SimpleNamespace(tokenizer=tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    with pytest.raises(UnsupportedError, match=r"No layout rule says where the 176 image tokens .* or grid=ImageGrid"):
        find_grid(replace(prompt, model=model_of("lfm2_vl")))


STEP = ["<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>", "<im_end>", "<im_patch>"]


@pytest.mark.parametrize("size", [(90, 70), (200, 120), (300, 250), (250, 90), (1000, 20)])
def test_tiles_as_the_processor_plans_them(size):
    """Step 3.7: a run for each tile, then the whole; thin images are made square first. Its own plan, cuts and tokens."""
    tokenizer = taught(STEP)
    plan = SimpleNamespace(max_image_size=400, _is_extreme_aspect=Step3p7ImageProcessor._is_extreme_aspect)
    plan._plan_patches = lambda *given: Step3p7ImageProcessor._plan_patches(plan, *given)
    plan.pad = lambda images, pad_size: [
        torch.nn.functional.pad(one, (0, pad_size.width - one.shape[2], 0, pad_size.height - one.shape[1])) for one in images
    ]

    def resized(images: torch.Tensor, size: SizeDict, resample: object = None) -> torch.Tensor:
        return torch.nn.functional.interpolate(images, (size.height, size.width), mode="area")

    plan.resize = resized

    def run(image):
        pixels = torch.tensor(np.asarray(image, np.float32)).permute(2, 0, 1)
        page, tiles, columns, rows = Step3p7ImageProcessor._get_image_patches(plan, pixels, 96, 64, None)
        tiles = [resized(tile[None], SizeDict(height=64, width=64)) for tile in tiles]
        fine = patches(torch.cat(tiles), 8) if tiles else np.zeros(0)
        return fine, patches(page[None], 8), rows, columns

    fine, page, rows, columns = run(Image.new("RGB", size))
    ends = [column == columns - 1 and row < rows - 1 for row in range(rows) for column in range(columns)]
    told = {"num_local_patches": [len(fine) // 64], "patch_newline_masks": [ends]}
    marks = SimpleNamespace(patch_feature_placeholder="<im_patch>" * 64, image_feature_placeholder="<im_patch>" * 144)
    text = Step3p7Processor.replace_image_token(marks, told, 0)
    used = SimpleNamespace(tokenizer=tokenizer)
    prompt = prompt_of(ids_of(tokenizer, text, "what", text), [size, size], used, tokenizer.convert_tokens_to_ids("<im_patch>"))
    prompt = replace(prompt, model=model_of("step3p7"))
    grid = find_grid(prompt)
    each = len(fine) + len(page)
    assert np.bincount(grid.image).tolist() == [each, each]
    for view in [*([slice(0, len(fine))] if len(fine) else []), slice(len(fine), each)]:
        assert areas(grid, view).sum() == pytest.approx(1, abs=1e-3)
        check_some(grid, size, lambda image: np.concatenate(run(image)[:2]), view)
    with pytest.raises(UnsupportedError, match="Pass picture_sizes= to generate"):
        find_grid(replace(prompt, original_sizes=False))


@pytest.mark.parametrize("size", [(100, 70), (300, 200), (90, 300), (320, 310)])
@pytest.mark.parametrize(("kind", "mode"), [("minicpmv4_6", "16x"), ("minicpmv4_7", "16x"), ("minicpm_ocr", "4x")])
def test_slices_after_the_whole_image(size, kind, mode):
    """MiniCPM-V: a run for the whole image, then one for each slice, rows of slices ended by a line break."""
    marks = {"image_start_token": "<image>", "image_end_token": "</image>"}
    marks |= {"slice_start_token": "<slice>", "slice_end_token": "</slice>", "image_token": "<|cell|>"}
    tokenizer = taught(list(marks.values()))
    tokenizer.image_start_token = "<image>"
    merge = 4 if mode == "16x" else 2
    images = MiniCPMV4_6ImageProcessorPil(max_slice_nums=9, scale_resolution=96, patch_size=4, downsample_mode=mode)
    writes = SimpleNamespace(slice_mode=True, **marks)

    def text(made, number):
        return MiniCPMV4_6Processor.replace_image_token(writes, made, number, image_token_divisor=merge**2)

    made = images(images=[Image.new("RGB", size), Image.new("RGB", (100, 60))], return_tensors="pt")
    ids = ids_of(tokenizer, text(made, 0), "this", text(made, 1), "that") | {"target_sizes": made["target_sizes"]}
    prompt = prompt_of(
        ids, [size, (100, 60)], SimpleNamespace(tokenizer=tokenizer), tokenizer.convert_tokens_to_ids("<|cell|>")
    )
    prompt = replace(prompt, model=model_of(kind))
    grid = find_grid(prompt)
    count, views = int((grid.image == 0).sum()), made["num_patches_per_image"][0]
    whole = int(made["target_sizes"][0].prod()) // merge**2
    assert count == int(made["target_sizes"][:views].prod(1).sum()) // merge**2

    def brightness(image):
        seen, at, cells = images(images=[image], return_tensors="pt"), 0, []
        strip = seen["pixel_values"][0].mean((0, 1)).reshape(-1, 4).mean(1)  # a number for each patch
        for height, width in seen["target_sizes"].tolist():
            patch = strip[at : at + height * width].reshape(1, 1, height, width)
            cells.append(torch.nn.functional.avg_pool2d(patch, merge).flatten().numpy())
            at += height * width
        return np.concatenate(cells)

    for view in [slice(0, whole), *([slice(whole, count)] if views > 1 else [])]:
        assert areas(grid, view).sum() == pytest.approx(1, abs=1e-3)
        check_some(grid, size, brightness, view)
    wrong = replace(prompt, inputs={"target_sizes": made["target_sizes"] + 1})
    with pytest.raises(UnsupportedError, match="or grid=ImageGrid"):
        find_grid(wrong)


@pytest.mark.parametrize("size", [(100, 70), (400, 200), (90, 400)])
@pytest.mark.parametrize("columns", [True, False])
def test_two_views_of_pooled_patches(size, columns):
    """Molmo 2: windows of patches, the last of a row and column with but one; the processor's own crops, windows and tokens."""
    tokenizer = taught(["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>"])

    def resized(image, size, resample, antialias):
        return torch.nn.functional.interpolate(image, (size.height, size.width), mode="area")

    used = SimpleNamespace(resize=resized, rescale_and_normalize=lambda image, *_: image)
    used._build_overlapping_crops = lambda images, **given: Molmo2ImageProcessor._build_overlapping_crops(used, images, **given)
    options = {"max_crops": 6, "overlap_margins": [2, 2], "crop_size": 60, "resample": None, "image_patch_size": 4}
    options |= {"do_rescale": False, "rescale_factor": 1.0, "do_normalize": False, "image_mean": [], "image_std": []}

    def run(image):
        pixels = torch.tensor(np.asarray(image, np.float32)).permute(2, 0, 1)[None]
        cut = Molmo2ImageProcessor._image_batch_to_patches_and_grids
        grid, patch, windows = cut(used, pixels, image_pooling_w=2, image_pooling_h=2, **options)
        bright, real = patch[0].mean(-1).flatten(), windows[0] >= 0
        cells = (bright[windows[0].clamp(min=0)] * real).sum(1) / real.sum(1)
        return {"image_grids": grid, "image_token_pooling": windows[0].int()}, cells.numpy()

    told, cells = run(Image.new("RGB", size))
    writes = SimpleNamespace(image_use_col_tokens=columns, use_single_crop_col_tokens=None, use_single_crop_start_token=True)
    made = ids_of(tokenizer, "look", Molmo2Processor.replace_image_token(writes, told, 0)) | told
    assert (told["image_token_pooling"] < 0).any(), "a side of fifteen patches has a window of one"
    prompt = prompt_of(made, [size], None, tokenizer.convert_tokens_to_ids("<im_patch>"))
    grid = find_grid(replace(prompt, model=model_of("molmo2")))
    assert len(grid) == len(cells)
    first = int(told["image_grids"][0, :2].prod())
    for view in (slice(0, first), slice(first, len(grid))):
        assert areas(grid, view).sum() == pytest.approx(1, abs=1e-3)
        check_some(grid, size, lambda image: run(image)[1], view)
    with pytest.raises(UnsupportedError, match="or grid=ImageGrid"):
        find_grid(replace(prompt, model=model_of("molmo2"), inputs={"image_grids": told["image_grids"]}))


@pytest.mark.parametrize("size", [(100, 70), (120, 80), (45, 180)])
@pytest.mark.parametrize("share", [None, 1.7, 0.5])
def test_patches_from_the_corner(size, share):
    """Inkling: rows of patches of the resized image, and one column more than it fills if its width is a multiple.

    Its image processor needs torchvision, so the image is cut here as that does it.
    """
    most = 250
    images = SimpleNamespace(
        size={"height": 20, "width": 20}, rescale_image_frac=share, rescale_image_max_upscaled_long_edge=most
    )
    ratio = min(max(size) * (share or 1), max(most, max(size))) / max(size)
    width, height = (int(side * ratio + 0.5) for side in size)
    rows, columns = -(-height // 20), width // 20 + 1
    made = {"input_ids": torch.tensor([[1, *[7] * (rows * columns), 1]])}
    prompt = prompt_of(made, [size], SimpleNamespace(image_processor=images), 7)
    prompt = replace(prompt, model=model_of("inkling_mm_model"))
    grid = find_grid(prompt)
    assert areas(grid).sum() == pytest.approx(1, abs=1e-3)
    assert np.isnan(grid.boxes[columns - 1 :: columns]).all() == (width % 20 == 0)

    def brightness(image):
        canvas = Image.new("RGB", (columns * 20, rows * 20))
        canvas.paste(image.resize((width, height)), (0, 0))
        return patches(torch.tensor(np.asarray(canvas, np.float32)).permute(2, 0, 1)[None], 20)

    check_some(grid, size, brightness, slice(0, len(grid)))
    with pytest.raises(UnsupportedError, match="Pass picture_sizes= to generate"):
        find_grid(replace(prompt, original_sizes=False))


@pytest.mark.parametrize(("kind", "merge", "limit"), [("inkling2", 1, None), ("kimi_k25", 2, 200), ("glm5_next", 2, 200)])
@pytest.mark.parametrize("size", [(100, 70), (161, 90), (300, 250)])
def test_padding_that_is_told_as_patches(kind, merge, limit, size):
    """Images that keep their shape, or are shrunk, and are padded on the right and below: what is told counts padding."""
    edge = 10 * merge
    scale = min(1.0, (limit or max(size)) / max(size))
    kept = tuple(int(side * scale) for side in size)
    columns, rows = (-(-side // edge) for side in kept)
    made = {"input_ids": torch.tensor([[1, *[7] * (rows * columns)]]), "image_grid_thw": [[1, rows * merge, columns * merge]]}
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge, patch_size=10), model_type=kind)
    prompt = replace(prompt_of(made, [size], None, 7), model=SimpleNamespace(config=config))
    grid = find_grid(prompt)
    assert areas(grid).sum() == pytest.approx(1, abs=1e-3)

    def brightness(image):
        canvas = Image.new("RGB", (columns * edge, rows * edge))
        canvas.paste(image.resize(kept), (0, 0))
        return patches(torch.tensor(np.asarray(canvas, np.float32)).permute(2, 0, 1)[None], edge)

    check_some(grid, size, brightness, slice(0, len(grid)))
    padded = find_grid(replace(prompt, sizes=((columns * edge, rows * edge),), original_sizes=False))
    np.testing.assert_allclose(padded.boxes, ImageGrid.regular(rows, columns, (1, 1)).boxes, atol=1e-6)


@pytest.mark.parametrize("size", [(60, 40), (300, 200), (90, 400), (150, 150)])
@pytest.mark.parametrize("crop", [True, False])
def test_a_map_of_tiles_and_the_page(size, crop):
    """Unlimited-OCR: cuts and pads as DeepSeek-OCR 2 does, whose image processor runs here; packed as its model does it."""
    images = DeepseekOcr2ImageProcessorPil(
        size={"height": 64, "width": 64}, tile_size=64 if not crop else 32, min_patches=2, max_patches=6, crop_to_patches=crop
    )
    images.background_color = [0, 0, 0]  # darker than what is looked for
    images.maximum_pad_value = 32  # an option of Unlimited-OCR: larger pages keep their shape
    used = SimpleNamespace(image_processor=images, patch_size=2, downsample_ratio=2)

    def run(image):
        made = images(images=[image], return_tensors="pt")
        page = torch.nn.functional.pad(torch.tensor(patches(made["pixel_values"], 4)).reshape(16, 16), (0, 1), value=-9)
        fine = torch.zeros(0)
        if int(made["num_local_patches"][0]):
            columns, rows = round_canvas(size)
            fine = torch.tensor(patches(made["pixel_values_local"], 4)).reshape(rows, columns, 8, 8)
            fine = torch.nn.functional.pad(fine.transpose(1, 2).reshape(rows * 8, columns * 8), (0, 1), value=-9)
        return np.concatenate((fine.flatten(), page.flatten(), [-9.0]))

    def round_canvas(size):
        module = sys.modules[DeepseekOcr2ImageProcessorPil.__module__]
        return module.get_optimal_tiled_canvas(size[::-1], (32, 32), 2, 6)

    cells = run(Image.new("RGB", size))
    prompt = prompt_of({"input_ids": torch.tensor([[1, *[7] * len(cells)]])}, [size], used, 7)
    prompt = replace(prompt, model=model_of("unlimited_ocr"))
    grid = find_grid(prompt)
    assert np.isnan(grid.boxes[cells == -9]).all()
    first = len(cells) - 16 * 17 - 1
    assert (first > 0) == (crop and max(size) > 32)
    for view in [*([slice(0, first)] if first else []), slice(first, len(cells))]:
        assert areas(grid, view).sum() == pytest.approx(1, abs=1e-3)
        check_some(grid, size, run, view)
    with pytest.raises(UnsupportedError, match="Pass picture_sizes= to generate"):
        find_grid(replace(prompt, original_sizes=False))


def test_queries_of_several_views_belong_to_their_image():
    """DeepSeek-OCR 2: queries that have seen a tile or a page; an image with tiles has more of them than one without."""
    made = {"input_ids": torch.tensor([[1, *[7] * 33, 1, *[7] * 9, 1]])}
    grid = find_grid(replace(prompt_of(made, [(40, 30), (20, 20)], None, 7), model=model_of("deepseek_ocr2")))
    assert np.bincount(grid.image).tolist() == [33, 9]
    assert np.isnan(grid.boxes).all()


@pytest.mark.parametrize("between", [[], [5, 6]], ids=["one run", "a time before each frame"])
def test_frames_of_a_video(between):
    """Qwen-VL: a square in frame f lights the token of its patch in that frame; the tokens of each frame have the same boxes.

    Its video processor needs torchvision; frames are cut here by that of images, whose order of patches is the same.
    """
    used, size = (
        Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=28**2 * 16, max_pixels=28**2 * 100),
        (300, 200),
    )

    def brightness(frames):
        cut = used(images=frames, return_tensors="pt")
        return cut, cut["pixel_values"].mean(1).reshape(-1, 4).mean(1).numpy()

    dark = Image.new("RGB", size)
    cut, seen = brightness([dark] * 3)
    _, height, width = cut["image_grid_thw"][0].tolist()
    frame = [*between, *[8] * (len(seen) // 3)]
    made = {"input_ids": torch.tensor([[1, *frame, *frame, *frame, 1]]), "video_grid_thw": torch.tensor([[3, height, width]])}
    config = SimpleNamespace(
        vision_config=SimpleNamespace(spatial_merge_size=2), model_type="qwen2_vl", image_token_id=7, video_token_id=8
    )
    grid = find_grid(replace(prompt_of(made, [size], None, 8), model=SimpleNamespace(config=config)))
    each = len(seen) // 3
    assert len(grid) == 3 * each
    assert set(grid.image) == {0}
    for cell in range(0, 3 * each, 3 * each // 6 - 1):
        frames = [dark] * 3
        frames[cell // each] = lit(size, grid.pixels(cell))
        assert int(np.argmax(brightness(frames)[1])) == cell


# ------------------------------------------------------------------------------- what the models make of what is cut


def strip(patch: int) -> tuple[object, ...]:
    return 0, slice(None), slice(None), slice(4 * patch, 4 * patch + 4)


def page(patch: int) -> tuple[object, ...]:
    top, left = (slice(4 * n, 4 * n + 4) for n in divmod(patch, 8))
    return 0, slice(None), top, left


@pytest.mark.parametrize(
    ("name", "where", "columns", "merge", "first"),
    [
        ("Lfm2-VL", lambda patch: (0, patch), 4, 2, 0),
        ("MiniCPM-V 4.6", strip, 8, 4, 0),
        ("MiniCPM-V 4.7", strip, 8, 4, 0),
        ("MiniCPM-OCR", strip, 4, 2, 0),
        ("Molmo2", lambda patch: (0, patch), 4, 2, 0),
        ("Molmo2", lambda patch: (1, patch), 4, 2, 4),
        ("Step3p7", page, 8, 4, 1),  # behind one tile
    ],
)
def test_tokens_come_row_by_row_out_of_the_tower(name, where, columns, merge, first):
    """With the tower's attention switched off, a change to a patch changes the one token that the rules say is its."""
    if not works(name):
        pytest.skip(f"transformers {transformers.__version__} lacks this class or runs it wrongly")
    kind = MAKERS[name]()
    with torch.no_grad():
        for path, weight in kind.model.named_parameters():
            if path.endswith(("out_proj.weight", "o_proj.weight")) and "pool" not in path and "adapter" not in path:
                weight.zero_()
        takes = inspect.signature(kind.model.model.get_image_features).parameters
        inputs = {key: value for key, value in kind.batch([0]).items() if key in takes}

        def tokens(pixels: torch.Tensor) -> torch.Tensor:
            made = kind.model.get_image_features(**{**inputs, "pixel_values": pixels})
            return torch.cat(list(getattr(made, "pooler_output", made)))

        before = tokens(inputs["pixel_values"])
        # Step 3.7 merges by convolutions that reach over the edges of tokens, though not from their first patches.
        for patch in [4 * row * columns + 4 * column for row, column in np.ndindex(2, 2)] if first == 1 else range(columns**2):
            pixels = inputs["pixel_values"].clone()
            pixels[where(patch)] += 1
            moved = (tokens(pixels) - before).abs().amax(1) > 1e-5
            row, column = (edge // merge for edge in divmod(patch, columns))
            assert torch.nonzero(moved).flatten().tolist() == [first + row * (columns // merge) + column]


# --------------------------------------------------------------------------------------- whose tokens are they, in a batch


def grids_of_batch(kind: Family, inputs: dict[str, torch.Tensor], used: object = None, **told: object) -> list[ImageGrid]:
    keys = visual_keys(kind.model, inputs, inputs["input_ids"], inputs["attention_mask"])
    return image_grids(kind.model, used, inputs, keys.ids, keys.mask, **told)


def test_images_and_videos_in_the_order_of_their_tokens():
    """Row 1 holds an image before its video; a video is one image, with the tokens of a frame for each frame."""
    kind = MAKERS["Qwen2.5-VL (video)"]()
    inputs = kind.batch()
    grids = grids_of_batch(kind, inputs)
    for row, grid in enumerate(grids):
        frames, height, width = inputs["video_grid_thw"][row].tolist()
        frame = ImageGrid.regular(height // 2, width // 2, (4 * width, 4 * height))
        before = kind.image_tokens(row)[0] if row == 1 else 0
        assert grid.image.tolist() == [0] * before + [row % 2] * (frames * len(frame))
        np.testing.assert_array_equal(grid.boxes[before:], np.tile(frame.boxes, (frames, 1)))
        assert grid.sizes[-1] == frame.sizes[0]
    _, height, width = inputs["image_grid_thw"][0].tolist()
    original = ImageGrid.regular(height // 2, width // 2, (4 * width, 4 * height))
    np.testing.assert_array_equal(grids[1].boxes[: len(original)], original.boxes)
    assert grids[1].sizes[0] == original.sizes[0]
    own = grids_of_batch(kind, inputs, sizes=[[(30, 20)], [(64, 48), (30, 20)], [(9, 8)]])
    assert own[1].sizes == ((64, 48), (30, 20))


def test_frames_that_have_the_id_of_images():
    """GLM-4V writes the tokens of a video's frames as those of images; only video_grid_thw tells them."""
    kind = MAKERS["GLM-4V"]()
    made = kind.batch([0])
    cells = kind.image_tokens(0)[0]
    told = {name: made[name] for name in ("input_ids", "attention_mask")}
    grid = grids_of_batch(kind, {**told, "video_grid_thw": torch.tensor([[2, 2, cells]])})[0]
    assert len(grid) == cells
    np.testing.assert_array_equal(grid.boxes, np.tile(ImageGrid.regular(1, cells // 2, (8, 8)).boxes, (2, 1)))


def test_frames_whose_locations_nothing_tells():
    """A video of LLaVA-NeXT-Video is heard, not taken for text; where in it is for the caller to say."""
    kind = MAKERS["LLaVA-NeXT-Video"]()
    inputs = kind.batch([0])
    inputs["input_ids"][inputs["input_ids"] == kind.image_token] = VIDEO
    cells = int((inputs["input_ids"] == VIDEO).sum())
    with pytest.raises(UnsupportedError) as caught:
        grids_of_batch(kind, inputs)
    assert str(caught.value) == (
        f"Row 0 of the batch holds a video, and no rule says where in its frames the {cells} image tokens of "
        "LlavaNextVideoForConditionalGeneration lie: only video_grid_thw does. Pass grid=ImageGrid(...) with one box per "
        "image token, or leave the video out."
    )
    known = ImageGrid.regular(1, cells, (9, 9))
    assert grids_of_batch(kind, inputs, known=known) == [known]
    keys = visual_keys(kind.model, inputs, inputs["input_ids"], inputs["attention_mask"])
    assert int(KeyLayout.from_ids(*keys).valid.sum()) == cells


def test_every_row_of_a_batch_gets_its_own_runs():
    """Lfm2-VL: row 0 has two images, row 1 tiles; the shapes of all of them come in one list."""
    kind, tokenizer = MAKERS["Lfm2-VL"](), taught(LFM2)
    kind.model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    single, tiles = (
        Lfm2VlProcessor._build_image_tokens(SimpleNamespace(**NAMES), rows, 1, 4, count, True, True)
        for rows, count in ((1, 6), (2, 3))
    )
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    made = tokenizer([f"this {single} and {single}", tiles], return_tensors="pt", padding=True)
    shapes = [(4, 6), (6, 4), (4, 4), (4, 4), (6, 2)]
    inputs = {**made, "spatial_shapes": torch.tensor(shapes)}
    used, sizes = SimpleNamespace(tokenizer=tokenizer), [[(60, 40), (40, 60)], [(30, 90)]]
    two, tiled = grids_of_batch(kind, inputs, used, sizes=sizes)
    assert two.image.tolist() == [0] * 6 + [1] * 6
    assert [two.pixels(cell) for cell in (0, 6)] == [pytest.approx((0, 0, 20, 20)), pytest.approx((0, 0, 20, 20))]
    assert [tiled.pixels(cell) for cell in (0, 4, 8)] == [
        pytest.approx((0, 0, 15, 22.5)),
        pytest.approx((0, 45, 15, 67.5)),
        pytest.approx((0, 0, 30, 30)),
    ]


def test_images_that_are_no_text_are_told_from_each_other():
    """Idefics: rows have one or two images, a class token and a square each."""
    kind = MAKERS["Idefics"]()
    grids = grids_of_batch(kind, kind.batch())
    square = ImageGrid.regular(4, 4, (16, 16))
    for row, grid in enumerate(grids):
        assert grid.image.tolist() == np.repeat(np.arange(1 + row % 2), 17).tolist()
        assert np.isnan(grid.boxes[::17]).all()
        np.testing.assert_array_equal(grid.boxes[-16:], square.boxes)
