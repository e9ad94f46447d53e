"""Report as text, as JSON, as files and as a page, all of them safe whatever a caption says."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reportkit import CAPTION, NASTY, blank, find, make_report, make_trace, moon_report

from gazeguard import lab
from gazeguard.artifacts import MAX_FILE_BYTES
from gazeguard.errors import ArtifactError, InputError
from gazeguard.replay.page import LONGEST_EDGE, Entry, page, report_page
from gazeguard.report import MAX_LINES, Report, Verdict, gaze_box, gaze_boxes
from gazeguard.trace import GazeTrace
from gazeguard.vision.grid import ImageGrid


class Page(HTMLParser):
    """Reads a page as a browser would: its tags, and the text inside each kind of tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.text: list[str] = []
        self._open: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "style", "title"):
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open in ("script", "style", "title"):
            self.inside[self._open][-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.inside["script"][0])

    @property
    def captions(self) -> list[dict]:
        return self.data["captions"]


# -------------------------------------------------------------------------------------------------------- the report


def test_the_report_survives_json() -> None:
    report = moon_report()
    plain = json.loads(report.to_json())
    assert plain == report.to_dict()
    assert list(plain) == [
        "caption",
        "filtered_caption",
        "verdict",
        "reason",
        "phrases",
        "not_judged",
        "policy",
        "model",
        "model_name",
        "version",
    ]
    assert plain["phrases"][1] == {
        "text": "a blue moon",
        "start": 35,
        "end": 46,
        "kind": "object",
        "claim": "a blue moon",
        "head": "a blue moon",
        "risk": 0.9,
        "flagged": True,
        "reasons": ["gaze wanders"],
        "box": [12.0, 0.0, 48.0, 36.0],
        "answer": None,
        "threshold": None,
    }
    assert plain["phrases"][0]["box"] is None


def test_numbers_of_numpy_become_plain() -> None:
    finding = find("a dog", 0, 5, np.float32(0.25), np.bool_(True), box=tuple(np.arange(4, dtype=np.float32)))
    assert json.loads(make_report("a dog", None, finding).to_json())["phrases"][0]["risk"] == 0.25


@pytest.mark.parametrize("risk", [float("nan"), -0.1, 1.1])
def test_a_risk_that_is_no_probability_is_refused(risk: float) -> None:
    with pytest.raises(InputError, match="not a probability"):
        find("a dog", 0, 5, risk)


def test_a_trace_of_another_text_is_refused() -> None:
    with pytest.raises(InputError, match="another text"):
        make_report("a dog", make_trace("a cat"))


def test_marked_wraps_what_is_flagged() -> None:
    assert moon_report().marked() == "A red ball lies on the grass under ⟦a blue moon⟧."
    assert make_report().marked() == CAPTION


def test_marked_gives_the_terminal_no_orders() -> None:
    assert make_report("a \x1b[31mdog\x07\n\tand").marked() == "a �[31mdog�\n\tand"
    assert make_report("a \u202egod\u2069 \ud800").marked() == "a �god� �"


@given(st.text("ab \n", max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=5))
def test_marked_changes_nothing_but_the_brackets(caption: str, ends: list[tuple[int, int]]) -> None:
    spans = [(min(e), max(e)) for e in ends if min(e) < max(e) <= len(caption)]
    marked = make_report(caption, None, *(find(caption, *span, flagged=True) for span in spans)).marked()
    assert marked.replace("⟦", "").replace("⟧", "") == caption
    inside = [i for i in range(len(caption)) if any(start <= i < end for start, end in spans)]
    depth, position, seen = 0, 0, []
    for letter in marked:
        depth += {"⟦": 1, "⟧": -1}.get(letter, 0)
        assert depth in (0, 1)
        if letter not in "⟦⟧":
            seen += [position] * depth
            position += 1
    assert seen == inside


# ------------------------------------------------------------------------------------------------------- in the terminal


def flags(count: int, caption: str = "") -> Report:
    """A report whose caption names ``count`` dogs, all flagged."""
    caption = caption or " ".join(f"dog{i:02}" for i in range(count))
    return make_report(caption, None, *(find(caption, 6 * i, 6 * i + 5, 0.9, True, reasons=("why",)) for i in range(count)))


def test_a_report_prints_its_verdict_marks_and_reasons() -> None:
    report = replace(moon_report(), filtered_caption="A red ball lies on the grass.")
    assert str(report).splitlines() == [
        "FLAG      1 of 2 claims flagged",
        "  A red ball lies on the grass under ⟦a blue moon⟧.",
        "    ⟦a blue moon⟧ risk 0.90: gaze wanders",
        "    filtered caption: A red ball lies on the grass.",
    ]
    assert [line.role for line in report.lines("moon.png")] == ["verdict", "caption", "flagged", "filtered"]
    assert report.lines("moon\n.png")[0].text == "FLAG      moon .png"
    unchecked = Report("A re", Verdict.UNCHECKED, "the caption was cut off", (), "mark", "toy", "0.1", None, "")
    assert str(unchecked).splitlines() == [
        "UNCHECKED no claims judged", "  A re", "    the caption was cut off", "    filtered caption: nothing"
    ]  # fmt: skip


def test_a_long_report_prints_at_most_25_lines_and_says_what_is_left_out() -> None:
    caption = "\n\n".join(f"Line {i} of a caption." for i in range(100))
    assert str(make_report(caption)).splitlines()[-3:] == [
        "  Line 21 of a caption.", "  … 78 more lines", "    filtered caption: nothing"
    ]  # fmt: skip
    lines = str(replace(flags(60), filtered_caption=caption)).splitlines()
    assert (len(lines), lines[1].count("⟦")) == (18, 60)
    assert "    … 53 more flagged claims" in lines
    assert len(str(replace(flags(60, caption), filtered_caption=caption[1:])).splitlines()) == MAX_LINES


ANY_TEXT = st.text(max_size=60) | st.text("a \n\r\x0b\x1c\x85\u2028\u202e", max_size=80)


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.integers(0, 12))
def test_printing_steers_no_terminal_whatever_the_text(caption: str, filtered: str, reason: str, count: int) -> None:
    findings = tuple(find(caption, 0, len(caption), 0.5, True, reasons=(reason,)) for _ in range(count))
    verdict = Verdict.FLAG if count else Verdict.UNCHECKED
    report = Report(caption, verdict, reason, findings, reason, reason, reason, None, filtered)
    assert 1 <= len(str(report).splitlines()) <= MAX_LINES
    assert len(repr(report).splitlines()) == 1
    assert len(repr(report)) < 400
    hidden = {character for character in str(report) + repr(report) if unicodedata.category(character) in ("Cc", "Cs")}
    assert hidden <= {"\n", "\t"}
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(str(report) + repr(report))


def test_a_repr_says_what_the_report_is() -> None:
    assert repr(moon_report()) == "Report(flag, 1 of 2 claims flagged: a blue moon 0.90)"
    assert repr(make_report("a dog", None, find("a dog", 0, 5))) == "Report(pass, none of 1 claim flagged)"
    assert repr(make_report()) == "Report(pass, no claims judged)"
    assert repr(flags(5)) == "Report(flag, 5 of 5 claims flagged: dog00 0.90, dog01 0.90, dog02 0.90, 2 more)"
    unchecked = Report("A re", Verdict.UNCHECKED, "x" * 100, (), "mark", "toy", "0.1")
    assert repr(unchecked) == f"Report(unchecked: {'x' * 59}…)"


# ----------------------------------------------------------------------------------------------------- saved and drawn


def lab_report(guard: Any) -> tuple[Image.Image, Report]:
    """A report of the lab's guard, flagged, with claims of every kind that it judges."""
    sample = lab.samples("test", 2, seed=7)[1]
    return sample.image, guard.check(sample.image, "There is a red skull at the top left and a green castle.")


def test_a_report_comes_back_as_it_was_saved(guard: Any, tmp_path: Path) -> None:
    _, report = lab_report(guard)
    report.save(tmp_path / "report.json")
    found = Report.load(tmp_path / "report.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.safetensors"]
    assert report.flagged
    assert found.findings == report.findings
    assert found.to_dict() == report.to_dict()
    assert np.array_equal(found.trace.gaze, report.trace.gaze)
    plain = replace(report, trace=None)
    plain.save(tmp_path / "plain.json")
    assert Report.load(tmp_path / "plain.json").trace is None
    assert Report.load(tmp_path / "plain.json").findings == report.findings


@pytest.mark.parametrize("nasty", [*NASTY, "half \ud800", "nul \x00 \u202e", ""])
def test_any_text_comes_back_as_it_was_saved(nasty: str, tmp_path: Path) -> None:
    finding = find(nasty, 0, 3, np.float32(0.9), np.bool_(True), reasons=(nasty,), box=tuple(np.arange(4, dtype=np.float32)))
    report = Report(nasty, Verdict.FLAG, nasty, (finding,), nasty, nasty, nasty, make_trace(nasty), nasty[1:])
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").to_dict() == report.to_dict()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format: "),
        ({"verdict": "maybe"}, "verdict: "),
        ({"extra": 1}, "extra: "),
        ({"caption": "A blue ball lies on the grass under a blue moon."}, "the claim 'A red ball' stands where"),
        ({"findings": [{}]}, "findings.0.claim: "),
        ({"reason": None}, "reason: "),
    ],
)
def test_a_file_that_is_no_report_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    moon_report().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ArtifactError, match=re.escape(reason)):
        Report.load(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "2", '"high"'])
def test_a_saved_number_that_is_none_is_refused(number: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    moon_report().save(path)
    for name in ("0.9", "48.0") if number != "2" else ("0.9",):
        path.write_text(path.read_text().replace(name, number))
        with pytest.raises(ArtifactError, match="not a file of a saved report"):
            Report.load(path)
        moon_report().save(path)


def test_a_report_without_its_own_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    moon_report().save(path)
    make_trace("a cat").save(tmp_path / "report.safetensors")
    with pytest.raises(ArtifactError, match="another text"):
        Report.load(path)
    (tmp_path / "report.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"there is no .*report.safetensors. Put the two files side by side"):
        Report.load(path)
    with pytest.raises(InputError, match=r"is the name of a trace. Give the path of the report, such as .*report.json"):
        moon_report().save(tmp_path / "report.safetensors")
    path.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(ArtifactError, match="is larger than"):
        Report.load(path)


def test_a_plot_shows_the_attended_region_of_a_phrase(guard: Any, tmp_path: Path) -> None:
    image, report = lab_report(guard)
    finding = report.findings[0]
    for phrase in (finding, finding.claim.text, str(finding.claim)):
        figure = report.plot(image, phrase)
        (axes,) = figure.axes
        assert axes.get_title() == f"{finding.claim}: risk {finding.risk:.2f}{', flagged' * finding.flagged}"
        assert axes.patches[0].get_bbox().extents.tolist() == pytest.approx(finding.box)
        assert axes.get_xlim() == (0, image.width)
    assert report.plot(image, "skull").axes[0].get_title() == "skull"
    figure.savefig(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.width == 600


def test_a_plot_of_what_is_not_there_is_refused() -> None:
    report = moon_report()
    with pytest.raises(InputError, match=r"not say 'a cat'. Pass words of the caption; its claims begin with: 'A red ball'"):
        report.plot(blank(), "a cat")
    with pytest.raises(InputError, match=r"has no trace, so there is no gaze to draw. Check the caption again"):
        make_report().plot(blank(), "a red ball")


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_a_plot_takes_any_text_and_a_phrase_without_attention() -> None:
    for nasty in (*NASTY, r"$\frac{$", "$x$ \x1b[31m"):
        trace = make_trace(nasty, np.zeros((len(nasty.split()), 1, 144)))
        figure = make_report(nasty, trace).plot(blank(), nasty)
        assert not figure.axes[0].patches
        figure.savefig(io.BytesIO())


# ---------------------------------------------------------------------------------------------------------- the box


def cells(*marks: tuple[int, int, float], rows: int = 4, columns: int = 4) -> np.ndarray:
    """(rows * columns,) gaze with the given (row, column, mass)."""
    gaze = np.zeros((rows, columns))
    for row, column, mass in marks:
        gaze[row, column] = mass
    return gaze.ravel()


def box_trace(gaze: np.ndarray, grid: ImageGrid | None = None) -> GazeTrace:
    return make_trace(" ".join("a" * len(gaze)), gaze, grid or ImageGrid.regular(4, 4, (80, 40)))


def test_the_box_holds_the_upper_half_of_the_gaze() -> None:
    trace = box_trace(cells((1, 1, 0.3), (1, 2, 0.3), (3, 3, 0.2), (0, 0, 0.2))[None, None])
    assert gaze_box(trace, range(1)) == pytest.approx((20, 10, 60, 20))


def test_the_box_is_a_mean_over_heads_and_tokens() -> None:
    first, second = cells((0, 0, 0.9)), cells((3, 3, 1.0))
    trace = box_trace(np.stack([np.stack([first, first]), np.stack([second, second])]))
    assert gaze_box(trace, [0]) == pytest.approx((0, 0, 20, 10))
    assert gaze_box(trace, range(2)) == pytest.approx((60, 30, 80, 40))
    both = box_trace(np.stack([first * 0.5, second * 0.5])[None])
    assert gaze_box(both, range(1)) == pytest.approx((60, 30, 80, 40))


def test_equal_attention_needs_exactly_half_of_the_image_tokens() -> None:
    trace = box_trace(np.full((1, 3, 16), 0.1))
    assert gaze_box(trace, range(1)) == pytest.approx((0, 0, 80, 20))


def test_tokens_without_a_location_and_of_other_images_do_not_count() -> None:
    boxes = ImageGrid.regular(1, 4, (80, 40)).boxes.copy()
    boxes[0] = np.nan
    grid = ImageGrid(boxes, np.array([0, 0, 1, 0]), ((80, 40), (10, 10)))
    trace = box_trace(np.array([[[0.6, 0.1, 0.9, np.nan]]]), grid)
    assert gaze_box(trace, range(1)) == pytest.approx((20, 0, 40, 40))


@pytest.mark.parametrize("gaze", [np.zeros((1, 1, 16)), np.full((1, 1, 16), np.nan)])
def test_no_gaze_has_no_box(gaze: np.ndarray) -> None:
    assert gaze_box(box_trace(gaze), range(1)) is None
    assert gaze_box(box_trace(np.ones((1, 1, 16))), range(0)) is None


def test_the_boxes_of_many_words_are_those_of_each_alone() -> None:
    gaze = np.random.default_rng(0).exponential(size=(4, 2, 16)) ** 3
    gaze[1], gaze[2, 0, 3] = 0, np.nan
    trace, words = box_trace(gaze), [range(1), range(0), range(1, 2), range(2, 4), range(3, 4), range(1)]
    found = gaze_boxes(trace, words)
    assert found == [gaze_box(trace, tokens) for tokens in words]
    assert [box is None for box in found] == [False, True, True, False, False, False]
    assert gaze_boxes(trace, []) == []


@given(st.integers(0, 2**32 - 1))
def test_the_box_holds_half_of_the_gaze_and_lies_in_the_image(seed: int) -> None:
    gaze = np.random.default_rng(seed).exponential(size=(2, 2, 16)) ** 3
    trace = box_trace(gaze)
    box = gaze_box(trace, range(2))
    assert box is not None
    assert 0 <= box[0] < box[2] <= 80
    assert 0 <= box[1] < box[3] <= 40
    mass = trace.gaze.mean(axis=(0, 1))
    assert (mass * trace.grid.overlap(box)).sum() >= 0.499 * mass.sum()


# --------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("nasty", NASTY)
def test_text_from_outside_is_never_markup(nasty: str) -> None:
    plain = page([Entry("t", blank(), make_report("a dog", make_trace("a dog")))], title="t")
    finding = find(nasty, 0, 3, 0.9, True, reasons=(nasty,))
    report = Report(nasty, Verdict.FLAG, nasty, (finding,), nasty, nasty, nasty, make_trace(nasty))
    text = page([Entry(nasty, blank(), report, (nasty,))], title=nasty)
    read = Page(text)
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in Page(plain).tags]
    assert read.inside["title"] == [nasty]
    (entry,) = read.captions
    assert entry["report"] == report.to_dict()
    assert (entry["title"], entry["truth"]) == (nasty, [nasty])
    assert "\u2028" not in read.inside["script"][0]
    assert "<" not in read.inside["script"][0]


@given(st.text(max_size=60))
def test_the_words_make_up_the_caption(caption: str) -> None:
    (entry,) = Page(page([Entry("t", blank((4, 4)), make_report(caption, make_trace(caption)))])).captions
    parts = [word[part] for word in entry["words"] for part in ("gap", "before", "text", "after")]
    assert "".join(parts) + entry["tail"] == caption


def test_only_the_pages_own_style_and_script_may_run() -> None:
    read = Page(page([Entry("t", blank(), moon_report())]))
    meta = next(attrs for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in (meta["content"] or "").split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        digest = hashlib.sha256(read.inside[tag][-1].encode()).digest()
        assert rules[rule] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert [attrs.get("type") for tag, attrs in read.tags if tag == "script"] == ["application/json", None]
    assert not [name for _, attrs in read.tags for name in attrs if name.startswith("on") or name == "style"]


def test_the_page_asks_for_nothing() -> None:
    text = page([Entry("t", blank(), moon_report())])
    assert "http://" not in text
    assert "https://" not in text
    assert not [attrs for _, attrs in Page(text).tags if "src" in attrs or "href" in attrs]


def test_heat_is_relative_to_the_strongest_attention() -> None:
    text = "red dog"
    boxes = ImageGrid.regular(2, 2, (8, 8)).boxes.copy()
    boxes[3] = np.nan  # no location: left out of the page
    gaze = np.array([[[0.5, 0.25, 0, 0.9]], [[0, 0, 0.1, 0]]])
    trace = make_trace(text, gaze, ImageGrid(boxes, np.zeros(4, dtype=np.int64), ((8, 8),)))
    data = Page(page([Entry("t", blank((8, 8)), make_report(text, trace))])).data
    gaze = data["captions"][0]["gaze"]
    assert data["grids"][gaze["grid"]] == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1]]
    assert list(base64.b64decode(gaze["heat"])) == [255, 128, 0, 0, 0, 51]


def test_the_staircase_has_shares_of_a_words_attention_on_the_image() -> None:
    """By default on nine regions, whatever lies in them; else on the regions that are named, which need not cover it all."""
    text = "red dog"
    gaze = np.stack([cells((0, 0, 0.3), (5, 5, 0.1), rows=6, columns=6), cells(rows=6, columns=6)])[:, None]
    report = make_report(text, make_trace(text, gaze, ImageGrid.regular(6, 6, (60, 60))))
    half = (("upper half", (0.0, 0.0, 60.0, 30.0)), ("a corner", (50.0, 50.0, 60.0, 60.0)))
    whole, parts = Page(page([Entry("t", blank((60, 60)), report), Entry("t", blank((60, 60)), report, (), half)])).captions
    assert whole["gaze"]["regions"][0] == "top left"
    assert list(base64.b64decode(whole["gaze"]["region_share"])) == [191, 0, 0, 0, 0, 0, 0, 0, 64] + [0] * 9
    assert parts["gaze"]["regions"] == ["upper half", "a corner"]
    assert list(base64.b64decode(parts["gaze"]["region_share"])) == [191, 64, 0, 0]


@given(st.integers(0, 2**32 - 1))
def test_nine_regions_share_out_all_the_attention(seed: int) -> None:
    gaze = np.random.default_rng(seed).exponential(size=(3, 2, 25)) ** 3
    trace = make_trace("a b c", gaze, ImageGrid.regular(5, 5, (50, 40)))
    (entry,) = Page(page([Entry("t", blank((50, 40)), make_report("a b c", trace))])).captions
    levels = np.frombuffer(base64.b64decode(entry["gaze"]["region_share"]), np.uint8).reshape(3, 9)
    assert np.abs(levels.sum(axis=1, dtype=np.int64) - 255).max() <= 4  # each of nine is rounded


def test_a_word_sums_its_log_probabilities_and_hides_what_is_no_number() -> None:
    text = "moonlight 🌙"
    trace = make_trace(text)
    trace.offsets[:] = [(0, 4), (4, 9)]
    (entry,) = Page(page([Entry("t", blank(), make_report(text, trace))])).captions
    assert entry["words"][0]["logprob"] == -1.0
    assert entry["words"][0]["segment_mass"] == [0.25] * 4
    assert "logprob" not in entry["words"][1]  # no token covers it
    trace.logprobs[:] = -np.inf
    assert Page(page([Entry("t", blank(), make_report(text, trace))])).captions[0]["words"][0]["logprob"] is None


def test_a_word_in_two_phrases_shows_the_flagged_one() -> None:
    caption = "a dog on grass"
    report = make_report(caption, None, find(caption, 0, 14, 0.6), find(caption, 0, 5, 0.5, True))
    (entry,) = Page(report_page(report, blank())).captions
    assert [word["phrase"] for word in entry["words"]] == [1, 1, 0, 0]


def test_an_unchecked_report_renders_without_a_trace() -> None:
    for caption in ("A red ball lies on the gra", ""):
        report = Report(caption, Verdict.UNCHECKED, "The caption was cut off.", (), "balanced", "toy", "0.1", None)
        (entry,) = Page(report_page(report, blank())).captions
        assert entry["gaze"] is None
        assert entry["report"]["reason"] == "The caption was cut off."
        assert "logprob" not in json.dumps(entry["words"])


def test_a_trace_without_tokens_renders() -> None:
    (entry,) = Page(report_page(make_report("", make_trace("", np.zeros((0, 2, 144)))), blank())).captions
    assert entry["gaze"]["heat"] == ""
    assert entry["words"] == []


def image_in(data: dict, number: int = 0) -> tuple[str, Image.Image, bytes]:
    """Kind, image and bytes of the image that a caption is shown with."""
    start, coded = data["images"][data["captions"][number]["image"]].split(";base64,")
    raw = base64.b64decode(coded)
    return start.removeprefix("data:image/"), Image.open(io.BytesIO(raw)), raw


def photo(size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Soft noise: many colours, as in a photograph."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("image", "kind"), [(Image.new("RGBA", (3000, 1500)), "png"), (photo((3000, 1500)), "jpeg")])
def test_a_large_image_is_shrunk_and_loses_its_metadata(image: Image.Image, kind: str) -> None:
    image.info["comment"] = "where I live"
    image.getexif()[270] = "where I live"
    data = Page(report_page(make_report(), image)).data
    found, shown, raw = image_in(data)
    assert found == kind
    assert data["captions"][0]["size"] == [3000, 1500]
    assert b"where I live" not in raw
    assert shown.size == (LONGEST_EDGE, LONGEST_EDGE // 2)
    assert image.size == (3000, 1500)


def test_a_photograph_looks_as_before() -> None:
    _, shown, _ = image_in(Page(report_page(make_report(), photo())).data)
    assert np.abs(np.asarray(shown, dtype=float) - np.asarray(photo(), dtype=float)).mean() < 3


def test_captions_share_an_image_and_a_grid() -> None:
    """Two captions of one image hold it once; another image and another grid are added."""
    other, wide = blank((60, 20)), make_trace(CAPTION, grid=ImageGrid.regular(2, 6, (60, 20)))
    entries = [Entry("a", blank(), moon_report())] * 2 + [Entry("c", other, make_report(CAPTION, wide))]
    data = Page(page(entries)).data
    assert [caption["image"] for caption in data["captions"]] == [0, 0, 1]
    assert [caption["gaze"]["grid"] for caption in data["captions"]] == [0, 0, 1]
    assert [len(grid) for grid in data["grids"]] == [144, 12]
    assert len(data["images"]) == 2


def test_images_are_shrunk_to_the_edge_that_is_asked_for() -> None:
    data = Page(page(iter([Entry("t", photo((900, 600)), make_report()), Entry("t", blank(), make_report())]), edge=512)).data
    assert [image_in(data, number)[1].size for number in (0, 1)] == [(512, 341), (144, 144)]


def test_an_entry_may_have_no_image() -> None:
    (entry,) = Page(page([Entry("t", None, make_report())])).captions
    assert entry["image"] is None


def test_a_phrase_starts_at_its_first_word() -> None:
    caption = "a dog, a cat"
    report = make_report(caption, None, find(caption, 7, 12), find(caption, 0, 5), find(caption, 5, 6))
    assert Page(report_page(report, blank())).captions[0]["decided"] == [2, 0, None]


# ------------------------------------------------------------------------------------------------------ in a notebook


@pytest.mark.parametrize("nasty", NASTY)
def test_a_notebook_shows_text_from_outside_as_text(nasty: str) -> None:
    finding = find(nasty, 0, 3, 0.9, True, reasons=(nasty,))
    shown = Report(nasty, Verdict.FLAG, nasty, (finding,), nasty, nasty, nasty)._repr_html_()
    read = Page(shown)
    plain = Page(make_report("abcd", None, find("abcd", 0, 3, 0.9, True, reasons=("why",)))._repr_html_())
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in plain.tags]
    assert "".join(read.text).count(nasty[3:]) == 3  # the caption, the reason, the reasons of the phrase


def test_a_notebook_shows_verdict_marks_and_risk() -> None:
    text = "".join(Page(moon_report()._repr_html_()).text)
    assert text == f"flag · one phrase{CAPTION[:-1]}?.a blue moon: risk 0.90; gaze wandersfiltered caption: nothing"
    assert "\u202e" not in make_report("a\u202eb\x00")._repr_html_()


def test_an_entry_is_the_replay_page_in_a_frame() -> None:
    entry = Entry(NASTY[0], blank(), moon_report())
    ((tag, attributes),) = Page(entry._repr_html_()).tags
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    assert attributes["srcdoc"] == page([entry], title=NASTY[0])


def test_a_page_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one Entry"):
        page([])
