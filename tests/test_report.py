"""What do we show? The report as text, as JSON and as a page that is safe to open whatever a caption says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gazeguard.errors import InputError
from gazeguard.grid import ImageGrid
from gazeguard.phrases import Claim, Phrase, Span
from gazeguard.report import LONGEST_EDGE, Entry, Finding, Report, Verdict, gaze_box, page
from gazeguard.trace import GazeTrace

CAPTION = "A red ball lies on the grass under a blue moon."
NASTY = (
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "<!-- <script> {{data}} {{title}} {{policy}}",
    "\"quotes\" 'single' & &lt; \\u003c \\",
    "line\u2028and\u2029paragraph",
    "emoji 🌙 and e\u0301, then 月",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def make_trace(text: str, gaze: np.ndarray | None = None, grid: ImageGrid | None = None) -> GazeTrace:
    """A trace with one token per word; ``gaze`` (tokens, heads, cells) is random unless given."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    grid = grid or ImageGrid.regular(12, 12, (144, 144))
    rng = np.random.default_rng(0)
    if gaze is None:
        gaze = rng.random((len(spans), 2, len(grid)))
    tokens, heads = len(spans), gaze.shape[1]
    return GazeTrace(
        text=text,
        token_ids=np.arange(tokens),
        offsets=np.array(spans, dtype=np.int64).reshape(-1, 2),
        logprobs=np.full(tokens, -0.5, dtype=np.float32),
        entropy=np.ones(tokens, dtype=np.float32),
        gaze=gaze.astype(np.float32),
        shares=np.full((tokens, heads, 4), 0.25, dtype=np.float32),
        readout=rng.normal(size=(tokens, heads)).astype(np.float32),
        content=np.full(tokens, -2, dtype=np.float32),
        named=np.full(tokens, -1, dtype=np.float32),
        heads=tuple((0, head) for head in range(heads)),
        grid=grid,
        model="toy",
    )


def find(caption: str, start: int, end: int, risk: float = 0.5, flagged: bool = False, **more: object) -> Finding:
    text = caption[start:end]
    thing = Phrase(start, end, text, "object", Span(start, end, text), (), 0)
    return Finding(Claim("object", start, end, text, thing, thing.head, None), risk, flagged, **more)


def make_report(caption: str = CAPTION, trace: GazeTrace | None = None, *findings: Finding) -> Report:
    verdict = Verdict.FLAG if any(f.flagged for f in findings) else Verdict.PASS
    return Report(caption, verdict, "one phrase" * (verdict == "flag"), findings, "balanced", "toy", "0.1", trace)


def moon_report() -> Report:
    start = CAPTION.index("a blue moon")
    moon = find(CAPTION, start, start + 11, 0.9, True, reasons=("gaze wanders",), box=(12.0, 0.0, 48.0, 36.0))
    return make_report(CAPTION, make_trace(CAPTION), find(CAPTION, 0, 10, 0.1), moon)


def picture(size: tuple[int, int] = (144, 144)) -> Image.Image:
    return Image.new("RGB", size, (90, 140, 200))


class Page(HTMLParser):
    """Reads a page as a browser would: its tags, and the text inside each kind of tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
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
        if self._open in ("script", "style", "title"):
            self.inside[self._open][-1] += data

    @property
    def data(self) -> list[dict]:
        return json.loads(self.inside["script"][0])


# -------------------------------------------------------------------------------------------------------- the report


def test_the_report_survives_json() -> None:
    report = moon_report()
    plain = json.loads(report.to_json())
    assert plain == report.to_dict()
    assert list(plain) == ["caption", "repaired", "verdict", "reason", "phrases", "policy", "model", "version"]
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


def test_equal_gaze_needs_exactly_half_of_the_cells() -> None:
    trace = box_trace(np.full((1, 3, 16), 0.1))
    assert gaze_box(trace, range(1)) == pytest.approx((0, 0, 80, 20))


def test_cells_without_a_place_and_other_pictures_do_not_count() -> None:
    boxes = ImageGrid.regular(1, 4, (80, 40)).boxes.copy()
    boxes[0] = np.nan
    grid = ImageGrid(boxes, np.array([0, 0, 1, 0]), ((80, 40), (10, 10)))
    trace = box_trace(np.array([[[0.6, 0.1, 0.9, np.nan]]]), grid)
    assert gaze_box(trace, range(1)) == pytest.approx((20, 0, 40, 40))


@pytest.mark.parametrize("gaze", [np.zeros((1, 1, 16)), np.full((1, 1, 16), np.nan)])
def test_no_gaze_has_no_box(gaze: np.ndarray) -> None:
    assert gaze_box(box_trace(gaze), range(1)) is None
    assert gaze_box(box_trace(np.ones((1, 1, 16))), range(0)) is None


@given(st.integers(0, 2**32 - 1))
def test_the_box_holds_half_of_the_gaze_and_lies_in_the_picture(seed: int) -> None:
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
    plain = page([Entry("t", picture(), make_report("a dog", make_trace("a dog")))], title="t")
    finding = find(nasty, 0, 3, 0.9, True, reasons=(nasty,))
    report = Report(nasty, Verdict.FLAG, nasty, (finding,), nasty, nasty, nasty, make_trace(nasty))
    text = page([Entry(nasty, picture(), report, (nasty,))], title=nasty)
    read = Page(text)
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in Page(plain).tags]
    assert read.inside["title"] == [nasty]
    (entry,) = read.data
    assert entry["report"] == report.to_dict()
    assert (entry["title"], entry["truth"]) == (nasty, [nasty])
    assert "\u2028" not in read.inside["script"][0]
    assert "<" not in read.inside["script"][0]


@given(st.text(max_size=60))
def test_the_words_make_up_the_caption(caption: str) -> None:
    (entry,) = Page(page([Entry("t", picture((4, 4)), make_report(caption, make_trace(caption)))])).data
    assert "".join(word["gap"] + word["text"] for word in entry["words"]) + entry["tail"] == caption


def test_only_the_pages_own_style_and_script_may_run() -> None:
    read = Page(page([Entry("t", picture(), moon_report())]))
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
    text = page([Entry("t", picture(), moon_report())])
    assert "http://" not in text
    assert "https://" not in text
    assert not [attrs for _, attrs in Page(text).tags if "src" in attrs or "href" in attrs]


def test_heat_is_relative_to_the_strongest_look() -> None:
    text = "red dog"
    boxes = ImageGrid.regular(2, 2, (8, 8)).boxes.copy()
    boxes[3] = np.nan  # no place: left out of the page
    gaze = np.array([[[0.5, 0.25, 0, 0.9]], [[0, 0, 0.1, 0]]])
    trace = make_trace(text, gaze, ImageGrid(boxes, np.zeros(4, dtype=np.int64), ((8, 8),)))
    (entry,) = Page(page([Entry("t", picture((8, 8)), make_report(text, trace))])).data
    assert entry["gaze"]["cells"] == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1]]
    assert list(base64.b64decode(entry["gaze"]["heat"])) == [255, 128, 0, 0, 0, 51]


def test_a_word_sums_its_log_probabilities_and_hides_what_is_no_number() -> None:
    text = "moonlight 🌙"
    trace = make_trace(text)
    trace.offsets[:] = [(0, 4), (4, 9)]
    (entry,) = Page(page([Entry("t", picture(), make_report(text, trace))])).data
    assert entry["words"][0]["logprob"] == -1.0
    assert entry["words"][0]["shares"] == [0.25] * 4
    assert "logprob" not in entry["words"][1]  # no token covers it
    trace.logprobs[:] = -np.inf
    assert Page(page([Entry("t", picture(), make_report(text, trace))])).data[0]["words"][0]["logprob"] is None


def test_a_word_in_two_phrases_shows_the_flagged_one() -> None:
    caption = "a dog on grass"
    report = make_report(caption, None, find(caption, 0, 14, 0.6), find(caption, 0, 5, 0.5, True))
    (entry,) = Page(report.to_html(picture())).data
    assert [word["phrase"] for word in entry["words"]] == [1, 1, 0, 0]


def test_an_unchecked_report_renders_without_a_trace() -> None:
    for caption in ("A red ball lies on the gra", ""):
        report = Report(caption, Verdict.UNCHECKED, "The caption was cut off.", (), "balanced", "toy", "0.1", None)
        (entry,) = Page(report.to_html(picture())).data
        assert entry["gaze"] is None
        assert entry["report"]["reason"] == "The caption was cut off."
        assert "logprob" not in json.dumps(entry["words"])


def test_a_trace_without_tokens_renders() -> None:
    (entry,) = Page(make_report("", make_trace("", np.zeros((0, 2, 144)))).to_html(picture())).data
    assert entry["gaze"]["heat"] == ""
    assert entry["words"] == []


def test_a_large_picture_is_shrunk_and_loses_its_metadata() -> None:
    image = Image.new("RGBA", (3000, 1500))
    image.info["comment"] = "where I live"
    (entry,) = Page(make_report().to_html(image)).data
    png = base64.b64decode(entry["image"].removeprefix("data:image/png;base64,"))
    assert entry["size"] == [3000, 1500]
    assert b"where I live" not in png
    assert int.from_bytes(png[16:20], "big") == LONGEST_EDGE
    assert image.size == (3000, 1500)


def test_a_page_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one Entry"):
        page([])


# ------------------------------------------------------------------------------------------------------ in a browser


def browse(path: Path, fragment: str, profile: Path) -> tuple[str, str]:
    """The DOM after the page's script ran, and what the browser logged."""
    quiet = ("background-networking", "component-update", "dev-shm-usage", "gpu", "quic", "sync")
    flags = ["--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    flags += [f"--disable-{part}" for part in quiet]
    command = [str(CHROMIUM), *flags, "--dump-dom", path.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium binary on the PATH")
def test_chromium_shows_the_linked_word_and_reports_no_error(tmp_path: Path) -> None:
    caption = 'A dog says "</script><img src=x onerror=alert(1)>"'
    entries = [
        Entry("moon", picture(), moon_report(), ("a blue moon: not in the picture",)),
        Entry(NASTY[1], picture((60, 20)), make_report(caption, make_trace(caption), find(caption, 0, 5))),
        Entry("cut off", picture(), Report("A re", Verdict.UNCHECKED, "Cut off.", (), "balanced", "toy", "0.1", None)),
        Entry("empty", picture(), make_report("", make_trace("", np.zeros((0, 2, 144))))),
    ]
    path = tmp_path / "replay.html"
    path.write_text(page(entries), encoding="utf-8")

    dom, log = browse(path, "#entry=1&word=10", tmp_path / "one")
    assert "CONSOLE" not in log
    words = re.findall(r'<button[^>]*aria-current="true"[^>]*>([^<]*)</button>', dom)
    assert words == ["blue"]
    assert 'aria-label="blue, flagged"' in dom
    assert "0.90 ? flagged" in dom
    assert re.search(r'id="truths"><li>a blue moon: not in the picture', dom)

    dom, log = browse(path, "#entry=2&word=2", tmp_path / "two")
    assert "CONSOLE" not in log
    assert re.findall(r'<button[^>]*aria-current="true"[^>]*>([^<]*)</button>', dom) == ["dog"]
    assert "onerror=alert(1)&gt;" in re.sub(r"</?(button|span)[^>]*>", "", dom)
    assert not re.search(r"<img[^>]*onerror", dom)

    for entry, words in ((3, []), (4, [])):
        dom, log = browse(path, f"#entry={entry}", tmp_path / str(entry))
        assert "CONSOLE" not in log
        assert re.findall(r'<button[^>]*aria-current="true"[^>]*>([^<]*)</button>', dom) == words
