"""Do images and words become the batch that the model was made for, and is what cannot be used refused in words?"""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import family
from hypothesis import example, given
from hypothesis import strategies as st
from labkit import processor, untrained
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from gazeguard.errors import InputError, UnsupportedError
from gazeguard.lab.training.tiny_model import build_processor
from gazeguard.lab.world import PATCHES, samples
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.encoding import check_processor, encode
from gazeguard.vision.image_tokens import image_token_id
from gazeguard.vision.images import MAX_IMAGE_BYTES, load_image
from gazeguard.vision.inputs import check_inputs, model_inputs
from gazeguard.vision.text import decode, tokenize

RED, GREY = (255, 0, 0), (128, 128, 128)
UPSIDE = 274  # the EXIF tag that says how the camera was held
# For each value of it, where the corner lies in the file that is top left when upright.
STORED = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "bl", 7: "br", 8: "tr"}


def packed(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    return packed(Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8)), kind)


FILES = {kind: noise(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}


# -------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("RGB", (8, 8), RED), "PNG", RED),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", RED),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", RED),
        (Image.new("RGBA", (8, 8), (*RED, 255)), "PNG", RED),
        (Image.new("L", (8, 8), 128), "PNG", GREY),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (8, 8), RED).quantize(4), "GIF", RED),
        (Image.fromarray(np.full((8, 8), 0x8000, np.uint16)), "PNG", GREY),
        (Image.fromarray(np.full((8, 8), 0x8000, np.uint16)), "TIFF", GREY),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_kind_of_image_becomes_rgb_of_the_same_colour(tmp_path, image, kind, expected):
    """From a file, its bytes, and the PIL image itself."""
    data = packed(image, kind)
    (tmp_path / "picture").write_bytes(data)
    for source in (tmp_path / "picture", str(tmp_path / "picture"), data, Image.open(io.BytesIO(data))):
        got = load_image(source)
        assert (got.mode, got.size) == ("RGB", (8, 8))
        np.testing.assert_allclose(got.getpixel((4, 4)), expected, atol=6)


@pytest.mark.parametrize("how", STORED)
def test_an_image_is_upright_however_the_camera_was_held(how):
    """The marked corner comes out top left; the sides are swapped when the camera lay on its side."""
    image = Image.new("RGB", (12, 8))
    vertical, horizontal = STORED[how]
    left, top = 0 if horizontal == "l" else 8, 0 if vertical == "t" else 4
    image.paste(RED, (left, top, left + 4, top + 4))
    exif = Image.Exif()
    exif[UPSIDE] = how
    upright = load_image(packed(image, exif=exif))
    assert upright.size == ((12, 8) if how < 5 else (8, 12))
    assert upright.getpixel((1, 1)) == RED
    assert load_image(upright).tobytes() == upright.tobytes(), "it is not turned again"


@pytest.mark.parametrize(
    "tags", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"]
)
def test_tags_that_cannot_be_read_turn_nothing(tags):
    image = Image.new("RGB", (12, 8), RED)
    upright = load_image(packed(image, "JPEG", exif=tags))
    assert upright.size == (12, 8)
    np.testing.assert_allclose(upright.getpixel((4, 4)), RED, atol=6)


def test_a_data_uri_is_read_and_a_url_is_not_fetched():
    """Wherever an image is named: by the command line and in Python as in the rows of a dataset."""
    image = Image.new("RGB", (12, 8), RED)
    uri = f"data:image/png;base64,{base64.b64encode(packed(image)).decode()}"
    assert load_image(uri).tobytes() == image.tobytes()
    for url in ("https://example.org/a.png", "S3://bucket/a.png"):
        with pytest.raises(InputError, match="the image is a URL, which is not fetched; download it first"):
            load_image(url)
    with pytest.raises(InputError) as caught:
        load_image(f"data:image/png;base64,{'A' * 100_000}")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_image_is_refused(kind):
    """Half a file is damaged, or no image at all; as bytes and as a PIL image that was opened but not read."""
    half = FILES[kind][: len(FILES[kind]) // 2]
    with pytest.raises(InputError, match=r"is damaged: .*Save the image again|is not an image that Pillow can read"):
        load_image(half)


def test_a_lazy_pil_image_of_a_truncated_file_is_refused():
    with pytest.raises(InputError, match=r"the given image is damaged: .*Save the image again, or leave it out"):
        load_image(Image.open(io.BytesIO(FILES["PNG"][:900])))


@given(st.sampled_from(sorted(FILES)), st.data())
def test_a_damaged_image_is_refused_or_rgb(kind, data):
    """Whatever bytes are changed, Pillow's many exceptions all come out as `InputError`."""
    damaged = bytearray(FILES[kind])
    for at in data.draw(st.lists(st.integers(0, min(200, len(damaged) - 1)), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on what it could mend
        try:
            assert load_image(bytes(damaged)).mode == "RGB"
        except InputError as error:
            assert str(error).startswith("the given image")  # noqa: PT017


@given(st.binary(max_size=200))
@example(b"")
def test_other_bytes_are_no_image(data):
    with pytest.raises(InputError, match=r"the given image is (not an image that Pillow can read. Give a PNG|damaged)"):
        load_image(data)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.png", r"missing\.png cannot be opened: No such file or directory\. Give the path of an image\."),
        (".", r"cannot be opened: Is a directory\. Give the path of an image\."),
        ("text.png", r"text\.png is not an image that Pillow can read\. Give a PNG, JPEG or WebP file\."),
        ("empty.png", r"empty\.png is not an image that Pillow can read\."),
        ("huge.png", rf"huge\.png is larger than {MAX_IMAGE_BYTES} bytes\. Make the image smaller first\."),
        ("with\0nul", r"is damaged: embedded null byte"),
    ],
)
def test_a_path_without_an_image_is_refused(tmp_path, path, message):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(InputError, match=message):
        load_image(f"{tmp_path}/{path}")


@pytest.mark.parametrize("source", [None, 3, np.zeros((4, 4, 3), np.uint8), ["a.png"]], ids=lambda x: type(x).__name__)
def test_what_is_no_image_at_all_is_refused(source):
    with pytest.raises(InputError, match=rf"path, bytes or a PIL image\), not {type(source).__name__}\."):
        load_image(source)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side):
    """A few bytes that claim to be a hundred or four hundred million pixels."""
    small = packed(Image.new("1", (1, 1)))
    header = b"IHDR" + struct.pack(">II", side, side) + small[24:29]
    bomb = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(InputError, match=r"more pixels than is safe to unpack \(.*\)\. Make it smaller first"):
        load_image(bomb)


# ------------------------------------------------------------------------------------------------------------- words


@given(st.text())
@example("a <image> and <pad> and <end_of_utterance>")
@example("🌙 é ￿")
def test_tokens_cover_the_text(text):
    """Offsets only move on, leave nothing out, and joined they are the text; special names in it are plain text."""
    tokenizer = processor().tokenizer
    ids, offsets = tokenize(tokenizer, text)
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert offsets.shape == (len(ids), 2)
    assert (np.diff(offsets, axis=0) >= 0).all()
    assert set().union(*(range(start, end) for start, end in offsets)) == set(range(len(text)))
    if text.isascii():
        assert "".join(text[start:end] for start, end in offsets) == text


def test_half_a_character_is_refused():
    """What a caption becomes when an emoji was cut in JSON."""
    with pytest.raises(InputError, match=r"Character 2 of the caption is half of a surrogate pair.*Repair its encoding"):
        tokenize(processor().tokenizer, "a \ud83c")


@given(st.text())
def test_decode_is_the_inverse_of_tokenize(text):
    """The same text, and for each token the same characters."""
    tokenizer = processor().tokenizer
    ids, offsets = tokenize(tokenizer, text)
    again, covered = decode(tokenizer, ids)
    assert again == text
    if text.isascii():
        assert covered.tolist() == offsets.tolist()


@given(st.lists(st.integers(0, 400), max_size=30))
def test_decode_of_anything_a_model_may_write(numbers):
    """Half characters and special tokens included: ends only move on, and everything is covered."""
    tokenizer = processor().tokenizer
    ids = np.array(numbers, np.int64)
    text, offsets = decode(tokenizer, ids)
    assert offsets.shape == (len(ids), 2)
    assert (np.diff(offsets[:, 1]) >= 0).all()
    assert ((offsets >= 0) & (offsets <= len(text))).all()
    assert set().union(*(range(start, end) for start, end in offsets)) == set(range(len(text)))
    special = np.isin(ids, tokenizer.all_special_ids)
    assert (offsets[special, 0] == offsets[special, 1]).all()


# ------------------------------------------------------------------------------------------------------------ batches

PROMPTS = ["Describe all panels.", "Name one object.", "Is there a red star in panel two?"]
CAPTIONS = ["In panel one there is a red star.", "", "Yes, there is a small moon and an anchor."]


@pytest.fixture(scope="module")
def sample_images() -> list[Image.Image]:
    return [sample.image for sample in samples("test", 3)]


def test_prompts_are_padded_left_and_captions_follow_at_one_place(sample_images):
    """Row r of the batch is padding, row r encoded alone, padding; the mask says which is which."""
    model, used = untrained(), processor()
    batch = encode(model, used, sample_images, PROMPTS, CAPTIONS)
    start = batch.prompt_ids.shape[1]
    for row, caption in enumerate(CAPTIONS):
        alone = encode(model, used, [sample_images[row]], [PROMPTS[row]], [caption])
        length = alone.prompt_ids.shape[1]
        told = len(batch.caption_ids[row])
        mask = torch.zeros_like(batch.inputs["attention_mask"][row])
        mask[start - length : start + told] = 1
        assert batch.inputs["attention_mask"][row].tolist() == mask.tolist()
        assert torch.equal(batch.inputs["input_ids"][row][mask.bool()], alone.inputs["input_ids"][0])
        assert torch.equal(batch.prompt_ids[row][batch.prompt_mask[row].bool()], alone.prompt_ids[0])
        assert torch.equal(batch.inputs["pixel_values"][row], alone.inputs["pixel_values"][0])
        assert batch.caption_ids[row].tolist() == tokenize(used.tokenizer, caption)[0].tolist()
        assert batch.offsets[row].tolist() == tokenize(used.tokenizer, caption)[1].tolist()


def test_prompt_and_caption_are_the_conversation_of_the_chat_template(sample_images):
    """The ids are those of the finished conversation, less the end of the answer."""
    used = processor()
    made = encode(untrained(), used, sample_images[:1], PROMPTS[:1], CAPTIONS[:1])
    user = {"role": "user", "content": [{"type": "image", "image": sample_images[0]}, {"type": "text", "text": PROMPTS[0]}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": CAPTIONS[0]}]}
    whole = used.apply_chat_template([user, answer], tokenize=True, return_dict=True, return_tensors="pt")
    assert made.inputs["input_ids"].tolist() == whole["input_ids"][:, :-1].tolist()
    assert whole["input_ids"][0, -1] == used.tokenizer.eos_token_id
    assert torch.equal(made.inputs["pixel_values"], whole["pixel_values"])


def test_padding_changes_no_logit(sample_images):
    """The model says the same of a row in a batch as of the row alone."""
    model, used = untrained(), processor()
    with torch.no_grad():
        batch = encode(model, used, sample_images, PROMPTS, CAPTIONS)
        logits = model(**model_inputs(model, batch.inputs)).logits
        start = batch.prompt_ids.shape[1]
        for row, told in enumerate(batch.caption_ids):
            alone = encode(model, used, [sample_images[row]], [PROMPTS[row]], [CAPTIONS[row]])
            single = model(**model_inputs(model, alone.inputs)).logits[0, -len(told) - 1 :]
            torch.testing.assert_close(logits[row, start - 1 : start + len(told)], single, atol=1e-4, rtol=1e-4)


def test_a_processor_without_a_chat_template_gets_image_then_prompt(sample_images):
    used = build_processor()
    used.chat_template = None
    made = encode(untrained(), used, sample_images[:2], PROMPTS[:2], CAPTIONS[:2])
    for row in range(2):
        ids = made.prompt_ids[row][made.prompt_mask[row].bool()].tolist()
        assert ids.count(image_token_id(untrained())) == PATCHES**2
        assert used.tokenizer.decode(ids, skip_special_tokens=True).endswith(PROMPTS[row])
    assert [len(told) for told in made.caption_ids] == [len(tokenize(used.tokenizer, c)[0]) for c in CAPTIONS[:2]]


def test_every_row_gets_its_grid(sample_images):
    """By default of the size that the model sees, else of the size that is said."""
    model, used = untrained(), processor()
    made = encode(model, used, sample_images[:2], PROMPTS[:2])
    for sizes, expected in ((None, (144, 144)), ([[(300, 200)], [(20, 30)]], (300, 200))):
        grids = image_grids(model, used, made.inputs, made.prompt_ids, made.prompt_mask, sizes)
        assert [len(grid) for grid in grids] == [PATCHES**2] * 2
        assert grids[0].sizes == (expected,)


def test_a_row_without_an_image_is_named(sample_images):
    model, used = untrained(), processor()
    made = encode(model, used, sample_images[:2], PROMPTS[:2])
    ids = made.prompt_ids.clone()
    ids[1][ids[1] == image_token_id(model)] = used.tokenizer.pad_token_id
    with pytest.raises(InputError, match=r"Row 1 of the batch has no image token \(id \d+\): .* Put an image into the"):
        image_grids(model, used, made.inputs, ids, made.prompt_mask)


def own_processor(leave_out="", change=lambda output: output, **parts):
    """A processor that is no class of transformers: the parts and methods of the lab's, with changes."""
    whole = processor()
    names = ("tokenizer", "image_processor", "chat_template")
    made = SimpleNamespace(**{name: getattr(whole, name) for name in names if name != leave_out} | parts)
    if leave_out != "apply_chat_template":
        made.apply_chat_template = lambda *talks, **options: change(dict(whole.apply_chat_template(*talks, **options)))
    return made


def test_a_processor_of_ones_own_without_image_token_and_with_a_plain_dict_is_read_alike(sample_images):
    """What the protocol lists is enough."""
    one, other = (encode(untrained(), each, sample_images[:2], PROMPTS[:2]).inputs for each in (processor(), own_processor()))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (list, "returns a list; expected a mapping of tensors"),
        (lambda output: {"attention_mask": output["attention_mask"]}, "has no input_ids; expected a tensor of shape"),
        (lambda output: {**output, "attention_mask": None}, "has no attention_mask; expected a tensor"),
        (lambda output: {**output, "input_ids": output["input_ids"].tolist()}, "has input_ids of list; expected a tensor"),
        (
            lambda output: {**output, "input_ids": output["input_ids"][:1]},
            r"has input_ids of \(1, \d+\); expected .* \(2, tokens\)",
        ),
    ],
    ids=["list", "no ids", "no mask", "lists", "one row"],
)
def test_an_output_that_no_model_reads_is_named(sample_images, change, message):
    with pytest.raises(InputError, match=message):
        encode(untrained(), own_processor(change=change), sample_images[:2], PROMPTS[:2])


@pytest.mark.parametrize("name", ["image_grid_thw", "mm_token_type_ids"])
def test_inputs_of_qwen_without_sizes_or_types_are_refused_by_name(name):
    """Without them image tokens would have the positions of words."""
    kind = family("Qwen2.5-VL")
    inputs = {"image_grid_thw": torch.ones(1, 3), "mm_token_type_ids": torch.ones(1, 4)}
    check_inputs(kind.model, inputs)
    with pytest.raises(InputError, match=rf"The inputs of Qwen2_5_VL\w+ have no {name}, which say where its image tokens lie"):
        check_inputs(kind.model, {**inputs, name: None})
    check_inputs(untrained(), {})


def test_a_tokenizer_is_no_processor(sample_images):
    """And what lacks a part of a processor is told which."""
    kind = type(processor().tokenizer).__name__
    with pytest.raises(InputError) as caught:
        encode(untrained(), processor().tokenizer, sample_images[:1], PROMPTS[:1])
    assert str(caught.value) == (
        f"{kind} is a tokenizer; expected the model's whole processor, with its image_processor. "
        "Pass AutoProcessor.from_pretrained(...) of the model."
    )
    check_processor(processor())
    for part, missing in (
        (processor().image_processor, "no tokenizer and no image_processor and no chat_template"),
        (SimpleNamespace(tokenizer=1, image_processor=2), "no chat_template"),
        (own_processor(leave_out="apply_chat_template"), "no apply_chat_template"),
        (own_processor(leave_out="tokenizer"), "no tokenizer"),
        (own_processor(tokenizer=SimpleNamespace(decode=1)), "no tokenizer.__call__ and no tokenizer.is_fast and no .*"),
        (SimpleNamespace(tokenizer=1, image_processor=2, chat_template=None), "no __call__"),
    ):
        with pytest.raises(InputError, match=rf"is not a vision-language processor: it has {missing}\. Pass AutoProcessor"):
            check_processor(part)


@pytest.mark.parametrize(
    "sizes",
    [
        [(64, 48), (64, 48)],
        (64, 48),
        7,
        ["ab", "cd"],
        [],
        [[(64, 48)]] * 3,
        [[(64, 48)], [(64, 48, 3)]],
        [[(64, 48)], [(64, 0)]],
        [[(64, 48)], [(64, float("inf"))]],
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_the_batch_are_refused(sample_images, sizes):
    """One bracket short, too many, no pairs, no pixels: one sentence; one list for both rows is that of each."""
    model, used = untrained(), processor()
    batch = encode(model, used, sample_images[:2], PROMPTS[:2])
    given = model, used, batch.inputs, batch.prompt_ids, batch.prompt_mask
    with pytest.raises(InputError, match=r"picture_sizes is .*; expected for each of the 2 prompts .* \[\[\(640, 480\)\]\]"):
        image_grids(*given, sizes)
    assert [grid.sizes for grid in image_grids(*given, [[(64, 48)]])] == [((64, 48),)] * 2


def test_a_text_only_model_is_refused():
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **small))
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM has no image token .* Use a vision-language model"):
        image_token_id(model)


def test_threads_that_encode_do_not_disturb_one_another():
    """A fast tokenizer keeps in itself how it pads, so that of two calls at once one gets what the other wants."""
    model, reader, rows = untrained(), processor(), samples("test", 4, seed=7)
    images, captions = [row.image for row in rows], ["A red star.", "A star and a green tree.", "A moon.", "Two red moons."]

    def ids(turn: int) -> list[list[int]]:
        prompts = [row.prompt for row in rows] if turn % 2 else ["Describe the picture."] * 4
        return encode(model, reader, images, prompts, captions[:: -1 if turn % 3 else 1]).inputs["input_ids"].tolist()

    alone = [ids(turn) for turn in range(6)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ids, range(300))) == alone * 50
