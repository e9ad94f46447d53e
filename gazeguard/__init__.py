"""GazeGuard: records where a vision-language model attends while it writes, and flags what the image does not support.

The names below are imported on first use (PEP 562), so that ``import gazeguard`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gazeguard.detection.detector import Detector
    from gazeguard.errors import GazeGuardError
    from gazeguard.filtering.caption_filter import CaptionFilter
    from gazeguard.fitting.run import fit
    from gazeguard.guard import GazeGuard
    from gazeguard.heads.artifact import GazeHeads
    from gazeguard.heads.discovery import find_heads
    from gazeguard.policy import Policy
    from gazeguard.report import Finding, Report, Verdict
    from gazeguard.trace import GazeTrace
    from gazeguard.vision.grid import ImageGrid

__version__ = version("gazeguard-vlm")
__all__ = [
    "CaptionFilter",
    "Detector",
    "Finding",
    "GazeGuard",
    "GazeGuardError",
    "GazeHeads",
    "GazeTrace",
    "ImageGrid",
    "Policy",
    "Report",
    "Verdict",
    "__version__",
    "find_heads",
    "fit",
]
_MODULES = {
    "CaptionFilter": "filtering.caption_filter",
    "Detector": "detection.detector",
    "Finding": "report",
    "GazeGuard": "guard",
    "GazeGuardError": "errors",
    "GazeHeads": "heads.artifact",
    "GazeTrace": "trace",
    "ImageGrid": "vision.grid",
    "Policy": "policy",
    "Report": "report",
    "Verdict": "report",
    "find_heads": "heads.discovery",
    "fit": "fitting.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gazeguard' has no attribute {name!r}")
    value = getattr(import_module(f"gazeguard.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
