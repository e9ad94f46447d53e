"""Replay page in a browser: real Chromium, real keys, a clock by hand; nothing in it may run or ask for anything."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reportkit import CAPTION, NASTY, blank, find, make_report, make_trace, moon_report
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from gazeguard.claims.phrases import Span
from gazeguard.replay.page import Entry, page
from gazeguard.report import Finding, Report, Verdict
from gazeguard.vision.grid import ImageGrid

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
AXE = Path(os.environ.get("GAZEGUARD_AXE", "axe.min.js"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH (Debian: chromium, chromium-driver)"
)

PATIENCE = 600  # seconds until a browser counts as stuck
QUIET = ["background-networking", "component-update", "dev-shm-usage", "gpu", "quic", "sync"]
HOSTILE = (*NASTY, "a \u202egod\u202c \u2066ball\u2069", "nul\x00 bell\x07 esc\x1b[31m", "half \ud800 \udfff", "שלום a ball")
# Runs before the page's own script, in frames, too.
WATCH = """
globalThis.refused = []; globalThis.wrong = []; globalThis.ran = 0;
addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective + " " + event.blockedURI));
addEventListener("error", (event) => wrong.push(String(event.message)));
globalThis.alert = () => { ran += 1; };
// The page plays by this clock, which the test moves.
const timers = new Map();
globalThis.setInterval = (step, milliseconds) => (timers.set(timers.size + 1, { step, milliseconds }), timers.size);
globalThis.clearInterval = (number) => timers.delete(number);
globalThis.tick = () => timers.forEach(({ step }) => step());
"""


class Replay:
    """A page in Chromium, with hands on the keyboard."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.js: Callable[..., Any] = driver.execute_script

    def keys(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector)

    @property
    def word(self) -> list[str]:
        return self.texts('#caption [aria-current="true"]')

    @property
    def listed(self) -> list[str]:
        """The titles of the captions in the list."""
        return [text.removeprefix(" · ") for text in self.texts("#list small span:last-child")]

    @property
    def nodes(self) -> int:
        return self.js("return document.querySelectorAll('*').length")

    def media(self, kind: str = "", **features: str) -> None:
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": told})

    def asked_for(self) -> list[str]:
        """Addresses of all that was requested since the last call; what the page's policy stopped was not."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        told = [(event["method"], event["params"]) for event in events]
        stopped = {params["requestId"] for _, params in told if params.get("blockedReason") == "csp"}
        requests = [params for method, params in told if method == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in requests if params["requestId"] not in stopped]


def opened(driver: webdriver.Chrome, path: Path, entries: Sequence[Entry], fragment: str = "", title: str = "Replay") -> Replay:
    """The page of entries, written to ``path``, in Chromium."""
    path.write_text(page(entries, title=title), encoding="utf-8")
    replay = Replay(driver)
    driver.get("about:blank")
    replay.media()
    replay.asked_for()
    driver.get(path.as_uri() + fragment)
    return replay


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    flags = ["headless", "no-sandbox", "no-first-run", "window-size=1280,900"]
    flags += [f"user-data-dir={tmp_path_factory.mktemp('profile')}", *(f"disable-{part}" for part in QUIET)]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    yield driver
    driver.quit()


@pytest.fixture
def show(driver: webdriver.Chrome, tmp_path: Path) -> Iterator[Callable[..., Replay]]:
    """Opens a page of entries; afterwards looks whether anything ran, failed or was asked for on the way."""
    yield partial(opened, driver, tmp_path / "replay.html")
    replay = Replay(driver)
    assert replay.js("return [ran, wrong, refused]") == [0, [], []]
    asked = replay.asked_for()
    assert asked[0].startswith("file:")
    assert {address.split(":")[0] for address in asked[1:]} <= {"data"}
    assert replay.js("return performance.getEntriesByType('resource').filter(({ name }) => !name.startsWith('data:'))") == []


def some(number: int = 5) -> list[Entry]:
    """A page of captions: every third flagged, every third unchecked; titles "caption 0" and so on."""
    entries = []
    for index in range(number):
        image = None if index % 6 == 2 else blank()
        report = [
            moon_report(),
            make_report(CAPTION, make_trace(CAPTION), find(CAPTION, 0, 10, 0.2)),
            Report("A re", Verdict.UNCHECKED, "The caption was cut off.", (), "mark", "toy", "0.1", None, "A re"),
        ][index % 3]
        entries.append(Entry(f"caption {index}", image, report))
    return entries


# ------------------------------------------------------------------------------------------------- text from outside


def named(text: str) -> str:
    """The text as the page shows it: signs that are not seen are named."""
    hidden = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(hidden, lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def test_hostile_text_is_shown_as_it_is_and_runs_nothing(show: Callable[..., Replay]) -> None:
    entries = []
    for nasty in HOSTILE:
        finding = find(nasty, 0, 4, 0.9, True, reasons=(nasty,), box=(1.0, 2.0, 30.0, 40.0))
        report = Report(nasty, Verdict.FLAG, nasty, (finding,), nasty, nasty, nasty, make_trace(nasty), nasty[1:])
        entries.append(Entry(nasty, blank(), report, (nasty,), ((nasty, (0.0, 0.0, 144.0, 144.0)),)))
    replay = show(entries, title=NASTY[0])
    assert replay.driver.title == NASTY[0]
    assert replay.js("return document.querySelectorAll('script').length") == 1
    for index, nasty in enumerate(HOSTILE):
        replay.js("showEntry(arguments[0], 0)", index)
        shown = named(nasty)
        plain = "const copy = $('caption').cloneNode(true); copy.querySelectorAll('sup').forEach((one) => one.remove());"
        assert replay.js(plain + "return copy.textContent") == shown
        assert [replay.text(f"#{place}") for place in ("title", "truths", "reasons")] == [shown] * 3
        assert replay.text("#reason") == f" · {shown}"
        assert replay.text("#filtered-caption") == named(nasty[1:])
        assert replay.text("#phrases button") == named(nasty[:4])
        assert replay.text(".staircase small") == shown
        assert replay.text("#about").count(shown) == 3
        assert replay.js("return document.querySelectorAll('img').length") == len(replay.listed) + 1
        assert shown in replay.listed


def test_the_policy_refuses_what_the_page_does_not_need(driver: webdriver.Chrome, tmp_path: Path) -> None:
    """So that the other tests' silence means something: what a hostile text would do if it got so far is seen and refused."""
    replay = opened(driver, tmp_path / "replay.html", some())
    replay.js(
        """
        fetch("http://127.0.0.1:9/a").catch(() => 0);
        const image = document.createElement("img");
        image.src = "http://127.0.0.1:9/b";
        const script = document.createElement("script");
        script.append("ran += 1");
        const frame = document.createElement("iframe");
        frame.src = "http://127.0.0.1:9/c";
        document.body.append(image, frame);
        try { document.body.append(script); } catch { refused.push("text of a script"); }
        try { document.body.insertAdjacentHTML("beforeend", "<b>"); } catch { refused.push("markup"); }
        const style = document.createElement("style");
        style.append("* { color: red }");
        document.body.append(style);
        """
    )
    expected = ("connect-src http", "img-src http", "frame-src http", "style-src-elem inline", "markup")

    def all_refused(replay: Replay) -> bool:
        refused = replay.js("return refused")
        return all(any(event.startswith(kind) for event in refused) for kind in expected)

    WebDriverWait(replay, PATIENCE).until(all_refused)
    assert replay.js("return ran") == 0
    assert {address.split(":")[0] for address in replay.asked_for()} == {"file", "data"}


# ------------------------------------------------------------------------------------------------------------- by hand


def test_a_link_opens_its_word_with_all_that_is_known(show: Callable[..., Replay]) -> None:
    entries = [Entry("a", blank(), moon_report(), ("a blue moon: not in the picture",)), *some(2)]
    replay = show(entries, "#entry=1&word=10")
    assert replay.word == ["blue"]
    assert replay.js("return document.querySelector('#caption [aria-current]').ariaLabel") == "blue, flagged"
    assert replay.text("#verdict") == "? flag"
    assert replay.text("#phrase") == "a blue moon · object"
    assert replay.text("#risk-value") == "0.90 ? flagged"
    assert replay.texts("#reasons li") == ["gaze wanders"]
    assert replay.text("#region") == "Attended region: top left, x 12 to 48, y 0 to 36 of 144 \u00d7 144 pixels"
    assert replay.texts("#truths li") == ["a blue moon: not in the picture"]
    assert replay.texts('#phrases tr[aria-current="true"] button') == ["a blue moon"]
    assert [line.split()[-1] for line in replay.texts("#phrases td:nth-child(3)")] == ["0.10", "flagged"]


def test_keys_step_through_words_and_captions(show: Callable[..., Replay]) -> None:
    replay = show(some())
    assert (replay.text("#title"), replay.word) == ("caption 0", ["a"])  # the first flag
    replay.keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert replay.word == ["ball"]
    assert replay.js("return location.hash") == "#entry=1&word=3"
    replay.keys(Keys.ARROW_LEFT)
    assert replay.word == ["red"]
    replay.keys(Keys.END, Keys.ARROW_RIGHT)
    assert replay.word == ["moon"]
    replay.keys(Keys.HOME, Keys.ARROW_LEFT)
    assert replay.word == ["A"]
    replay.keys(Keys.ARROW_DOWN)
    assert (replay.text("#title"), replay.word) == ("caption 1", ["A"])
    replay.keys(Keys.ARROW_DOWN)
    assert (replay.text("#title"), replay.text("#explanation")) == ("caption 2", "There is no image to show.")
    replay.keys(*[Keys.ARROW_DOWN] * 9)
    assert replay.text("#title") == "caption 4"
    replay.keys(*[Keys.ARROW_UP] * 9)
    assert replay.text("#title") == "caption 0"
    replay.keys(Keys.HOME, "f")
    assert replay.word == ["a"]
    assert replay.text("#phrase") == "a blue moon · object"
    replay.keys("f")
    assert (replay.text("#title"), replay.word) == ("caption 3", ["a"])
    replay.keys("f")  # there are no more
    assert (replay.text("#title"), replay.word) == ("caption 3", ["a"])


def test_space_plays_and_stops(show: Callable[..., Replay]) -> None:
    replay = show(some(), "#entry=1&word=1")
    replay.keys(Keys.SPACE)
    assert replay.text("#play") == "Pause"
    assert replay.js("return [...timers.values()].map(({ milliseconds }) => milliseconds)") == [480]
    replay.js("tick(); tick()")
    assert replay.word == ["ball"]
    replay.keys(Keys.ARROW_LEFT)
    assert (replay.text("#play"), replay.word, replay.js("return timers.size")) == ("Play", ["red"], 0)
    replay.keys(Keys.SPACE)
    replay.js("for (let step = 0; step < 20; step++) tick()")
    assert (replay.text("#play"), replay.word, replay.js("return timers.size")) == ("Play", ["moon"], 0)


def test_the_mouse_steps_too(show: Callable[..., Replay]) -> None:
    replay = show(some(), "#entry=1&word=1")
    replay.click("#caption > button:nth-of-type(2)")  # those between the phrases
    assert replay.word == ["on"]
    replay.click("#phrases tr:nth-child(2) button")
    assert (replay.word, replay.text("#risk-value")) == (["a"], "0.90 ? flagged")
    replay.click("#rows .row:last-child svg")
    assert replay.js("return state.word") not in (0, 4, 8)
    replay.click("#list li:nth-child(2) button")
    assert replay.text("#title") == "caption 1"


def test_a_phrase_behind_another_can_be_chosen(show: Callable[..., Replay]) -> None:
    caption = "a dog on grass"
    report = make_report(caption, make_trace(caption), find(caption, 0, 14, 0.6), find(caption, 0, 5, 0.5, True))
    replay = show([Entry("a", blank(), report)])
    assert replay.text("#risk-value") == "0.50 ? flagged"
    replay.click("#phrases tr:nth-child(1) button")
    assert (replay.text("#phrase"), replay.text("#risk-value")) == ("a dog on grass · object", "0.60")


def test_the_heat_lies_where_the_gaze_was_and_can_be_put_away(show: Callable[..., Replay]) -> None:
    text = "red dog"
    gaze = np.zeros((2, 1, 16))
    gaze[0, 0, 0], gaze[1, 0, 15] = 0.9, 0.5
    trace = make_trace(text, gaze, ImageGrid.regular(4, 4, (80, 40)))
    replay = show([Entry("a", blank((80, 40)), make_report(text, trace))])
    alpha = """
    const { width, height } = $("heat");
    const data = $("heat").getContext("2d").getImageData(0, 0, width, height).data;
    return [0.03, 0.97].map((place) => data[4 * (Math.floor(place * height) * width + Math.floor(place * width)) + 3]);
    """
    first, second = replay.js(alpha)
    assert first == 0 < second  # the veil
    assert replay.text("#top-region") == "top left, 100 %"
    replay.keys(Keys.ARROW_RIGHT)
    first, second = replay.js(alpha)
    assert second == 0 < first
    assert replay.text("#top-region") == "bottom right, 100 %"
    replay.keys("h")
    assert replay.js(alpha) == [0, 0]
    assert replay.js("return $('toggle').ariaPressed") == "false"


def test_search_and_filters_choose_what_the_keys_walk_through(show: Callable[..., Replay]) -> None:
    replay = show(some(9))
    assert replay.texts("#filters button") == ["✓ pass 3", "? flag 3", "○ unchecked 3", "↓ riskiest first"]
    assert replay.text("#count") == "9 of 9 captions"
    replay.keys("/", *"CUT OFF")
    assert replay.listed == ["caption 2", "caption 5", "caption 8"]
    assert (replay.text("#count"), replay.text("#title")) == ("3 of 9 captions", "caption 2")
    replay.keys(Keys.ARROW_DOWN)
    assert replay.text("#title") == "caption 5"
    replay.keys(*[Keys.BACKSPACE] * 7, *"moon")
    assert replay.text("#count") == "6 of 9 captions"
    replay.click("#filters button:nth-child(1)")
    assert replay.listed == ["caption 0", "caption 3", "caption 6"]
    assert replay.js("return document.querySelector('#filters button').ariaPressed") == "false"
    replay.click("#filters button:nth-child(2)")
    assert (replay.listed, replay.text("#count")) == ([], "No caption fits.")
    replay.keys(Keys.ARROW_DOWN)
    assert replay.text("#title") == "caption 0"  # what was shown stays
    for number in (1, 2):
        replay.click(f"#filters button:nth-child({number})")
    replay.js("$('search').value = ''; search()")
    replay.click("#filters button:nth-child(4)")
    assert replay.listed == [f"caption {number}" for number in (0, 3, 6, 1, 4, 7, 2, 5, 8)]


def test_a_page_without_anything_to_step_through_is_quiet(show: Callable[..., Replay]) -> None:
    empty = make_report("", make_trace("", np.zeros((0, 2, 144))))
    unseen = Report("A re", Verdict.UNCHECKED, "Cut off.", (), "balanced", "toy", "0.1", None, "A re")
    none, lost = "No gaze was recorded for this caption.", "There is no image to show."
    for image, report, seen in ((blank(), empty, ""), (blank(), unseen, none), (None, unseen, lost)):
        replay = show([Entry("a", image, report)])
        assert replay.driver.find_element("id", "stage").is_displayed() == (image is not None)
        replay.keys(Keys.ARROW_RIGHT, Keys.SPACE, Keys.END, "f", "h", Keys.ARROW_DOWN)
        assert (replay.word, replay.text("#explanation")) == ([], seen)
        assert not replay.driver.find_element("id", "nav").is_displayed()
        assert not replay.driver.find_element("id", "controls").is_displayed()


# ---------------------------------------------------------------------------------------------- what leads the reader


def decided_by(finding: Finding, word: str, caption: str = CAPTION) -> Finding:
    """The finding, decided by one word of its claim, as every real one is."""
    start = caption.index(word, finding.claim.start)
    return replace(finding, claim=replace(finding.claim, span=Span(start, start + len(word), word)))


def test_a_page_opens_at_the_word_that_decides_its_first_flag(show: Callable[..., Replay]) -> None:
    """And F goes from one to the next, also where two claims are decided by neighbouring words."""
    passed, flagged = make_report(CAPTION, make_trace(CAPTION)), moon_report()
    ball, moon = flagged.findings
    findings = (decided_by(replace(ball, flagged=True), "ball"), decided_by(moon, "moon"))
    replay = show([Entry("a", blank(), passed), Entry("b", blank(), replace(flagged, findings=findings))])
    assert (replay.text("#title"), replay.word, replay.text("#phrase")) == ("b", ["ball"], "A red ball · object")
    replay.keys("f")
    assert (replay.word, replay.text("#phrase")) == (["moon"], "a blue moon · object")
    replay.keys(Keys.HOME)
    replay.click("#next")
    assert replay.word == ["ball"]
    replay.click("#phrases tr:nth-child(2) button")
    assert replay.word == ["moon"]


def test_punctuation_stays_with_its_word(show: Callable[..., Replay]) -> None:
    """It is no word of its own, and no line begins with it, at any width."""
    caption = 'A "red ball" (a toy), well-known... and a moon. ' * 6 + "🌙"
    replay = show([Entry("a", blank(), make_report(caption, make_trace(caption), find(caption, 0, 11, 0.9, True)))])
    words = replay.texts("#caption button")
    assert words[:9] == ["A", "red", "ball", "a", "toy", "well-known", "and", "a", "moon"]
    assert words[-1] == "🌙"
    plain = "const copy = $('caption').cloneNode(true); copy.querySelectorAll('sup').forEach((one) => one.remove());"
    assert replay.js(plain + "return copy.textContent") == caption
    for width in range(12, 30):
        lines = replay.js(
            "$('caption').style.maxWidth = arguments[0] + 'rem';"
            "return [...document.querySelectorAll('.last')].map((one) => one.getBoundingClientRect().height / "
            "one.querySelector('button').getBoundingClientRect().height)",
            width,
        )
        assert len(lines) > 12
        assert max(lines) < 1.9


def test_each_value_over_time_stands_in_its_row(show: Callable[..., Replay]) -> None:
    gaze = np.zeros((2, 1, 16))
    gaze[0, 0, 15], gaze[1, 0, :2] = 0.9, 0.5
    replay = show(
        [Entry("a", blank((80, 40)), make_report("red dog", make_trace("red dog", gaze, ImageGrid.regular(4, 4, (80, 40)))))]
    )
    middles = """
    const middle = (one) => { const { top, bottom } = one.getBoundingClientRect(); return Math.round((top + bottom) / 2); };
    return [".staircase small", ".staircase output span"].map((which) => [...document.querySelectorAll(which)].map(middle));
    """
    labels, values = replay.js(middles)
    assert len(labels) == 9
    assert max(abs(a - b) for a, b in zip(labels, values, strict=True)) <= 2
    shown = '.staircase output span[aria-current="true"]'
    assert (replay.texts(shown), replay.texts(".staircase output span")[8]) == (["100 %"], "100 %")
    replay.keys(Keys.ARROW_RIGHT)
    assert replay.texts(".staircase output span")[0] == replay.texts(shown)[0] != "0 %"


def test_the_list_has_first_words_and_flags_and_search_marks_its_hits(show: Callable[..., Replay]) -> None:
    replay = show(some(3))
    assert replay.texts("#list b") == [CAPTION, CAPTION, "A re"]
    assert replay.texts("#list small span:first-child") == ["? flag · 1 flag", "✓ pass", "○ unchecked"]
    replay.keys("/", *"blue mo")
    assert replay.texts("#list mark") == ["blue", "mo"] * 2
    assert replay.texts("#caption .hit") == ["blue", "moon"]
    replay.keys(*[Keys.BACKSPACE] * 7, *"caption")
    assert replay.texts("#title mark") == ["caption"]
    assert replay.texts("#caption .hit") == []


def test_an_i_explains_what_is_shown(show: Callable[..., Replay]) -> None:
    replay = show(some())
    open_ = "return $('help').matches(':popover-open')"
    for press in (lambda: replay.click("#help-all"), lambda: replay.click("#help-risk"), lambda: replay.keys("i")):
        press()
        assert replay.js(open_)
        assert {"Risk", "Attribution", "Dots", "Marks"} <= set(replay.texts("#help dt"))
        replay.keys(Keys.ESCAPE)
        assert not replay.js(open_)


def test_a_page_of_unchecked_captions_says_how_to_mend_it(show: Callable[..., Replay]) -> None:
    unseen = Report("A re", Verdict.UNCHECKED, "no detector is fitted for this model", (), "mark", "toy", "0.1", None, "A re")
    replay = show([Entry("a", blank(), unseen)] * 2)
    assert replay.driver.find_element("id", "mend").is_displayed()
    assert "no detector is fitted for this model" in replay.text("#mend")
    assert "gazeguard fit MODEL --out DIR" in replay.text("#mend")
    far = [replace(unseen, reason=f"the image is far from all that the detector was fitted on ({n})") for n in range(2)]
    replay = show([Entry("a", None, replace(unseen, reason="no image")), *(Entry("a", blank(), each) for each in far)])
    assert "Fit a detector on images like these: gazeguard fit MODEL" in replay.text("#mend")
    assert replay.text("#position") == "2 of 3"  # the first has no image to show
    replay = show(some())
    assert not replay.driver.find_element("id", "mend").is_displayed()


def test_one_head_can_be_shown_in_place_of_the_mean(show: Callable[..., Replay]) -> None:
    gaze = np.zeros((2, 2, 16))
    gaze[:, 0, 0] = gaze[:, 1, 15] = 0.9
    replay = show(
        [Entry("a", blank((80, 40)), make_report("red dog", make_trace("red dog", gaze, ImageGrid.regular(4, 4, (80, 40)))))]
    )
    assert replay.texts("#head-choice option") == ["mean of 2 gaze heads", "layer 0, head 0", "layer 0, head 1"]
    alpha = """
    $("head-choice").value = arguments[0];
    $("head-choice").dispatchEvent(new Event("change"));
    const { width, height } = $("heat");
    const data = $("heat").getContext("2d").getImageData(0, 0, width, height).data;
    return [0.03, 0.97].map((place) => data[4 * (Math.floor(place * height) * width + Math.floor(place * width)) + 3] > 0);
    """
    assert [replay.js(alpha, choice) for choice in ("0", "1", "2")] == [[False, False], [False, True], [True, False]]
    assert "attention of layer 0, head 1 on the image" in replay.text("#explanation")


def test_compared_policies_stand_side_by_side_and_the_model_has_its_name(show: Callable[..., Replay]) -> None:
    report = replace(moon_report(), model_name="org/model")
    reports = (report, replace(report, policy="rewind", filtered_caption="A red ball."))
    replay = show([Entry(one.policy, blank(), one) for one in reports])
    assert replay.text("#others-title") == "Policies compared"
    assert replay.texts("#beside button") == ["balanced", "rewind"]
    assert replay.texts("#beside p .flagged") == ["a blue moon?"] * 2
    assert replay.texts("#beside small:last-child") == ["Filtered caption: nothing.", "Filtered caption: A red ball."]
    assert "org/model (fingerprint toy)" in replay.text("#about")
    for width in range(5, 15):  # no line begins with the mark
        lines = replay.js(
            "$('beside').style.width = arguments[0] + 'rem';"
            "return [...document.querySelectorAll('#beside .last')].map((one) => one.getBoundingClientRect().height)",
            width,
        )
        assert len(lines) == 2
        assert max(lines) < 30
    replay.click("#beside div:nth-child(2) button")
    assert replay.js("return location.hash") == "#entry=2&word=9"
    assert replay.texts('#beside [aria-current="true"] button') == ["rewind"]


@pytest.fixture
def phone(driver: webdriver.Chrome) -> Iterator[None]:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_on_a_phone_the_image_stays_in_sight_and_phrases_are_readable(phone: None, show: Callable[..., Replay]) -> None:
    replay = show(some())
    replay.js("$('phrases').lastChild.scrollIntoView({ block: 'end' })")
    top, bottom = replay.js("const { top, bottom } = $('stage').getBoundingClientRect(); return [top, bottom]")
    assert (top, bottom < 844 * 0.45) == (0, True)
    widths = "return [...document.querySelectorAll('#phrases td:first-child')].map((one) => one.getBoundingClientRect().width)"
    assert min(replay.js(widths)) > 220
    replay.js("scrollTo(0, 0)")
    replay.click("#next-caption")
    assert (replay.text("#title"), replay.text("#position")) == ("caption 1", "2 of 5")


@pytest.mark.skipif(
    not AXE.is_file(), reason="needs axe-core: npm install axe-core, and GAZEGUARD_AXE=node_modules/axe-core/axe.min.js"
)
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(show: Callable[..., Replay], driver: webdriver.Chrome, width: int, scheme: str) -> None:
    """axe-core's rules for WCAG 2.2 A and AA, and its best practices; also with the explanations open, and nothing checked."""
    unseen = Report("A re", Verdict.UNCHECKED, "no detector is fitted for this model", (), "mark", "toy", "0.1", None, "A re")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for entries, keys in ((some(), ""), (some(), "i"), ([Entry("a", blank(), unseen)] * 2, "")):
            replay = show(entries, "#entry=1&word=10")
            replay.media("screen", prefers_color_scheme=scheme)
            replay.keys(*keys)
            replay.js(AXE.read_text(encoding="utf-8"))
            found = driver.execute_async_script("axe.run().then(arguments[0])")
            assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ------------------------------------------------------------------------------------------------------ many captions


def test_a_page_of_500_is_as_light_as_one_of_40(show: Callable[..., Replay]) -> None:
    """The elements that exist do not grow with the captions: after opening, on the way by keys, at the list's end."""
    most = {}
    for number in (40, 500):
        replay = show(some(number))
        counts = [replay.nodes]
        for _ in range(30):
            replay.keys(Keys.ARROW_DOWN)
            counts.append(replay.nodes)
        assert replay.text("#title") == "caption 30"
        assert "caption 30" in replay.listed
        replay.js("$('scroller').scrollTop = 1e9")
        end = f"caption {number - 1}"
        WebDriverWait(replay, PATIENCE).until(lambda page, end=end: end in page.listed)
        counts.append(replay.nodes)
        most[number] = max(counts)
    assert most[500] <= most[40] + 10
    replay.keys(Keys.ARROW_DOWN)  # from the end of the list back to the caption that is shown
    assert "caption 31" in replay.listed
    assert replay.listed == sorted(replay.listed, key=lambda title: int(title.split()[1]))


# -------------------------------------------------------------------------------------------------- for every reader


def test_every_control_has_a_name(show: Callable[..., Replay]) -> None:
    replay = show(some())
    replay.driver.execute_cdp_cmd("Accessibility.enable", {})
    tree = replay.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("button", "slider", "searchbox", "image", "img", "navigation", "article", "region", "group", "table")
    found: dict[str, list[str]] = {}
    for node in tree:
        if not node["ignored"] and (role := node["role"]["value"]) in roles:
            found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert {"button", "slider", "searchbox", "navigation", "article"} <= set(found)
    assert all(name.strip() for names in found.values() for name in names), found


def test_tab_reaches_every_control_and_the_focus_is_seen(show: Callable[..., Replay]) -> None:
    replay = show(some())
    stops = []
    for _ in range(60):
        replay.keys(Keys.TAB)
        stop = replay.js(
            """
            const one = document.activeElement;
            if (one === document.body) return null;
            const { outlineStyle, outlineWidth } = getComputedStyle(one);
            const place = one.closest("#filters, #list, #caption, #beside, #phrases, .controls")?.id;
            return [place || one.id, outlineStyle !== "none" && parseFloat(outlineWidth) >= 2];
            """
        )
        if stop is None:
            break
        stops.append(stop)
    places = [place for place, _ in stops]
    ahead = ["help-all", "search", *["filters"] * 4, "list", *["controls"] * 5]
    assert places == [*ahead, "caption", *["beside"] * 4, "help-risk", *["phrases"] * 2]
    assert all(seen for _, seen in stops)


CONTRASTS = """
const channel = (value) => ((value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const below = (element) => {
  for (let one = element; one; one = one.parentElement) {
    const colour = parts(getComputedStyle(one).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
for (let node; (node = walker.nextNode()); ) {
  const element = node.parentElement;
  if (!node.data.trim() || !element.checkVisibility() || element.closest("script, template, noscript")) continue;
  const [a, b] = [light(parts(getComputedStyle(element).color)), light(below(element))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.data, light(below(document.body))]);
}
return found;
"""


@pytest.mark.parametrize(
    ("kind", "scheme", "paper"), [("screen", "light", 1), ("screen", "dark", 0), ("print", "light", 1), ("print", "dark", 1)]
)
def test_text_is_legible_in_light_in_the_dark_and_on_paper(
    show: Callable[..., Replay], kind: str, scheme: str, paper: int
) -> None:
    """Contrast as WCAG 2.2 counts it (1.4.3: 4.5 for small text); paper is white, whatever the screen was."""
    replay = show(some(), "#entry=1&word=10")
    replay.media(kind, prefers_color_scheme=scheme)
    replay.js("$('search').value = 'caption red'; search()")  # hits are marked
    found = replay.js(CONTRASTS)
    assert len(found) > 40
    assert min(found)[0] >= 4.5, min(found)
    assert found[0][2] == pytest.approx(paper, abs=0.1)
    assert replay.driver.find_element("id", "nav").is_displayed() == (kind == "screen")
    assert replay.driver.find_element("id", "phrases").is_displayed()


def test_flags_are_told_without_colour(show: Callable[..., Replay]) -> None:
    replay = show(some())
    style = "return getComputedStyle(document.querySelector(arguments[0])).textDecorationStyle"
    assert replay.js(style, "#caption .flagged") == "wavy"
    assert replay.js(style, "#caption .checked") == "dotted"
    assert replay.texts("#caption sup") == ["?"]
    assert [text[0] for text in replay.texts("#list small")] == ["?", "✓", "○", "?", "✓"]


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_sticks_out_to_the_side(show: Callable[..., Replay], width: int) -> None:
    word = "w" * 400
    report = make_report(word, make_trace(word), find(word, 0, 400, 0.9, True, reasons=(word,)))
    replay = show([Entry("a long title " + word, blank(), report, (word,), ((word, (0.0, 0.0, 144.0, 144.0)),)), *some(3)])
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    replay.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for _ in range(2):
            assert replay.js("return document.documentElement.scrollWidth - innerWidth") <= 0
            replay.keys(Keys.ARROW_DOWN)
    finally:
        replay.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---------------------------------------------------------------------------------------------------- in a notebook


def test_an_entry_replays_in_a_notebook(driver: webdriver.Chrome, tmp_path: Path) -> None:
    """The frame steps by its own keys, reaches nothing around it, and the report beside it runs nothing."""
    nasty = make_report(NASTY[1], None, find(NASTY[1], 0, 4, 0.9, True))
    path = tmp_path / "notebook.html"
    path.write_text(Entry("moon", blank(), moon_report())._repr_html_() + nasty._repr_html_(), encoding="utf-8")
    driver.get(path.as_uri())
    assert NASTY[1][4:] in driver.find_element("css selector", "div p").text
    driver.switch_to.frame(0)
    replay = Replay(driver)
    replay.click("#caption button")
    replay.keys(Keys.ARROW_RIGHT)
    assert replay.word == ["red"]
    assert replay.js("return origin") == "null"
    driver.switch_to.default_content()
    assert replay.js("return [ran, wrong]") == [0, []]


def test_a_photograph_is_shown(show: Callable[..., Replay]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((300, 200), Image.Resampling.BICUBIC)
    replay = show([Entry("a", photo, make_report())])
    WebDriverWait(replay.driver, PATIENCE).until(lambda _: replay.js("return $('image').complete"))
    assert replay.js("return [$('image').naturalWidth, $('image').naturalHeight]") == [300, 200]
    assert replay.js("return $('image').src.slice(0, 16)") == "data:image/jpeg;"
