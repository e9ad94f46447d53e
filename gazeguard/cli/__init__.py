"""Command line of GazeGuard: ``gazeguard COMMAND``, one file per group of commands.

Data goes to stdout; progress, notes, errors and the next step go to stderr. `gazeguard.cli.app.EXIT_CODES` has the exit codes.
"""

from gazeguard.cli import audit, captions, datasets, evaluation, fit, lab, models, policies, serving
from gazeguard.cli.app import app

# As --help lists them, and with them their headings: what somebody needs first, first.
ORDER = ("demo", "caption", "check", "filter", "replay", "fit", "eval", "audit", "doctor", "heads", "train", "serve")
app.registered_commands.sort(key=lambda each: ORDER.index(each.name or getattr(each.callback, "__name__", "")))

__all__ = ["app", "audit", "captions", "datasets", "evaluation", "fit", "lab", "models", "policies", "serving"]
