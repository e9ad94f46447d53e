"""Audit page: one self-contained HTML file with the conclusion, the shares of every probe, and a plot of them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from string import Template

from gazeguard.audit.probes import Audit, Probe, Share
from gazeguard.report import safe_text

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>GazeGuard audit</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #ccc }
h1 { overflow-wrap: anywhere }
th[scope=row] small { display: block; font-weight: normal; color: #555 } img { max-width: 100% }
</style></head><body>
<h1>Audit of $model</h1>
<p><strong>$conclusion</strong></p>
<p>$scenes drawn scenes, greedy captions. Shares of scenes with 95 % intervals (Wilson); in brackets the number of scenes, and
the number of scenes to which the probe applies.</p>
<table><thead><tr><th scope="col">probe</th><th scope="col">words change</th><th scope="col">guard withholds or flags</th>
<th scope="col">verdicts</th></tr></thead><tbody>
$rows
</tbody></table>
<p><img alt="Shares of every probe with their intervals, as in the table." src="data:image/png;base64,$plot"></p>
</body></html>
""")


def page(audit: Audit) -> str:
    """Write the page of an audit.

    Returns:
        The text of an HTML file, which has no script and makes no request.
    """
    return _PAGE.substitute(
        model=html.escape(safe_text(audit.model)),
        conclusion=html.escape(audit.conclusion),
        scenes=audit.scenes,
        rows="\n".join(map(_row, audit.probes)),
        plot=base64.b64encode(_plot(audit.probes)).decode(),
    )


def in_words(share: Share | None) -> str:
    """A share with its interval and its counts."""
    if share is None or share.share is None:
        return "no case" if share is not None else "-"
    return f"{share.share:.0%} [{share.low:.0%}, {share.high:.0%}] ({share.events}/{share.trials})"


def _row(probe: Probe) -> str:
    verdicts = ", ".join(f"{name} {number}" for name, number in sorted(probe.verdicts.items()))
    heading = f'<th scope="row">{html.escape(probe.name)}<small>{html.escape(probe.question)}</small></th>'
    cells = (in_words(probe.changed), in_words(probe.noticed), verdicts)
    return f"<tr>{heading}{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def _points(probes: Sequence[Probe], name: str, offset: float) -> Iterator[tuple[float, float, float, float]]:
    """(row, share, length of the interval below, above) of every probe that has a case."""
    for row, probe in enumerate(probes):
        share: Share | None = getattr(probe, name)
        if share is not None and share.share is not None:
            yield row + offset, share.share, share.share - share.low, share.high - share.share


def _plot(probes: Sequence[Probe]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.7 * len(probes) + 1.2), layout="constrained")
    axes = figure.subplots()
    for name, label, offset, marker in (("changed", "words change", -0.12, "o"), ("noticed", "guard notices", 0.12, "s")):
        if points := list(_points(probes, name, offset)):
            rows, shares, below, above = zip(*points, strict=True)
            axes.errorbar(shares, rows, xerr=(below, above), fmt=marker, capsize=3, label=label)
    axes.set_yticks(range(len(probes)), [probe.name for probe in probes])
    axes.set(xlim=(-0.02, 1.02), xlabel="share of scenes")
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)  # above the data
    written = io.BytesIO()
    figure.savefig(written, dpi=110, metadata={"Software": None})
    return written.getvalue()
