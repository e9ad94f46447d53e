"""``python -m gazeguard`` is the command ``gazeguard``."""

from gazeguard.cli import app

app()
