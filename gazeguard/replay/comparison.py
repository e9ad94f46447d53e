"""Comparison of policies: reports on captions of one image, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from gazeguard.errors import InputError
from gazeguard.replay.page import Entry, page
from gazeguard.report import Report, safe_line


@dataclass(frozen=True, eq=False)
class Comparison:
    """Captions of one image by one model under several policies. It prints as text, and a notebook shows it side by side.

    Attributes:
        image: The image.
        reports: One for each policy, in the order in which they were given.

    Raises:
        InputError: There are no reports.
    """

    image: Image.Image
    reports: tuple[Report, ...]

    def __post_init__(self) -> None:
        if not self.reports:
            raise InputError("There are no policies to compare. Pass at least one, such as compare(['mark', 'rewind'], image).")

    def __repr__(self) -> str:
        verdicts = ", ".join(f"{safe_line(report.policy)}: {report.verdict}" for report in self.reports)
        return f"Comparison({verdicts})"

    def __str__(self) -> str:
        return "\n".join(f"{safe_line(report.policy)}: {report}" for report in self.reports)

    def page(self, title: str = "Policies compared") -> str:
        """Return the replay page of the captions, which shows them side by side under each of them."""
        return page([Entry(f"policy {report.policy}", self.image, report) for report in self.reports], title=title)

    def _repr_html_(self) -> str:
        """What a notebook shows: a column for each policy. Static and small."""
        columns = "".join(report.notebook_html(f"policy {report.policy}") for report in self.reports)
        return f'<div style="display:flex;flex-wrap:wrap;gap:1.5rem">{columns}</div>'
