"""Gaze traces: saved and loaded to the bit, drawn, and refused where a file is no trace."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from labkit import ANYTHING, make_trace
from PIL import Image

from gazeguard.claims.parse import Span
from gazeguard.errors import ArtifactError, InputError
from gazeguard.trace import MAX_FILE_BYTES, GazeTrace
from gazeguard.vision.grid import ImageGrid

WORDS = st.lists(st.text(st.characters(), min_size=1, max_size=6), max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def real(folder) -> bytes:
    """The bytes of a saved trace."""
    make_trace(["a ", "red ", "star"]).save(folder / "real")
    return (folder / "real").read_bytes()


def load(folder: Path, data: bytes) -> GazeTrace:
    (folder / "hostile").write_bytes(data)
    return GazeTrace.load(folder / "hostile")


def with_header(real: bytes, change) -> bytes:
    """The same file with a changed header."""
    length = struct.unpack("<Q", real[:8])[0]
    header = json.loads(real[8 : 8 + length])
    change(header)
    made = json.dumps(header).encode()
    return struct.pack("<Q", len(made)) + made + real[8 + length :]


def with_meta(real: bytes, text: str) -> bytes:
    return with_header(real, lambda header: header["__metadata__"].update(gazeguard=text))


def meta_of(real: bytes) -> dict:
    length = struct.unpack("<Q", real[:8])[0]
    return json.loads(json.loads(real[8 : 8 + length])["__metadata__"]["gazeguard"])


@given(WORDS, st.integers(0, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_what_was_saved_is_loaded_to_the_bit(folder, words, heads, side, finished, seed):
    """load(save(trace)) has the same bits, types and words, also without tokens, without heads, and with NaN."""
    grid = ImageGrid.regular(side, side, (60, 40))
    grid.boxes[0] = np.nan
    trace = make_trace(words, heads, side, seed, finished=finished, grid=grid)
    trace.save(folder / "kept")
    back = GazeTrace.load(folder / "kept")
    for field in fields(GazeTrace):
        was, now = getattr(trace, field.name), getattr(back, field.name)
        if isinstance(was, np.ndarray):
            assert (was.dtype, was.shape, was.tobytes()) == (now.dtype, now.shape, now.tobytes())
        elif field.name != "grid":
            assert was == now
    assert back.grid.boxes.tobytes() == grid.boxes.tobytes()
    assert back.grid.image.tolist() == grid.image.tolist()
    assert back.grid.sizes == grid.sizes


@pytest.mark.parametrize("name", ["offsets", "logprobs", "entropy", "gaze", "segment_mass", "attribution"])
def test_an_array_of_another_shape_is_refused(name):
    """Every array fits the tokens, heads and image tokens; the message says which does not, and what was expected."""
    good = getattr(make_trace(["a ", "star"]), name)
    bad = np.concatenate((good, good), axis=-1)
    with pytest.raises(ArtifactError) as caught:
        make_trace(["a ", "star"], **{name: bad})
    assert str(caught.value) == (
        f"A trace of 2 tokens, 2 heads and 4 image tokens needs {name} of shape {good.shape}, not {bad.shape}."
    )


def test_a_trace_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        make_trace(["a"]).text = "b"


@given(st.binary(max_size=400))
@example(b"")
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 2**63) + b"{}")
def test_other_bytes_are_no_trace(folder, data):
    """Whatever the bytes, only `ArtifactError` comes out, with the path and with what writes traces."""
    with pytest.raises(ArtifactError, match=r"hostile is not a gaze trace \(.*\)\. Traces are written by GazeTrace.save"):
        load(folder, data)


@given(st.data())
def test_a_damaged_trace_is_refused_or_whole(folder, real, data):
    """A file with flipped bits or a lost end is a complete trace or an `ArtifactError`, nothing else."""
    damaged = bytearray(real)
    for at in data.draw(st.lists(st.integers(0, 8 * len(real) - 1), max_size=6)):
        damaged[at // 8] ^= 1 << at % 8
    end = data.draw(st.integers(0, len(real)))
    try:
        trace = load(folder, bytes(damaged[:end]))
    except ArtifactError:
        return
    assert end == len(real)
    assert trace.gaze.shape == (len(trace), len(trace.heads), len(trace.grid))
    assert [trace.grid.pixels(token) for token in range(len(trace.grid))]


@given(ANYTHING)
def test_hostile_metadata_in_a_good_file_are_refused(folder, real, meta):
    """The header's own part is not trusted either."""
    with pytest.raises(ArtifactError, match=r"not a gaze trace|trace format"):
        load(folder, with_meta(real, json.dumps(meta)))


@given(st.sampled_from(["heads", "sizes", "format"]), ANYTHING)
@example("sizes", [[float("inf"), 1]])
@example("sizes", [])
@example("heads", [[10**400, 0], [0, 0]])
@example("format", 2)
def test_a_hostile_value_is_refused_or_makes_a_whole_trace(folder, real, key, value):
    """One replaced value: an `ArtifactError`, or a trace whose image tokens all have pixels."""
    try:
        trace = load(folder, with_meta(real, json.dumps(meta_of(real) | {key: value})))
    except ArtifactError:
        return
    assert len(trace.heads) == trace.gaze.shape[1]
    assert all(len(trace.grid.pixels(token)) == 4 for token in range(len(trace.grid)))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 5000, '{"format": ' + "1" * 5000 + "}"], ids=["deep", "long", "long value"]
)
def test_endless_metadata_is_refused(folder, real, text):
    with pytest.raises(ArtifactError, match="not a gaze trace"):
        load(folder, with_meta(real, text))


@pytest.mark.parametrize(("dtype", "wider"), [("BF16", 2), ("F8_E4M3", 4)])
def test_types_that_numpy_lacks_are_refused(folder, real, dtype, wider):
    def change(header):
        first, *rest = header["gaze"]["shape"]
        header["gaze"].update(dtype=dtype, shape=[first * wider, *rest])

    with pytest.raises(ArtifactError, match="not a gaze trace"):
        load(folder, with_header(real, change))


def test_nothing_in_a_file_is_executed(folder):
    """A pickle that would write a file is refused and writes none."""
    target = folder / "executed"

    class Trap:
        def __reduce__(self):
            return Path.touch, (target,)

    with pytest.raises(ArtifactError, match="not a gaze trace"):
        load(folder, pickle.dumps(Trap()))
    assert not target.exists()


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_missing_file_or_a_folder_is_refused(folder, path):
    with pytest.raises(ArtifactError, match="is not a gaze trace"):
        GazeTrace.load(folder / path)


def test_a_huge_file_is_not_even_opened(folder):
    with (folder / "huge").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ArtifactError, match=rf"huge is larger than {MAX_FILE_BYTES} bytes.* Is it the right file\?"):
        GazeTrace.load(folder / "huge")


def test_another_format_is_named(folder, real):
    with pytest.raises(ArtifactError, match="has trace format 7; this version reads format 2"):
        load(folder, with_meta(real, json.dumps(meta_of(real) | {"format": 7})))


@given(WORDS, st.data())
def test_tokens_of_characters(words, data):
    """Tokens are those that cover any of the characters: each its own, all for the whole, none beyond it."""
    trace = make_trace(words)
    assert trace.tokens(0, len(trace.text)) == range(len(words))
    for token, (start, end) in enumerate(trace.offsets):
        assert trace.tokens(start, end) == range(token, token + 1)
    start, length = data.draw(st.integers(-2, len(trace.text) + 2)), data.draw(st.integers(1, 9))
    covered = [i for i, (a, b) in enumerate(trace.offsets) if set(range(a, b)) & set(range(start, start + length))]
    assert list(trace.tokens(start, start + length)) == covered


# -------------------------------------------------------------------------------------------------------- drawn, and in short


def test_a_trace_in_one_line():
    trace = make_trace(["In ", "panel ", "one ", "there ", "is ", "a ", "red ", "star ", "and ", "a ", "blue ", "moon"], 2, 3)
    assert repr(trace) == "GazeTrace(12 tokens, 2 gaze heads, 9 image tokens: 'In panel one there is a red star and ...')"
    assert repr(make_trace(["a\n"], 1, 1)) == "GazeTrace(1 token, 1 gaze head, 1 image token: 'a\\n')"
    assert repr(make_trace([], 0, 0)) == "GazeTrace(0 tokens, 0 gaze heads, 0 image tokens: '')"


def drawn(figure) -> tuple[list[tuple[float, ...]], list[float]]:
    """The rectangles of a heat map as boxes, and how opaque they are."""
    (axes,) = figure.axes
    (patches,) = axes.collections
    boxes = [(*path.vertices.min(0), *path.vertices.max(0)) for path in patches.get_paths()]
    return boxes, patches.get_facecolors()[:, 3].tolist()


def test_a_heatmap_shows_the_attention_of_its_tokens(tmp_path):
    """Numbers of tokens, a span and words are the same tokens; image tokens are drawn where they are, as dark as attended."""
    gaze = np.zeros((3, 1, 4), np.float32)
    gaze[1, 0], gaze[2, 0] = (0.0, 0.1, 0.4, 0.0), 0.25
    trace = make_trace(["a ", "red ", "star"], 1, gaze=gaze)
    image = Image.new("RGB", (60, 40))
    for at in (1, [1], range(1, 2), Span(2, 5, "red"), "red"):
        figure = trace.heatmap(at, image)
        boxes, shades = drawn(figure)
        assert boxes == [(0, 0, 30, 20), (30, 0, 60, 20), (0, 20, 30, 40), (30, 20, 60, 40)]
        np.testing.assert_allclose(shades, [0, 0.35, 0.7, 0], atol=1e-6)
        assert figure.axes[0].get_title() == "red"
        assert len(figure.axes[0].images) == 1
    figure = trace.heatmap("a red star", title="all of it")
    assert figure.axes[0].get_title() == "all of it"
    assert not figure.axes[0].images
    figure.savefig(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 1000


def test_a_heatmap_of_one_of_several_images():
    """Image tokens of another image, and those without a location, are not drawn."""
    boxes = np.array([(0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1), (np.nan,) * 4], np.float32)
    trace = make_trace(["star"], grid=ImageGrid(boxes, np.array([0, 1, 1, 1]), ((60, 40), (80, 20))))
    assert len(drawn(trace.heatmap(0))[0]) == 1
    assert drawn(trace.heatmap(0, image_index=1))[0] == [(0, 0, 40, 20), (40, 0, 80, 20)]
    with pytest.raises(InputError, match=r"has no image 2; expected a number below 2"):
        trace.heatmap(0, image_index=2)


@pytest.mark.parametrize("gaze", [0.0, np.nan])
def test_a_heatmap_without_attention_is_empty(gaze):
    """No attention, NaN, and no image tokens at all: a plain figure, and no warning."""
    trace = make_trace(["star"], gaze=np.full((1, 2, 4), gaze, np.float32))
    for empty in (trace, make_trace(["star"], 0), make_trace(["star"], side=0)):
        figure = empty.heatmap("star")
        assert not figure.axes[0].collections
        figure.canvas.draw()


@pytest.mark.parametrize("at", ["moon", "", [], -1, 2, [0, 2], Span(9, 12, "moon")])
def test_a_heatmap_of_no_token_is_refused(at):
    with pytest.raises(
        InputError, match=r"The caption 'a star' has no tokens at .*; expected words or a span of it, or numbers"
    ):
        make_trace(["a ", "star"]).heatmap(at)
    with pytest.raises(InputError, match="has no tokens"):
        make_trace([]).heatmap(0)


@given(WORDS, st.data())
def test_mean_gaze_is_finite(words, data):
    """Whatever the tokens, also none: a number for each image token, and the mean where there is one."""
    trace = make_trace(words)
    tokens = data.draw(st.lists(st.integers(0, max(0, len(words) - 1)), max_size=4)) if words else []
    mean = trace.mean_gaze(tokens)
    assert mean.shape == (4,)
    assert np.isfinite(mean).all()
    if tokens:
        np.testing.assert_allclose(mean, trace.gaze[tokens].mean((0, 1)), rtol=1e-5)
