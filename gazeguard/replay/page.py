"""Replay page: one self-contained HTML file that shows reports word by word, with the gaze on the image.

The page has no library and makes no request, and a content security policy lets nothing run but its own script. Text from
outside (captions, titles, reasons) travels as JSON and reaches the page through ``textContent`` alone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from PIL import Image

from gazeguard.errors import InputError
from gazeguard.replay.data import PageData
from gazeguard.report import Report, safe_text
from gazeguard.vision.geometry import Box

LONGEST_EDGE = 1024  # pixels; larger images are shrunk in the page, which stays small enough to mail


@dataclass(frozen=True, eq=False)
class Entry:
    """One caption of a replay page.

    Attributes:
        title: What the caption is about, such as the path of its image.
        image: The image that the report is about (the first one, if there were several), at the size its boxes count in; None
            where there is none that could be shown.
        report: The report.
        truth: Lines of ground truth to show, such as "a blue moon: not in the image".
        regions: Names and boxes (pixels) of the regions of the image between which the attention is followed over time, such as
            the panels of a strip; by default nine equal ones.
    """

    title: str
    image: Image.Image | None
    report: Report
    truth: tuple[str, ...] = ()
    regions: tuple[tuple[str, Box], ...] = ()

    def _repr_html_(self) -> str:
        """What a notebook shows: the replay page of this caption, in a frame that can reach nothing around it."""
        document = html.escape(page([self], title=self.title))
        return f'<iframe sandbox="allow-scripts" srcdoc="{document}" style="width:100%;height:44rem;border:0"></iframe>'


def page(entries: Iterable[Entry], title: str = "GazeGuard replay", edge: int = LONGEST_EDGE) -> str:
    """Write the replay page of several captions. ``#entry=2&word=5`` after its address opens it there, counted from one.

    Args:
        entries: The captions. They are asked for one by one, so that of many images one is held at a time.
        title: Of the page.
        edge: Pixels to which larger images are shrunk: with 512, a page of 500 photographs stays below 100 MB.

    Returns:
        The text of an HTML file.

    Raises:
        InputError: There are no entries.
    """
    template, policy = _template()
    data = PageData(edge)
    for entry in entries:
        data.add(entry.title, entry.image, entry.report, entry.truth, entry.regions)
    if not data.captions:
        raise InputError("A replay page needs something to replay. Pass at least one Entry.")
    values = {"title": html.escape(safe_text(title)), "policy": policy, "data": data.to_json()}
    # One pass: a caption that contains "{{title}}" stays as it is.
    return re.sub(r"\{\{(title|policy|data)\}\}", lambda match: values[match[1]], template)


def report_page(report: Report, image: Image.Image) -> str:
    """Write the replay `page` of one report alone, with ``image``, the image that the caption is about."""
    return page([Entry("Caption", image, report)], title="GazeGuard report")


@cache
def _template() -> tuple[str, str]:
    """The page without its data, and the content security policy that allows its one style and one script."""
    template = resources.files("gazeguard.replay").joinpath("template.html").read_text(encoding="utf-8")
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL) for tag in ("style", "script"))
    assert style  # both are part of the package
    assert script
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style[1])}; script-src {_hash(script[1])}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return template, policy


def _hash(text: str) -> str:
    """The CSP source that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
